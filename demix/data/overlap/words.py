"""The words of a token store, as hashes: what duplicated text and vocabularies are compared by.

Words, not ids: two stores, or two tokenizers, agree on them, and thirteen bytes or thirteen pieces
are no passage. A word is a run of letters, digits and `_`, ASCII letters lowered; blanks and
punctuation only separate, so a copy with another layout is still a copy (as in GPT-3, appendix C).
Characters of scripts without blanks (CJK, kana, Hangul, what is above U+FFFF) are a word each.
"""

import functools
from collections.abc import Iterator

import numpy as np

from demix.data.tokens.store import TokenStore

_IDS = 1 << 18        # ids that are spelt at once
_LONGEST = 1 << 20    # bytes of a word; what is longer is cut
_BASE = np.uint64(0x9E3779B97F4A7C15)   # odd, so it has an inverse modulo 2**64
_MIX = np.uint64(0xD6E8FEB86659FD93)
_END = 0xFF           # never in UTF-8: a document ends

_GAP, _PART, _ALONE, _TAIL = 0, 1, 2, 3  # kinds of bytes: between words, of a word, a word's first
_KIND = np.zeros(256, np.uint8)          # byte that is a word alone, one of the same character
_KIND[[*range(48, 58), *range(65, 91), 95, *range(97, 123)]] = _PART
_KIND[0x80:0xC0] = _TAIL
_KIND[0xC0:0xE3] = _PART
_KIND[0xEE:0xF0] = _PART
_KIND[[*range(0xE3, 0xEE), *range(0xF0, 0xF8)]] = _ALONE
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[65:91] += 32


def texts(store: TokenStore, domain: str, split: str, progress=None,
          spans=None) -> Iterator[np.ndarray]:
  """The text of a split as uint8 arrays, an 0xFF after each document.

  Args:
    progress: called with the number of ids that were read since the last call.
    spans: [(first id, id past the last)], for a part; None: all.
  """
  made, tokens = store.tokenizer(), store.tokens(domain, split)
  spelling = _spelling(made)
  for first, last in spans or [(0, len(tokens))]:
    for at in range(first, last, _IDS):
      ids = np.asarray(tokens[at:min(at + _IDS, last)])
      if spelling is None:
        yield _decoded(made, ids, store.eod_id)
      else:
        flat, sizes_V, starts_V = spelling
        sizes = sizes_V[ids]
        shift = starts_V[ids] - (np.cumsum(sizes) - sizes)
        yield flat[np.repeat(shift, sizes) + np.arange(sizes.sum())]
      if progress:
        progress(len(ids))


@functools.lru_cache(1)  # of the store that is being read: the same for all its splits
def _spelling(made):
  """(uint8 [bytes] of all ids, int64 [V] how many each has, int64 [V] where they start) or None."""
  spelling = made.spelling_V()
  if spelling is None:
    return None
  spelling[made.eod_id] = bytes([_END])
  sizes_V = np.array([len(s) for s in spelling], np.int64)
  return np.frombuffer(b''.join(spelling), np.uint8), sizes_V, np.cumsum(sizes_V) - sizes_V


def _decoded(made, ids, eod_id):
  parts = np.split(ids, np.flatnonzero(ids == eod_id) + 1)
  data = b''.join(made.decode(p).encode('utf-8', 'replace')
                  + bytes([_END]) * bool(len(p) and p[-1] == eod_id) for p in parts)
  return np.frombuffer(data, np.uint8)


def hashes(chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (uint64 [n] hashes of words in order, int64 [n] the document each is in).

  Args:
    chunks: uint8 arrays as `texts` gives them, cut anywhere.
  """
  carry, documents = np.zeros(0, np.uint8), 0
  for chunk in chunks:
    data = np.concatenate([carry, chunk])
    last = _last_gap(data)
    if last < 0 and len(data) < _LONGEST:
      carry = data
      continue
    last = last + 1 if last >= 0 else len(data)
    carry = data[last:]
    found, in_document, ended = _words(data[:last])
    yield found, in_document + documents
    documents += ended
  if len(carry):
    found, in_document, _ = _words(carry)
    yield found, in_document + documents


def _last_gap(data):
  """Where the last byte that ends a word is, -1: nowhere."""
  for at in range(len(data), 0, -4096):
    gaps = np.flatnonzero(_KIND[data[max(0, at - 4096):at]] == _GAP)
    if len(gaps):
      return max(0, at - 4096) + int(gaps[-1])
  return -1


def _words(data):
  """(hashes, documents ended before each word, documents ended in all) of whole words."""
  if not len(data):
    return np.zeros(0, np.uint64), np.zeros(0, np.int64), 0
  kind = _KIND[data]
  _open_punctuation(data, kind)
  # A byte that continues a character is of its word.
  before = np.concatenate([[_GAP], kind[:-1]])
  tail = kind == _TAIL
  inside = (kind != _GAP)
  starts = inside & ~tail & ((before == _GAP) | (kind == _ALONE) | _after_alone(kind))
  starts |= tail & (before == _GAP)
  first = np.flatnonzero(starts)
  if not len(first):
    return np.zeros(0, np.uint64), np.zeros(0, np.int64), int(np.count_nonzero(data == _END))
  # The end of a word: the next start, or the next gap if that is earlier.
  gaps = np.flatnonzero(~inside)
  gap_after = np.append(gaps, len(data))[np.searchsorted(gaps, first)]
  end = np.minimum(np.append(first[1:], len(data)), gap_after)
  ends = np.flatnonzero(data == _END)
  return polynomial(_LOWER[data].astype(np.uint64) + np.uint64(1), first, end), \
      np.searchsorted(ends, first), len(ends)


def _open_punctuation(data, kind):
  """Marks U+00A0 … U+00BF, U+2000 … U+207F and U+3000 … U+303F as gaps."""
  if not (data >= 0x80).any():
    return
  two = np.flatnonzero((data[:-1] == 0xC2) & (data[1:] >= 0xA0))
  kind[two], kind[two + 1] = _GAP, _GAP
  three = np.flatnonzero(((data[:-2] == 0xE2) | (data[:-2] == 0xE3)) & (data[1:-1] < 0x82)
                         & (data[1:-1] >= 0x80) & ~((data[:-2] == 0xE3) & (data[1:-1] == 0x81)))
  for i in range(3):
    kind[three + i] = _GAP


def _after_alone(kind):
  """Bytes that come right after a character which is a word of its own."""
  leads = np.flatnonzero(kind != _TAIL)
  out = np.zeros(len(kind), bool)
  out[leads[1:][kind[leads[:-1]] == _ALONE]] = True
  return out


def polynomial(values: np.ndarray, starts, ends) -> np.ndarray:
  """uint64 hashes of values[start:end] for every pair, modulo 2**64, whatever comes before them.

  Powers of an odd base have inverses, so a difference of prefix sums is moved to the origin by one
  product; the result is mixed, for the low bits of a sum depend on low bits only.
  """
  with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is meant
    powers, inverse = _powers(len(values) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers[:len(values)])])
    h = (sums[ends] - sums[starts]) * inverse[starts]
    h = (h ^ (h >> np.uint64(31))) * _MIX
    return h ^ (h >> np.uint64(32))


_POWERS = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(count):
  """Powers of the base and of its inverse, at least `count` of each."""
  for i, base in enumerate((int(_BASE), pow(int(_BASE), -1, 1 << 64))):
    while len(_POWERS[i]) < count:
      known = _POWERS[i]
      _POWERS[i] = np.concatenate([known, known * np.uint64(pow(base, len(known), 1 << 64))])
  return _POWERS
