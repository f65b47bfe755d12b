"""A forest of one's own domains (Branch-Train-Merge, §3): a seed on all of them, a branch for each.

  python -m demix forest plan --config=configs/forest_domains.py:news,legal,code --forest=F --data=S
  python -m demix forest run --forest=F
  python -m demix evaluate --model=forest:F --mix

S is a token store that has the domains; any number of them. The recipe is the forest's of
configs/quickstart.py, the tokens are dense's, half for the seed (or SHARE) and the rest in equal
parts for the branches. As in the papers a branch makes as many updates as it would have been
dense's second half, each with an equal part of dense's sequences. Where the number of domains does
not divide these, an update has the next multiple of sequences, and there are as many fewer updates:
tokens stay within half an update of the quick start's. The dense run to compare with has the same
batch and updates; `python -m configs.forest_domains news,legal,code` says which, and the tokens.
"""

import sys

from ml_collections import ConfigDict

from configs.quickstart import get_config as recipe
from configs.quickstart_corpus import TRAIN

ALL = ','.join(TRAIN)


def base_of(domains: tuple, steps: int = 0) -> dict:
  """The dense recipe on `domains`, its sequences in an update a multiple of how many there are.

  Args:
    steps: its updates at the batch of configs/quickstart.py; 0: those it has there.
  """
  base = recipe('forest').to_dict()
  rows, steps = base['data']['batch_size'], steps or base['train']['steps']
  whole = -(-rows // len(domains)) * len(domains)
  base['data'] |= {'domains': domains, 'batch_size': whole}
  base['train']['steps'] = round(steps * rows / whole)
  return base


def plan_of(base: dict, seed: int, parent: str = 'seed') -> dict:
  """A plan: `seed` updates on all domains of the base, the rest of them in branches, one a domain.

  Raises:
    ValueError: the seed or the branches would have no update.
  """
  domains, steps, rows = base['data']['domains'], base['train']['steps'], base['data']['batch_size']
  if not 0 < seed < steps:
    raise ValueError(f'{seed} of {steps} updates for the seed: between 0 and all of them')
  branch = {'train': {'steps': steps - seed}, 'data': {'batch_size': rows // len(domains)},
            'init': {'optimizer': 'continue'}}
  assert seed * rows + len(domains) * (steps - seed) * (rows // len(domains)) == steps * rows
  return {'base': base,
          'seed': {'train': {'steps': seed}, 'optimizer': {'schedule_steps': steps}},
          'experts': tuple({'name': name, 'domains': (name,), 'parent': parent, 'changes': branch}
                           for name in domains)}


def get_config(arg=ALL):
  """[SHARE,]DOMAIN,DOMAIN…: share of the updates that train the seed (0.5), written with a point;
  domains of the store (those of the quick start)."""
  words = [w.strip() for w in arg.split(',') if w.strip()]
  share = float(words.pop(0)) if words and '.' in words[0] else 0.5  # no name has a point
  if len(set(words)) < max(2, len(words)):
    raise ValueError(f'{arg!r}: name two domains or more of the store, each once: '
                     'configs/forest_domains.py:news,legal,code')
  base = base_of(tuple(words))
  return ConfigDict(plan_of(base, round(base['train']['steps'] * share)))


def summary(arg: str) -> str:
  """What the plan trains, and how the dense run of the same tokens is called."""
  plan = get_config(arg).to_dict()
  data, steps = plan['base']['data'], plan['base']['train']['steps']
  seed, first = plan['seed']['train']['steps'], plan['experts'][0]['changes']
  length, rows = data['sequence_length'], first['data']['batch_size']
  each = first['train']['steps'] * rows * length
  total = steps * data['batch_size'] * length
  return (f'seed        {seed} updates of {data["batch_size"]} × {length} tokens: '
          f'{seed * data["batch_size"] * length:,}\n'
          f'branches    {len(plan["experts"])}, {first["train"]["steps"]} updates of {rows} × '
          f'{length} each: {each:,} each\n'
          f'together    {total:,} tokens; as many as dense: python -m demix train '
          f'--config=configs/quickstart.py:dense --config.data.path=S '
          f'--config.data.domains={",".join(data["domains"])} '
          f'--config.data.batch_size={data["batch_size"]} --config.train.steps={steps} --workdir=W')


if __name__ == '__main__':
  print(summary(*sys.argv[1:]))
