"""A trained model goes on to a new domain (the DEMix paper's DAPT, §6), at the quick start's size.

  python -m demix train --config=configs/adapt.py:demix --config.init.model=W/demix \\
      --config.data.path=W/corpus --config.data.domains=cython --workdir=W/cython
  python -m demix forest add --model=W/demix --expert=cython --from=W/cython --workdir=W/demix5

Arms: demix (the nearest expert is taken out and its FFNs are trained, to be added to the DEMix LM),
dense (all parameters of a dense LM: --config.init.model=W/dense), dense_ffn (its FFNs only).

Against the base run (configs/quickstart.py): a tenth of its peak rate; the same clip and AdamW with
weight decay, 8 % warm-up, linear decay, tokens per update, fresh moments. The papers' updates at
125M / 350M / 760M / 1.3B, of 131k tokens at a rate of 5e-5: 1000 / 1000 / 500 / 1250 for demix
(FFNs only), 750 / 750 / 300 / 1000 for dense with all parameters, whose updates cost more.
"""

from configs.quickstart import LENGTH, RECIPES
from demix.config import Config, InitConfig, TrainConfig, config_dict
from demix.data.sampling.data_config import DataConfig
from demix.model.model_config import ExecutionConfig
from demix.optim.optimizer_config import OptimizerConfig

ARMS = {
    'demix': dict(expert='nearest', trainable='ffn'),
    'dense': dict(),
    'dense_ffn': dict(trainable='ffn'),
}
MISSING = 'give--config.init.model'  # else a dense run without it would start from nothing


def get_config(arm='demix'):
  """arm: demix, dense or dense_ffn."""
  if arm not in ARMS:
    raise ValueError(f'{arm!r}: an arm of {", ".join(ARMS)}')
  rows, rate = RECIPES['demix' if arm == 'demix' else 'dense']
  return config_dict(Config(
      data=DataConfig(batch_size=rows, sequence_length=LENGTH),
      optimizer=OptimizerConfig(learning_rate=rate / 10, clip=1.0),
      init=InitConfig(model=MISSING, **ARMS[arm]),
      train=TrainConfig(steps=150, log_every=10, eval_every=50, checkpoint_every=50),
      execution=ExecutionConfig(scan=False)))
