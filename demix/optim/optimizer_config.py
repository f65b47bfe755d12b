"""How a model is optimized, as data: read without JAX."""

import dataclasses
import re

from demix.errors import BadInput
from demix.settings import check_values, option


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule. The defaults are the papers' recipe (docs/method.md)."""
  learning_rate: float = option(5e-4, 'peak learning rate', low=0)
  schedule: str = option('linear', 'after warm-up: linear or cosine decay, wsd (warm-up, stable, '
                                   'linear decay at the end) or constant',
                         choices=('linear', 'cosine', 'wsd', 'constant'))
  schedule_steps: int = option(0, 'steps the schedule is laid out for; 0: train.steps at the '
                                  'first start (or, with restart, what is left of them)', low=0)
  restart: int = option(0, 'updates after which the schedule is laid out anew, warm-up included, '
                           'in a run that is there or goes on from another; 0: never', low=0)
  warmup_share: float = option(0.08, 'share of schedule_steps spent on linear warm-up',
                               low=0, high=1)
  decay_share: float = option(0.2, 'wsd only: share of schedule_steps spent on the final decay',
                              low=0, high=1, needs=('schedule', 'wsd'))
  final_ratio: float = option(0.0, 'learning rate at the end, as a share of the peak', low=0,
                              high=1, needs=('schedule', 'linear', 'cosine', 'wsd'))
  b1: float = option(0.9, 'decay of the first moment', low=0, below=1)
  b2: float = option(0.95, 'decay of the second moment', low=0, below=1)
  eps: float = option(1e-7, 'added to the root of the second moment', above=0)
  weight_decay: float = option(0.1, 'decoupled weight decay, times the learning rate', low=0)
  no_decay: str = option('', "regex of leaves without decay ('bias|norm|embed'); '': all decay, "
                             'as in the papers')
  clip: float = option(0.1, 'global L2 norm that gradients are clipped to; 0: no clip', low=0)

  @property
  def ends(self) -> bool:
    """Whether the schedule has an end, past which nothing is left of the rate but final_ratio."""
    return self.schedule != 'constant'

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'optimizer.')
    if self.warmup_share + self.decay_share * (self.schedule == 'wsd') > 1:
      raise BadInput(f'optimizer.warmup_share={self.warmup_share} + decay_share='
                     f'{self.decay_share} is above 1: they overlap')
    try:
      re.compile(self.no_decay)
    except re.error as e:
      raise BadInput(f'optimizer.no_decay={self.no_decay!r} is no regular expression ({e}): '
                     "'bias|norm|embed' for example") from None
