"""Σ_i w_i θ_i, leaf by leaf (BTM §2.3; Wortsman et al. 2022). Sums are float64, so that the average
of copies is the copy, bit for bit, and a weight of 1 is that parent."""

import numpy as np

from demix.errors import BadInput


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


def leaf(name: str, parents, weights) -> np.ndarray:
  """Σ w_i · θ_i of one leaf, in the dtype of the parents.

  Args:
    name: of the leaf, for messages. parents: an iterable of (parent's name, array), read one after
      the other. weights: as many; where one is 0 the parent takes no part.

  Raises:
    BadInput: a parent's leaf is not finite.
  """
  total, dtype = None, None
  for (parent, array), weight in zip(parents, weights):
    if not weight:
      continue
    array = np.asarray(array)
    if not np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array).all():
      raise BadInput(f'{parent}: {name} is not finite: leave that model out')
    dtype = array.dtype
    part = array.astype(np.float64) * weight
    total = part if total is None else total + part
  return total.astype(dtype)
