"""Token stores into sequences of L targets. Sequence i is random access: nothing is read twice.

Continuous (the papers, fairseq's `sample-break-mode none`): the split is one stream cut every L
tokens across document borders. The input of a block is the stream shifted right by one, and the
stream's first input is end-of-document, so every token is predicted exactly once.

Document-aware: documents, cut where they are longer than L, are laid into sequences best fit
first, longest piece first; attention stays inside a piece and positions restart. The order lies in
an index beside the tokens.
"""

import contextlib
import os
import uuid
import zipfile

import numpy as np

from demix.data.tokens.store import TokenStore, digest_of
from demix.errors import BadInput

PACKINGS = ('continuous', 'document')


class Stream:
  """Windows over one domain and split as one stream of tokens.

  Args:
    store: an open token store. domain, split: which part of it.
    length: L, targets per sequence.
    stride: targets scored per window, the rest is context; 0: `length` (blocks that do not
      overlap). The last windows of a strided pass end where the stream ends.
    partial: keep a last window that is not full; what is missing has weight 0.
  """

  def __init__(self, store: TokenStore, domain: str, split: str, length: int, *, stride: int = 0,
               partial: bool = False):
    self.store, self.domain, self.split = store, domain, split
    self.length, self.stride = length, stride or length
    self.prompts = Prompts(store, domain, split)
    if not 1 <= self.stride <= length:
      raise BadInput(f'stride {stride} is not between 1 and the sequence length {length}')
    total = len(store.tokens(domain, split))
    self.windows = -(-total // self.stride) if partial else total // self.stride

  def __len__(self):
    return self.windows

  def __repr__(self):
    return f'Stream({self.domain}/{self.split}, {self.length}, {self.stride})'

  def __getitem__(self, i: int) -> dict:
    """Arrays [L]: tokens, targets, weights, segments, positions."""
    tokens = self.store.tokens(self.domain, self.split)
    scored, end = i * self.stride, min((i + 1) * self.stride, len(tokens))
    start = max(0, (i + 1) * self.stride - self.length)
    count = end - start
    row = empty_row(self.length)
    row['targets'][:count] = tokens[start:end]
    row['tokens'][0] = tokens[start - 1] if start else self.store.eod_id
    row['tokens'][1:count] = tokens[start:end - 1]
    row['weights'][scored - start:count] = self.prompts.weights(scored, end)
    row['segments'][:count] = 1
    row['positions'][:count] = np.arange(count)
    return row


class Prompts:
  """Which tokens of a domain and split are predicted: all, but those of the documents' prompts."""

  def __init__(self, store: TokenStore, domain: str, split: str):
    self.store, self.domain, self.split = store, domain, split

  def weights(self, start: int, end: int) -> np.ndarray | float:
    """Weights [end - start] of those tokens of the stream: 0 in prompts; 1.0 without any."""
    prompts = self.store.prompts(self.domain, self.split)
    if prompts is None:
      return 1.0
    ends = self.store.documents(self.domain, self.split)[:, 0]
    first, last = np.searchsorted(ends, [start, end - 1], 'right')
    weights = np.ones(end - start, np.float32)
    for document in range(first, last + 1):
      begin = int(ends[document - 1]) if document else 0
      weights[max(0, begin - start):max(0, begin + int(prompts[document]) - start)] = 0
    return weights


def empty_row(length: int) -> dict:
  """A sequence of padding: zeros [L] under the names of the batch contract."""
  row = {name: np.zeros(length, np.int32) for name in ('tokens', 'targets', 'segments',
                                                       'positions')}
  row['weights'] = np.zeros(length, np.float32)
  return row


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """Bin of each item: best fit, longest first (ties by index); items are at most `capacity` long.

  Best-fit-decreasing as in Ding et al. 2024 (2404.10830). O(n) with a bit set of free room.
  """
  bins = np.empty(len(lengths), np.int64)
  open_bins, room, count = [[] for _ in range(capacity + 1)], 0, 0
  for item in np.argsort(-lengths, kind='stable'):
    length = int(lengths[item])
    fitting = room >> length
    if fitting:
      free = length + (fitting & -fitting).bit_length() - 1
      chosen = open_bins[free].pop()
      if not open_bins[free]:
        room &= ~(1 << free)
    else:
      chosen, free, count = count, capacity, count + 1
    left = free - length
    if left:
      open_bins[left].append(chosen)
      room |= 1 << left
    bins[item] = chosen
  return bins


def pack(document_ends: np.ndarray, length: int) -> dict:
  """The index of a document-aware packing.

  Args:
    document_ends: int64 [documents], offset just past each document's end-of-document token.
    length: L.

  Returns:
    {'starts', 'lengths': int64 [pieces] in sequence order, 'first': int64 [sequences + 1] piece at
    which a sequence begins}.
  """
  begins = np.concatenate([[0], document_ends[:-1]]).astype(np.int64)
  sizes = document_ends - begins
  pieces = -(-sizes // length)
  inside = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
  starts = np.repeat(begins, pieces) + inside * length
  lengths = np.minimum(np.repeat(document_ends, pieces) - starts, length)
  bins = best_fit(lengths, length)
  order = np.argsort(bins, kind='stable')
  first = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2))
  return {'starts': starts[order], 'lengths': lengths[order], 'first': first}


class Documents:
  """Sequences of whole documents, by an index that is made once and kept beside the tokens.

  Args:
    keep: False: where the index cannot be written it is made again each time.
  """

  def __init__(self, store: TokenStore, domain: str, split: str, length: int, *,
               keep: bool = True):
    self.store, self.domain, self.split, self.length = store, domain, split, length
    self.prompts = Prompts(store, domain, split)
    path = os.path.join(store.path, domain, split, f'packed_{length}.npz')
    ends = np.asarray(store.documents(domain, split)[:, 0])
    of = digest_of(ends)
    index = None
    if not os.path.exists(path):
      index = {**pack(ends, length), 'documents': of}
      with contextlib.suppress(*(() if keep else (BadInput,))):
        write_index(path, index)
    index = index or read_index(path)
    if index['documents'] != of:
      raise BadInput(f'{path}: made for documents with digest {index["documents"]}, the split has '
                     f'{of}: delete it, it is made again')
    self.starts, self.lengths, self.first = (index[n] for n in ('starts', 'lengths', 'first'))

  def __len__(self):
    return len(self.first) - 1

  def __repr__(self):
    return f'Documents({self.domain}/{self.split}, {self.length})'

  def __getitem__(self, i: int) -> dict:
    """Arrays [L]: tokens, targets, weights, segments (1, 2, …; 0 padding), positions."""
    tokens, row, at = self.store.tokens(self.domain, self.split), empty_row(self.length), 0
    for segment, p in enumerate(range(self.first[i], self.first[i + 1]), 1):
      start, count = int(self.starts[p]), int(self.lengths[p])
      part = slice(at, at + count)
      row['targets'][part] = tokens[start:start + count]
      # The token before a document's first is the end-of-document of the one before it.
      row['tokens'][at] = tokens[start - 1] if start else self.store.eod_id
      row['tokens'][at + 1:at + count] = tokens[start:start + count - 1]
      row['weights'][part] = self.prompts.weights(start, start + count)
      row['segments'][part] = segment
      row['positions'][part] = np.arange(count)
      at += count
    return row


def write_index(path: str, index: dict):
  """Writes an index with a rename at the end, so that no reader sees half of it."""
  temporary = f'{path}.{uuid.uuid4().hex}.npz'  # several writers may be at it, on several machines
  try:
    try:
      np.savez(temporary, **index)
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise
  except OSError as e:
    raise BadInput(f'{path}: cannot write the packing index ({e.strerror}); make the token store '
                   'writable once, or train with data.packing=continuous') from None


def read_index(path: str) -> dict:
  """What `write_index` wrote. BadInput: it is not that, or not all of it."""
  try:
    with np.load(path, allow_pickle=False) as index:
      return {n: index[n] for n in ('starts', 'lengths', 'first', 'documents')}
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise BadInput(f'{path}: not a packing index ({e}): delete it, it is made again') from None


def sequences(store: TokenStore, domain: str, split: str, length: int, packing: str):
  """The training sequences of one domain: a random-access source of rows."""
  if packing == 'continuous':
    return Stream(store, domain, split, length)
  if packing == 'document':
    return Documents(store, domain, split, length)
  from demix.settings import nearest
  raise BadInput(f'data.packing={packing!r}: no such packing{nearest(packing, PACKINGS)}')
