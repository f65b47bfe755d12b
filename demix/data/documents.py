"""Documents in files: one folder per domain, JSON Lines or plain text, read as a stream.

Memory is bounded whatever a file holds: compressed input is taken apart in small steps, and a
record above the limit is given up before it is whole.
"""

import dataclasses
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import xxhash

from demix.errors import BadInput
from demix.settings import nearest

SPLITS = ('train', 'valid', 'test')
LAYOUT = 'DIR/<domain>/{train,valid,test}.jsonl[.gz|.zst], or DIR/<domain>/*.txt'

_NAME = re.compile(r'[A-Za-z0-9_-]+')
_JSONL = re.compile(r'((train|valid|test)(?:[-_.].*)?)\.jsonl(\.gz|\.zst)?')
_CHUNK = 1 << 18
# One step of zstd turns 4 bytes into at most 128 KiB, so this many into at most 32 MiB.
_ZST_STEP = 1 << 10


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of one domain.

  Attributes:
    name: of the domain.
    splits: {split: files in reading order}; a plain text file is one document.
    digests: {key: xxh3-128 of the content}: one key per JSON Lines file (its path under the input
      folder), one for all plain text files of the domain.
    sizes: {split: bytes of its files}.
    stamps: {file: stamp(file)} from before it was read.
    unused: names of files that belong to no split.
  """
  name: str
  splits: dict
  digests: dict
  sizes: dict
  stamps: dict
  unused: tuple = ()


def find(folder: Path, domains: tuple = ()) -> list[Path]:
  """The folders of `domains` in `folder`, in that order; all of them, sorted, where none is named.

  Raises:
    BadInput: no such folder, no domain in it, an unknown domain, or a name that cannot be one.
  """
  if not folder.is_dir():
    what = 'a file, not a folder' if folder.exists() else 'no such folder'
    raise BadInput(f'--input={folder}: {what}; expected {LAYOUT}')
  found = {p.name: p for p in sorted(folder.iterdir())
           if p.is_dir() and p.name[0] != '.' and p.name != '__pycache__'}
  if not found:
    raise BadInput(f'--input={folder}: no domain folders in it; expected {LAYOUT}')
  for name in domains:
    if name not in found:
      raise BadInput(f'config.domains: no folder {name!r} in {folder}{nearest(name, found)}')
  if len(set(domains)) < len(domains):
    raise BadInput(f'config.domains: a domain is named twice: {", ".join(domains)}')
  for name in domains or found:
    if not _NAME.fullmatch(name) or name == 'tokenizer':
      why = 'the token store keeps its tokenizer there' if name == 'tokenizer' else \
          'names of domains are letters, digits, _ and -'
      raise BadInput(f'{found[name]}: {name!r} cannot be a domain ({why}): rename the folder')
  return [found[name] for name in domains or found]


def stamp(path: Path) -> tuple[int, int]:
  """(bytes, time of the last change in ns): another stamp is another file."""
  about = path.stat()
  return about.st_size, about.st_mtime_ns


def source(folder: Path, on_bytes: Callable[[int], None] = lambda n: None) -> Source:
  """Finds and digests the files of the domain in `folder`.

  Plain text is split 80/10/10 by the hash of its content, so a document's split depends on nothing
  else and the same text is never in two splits.

  Args:
    folder: <input>/<domain>.
    on_bytes: told how many bytes were read.

  Raises:
    BadInput: no train split, an empty file, or one split twice in two compressions.
  """
  files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != '.')
  stamps = {p: stamp(p) for p in files}
  matches = {p: m for p in files if (m := _JSONL.fullmatch(p.name))}
  splits, digests, sizes, stems = {}, {}, {}, {}
  for path, match in matches.items():
    stem, split = match[1], match[2]
    if stem in stems:
      raise BadInput(f'{path}: {stems[stem].name} is the same part of {split}: remove one of them')
    stems[stem] = path
    digests[f'{folder.name}/{path.name}'] = _digest(path, on_bytes).hexdigest()
    splits.setdefault(split, []).append(path)
    sizes[split] = sizes.get(split, 0) + _size(path)
  if not matches:
    splits, digests, sizes = _plain(folder, [p for p in files if p.suffix == '.txt'], on_bytes)
  if 'train' not in splits:
    names = ', '.join(p.name for p in files[:4]) or 'nothing'
    raise BadInput(f'{folder}: no train split (it holds {names}{" …" if files[4:] else ""}); '
                   f'expected {LAYOUT}')
  unused = tuple(p.name for p in files if (p not in matches if matches else p.suffix != '.txt'))
  stamps = {p: stamps[p] for used in splits.values() for p in used}
  return Source(folder.name, {s: tuple(splits[s]) for s in SPLITS if s in splits}, digests, sizes,
                stamps, unused)


def _plain(folder, files, on_bytes):
  splits, sizes, whole = {}, {}, xxhash.xxh3_128()
  for path in files:
    if path.stem in SPLITS:
      raise BadInput(f'{path}: a .txt file is one document, not a split: write {path.stem}.jsonl, '
                     'one {"text": …} a line')
    digest = _digest(path, on_bytes)
    bucket = digest.intdigest() % 10
    split = 'train' if bucket < 8 else 'valid' if bucket == 8 else 'test'
    splits.setdefault(split, []).append(path)
    sizes[split] = sizes.get(split, 0) + path.stat().st_size
    whole.update(orjson.dumps([path.name, digest.hexdigest()]))
  if files and 'train' not in splits:
    raise BadInput(f'{folder}: none of its {len(files)} .txt files is in train (80/10/10 by the '
                   'hash of the content): add files, or write train.jsonl')
  return splits, {f'{folder.name}/*.txt': whole.hexdigest()}, sizes


def _size(path):
  size = path.stat().st_size
  if not size:
    raise BadInput(f'{path}: an empty file: write one {{"text": …}} a line, or remove it')
  return size


def _digest(path, on_bytes):
  digest = xxhash.xxh3_128()
  try:
    with open(path, 'rb') as f:
      while chunk := f.read(1 << 20):
        digest.update(chunk)
        on_bytes(len(chunk))
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  return digest


class Reader:
  """Reads the documents of files, counting what it leaves out.

  Args:
    max_record_bytes: a line, or a plain text file, may have this many bytes.
    skip_bad: leave out records that cannot be read, instead of raising BadInput.
    on_bytes: told how many bytes of the files (as they lie on disk) were read.

  Attributes:
    bad, empty: records left out because they could not be read; because their text is ''.
    first_bad: why the first one could not be read.
  """

  def __init__(self, max_record_bytes: int, skip_bad: bool = False,
               on_bytes: Callable[[int], None] = lambda n: None):
    self.max_record_bytes, self.skip_bad, self.on_bytes = max_record_bytes, skip_bad, on_bytes
    self.bad, self.empty, self.first_bad = 0, 0, ''

  def texts(self, files) -> Iterator[tuple[str, bytes]]:
    """Yields (text, its UTF-8 bytes) of every document that is not empty, in order.

    Raises:
      BadInput: naming the file and line of a record that is not UTF-8, not JSON, has no string
        `text`, or is too long; of a file that is cut off or corrupt, or has no record.
    """
    for path in files:
      for where, line in (self._file(path) if path.suffix == '.txt' else self._records(path)):
        text = self._text(where, line)
        if text:
          yield text, text.encode()
        elif text is not None:
          self.empty += 1

  def _file(self, path):
    size = path.stat().st_size
    if size > self.max_record_bytes:
      yield path, None
      return
    data = path.read_bytes()
    self.on_bytes(len(data))
    yield path, data

  def _records(self, path):
    found = False
    for number, line in self._lines(path):
      if line is None or (line and not line.isspace()):
        found = True
        yield f'{path}:{number}', line
    if not found:
      raise BadInput(f'{path}: no record in it: write one {{"text": …}} a line, or remove it')

  def _lines(self, path):
    """Yields (number, line); (number, None) as soon as a line is known to be too long."""
    limit, pending, number, dropping = self.max_record_bytes, bytearray(), 1, False
    try:
      for chunk in self._chunks(path):
        *lines, tail = chunk.split(b'\n')
        for line in lines:
          if dropping:
            dropping = False
          elif len(pending) + len(line) > limit:
            yield number, None
          else:
            yield number, bytes(pending + line) if pending else line
          pending.clear()
          number += 1
        if not dropping and len(pending) + len(tail) > limit:
          yield number, None
          pending.clear()
          dropping = True
        elif not dropping:
          pending += tail
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
      raise self._corrupt(path, number, e) from None
    if pending:
      yield number, bytes(pending)

  def _corrupt(self, path, number, e):
    what = 'cut off' if isinstance(e, EOFError) else f'corrupt ({e})'
    return BadInput(f'{path}:{number}: the compressed file is {what} here: copy or compress it '
                    'again')

  def _chunks(self, path):
    """The file's content, decompressed, at most _CHUNK bytes at a time."""
    with open(path, 'rb') as f:
      if path.suffix == '.zst':
        yield from _zst(f, self.on_bytes)
        return
      counted = _Counted(f, self.on_bytes)
      # read1: what was read before a defect is still given, so the defect's line is right
      read = gzip.GzipFile(fileobj=counted).read1 if path.suffix == '.gz' else counted.read
      while chunk := read(_CHUNK):
        yield chunk

  def _text(self, where, line):
    """The text of a record, or None where it was bad and bad ones are skipped."""
    try:
      if line is None:
        raise ValueError(f'more than max_record_bytes={self.max_record_bytes} bytes: cut it, or '
                         'raise --config.max_record_bytes')
      if isinstance(where, Path):
        return _utf8(line).removeprefix('\ufeff')
      return _record(line)
    except ValueError as e:
      message = f'{where}: {e}'
      if not self.skip_bad:
        raise BadInput(f'{message} (--config.on_bad_record=skip leaves such records out)') from None
      self.bad += 1
      self.first_bad = self.first_bad or message
      return None


def _utf8(data):
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f'not UTF-8 (byte 0x{data[e.start]:02x} at byte {e.start + 1}): convert the '
                     'file to UTF-8') from None


def _record(line):
  try:
    record = orjson.loads(line.removeprefix(b'\xef\xbb\xbf'))
  except orjson.JSONDecodeError as e:
    _utf8(line)
    raise ValueError(f'not JSON ({e.msg} at character {e.pos + 1}): write one {{"text": …}} a '
                     'line') from None
  if not isinstance(record, dict):
    raise ValueError(f'a JSON {_json_type(record)}, not an object: write one {{"text": …}} a line')
  if 'text' not in record:
    keys = ', '.join(list(record)[:6]) or 'none'
    raise ValueError(f'no "text" in the record (keys: {keys}): name the text "text"')
  if not isinstance(record['text'], str):
    raise ValueError(f'"text" is a JSON {_json_type(record["text"])}, not a string')
  return record['text']


def _json_type(value):
  return {dict: 'object', list: 'list', str: 'string', bool: 'boolean', type(None): 'null'}.get(
      type(value), 'number')


class _Counted:
  """The reading half of a file, which says how many bytes were read."""

  def __init__(self, file, on_bytes):
    self._file, self._on_bytes = file, on_bytes

  def read(self, size=-1):
    data = self._file.read(size)
    self._on_bytes(len(data))
    return data


def _zst(file, on_bytes):
  """Decompressed chunks. By hand: the library's reader takes a file that is cut off for a whole
  one, and a step of bounded input has a bounded output."""
  import zstandard
  frame = None
  while data := file.read(_CHUNK):
    on_bytes(len(data))
    for at in range(0, len(data), _ZST_STEP):
      step = data[at:at + _ZST_STEP]
      while step:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
          out = frame.decompress(step)
        except zstandard.ZstdError as e:
          raise zlib.error(str(e)) from None
        for start in range(0, len(out), _CHUNK):
          yield out[start:start + _CHUNK]
        step, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
  if frame is not None:
    raise EOFError
