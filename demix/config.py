"""One Config for everything that trains, composed of the dataclasses that live beside what they
configure, and how it is completed from the data and compared with a saved one. Read without
JAX."""

import dataclasses
import os

import orjson
import xxhash
from ml_collections import ConfigDict

from demix import settings
from demix.data.sampling.data_config import DataConfig
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.model.mesh_config import MeshConfig
from demix.model.model_config import ExecutionConfig, ModelConfig
from demix.names import NEAREST
from demix.optim.optimizer_config import OptimizerConfig
from demix.settings import option


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""
  steps: int = option(1000, 'updates to train to; on a run that is there it goes on, up to the '
                      'end of its schedule (optimizer.restart)', operational=True, low=1)
  accumulation: int = option(1, 'micro-batches per update (gradients of the whole batch)', low=1)
  compute_dtype: str = option('float32', 'float32, or bfloat16 with float32 master weights',
                              choices=('float32', 'bfloat16'))
  lift: str = option('auto', 'several experts in one process (forest run --together): threads, '
                     'map, vmap (demix/optim/together.py) or auto', operational=True,
                     choices=('auto', 'threads', 'map', 'vmap'))
  log_every: int = option(10, 'steps between lines of metrics.jsonl', operational=True, low=1)
  eval_every: int = option(0, 'steps between evaluations on valid; 0: only at the end',
                           operational=True, low=0)
  eval_sequences: int = option(64, 'sequences per domain of such an evaluation', operational=True,
                               low=1)
  checkpoint_every: int = option(500, 'steps between checkpoints; the last step always has one',
                                 operational=True, low=0)
  max_to_keep: int = option(2, 'newest checkpoints kept; 0: all', operational=True, low=0)
  keep_every: int = option(0, 'also keep checkpoints at multiples of this; 0: none',
                           operational=True, low=0)
  tensorboard: bool = option(True, 'write TensorBoard event files', operational=True)

  def check(self):
    """Raises BadInput for values that cannot be."""
    settings.check(self, 'train.')


# What may be trained: the leaves whose running name contains this. Norms are not part of an FFN.
TRAINABLE = {'all': '', 'ffn': '/ffn/'}


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """What a run starts from (start.py). `model` and `limit` may change on resume; what they
  led to (step and content digest of that model, the expert's name) is identity."""
  model: str = option('', "model that the run starts from: W, W@STEP or W#EXPERT; '': fresh "
                          'parameters. It brings its own model.*; a dense one with '
                          'model.ffn=demix is copied into each expert', operational=True)
  expert: str = option('', 'expert of that DEMix LM to take out as a dense LM: its name, or '
                           "nearest: the lowest NLL on the domain's valid text",
                       needs=('model',))
  trainable: str = option('all', 'what is trained: all, or ffn (all else is frozen)',
                          choices=tuple(TRAINABLE), needs=('model',))
  optimizer: str = option('fresh', 'fresh moments and schedule, or continue: moments, count of '
                          "updates and schedule go on from the model's (BTM; all trained)",
                          choices=('fresh', 'continue'), needs=('model',))
  limit: int = option(200, 'nearest: sequences of valid text it is estimated on; 0: all',
                      operational=True, low=0, needs=('expert', NEAREST))

  def check(self):
    """Raises BadInput for values that cannot be."""
    settings.check(self, 'init.')
    if self.optimizer == 'continue' and (self.expert or self.trainable != 'all'):
      raise BadInput(f'init.optimizer=continue with init.expert={self.expert!r}, init.trainable='
                     f'{self.trainable}: moments go on for a whole model that is trained whole; '
                     'give init.optimizer=fresh')


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment."""
  seed: int = option(0, 'of parameters and shuffles', low=0, high=(1 << 31) - 1)
  model: ModelConfig = option(ModelConfig(), 'the model')
  data: DataConfig = option(DataConfig(), 'the data')
  optimizer: OptimizerConfig = option(OptimizerConfig(), 'the optimizer')
  init: InitConfig = option(InitConfig(), 'what it starts from')
  train: TrainConfig = option(TrainConfig(), 'the loop')
  execution: ExecutionConfig = option(ExecutionConfig(), 'how the model is run')
  mesh: MeshConfig = option(MeshConfig(), 'devices')

  def check(self):
    """Raises BadInput for what a user gave and cannot be, as far as it shows without the data."""
    settings.check_values(self)
    for name in ('data', 'model', 'optimizer', 'init', 'train', 'execution', 'mesh'):
      group = getattr(self, name)
      if name != 'model' or not self.init.model:  # else the model of init.model decides
        settings.check_needs(group, f'{name}.')
      if name != 'data':  # which must have its domains first
        group.check()


def config_dict(config: Config) -> ConfigDict:
  """What a config file's get_config() returns: overridable by dotted path."""
  return ConfigDict(settings.to_dict(config))


def complete(config: Config, store: TokenStore, saved: dict | None = None,
             parent: ModelConfig | None = None, named=()) -> Config:
  """Fills in what comes from the data and checks everything, before anything is compiled.

  Args:
    config: as the user gave it. store: the open token store it names.
    saved: identity fields of the workdir, when it is a run already: a schedule that was laid out
      for the steps of the first start keeps that length when more steps are asked for.
    parent: the model that the run starts from, in place of config.model (demix/training/start.py).
    named: dotted names that were given on the command line, be it with their default.

  Raises:
    BadInput: a value that cannot be, a domain that the store lacks, a batch that does not divide.
  """
  data, model, optimizer = config.data, config.model, config.optimizer
  config.check()
  domains = domains_of(data, store, parent.experts if parent else ())
  if not domains:
    raise BadInput(f'{store.path} has no domain to train on, only novel ones '
                   f'({", ".join(store.domains)}): name some in data.domains')
  for name in domains:
    if name not in store.domains:
      raise BadInput(f'data.domains: {store.path} has no domain {name!r}'
                     f'{settings.nearest(name, (*store.domains, *store.groups))}')
  data = dataclasses.replace(data, domains=domains)
  data.check()
  rows = data.batch_size // len(domains) if data.sampling == 'balanced' else data.batch_size
  if rows % config.train.accumulation:
    per = ' per domain' if data.sampling == 'balanced' else ''
    raise BadInput(f'train.accumulation={config.train.accumulation} does not divide {rows} '
                   f'sequences{per} of an update: change it or data.batch_size')
  model = _model_on(parent, model, data, named) if parent else _fresh_model(model, data, store)
  model.check()
  if not optimizer.schedule_steps:
    steps = (saved or {}).get('optimizer.schedule_steps', config.train.steps)
    optimizer = dataclasses.replace(optimizer, schedule_steps=steps)
  data = dataclasses.replace(data, path=os.path.abspath(store.path))
  return dataclasses.replace(config, data=data, model=model, optimizer=optimizer)


def domains_of(data: DataConfig, store: TokenStore, experts=()) -> tuple:
  """The domains that are trained on: named, or of the model, or all of role train."""
  return store.leaves(data.domains) or experts or tuple(
      d for d in store.domains if store.roles[d] == 'train')


def _fresh_model(model, data, store) -> ModelConfig:
  """The model with the sizes that come from the data."""
  if model.vocab_size or model.max_length or model.experts:
    raise BadInput('model.vocab_size, model.max_length and model.experts come from the data: '
                   'leave them 0, 0 and ()')
  return dataclasses.replace(
      model,
      vocab_size=store.vocab_size + (len(data.domains) if data.domain_token else 0),
      max_length=data.sequence_length,
      experts=data.domains if model.ffn == 'demix' else ())


def _model_on(parent, asked, data, named) -> ModelConfig:
  """The model a run starts from, where it is the one asked for and can be trained on this data."""
  sizes = {'kv_heads': lambda m: m.kv_heads or m.heads, 'head_size': lambda m: m.head_width,
           'd_ff': lambda m: m.ff_width}
  different = []
  for field in dataclasses.fields(ModelConfig):
    mine, has, default = (getattr(m, field.name) for m in (asked, parent, ModelConfig()))
    size = sizes.get(field.name, lambda m, name=field.name: getattr(m, name))
    given = mine != default or f'model.{field.name}' in named
    if given and size(asked) != size(parent):
      different.append(f'model.{field.name}={mine!r} (it has {has!r})')
  if different:
    raise BadInput(f'init.model brings its own model, which is another than asked for: '
                   f'{", ".join(different)}; leave these out, or train from fresh parameters')
  if data.sequence_length > parent.max_length:
    raise BadInput(f'data.sequence_length={data.sequence_length}, but the model of init.model was '
                   f'trained with {parent.max_length}: give at most that')
  if data.domain_token:
    raise BadInput('data.domain_token with init.model: the <domain> symbols are part of a fresh '
                   'model; leave one of them out')
  if parent.ffn == 'demix' and parent.experts != data.domains:
    raise BadInput(f'data.domains={",".join(data.domains)}, but the experts of init.model are '
                   f'{",".join(parent.experts)}: a DEMix LM trains on its own domains in their '
                   'order; take one expert out with init.expert')
  return parent


def domain_symbols(config: Config):
  """Ids of the <domain> symbols (+DomainToken baseline) of a completed config, or None."""
  if not config.data.domain_token:
    return None
  first = config.model.vocab_size - len(config.data.domains)
  return tuple(range(first, config.model.vocab_size))


def identity(config: Config, store: TokenStore, init: dict | None = None) -> dict:
  """{dotted name: value} of all that defines the experiment, data and tokenizer included.

  Args:
    config: completed. store: the open token store it names.
    init: of a run that starts from a model: `identity` of its start.Start.
  """
  return identity_of(config, data=data_fingerprint(store, config.data.domains),
                     tokenizer=store.tokenizer_meta['fingerprint'], init=init)


def identity_of(config: Config, *, data: str, tokenizer: str, init: dict | None = None) -> dict:
  """`identity` from fingerprints, where there is no store at hand."""
  out = settings.flatten(config, operational=False)
  if not config.init.model:  # as before there was anything else to start from
    out = {name: value for name, value in out.items() if not name.startswith('init.')}
  if not config.optimizer.restart:  # as before schedules could be laid out anew
    del out['optimizer.restart']
  if not config.data.schedule:  # as before shares could change
    out = {name: value for name, value in out.items() if not name.startswith('data.schedule')}
  return out | (init or {}) | {'data.fingerprint': data, 'tokenizer.fingerprint': tokenizer}


def data_fingerprint(store: TokenStore, domains) -> str:
  """xxh3-128 over the content of the domains, in their order; their names are left out."""
  return joint_fingerprint([store.domain_fingerprint(d) for d in domains])


def joint_fingerprint(parts: list[str]) -> str:
  """`data_fingerprint` of domains whose own fingerprints are given."""
  return xxhash.xxh3_128_hexdigest(orjson.dumps(parts))


def digest(flat: dict) -> str:
  """xxh3-128 of an identity dict."""
  return xxhash.xxh3_128_hexdigest(orjson.dumps(flat, option=orjson.OPT_SORT_KEYS))
