"""The expert nearest to a domain: the lowest NLL on its valid text, and by how much it is ahead.

One rule wherever an expert is chosen for text that none was trained on: `given` and `best` of
`evaluate`, init.expert=nearest. (The papers take the largest of the cached prior: docs/method.md.)
"""

import dataclasses
import math

import numpy as np

from demix.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Experts compared on development text.

  Attributes:
    names: of the experts. nll: nats per token of each, in their order.
    margin: nats per token between the best and the second; inf for a single expert.
    error: half of the 95 % interval of the margin, by sequences in pairs; inf for one sequence,
      None where it is not known.
    sequences: how many were read.
  """
  names: tuple
  nll: tuple
  margin: float
  error: float | None
  sequences: int

  @property
  def expert(self) -> str:
    """The name of the nearest."""
    return self.names[int(np.argmin(self.nll))]

  @property
  def certain(self) -> bool:
    """Whether the margin is beyond its error."""
    return len(self.names) == 1 or self.error is None or self.margin > self.error

  def describe(self) -> str:
    """What it rests on, for people."""
    if len(self.names) == 1:
      return 'the only expert'
    second = sorted(range(len(self.names)), key=lambda e: self.nll[e])[1]
    error = '' if self.error is None else f' ± {self.error:.4f}'
    return (f'lowest NLL on {self.sequences} sequences of valid text, '
            f'{self.margin:.4f}{error} nats ahead of {self.names[second]}')

  def warning(self, domain: str) -> str:
    """One line where the choice is not certain; '' where it is."""
    if self.certain:
      return ''
    return (f'{domain}: nearest is {self.expert}, {self.describe()}: within its error; more valid '
            'text may name another')


def compare(names, nats_EN, tokens_N, domain: str = '') -> Nearest:
  """Compares experts by what they lose on the same sequences.

  Args:
    nats_EN: summed NLL of each expert on each sequence. tokens_N: scored tokens of each.

  Raises:
    BadInput: no token of the text is scored.
  """
  nats_EN, tokens_N = np.asarray(nats_EN, np.float64), np.asarray(tokens_N, np.float64)
  total = tokens_N.sum()
  if not total:
    raise BadInput(f'{domain}: no token of its {len(tokens_N)} sequences of valid text is scored, '
                   'they hold prompts only: name the expert, or give more valid text')
  nll_E = nats_EN.sum(1) / total
  margin = error = math.inf
  if len(nll_E) > 1:
    first, second = np.argsort(nll_E, kind='stable')[:2]
    margin = float(nll_E[second] - nll_E[first])
    used = tokens_N > 0
    count = int(used.sum())
    if count > 1:  # of a ratio of sums, by its linear part (delta method)
      rest = nats_EN[second] - nats_EN[first] - margin * tokens_N
      error = float(1.96 * math.sqrt((rest[used] ** 2).sum() * count / (count - 1)) / total)
  return Nearest(tuple(names), tuple(map(float, nll_E)), margin, error, len(tokens_N))
