"""The token store: what `prepare` writes and every loader reads (docs/contracts.md, version 1)."""

import os
from pathlib import Path

import numpy as np
import orjson
import xxhash

from demix.data.tokens import tokenizer as tokenizers
from demix.errors import BadInput
from demix.names import is_name
from demix.settings import nearest

VERSION = 1
SPLITS = ('train', 'valid', 'test')
CARD = 'card.json'

_EOD_CHUNK = 1 << 22  # ids that verify() looks at at once


def token_dtype(vocab_size: int) -> np.dtype:
  """The type of ids in tokens.bin: little-endian uint16 where all ids fit, else uint32."""
  return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def fingerprint(tokenizer: str, splits: dict) -> str:
  """xxh3-128 over content, independent of paths, times and the order of domains.

  Args:
    tokenizer: the tokenizer's fingerprint: the same bytes under other ids are other data.
    splits: {'domain/split' or 'split': (tokens_digest, documents_digest, and prompts_digest where
      there are prompts)}.
  """
  parts = [[name, *digests] for name, digests in sorted(splits.items())]
  return xxhash.xxh3_128_hexdigest(orjson.dumps([tokenizer, parts]))


def again(path) -> str:
  """The remedy for a store that cannot be used."""
  return f'prepare it again (python -m demix prepare --input=DIR --out={path})'


class TokenStore:
  """A token store that was opened with `TokenStore.open` and checked against its card.

  Picklable: memory maps are made where they are used, once per process.

  Attributes:
    path: the folder.
    card: card.json as a dict.
    domains: names, in the order of the store.
    roles: {domain: 'train' | 'novel'}.
    groups: {group: its domains (leaves)}, in the order of the store.
    tokenizer_meta: tokenizer/meta.json as a dict.
    vocab_size, eod_id: of the tokenizer.
    token_bytes_V: int32 [V], bytes of text that an id stands for (end of document: 0).
    fingerprint: xxh3-128 of the content.
  """

  def __init__(self, path: Path, card: dict, meta: dict, token_bytes_V: np.ndarray):
    self.path, self.card, self.tokenizer_meta = path, card, meta
    self.token_bytes_V = token_bytes_V
    self.domains = tuple(card['domains'])
    self.roles = {name: d['role'] for name, d in card['domains'].items()}
    self.groups = groups_of(card)
    self.vocab_size, self.eod_id = meta['vocab_size'], meta['eod_id']
    self.fingerprint = card['fingerprint']
    self._dtype, self._maps = token_dtype(self.vocab_size), {}

  @classmethod
  def open(cls, path, domains=()) -> 'TokenStore':
    """Opens the store in the folder `path`; reads no tokens.

    Args:
      domains: those that will be read; files of others are not looked at. (), or with a name that
        is none of its domains: all.

    Raises:
      BadInput: there is no finished store, its version is another, a file is missing or has
        another size than the card says, or the tokenizer is not the one it was made with.
    """
    path = Path(path)
    card = read_card(path)
    meta, token_bytes_V = tokenizers.read_meta(path / 'tokenizer')
    if meta != card['tokenizer']:
      raise BadInput(f'{path / "tokenizer"}: fingerprint {meta["fingerprint"]}, but {CARD} names '
                     f'{card["tokenizer"].get("fingerprint")}: {again(path)}')
    store = cls(path, card, meta, token_bytes_V)
    known = domains and set(domains) <= set(store.domains)
    for domain in domains if known else store.domains:
      for split, entry in card['domains'][domain]['splits'].items():
        folder = path / domain / split
        _check_size(folder / 'tokens.bin', entry['tokens'] * store._dtype.itemsize, path)
        tables = {'documents.npy': (16, np.dtype('<i8'), (2,))}
        if 'prompts_digest' in entry:
          tables['prompts.npy'] = (4, np.dtype('<i4'), ())
        for name, (size, dtype, shape) in tables.items():
          rows, header = _table_header(folder / name, dtype, shape, path)
          if rows != entry['documents']:
            raise BadInput(f'{folder / name}: {rows} documents, but {CARD} says '
                           f'{entry["documents"]}: {again(path)}')
          _check_size(folder / name, header + size * rows, path)
    return store

  def __getstate__(self):
    return {**self.__dict__, '_maps': {}}

  def __repr__(self):
    return f'TokenStore({str(self.path)!r}, domains={self.domains})'

  def splits(self, domain: str) -> tuple:
    """The splits that `domain` has, in the order train, valid, test. BadInput: no such domain."""
    return tuple(s for s in SPLITS if s in self._domain(domain)['splits'])

  def tokens(self, domain: str, split: str) -> np.memmap:
    """Read-only ids [tokens], uint16 or uint32; documents one after another, each ended by
    `eod_id`. BadInput: no such domain or split."""
    key = (domain, split, 'tokens')
    if key not in self._maps:
      self._entry(domain, split)
      self._maps[key] = np.memmap(self.path / domain / split / 'tokens.bin', self._dtype, 'r')
    return self._maps[key]

  def documents(self, domain: str, split: str) -> np.ndarray:
    """Read-only int64 [documents, 2]: offset just past the document's end-of-document token;
    bytes of its UTF-8 text. BadInput: no such domain or split."""
    return self._table(domain, split, 'documents')

  def prompts(self, domain: str, split: str) -> np.ndarray | None:
    """Read-only int32 [documents]: tokens at the beginning of each document that are read and not
    predicted; None where no document has any. BadInput: no such domain or split."""
    if 'prompts_digest' not in self._entry(domain, split):
      return None
    return self._table(domain, split, 'prompts')

  def _table(self, domain, split, name):
    key = (domain, split, name)
    if key not in self._maps:
      self._entry(domain, split)
      self._maps[key] = np.load(self.path / domain / split / f'{name}.npy', mmap_mode='r',
                                allow_pickle=False)
    return self._maps[key]

  def leaves(self, names) -> tuple:
    """`names` with each group in the place of its leaves. BadInput: a leaf is there twice, by
    itself and in its group."""
    found = [leaf for name in names for leaf in self.groups.get(name, (name,))]
    for name in names:
      for leaf in self.groups.get(name, ()):
        if found.count(leaf) > 1:
          raise BadInput(f'domain {leaf!r} is named twice: group {name!r} has it')
    return tuple(found)

  def domain_fingerprint(self, domain: str) -> str:
    """xxh3-128 of one domain's content and the tokenizer; the domain's name does not enter."""
    self._domain(domain)
    return domain_fingerprint(self.card, domain)

  def tokenizer(self) -> 'tokenizers.Tokenizer':
    """The tokenizer that made the ids."""
    if 'tokenizer' not in self._maps:
      self._maps['tokenizer'] = tokenizers.Tokenizer.load(self.path / 'tokenizer')
    return self._maps['tokenizer']

  def verify(self, domains=(), splits=()):
    """Reads everything again and compares it with the card.

    Args:
      domains: those that are read; (): all. splits: the same; one that a domain lacks is none.

    Raises:
      BadInput: names the first file whose content is not what the card says.
    """
    for domain in domains or self.domains:
      for split in self.splits(domain):
        if splits and split not in splits:
          continue
        entry, folder = self._entry(domain, split), self.path / domain / split
        tokens, documents = self.tokens(domain, split), self.documents(domain, split)
        digest, ends, top = xxhash.xxh3_128(), [], 0
        for start in range(0, len(tokens), _EOD_CHUNK):
          part = np.asarray(tokens[start:start + _EOD_CHUNK])
          digest.update(part)
          ends.append(np.flatnonzero(part == self.eod_id) + start + 1)
          top = max(top, int(part.max()))
        _check_digest(folder / 'tokens.bin', digest.hexdigest(), entry['tokens_digest'], self.path)
        _check_digest(folder / 'documents.npy', digest_of(documents), entry['documents_digest'],
                      self.path)
        self._verify_prompts(domain, split, entry)
        if top >= self.vocab_size:
          raise BadInput(f'{folder / "tokens.bin"}: id {top}, but the tokenizer has '
                         f'{self.vocab_size}: {again(self.path)}')
        if not np.array_equal(np.concatenate(ends), documents[:, 0]):
          raise BadInput(f'{folder}: end-of-document ids in tokens.bin are not where documents.npy '
                         f'says: {again(self.path)}')
    if self.fingerprint != card_fingerprint(self.card):
      raise BadInput(f'{self.path / CARD}: fingerprint {self.fingerprint}, but its digests give '
                     f'{card_fingerprint(self.card)}: {again(self.path)}')

  def _verify_prompts(self, domain, split, entry):
    prompts = self.prompts(domain, split)
    if prompts is None:
      return
    file = self.path / domain / split / 'prompts.npy'
    _check_digest(file, digest_of(prompts), entry['prompts_digest'], self.path)
    sizes = np.diff(self.documents(domain, split)[:, 0], prepend=0)
    if prompts.min() < 0 or (prompts >= sizes).any():
      raise BadInput(f'{file}: a prompt is longer than its document: {again(self.path)}')

  def _domain(self, domain):
    try:
      return self.card['domains'][domain]
    except KeyError:
      raise BadInput(f'{self.path}: no domain {domain!r}{nearest(domain, self.domains)}') from None

  def _entry(self, domain, split):
    splits = self._domain(domain)['splits']
    if split not in splits:
      raise BadInput(f'{self.path}: domain {domain!r} has no split {split!r}'
                     f'{nearest(split, splits)}')
    return splits[split]


def digest_of(array: np.ndarray) -> str:
  """xxh3-128 of an array's bytes, in C order."""
  return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array))


def card_fingerprint(card: dict) -> str:
  """The fingerprint that a card's digests and tokenizer give."""
  digests = {}
  for name, domain in card['domains'].items():
    digests |= _digests(f'{name}/', domain['splits'])
  return fingerprint(card['tokenizer']['fingerprint'], digests)


def domain_fingerprint(card: dict, domain: str) -> str:
  """`TokenStore.domain_fingerprint` from a card alone."""
  return fingerprint(card['tokenizer']['fingerprint'],
                     _digests('', card['domains'][domain]['splits']))


def groups_of(card: dict) -> dict:
  """{group: (its domains)} of a card."""
  groups = {}
  for name, domain in card['domains'].items():
    if group := domain.get('group'):
      groups.setdefault(group, []).append(name)
  return {group: tuple(names) for group, names in groups.items()}


def read_card(path: Path) -> dict:
  """card.json of the store in folder `path`. BadInput: missing, broken, or another version."""
  file = path / CARD
  try:
    card = orjson.loads(file.read_bytes())
  except FileNotFoundError:
    what = 'not a finished token store (no card.json)' if path.is_dir() else 'no such token store'
    raise BadInput(f'{path}: {what}: {again(path)}') from None
  except NotADirectoryError:
    raise BadInput(f'{path}: a file, not the folder of a token store: {again(path)}') from None
  except orjson.JSONDecodeError as e:
    raise BadInput(f'{file}: not JSON ({e}): {again(path)}') from None
  version = card.get('version') if isinstance(card, dict) else None
  if version != VERSION:
    raise BadInput(f'{file}: version {version!r}, this demix reads {VERSION}: {again(path)}')
  for name, domain in card['domains'].items() if isinstance(card.get('domains'), dict) else ():
    splits = domain.get('splits') if isinstance(domain, dict) else None
    unknown = [s for s in splits if s not in SPLITS] if isinstance(splits, dict) else []
    if not is_name(name) or unknown:  # either is a folder
      raise BadInput(f'{file}: {unknown[0] if is_name(name) else name!r} cannot be a '
                     f'{"split" if is_name(name) else "domain"} of a store: {again(path)}')
  if not _complete(card):
    raise BadInput(f'{file}: incomplete, some of its entries are missing: {again(path)}')
  return card


def _complete(card):
  try:
    entries = [e for d in card['domains'].values() if d['role'] for e in d['splits'].values()]
    return 'fingerprint' in card and 'fingerprint' in card['tokenizer'] and all(
        e.keys() >= {'documents', 'bytes', 'tokens', 'tokens_digest', 'documents_digest'}
        for e in entries)
  except (KeyError, TypeError, AttributeError):
    return False


def _digests(prefix, splits):
  return {f'{prefix}{split}': tuple(entry[k] for k in (
      'tokens_digest', 'documents_digest', 'prompts_digest') if k in entry)
          for split, entry in splits.items()}


def _check_size(file, expected, path):
  try:
    size = os.stat(file).st_size
  except OSError:
    raise BadInput(f'{file}: missing, but {CARD} names it: {again(path)}') from None
  if size != expected:
    raise BadInput(f'{file}: {size} bytes, but {CARD} says {expected}: {again(path)}')


def _check_digest(file, digest, expected, path):
  if digest != expected:
    raise BadInput(f'{file}: digest {digest}, but {CARD} says {expected}: {again(path)}')


def _table_header(file, dtype, columns, path):
  """(rows, bytes of the header) of an array of `dtype` [documents, *columns]."""
  try:
    with open(file, 'rb') as f:
      if np.lib.format.read_magic(f) != (1, 0):
        raise ValueError('not npy version 1.0')
      shape, fortran, found = np.lib.format.read_array_header_1_0(f)
      if shape[1:] != columns or not shape or fortran or found != dtype:
        raise ValueError(f'{found} {shape}, not {dtype} '
                         f'[{", ".join(map(str, ("documents", *columns)))}]')
      return shape[0], f.tell()
  except OSError:
    raise BadInput(f'{file}: missing, but {CARD} names it: {again(path)}') from None
  except ValueError as e:
    raise BadInput(f'{file}: {e}: {again(path)}') from None
