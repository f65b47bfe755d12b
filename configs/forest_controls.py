"""Controls of the quick start's forest (Branch-Train-Merge §4 and §5). F is a forest, W the quick
start's folder; each arm has exactly the training tokens of configs/quickstart.py:dense.

  dense on everything   python -m demix train --config=configs/quickstart.py:dense …
  DEMix                 python -m demix train --config=configs/quickstart.py:demix …
  random split          launch/random_split.sh --workdir W     (random_split below, on text cut at
                        random: same number of experts, seed, prior estimation)
  no seed               python -m demix forest plan --config=configs/forest_controls.py:no_seed \
                          --forest=F --data=W/corpus && python -m demix forest run --forest=F
  three seed shares     the same with :seed_shares; one share: python -m demix evaluate \
                          --model=forest:F --mix=cached --mix.members=cplusplus-17,science-17,…
  averages of unrelated inits   python -m demix merge --model=forest:F --weights=posterior \
                          --domain=stubs --unrelated --workdir=A     (F: that of no_seed)

seed_shares: three forests that share one seed, branched at a sixth, half and five sixths of the
budget, to a step or two; the tokens of the seed up to the branch and of the four branches are those
of dense. The papers: half is best, a sixth is worse than dense (125M). no_seed: every expert from
parameters of its own; the paper's ensemble of them still beats dense, their average is noise.
"""

from ml_collections import ConfigDict

from configs.forest_quickstart import get_config as forest
from configs.quickstart_corpus import TRAIN

ARMS = ('no_seed', 'random_split', 'seed_shares')
SHARES = {17: 1, 50: 3, 83: 5}  # sixths
PARTS = tuple(f'part{i}' for i in range(len(TRAIN)))  # of launch/random_split.sh


def get_config(arm='no_seed'):
  """arm: no_seed, random_split or seed_shares."""
  if arm not in ARMS:
    raise ValueError(f'{arm!r}: one of {", ".join(ARMS)}')
  plan = forest().to_dict()
  base, [first, *_] = plan['base'], plan['experts']
  steps, changes = base['train']['steps'], first['changes']
  if arm == 'random_split':
    base['data']['domains'] = PARTS
    experts = [{'name': name, 'domains': (name,), 'changes': changes} for name in PARTS]
    return ConfigDict(plan | {'experts': tuple(experts)})
  if arm == 'no_seed':
    experts = [{'name': name, 'domains': (name,), 'parent': 'random', 'changes': {
        'seed': i + 1, 'data': changes['data']}} for i, name in enumerate(TRAIN)]
    return ConfigDict(plan | {'seed': None, 'experts': tuple(experts)})
  every = round(steps / 6)  # the seed is branched where it has a checkpoint
  at = {share: sixths * every for share, sixths in SHARES.items()}
  experts = [{'name': f'{name}-{share}', 'domains': (name,), 'parent': f'seed@{step}',
              'changes': changes | {'train': {'steps': steps - step}}}
             for share, step in at.items() for name in TRAIN]
  seed = plan['seed'] | {'train': {'steps': max(at.values()), 'checkpoint_every': every}}
  return ConfigDict(plan | {'seed': seed, 'experts': tuple(experts)})
