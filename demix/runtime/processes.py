"""Several processes of one run, on one host or many: how they find each other, agree, and leave.

All run the same program step by step. What reaches one of them only (a signal, a full disk, an
unreadable file) is agreed on here, so that all go on or all end; process 0 alone writes. Whatever
waits for the other processes is called by all of them, on their main threads, in the same order.
"""

import contextlib
import os
import re
import sys

import numpy as np

from demix.errors import BadInput, DemixError

_alone = False  # this process ends while others may be waiting for it


def count() -> int:
  """How many processes run this program."""
  import jax
  return jax.process_count()


def first() -> bool:
  """Whether this is process 0, which writes and prints."""
  import jax
  return jax.process_index() == 0


def _make_room(processes: int):
  """More threads for XLA on CPU, before it starts them: by default it has one a core or device.

  A collective that waits holds its thread, and a device may wait in two at once. Eight devices of
  one process with eight threads then wait for ever (seen: seven in one sum and one in another).
  """
  found = re.search(r'host_platform_device_count=(\d+)', os.environ.get('XLA_FLAGS', ''))
  devices = int(found[1]) if found else 1
  if processes != 1 or devices > 1:
    os.environ.setdefault('PJRT_NPROC', str(max(os.cpu_count() or 1, 8 * devices)))


@contextlib.contextmanager
def joined(processes: int, process: int = 0, coordinator: str = '', patience: int = 100):
  """Joins the processes of a run for the `with` block; before JAX has touched a device.

  Args:
    processes: how many; 1: this one alone, nothing is done; 0: what the environment says (SLURM,
      a TPU pod slice, Open MPI, Kubernetes: what `jax.distributed` knows).
    process, coordinator: number of this process and HOST:PORT that process 0 listens on, where the
      environment does not say them.
    patience: seconds without a sign of life of one process after which the others end.

  Raises:
    BadInput: the environment does not say it, or the numbers cannot be.
    DemixError: the others did not come.
  """
  _make_room(processes)
  if processes == 1:
    yield
    return
  import jax
  given = {}
  if processes:
    if not coordinator or not 0 <= process < processes:
      raise BadInput(f'mesh.processes={processes} with mesh.process={process}, mesh.coordinator='
                     f'{coordinator!r}: give each process its number from 0 to {processes - 1} and '
                     'all the same HOST:PORT, or mesh.processes=0 where SLURM or a TPU pod says it')
    given = {'num_processes': processes, 'process_id': process, 'coordinator_address': coordinator}
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=patience)
  except ValueError as e:  # no cluster found
    raise BadInput(f'mesh.processes={processes}: {" ".join(str(e).split())}; give '
                   'mesh.processes, mesh.process and mesh.coordinator') from e
  except RuntimeError as e:
    raise DemixError(f'{processes or "the"} processes did not come together at '
                     f'{coordinator or "the coordinator"} ({" ".join(str(e).split())[:200]}); '
                     'start all of them within 5 minutes, with one coordinator') from e
  global _alone
  _alone = True  # until it is known that all end
  with contextlib.ExitStack() as stack:
    if not first():  # errors are still said by all
      stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, 'w'))))
    try:
      yield
    except BaseException as e:
      # Others would wait for this one, and it for them if it shut down in good order.
      if not getattr(e, 'everywhere', False):
        raise
      barrier('the end')
      _alone = False
      jax.distributed.shutdown()
      raise
  barrier('the end')
  _alone = False
  jax.distributed.shutdown()


def leave(code: int):
  """Ends this process at once if others may be waiting for it; they see that it is gone."""
  if _alone:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- agreeing


def gather(value: int) -> list[int]:
  """The value of each process."""
  if count() == 1:
    return [int(value)]
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(np.int32(value))).tolist()


def barrier(name: str):
  """Waits until all processes are here; `name` is the same in all."""
  if count() > 1:
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices(name)


def agreed(call):
  """`call()` in every process: its value, or an error in all when there is one in any.

  Raises:
    What `call` raised here; elsewhere an error of the same exit code that names the process.
  """
  if count() == 1:
    return call()
  value = error = None
  try:
    value = call()
  except Exception as e:
    error = e
  codes = gather(getattr(error, 'code', 1) if error else 0)
  if not any(codes):
    return value
  if not error:
    which = next(i for i, code in enumerate(codes) if code)
    kinds = {kind.code: kind for kind in (DemixError, *DemixError.__subclasses__())}
    error = kinds.get(codes[which], DemixError)(
        f'process {which} of {len(codes)} ended, with exit code {codes[which]}: its own message '
        'says why')
  error.everywhere = True
  raise error


def decided(call) -> int | None:
  """What `call()` (an int >= 0 or None) returns in process 0, in all; its errors too."""
  value = agreed(lambda: call() if first() else None)
  value = gather(-1 if value is None else value)[0]
  return None if value < 0 else value


def same(digest: str, what: str):
  """Raises BadInput in all processes when they do not have the same `digest` (hexadecimal)."""
  mine = int(digest[:7], 16)
  values = gather(mine)
  other = next((i for i, value in enumerate(values) if value != values[0]), None)
  if other is not None:
    error = BadInput(f'process {other} has another {what} than process 0: start all processes '
                     'with the same flags and the same data')
    error.everywhere = True
    raise error


FAILED = 1000  # a Request of no signal: something is wrong in one process, which can say what


class Request:
  """A request to stop that reaches one process and is followed by all at the same step."""

  def __init__(self):
    self.number = 0  # of a signal, or FAILED; set where it comes
    self._sent = self._largest = None

  def seen(self) -> int:
    """0, or the largest request of any process; called by all once a step.

    With several processes it is the one of the call before: the answer travels while a step runs,
    so that no step waits for it.
    """
    if count() == 1:
      return self.number
    import jax
    import jax.numpy as jnp
    if self._largest is None:
      mesh = jax.sharding.Mesh(np.array(jax.devices()), ('device',))
      self._each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
      self._largest = jax.jit(jnp.max, out_shardings=jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec()))
    number = np.full(1, self.number, np.int32)
    each = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: number)
    before, self._sent = self._sent, self._largest(each)
    return 0 if before is None else int(before)


# ---- arrays


def whole(array) -> np.ndarray:
  """All of an array, wherever its parts are; every process gets it."""
  import jax
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or
                                           array.is_fully_replicated):
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
