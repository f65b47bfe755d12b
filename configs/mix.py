"""Ways of mixing experts, for --mix of evaluate and generate.

  python -m demix evaluate --model=W --mix=configs/mix.py:cached
  python -m demix evaluate --model=W --mix=configs/mix.py:released --mix.blocks=100

The papers: DEMix §5, BTM §2.2, c-BTM §2.3; docs/method.md says where their released code differs.
"""

from ml_collections import ConfigDict

from demix import settings
from demix.mix.mix_config import MixConfig

WAYS = {
    'average': dict(prior='none', posterior='none'),
    'uniform': dict(prior='uniform'),
    'updating': dict(prior='updating'),
    'cached': dict(prior='cached'),
    'released': dict(prior='cached', posterior='last_token'),  # what the published numbers are
    'top2': dict(prior='cached', experts_k=2),  # BTM's sparse ensemble; two experts are run
    'decayed': dict(prior='uniform', decay=0.95),
    'window': dict(prior='uniform', window=32),
    'logits': dict(prior='cached', combine='logits'),
    'clusters': dict(posterior='clusters'),  # c-BTM as it is written
    'clusters_released': dict(posterior='clusters', kernel='d4'),
    'clusters_top2': dict(posterior='clusters', weights_k=2),
    'pick': dict(prior='cached', combine='pick'),
}


def get_config(way='cached'):
  """way: one of WAYS."""
  if way not in WAYS:
    raise ValueError(f'{way!r}: one of {", ".join(WAYS)}')
  return ConfigDict(settings.to_dict(MixConfig(**WAYS[way])))
