r"""DEMix: every FFN is a set of domain experts (DEMix §3).

  python -m demix train --config=configs/papers/demix/demix.py:125m \
    --config.data.path=STORE --workdir=W

Sizes: 125m, 350m, 760m, 1.3b. STORE holds the eight training domains.
Paper: given expert, in-domain average perplexity 18.4 / 15.5 / 14.2 / 13.8 (from memory).
Time: 48 hours on 32 (125m), 64, 128, 128 V100s in the paper. Not run here: only built and counted
(tests/test_configs.py).
"""

from configs.papers.demix.recipe import recipe
from demix.config import config_dict


def get_config(size='125m'):
  """size: 125m, 350m, 760m or 1.3b."""
  return config_dict(recipe(size, ffn='demix'))
