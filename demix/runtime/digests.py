"""Digests: of content, which say whether two trees of arrays are the same, and of files, which find
damage in a directory. All are xxh3-128 in hex: they find accidents, not forgery. No JAX here.

Content digests depend on name, dtype, shape and bytes of the leaves only, never on mesh or storage.

A directory is sealed by a digests.json, written last: {"version", "files": {path: {"size",
"xxh3_128"}}, "self"} over every file below it except itself.
"""

import json
import os
import stat
from pathlib import Path

import numpy as np
import xxhash

from demix.errors import DemixError
from demix.runtime.workdir import write_atomic

VERSION = 1
FILE = 'digests.json'
_BLOCK = 1 << 22


def canonical(value) -> bytes:
  """The one way `value` is written as JSON here: sorted keys, so equal values are equal bytes.

  Raises:
    TypeError, ValueError: something that JSON does not have (also NaN and infinities).
  """
  return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + '\n').encode()


def of_leaf(name: str, array) -> str:
  """Digest over name, dtype, shape and the bytes of `array` in row-major order."""
  array = np.asarray(array)
  digest = xxhash.xxh3_128(f'{name}\0{array.dtype.name}\0{list(array.shape)}\0'.encode())
  # Through uint8: bfloat16 has no buffer interface.
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def of_tree(leaves: dict[str, str], prefix: str = '') -> str:
  """Digest over the sorted (name, digest of the leaf) pairs whose name starts with `prefix`."""
  digest = xxhash.xxh3_128()
  for name in sorted(n for n in leaves if n.startswith(prefix)):
    digest.update(f'{name}\0{leaves[name]}\n'.encode())
  return digest.hexdigest()


def of_file(path) -> str:
  """Digest of a file's bytes."""
  digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
  with open(path, 'rb', buffering=0) as f:
    while size := f.readinto(block):
      digest.update(block[:size])
  return digest.hexdigest()


def _walk(root: Path) -> tuple[dict, list[str]]:
  """{relative path: size} of the plain files below `root`, and what is there that must not be."""
  found, problems, stack = {}, [], [root]
  while stack:
    with os.scandir(stack.pop()) as entries:
      for entry in entries:
        name = os.path.relpath(entry.path, root)
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
          stack.append(entry.path)
        elif stat.S_ISREG(status.st_mode):
          found[name] = status.st_size
        else:
          # Never followed or opened: a link may lead anywhere, a pipe blocks its reader.
          kind = 'a symbolic link' if entry.is_symlink() else 'neither file nor directory'
          problems.append(f'{name}: {kind}, never part of a checkpoint')
  return found, problems


def _self(seal: dict) -> str:
  """Digest of the rest of digests.json, so that damage in it is not blamed on another file."""
  return xxhash.xxh3_128(canonical({k: v for k, v in seal.items() if k != 'self'})).hexdigest()


def seal(root):
  """Writes root/digests.json over all files below `root`, which are made durable first.

  Raises:
    DemixError: something below is neither a file nor a directory.
    OSError: a file cannot be read or digests.json not be written.
  """
  root = Path(root)
  found, problems = _walk(root)
  if problems:
    raise DemixError(f'{root}: {problems[0]}')
  for name in [*found, *{str(p) for n in found for p in Path(n).parents}]:
    fd = os.open(root / name, os.O_RDONLY)  # writers (Orbax) do not fsync all they write
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
  seal = {'version': VERSION, 'files': {
      name: {'size': size, 'xxh3_128': of_file(root / name)} for name, size in found.items()}}
  write_atomic(root / FILE, canonical(seal | {'self': _self(seal)}))


def _listed(root: Path) -> dict:
  """"files" of digests.json; ValueError says what is wrong with it."""
  data = (root / FILE).read_bytes()
  try:
    seal = json.loads(data)
    same = canonical(seal) == data
  except (ValueError, RecursionError):
    raise ValueError('not JSON') from None
  if not same:
    raise ValueError('not in canonical form')
  if not isinstance(seal, dict) or seal.get('self') != _self(seal):
    raise ValueError('its own digest is another')
  if seal.get('version') != VERSION:
    raise ValueError(f'version {seal.get("version")!r}, this demix reads {VERSION}')
  files = seal.get('files')
  if not isinstance(files, dict) or any(
      not isinstance(f, dict) or f.keys() != {'size', 'xxh3_128'} for f in files.values()):
    raise ValueError('not a list of files with size and xxh3_128')
  return files


def problems(root) -> list[str]:
  """What is wrong with a sealed directory, as `file: problem`; [] is nothing. Reads every byte."""
  root = Path(root)
  if root.is_symlink():
    return [f'{root.name}: a symbolic link, never a checkpoint']
  if not os.path.lexists(root / FILE):
    return [f'{FILE}: missing, so this was never finished']
  try:
    found, problems = _walk(root)
    if problems:
      return problems
    listed = _listed(root)
  except (OSError, ValueError) as e:
    return [f'{FILE}: {getattr(e, "strerror", None) or e}']
  for name in sorted({*listed, *found} - {FILE}):
    if name not in found:
      problems.append(f'{name}: missing')
    elif name not in listed:
      problems.append(f'{name}: extra, not in {FILE}')
    elif found[name] != listed[name]['size']:
      problems.append(f'{name}: {found[name]} bytes, expected {listed[name]["size"]}')
    else:
      try:
        seen = of_file(root / name)
      except OSError as e:
        problems.append(f'{name}: cannot be read ({e.strerror})')
        continue
      if seen != listed[name]['xxh3_128']:
        problems.append(f'{name}: digest {seen}, expected {listed[name]["xxh3_128"]}')
  return problems
