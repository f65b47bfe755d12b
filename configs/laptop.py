"""Every arm of the DEMix paper (§4) at a size a laptop trains: 1M active parameters.

  python -m demix train --config=configs/laptop.py:demix --config.data.path=STORE --workdir=W

Arms: dense (balanced), proportional, domain_token, demix, demix_every_second. The corpus is any
token store, for example the one of the quick start. Larger: --config=configs/laptop.py:demix,10m.
Time and speed: benchmarks/README.md. Not run to its end here: no number of its own.
"""

from demix.config import Config, TrainConfig, config_dict
from demix.data.sampling.data_config import DataConfig
from demix.model.model_config import ExecutionConfig, preset
from demix.optim.optimizer_config import OptimizerConfig

ARMS = {
    'dense': {},
    'proportional': {'data': {'sampling': 'proportional'}},
    'domain_token': {'data': {'domain_token': True}},
    'demix': {'model': {'ffn': 'demix'}},
    'demix_every_second': {'model': {'ffn': 'demix', 'expert_every': 2}},
}
SIZES = {'1m': dict(sequence_length=128, batch_size=16), '10m': dict(sequence_length=256,
                                                                     batch_size=16)}


def get_config(arg='dense'):
  """arm or arm,size: an arm of ARMS, a size of SIZES (1m)."""
  arm, _, size = arg.partition(',')
  size = size or '1m'
  if arm not in ARMS or size not in SIZES:
    raise ValueError(f'{arg!r}: an arm of {", ".join(ARMS)} and a size of {", ".join(SIZES)}')
  change = ARMS[arm]
  return config_dict(Config(
      model=preset(f'gpt-{size}', **change.get('model', {})),
      data=DataConfig(**SIZES[size], **change.get('data', {})),
      optimizer=OptimizerConfig(learning_rate=4e-3, clip=1.0),
      train=TrainConfig(steps=1000, log_every=10, eval_every=250, checkpoint_every=250),
      execution=ExecutionConfig(scan=size != '1m')))  # four layers compile fast and run unrolled


def get_hyper():
  """A sweep: three seeds at three learning rates."""
  return [{'seed': seed, 'optimizer.learning_rate': rate}
          for rate in (2e-3, 4e-3, 8e-3) for seed in range(3)]
