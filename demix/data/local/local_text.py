"""The embedded corpus: text in clearly different domains that a Python installation already has.

It is read from the standard library and, through their installation records, from the packages that
demix itself requires (`local_domains.py`), so whatever else is installed changes nothing.

* A *source* is one file, one folder of a data set, one package's description or one entry of the
  Python reference; of a long file, a stretch cut at a top-level border, so that no file can be most
  of a split. A source is cut into *documents* of at most 4 kB.
* The split (80/10/10) is the hash of the source's content. All documents of a source are in one
  split, in every domain that takes something from it (its code, its doc strings, its sessions), and
  neither a path nor the order of a directory decides anything.
* Sources are taken in the order of another hash of their content until the domain has `max_bytes`:
  what is kept of a large domain is a sample, not its first files.
* Exact and near copies are dropped (`near_duplicates.py`) within and across splits and domains; the
  first, in that order, stays. So the other domains that are written can change a domain a little.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from demix.data.local import local_domains as sources
from demix.data.local.local_domains import DOMAINS, Domain
from demix.data.overlap.near_duplicates import NearDuplicates
from demix.errors import BadInput
from demix.runtime.progress import Progress

VERSION = 2  # of the extraction: a change of any rule makes another corpus
SPLITS = ('train', 'valid', 'test')
MAX_BYTES = 3_000_000
LEAST_DOMAINS = 4      # training domains, below which nothing can be said about experts
LEAST_BYTES = 60_000   # of test and of valid text, below which a domain lacks
_MARKER = 'local_text.json'
_SHORTEST = 160        # characters; less is a name and a line, and near copies of it are everywhere
_LONGEST_WORD = 300    # characters; more is data, though of letters
# Control characters, lone surrogates, replaced bytes, and what some readers take for a line end.
_UNCLEAN = re.compile('[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029\ud800-\udfff\ufffd]')
_LETTERS = b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'


def roles() -> dict[str, str]:
  """{domain: 'train' or 'novel'}, in the order of the corpus."""
  return {name: domain.role for name, domain in DOMAINS.items()}


def write(folder: str | os.PathLike, domains: Iterable[str] | None = None, *,
          max_bytes: int = MAX_BYTES) -> dict[str, dict]:
  """Writes the corpus: FOLDER/<domain>/{train,valid,test}.jsonl, one {"text": …} a line.

  It is built beside `folder` and renamed when it is complete; FOLDER/local_text.json is the
  finished marker. A finished folder that the same call made from the same versions is left as it
  is; one made from others is replaced.

  Args:
    folder: where to; new, empty, or an earlier corpus of this function.
    domains: which of `DOMAINS`; all by default. Their order is always that of `DOMAINS`.
    max_bytes: most bytes of text of a domain, all splits together.

  Returns:
    {domain: {"role", "documents": {split: n}, "bytes": {split: UTF-8 bytes of text}, "duplicates":
    {"exact": documents dropped, "near": documents dropped}}}. A domain of which this machine has
    too little is not in it; a line on standard error names it.

  Raises:
    BadInput: no such domain; `folder` holds something else; or fewer training domains can be made
      than 4 (or than were asked for, where that is less).
  """
  folder = Path(folder)
  names = _chosen(domains)
  if max_bytes <= 0:
    raise BadInput(f'max_bytes is {max_bytes}, which leaves no text: give at least {LEAST_BYTES}')
  made_of = {'version': VERSION, 'max_bytes': max_bytes, 'asked': names,
             'versions': sources.versions()}
  found = _finished(folder)
  if found is not None and all(found.get(key) == value for key, value in made_of.items()):
    return found['domains']
  try:
    documents, report = _build(names, max_bytes)
  finally:
    sources.forget()
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
  try:
    partial.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would lock colleagues out of a shared folder
    for name, splits in documents.items():
      (partial / name).mkdir()
      for split, texts in splits.items():
        lines = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
        (partial / name / f'{split}.jsonl').write_bytes(lines.encode())
    marker = json.dumps({**made_of, 'domains': report}, indent=2) + '\n'
    (partial / _MARKER).write_text(marker, 'utf-8')
    _replace(folder, partial)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return report


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _chosen(domains: Iterable[str] | None) -> list[str]:
  asked = list(DOMAINS) if domains is None else list(domains)
  for name in asked:
    if name not in DOMAINS:
      raise BadInput(f'no domain {name!r} in the embedded corpus: there are {", ".join(DOMAINS)}')
  if not asked:
    raise BadInput(f'0 domains of the embedded corpus asked for: name some of {", ".join(DOMAINS)}')
  return [name for name in DOMAINS if name in asked]


def _finished(folder: Path) -> dict | None:
  """The marker of an earlier corpus in `folder`, or None where there is nothing.

  Raises:
    BadInput: there is something that is no corpus of this module, which is not ours to delete.
  """
  with contextlib.suppress(OSError, ValueError):
    found = json.loads((folder / _MARKER).read_text('utf-8'))
    if isinstance(found, dict) and isinstance(found.get('domains'), dict):
      paths = [folder / name / f'{split}.jsonl' for name in found['domains'] for split in SPLITS]
      return found if all(path.is_file() for path in paths) else {}
  if (folder.is_dir() and not any(folder.iterdir())) or not os.path.lexists(folder):
    return None
  raise BadInput(f'{folder} exists and holds no finished {_MARKER}: name a new or empty folder')


def _replace(folder: Path, partial: Path):
  """Puts `partial` in the place of `folder`; what stood there is deleted only after that."""
  if folder.exists():
    old = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    folder.rename(old / 'old')
    partial.rename(folder)
    shutil.rmtree(old)
  else:
    partial.rename(folder)


def _build(names: list[str], max_bytes: int) -> tuple[dict, dict]:
  """Collects, cuts and filters; returns ({domain: {split: texts}}, {domain: report})."""
  training = [name for name in names if DOMAINS[name].role == 'train']
  # At a small cap, what is asked for is small: a fifth of the share that a split is meant to have.
  least = min(LEAST_BYTES, max_bytes // 50)
  lacking, again = {}, True
  while again:
    names = [name for name in names if name not in lacking]
    documents, report = {}, {}
    copies, seen = NearDuplicates(), set()
    again = False
    with Progress(len(names), 'domains', 'local text') as progress:
      for i, name in enumerate(names):
        progress.update(i, name)
        documents[name], report[name] = _domain(DOMAINS[name], max_bytes, seen, copies)
        size = min(report[name]['bytes'][split] for split in SPLITS[1:])
        if size < least:
          lacking[name] = size
          # What it has may be a copy of what a later domain has: as if it had never been there.
          again = again or any(report[name]['documents'].values())
          del documents[name], report[name]
      progress.update(len(names))
  for name, size in lacking.items():
    print(f'warning: local text: domain {name} is left out: {size} bytes of test or validation '
          f'text here, {least} needed ({DOMAINS[name].what})', file=sys.stderr)
  left = sum(name in report for name in training)
  if left < min(LEAST_DOMAINS, len(training)):
    raise BadInput(f'local text has {left} training domains here and needs '
                   f'{min(LEAST_DOMAINS, len(training))} (too little text for '
                   f'{", ".join(lacking)}): install requirements.txt with pip, or bring a corpus')
  return documents, report


def _domain(domain: Domain, max_bytes: int, seen: set, copies: NearDuplicates) -> tuple[dict, dict]:
  """One domain; adds what it keeps to `seen` (digests) and `copies` (sketches)."""
  texts = {split: [] for split in SPLITS}
  size = dict.fromkeys(SPLITS, 0)
  dropped = {'exact': 0, 'near': 0}
  local = _local_paths()
  ordered = {}
  for text, documents in domain.collect():
    ordered.setdefault(xxhash.xxh3_128_digest(_bytes(text), 1), (text, documents))
  for _, (text, documents) in sorted(ordered.items(), key=lambda item: item[0]):
    split = _split(text)
    for document in documents(text):
      document = document.strip('\n')
      if not _readable(document) or any(path in document for path in local):
        continue
      n = len(_bytes(document))
      if sum(size.values()) + n > max_bytes:
        return texts, _report(domain, texts, size, dropped)
      digest = xxhash.xxh3_128_digest(_bytes(document.strip()))
      if digest in seen:
        dropped['exact'] += 1
      elif not copies.add(document):
        dropped['near'] += 1
      else:
        seen.add(digest)
        texts[split].append(document)
        size[split] += n
  return texts, _report(domain, texts, size, dropped)


def _bytes(text: str) -> bytes:
  return text.encode('utf-8', 'surrogatepass')  # a literal may hold one; `_readable` drops it


def _report(domain: Domain, texts: Mapping, size: dict, dropped: dict) -> dict:
  return {'role': domain.role, 'documents': {split: len(texts[split]) for split in SPLITS},
          'bytes': size, 'duplicates': dropped}


def _split(text: str) -> str:
  """The split of a source; another seed than that of the order, so that a cap cuts all alike."""
  return SPLITS[max(0, xxhash.xxh3_64_intdigest(_bytes(text), 0) % 10 - 7)]


def _readable(text: str) -> bool:
  """Whether it is text that someone wrote to be read: not short, no table, no data, not binary."""
  if len(text) < _SHORTEST or _UNCLEAN.search(text):
    return False
  words = text.split()
  full = ''.join(words).encode()
  others = len(full.translate(None, _LETTERS))
  foreign = sum(byte >= 128 for byte in full) if not full.isascii() else 0
  return others - foreign <= 0.6 * len(full) and max(map(len, words)) <= _LONGEST_WORD


def _local_paths() -> list[str]:
  """Paths that would tell on which machine the corpus was made; not `/usr`, which is text."""
  paths = {sys.prefix, sys.base_prefix, sys.exec_prefix} - {'/usr/local'}
  return sorted(path for path in paths if len(Path(path).parts) > 2)
