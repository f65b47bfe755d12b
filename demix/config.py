"""One Config for everything that trains, composed of the dataclasses that live beside what they
configure, and how it is completed from the data and compared with a saved one."""

import dataclasses
import os

import orjson
import xxhash
from ml_collections import ConfigDict

from demix import settings
from demix.data.batches import DataConfig
from demix.data.store import TokenStore
from demix.errors import BadInput
from demix.optimizer import OptimizerConfig
from demix.settings import option
from demix.sharding import MeshConfig
from demix.transformer import ExecutionConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""
  steps: int = option(1000, 'updates to train to; more than before goes on', operational=True)
  accumulation: int = option(1, 'micro-batches per update (gradients of the whole batch)')
  compute_dtype: str = option('float32', 'float32, or bfloat16 with float32 master weights')
  log_every: int = option(10, 'steps between lines of metrics.jsonl', operational=True)
  eval_every: int = option(0, 'steps between evaluations on valid; 0: only at the end',
                           operational=True)
  eval_sequences: int = option(64, 'sequences per domain of such an evaluation', operational=True)
  checkpoint_every: int = option(500, 'steps between checkpoints; the last step always has one',
                                 operational=True)
  max_to_keep: int = option(2, 'newest checkpoints kept; 0: all', operational=True)
  keep_every: int = option(0, 'also keep checkpoints at multiples of this; 0: none',
                           operational=True)
  tensorboard: bool = option(True, 'write TensorBoard event files', operational=True)

  def check(self):
    """Raises BadInput for values outside their range."""
    for name in ('steps', 'accumulation', 'log_every', 'eval_sequences'):
      if getattr(self, name) < 1:
        raise BadInput(f'train.{name}={getattr(self, name)} is below 1')
    for name in ('eval_every', 'checkpoint_every', 'max_to_keep', 'keep_every'):
      if getattr(self, name) < 0:
        raise BadInput(f'train.{name}={getattr(self, name)} is below 0: 0 turns it off')
    if self.compute_dtype not in ('float32', 'bfloat16'):
      raise BadInput(f'train.compute_dtype={self.compute_dtype!r}: float32 or bfloat16')


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment."""
  seed: int = option(0, 'of parameters and shuffles')
  model: ModelConfig = option(ModelConfig(), 'the model')
  data: DataConfig = option(DataConfig(), 'the data')
  optimizer: OptimizerConfig = option(OptimizerConfig(), 'the optimizer')
  train: TrainConfig = option(TrainConfig(), 'the loop')
  execution: ExecutionConfig = option(ExecutionConfig(), 'how the model is run')
  mesh: MeshConfig = option(MeshConfig(), 'devices')


def config_dict(config: Config) -> ConfigDict:
  """What a config file's get_config() returns: overridable by dotted path."""
  return ConfigDict(settings.to_dict(config))


def complete(config: Config, store: TokenStore, saved: dict | None = None) -> Config:
  """Fills in what comes from the data and checks everything, before anything is compiled.

  Args:
    config: as the user gave it. store: the open token store it names.
    saved: identity fields of the workdir, when it is a run already: a schedule that was laid out
      for the steps of the first start keeps that length when more steps are asked for.

  Raises:
    BadInput: a value that cannot be, a domain that the store lacks, a batch that does not divide.
  """
  data, model, optimizer = config.data, config.model, config.optimizer
  domains = data.domains or tuple(
      d for d in store.domains if store.roles[d] == 'train')
  if not domains:
    raise BadInput(f'{store.path} has no domain to train on, only novel ones '
                   f'({", ".join(store.domains)}): name some in data.domains')
  for name in domains:
    if name not in store.domains:
      raise BadInput(f'data.domains: {store.path} has no domain {name!r}'
                     f'{settings.nearest(name, store.domains)}')
  data = dataclasses.replace(data, domains=domains)
  data.check()
  if not 0 <= config.seed < 1 << 31:
    raise BadInput(f'seed={config.seed} is not between 0 and {(1 << 31) - 1}')
  config.train.check()
  optimizer.check()
  rows = data.batch_size // len(domains) if data.sampling == 'balanced' else data.batch_size
  if rows % config.train.accumulation:
    per = ' per domain' if data.sampling == 'balanced' else ''
    raise BadInput(f'train.accumulation={config.train.accumulation} does not divide {rows} '
                   f'sequences{per} of an update: change it or data.batch_size')
  if model.vocab_size or model.max_length or model.experts:
    raise BadInput('model.vocab_size, model.max_length and model.experts come from the data: '
                   'leave them 0, 0 and ()')
  model = dataclasses.replace(
      model,
      vocab_size=store.vocab_size + (len(domains) if data.domain_token else 0),
      max_length=data.sequence_length,
      experts=domains if model.ffn == 'demix' else ())
  model.check()
  if not optimizer.schedule_steps:
    steps = (saved or {}).get('optimizer.schedule_steps', config.train.steps)
    optimizer = dataclasses.replace(optimizer, schedule_steps=steps)
  data = dataclasses.replace(data, path=os.path.abspath(store.path))
  return dataclasses.replace(config, data=data, model=model, optimizer=optimizer)


def domain_symbols(config: Config):
  """Ids of the <domain> symbols (+DomainToken baseline) of a completed config, or None."""
  if not config.data.domain_token:
    return None
  first = config.model.vocab_size - len(config.data.domains)
  return tuple(range(first, config.model.vocab_size))


def identity(config: Config, store: TokenStore) -> dict:
  """{dotted name: value} of all that defines the experiment, data and tokenizer included."""
  out = settings.flatten(config, operational=False)
  out['data.fingerprint'] = data_fingerprint(store, config.data.domains)
  out['tokenizer.fingerprint'] = store.tokenizer_meta['fingerprint']
  return out


def data_fingerprint(store: TokenStore, domains) -> str:
  """xxh3-128 over the content of the domains, in their order; their names are left out."""
  parts = [store.domain_fingerprint(d) for d in domains]
  return xxhash.xxh3_128_hexdigest(orjson.dumps(parts))


def digest(flat: dict) -> str:
  """xxh3-128 of an identity dict."""
  return xxhash.xxh3_128_hexdigest(orjson.dumps(flat, option=orjson.OPT_SORT_KEYS))
