"""Leakage: how much of every evaluation set stands in every train set.

Exact duplicates of whole documents are counted by `duplicates`; here it is passages, runs of 13
words (GPT-3, appendix C; words as in words.py). The evaluation sets' runs are held as
sorted 64-bit hashes, the train sets pass by once. What does not fit is sampled by hash, the same
runs everywhere, so shares stay unbiased and memory bounded. Documents of fewer than 13 words have
no run: only `duplicates` sees those.
"""

import numpy as np

from demix.data.overlap import words
from demix.data.tokens.store import TokenStore
from demix.runtime.progress import Progress

RUN = 13
FLAG = 0.005      # share of an evaluation set's runs from which on it is marked in tables
_HELD = 1 << 22   # runs of all evaluation sets together
_MARKS = 25       # bits of the table that most runs are refused by


def runs(chunks, length: int = RUN):
  """Yields (uint64 [n] hashes, int64 [n] documents) of all runs of `length` words that lie inside
  a document; `chunks` is what words.hashes gives."""
  tail, of = np.zeros(0, np.uint64), np.zeros(0, np.int64)
  for found, document in chunks:
    tail, of = np.concatenate([tail, found]), np.concatenate([of, document])
    count = len(tail) - length + 1
    if count > 0:
      at = np.arange(count)
      inside = np.flatnonzero(of[:count] == of[length - 1:])
      yield words.polynomial(tail, at, at + length)[inside], of[:count][inside]
    done = max(0, count)
    tail, of = tail[done:], of[done:]


class Held:
  """The runs of all evaluation sets, by hash; see the module.

  Args:
    most: runs to hold, all sets together, every occurrence counted.
  """

  def __init__(self, most: int = _HELD):
    self._most, self._bound, self._parts, self._held = most, (1 << 64) - 1, {}, 0
    self.totals = {}

  def add(self, name: str, chunks):
    """Takes the runs of one evaluation set."""
    self._parts[name], self.totals[name] = [], 0
    for found, document in chunks:
      self.totals[name] += len(found)
      self._keep(name, found, document)
      while self._held > self._most:
        self._bound >>= 1
        parts, self._parts, self._held = self._parts, {n: [] for n in self._parts}, 0
        for n, pairs in parts.items():
          for pair in pairs:
            self._keep(n, *pair)

  def _keep(self, name, found, document):
    kept = found <= np.uint64(self._bound)
    self._parts[name].append((found[kept], document[kept].astype(np.int32)))
    self._held += int(np.count_nonzero(kept))

  def close(self):
    """Sorts what was taken, before `overlap` is asked."""
    joined = {n: [np.concatenate(c) for c in zip(*pairs)] if pairs else
              [np.zeros(0, np.uint64), np.zeros(0, np.int32)] for n, pairs in self._parts.items()}
    self._parts = {}
    self._sorted = np.unique(np.concatenate([np.zeros(0, np.uint64),
                                             *(found for found, _ in joined.values())]))
    self.sampled = (self._bound + 1) / (1 << 64)
    self.sets = {}
    for name in list(joined):
      found, document = joined.pop(name)
      _, place, size = np.unique(document, return_inverse=True, return_counts=True)
      self.sets[name] = np.searchsorted(self._sorted, found).astype(np.int32), place, size
    bits = min(_MARKS, max(4, (16 * len(self._sorted)).bit_length()))
    self._shift = np.uint64(64 - bits - (self._bound + 1 < 1 << 64) * self._leading())
    self._table = np.zeros(1 << bits, bool)
    self._table[self._slot(self._sorted)] = True

  def _leading(self):
    """Leading bits that are 0 in every sampled hash."""
    return 64 - self._bound.bit_length()

  def _slot(self, found):
    return (found >> self._shift) & np.uint64(len(self._table) - 1)

  def overlap(self, chunks) -> dict:
    """{set: (share of its runs, share of its documents)} that stand in the text of `chunks`; a
    document counts when half of its runs do."""
    seen = np.zeros(len(self._sorted), bool)
    for found, _ in chunks:
      found = found[found <= np.uint64(self._bound)]
      found = found[self._table[self._slot(found)]]
      at = np.searchsorted(self._sorted, found)
      at[at == len(seen)] = 0
      if len(found):
        seen[at[self._sorted[at] == found]] = True
    out = {}
    for name, (at, place, size) in self.sets.items():
      hit = seen[at]
      documents = np.bincount(place[hit], minlength=len(size)) * 2 >= size
      out[name] = (float(hit.mean()), float(documents.mean())) if len(at) else (0.0, 0.0)
    return out


def leakage(store: TokenStore, most: int = _HELD) -> dict:
  """The card's `leakage` (docs/contracts.md): every train set against every evaluation set.

  Args:
    store: an open token store. most: runs of evaluation sets to hold.
  """
  train = [d for d in store.domains if 'train' in store.splits(d)]
  tested = [(d, s) for d in store.domains for s in store.splits(d) if s != 'train']
  total = sum(len(store.tokens(d, s)) for d, s in [*((d, 'train') for d in train), *tested])
  done, held, found = 0, Held(most), []
  with Progress(total, 'tokens', 'comparing evaluation with train text') as progress:
    def read(count):
      nonlocal done
      done += count
      progress.update(done)

    def of(domain, split):
      return runs(words.hashes(words.texts(store, domain, split, read)))
    for domain, split in tested:
      held.add(f'{domain}/{split}', of(domain, split))
    held.close()
    if not any(held.totals.values()):
      progress.resize(done)
    for domain in train if any(held.totals.values()) else ():
      for name, (share, documents) in held.overlap(of(domain, 'train')).items():
        if share:
          found.append({'train': f'{domain}/train', 'evaluation': name, 'runs': share,
                        'documents': documents})
  return {'words': RUN, 'sampled': held.sampled, 'overlap': found,
          'evaluation': {n: {'runs': held.totals[n], 'documents': len(size)}
                         for n, (_, _, size) in held.sets.items()}}


def flagged(card: dict, trained, evaluated, split: str) -> list[dict]:
  """The card's entries of FLAG or more between train sets of the domains `trained` and the `split`
  of the domains `evaluated`; empty for the card of a store that was made before there was one."""
  names = {f'{d}/train' for d in trained}, {f'{d}/{split}' for d in evaluated}
  return [e for e in card.get('leakage', {}).get('overlap', ())
          if e['train'] in names[0] and e['evaluation'] in names[1] and e['runs'] >= FLAG]
