"""The recipe of Branch-Train-Merge (Li et al. 2022, 2208.03306), by size.

Updates and tokens per update of the main comparison: the seed makes half of the updates on all
domains, each of 8 experts the other half on its own with an eighth of the sequences, so that
tokens are those of the dense run at every moment. Optimizer as in configs/papers/demix/recipe.py.
Not run here.
"""

import dataclasses

from configs.papers.demix.recipe import recipe as demix
from demix.config import Config

# size: (sequences of 1024 tokens per update of seed and dense, updates in all)
BUDGETS = {
    '125m': (1024, 80_000),   # 1.05M tokens per update, 84B in all
    '350m': (2048, 32_000),   # 2.1M, 67B
    '760m': (4096, 24_000),   # 4.2M, 101B
    '1.3b': (8192, 12_000),   # 8.4M, 101B
}
DOMAINS = ('1b', 'cs', 'legal', 'med', 'webtext', 'realnews', 'reddit', 'reviews')


def recipe(size: str) -> Config:
  """The dense run at one size."""
  sequences, updates = BUDGETS[size]
  config = demix(size)
  return dataclasses.replace(
      config, data=dataclasses.replace(config.data, domains=DOMAINS, batch_size=sequences),
      train=dataclasses.replace(config.train, steps=updates, eval_every=2000,
                                checkpoint_every=2000, keep_every=0))


def branch(config: Config) -> dict:
  """What an expert of the first round changes: its half of the updates, moments continued."""
  return {'train': {'steps': config.train.steps // 2},
          'data': {'batch_size': config.data.batch_size // len(DOMAINS)},
          'init': {'optimizer': 'continue'}}


def seed(config: Config) -> dict:
  """What the seed changes."""
  return {'train': {'steps': config.train.steps // 2},
          'optimizer': {'schedule_steps': config.train.steps}}
