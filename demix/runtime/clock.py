"""How fast a run trains, and how long it took."""

import time

from demix.runtime.progress import quantity


class Clock:
  """Rates between lines of the log; the first step of a run, which compiles, is left out."""

  def __init__(self, tokens: int, flops: int):
    self.tokens, self.flops = tokens, flops
    self.steps, self.since, self.total = 0, None, time.monotonic()

  def step(self):
    """One more step is done."""
    if self.since is None:
      self.since = time.monotonic()
    else:
      self.steps += 1

  def restart(self):
    """Time since the last step was spent on something else."""
    self.since, self.steps = None, 0

  def lap(self) -> float:
    """Wall seconds since the last lap (all of them: compiling and evaluating too)."""
    now = time.monotonic()
    lap, self.total = now - self.total, now
    return lap

  def rates(self) -> dict:
    """throughput/… since the last restart, by name; empty before the second step."""
    seconds = time.monotonic() - self.since if self.since else 0
    if not self.steps or not seconds:
      return {}
    return {'throughput/tokens_per_second': self.steps * self.tokens / seconds,
            'throughput/flops_per_second': self.steps * self.flops / seconds}

  def text(self) -> str:
    rates = self.rates()
    if not rates:
      return 'compiled'
    return (f'{quantity(rates["throughput/tokens_per_second"])} tokens/s, '
            f'{quantity(rates["throughput/flops_per_second"])}FLOP/s')
