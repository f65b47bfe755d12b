"""Domains as data: entries of a config into the sources that `prepare` reads."""

import dataclasses
import os
import re
from collections.abc import Callable

import orjson
import xxhash

from demix import settings
from demix.data.sources import files, huggingface, seqio, tfds, token_files
from demix.data.sources.array_record import ArrayRecord
from demix.data.sources.jsonl import JsonLines
from demix.data.sources.parquet import Parquet
from demix.data.sources.part import Fields, HeldOut, Part
from demix.data.sources.text import PlainText
from demix.errors import BadInput
from demix.names import RULE, is_name, why_no_domain
from demix.settings import nearest, option

SPLITS = ('train', 'valid', 'test')
# What others call a split, tried in this order where an entry does not say.
_ALIASES = {'train': ('train',), 'valid': ('valid', 'validation', 'dev', 'val'), 'test': ('test',)}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One source of a domain; several entries of one name are read one after the other."""
  name: str = option('', 'the domain')
  source: str = option('jsonl', 'jsonl (.gz, .zst), text, parquet, array_record, tokens, '
                                'huggingface, tfds or seqio')
  path: str = option('', 'files: a path or glob, {split} stands for the split; else a folder, or '
                         'the name of a data set, task or mixture')
  splits: dict = option({}, "what the source calls train, valid and test ({'valid': "
                            "'train[99%:]'}); empty: the usual names, as far as they are there")
  heldout: float = option(0.0, 'share of train, by the hash of the text, for each of valid and '
                               'test that the source lacks', low=0, below=0.5)
  group: str = option('', 'the parent of the domain: its leaves add up to it')
  licence: str = option('', 'a note for the data card')
  text: str = option('text', 'field of the text; array_record: empty where a record is text; '
                             'seqio: targets')
  prompt: str = option('prompt', 'field of what is read but not predicted; seqio: inputs')
  completion: str = option('completion', 'field of what follows it')
  subset: str = option('', 'huggingface: the configuration of a data set',
                      needs=('source', 'huggingface'))
  module: str = option('', 'seqio: Python module that registers the task',
                      needs=('source', 'seqio'))
  lengths: dict = option({}, 'seqio: length of each feature, where preprocessors ask for it',
                         needs=('source', 'seqio'))
  dtype: str = option('uint16', 'tokens: uint16 or uint32', choices=tuple(token_files.DTYPES),
                     needs=('source', 'tokens'))
  eod_id: int = option(-1, "tokens: the id that ends documents in the file; -1: the tokenizer's",
                        low=-1, needs=('source', 'tokens'))

  def check(self, where: str):
    """BadInput for what cannot be."""
    if why := why_no_domain(self.name):
      raise BadInput(f'{where}.name: {self.name!r} cannot be a domain ({why})')
    if self.source not in _OPENERS:
      raise BadInput(f'{where}.source: {self.source!r} is no source'
                     f'{nearest(self.source, _OPENERS)}')
    if not self.path:
      raise BadInput(f'{where}.path is missing: a file or glob, a folder, or the name of a data '
                     'set')
    for split in self.splits:
      if split not in SPLITS:
        raise BadInput(f'{where}.splits: no split {split!r}{nearest(split, SPLITS)}')
    if self.group and not is_name(self.group):
      raise BadInput(f'{where}.group: {self.group!r} cannot be a group ({RULE})')
    settings.check(self, f'{where}.')


@dataclasses.dataclass(frozen=True)
class DomainSource:
  """What `prepare` reads of one domain; the attributes of documents.Source.

  Attributes:
    splits: {split: parts in reading order}.
    digests: {key: xxh3-128} of the inputs; stamps: {file: stamp} from before they were read.
    sizes: {split: bytes that reading it reports}; unused: nothing here.
    group, licence: as the entries say.
  """
  name: str
  splits: dict
  digests: dict
  sizes: dict
  stamps: dict
  group: str = ''
  licence: str = ''
  unused: tuple = ()


def entries(corpus, domains=()) -> dict[str, list[Entry]]:
  """{domain: its entries} of `config.corpus`, in the order of `domains` or of the entries.

  Raises:
    BadInput: an unknown key, source or domain, a group that is a domain's name, or two groups of
      one domain.
  """
  found = {}
  for i, values in enumerate(corpus):
    where = f'config.corpus[{i}]'
    if not isinstance(values, dict):
      raise BadInput(f'{where}: {values!r}: an entry is a dict like '
                     "{'name': 'legal', 'source': 'parquet', 'path': 'legal/*.parquet'}")
    entry = settings.from_dict(Entry, values, where)
    entry.check(where)
    found.setdefault(entry.name, []).append(entry)
  for name, several in found.items():
    for key in ('group', 'licence'):
      values = {getattr(e, key) for e in several} - {''}
      if key == 'group' and len(values) > 1:
        raise BadInput(f'config.corpus: domain {name!r} has two groups, '
                       f'{" and ".join(sorted(values))}: a leaf has one parent')
    if (group := _joined(several, 'group')) in found:
      raise BadInput(f'config.corpus: {group!r} is a group and a domain: rename one of them')
  for name in domains:
    if name not in found:
      raise BadInput(f'config.domains: no entry {name!r} in config.corpus{nearest(name, found)}')
  if len(set(domains)) < len(domains):
    raise BadInput(f'config.domains: a domain is named twice: {", ".join(domains)}')
  return {name: found[name] for name in domains or found}


def open_domain(name: str, several: list[Entry], root: str, tokenizer) -> dict[str, list[Part]]:
  """{split: parts} of one domain.

  Args:
    several: its entries.
    root: folder that relative paths start from; '' the working directory.
    tokenizer: of the store, where it is known before the text is read, or None.

  Raises:
    BadInput: no train split, a split that is not there, a file that is in two splits.
  """
  splits = {}
  for entry in several:
    what = f'config.corpus {name}'
    opened = _OPENERS[entry.source](entry, root, tokenizer, what)
    if not opened:
      raise BadInput(f'{what}: {entry.path} has none of the splits {", ".join(SPLITS)}')
    if entry.heldout and 'train' in opened:
      opened |= _held_out(opened, entry.heldout)
    for split in SPLITS:
      splits.setdefault(split, []).extend(opened.get(split, ()))
  splits = {split: parts for split, parts in splits.items() if parts}
  if 'train' not in splits:
    raise BadInput(f'config.corpus: domain {name!r} has no train split (it has '
                   f'{", ".join(splits)}): name one in splits')
  owners = {}
  for split, parts in splits.items():
    for part in parts:
      if isinstance(part, files.FilePart) and owners.setdefault(part.path, split) != split:
        raise BadInput(f'{part.path}: in {owners[part.path]} and in {split} of {name}: what is '
                       'trained on cannot be tested on; give each split its own files, or heldout')
  return splits


def read(name: str, several: list[Entry], splits: dict,
         on_bytes: Callable[[int], None]) -> DomainSource:
  """The domain with the digests of its inputs, read for them once."""
  digests, sizes, stamps, seen = {}, {}, {}, {}
  for split, parts in splits.items():
    sizes[split] = sum(p.size for p in parts)
    for part in parts:
      stamps |= part.stamps
      origin = part.part if isinstance(part, HeldOut) else part
      if id(origin) in seen:
        continue
      seen[id(origin)] = origin
      digests.setdefault(f'{name}/{part.key}', []).append(part.digest(on_bytes))
  # What shares a key (all plain text, files of one name in two places) has one digest.
  digests = {k: d[0] if len(d) == 1 else xxhash.xxh3_128_hexdigest(orjson.dumps(d))
             for k, d in digests.items()}
  return DomainSource(name, {s: tuple(p) for s, p in splits.items()}, digests, sizes, stamps,
                      _joined(several, 'group'), _joined(several, 'licence'))


def size(splits: dict) -> int:
  """Bytes that `read` will report."""
  parts = {id(p): p for many in splits.values()
           for p in (q.part if isinstance(q, HeldOut) else q for q in many)}
  return sum(p.size for p in parts.values())


def described(corpus) -> list:
  """Entries as a card has them; of a path only the end, so that a card names no machine."""
  return [{**values, 'path': os.path.basename(os.path.normpath(values['path']))}
          if isinstance(values, dict) and os.path.isabs(str(values.get('path', ''))) else values
          for values in corpus]


def _joined(several, key):
  return '; '.join(dict.fromkeys(v for e in several if (v := getattr(e, key))))


def _held_out(opened, share):
  lacking = [s for s in ('valid', 'test') if s not in opened]
  bounds = {split: (i * share, (i + 1) * share) for i, split in enumerate(lacking)}
  bounds['train'] = (len(lacking) * share, 1.0)
  return {s: [HeldOut(p, *b) for p in opened['train']] for s, b in bounds.items()}


def _fields(entry, text='text', prompt='prompt') -> Fields:
  return Fields(text if entry.text == 'text' else entry.text,
                prompt if entry.prompt == 'prompt' else entry.prompt, entry.completion)


def _chosen(entry, known, what):
  """{split: the source's name for it}: those that the entry names, or the usual ones in `known`."""
  if entry.splits:
    for called in entry.splits.values():
      base = re.split(r'[\[+]', called)[0]
      if base not in known:
        raise BadInput(f'{what}: {entry.path} has no split {base!r}{nearest(base, known)}')
    return {s: entry.splits[s] for s in SPLITS if s in entry.splits}
  return {s: called for s in SPLITS
          if (called := next((n for n in _ALIASES[s] if n in known), None))}


def _place(path, root):
  return os.path.join(root, os.path.expanduser(path))


def _files(make):
  """An opener of files: make(path, key, entry, tokenizer) is one part."""
  def opener(entry, root, tokenizer, what):
    pattern = _place(entry.path, root)
    one = lambda path, key: make(path, key, entry, tokenizer)
    if '{split}' not in pattern:
      if entry.splits:
        return {s: files.open_files(one, os.path.join(pattern, p) if os.path.isdir(pattern)
                                    else _place(p, root), what) for s, p in entry.splits.items()}
      return {'train': files.open_files(one, pattern, what)}
    named = lambda called: pattern.replace('{split}', called)
    if entry.splits:
      return {s: files.open_files(one, named(called), what) for s, called in entry.splits.items()}
    opened = {}
    for split in SPLITS:
      called = next((n for n in _ALIASES[split] if files.find(named(n))), None)
      if called:
        opened[split] = files.open_files(one, named(called), what)
    return opened
  return opener


def _tokens(path, key, entry, tokenizer):
  if tokenizer is None:
    raise BadInput(f'{path}: source tokens holds ids of a tokenizer that is there already: name it '
                   'with --config.tokenizer (bytes, json or sentencepiece)')
  eod_id = tokenizer.eod_id if entry.eod_id < 0 else entry.eod_id
  return token_files.TokenFile(path, key, tokenizer, entry.dtype, eod_id)


def _called(entry, split):
  """The name of a data set's split, as errors and cards have it."""
  absolute = os.path.isabs(entry.path)
  place = os.path.basename(os.path.normpath(entry.path)) if absolute else entry.path
  return f'{place}{"/" + entry.subset if entry.subset else ""}[{split}]'


def _huggingface(entry, root, tokenizer, what):
  local = _place(entry.path, root)
  found = huggingface.load(local if os.path.isdir(local) else entry.path, entry.subset)
  opened = {}
  for split, called in _chosen(entry, found, what).items():
    base, _, part = called.partition('[')
    dataset = found[base]
    if part:
      dataset = dataset.select(_rows(part, len(dataset), what))
    opened[split] = [huggingface.HuggingFace(_called(entry, called), dataset, _fields(entry))]
  return opened


def _rows(part, total, what):
  """Rows of '10%:]', ':500]': as TFDS writes slices."""
  match = re.fullmatch(r'(-?\d+%?)?:(-?\d+%?)?\]', part)
  if not match:
    raise BadInput(f"{what}: '[{part}' is no slice: [:90%], [90%:] or [100:200]")
  bounds = [m and (total * int(m[:-1]) // 100 if m[-1] == '%' else int(m)) for m in match.groups()]
  return range(*slice(*bounds).indices(total))


def _tfds(entry, root, tokenizer, what):
  local = _place(entry.path, root)
  builder = tfds.load(local if os.path.isdir(local) else entry.path, root)
  return {split: [tfds.Tfds(f'{builder.info.full_name}[{called}]', builder, called,
                             _fields(entry))]
          for split, called in _chosen(entry, list(builder.info.splits), what).items()}


def _seqio(entry, root, tokenizer, what):
  provider = seqio.load(entry.path, entry.module)
  return {split: [seqio.Seqio(_called(entry, called), provider, called,
                              _fields(entry, 'targets', 'inputs'), dict(entry.lengths), tokenizer)]
          for split, called in _chosen(entry, list(provider.splits), what).items()}


_OPENERS = {
    'jsonl': _files(lambda path, key, e, t: JsonLines(path, key, _fields(e))),
    'text': _files(lambda path, key, e, t: PlainText(path, f'*{path.suffix}')),
    'parquet': _files(lambda path, key, e, t: Parquet(path, key, _fields(e))),
    'array_record': _files(lambda path, key, e, t: ArrayRecord(path, key, _fields(e))),
    'tokens': _files(_tokens), 'huggingface': _huggingface, 'tfds': _tfds, 'seqio': _seqio}
