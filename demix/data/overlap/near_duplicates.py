"""Near duplicates: texts that are copies of each other but for a name, a year or a layout.

A text becomes the set of its windows of 32 characters, after blanks are collapsed, letters lowered
and digits made equal; two texts are near duplicates when the Jaccard similarity of their sets
reaches a threshold. MinHash (`datasketch`) only proposes candidates. The similarity that decides is
counted on the sets themselves, so no text is dropped because of an unlucky sketch.
"""

import numpy as np
from datasketch import MinHash, MinHashLSH

_WINDOW = 32            # characters; five or six words. A power of two: see `windows`
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
# A year or a version is what near copies differ in, so every digit counts as 0.
_FOLD = bytes(ord('0') if 48 <= c <= 57 else c for c in range(256))


def windows(text: str, sample: int = 4) -> np.ndarray:
  """Hashes of the 32-character windows of `text` that fall into a sample of one in `sample`.

  The same windows are sampled in every text (by their hash), so similarities of samples estimate
  those of the texts without bias. Texts of fewer than 256 windows are not sampled: too little of
  them would be left.

  Returns:
    uint64 [n], sorted, without repeats; a text shorter than a window has one.
  """
  line = ' '.join(text.lower().split()).encode('utf-8', 'replace').translate(_FOLD)
  h = np.frombuffer(line.ljust(_WINDOW), np.uint8).astype(np.uint64)
  base, width = _BASE, 1
  with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is meant
    while width < _WINDOW:  # a window of 2w is two windows of w: five steps instead of thirty-two
      h = h[:-width] * base + h[width:]
      base, width = base * base, 2 * width
    h = (h ^ (h >> np.uint64(31))) * _MIX
    h ^= h >> np.uint64(32)
  if h.size >= 256 and sample > 1:
    kept = h[h % np.uint64(sample) == 0]
    h = kept if kept.size else h[:1]
  return np.unique(h)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
  """Jaccard similarity of two sorted arrays without repeats: in both / in either."""
  both = np.intersect1d(a, b, assume_unique=True).size
  return both / (a.size + b.size - both)


class NearDuplicates:
  """Remembers texts and tells whether the next one is a near copy of one of them.

  Args:
    threshold: least Jaccard similarity of 32-character windows that makes two texts near copies.
    permutations: length of the MinHash sketches; more finds more copies near the threshold, slower.
  """

  def __init__(self, threshold: float = 0.6, permutations: int = 48):
    self.threshold = threshold
    # False negatives are weighed higher: a candidate too many is only checked and kept.
    self._index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.2, 0.8))
    self._empty = MinHash(num_perm=permutations, hashfunc=int)
    self._windows = []

  def add(self, text: str) -> bool:
    """Remembers `text` and returns True; or returns False: it is a near copy of one before."""
    found = windows(text)
    sketch = self._empty.copy()  # a new MinHash would draw its permutations again
    sketch.update_batch((found >> np.uint64(32)).tolist())
    for key in self._index.query(sketch):
      if similarity(found, self._windows[key]) >= self.threshold:
        return False
    self._index.insert(len(self._windows), sketch, check_duplication=False)
    self._windows.append(found)
    return True
