"""Files of a source: found by a glob, digested, and watched for changes."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from demix.data.sources.part import Part
from demix.errors import BadInput
from demix.names import shown

_CHUNK = 1 << 20


def find(pattern: str) -> list[Path]:
  """The files that a path or glob (with **) names, sorted by path; hidden ones never."""
  return sorted(p for p in map(Path, glob.glob(pattern, recursive=True))
                if p.is_file() and p.name[0] != '.')


def base(pattern: str) -> Path:
  """The folder in front of a glob's first wildcard, or the one that a file lies in."""
  parts = Path(pattern).parts
  fixed = next((i for i, p in enumerate(parts) if glob.has_magic(p)), len(parts) - 1)
  return Path(*parts[:fixed])


def stamp(path: Path) -> tuple[int, int]:
  """(bytes, time of the last change in ns): another stamp is another file."""
  about = path.stat()
  return about.st_size, about.st_mtime_ns


def digest(path: Path, on_bytes: Callable[[int], None]) -> 'xxhash.xxh3_128':
  """xxh3-128 of a file's content. BadInput: it cannot be read."""
  found = xxhash.xxh3_128()
  try:
    with open(path, 'rb') as f:
      while chunk := f.read(_CHUNK):
        found.update(chunk)
        on_bytes(len(chunk))
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  return found


class FilePart(Part):
  """A part that is one file."""

  def __init__(self, path: Path, key: str = ''):
    self.path, self.key = path, shown(key or path.name)
    self.stamps = {path: stamp(path)}
    self.size = self.stamps[path][0]

  def __str__(self):
    return str(self.path)

  def digest(self, on_bytes):
    return digest(self.path, on_bytes).hexdigest()


class FilesPart(Part):
  """A part that a library reads from files: data and what describes them.

  Args:
    name: how errors and the card call it: a data set and its split.
    paths: the files that it depends on, in order.
  """

  def __init__(self, name: str, paths):
    self.key = shown(name)
    self.stamps = {p: stamp(p) for p in map(Path, paths)}
    self.size = sum(size for size, _ in self.stamps.values())

  def __str__(self):
    return self.key

  def digest(self, on_bytes):
    whole = xxhash.xxh3_128(self.key.encode())
    for path in self.stamps:
      whole.update(digest(path, on_bytes).digest())
    return whole.hexdigest()


def open_files(make, pattern: str, what: str) -> list[Part]:
  """make(path, key) for every file of a glob. BadInput: there is none, or it is empty."""
  found, root = find(pattern), base(pattern)
  if not found:
    hint = ': a folder; name the files in it, with * and ** as you like' \
        if os.path.isdir(pattern) else ''
    raise BadInput(f'{what}: no file {pattern!r}{hint}')
  for path in found:
    if not path.stat().st_size:
      raise BadInput(f'{path}: an empty file: remove it, or leave it out of {what}')
  return [make(path, path.relative_to(root).as_posix()) for path in found]
