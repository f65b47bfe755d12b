"""Mixtures over time: the share of each domain as a function of the step (late up-sampling,
2406.03476), and the exact number of rows that gives each domain in each batch.

A schedule is text: `STEP NAME=SHARE NAME=SHARE, STEP …`, '800 code=4, 900 code=8 legal=2'. Batches
from STEP on have those shares; a domain that is not named keeps its own. `data.weights` are the
shares at step 0. Shares count relative to each other, at every step anew.
"""

import bisect
import fractions
import math
import re

from demix.errors import BadInput
from demix.settings import nearest

KINDS = ('piecewise', 'linear')

_MARK = 128  # batches between two states that are kept
_SYNTAX = "write 'STEP NAME=SHARE NAME=SHARE, STEP …', '800 code=4' for example"


def parse(text: str, weights: dict, domains: tuple) -> list[tuple[int, dict]]:
  """[(step, {domain: share})], from step 0 on, steps rising; the shares of a step sum to 1 (exact).

  Args:
    text: see above. weights: {domain: number >= 0} at step 0. domains: their order.

  Raises:
    BadInput: not of that form, steps that do not rise, a domain that there is not or that is named
      twice, a share that is negative or no number, shares that sum to 0.
  """
  now = {d: fractions.Fraction(str(weights[d])) for d in domains}
  knots = [(0, _normal(0, now))]
  for stage in text.split(','):
    words = stage.split()
    if len(words) < 2 or not re.fullmatch(r'[0-9]{1,15}', words[0]):
      raise BadInput(f'data.schedule: {stage.strip()!r} is not a step and its shares: {_SYNTAX}')
    step, named = int(words[0]), set()
    if step <= knots[-1][0]:
      before = f'{knots[-1][0]} comes before it' if knots[1:] else \
          'data.weights are those of step 0'
      raise BadInput(f'data.schedule: step {step} is out of order, {before}: steps must rise')
    for word in words[1:]:
      name, _, share = word.partition('=')
      if name not in domains:
        raise BadInput(f'data.schedule: step {step}: {name!r} is not one of the domains'
                       f'{nearest(name, domains)}')
      if name in named:
        raise BadInput(f'data.schedule: step {step} gives {name!r} two shares: leave one out')
      if not re.fullmatch(r'[0-9]*\.?[0-9]+(e-?[0-9]{1,2})?', share):
        raise BadInput(f'data.schedule: step {step}: {word!r}: a share is a number of at least 0')
      named.add(name)
      now = now | {name: fractions.Fraction(share)}
    knots.append((step, _normal(step, now)))
  return knots


def _normal(step, shares):
  total = sum(shares.values())
  if not total:
    raise BadInput(f'data.schedule: all shares are 0 from step {step} on: give a domain a share')
  return {d: s / total for d, s in shares.items()}


def only(text: str, domains: tuple) -> str:
  """The schedule without the domains that are not in `domains`."""
  stages = [stage.split() for stage in text.split(',')]
  kept = [[s[0], *(w for w in s[1:] if w.partition('=')[0] in domains)] for s in stages if s]
  return ', '.join(' '.join(s) for s in kept if s[1:])


class ScheduledTurns:
  """Whose turn row k is: `turns[k]` → (source, how many rows it had before). See batches.Turns.

  After t batches source d has had floor or ceil of C_d(t) = B ∫_0^t w_d rows, its exact share so
  far: less than one row amiss, at every t, whatever the shares, however many sources. Each row is a
  job that may be done once C_d begins its unit and must be done when C_d ends it; a batch does
  what is due, then what is due first. Rounding alone cannot do it: rounded one by one the counts do
  not add up to whole batches, and rounded together a count may fall. So the first access to batch t
  walks over all batches before it, some 30 µs each, and later ones over at most 128; what they find
  depends on the schedule and t only.

  Args:
    knots: see `parse`. kind: 'piecewise' (shares of a knot hold until the next) or 'linear' (a
      straight line from knot to knot). rows: B, of a batch.
  """

  def __init__(self, knots: list, kind: str, rows: int):
    self.rows, self._starts = rows, [step for step, _ in knots]
    shares = [list(s.values()) for _, s in knots]
    # C_d, s steps into a segment, is (start + slope · s + bend · s²) / unit.
    segments, start = [], [fractions.Fraction(0)] * len(shares[0])
    for i, now in enumerate(shares):
      length = self._starts[i + 1] - self._starts[i] if i + 1 < len(knots) else 0
      bends = [(b - a) / (2 * length) if length and kind == 'linear' else fractions.Fraction(0)
               for a, b in zip(now, shares[min(i + 1, len(shares) - 1)])]
      parts = [(c, rows * a, rows * b) for c, a, b in zip(start, now, bends)]
      segments.append(parts)
      start = [c + a * length + b * length * length for c, a, b in parts]
    self.unit = math.lcm(*(x.denominator for seg in segments for part in seg for x in part))
    self._segments = [[tuple(int(x * self.unit) for x in part) for part in seg] for seg in segments]
    self._marks, self._pair = {0: (0,) * len(shares[0])}, (-2, (), ())

  def __len__(self):
    return 1 << 52

  def shares_until(self, t: int) -> list[int]:
    """C_d(t) · unit: exact rows of each source in the batches before t, in units of `unit`."""
    i = bisect.bisect_right(self._starts, t) - 1
    s = t - self._starts[i]
    return [c + s * (a + s * b) for c, a, b in self._segments[i]]

  def counts(self, t: int) -> tuple[int, ...]:
    """Rows of each source in the batches before t."""
    at, state, following = self._pair
    if at + 1 == t:
      return following
    at = t - t % _MARK
    while at not in self._marks:
      at -= _MARK
    state = self._marks[at]
    while at < t:
      state, at = self._next(state, at), at + 1
      if not at % _MARK:
        self._marks[at] = state
    return state

  def __getitem__(self, k: int) -> tuple[int, int]:
    t, place = divmod(int(k), self.rows)
    at, before, after = self._pair
    if at != t:
      before = self.counts(t)
      after = self._next(before, t)
      self._pair = t, before, after
    for source, (had, has) in enumerate(zip(before, after)):
      if place < has - had:
        return source, had + place
      place -= has - had
    raise AssertionError(f'batch {t} has rows {before} → {after}')

  def _next(self, state, t):
    """The counts after batch t."""
    exact = self.shares_until(t + 1)
    after = [max(had, x // self.unit) for had, x in zip(state, exact)]
    spare = self.rows * (t + 1) - sum(after)
    if spare:
      may = [d for d, x in enumerate(exact) if after[d] * self.unit < x]
      if len(may) > spare:
        may.sort(key=lambda d: self._due(d, after[d] + 1, t))
      for d in may[:spare]:
        after[d] += 1
    return tuple(after)

  def _due(self, d, count, t):
    """The first step after t at which source d's exact share is `count` rows; infinite: never."""
    goal, (last, slope, _) = count * self.unit, self._segments[-1][d]
    if last < goal and not slope:
      return math.inf
    reach = 1
    while self._exact(d, t + reach) < goal:
      reach *= 2
    return bisect.bisect_left(range(t + reach), goal, t + reach // 2,
                              key=lambda s: self._exact(d, s))

  def _exact(self, d, t):
    i = bisect.bisect_right(self._starts, t) - 1
    s, (c, a, b) = t - self._starts[i], self._segments[i][d]
    return c + s * (a + s * b)
