"""A token store whose domains are clusters that were found in another store's documents (c-BTM).

The documents of all training domains are pooled and each goes, with its split, to its cluster; the
labels that they had play no part. Novel domains stay what they are. Ids are copied, so models
trained on either store can be evaluated on the other.
"""

import contextlib
import heapq
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import xxhash

from demix import settings
from demix.data.clusters import clusterer as clusterers
from demix.data.clusters.clusterer import Clusterer
from demix.data.clusters.fit import DiscoverConfig, agreement, fit, names_of
from demix.data.corpus.building import Building, scratch_of, synced
from demix.data.corpus.card import compare
from demix.data.corpus.card import text as card_text
from demix.data.overlap import duplicates
from demix.data.tokens import store
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.names import KEPT
from demix.runtime.progress import Progress, quantity

_FLUSH = 1 << 20  # ids that a cluster's part holds before it writes them


def discover(source, out, config: DiscoverConfig, say=print) -> TokenStore:
  """Makes the clustered token store `out` of the token store `source`, unless it is there already.

  Args:
    source, out: folders.
    config: see DiscoverConfig.
    say: told, in whole lines, what was made.

  Raises:
    BadInput: too little text for so many clusters, text without words, a cluster that no document
      falls into, or a place that is not for a store. What was in `out` stays as it was.
    Locked: another process is making the same store.
  """
  config.check()
  source, out = TokenStore.open(source), Path(out).resolve()
  given = Clusterer.load(config.clusterer) if config.clusterer else None
  Building.check_place(out)
  Building.recover(out)
  if source.path.resolve() == out:
    raise BadInput(f'--out={out} is the store that is read: name another folder')
  for domain in source.domains:
    for split in source.splits(domain):
      if source.prompts(domain, split) is not None:
        raise BadInput(f'{source.path}/{domain}/{split} has prompts, which clusters do not keep: '
                       'discover clusters of plain text')
  clusters = given.names if given else names_of(config.clusters)
  for name in source.domains:
    if source.roles[name] != 'train' and (name in clusters or name.lower() in KEPT):
      raise BadInput(f'{source.path}: a novel domain is called {name!r}, as a part of the '
                     'clustered store: give it another name')
  described = {'discover': settings.to_dict(config) | {
      'clusterer': given.fingerprint if given else ''}}
  inputs = {f'{d}/{s}': source.card['domains'][d]['splits'][s]['tokens_digest']
            for d in source.domains for s in source.splits(d)}
  present = _present(out)
  if present and (present.card['config'], present.card['inputs']) == (described, inputs):
    say(f'{out}: nothing to do, it is the store of these documents and settings '
        f'(fingerprint {present.fingerprint})')
    return present
  with Building(out) as building:
    found = given or fit(sample(source, config.sample), config)
    card = _fill(building.path, source, found)
    card |= {'inputs': inputs, 'config': described, 'fingerprint': store.card_fingerprint(card)}
    opened = TokenStore(building.path, card, source.tokenizer_meta, source.token_bytes_V)
    compare(opened, card)
    building.publish(store.CARD, orjson.dumps(card, option=orjson.OPT_INDENT_2))
  say('\n'.join([card_text(card), '', *report(found, card)]))
  say(f'\n{out}: a token store of {len(found.names)} clusters, fingerprint {card["fingerprint"]}')
  return TokenStore.open(out)


def _present(out):
  try:
    return TokenStore.open(out)
  except BadInput:
    return None


def documents(source: TokenStore, domain: str, split: str) -> Iterator[np.ndarray]:
  """The ids of each document, its end-of-document id left out."""
  tokens, start = np.asarray(source.tokens(domain, split)), 0
  for end in np.asarray(source.documents(domain, split)[:, 0]):
    yield tokens[start:end - 1]
    start = end


def sample(source: TokenStore, count: int) -> list[str]:
  """The text of the `count` distinct documents of lowest hash in the train splits that models
  train on, in the order of the hash: whatever the order and the labels of the documents."""
  heap, seen, done = [], set(), 0
  names = [d for d in source.domains if source.roles[d] == 'train' and 'train' in source.splits(d)]
  total = sum(len(source.tokens(name, 'train')) for name in names)
  with Progress(total, 'tokens', 'sampling documents') as progress:
    for ids in (ids for name in names for ids in documents(source, name, 'train')):
      progress.update(done := done + len(ids) + 1)
      key = xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids))
      if key in seen or (len(heap) == count and key > -heap[0][0]):
        continue
      seen.add(key)
      entry = (-key, ids)  # a view of the file
      if len(heap) == count:
        seen.discard(-heapq.heappushpop(heap, entry)[0])
      else:
        heapq.heappush(heap, entry)
  made = source.tokenizer()
  return [made.decode(ids) for _, ids in sorted(heap, key=lambda entry: -entry[0])]


def _fill(folder, source, found) -> dict:
  """Writes tokens, tokenizer and clusterer into `folder`; returns what the card says of it."""
  train = [d for d in source.domains if source.roles[d] == 'train']
  novel = [d for d in source.domains if source.roles[d] != 'train']
  shutil.copytree(source.path / 'tokenizer', folder / 'tokenizer')
  scratch = scratch_of(folder)
  parts, made = {}, source.tokenizer()
  counts = {s: np.zeros((len(found.names), len(train)), np.int64) for s in store.SPLITS}
  shares = {}
  todo = [(d, s) for d in train + novel for s in source.splits(d)]
  total = sum(len(source.tokens(d, s)) for d, s in todo)
  with contextlib.ExitStack() as stack:
    progress, done = stack.enter_context(Progress(total, 'tokens', 'assigning')), 0

    def part(domain, split):
      if (domain, split) not in parts:
        parts[domain, split] = _Part(folder / domain / split, scratch / f'{len(parts)}', source)
      return parts[domain, split]

    for domain, split in todo:
      mass = np.zeros(len(found.names), np.int64)
      sizes = source.documents(domain, split)[:, 1]
      for ids, size in zip(documents(source, domain, split), sizes):
        k = found.assign(made.decode(ids))
        if domain in train:
          counts[split][k, train.index(domain)] += 1
        else:
          mass[k] += len(ids) + 1
        part(found.names[k] if domain in train else domain, split).add(ids, int(size))
        done += len(ids) + 1
        progress.update(done)
      if domain in novel:
        shares.setdefault(domain, {})[split] = dict(zip(found.names, mass.tolist()))
  entries = {}
  for domain in [*found.names, *novel]:
    splits = {s: parts[domain, s].close() for s in store.SPLITS if (domain, s) in parts}
    if domain in found.names and 'train' not in splits:
      raise BadInput(f'{source.path}: no train document falls into {domain} of {len(found.names)}: '
                     'discover fewer clusters, or give more text')
    entries[domain] = {'role': 'train' if domain in found.names else 'novel', 'splits': splits}
  shared = duplicates.shared({f'{d}/{s}': p.hashes for (d, s), p in parts.items()})
  shutil.rmtree(scratch)
  found.save(folder / clusterers.FOLDER)
  return {'version': store.VERSION, 'tokenizer': source.tokenizer_meta, 'domains': entries,
          'duplicates': shared, 'clusterer': {
              'fingerprint': found.fingerprint, 'kind': found.kind, 'tokens': shares,
              'labels': train, 'documents': {s: c.tolist() for s, c in counts.items() if c.sum()},
              'agreement': {s: agreement(c) for s, c in counts.items()
                            if c.sum() and len(train) > 1}}}


class _Part:
  """tokens.bin and documents.npy of one domain and split, appended to; no file stays open, so there
  may be thousands."""

  def __init__(self, folder, hashes, source):
    folder.mkdir(parents=True)
    self._folder, self.hashes = folder, hashes
    self._dtype, self._eod = store.token_dtype(source.vocab_size), source.eod_id
    self._ids, self._rows, self._keys, self._held = [], [], [], 0
    self._tokens = self._documents = self._bytes = 0
    self._digests = xxhash.xxh3_128(), xxhash.xxh3_128()
    with open(self._folder / 'documents.npy', 'wb') as f:
      _header(f, 0)
      self._start = f.tell()

  def add(self, ids, size: int):
    """A document of `size` bytes."""
    ids = np.append(ids, self._eod).astype(self._dtype)
    self._tokens += len(ids)
    self._documents += 1
    self._bytes += size
    self._ids.append(ids)
    self._rows.append((self._tokens, size))
    self._keys.append(xxhash.xxh3_128_digest(ids))
    self._held += len(ids)
    if self._held > _FLUSH:
      self._flush()

  def _flush(self):
    ids, rows = np.concatenate(self._ids), np.asarray(self._rows, '<i8')
    for name, array, digest in zip(('tokens.bin', 'documents.npy'), (ids, rows), self._digests):
      digest.update(array)
      with open(self._folder / name, 'ab') as f:
        f.write(array)
        synced(f)
    with open(self.hashes, 'ab') as f:
      f.write(b''.join(self._keys))
    self._ids, self._rows, self._keys, self._held = [], [], [], 0

  def close(self) -> dict:
    """Writes what is held; returns the card's entry."""
    if self._ids:
      self._flush()
    with open(self._folder / 'documents.npy', 'r+b') as f:
      _header(f, self._documents)  # numpy leaves room for the count to grow
      assert f.tell() == self._start
      synced(f)
    return {'documents': self._documents, 'bytes': self._bytes, 'tokens': self._tokens,
            'tokens_per_byte': self._tokens / max(1, self._bytes), 'skipped': 0,
            'tokens_digest': self._digests[0].hexdigest(),
            'documents_digest': self._digests[1].hexdigest()}


def _header(file, rows):
  np.lib.format.write_array_header_1_0(
      file, {'descr': '<i8', 'fortran_order': False, 'shape': (rows, 2)})


def report(found: Clusterer, card: dict) -> list[str]:
  """Lines for people: each cluster's size and terms, the labels in it, the agreement with them."""
  about, facts = found.about, card['clusterer']
  counts = np.asarray(facts['documents']['train'])
  lines = [f'clusterer {facts["fingerprint"]}: {found.kind}, {len(found.names)} clusters, '
           f'{len(found.terms):,} words, {found.centres.shape[1]} dimensions, found on '
           f'{about.get("documents", 0):,} documents']
  for k, name in enumerate(found.names):
    tokens = card['domains'][name]['splits']['train']['tokens']
    terms = ' '.join(about.get('terms', {}).get(name, ()))
    size = counts[k].sum()
    lines.append(f'  {name:<10} {size:>8,} documents {size / counts.sum():>6.1%} '
                 f'{quantity(tokens):>8} tokens  {terms}')
  if facts['agreement']:
    lines.append('the labels that were hidden, train documents of each in each cluster:')
    width = max(map(len, facts['labels']))
    for name, row in zip(facts['labels'], counts.T):
      lines.append(f'  {name:<{width}} ' + ' '.join(f'{n:>8,}' for n in row))
    lines += [f'  {split}: purity {a["purity"]:.3f}, adjusted Rand index {a["adjusted_rand"]:.3f}, '
              f'normalised mutual information {a["nmi"]:.3f}'
              for split, a in facts['agreement'].items()]
  return lines
