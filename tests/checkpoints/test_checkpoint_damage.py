"""checkpoint.py: whatever is wrong with a checkpoint is named, and the one before is used."""

import json
import os
import shutil

import pytest
from checkpoint_cases import files, flip, latest, save

from demix.checkpoints import catalogue, checkpoint
from demix.errors import NothingToLoad
from demix.runtime import digests


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Checkpoints of steps 9 and 10, for tests that only read."""
  directory = tmp_path_factory.mktemp('two') / 'checkpoints'
  save(directory, 9, 10)
  return directory


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'checkpoints')


DAMAGE = {
    'first bit': flip(0), 'middle bit': flip(0.5), 'last bit': flip(1),
    'truncated': lambda path: os.truncate(path, path.stat().st_size - 1),
    'longer': lambda path: path.write_bytes(path.read_bytes() + b'\0'),
    'empty': lambda path: os.truncate(path, 0),
    'missing': lambda path: path.unlink(),
    'a directory': lambda path: (path.unlink(), path.mkdir()),
    'a link': lambda path: (path.rename(path.parent.parent.parent / 'away'),
                            path.symlink_to(path.parent.parent.parent / 'away')),
    'a pipe': lambda path: (path.unlink(), os.mkfifo(path))}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_to_any_file_is_named_and_the_one_before_is_used(copy, kind):
  names = files(copy, 10)
  assert {'meta.json', 'digests.json', 'state/_METADATA'} < set(names) and len(names) > 10
  shutil.copytree(copy / '10', copy.parent / 'good')
  for name in names:
    DAMAGE[kind](copy / '10' / name)
    if (name, kind) == ('digests.json', 'missing'):
      assert latest(copy) == (9, []) and checkpoint.steps(copy) == [9]
    else:
      problems = checkpoint.verify(copy, 10)
      assert any(p.startswith(f'{name}: ') for p in problems), (name, problems)
      if kind in ('truncated', 'longer', 'empty') and name != 'digests.json':
        assert f' bytes, expected {(copy.parent / "good" / name).stat().st_size}' in problems[0]
      step, warnings = latest(copy)
      assert step == 9 and len(warnings) == 1, name
      assert f'{copy / "10"} ' in warnings[0] and name in warnings[0] and '\n' not in warnings[0]
      with pytest.raises(NothingToLoad, match=r'10 is bad: '):
        checkpoint.require(copy, 10)
    shutil.rmtree(copy / '10')
    shutil.copytree(copy.parent / 'good', copy / '10')
  assert latest(copy) == (10, [])


@pytest.mark.parametrize('name', ['extra', 'state/d/extra', 'state/new/extra'])
def test_a_file_too_many_is_named(copy, name):
  (copy / '10' / name).parent.mkdir(exist_ok=True)
  (copy / '10' / name).write_text('')
  assert checkpoint.verify(copy, 10) == [f'{name}: extra, not in digests.json']
  assert latest(copy)[0] == 9


def test_every_bit_of_the_digests_file_counts(tmp_path):
  (tmp_path / 'a').write_text('x')
  digests.seal(tmp_path)
  good = (tmp_path / 'digests.json').read_bytes()
  assert digests.problems(tmp_path) == []
  for bit in range(len(good) * 8):
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    (tmp_path / 'digests.json').write_bytes(bad)
    problems = digests.problems(tmp_path)
    assert len(problems) == 1 and problems[0].startswith('digests.json: '), bit
  for bad in (good + b' ', b' ' + good, good.replace(b' ', b''), b'[' * 10**5, b'null\n', b'{}\n'):
    (tmp_path / 'digests.json').write_bytes(bad)
    assert digests.problems(tmp_path)[0].startswith('digests.json: ')


def test_if_all_are_bad_there_is_nothing_to_load(copy):
  flip(0)(copy / '9/meta.json')
  os.truncate(copy / '10/digests.json', 0)
  warnings = []
  with pytest.raises(NothingToLoad, match='10, 9') as e:
    checkpoint.latest(copy, warn=warnings.append)
  assert e.value.code == 4
  assert ['meta.json' in w for w in warnings] == [False, True]


def test_no_checkpoint_at_all_is_none(tmp_path):
  assert latest(tmp_path / 'none') == (None, [])
  (tmp_path / '5/state').mkdir(parents=True)  # a killed save
  (tmp_path / '5/meta.json').write_text('{}')
  assert latest(tmp_path) == (None, [])


def test_latest_is_by_number_not_by_name_or_time(copy):
  for step, time in ((9, 2e9), (10, 1e9)):
    for path in [copy / str(step), *(copy / str(step)).rglob('*')]:
      os.utime(path, (time, time))
  for name in ('010', '11x', '١١', '-1', '10.bad', 'notes'):
    shutil.copytree(copy / '9', copy / name)
  assert checkpoint.steps(copy) == [9, 10] and latest(copy) == (10, [])


def test_a_checkpoint_under_another_number_or_version_is_bad(copy):
  shutil.copytree(copy / '10', copy / '12')
  assert checkpoint.verify(copy, 12) == ['meta.json: says step 10, expected 12']
  meta = checkpoint.read_meta(copy, 10)
  for change, problem in (({'version': 2}, 'version 2, this demix reads 1'),
                          ({'leaves': [1]}, '"leaves" does not give')):
    (copy / '10/meta.json').write_bytes(digests.canonical(meta | change))
    digests.seal(copy / '10')
    assert checkpoint.verify(copy, 10)[0].startswith(f'meta.json: {problem}')
    with pytest.raises(NothingToLoad):
      checkpoint.read_meta(copy, 10)


def test_a_step_that_is_a_link_is_bad(copy):
  (copy / '11').symlink_to(copy / '10')
  assert checkpoint.verify(copy, 11) == ['11: a symbolic link, never a checkpoint']
  assert latest(copy)[0] == 10


def test_a_digests_file_that_points_outside_opens_nothing(copy):
  (copy / 'outside').write_text('x')
  seal = json.loads((copy / '10/digests.json').read_bytes())
  del seal['self']
  seal['files']['../outside'] = {'size': 1, 'xxh3_128': digests.of_file(copy / 'outside')}
  (copy / '10/digests.json').write_bytes(digests.canonical(seal | {'self': digests._self(seal)}))
  assert checkpoint.verify(copy, 10) == ['../outside: missing']


def test_a_checkpoint_deleted_under_the_readers_eyes_is_not_called_bad(copy, monkeypatch):
  seen = []
  def verify(directory, step):
    seen.append(step)
    if seen == [10]:
      save(directory, 20)
      shutil.rmtree(directory / '10')
      shutil.rmtree(directory / '9')
    return checkpoint.verify(directory, step)
  monkeypatch.setattr(catalogue, 'verify', verify)
  assert latest(copy) == (20, []) and seen == [10, 20]
