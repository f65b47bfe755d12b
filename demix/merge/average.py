"""Σ_i w_i θ_i, leaf by leaf (BTM §2.3; Wortsman et al. 2022). Sums are float64, so that the average
of copies is the copy, bit for bit, and a weight of 1 is that parent."""

import tempfile

import numpy as np

from demix.errors import BadInput

_BLOCK = 1 << 17  # numbers that are added at once


def check_weights(weights, names) -> np.ndarray:
  """float64 weights, one for each of `names`.

  Raises:
    BadInput: another number of them, a negative one, or a sum that is not 1.
  """
  weights = np.asarray(weights, np.float64)
  if weights.shape != (len(names),):
    raise BadInput(f'{weights.size} weights for {len(names)} models ({", ".join(names)}): give one '
                   'for each, in this order')
  if not np.isfinite(weights).all() or (weights < 0).any():
    raise BadInput(f'weights {weights.tolist()}: numbers of at least 0')
  if abs(weights.sum() - 1) > 1e-4:
    raise BadInput(f'weights {weights.tolist()} sum to {weights.sum():g}, not to 1: divide by that')
  return weights / weights.sum()


class Sum:
  """Σ w_i · θ_i of one leaf, a parent after the other, in float64.

  Args:
    name: of the leaf, for messages.
    folder: where the sum is kept in a file that has no name, so that a large leaf costs no memory;
      '': in memory.
  """

  def __init__(self, name: str, folder=''):
    self.name, self.dtype, self.shape = name, None, None
    self._folder, self._file, self._sum = folder, None, None

  def add(self, parent: str, array, weight: float):
    """Adds weight · array. BadInput: `parent`'s array is not finite."""
    array = np.asarray(array)
    first, flat = self.dtype is None, array.reshape(-1)
    if first:
      self.dtype, self.shape = array.dtype, array.shape
      if self._folder:
        self._file = tempfile.TemporaryFile(dir=self._folder)
      else:
        self._sum = np.empty(flat.size)
    for at in range(0, flat.size, _BLOCK):
      part = flat[at:at + _BLOCK].astype(np.float64)
      if not np.isfinite(part.sum()):  # a sum of float32 in float64 does not overflow
        raise BadInput(f'{parent}: {self.name} is not finite: leave that model out')
      part *= weight
      if not first:  # not 0 + part, which would make -0.0 another number
        part += self._part(at, part.size)
      if self._file:
        self._file.seek(at * 8)
        self._file.write(part)
      else:
        self._sum[at:at + part.size] = part

  def _part(self, at, size) -> np.ndarray:
    if not self._file:
      return self._sum[at:at + size]
    self._file.seek(at * 8)
    return np.frombuffer(self._file.read(size * 8))

  def total(self) -> np.ndarray:
    """The sum, rounded once, in the dtype and shape of the parents."""
    out = np.empty(int(np.prod(self.shape, dtype=np.int64)), self.dtype)
    for at in range(0, out.size, _BLOCK):
      size = min(_BLOCK, out.size - at)
      out[at:at + size] = self._part(at, size).astype(self.dtype)
    if self._file:
      self._file.close()
    return out.reshape(self.shape)


def leaf(name: str, parents, weights, folder='') -> np.ndarray:
  """Σ w_i · θ_i of one leaf, in the dtype of the parents.

  Args:
    name: of the leaf, for messages. parents: an iterable of (parent's name, array), read one after
      the other. weights: as many; where one is 0 the parent takes no part. folder: see `Sum`.

  Raises:
    BadInput: a parent's leaf is not finite.
  """
  total = Sum(name, folder)
  for (parent, array), weight in zip(parents, weights):
    if weight:
      total.add(parent, array, weight)
  return total.total()
