"""Leaves that are made when a checkpoint writes them, so that a state need not fit in memory."""

import asyncio
import dataclasses
from collections.abc import Callable

import numpy as np

from demix.errors import DemixError
from demix.runtime import digests


@dataclasses.dataclass
class Later:
  """A leaf of a state to save (demix/checkpoints/checkpoint.py) in place of its array.

  They are made one at a time, in the order of `in_order`, each once, and let go of when written.

  Attributes:
    name: of the leaf. shape, dtype: of the array. make: called without arguments for the array.
    digest: its content digest, once it is written. turn: held while it is made and written.
  """
  name: str
  shape: tuple
  dtype: np.dtype
  make: Callable
  digest: str = ''
  turn: object = None

  def __post_init__(self):
    self.shape, self.dtype = tuple(self.shape), np.dtype(self.dtype)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def __deepcopy__(self, memo):
    return self  # Orbax copies arrays, which their owner may go on changing

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.make(), dtype)

  def made(self) -> np.ndarray:
    """The array; its digest is kept. DemixError: it has another shape or type than was said."""
    array = np.asarray(self.make())
    if (array.shape, array.dtype) != (self.shape, self.dtype):
      raise DemixError(f'leaf {self.name}: {array.dtype}{list(array.shape)} was made, not '
                       f'{self.dtype}{list(self.shape)}')
    self.digest = digests.of_leaf(self.name, array)
    return array


def in_order(names) -> list[str]:
  """Names as Orbax goes through them: folder by folder."""
  return sorted(names, key=lambda name: name.split('/'))


def register(ocp):
  """Makes Orbax (its module) take leaves of this kind as it takes NumPy arrays."""

  class Handler(ocp.type_handlers.NumpyHandler):
    """Arrays like any other, but the next is made when the one before is written."""

    async def _background_serialize(self, values, infos, args=None):
      turn = asyncio.Semaphore(1)  # of the event loop that this save runs in
      for value in values:
        if isinstance(value, Later):
          value.turn = turn
      await super()._background_serialize(values, infos, args)

    async def _open_and_write(self, value, tspec, ts_context):
      if not isinstance(value, Later):
        await super()._open_and_write(value, tspec, ts_context)
        return
      async with value.turn:
        array = await asyncio.to_thread(value.made)
        await super()._open_and_write(array, tspec, ts_context)

  handler = ocp.type_handlers.get_type_handler(np.ndarray)
  if type(handler).__name__ != Handler.__name__:
    ocp.type_handlers.register_type_handler(
        np.ndarray, Handler(), lambda kind: issubclass(kind, (np.ndarray, Later)), override=True)
