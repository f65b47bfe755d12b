"""What a run trains on, as data: read without JAX or Grain."""

import dataclasses
import math

from demix.data.sampling import schedule
from demix.data.sampling.schedule import KINDS as SCHEDULE_KINDS
from demix.data.tokens.packing import PACKINGS
from demix.errors import BadInput
from demix.settings import check, nearest, option


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which domains, how much of each, in what shape."""
  path: str = option('', 'the token store that `prepare` wrote', operational=True)
  domains: tuple = option((), 'training domains in order, a group stands for its leaves; (): all '
                               'of role train, in store order')
  sampling: str = option('balanced', 'balanced (equal sequences per domain, expert-major), '
                                     'proportional (to size) or weights',
                         choices=('balanced', 'proportional', 'weights'))
  weights: dict = option({}, 'sampling=weights: share of each domain, --config.data.weights.NAME=2',
                         needs=('sampling', 'weights'))
  schedule: str = option('', "sampling=weights: other shares from a step on, 'STEP NAME=SHARE …, "
                             "STEP …'; weights are those at step 0, who is not named keeps its own",
                         needs=('sampling', 'weights'))
  schedule_kind: str = option('piecewise', 'piecewise (shares jump at those steps) or linear (a '
                                           'straight line from step to step)',
                              choices=SCHEDULE_KINDS, needs=('schedule',))
  sequence_length: int = option(128, 'L, targets per sequence', low=1)
  batch_size: int = option(32, 'B, sequences per update, over all domains', low=1)
  packing: str = option('continuous', 'continuous (the papers) or document (no attention across '
                                      'documents, restarted positions)',
                        choices=PACKINGS)
  domain_token: bool = option(False, '+DomainToken baseline: a <domain> symbol starts each block '
                                     'and is never scored')

  def check(self):
    """Raises BadInput for values that cannot be."""
    check(self, 'data.')
    if len(set(self.domains)) != len(self.domains):
      raise BadInput(f'data.domains={self.domains} names a domain twice')
    if self.sampling == 'balanced' and self.domains and self.batch_size % len(self.domains):
      n = len(self.domains)
      raise BadInput(f'data.batch_size={self.batch_size} is not a multiple of {n} domains: '
                     f'balanced batches need equal rows; try {self.batch_size // n * n or n} or '
                     f'{(self.batch_size // n + 1) * n}')
    if self.domain_token and self.packing == 'document':
      raise BadInput('data.domain_token with data.packing=document: only the first document of a '
                     'sequence would have the symbol; give data.packing=continuous')
    if self.sampling == 'weights':
      for name in self.domains:
        if name not in self.weights:
          raise BadInput(f'data.weights has no share for domain {name!r}: give '
                         f'--config.data.weights.{name}=…')
      for name, value in self.weights.items():
        if name not in self.domains:
          raise BadInput(f'data.weights.{name}: not one of the domains'
                         f'{nearest(name, self.domains)}')
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
          raise BadInput(f'data.weights.{name}={value!r}: a share is a number of at least 0')
      if not sum(self.weights.values()) > 0:
        raise BadInput('data.weights sum to 0: give at least one domain a share')
      self.knots()

  def knots(self) -> list:
    """`schedule.parse` of the schedule; empty where there is none."""
    return schedule.parse(self.schedule, self.weights, self.domains) if self.schedule else []

  @property
  def body_length(self) -> int:
    """Targets of text per sequence: one less than L where a <domain> symbol takes a place."""
    return self.sequence_length - self.domain_token
