"""The quick start's forest (Branch-Train-Merge, §3): a seed on all domains, a branch for each.

  python -m demix forest plan --config=configs/forest_quickstart.py --forest=F --data=W/corpus
  python -m demix forest run --forest=F
  python -m demix evaluate --model=forest:F --mix

Tokens: half for the seed, an eighth for each of four branches, together exactly those of the dense
run of configs/quickstart.py. As in the papers a branch makes as many updates as it would have been
dense's second half, each with a quarter of the sequences; moments and schedule go on. Claim (BTM
§4): below dense at equal tokens; here at 0.751, 0.762, 0.752 of its test perplexity with the expert
given (seeds 0, 1, 2; docs/quickstart.md). Time: 60 s of CPU time.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as recipe
from configs.quickstart_corpus import TRAIN


def plan(base: dict, share: float = 0.5) -> dict:
  """A seed and a branch for each domain, together the tokens of `base`, a whole Config, nested."""
  steps = base['train']['steps']
  seed = round(steps * share)
  if not 0 < seed < steps:
    raise ValueError(f'share {share}: between 0 and 1')
  rows = base['data']['batch_size'] // len(TRAIN)
  branch = {'train': {'steps': steps - seed}, 'data': {'batch_size': rows},
            'init': {'optimizer': 'continue'}}
  return {
      'base': base,
      'seed': {'train': {'steps': seed}, 'optimizer': {'schedule_steps': steps}},
      'experts': tuple({'name': name, 'domains': (name,), 'parent': 'seed', 'changes': branch}
                       for name in TRAIN)}


def get_config(arg='0.5'):
  """SHARE[,SEED]: share of the updates that train the seed; of parameters and shuffles (0)."""
  share, _, random = arg.partition(',')
  base = recipe('forest').to_dict() | {'seed': int(random or 0)}
  return ConfigDict(plan(base, float(share)))
