"""The quick start: dense, DEMix and a forest of 0.06M active parameters, 6.55M tokens each.

  launch/quickstart.sh

Claim (DEMix §4, BTM §4): at equal training tokens experts beat a dense LM, the forest by more than
the DEMix LM. 105 tokens per active parameter (the papers: 80 to 1,250), four domains that differ;
batch and rate of each arm, dense's too, are the best of one grid on valid text. Test perplexity
over dense's, experts given, geometric mean of the four domains, seeds 0, 1, 2: DEMix 0.866, 0.868,
0.875, the forest 0.751, 0.762, 0.752 (docs/quickstart.md). Time: 60 s of CPU time an arm.
"""

from configs.quickstart_corpus import TRAIN
from demix.config import Config, TrainConfig, config_dict
from demix.data.sampling.data_config import DataConfig
from demix.model.model_config import ExecutionConfig, ModelConfig
from demix.optim.optimizer_config import OptimizerConfig

LENGTH = 128         # tokens of a sequence
SEQUENCES = 51_200   # of an arm: 6.55M tokens
# arm: sequences an update, peak rate; each the best of the same grid (docs/quickstart.md).
RECIPES = {'dense': (32, 6.4e-2), 'demix': (32, 3.2e-2), 'forest': (32, 3.2e-2)}


def recipe(arm, rows, rate):
  """The Config of an arm that makes updates of `rows` sequences at a peak rate of `rate`."""
  steps = SEQUENCES // rows
  return Config(
      model=ModelConfig(layers=2, d_model=32, heads=2, ffn='demix' if arm == 'demix' else 'dense'),
      data=DataConfig(domains=TRAIN, batch_size=rows, sequence_length=LENGTH),
      optimizer=OptimizerConfig(learning_rate=rate, clip=1.0),
      train=TrainConfig(steps=steps, log_every=20, checkpoint_every=steps // 4,
                        eval_sequences=256),
      execution=ExecutionConfig(scan=False))  # two layers compile fast and run unrolled


def get_config(arm='dense'):
  """arm: dense, demix, or forest: what the forest's plan starts from."""
  if arm not in RECIPES:
    raise ValueError(f'{arm!r}: one of {", ".join(RECIPES)}')
  return config_dict(recipe(arm, *RECIPES[arm]))


def get_hyper():
  """Three seeds."""
  return [{'seed': seed} for seed in range(3)]
