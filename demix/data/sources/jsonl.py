"""JSON Lines: one object a line, .gz and .zst too."""

import gzip
import zlib

import orjson

from demix.data.sources.files import FilePart
from demix.data.sources.part import FIELDS, Fields, json_type, utf8
from demix.errors import BadInput

_CHUNK = 1 << 18
# What zstd --long=31 asks for, its most; the library stops at 128 MiB. Only what is used of it is
# memory.
_WINDOW = 1 << 31
# One step of zstd turns 4 bytes into at most 128 KiB, so this many into at most 32 MiB.
_ZST_STEP = 1 << 10


class JsonLines(FilePart):
  """A file of JSON Lines; a record is a line."""

  def __init__(self, path, key='', fields: Fields = FIELDS):
    super().__init__(path, key)
    self.fields = fields

  def records(self, limit, on_bytes):
    found = False
    for number, line in self._lines(limit, on_bytes):
      if line is None or (line and not line.isspace()):
        found = True
        yield f'{self.path}:{number}', line
    if not found:
      raise BadInput(f'{self.path}: no record in it: write one {{"text": …}} a line, or remove it')

  def document(self, line):
    return self.fields.document(parse(line))

  def _lines(self, limit, on_bytes):
    """Yields (number, line); (number, None) as soon as a line is known to be too long."""
    pending, number, dropping = bytearray(), 1, False
    try:
      for chunk in self._chunks(on_bytes):
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
      what = 'cut off' if isinstance(e, EOFError) else f'corrupt ({e})'
      raise BadInput(f'{self.path}:{number}: the compressed file is {what} here: copy or compress '
                     'it again') from None
    if pending:
      yield number, bytes(pending)

  def _chunks(self, on_bytes):
    """The file's content, decompressed, at most _CHUNK bytes at a time."""
    with open(self.path, 'rb') as f:
      if self.path.suffix == '.zst':
        yield from _zst(f, on_bytes)
        return
      counted = _Counted(f, on_bytes)
      # read1: what was read before a defect is still given, so the defect's line is right
      gz = self.path.suffix == '.gz'
      read = gzip.GzipFile(fileobj=counted).read1 if gz else counted.read
      while chunk := read(_CHUNK):
        yield chunk


def parse(line: bytes) -> dict:
  """The object in a line. ValueError: there is none."""
  try:
    record = orjson.loads(line.removeprefix(b'\xef\xbb\xbf'))
  except orjson.JSONDecodeError as e:
    utf8(line)
    raise ValueError(f'not JSON ({e.msg} at character {e.pos + 1}): write one {{"text": …}} a '
                     'line') from None
  if not isinstance(record, dict):
    raise ValueError(f'a JSON {json_type(record)}, not an object: write one {{"text": …}} a line')
  return record


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
        frame = frame or zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
        try:
          out = frame.decompress(step)
        except zstandard.ZstdError as e:
          raise zlib.error(str(e)) from None
        for start in range(0, len(out), _CHUNK):
          yield out[start:start + _CHUNK]
        step, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
  if frame is not None:
    raise EOFError
