"""A forest that grows (Branch-Train-Merge §3.2): domains of a second round branch from averages of
the first round's experts, weighted by the posterior of the new domain's valid text.

  python -m demix forest plan --config=configs/forest_rounds.py:1 --forest=F --data=W/corpus
  python -m demix forest run --forest=F
  python -m demix forest plan --config=configs/forest_rounds.py:2 --forest=F --data=W/corpus
  python -m demix forest run --forest=F
  python -m demix evaluate --model=forest:F --mix=given,cached

W: the quick start's folder. Round 1: a seed on sessions and stubs, a branch for each, as in
configs/forest_quickstart.py. Round 2: cplusplus and science, which the seed never saw. The first
round's schedule has ended, so the second round starts a new one, at half of the peak (not tuned).
The table is over old and new domains; the domain that no expert has is held out.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as recipe

FIRST, SECOND = ('sessions', 'stubs'), ('cplusplus', 'science')


def rounds(base: dict, first, second) -> dict:
  """The plan of both rounds: half of the base's updates for the seed, half for each expert.

  Args:
    base: a whole Config, nested. first, second: domains of the rounds; () for no second one.
  """
  steps, rows = base['train']['steps'], base['data']['batch_size']
  half, peak = steps // 2, base['optimizer']['learning_rate']
  base = base | {'data': base['data'] | {'domains': first}}
  branch = {'train': {'steps': steps - half}, 'data': {'batch_size': rows // len(first)}}
  later = branch | {'optimizer': {'learning_rate': peak / 2, 'schedule_steps': steps - half}}
  experts = [{'name': name, 'domains': (name,), 'parent': 'seed',
              'changes': branch | {'init': {'optimizer': 'continue'}}} for name in first]
  experts += [{'name': name, 'domains': (name,), 'parent': 'posterior', 'of': first,
               'changes': later} for name in second]
  return {'base': base, 'experts': tuple(experts),
          'seed': {'train': {'steps': half}, 'optimizer': {'schedule_steps': steps}}}


def get_config(round='2'):
  """round: 1 or 2; the second has the first in it."""
  if round not in ('1', '2'):
    raise ValueError(f'{round!r}: 1 or 2')
  return ConfigDict(rounds(recipe('forest').to_dict(), FIRST, SECOND if round == '2' else ()))
