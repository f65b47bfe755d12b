"""The quick start: a dense and a DEMix LM of about 1M active parameters on the same 0.29M tokens.

  launch/quickstart.sh

The recipe was chosen on valid text, on seed 0: 8, 16 and 32 sequences per update and peak rates of
2e-3 to 8e-3 for dense, 8 sequences and the same rates for DEMix, at 600 updates; 280 leave room
for a forest of as many tokens in five minutes. README says what came out.
"""

from configs.quickstart_corpus import TRAIN
from demix.config import Config, TrainConfig, config_dict
from demix.data.data_config import DataConfig
from demix.model_config import preset
from demix.optimizer_config import OptimizerConfig


def get_config(arm='dense'):
  """arm: dense or demix."""
  return config_dict(Config(
      model=preset('gpt-1m', ffn=arm),
      data=DataConfig(domains=TRAIN, batch_size=8, sequence_length=128),  # 1024 tokens an update
      optimizer=OptimizerConfig(learning_rate=6e-3, clip=1.0),
      train=TrainConfig(steps=280, log_every=10, eval_every=140, checkpoint_every=70)))


def get_hyper():
  """Three seeds."""
  return [{'seed': seed} for seed in range(3)]
