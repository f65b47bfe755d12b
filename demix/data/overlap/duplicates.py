"""Exact duplicates between splits, found by the digests of their documents."""

from pathlib import Path

import numpy as np

_ROWS = 1 << 20  # digests that are sorted at once


def shared(files: dict[str, Path], rows: int = _ROWS) -> list[dict]:
  """Counts the documents that two splits have in common.

  Args:
    files: {'domain/split': a file of 16-byte digests, one per document}.
    rows: how many digests to hold in memory at once, about.

  Returns:
    [{'a': 'd/split', 'b': 'd/split', 'documents': distinct documents that are in both}] for every
    pair that has any, in the order of `files`.
  """
  names = list(files)
  total = sum(f.stat().st_size for f in files.values()) // 16
  bits = max(0, int(total // rows).bit_length())
  counts = np.zeros((len(names), len(names)), np.int64)
  for bucket in range(1 << bits):  # digests with the same leading bits
    parts = [_bucket(f, bits, bucket) for f in files.values()]
    keys = np.concatenate(parts)
    labels = np.repeat(np.arange(len(names)), [len(p) for p in parts])
    order = np.lexsort((labels, keys[:, 1], keys[:, 0]))
    keys, labels = keys[order], labels[order]
    # Row i and the row `distance` later, while there are runs of one document that long.
    for distance in range(1, len(names)):
      same = (keys[distance:] == keys[:-distance]).all(axis=1)
      if not same.any():
        break
      np.add.at(counts, (labels[:-distance][same], labels[distance:][same]), 1)
  return [{'a': a, 'b': b, 'documents': int(counts[i, j])}
          for i, a in enumerate(names) for j, b in enumerate(names) if i < j and counts[i, j]]


def _bucket(file, bits, bucket):
  """uint64 [n, 2]: the distinct digests in `file` whose leading `bits` are `bucket`."""
  found = [np.zeros((0, 2), np.uint64)]
  with open(file, 'rb') as f:
    while len(block := np.fromfile(f, '<u8', 1 << 17)):
      block = block.reshape(-1, 2)
      found.append(block[block[:, 0] >> np.uint64(64 - bits) == bucket] if bits else block)
  return np.unique(np.concatenate(found), axis=0)
