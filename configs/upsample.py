"""Late up-sampling (2406.03476, methods of domain mixing): for most of the run every domain has its
own share; at the end one of them gets much more. The dense baseline of every expert method.

  python -m demix train --config=configs/upsample.py:stubs --config.data.path=W/corpus \\
      --workdir=W/up

The argument is DOMAIN or DOMAIN,ARM. Arms: late (the paper's: equal shares for 80 % of the updates,
then 5 times as much of DOMAIN), ramp (the same share, on a straight line from there to the last
step), constant (no up-sampling, what it is compared with). Size and recipe: dense of
configs/quickstart.py, whose corpus it runs on. Whoever changes train.steps gives data.schedule too.
"""

from configs.quickstart import get_config as recipe
from configs.quickstart_corpus import TRAIN

SHARE = 5
ARMS = {
    'late': dict(schedule='{late} {domain}={share}'),
    'ramp': dict(schedule='{late} {domain}=1, {steps} {domain}={share}', schedule_kind='linear'),
    'constant': {},
}


def get_config(arg='stubs,late'):
  """DOMAIN or DOMAIN,ARM: stubs by default; late, ramp or constant (late)."""
  domain, _, arm = arg.partition(',')
  arm = arm or 'late'
  if domain not in TRAIN or arm not in ARMS:
    raise ValueError(f'{arg!r}: a domain of {", ".join(TRAIN)} and an arm of {", ".join(ARMS)}')
  config = recipe('dense')
  steps = config.train.steps
  config.data.sampling, config.data.weights = 'weights', dict.fromkeys(TRAIN, 1)
  for key, value in ARMS[arm].items():
    config.data[key] = value.format(late=steps * 4 // 5, steps=steps, domain=domain, share=SHARE)
  return config
