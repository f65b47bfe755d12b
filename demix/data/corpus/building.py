"""The folder in which a store grows until it takes its place."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import orjson

from demix.errors import BadInput, DemixError, Locked


def synced(file):
  """Flushes an open file to the disk: a card may not be there before what it names."""
  file.flush()
  os.fsync(file.fileno())


def scratch_of(folder: Path) -> Path:
  """A new folder in a store that is being built, for files that do not stay; no domain can be
  called so."""
  scratch = folder / '.scratch'
  scratch.mkdir()
  return scratch


class Building:
  """`.<name>.building` beside `out`, held by one process; gone afterwards.

  A store that is replaced is `.<name>.replaced` for the moment between two renames; whoever comes
  next after a crash there puts it back.

  Attributes:
    path: the empty folder to fill.
  """

  def __init__(self, out: Path):
    self.out = out
    self.path, self._replaced = _beside(out)
    self._lock = None

  @staticmethod
  def check_place(out: Path):
    """BadInput unless `out` is absent, an empty folder, or a token store of any version."""
    try:
      if not out.exists():
        return
      if not out.is_dir():
        raise BadInput(f'--out={out}: a file is there: name another folder')
      empty = not any(out.iterdir())
    except OSError as e:
      raise BadInput(f'--out={out}: cannot be read ({e.strerror}): name another folder') from None
    if not empty and not _is_store(out):
      raise BadInput(f'--out={out}: not empty and not a token store (no card.json of one): name '
                     'another folder, or empty it')
    if os.path.ismount(out):
      raise BadInput(f'--out={out}: a mount point cannot be replaced: name a folder inside it')

  @staticmethod
  def recover(out: Path):
    """Removes what a killed process left beside `out`, and puts a store back that it was
    replacing. Locked: the process lives."""
    if any(p.exists() for p in _beside(out)):
      with Building(out):
        pass

  def __enter__(self):
    try:
      self.out.parent.mkdir(parents=True, exist_ok=True)
      self._take()
      for p in list(self.path.iterdir()):
        shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
      if self._replaced.exists():
        if self.out.exists():
          shutil.rmtree(self._replaced)
        else:
          self._replaced.rename(self.out)
    except OSError as e:
      raise BadInput(f'--out={self.out}: cannot write beside it ({e.strerror}: {e.filename}): name '
                     'a folder in a writable place') from None
    return self

  def _take(self):
    while True:
      self.path.mkdir(exist_ok=True)
      self._lock = os.open(self.path, os.O_RDONLY)
      try:
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        os.close(self._lock)
        raise Locked(f'{self.out}: another process is making this store (it holds {self.path}): '
                     'wait for it, or end it') from None
      try:  # the folder that was opened may have taken its place since
        if os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
          return
      except FileNotFoundError:
        pass
      os.close(self._lock)

  def publish(self, name: str, content: bytes):
    """Writes the last file and puts the folder in its place, or in that of the store there."""
    with open(self.path / f'{name}.part', 'wb') as f:
      f.write(content)
      synced(f)
    os.rename(self.path / f'{name}.part', self.path / name)
    os.fsync(self._lock)
    if self.out.exists() and any(self.out.iterdir()):
      self.out.rename(self._replaced)
    self.path.rename(self.out)
    shutil.rmtree(self._replaced, ignore_errors=True)

  def __exit__(self, kind, error, trace):
    try:
      if os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
        shutil.rmtree(self.path, ignore_errors=True)
    except FileNotFoundError:
      pass
    os.close(self._lock)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise DemixError(f'{self.out}: no room to write it ({error.strerror}): make some and run '
                       'prepare again; nothing was changed') from None


def _is_store(folder):
  try:
    return {'version', 'tokenizer', 'domains'} <= orjson.loads(
        (folder / 'card.json').read_bytes()).keys()
  except (OSError, orjson.JSONDecodeError, AttributeError):
    return False


def _beside(out):
  return out.with_name(f'.{out.name}.building'), out.with_name(f'.{out.name}.replaced')
