"""How text is cut into scored sequences, and which of them are scored: the protocol of a number.

A model is scored the way it was trained: a continuous stream of blocks, or documents by themselves
(long ones cut, positions restarted, no attention across them). Another way is asked for by name.
"""

import dataclasses

import numpy as np

from demix.data.tokens.packing import PACKINGS, Documents, Stream
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.settings import nearest

DEV = 200  # sequences of valid text that experts are compared on, unless another number is given


def shuffled(count: int) -> np.ndarray:
  """0 … count - 1 in an order that never changes.

  Files keep their documents by date, source or cluster, so the first ones stand for nothing. By a
  hash of the place (splitmix64, Steele et al. 2014): the same in every version of NumPy.
  """
  x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  return np.argsort(x ^ (x >> np.uint64(31)), kind='stable')


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How text is cut, and how much of it is scored.

  Attributes:
    length: L, tokens of a sequence, with the <domain> symbol where there is one.
    packing: continuous or document, as in data.packing.
    stride: tokens scored per window, the rest is context; 0: all of them (the papers).
    limit: sequences of a split, a sample that is the same for all models; 0: all.
  """
  length: int
  packing: str = 'continuous'
  stride: int = 0
  limit: int = 0

  def __post_init__(self):
    if self.packing not in PACKINGS:
      raise BadInput(f'--packing={self.packing}: no such way{nearest(self.packing, PACKINGS)}')
    if self.stride < 0 or self.limit < 0:
      raise BadInput(f'--stride={self.stride} --limit={self.limit}: at least 0 each')
    if self.stride == self.length:  # blocks that do not overlap
      object.__setattr__(self, 'stride', 0)
    if self.stride > self.length:
      raise BadInput(f'stride {self.stride} is not between 1 and the sequence length {self.length}')
    if self.stride and self.packing == 'document':
      raise BadInput(f'--stride={self.stride} with documents by themselves: windows slide over a '
                     'stream; leave it out, or ask for --packing=continuous')

  @classmethod
  def of(cls, data, packing: str = '', stride: int = 0, limit: int = 0) -> 'Protocol':
    """The protocol of a model.

    Args:
      data: the DataConfig that it was trained with. packing: another one than its own.
    """
    return cls(data.sequence_length, packing or data.packing, stride, limit)

  def __str__(self):
    return f'{self.packing} {self.length}' + (f', stride {self.stride}' if self.stride else '')

  @property
  def names(self) -> tuple:
    """What of a batch the model is told, beside its targets' weights."""
    segments = ('segments_BL', 'positions_BL') if self.packing == 'document' else ()
    return ('tokens_BL', 'targets_BL', *segments)

  def sequences(self, store: TokenStore, domain: str, split: str, *, symbol: bool = False):
    """(random access to all sequences of a split, the places of those that are scored, ascending).

    Args:
      symbol: a <domain> symbol takes a place of each.

    Raises:
      BadInput: there is no text.
    """
    body = self.length - symbol
    if self.packing == 'document':
      source = Documents(store, domain, split, body, keep=False)
    else:
      source = Stream(store, domain, split, body, stride=self.stride, partial=True)
    if not len(source):
      raise BadInput(f'{store.path}/{domain}/{split} is empty: nothing to score')
    return source, self._sample(len(source))

  def _sample(self, count: int) -> np.ndarray:
    if not self.limit or self.limit >= count:
      return np.arange(count)
    return np.sort(shuffled(count)[:self.limit])

  def development(self, store: TokenStore, domain: str, count: int, split: str = 'valid'):
    """(sequences, places of at most `count` of them in a shuffled order): what priors and the
    nearest expert are estimated on. Blocks are full ones, unless there is none."""
    if self.packing == 'document':
      source = Documents(store, domain, split, self.length, keep=False)
    else:
      source = Stream(store, domain, split, self.length)
      if not len(source):
        source = Stream(store, domain, split, self.length, partial=True)
    return source, shuffled(len(source))[:count]

  def count(self, store: TokenStore, domain: str, split: str, *, symbol: bool = False) -> int:
    """How many sequences are scored."""
    return len(self.sequences(store, domain, split, symbol=symbol)[1])
