"""Late up-sampling (2406.03476, methods of domain mixing): for most of the run every domain has its
own share; at the end one of them gets much more. The dense baseline of every expert method.

  python -m demix train --config=configs/upsample.py:code --config.data.path=W/corpus --workdir=W/up

The argument is DOMAIN or DOMAIN,ARM. Arms: late (the paper's: equal shares for 80 % of the updates,
then 5 times as much of DOMAIN), ramp (the same share, on a straight line from there to the last
step), constant (no up-sampling, what it is compared with). Size and recipe: configs/quickstart.py,
whose corpus it runs on, so about a minute. Whoever changes train.steps gives data.schedule too.
"""

from configs.quickstart_corpus import TRAIN
from demix.config import Config, TrainConfig, config_dict
from demix.data.data_config import DataConfig
from demix.model_config import ExecutionConfig, preset
from demix.optimizer_config import OptimizerConfig

STEPS, SHARE = 300, 5
ARMS = {
    'late': dict(schedule='{late} {domain}={share}'),
    'ramp': dict(schedule='{late} {domain}=1, {steps} {domain}={share}', schedule_kind='linear'),
    'constant': {},
}


def get_config(arg='code,late'):
  """DOMAIN or DOMAIN,ARM: code by default; late, ramp or constant (late)."""
  domain, _, arm = arg.partition(',')
  arm = arm or 'late'
  if domain not in TRAIN or arm not in ARMS:
    raise ValueError(f'{arg!r}: a domain of {", ".join(TRAIN)} and an arm of {", ".join(ARMS)}')
  change = {k: v.format(late=STEPS * 4 // 5, steps=STEPS, domain=domain, share=SHARE)
            for k, v in ARMS[arm].items()}
  return config_dict(Config(
      model=preset('gpt-1m'),
      data=DataConfig(domains=TRAIN, sampling='weights', weights=dict.fromkeys(TRAIN, 1),
                      batch_size=8, sequence_length=128, **change),
      optimizer=OptimizerConfig(learning_rate=6e-3, clip=1.0),
      train=TrainConfig(steps=STEPS, log_every=10, eval_every=200, checkpoint_every=100),
      execution=ExecutionConfig(scan=False)))
