"""A run's directory: who holds it, the config it was made with, and writing files whole.

Standard library only, so that a verb can refuse a held or foreign workdir before JAX is imported.
"""

import contextlib
import datetime
import errno
import fcntl
import io
import json
import os
import socket
import stat
import threading
import time
from pathlib import Path

from demix.errors import BadInput, Locked

LOCK = '.lock'
CONFIG = 'config.json'
_OPEN_FILES = ('/dev/std', '/dev/fd/', '/proc/')  # /dev/stdout may be a file that others write to

_held: set[int] = set()  # lock descriptors of this process


def _let_go_in_child():
  # flock belongs to the open file, which a forked child (a data worker) shares: without this, a
  # worker that outlives its killed parent would keep the workdir locked.
  for fd in _held:
    with contextlib.suppress(OSError):
      os.close(fd)
  _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def fsync_directory(directory):
  """Makes the names in a directory durable (what a rename or a new file needs)."""
  fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


class _Stream(io.RawIOBase):
  """What is written goes on to a file; without places, for a pipe has none."""

  def __init__(self, file):
    self._file = file

  def writable(self):
    return True

  def write(self, data):
    self._file.write(data)
    return memoryview(data).nbytes


def check_writable(path, what: str):
  """Raises BadInput, before any long work, where `write_atomic` could not write a file.

  Args:
    what: for the message: '--out'.
  """
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    mode = None
  except (OSError, ValueError) as e:
    raise BadInput(f'{what}={path}: cannot be written ({getattr(e, "strerror", e)}): name another '
                   'file') from None
  if mode is not None and (stat.S_ISDIR(mode) or stat.S_ISSOCK(mode)):
    raise BadInput(f'{what}={path}: a {"folder" if stat.S_ISDIR(mode) else "socket"}, not a file: '
                   'name a file')
  folder = os.path.dirname(os.path.realpath(path))
  if not os.path.isdir(folder):
    raise BadInput(f'{what}={path}: no folder {folder}: make it first')
  direct = mode is not None and not stat.S_ISREG(mode)
  if not os.access(path if direct else folder, os.W_OK):
    raise BadInput(f'{what}={path}: cannot be written (Permission denied): name another file')


def write_atomic(path, data):
  """Writes a file whole or not at all, durably: temporary file, fsync, rename, fsync of the folder.

  A symbolic link stays one: the file that it leads to is written. A device, a pipe and /dev/stdout
  are written to, and never replaced. A file keeps its mode.

  Args:
    data: bytes, or a function that writes into the binary file it is given.

  Raises:
    OSError: it could not be written (disk full, read-only, a folder is there); what was at `path`
      is untouched.
  """
  write = data if callable(data) else lambda f: f.write(data)
  try:
    mode = os.stat(path).st_mode  # of what links lead to
  except FileNotFoundError:
    mode = None
  device = mode is not None and not stat.S_ISREG(mode)
  if device or os.path.abspath(path).startswith(_OPEN_FILES):
    with open(path, 'ab') as f:
      write(_Stream(f))
    return
  path = Path(os.path.realpath(path))
  temporary = path.parent / f'.{path.name}.{os.getpid()}.{threading.get_ident()}.tmp'
  try:
    with open(temporary, 'wb') as f:
      write(f)
      f.flush()
      if mode is not None:
        os.fchmod(f.fileno(), stat.S_IMODE(mode))
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
  fsync_directory(path.parent)


def _make(workdir: Path):
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise BadInput(f'{workdir}: not a directory; name another workdir') from None
  except OSError as e:
    raise BadInput(f'{workdir}: cannot be made a workdir ({e.strerror}); '
                   'name one that can be written') from None


def _holder(lock: Path) -> str:
  """Who holds a lock, for people; waits a moment for a holder that is just writing its name."""
  for _ in range(10):
    try:
      about = json.loads(lock.read_text())
      return 'pid {pid} on {host} since {since} ({verb})'.format(**about)
    except (OSError, ValueError, KeyError, TypeError):
      time.sleep(0.05)
  return 'a process that did not leave its name'


def _lock(fd: int, workdir: Path):
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
      raise Locked(f'{workdir} is held by {_holder(workdir / LOCK)}; '
                   'wait until it ends or name another workdir') from None
    raise BadInput(f'{workdir}: this file system cannot lock ({e.strerror}); '
                   'name a workdir on one that can') from None


@contextlib.contextmanager
def hold(path, what: str = 'train'):
  """Holds a workdir (made if it is missing) for the `with` block; yields it as a Path.

  The lock is the kernel's (flock on W/.lock): it ends with the process however that ends, and is
  not inherited by its children. W/.lock stays behind and says nothing when no one holds it.

  Args:
    path: the workdir.
    what: the verb, for whoever is refused.

  Raises:
    Locked: another process holds it (named with pid, host, since), at once.
    BadInput: not a directory, not writable, or a file system without locks.
  """
  workdir = Path(path)
  try:
    os.fsencode(workdir.absolute()).decode()
  except UnicodeError:  # checkpoints and records could not name it
    raise BadInput(f'{workdir}: the path is not UTF-8: name another workdir') from None
  _make(workdir)
  lock = workdir / LOCK
  try:
    # No O_TRUNC: until the lock is ours the file speaks for its holder.
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  except OSError as e:
    raise BadInput(f'{workdir}: cannot be written ({e.strerror}); name another workdir') from None
  try:
    _lock(fd, workdir)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    about = {'pid': os.getpid(), 'host': socket.gethostname(), 'since': now, 'verb': what}
    try:
      os.ftruncate(fd, 0)
      os.pwrite(fd, json.dumps(about).encode() + b'\n', 0)
    except OSError as e:
      raise BadInput(f'{workdir}: cannot be written ({e.strerror}); '
                     'free space or name another workdir') from None
  except BaseException:
    os.close(fd)
    raise
  _held.add(fd)
  try:
    yield workdir
  finally:
    if fd in _held:  # not in a forked child: it closed its copy, and the number may be reused
      _held.discard(fd)
      with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
      os.close(fd)


def check_shared(workdir):
  """Raises BadInput where a workdir that another process of the run holds cannot be seen."""
  if not (Path(workdir) / LOCK).exists():
    raise BadInput(f'{workdir}: not there on {socket.gethostname()}; all processes of a run need '
                   'it on one file system that they share')


def save_config(workdir, config: dict):
  """Writes W/config.json, whole or not at all; tuples become lists.

  Raises:
    BadInput: a value that JSON does not have, or a workdir that cannot be written.
  """
  path = Path(workdir) / CONFIG
  try:
    write_atomic(path, (json.dumps(config, indent=2) + '\n').encode())
  except (TypeError, ValueError) as e:
    raise BadInput(f'{path}: the config is not JSON ({e})') from None
  except OSError as e:
    raise BadInput(f'{path}: cannot be written ({e.strerror}); '
                   'free space or name another workdir') from None


def load_config(workdir) -> dict:
  """What `save_config` wrote.

  Raises:
    BadInput: there is none (not a workdir), or it is not a JSON object.
  """
  path = Path(workdir) / CONFIG
  try:
    config = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise BadInput(f'{workdir}: no {CONFIG}, so not the workdir of a run') from None
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  except ValueError as e:
    raise BadInput(f'{path}: not JSON ({e}); restore it from a copy') from None
  if not isinstance(config, dict):
    raise BadInput(f'{path}: expected a JSON object, got {type(config).__name__}')
  return config


def load_identity(workdir) -> dict:
  """The identity fields in W/config.json. BadInput: as `load_config`, or it has none."""
  found = load_config(workdir).get('identity')
  if not isinstance(found, dict):
    raise BadInput(f'{Path(workdir) / CONFIG}: no "identity" in it; restore it from a copy')
  return found


_ABSENT = object()


def _plain(value):
  """As it is after a round trip through config.json (tuples are lists); absent stays absent."""
  return value if value is _ABSENT else json.loads(json.dumps(value))


def _shown(value) -> str:
  return 'absent' if value is _ABSENT else json.dumps(value)


def check_identity(saved: dict, now: dict, workdir):
  """Refuses to go on in a workdir that another experiment made.

  Args:
    saved, now: flat {'model.d_model': value} of the identity fields, of the workdir and of this
      run. Lists and tuples are the same; a field that only one of them has is a difference.
    workdir: for the message.

  Raises:
    BadInput: they differ; every difference is named.
  """
  different = []
  for key in [*saved, *(k for k in now if k not in saved)]:
    a, b = _plain(saved.get(key, _ABSENT)), _plain(now.get(key, _ABSENT))
    # The text tells True from 1, which == does not, and makes a NaN equal to itself.
    if _shown(a) != _shown(b) and (a != b or isinstance(a, bool) != isinstance(b, bool)):
      different.append(f'{key}: {_shown(a)} → {_shown(b)}')
  if different:
    raise BadInput(f'{workdir} belongs to another experiment: {"; ".join(different)}; '
                   'use another workdir, or the saved values to go on in this one')
