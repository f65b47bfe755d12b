r"""Dense LM on domains in proportion to their size: the paper's Dense (DEMix §4).

  python -m demix train --config=configs/papers/demix/dense_proportional.py:125m \
    --config.data.path=STORE --workdir=W

Sizes: 125m, 350m, 760m, 1.3b. STORE holds the eight training domains.
Paper: in-domain average perplexity 20.6 / 16.5 / 14.5 / 13.8 (from memory).
Time: 48 hours on 32 (125m), 64, 128, 128 V100s in the paper. Not run here: only built and counted
(tests/test_configs.py).
"""

from configs.papers.demix.recipe import recipe
from demix.config import config_dict


def get_config(size='125m'):
  """size: 125m, 350m, 760m or 1.3b."""
  return config_dict(recipe(size, sampling='proportional'))
