"""Documents in files: one folder per domain, JSON Lines or plain text, read as a stream.

Memory is bounded whatever a file holds: compressed input is taken apart in small steps, and a
record above the limit is given up before it is whole.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import xxhash

from demix.data.sources.files import digest, stamp
from demix.data.sources.jsonl import JsonLines
from demix.data.sources.part import Document, Part
from demix.data.sources.text import PlainText
from demix.errors import BadInput
from demix.names import shown, why_no_domain
from demix.settings import nearest

SPLITS = ('train', 'valid', 'test')
LAYOUT = 'DIR/<domain>/{train,valid,test}.jsonl[.gz|.zst], or DIR/<domain>/*.txt'

_JSONL = re.compile(r'((train|valid|test)(?:[-_.].*)?)\.jsonl(\.gz|\.zst)?')


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
  group: str = ''
  licence: str = ''


def find(folder: Path, domains: tuple = ()) -> list[Path]:
  """The folders of `domains` in `folder`, in that order; all of them, sorted, where none is named.

  Raises:
    BadInput: no such folder, no domain in it, an unknown domain, or a name that cannot be one.
  """
  if not folder.is_dir():
    what = 'a file, not a folder' if folder.exists() else 'no such folder'
    raise BadInput(f'--input={folder}: {what}; expected {LAYOUT}')
  found = {p.name: p for p in _entries(folder)
           if p.is_dir() and p.name[0] != '.' and p.name != '__pycache__'}
  if not found:
    raise BadInput(f'--input={folder}: no domain folders in it; expected {LAYOUT}')
  for name in domains:
    if name not in found:
      raise BadInput(f'config.domains: no folder {name!r} in {folder}{nearest(name, found)}')
  if len(set(domains)) < len(domains):
    raise BadInput(f'config.domains: a domain is named twice: {", ".join(domains)}')
  for name in domains or found:
    if why := why_no_domain(name):
      raise BadInput(f'{found[name]}: {name!r} cannot be a domain ({why}): rename the folder')
  return [found[name] for name in domains or found]


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
  files, matches, texts = _listed(folder)
  stamps = {p: stamp(p) for p in files}
  splits, digests, sizes, stems = {}, {}, {}, {}
  for path, match in matches.items():
    stem, split = match[1], match[2]
    if stem in stems:
      raise BadInput(f'{path}: {stems[stem].name} is the same part of {split}: remove one of them')
    stems[stem] = path
    digests[f'{folder.name}/{shown(path.name)}'] = digest(path, on_bytes).hexdigest()
    splits.setdefault(split, []).append(path)
    sizes[split] = sizes.get(split, 0) + _size(path)
  if not matches:
    splits, digests, sizes = _plain(folder, texts, on_bytes)
  if 'train' not in splits:
    names = ', '.join(p.name for p in files[:4]) or 'nothing'
    raise BadInput(f'{folder}: no train split (it holds {names}{" …" if files[4:] else ""}); '
                   f'expected {LAYOUT}')
  unused = tuple(shown(p.name) for p in files
                 if (p not in matches if matches else p.suffix != '.txt'))
  stamps = {p: stamps[p] for used in splits.values() for p in used}
  return Source(folder.name, {s: tuple(splits[s]) for s in SPLITS if s in splits}, digests, sizes,
                stamps, unused)


def _entries(folder):
  try:
    return sorted(folder.iterdir())
  except OSError as e:
    raise BadInput(f'{folder}: cannot be read ({e.strerror})') from None


def size(folder: Path) -> int:
  """Bytes that `source` will report."""
  _, matches, texts = _listed(folder)
  return sum(p.stat().st_size for p in matches or texts)


def _listed(folder):
  """(files of a domain's folder, {those of JSON Lines: match}, those of plain text)."""
  files = [p for p in _entries(folder) if p.is_file() and p.name[0] != '.']
  matches = {p: m for p in files if (m := _JSONL.fullmatch(p.name))}
  return files, matches, [p for p in files if p.suffix == '.txt']


def _plain(folder, files, on_bytes):
  splits, sizes, whole = {}, {}, xxhash.xxh3_128()
  for path in files:
    if path.stem in SPLITS:
      raise BadInput(f'{path}: a .txt file is one document, not a split: write {path.stem}.jsonl, '
                     'one {"text": …} a line')
    content = digest(path, on_bytes)
    bucket = content.intdigest() % 10
    split = 'train' if bucket < 8 else 'valid' if bucket == 8 else 'test'
    splits.setdefault(split, []).append(path)
    sizes[split] = sizes.get(split, 0) + path.stat().st_size
    whole.update(orjson.dumps([shown(path.name), content.hexdigest()]))
  if files and 'train' not in splits:
    raise BadInput(f'{folder}: none of its {len(files)} .txt files is in train (80/10/10 by the '
                   'hash of the content): add files, or write train.jsonl')
  return splits, {f'{folder.name}/*.txt': whole.hexdigest()}, sizes


def _size(path):
  size = path.stat().st_size
  if not size:
    raise BadInput(f'{path}: an empty file: write one {{"text": …}} a line, or remove it')
  return size


class Reader:
  """Reads the documents of files and other parts, counting what it leaves out.

  Args:
    max_record_bytes: a line, a plain text file, the text of any record may have this many bytes.
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

  def texts(self, parts) -> Iterator[tuple[str, bytes]]:
    """Yields (text, its UTF-8 bytes) of every document that is not empty, in order.

    Raises:
      BadInput: naming the file and record of one that is not UTF-8, not JSON, has no string
        `text`, or is too long; of a part that is cut off or damaged, or has no record.
    """
    for document, data in self.documents(parts):
      yield document.text, data

  def documents(self, parts) -> Iterator[tuple[Document, bytes]]:
    """As `texts`, with the whole document (sources/part.py).

    Args:
      parts: Parts; a path is a file of plain text where it ends in .txt, else of JSON Lines.
    """
    for part in parts:
      if isinstance(part, Path):
        part = PlainText(part) if part.suffix == '.txt' else JsonLines(part)
      for where, record in part.records(self.max_record_bytes, self.on_bytes):
        document, data = self._document(part, where, record)
        if document is None or not part.keeps(data):
          continue
        if document.text:
          yield document, data
        elif part.counts:
          self.empty += 1

  def _document(self, part: Part, where, record):
    """(document, UTF-8 of its text) of a record, or (None, b'') where it was bad and bad ones are
    skipped."""
    try:
      if record is not None:
        document = part.document(record)
        data = _encoded(document.text)
        if len(data) <= self.max_record_bytes:
          return document, data
      raise ValueError(f'more than max_record_bytes={self.max_record_bytes} bytes: cut it, or '
                       'raise --config.max_record_bytes')
    except ValueError as e:
      message = f'{where}: {e}'
      if not self.skip_bad:
        raise BadInput(f'{message} (--config.on_bad_record=skip leaves such records out)') from None
      if part.counts:
        self.bad += 1
        self.first_bad = self.first_bad or message
      return None, b''


def _encoded(text):
  try:
    return text.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f'no valid Unicode (U+{ord(text[e.start]):04X} at character {e.start + 1})') \
        from None
