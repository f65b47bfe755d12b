r"""Dense LM with a <domain> symbol before each block: +DomainToken (DEMix §4).

  python -m demix train --config=configs/papers/demix/domain_token.py:125m \
    --config.data.path=STORE --workdir=W

Sizes: 125m, 350m, 760m, 1.3b. STORE holds the eight training domains.
Paper: in-domain average perplexity 19.2 at 125M (from memory).
Time: 48 hours on 32 (125m), 64, 128, 128 V100s in the paper. Not run here: only built and counted
(tests/test_configs.py).
"""

from configs.papers.demix.recipe import recipe
from demix.config import config_dict


def get_config(size='125m'):
  """size: 125m, 350m, 760m or 1.3b."""
  return config_dict(recipe(size, domain_token=True))
