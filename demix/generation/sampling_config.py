"""How text is drawn, as data: read without JAX."""

import dataclasses

from demix.errors import BadInput
from demix.settings import check_values, option


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How text is drawn."""
  max_tokens: int = option(128, 'tokens to write at most', low=1)
  temperature: float = option(0.8, 'log-probabilities are divided by it; 0: greedy', low=0)
  top_k: int = option(0, 'draw from the k most likely tokens only; 0: all', low=0)
  top_p: float = option(1.0, 'draw from the fewest most likely tokens that have this probability',
                        above=0, high=1)
  seed: int = option(0, 'of the draws', low=0, high=(1 << 32) - 1)
  stop: tuple = option((), 'strings that end the text; they are left out of it')

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self)
    idle = [n for n in ('top_k', 'top_p', 'seed') if getattr(self, n) != getattr(type(self), n)]
    if self.temperature == 0 and idle:
      raise BadInput(f'{idle[0]}={getattr(self, idle[0])} has no effect with temperature=0: '
                     'leave it out, or set a temperature')
    for text in self.stop:
      if not isinstance(text, str) or not text:
        raise BadInput(f'stop={text!r}: every text contains it: give a string of one character or '
                       'more' if text == '' else f'stop={text!r} is no string')
