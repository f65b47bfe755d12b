"""Ways of mixing: the columns of a table, each a config of its own, and the options they share."""

import dataclasses

from demix import settings
from demix.errors import BadInput
from demix.mix.mix_config import MixConfig
from demix.settings import nearest

NAMES = ('given', 'best', 'average', 'uniform', 'updating', 'cached')
CLUSTERS = 'clusters'  # not one of all: it needs a clusterer
_SINGLE = ('given', 'best')
_EVIDENCE = ('uniform', 'updating', 'cached')  # ways that look at the text


@dataclasses.dataclass(frozen=True)
class Mode:
  """A column of the table.

  Attributes:
    name: one of NAMES, or `mix` for a config of one's own.
    config: how members are mixed; `given` and `best` run one member.
  """
  name: str
  config: MixConfig

  @property
  def prior(self):
    """As results.json names it; None where there is none."""
    return {'given': None, 'best': 'dev', 'average': 'none'}.get(self.name, self.config.prior)

  @property
  def posterior(self):
    """As results.json names it; None where there is none."""
    single = self.name in (*_SINGLE, 'average') or self.config.prior == 'none'
    return None if single or self.config.posterior == 'none' else self.config.posterior

  @property
  def single(self) -> bool:
    return self.name in _SINGLE

  @property
  def way(self) -> str:
    """What the columns of a table call it: 'cached prefix'."""
    name = self.config.prior if self.name == 'mix' else self.name
    return ' '.join(filter(None, (name, self.posterior if self.name != CLUSTERS else None)))


@dataclasses.dataclass(frozen=True)
class Ways:
  """The columns of a table, and the options they were made with.

  Attributes:
    modes: the columns. options: {option: value} of those that are set. read_by: {option: ways that
      read it}. blocks: sequences of development text.
  """
  modes: tuple
  options: dict
  read_by: dict
  blocks: int = MixConfig.blocks

  @classmethod
  def of(cls, modes, base: MixConfig) -> 'Ways':
    """The ways of modes with the options of `base`.

    Raises:
      BadInput: options that do not go together, or one that none of the modes reads.
    """
    for mode in modes:
      mode.config.check()
    usual, every = settings.to_dict(MixConfig()), settings.to_dict(base)
    chosen = {k: v for k, v in every.items() if v != usual[k] and k not in ('prior', 'posterior')}
    read_by = {name: [m.way for m in modes if reads(m, name, chosen[name])] for name in chosen}
    for name, found in read_by.items():
      if not found:
        raise BadInput(f'mix.{name}={chosen[name]} has no effect on --mix='
                       f'{",".join(dict.fromkeys(m.name for m in modes))}: leave it out, or add a '
                       'way that reads it')
    return cls(tuple(modes), chosen, read_by, base.blocks)


def reads(mode: Mode, name: str, value) -> bool:
  """Whether an option that is set changes what a mode gives for blocks that are scored."""
  if name == 'blocks':  # given and best compare experts on them
    return mode.single or mode.config.prior == 'cached'
  return getattr(_stripped(mode.config), name) == value


def ways(names, posteriors, base: MixConfig) -> Ways:
  """The ways of mixing for names out of NAMES; those that look at evidence once per posterior.

  Raises:
    BadInput: no such way or posterior, or options that do not go together or are not read.
  """
  for key, flag in (('prior', '--mix=NAME'), ('posterior', '--posterior')):
    if (value := getattr(base, key)) != getattr(MixConfig, key):
      raise BadInput(f'mix.{key}={value} with --mix={",".join(names)}: {flag} says it; leave it '
                     'out, or name a config file, configs/mix.py:ARG')
  out = []
  for name in names:
    if name == CLUSTERS:
      config = dataclasses.replace(base, prior='uniform', posterior=CLUSTERS)
      out.append(Mode(name, _stripped(config)))
    elif name not in NAMES:
      raise BadInput(f'--mix={name}: no such way of mixing{nearest(name, (*NAMES, CLUSTERS))}; or '
                     'name a config file, configs/mix.py:ARG')
    elif name in _SINGLE:
      out.append(Mode(name, MixConfig(prior='none', posterior='none', members=base.members)))
    else:
      for posterior in posteriors if name in _EVIDENCE else ('none',):
        config = dataclasses.replace(
            base, prior='none' if name == 'average' else name, posterior=posterior)
        out.append(Mode(name, _stripped(config)))
  return Ways.of(out, base)


def _stripped(config: MixConfig) -> MixConfig:
  """The config with what this way does not read at its default."""
  config = config.effective()
  # Priors that are not fixed choose experts after a prompt, which only generation has.
  return config if config.fixed else dataclasses.replace(config, experts_k=0)


def options(config: MixConfig) -> dict:
  """What of a config changes the weights of a cached prior, beside prior and posterior."""
  names = ('decay', 'window', 'temperature', 'weights_k', 'experts_k', 'order', 'renormalise')
  return {n: getattr(config, n) for n in names}


def clustered(modes) -> MixConfig | None:
  """The config of the first mode whose evidence is clusters, or None."""
  return next((m.config for m in modes if m.config.posterior == CLUSTERS), None)
