"""Several experts trained side by side in one process are those that were trained apart."""

import shutil

import pytest
import runs
from test_forest import TRAIN, config_file, digests, forest

from demix import checkpoint
from demix.forest import manifest


@pytest.fixture(scope='module')
def seeded(stores, tmp_path_factory):
  """A forest with a plan of three branches, of which only the seed is trained."""
  folder = tmp_path_factory.mktemp('seeded')
  F = folder / 'F'
  assert forest('plan', f'--config={config_file(folder)}', f'--forest={F}',
                f'--data={stores.bytes}').code == 0
  assert forest('run', f'--forest={F}', '--only=seed').code == 0
  return F


@pytest.fixture(scope='module')
def apart(seeded, tmp_path_factory):
  """Its branches trained one after another."""
  F = shutil.copytree(seeded, tmp_path_factory.mktemp('apart') / 'F')
  assert forest('run', f'--forest={F}').code == 0
  return F


@pytest.fixture
def copy(seeded, tmp_path):
  return shutil.copytree(seeded, tmp_path / 'F')


def lift(F, word, **changes):
  """Changes `train.lift` in the plan (train of every branch, `changes` of single ones)."""
  with manifest.edit(F) as found:
    for name, branch in found['plan']['experts'].items():
      branch['changes']['train']['lift'] = word
      for path, value in changes.get(name, {}).items():
        group, key = path.split('.')
        branch['changes'].setdefault(group, {})[key] = value


def same(F, apart):
  """Leaves of parameters and optimizer, numbers and ledgers are the same to the bit."""
  for name in TRAIN:
    ours, theirs = F / f'experts/{name}', apart / f'experts/{name}'
    assert runs.digests(ours) == runs.digests(theirs), name
    assert runs.rows(ours) == runs.rows(theirs), name
    a, b = (checkpoint.read_meta(w / 'checkpoints', 4) for w in (ours, theirs))
    assert a['leaves'] == b['leaves'] and a['identity'] == b['identity']
    assert {k: v for k, v in a['ledger'].items() if k != 'seconds'} == {
        k: v for k, v in b['ledger'].items() if k != 'seconds'}
  assert digests(F) == digests(apart)


@pytest.mark.parametrize('word', ['queue', 'map'])
def test_together_is_apart_to_the_bit(copy, apart, word):
  lift(copy, word)
  ended = forest('run', f'--forest={copy}', '--together')
  assert ended.code == 0, ended
  assert ended.out.count('to be trained') == 3 and ended.out.count('for each of 3 runs') == 2
  same(copy, apart)
