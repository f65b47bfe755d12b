"""What every source is made of: parts of a split, each a stream of records that become documents.

Memory is bounded whatever a part holds, and a part gives the same records in the same order every
time it is read: it is read to be digested, to train a tokenizer, and to be tokenized.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import xxhash

from demix.errors import BadInput


class Document(NamedTuple):
  """One document.

  Attributes:
    text: all of it.
    prompt: what of its beginning is read but not predicted (supervised text); '' for none.
    ids: of a source that holds tokens: (ids,), or (ids of the prompt, ids of the rest), without
      end-of-document; () where the tokenizer is yet to be asked.
  """
  text: str
  prompt: str = ''
  ids: tuple = ()


class Part(abc.ABC):
  """A stretch of one split: files, or a split of a library's data set.

  Attributes:
    key: its name among the inputs of a card, below the domain's: never a path of this machine.
    size: bytes that reading it will report; 0: unknown.
    stamps: {file: stamp(file)} of what it is read from; another stamp is another file.
  """
  key: str
  size: int = 0
  stamps: Mapping[Path, tuple] = {}

  @abc.abstractmethod
  def digest(self, on_bytes: Callable[[int], None]) -> str:
    """xxh3-128 of the content, all of it read."""

  @abc.abstractmethod
  def records(self, limit: int, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, object]]:
    """Yields (where it stands, record); None for a record known to be above `limit` bytes.

    Raises:
      BadInput: the part is damaged or has no record; whatever bad records are to be.
    """

  @abc.abstractmethod
  def document(self, record) -> Document:
    """What a record says. ValueError: why it cannot be used."""

  def keeps(self, data: bytes) -> bool:
    """Whether the document with this UTF-8 belongs to the split."""
    return True

  counts = True  # whether records it cannot read, and empty ones, are counted as left out


class HeldOut(Part):
  """The documents of a part whose hash is from `low` to `high` (0 to 1): a split of its own.

  A text is in one split wherever it stands and however often; bad records count in the first.
  """

  def __init__(self, part: Part, low: float, high: float):
    self.part, self.low, self.high = part, low, high
    self.key, self.size, self.stamps = part.key, part.size, part.stamps
    self.counts = high >= 1

  def digest(self, on_bytes):
    return self.part.digest(on_bytes)

  def records(self, limit, on_bytes):
    return self.part.records(limit, on_bytes)

  def document(self, record):
    return self.part.document(record)

  def __str__(self):
    return str(self.part)

  def keeps(self, data):
    return self.low <= xxhash.xxh3_64_intdigest(data) / 2**64 < self.high


@dataclasses.dataclass(frozen=True)
class Fields:
  """The names under which records keep text, or a prompt and its completion."""
  text: str = 'text'
  prompt: str = 'prompt'
  completion: str = 'completion'

  def wanted(self, names) -> list[str]:
    """Those of `names` that `document` reads."""
    if self.text in names:
      return [self.text]
    return [n for n in (self.prompt, self.completion) if n in names]

  def document(self, record: Mapping) -> Document:
    """The document of a record; text is a string or UTF-8. ValueError: it has none."""
    if self.text in record:
      return Document(_string(self.text, record[self.text]))
    if self.prompt in record and self.completion in record:
      prompt = _string(self.prompt, record[self.prompt])
      return Document(prompt + _string(self.completion, record[self.completion]), prompt)
    keys = ', '.join(list(record)[:6]) or 'none'
    raise ValueError(f'no "{self.text}" in the record (keys: {keys}): name the text "{self.text}"')


FIELDS = Fields()  # the usual names


def _string(name, value):
  if isinstance(value, str):
    return value
  if isinstance(value, bytes):
    return utf8(value)
  raise ValueError(f'"{name}" is a JSON {json_type(value)}, not a string')


def utf8(data: bytes) -> str:
  """Text of UTF-8. ValueError: it is not, and where."""
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f'not UTF-8 (byte 0x{data[e.start]:02x} at byte {e.start + 1}): convert the '
                     'file to UTF-8') from None


def json_type(value) -> str:
  """What JSON calls a value."""
  return {dict: 'object', list: 'list', str: 'string', bool: 'boolean', type(None): 'null'}.get(
      type(value), 'number')


class Meter:
  """Says how many of `size` bytes are read when `done` of `total` records are.

  Sums are exact: after the last record all bytes are reported.
  """

  def __init__(self, size: int, total: int, on_bytes: Callable[[int], None]):
    self._size, self._total, self._on_bytes, self._said = size, total, on_bytes, 0

  def __call__(self, done: int):
    read = self._size * done // max(1, self._total)
    self._on_bytes(read - self._said)
    self._said = read


def reason(error: Exception) -> str:
  """What a library's error says, in a line without a full stop."""
  return ' '.join(str(error).split())[:200].rstrip('.') or type(error).__name__


def missing(package: str, what: str, file: str) -> BadInput:
  """The error for a library that is optional and not there."""
  return BadInput(f'{what} needs {package}, which is not installed: pip install -r {file}')
