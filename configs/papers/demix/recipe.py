"""The recipe of the DEMix paper (Gururangan et al. 2021, 2108.05036), by size.

Sizes, tokens per update and updates as the authors' scripts give them; AdamW with
betas 0.9 and 0.95, eps 1e-7, decay 0.1 on everything, peak 5e-4, 8 % linear warm-up, linear
decay to 0, clip 0.1. The paper's budget was 48 hours on 32, 64, 128 and 128 V100s. Not run here.
"""

from demix.config import Config, TrainConfig
from demix.data.sampling.data_config import DataConfig
from demix.model.model_config import ExecutionConfig, preset
from demix.optim.optimizer_config import OptimizerConfig

# size: (sequences of 1024 tokens per update, updates)
BUDGETS = {
    '125m': (512, 300_000),   # 0.52M tokens per update, 157B in all
    '350m': (1024, 120_000),  # 1.05M, 126B
    '760m': (2048, 65_000),   # 2.10M, 136B
    '1.3b': (2048, 50_000),   # 2.10M, 105B
}


def recipe(size: str, sampling: str = 'balanced', domain_token: bool = False, **model) -> Config:
  """The paper's run at one size; `model` changes fields of the ModelConfig."""
  sequences, updates = BUDGETS[size]
  return Config(
      model=preset(f'gpt-{size}', vocab_multiple=128, **model),
      data=DataConfig(batch_size=sequences, sequence_length=1024, sampling=sampling,
                      domain_token=domain_token),
      optimizer=OptimizerConfig(),  # its defaults are the paper's
      train=TrainConfig(steps=updates, accumulation=8, compute_dtype='bfloat16', log_every=100,
                        eval_every=5000, checkpoint_every=5000, keep_every=updates // 10),
      execution=ExecutionConfig(remat='full', loss_block=8192))
