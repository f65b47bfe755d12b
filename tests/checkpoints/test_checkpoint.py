"""checkpoint.py: what was saved comes back to the bit, and nothing good is lost by saving."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import ROOT, files, flip, latest, like, same_bits, save, state_of

from demix.checkpoints import checkpoint
from demix.checkpoints.checkpoint import Checkpoints
from demix.errors import BadInput, DemixError, NothingToLoad, Refused
from demix.runtime import digests

pytestmark = pytest.mark.exact


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Checkpoints of steps 9 and 10, for tests that only read."""
  directory = tmp_path_factory.mktemp('two') / 'checkpoints'
  save(directory, 9, 10)
  return directory


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'checkpoints')


# ---- what comes back


def test_state_and_meta_come_back_to_the_bit(two):
  for step in (9, 10):
    same_bits(checkpoint.restore(two, step, like(state_of(step))), state_of(step))
    meta = checkpoint.read_meta(two, step)
    assert (meta['version'], meta['step'], meta['note']) == (1, step, f'step {step}')
  assert checkpoint.names(two, 9) == {
      n: (x.shape, x.dtype.name) for n, x in state_of(9).items()}
  assert latest(two) == (10, [])


def test_only_the_leaves_asked_for_are_restored_where_they_are_wanted(two):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  part = {n: x for n, x in state_of(9).items() if n.startswith('params/blocks')}
  back = checkpoint.restore(two, 9, like(part, sharding=sharding))
  same_bits(back, part)
  assert all(x.sharding == sharding for x in back.values())
  assert checkpoint.restore(two, 9, {}) == {}


def test_what_does_not_fit_is_refused_with_all_differences(two):
  want = like(state_of(9)) | {
      'params/embed/tokens': jax.ShapeDtypeStruct((18, 3), jnp.float32),
      'optimizer/count': jax.ShapeDtypeStruct((), jnp.uint32),
      'params/new': jax.ShapeDtypeStruct((1,), jnp.float32)}
  with pytest.raises(BadInput) as e:
    checkpoint.restore(two, 9, want)
  for text in ('params/embed/tokens: float32[17, 3], expected float32[18, 3]',
               'optimizer/count: int32[], expected uint32[]',
               'params/new: missing, expected float32[1]'):
    assert text in str(e.value)
  assert 'mu' not in str(e.value)
  for call in (lambda: checkpoint.read_meta(two, 8), lambda: checkpoint.require(two, 8)):
    with pytest.raises(BadInput, match=r'no checkpoint of step 8 \(there: 9, 10\)'):
      call()


def test_arrays_that_are_not_those_of_meta_are_refused(copy):
  shutil.rmtree(copy / '9/state')
  shutil.copytree(copy / '10/state', copy / '9/state')
  digests.seal(copy / '9')  # so that the files are as listed
  assert checkpoint.verify(copy, 9) == []
  with pytest.raises(NothingToLoad, match='optimizer/count'):
    checkpoint.restore(copy, 9, like(state_of(9)))
  same_bits(checkpoint.restore(copy, 9, like(state_of(9)), check=False), state_of(10))


def test_no_file_of_a_checkpoint_names_a_path_of_the_machine(two):
  for name in files(two, 9):
    assert os.fsencode(two.parent) not in (two / '9' / name).read_bytes(), name


def test_readers_import_no_jax(two):
  code = '''
import sys
from demix.checkpoints import checkpoint as c
d = sys.argv[1]
print(c.steps(d), c.verify(d, 9), c.latest(d), c.require(d, 9), len(c.names(d, 9)),
      {'jax', 'orbax'} & set(sys.modules))'''
  out = subprocess.run([sys.executable, '-c', code, str(two)], text=True, check=True,
                       capture_output=True, env={'PYTHONPATH': str(ROOT)}).stdout
  assert out == '[9, 10] [] 10 9 8 set()\n'


# ---- content digests


def test_the_digest_of_a_leaf_is_fixed():
  assert digests.of_leaf('a', np.arange(3, dtype=np.int32)) == '8a313157029a467bac33c4533ecfa06b'


def test_the_digest_of_a_leaf_sees_name_type_shape_and_every_bit():
  x = np.arange(6, dtype=np.int32).reshape(2, 3)
  seen = {digests.of_leaf('a', x), digests.of_leaf('b', x), digests.of_leaf('a', x.reshape(3, 2)),
          digests.of_leaf('a', x.reshape(6)), digests.of_leaf('a', x.view(np.float32)),
          digests.of_leaf('a', x.view(np.uint32))}
  for bit in range(x.nbytes * 8):
    y = bytearray(x.tobytes())
    y[bit // 8] ^= 1 << bit % 8
    seen.add(digests.of_leaf('a', np.frombuffer(y, np.int32).reshape(2, 3)))
  assert len(seen) == 6 + x.nbytes * 8
  assert digests.of_leaf('a', np.asfortranarray(x)) == digests.of_leaf('a', jnp.asarray(x))
  zero = jnp.zeros((2,), jnp.bfloat16)
  assert digests.of_leaf('a', zero) != digests.of_leaf('a', -zero)


def test_content_digests_do_not_depend_on_storage_or_order(two, tmp_path):
  def other(step):  # the same values in another memory layout, order and kind of array
    state = {n: np.array(x, order='F') for n, x in state_of(step).items()}
    return dict(sorted(state.items(), reverse=True))
  save(tmp_path, 9, state=other)
  a, b = checkpoint.read_meta(two, 9), checkpoint.read_meta(tmp_path, 9)
  for key in ('leaves', 'content_digest', 'state_digest'):
    assert a[key] == b[key]
  different = checkpoint.read_meta(two, 10)
  assert a['content_digest'] != different['content_digest']


def test_the_content_digest_is_of_the_parameters_the_state_digest_of_all(two, tmp_path):
  save(tmp_path, 9, state=lambda s: state_of(s) | {'optimizer/count': jnp.int32(8)})
  a, b = checkpoint.read_meta(two, 9), checkpoint.read_meta(tmp_path, 9)
  assert a['content_digest'] == b['content_digest'] and a['state_digest'] != b['state_digest']


# ---- saving


def test_the_newest_and_every_nth_stay(tmp_path):
  save(tmp_path, *range(1, 8), max_to_keep=2, keep_every=3)
  assert checkpoint.steps(tmp_path) == [3, 6, 7]
  assert all(checkpoint.verify(tmp_path, s) == [] for s in (3, 6, 7))
  assert sorted(os.listdir(tmp_path)) == ['3', '6', '7']


def test_every_byte_is_durable_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
  calls, fsync, rename = [], os.fsync, Path.rename
  monkeypatch.setattr(os, 'fsync', lambda fd: (
      calls.append(Path(os.readlink(f'/proc/self/fd/{fd}'))), fsync(fd)))
  monkeypatch.setattr(Path, 'rename', lambda a, b: (calls.append((a, b)), rename(a, b)))
  save(tmp_path, 1)
  work, final = next(c for c in calls if isinstance(c, tuple))
  named = calls.index((work, final))
  assert final == tmp_path / '1' and tmp_path in calls[named:]
  below = {p.relative_to(final) for p in final.rglob('*')
           if p.is_file() or any(f.is_file() for f in p.iterdir())}
  synced = {c.relative_to(work) for c in calls[:named] if c.is_relative_to(work)}
  assert len(below) > 10 and below - {Path('digests.json')} <= synced
  assert {Path('.')} < synced and any(s.name.startswith('.digests.json') for s in synced)


def test_a_bad_checkpoint_does_not_cost_a_good_one_its_place(copy):
  flip(0)(copy / '10/meta.json')
  save(copy, 8, max_to_keep=2)  # a run that resumed before 9
  assert checkpoint.steps(copy) == [8, 9, 10]
  save(copy, 11, max_to_keep=2)
  assert checkpoint.steps(copy) == [9, 10, 11]


def test_what_was_just_saved_stays_even_if_there_are_newer_ones(copy):
  save(copy, 7, 8, max_to_keep=1)
  assert checkpoint.steps(copy) == [8, 10]


def test_a_save_that_turns_out_bad_deletes_nothing(copy, monkeypatch):
  def seal(root, real=digests.seal):
    real(root)
    flip(0.5)(root / 'state/_METADATA')
  monkeypatch.setattr(digests, 'seal', seal)
  with pytest.raises(DemixError, match=r'bad right after .* state/_METADATA'):
    save(copy, 11, max_to_keep=1)
  monkeypatch.undo()
  assert latest(copy) == (10, []) and sorted(os.listdir(copy)) == ['10', '9']
  save(copy, 11, max_to_keep=1)
  assert latest(copy) == (11, []) and os.listdir(copy) == ['11']


def test_a_bad_checkpoint_gives_way_under_another_name(copy):
  (copy / '10.bad').mkdir()
  flip(0)(copy / '10/meta.json')
  bad = (copy / '10/meta.json').read_bytes()
  save(copy, 10)
  assert (copy / '10.bad/meta.json').read_bytes() == bad
  assert latest(copy) == (10, [])
  shutil.rmtree(copy / '10')
  (copy / '10').mkdir()  # never finished: not worth a name
  save(copy, 10)
  assert latest(copy) == (10, []) and (copy / '10.bad/meta.json').read_bytes() == bad


def test_a_good_checkpoint_is_never_written_over(copy):
  def times():
    return {name: (copy / '10' / name).stat().st_mtime_ns for name in files(copy, 10)}
  before = times()
  save(copy, 10)
  assert times() == before
  with pytest.raises(Refused, match='another state'):
    save(copy, 10, state=lambda s: state_of(3))
  assert times() == before and latest(copy) == (10, [])


def test_cleaning_removes_what_a_killed_save_left_and_nothing_else(copy):
  (copy / '11/state.orbax-checkpoint-tmp/d').mkdir(parents=True)
  (copy / '11/meta.json').write_text('{}')
  shutil.copytree(copy / '10', copy / '12.saving-1-0')
  (copy / 'notes').mkdir()
  shutil.copytree(copy / '9', copy / '9.bad')
  everything = sorted(os.listdir(copy))
  Checkpoints(copy).close()
  assert latest(copy) == (10, []) and sorted(os.listdir(copy)) == everything
  Checkpoints(copy, clean=True).close()
  assert sorted(os.listdir(copy)) == ['10', '9', '9.bad', 'notes']
  Checkpoints(copy / 'none', clean=True).close()


@pytest.mark.parametrize('leaves', [
    {'../x': np.ones(1, np.float32)}, {'a/./b': np.ones(1, np.float32)},
    {'/a': np.ones(1, np.float32)}, {'a//b': np.ones(1, np.float32)},
    {'a\n': np.ones(1, np.float32)}, {'a': np.ones(1, np.float32), 'a/b': np.ones(1, np.float32)},
    {'a/b': np.ones(1, np.float32), 'a': np.ones(1, np.float32)},
    {'a.b': np.ones(1, np.float32), 'a/b': np.ones(1, np.float32)},
    {'a': np.ones(1, np.float64)}, {'a': np.ones((0, 2), np.float32)}, {'a': 1.0},
    {'a': np.array(['x'])}, {'a': np.array([None])}, {'a': jax.random.key(0)}],
    ids=lambda leaves: ' '.join(map(repr, leaves)))
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, leaves):
  with Checkpoints(tmp_path) as c, pytest.raises(BadInput) as e:
    c.save(1, leaves, {})
  assert os.listdir(tmp_path) == [] and '\n' not in str(e.value)


@pytest.mark.parametrize('meta', [
    {'a': object()}, {'a': float('nan')}, {'leaves': {}}, {'step': 2}],
    ids=['no JSON', 'nan', 'a key of ours', 'another step'])
def test_meta_that_cannot_be_saved_is_refused(tmp_path, meta):
  with Checkpoints(tmp_path) as c, pytest.raises(BadInput):
    c.save(1, state_of(1), meta)
  assert os.listdir(tmp_path) == []


def test_what_the_caller_changes_after_save_is_not_in_the_checkpoint(tmp_path, monkeypatch):
  changed, real = threading.Event(), digests.of_leaf
  monkeypatch.setattr(digests, 'of_leaf', lambda *args: changed.wait(20) and real(*args))
  state, meta = {'a': np.ones(1000, np.float32)}, {'ledger': {'tokens': 1}}
  with Checkpoints(tmp_path) as c:
    c.save(1, state, meta)
    state['a'][:] = 2
    state['b'] = meta['ledger']['tokens'] = 3
    changed.set()
  assert checkpoint.read_meta(tmp_path, 1)['ledger'] == {'tokens': 1}
  back = checkpoint.restore(tmp_path, 1, like({'a': state['a']}))
  same_bits(back, {'a': np.ones(1000, np.float32)})


def test_an_error_in_the_background_is_raised_once(tmp_path, monkeypatch):
  c = Checkpoints(tmp_path)
  monkeypatch.setattr(digests, 'seal', lambda root: 1 / 0)
  c.save(1, state_of(1), {})
  with pytest.raises(DemixError, match='was not saved'):
    c.save(2, state_of(2), {})
  assert os.listdir(tmp_path) == []
  monkeypatch.undo()
  c.save(2, state_of(2), {})
  c.close()
  c.close()
  assert latest(tmp_path) == (2, [])
