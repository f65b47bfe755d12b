"""The quick start: a dense and a DEMix LM of about 1M active parameters on the same tokens.

  launch/quickstart.sh
"""

from demix.config import Config, TrainConfig, config_dict
from demix.data.batches import DataConfig
from demix.optimizer import OptimizerConfig
from demix.transformer import preset


def get_config(arm='dense'):
  """arm: dense or demix."""
  return config_dict(Config(
      model=preset('gpt-1m', ffn=arm),
      data=DataConfig(domains=('code', 'cplusplus', 'docstrings', 'sessions'), batch_size=32,
                      sequence_length=128),
      optimizer=OptimizerConfig(learning_rate=3e-3, clip=1.0),
      train=TrainConfig(steps=150, log_every=10, checkpoint_every=50)))
