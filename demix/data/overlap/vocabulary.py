"""What domains have in common, word by word, and how well a tokenizer fits each.

Vocabulary overlap as in the DEMix papers' domain figures (after Gururangan et al. 2020, figure 2):
the share of the k most frequent words of one domain that are among the k most frequent of another.
Words as in words.py, so the figure does not depend on the tokenizer; no list of stop
words is left out.
"""

import numpy as np

from demix.data.overlap import words
from demix.data.tokens.store import TokenStore

TOP = 10_000
_IDS = 1 << 22    # ids of a domain that its words are counted in …
_SPANS = 32       # … in so many pieces, evenly spaced


def spans(total: int, ids: int = _IDS, pieces: int = _SPANS) -> list[tuple[int, int]]:
  """[(first, past the last)] of evenly spaced pieces of `total` ids, `ids` in all; or of all."""
  if total <= ids:
    return [(0, total)]
  size, step = ids // pieces, (total - ids // pieces) // (pieces - 1)
  return [(i * step, i * step + size) for i in range(pieces)]


def counts(store: TokenStore, domain: str, split: str = 'train',
           ids: int = _IDS) -> tuple[np.ndarray, np.ndarray]:
  """(uint64 hashes of words, int64 how often each stands there), most frequent first, equally
  frequent ones by hash; of evenly spaced pieces where the split is longer than `ids`."""
  parts = spans(len(store.tokens(domain, split)), ids)
  text = words.texts(store, domain, split, spans=parts)
  found = [np.zeros(0, np.uint64), *(w for w, _ in words.hashes(text))]
  word, count = np.unique(np.concatenate(found), return_counts=True)
  order = np.lexsort((word, -count))
  return word[order], count[order]


def vocabulary(store: TokenStore, top: int = TOP) -> dict:
  """The card's `vocabulary` (docs/contracts.md): overlap of the train text of all domains.

  k is `top`, or the words that the poorest domain has. The matrix is symmetric, with 1 on its
  diagonal.
  """
  found = {d: counts(store, d)[0] for d in store.domains if 'train' in store.splits(d)}
  found = {d: w for d, w in found.items() if len(w)}
  k = min([top, *map(len, found.values())])
  tops = {d: w[:k] for d, w in found.items()}
  share = lambda a, b: np.intersect1d(a, b, assume_unique=True).size / k
  return {'top': k if found else 0, 'distinct': {d: len(w) for d, w in found.items()},
          'overlap': {a: {b: share(x, y) for b, y in tops.items()} for a, x in tops.items()}}


def tokens_per_byte(tokenizer, store: TokenStore, domain: str, split: str = 'valid',
                    limit: int = 1 << 20) -> float:
  """Ids of any tokenizer per byte of a domain's text, ends of documents left out.

  Args:
    tokenizer: what encodes; it need not be the store's. limit: bytes of text, about, from the
      start of the split.
  """
  held, total = [], 0
  for chunk in words.texts(store, domain, split):
    held.append(chunk.tobytes())
    total += len(chunk)
    if total >= limit:
      break
  texts = [t.decode('utf-8', 'ignore') for t in b''.join(held)[:limit].split(b'\xff')]
  size = sum(len(t.encode()) for t in texts)
  return sum(map(len, tokenizer.encode(texts))) / max(1, size)
