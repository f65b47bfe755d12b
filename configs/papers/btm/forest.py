r"""An ELMforest of eight domains (Branch-Train-Merge §4).

  python -m demix forest plan --config=configs/papers/btm/forest.py:125m --forest=F --data=STORE
  python -m demix forest run --forest=F          (or --only=legal, each on its own machine)
  python -m demix evaluate --model=forest:F --mix=given,cached

Sizes: 125m, 350m, 760m, 1.3b. STORE holds the eight training domains. Paper: ensemble, average
perplexity on them 17.2 / 14.7 / 13.4 / 13.0, dense 19.9 / 16.3 / 14.7 / 14.2 (from memory).
Not run here: only built and counted (tests/forest/test_plan_configs.py).
"""

from ml_collections import ConfigDict

from configs.papers.btm.recipe import DOMAINS, branch, recipe, seed
from demix import settings


def get_config(size='125m'):
  """size: 125m, 350m, 760m or 1.3b."""
  config = recipe(size)
  return ConfigDict({
      'base': settings.to_dict(config), 'seed': seed(config),
      'experts': tuple({'name': name, 'domains': (name,), 'parent': 'seed',
                        'changes': branch(config)} for name in DOMAINS)})
