"""packing.py: every token is predicted once, with the inputs that it should have."""

import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demix.data.tokens import packing
from demix.data.tokens.packing import Documents, Stream, best_fit, pack, sequences
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

LENGTHS = (1, 7, 32, 100, 5000)  # 5000: longer than most splits


@pytest.fixture
def store(stores, tmp_path):
  """A store of its own: an index is written into it."""
  return TokenStore.open(shutil.copytree(stores.bytes, tmp_path / 'store'))


def shifted(store, domain, split):
  """(inputs, targets) of the whole stream, by definition."""
  targets = np.asarray(store.tokens(domain, split), np.int32)
  return np.concatenate([[store.eod_id], targets[:-1]]), targets


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('partial', [False, True])
def test_continuous_packing_predicts_every_token_once_from_the_one_before(stores, length, partial):
  for path in (stores.bytes, stores.bpe):
    store = TokenStore.open(path)
    for domain in ('code', 'kitchen'):
      inputs, targets = shifted(store, domain, 'train')
      stream = Stream(store, domain, 'train', length, partial=partial)
      whole = len(targets) // length
      assert len(stream) == whole + (partial and len(targets) % length > 0)
      rows = [stream[i] for i in range(len(stream))]
      scored = [row['weights'] == 1 for row in rows]
      covered = len(targets) if partial else whole * length
      assert sum(int(s.sum()) for s in scored) == covered
      for name, expected in (('targets', targets), ('tokens', inputs)):
        got = np.concatenate([row[name][s] for row, s in zip(rows, scored)] or [[]])
        np.testing.assert_array_equal(got, expected[:covered])
      for row, s in zip(rows, scored):
        assert {n: (x.shape, x.dtype.name) for n, x in row.items()} == {
            n: ((length,), 'float32' if n == 'weights' else 'int32')
            for n in ('tokens', 'targets', 'segments', 'positions', 'weights')}
        np.testing.assert_array_equal(row['segments'], s)  # one segment; padding is 0
        np.testing.assert_array_equal(row['positions'][s], np.arange(s.sum()))
        assert not any(row[n][~s].any() for n in row), 'padding is not zeros'


def test_the_first_input_of_a_stream_is_end_of_document(stores):
  store = TokenStore.open(stores.bytes)
  assert Stream(store, 'legal', 'train', 8)[0]['tokens'][0] == store.eod_id == 256
  assert Stream(store, 'legal', 'train', 8)[1]['tokens'][0] == store.tokens('legal', 'train')[7]


@pytest.mark.parametrize(('length', 'stride'), [(32, 8), (32, 31), (32, 1), (7, 3), (2000, 500)])
def test_strided_windows_score_each_token_once_with_the_context_there_is(stores, length, stride):
  store = TokenStore.open(stores.bytes)
  inputs, targets = shifted(store, 'code', 'test')
  stream = Stream(store, 'code', 'test', length, stride=stride, partial=True)
  scored = []
  for row in (stream[i] for i in range(len(stream))):
    real = int(row['segments'].sum())
    places = np.flatnonzero(row['weights'])
    assert set(row['weights']) <= {0, 1} and np.all(np.diff(places) == 1) and places[-1] == real - 1
    start = len(scored) - places[0]  # where in the stream the window begins
    np.testing.assert_array_equal(row['targets'][:real], targets[start:start + real])
    np.testing.assert_array_equal(row['tokens'][:real], inputs[start:start + real])
    np.testing.assert_array_equal(row['positions'][:real], np.arange(real))
    for place in places:
      token = start + place
      assert place >= min(token, length - stride), f'token {token} sees {place} before it'
      scored.append(token)
  assert scored == list(range(len(targets)))


def test_a_stride_of_the_whole_length_is_blocks(stores):
  store = TokenStore.open(stores.bytes)
  blocks = Stream(store, 'verse', 'test', 32, partial=True)
  strided = Stream(store, 'verse', 'test', 32, stride=32, partial=True)
  assert len(blocks) == len(strided) > 5
  for i in range(len(blocks)):
    for name in blocks[i]:
      np.testing.assert_array_equal(blocks[i][name], strided[i][name])


@pytest.mark.parametrize('stride', [-1, 33])
def test_a_stride_that_cannot_be_is_refused_with_both_numbers(stores, stride):
  with pytest.raises(BadInput, match=f'{stride} .*32'):
    Stream(TokenStore.open(stores.bytes), 'code', 'test', 32, stride=stride)


def pieces_of(store, domain, split, length):
  """The pieces that document-aware packing must predict, by definition: documents with their
  end-of-document, cut every `length` tokens; each with its inputs."""
  inputs, targets = shifted(store, domain, split)
  pieces, begin = Counter(), 0
  for end in store.documents(domain, split)[:, 0].tolist():
    for start in range(begin, end, length):
      part = slice(start, min(start + length, end))
      pieces[tuple(inputs[part]), tuple(targets[part])] += 1
    begin = end
  return pieces


@pytest.mark.parametrize('length', LENGTHS)
def test_document_packing_predicts_every_token_once_and_no_piece_crosses_a_document(store, length):
  for domain in ('code', 'kitchen', 'mixed'):
    documents = Documents(store, domain, 'train', length)
    seen = Counter()
    for i in range(len(documents)):
      row = documents[i]
      count = int(row['segments'].max())
      used = int((row['segments'] > 0).sum())
      assert count and np.all(row['segments'][:used] > 0) and np.all(np.diff(
          row['segments'][:used]) >= 0), 'segments are not 1, 2, … and then padding'
      np.testing.assert_array_equal(row['weights'], row['segments'] > 0)
      assert not any(row[n][used:].any() for n in row), 'padding is not zeros'
      for segment in range(1, count + 1):
        at = row['segments'] == segment
        np.testing.assert_array_equal(row['positions'][at], np.arange(at.sum()))
        seen[tuple(row['tokens'][at]), tuple(row['targets'][at])] += 1
    assert seen == pieces_of(store, domain, 'train', length)


def naive_best_fit(lengths, capacity):
  """Best fit decreasing as in a textbook: how full each bin is."""
  loads = []
  for n in sorted(lengths, reverse=True):
    fitting = [i for i, load in enumerate(loads) if load + n <= capacity]
    if fitting:
      best = max(fitting, key=lambda i: loads[i])
      loads[best] += n
    else:
      loads.append(n)
  return sorted(loads)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_best_fit_is_best_fit_decreasing(case):
  capacity, lengths = case
  bins = best_fit(np.array(lengths, np.int64), capacity)
  loads = np.zeros(len(set(bins.tolist())), np.int64)
  np.add.at(loads, bins, lengths)
  assert loads.max(initial=0) <= capacity
  assert sorted(loads.tolist()) == naive_best_fit(lengths, capacity)


def test_best_fit_is_within_its_bound_of_a_perfect_packing():
  random = np.random.default_rng(0)
  for bins in (1, 10, 300):
    cuts = [np.sort(random.choice(np.arange(1, 128), random.integers(0, 6), replace=False))
            for _ in range(bins)]
    lengths = np.concatenate([np.diff([0, *c, 128]) for c in cuts])  # fits into `bins` exactly
    used = best_fit(random.permutation(lengths), 128).max() + 1
    assert bins <= used <= 11 / 9 * bins + 6 / 9


def test_the_index_covers_documents_that_are_exactly_as_long_as_a_sequence():
  index = pack(np.array([4, 8, 9, 17]), 4)  # documents of 4, 4, 1 and 8 tokens
  assert sorted(zip(index['starts'].tolist(), index['lengths'].tolist())) == [
      (0, 4), (4, 4), (8, 1), (9, 4), (13, 4)]
  assert index['first'].tolist() == [0, 1, 2, 3, 4, 5]


def same_rows(a, b):
  assert len(a) == len(b)
  for i in range(len(a)):
    for name in a[i]:
      np.testing.assert_array_equal(a[i][name], b[i][name])


def test_an_index_is_made_once_and_the_same_wherever_it_is_made(store, stores, tmp_path):
  first = Documents(store, 'legal', 'train', 32)
  path = store.path / 'legal/train/packed_32.npz'
  made = path.stat().st_mtime_ns
  same_rows(first, Documents(TokenStore.open(store.path), 'legal', 'train', 32))
  assert path.stat().st_mtime_ns == made
  other = TokenStore.open(shutil.copytree(stores.bytes, tmp_path / 'other'))
  assert not (other.path / 'legal/train/packed_32.npz').exists()
  same_rows(first, Documents(other, 'legal', 'train', 32))


@pytest.mark.parametrize('kind', ['continuous', 'document'])
def test_sequences_are_random_access(store, kind):
  a, b = (sequences(store, 'code', 'train', 16, kind) for _ in range(2))
  order = np.random.default_rng(0).permutation(len(a)).tolist()
  rows = {i: a[i] for i in order}
  for i in range(len(b)):
    for name in rows[i]:
      np.testing.assert_array_equal(rows[i][name], b[i][name])


def test_several_writers_of_one_index_do_not_disturb_each_other(store, monkeypatch):
  # All have written before the first renames: a shared temporary name would be gone by then.
  barrier, replace, errors = threading.Barrier(4, timeout=30), os.replace, []
  monkeypatch.setattr(packing.os, 'replace', lambda a, b: (barrier.wait(), replace(a, b)))

  def write():
    try:
      same_rows(Documents(store, 'legal', 'train', 32), Documents(store, 'legal', 'train', 32))
    except Exception as e:
      errors.append(e)
  threads = [threading.Thread(target=write) for _ in range(4)]
  [t.start() for t in threads], [t.join() for t in threads]
  assert errors == []
  assert sorted(os.listdir(store.path / 'legal/train')) == [
      'documents.npy', 'packed_32.npz', 'tokens.bin']


def moved(path):
  """The index of documents that have as many tokens in all, but other ends."""
  ends = np.load(path.parent / 'documents.npy')[:, 0].copy()
  ends[0] += 1
  packing.write_index(str(path), {**pack(ends, 32), 'documents': packing.digest_of(ends)})


STALE = {
    'other documents': moved,
    'cut off': lambda path: os.truncate(path, path.stat().st_size // 2),
    'empty': lambda path: os.truncate(path, 0),
    'a byte changed': lambda path: path.write_bytes(
        path.read_bytes()[:200] + b'\xff' + path.read_bytes()[201:]),
    'not an index': lambda path: np.savez(path, starts=np.zeros(3)),
}


@pytest.mark.parametrize('kind', STALE)
def test_an_index_of_other_documents_or_a_damaged_one_is_refused(store, kind):
  Documents(store, 'code', 'train', 32)
  path = store.path / 'code/train/packed_32.npz'
  STALE[kind](path)
  with pytest.raises(BadInput) as e:
    Documents(store, 'code', 'train', 32)
  assert str(e.value).startswith(f'{path}: ') and 'delete it' in str(e.value)


def test_a_read_only_store_without_an_index_is_refused_and_one_with_it_is_read(stores):
  with tempfile.TemporaryDirectory() as outer:
    os.chmod(outer, 0o755)
    store = TokenStore.open(shutil.copytree(stores.bytes, Path(outer) / 'store'))
    Documents(store, 'code', 'train', 32)
    for path in (store.path, *store.path.rglob('*')):
      os.chmod(path, 0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0  # root may write everywhere: be nobody for a moment
    try:
      if root:
        os.seteuid(65534)
      assert len(Documents(store, 'code', 'train', 32)) > 3
      with pytest.raises(BadInput, match=r'code/train/packed_16\.npz: .*Permission denied.*writable'
                                         r'.*data\.packing=continuous'):
        Documents(store, 'code', 'train', 16)
    finally:
      if root:
        os.seteuid(0)
      for path in (store.path, *store.path.rglob('*')):
        os.chmod(path, 0o755)


def test_a_failed_write_of_an_index_leaves_nothing(store, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(packing.os, 'replace', full)
  with pytest.raises(BadInput, match='No space left'):
    Documents(store, 'code', 'train', 32)
  assert sorted(os.listdir(store.path / 'code/train')) == ['documents.npy', 'tokens.bin']


def test_an_unknown_packing_is_refused_with_the_nearest(stores):
  with pytest.raises(BadInput, match=r"'documents': no such packing \(did you mean 'document'\?\)"):
    sequences(TokenStore.open(stores.bytes), 'code', 'train', 16, 'documents')
