r"""64 domains in rounds of 8, 8, 16 and 32 (Branch-Train-Merge §5, "64_domain_curriculum"): experts
of each later round branch from the average of all earlier ones, weighted by the posterior of their
domain's valid text.

  python -m demix forest plan --config=configs/papers/btm/curriculum.py:350m --forest=F --data=STORE
  python -m demix forest run --forest=F

STORE holds the 64 domains under these names. Paper: 64 experts of 350M equal a dense 1.3B that took
2.5 times the compute. The released code has the names; which domains made which round, and the
budgets of later rounds, are not known to us: here the list's order, and as many updates as an
expert of the first round, on a schedule of their own. Not run here: only built and checked
(tests/forest/test_plan_configs.py).
"""

import itertools

from ml_collections import ConfigDict

from configs.papers.btm.recipe import DOMAINS, branch, recipe, seed
from demix import settings

MORE = (
    '2021newscrawl', 'biology', 'books', 'business', 'csharp', 'cplusplus', 'css', 'c', 'chemistry',
    'clothing', 'economics', 'electronics', 'engineering', 'go', 'geography', 'geology', 'html',
    'history', 'home', 'javascript', 'java', 'markdown', 'mathematics', 'movies', 'php',
    'philosophy', 'physics', 'psychology', 'python', 'ruby', 'sociology', 'sports', 'acl', 'yelp',
    'art', 'bookcorpus', 'c4', 'codecontests', 'cord19', 'dmmathematics', 'envsci',
    'gamingcomments', 'gutenberg', 'hackernews', 'materials', 'na', 'opensubtitles', 'polisci',
    'sportscomments', 'stackexchange', 'stackoverflow', 'stories', 'supremecourt', 'twitter',
    'uspto', 'wikipedia')
ROUNDS = (8, 16, 32, 64)  # domains after each round


def get_config(size='350m'):
  """size: 125m, 350m, 760m or 1.3b."""
  config, names = recipe(size), (*DOMAINS, *MORE)
  first = branch(config)
  later = {'train': first['train'], 'data': first['data'],
           'optimizer': {'schedule_steps': first['train']['steps']}}
  experts = [{'name': name, 'domains': (name,), 'parent': 'seed', 'changes': first}
             for name in DOMAINS]
  for before, after in itertools.pairwise(ROUNDS):
    experts += [{'name': name, 'domains': (name,), 'parent': 'posterior', 'of': names[:before],
                 'changes': later} for name in names[before:after]]
  return ConfigDict({'base': settings.to_dict(config), 'seed': seed(config),
                     'experts': tuple(experts)})
