"""Several experts trained side by side in one process are those that were trained apart."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from cases import some
from forests import TRAIN, config_file, digests, forest
from jax.sharding import AbstractMesh
from models import tiny

from demix.checkpoints import checkpoint
from demix.data.sampling.batches import Batches
from demix.errors import BadInput
from demix.forest import manifest
from demix.model import sharding
from demix.optim import together
from demix.runtime import processes, workdir
from demix.training import metrics

pytestmark = pytest.mark.exact


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


def change(F, only=TRAIN, **changes):
  """Changes the plan of branches; `changes` have __ for a dot: train__lift='map'."""
  with manifest.edit(F) as found:
    for name in only:
      branch = found['plan']['experts'][name]
      for path, value in changes.items():
        group, key = path.split('__')
        branch['changes'].setdefault(group, {})[key] = value


def same(F, apart):
  """Leaves of parameters and optimizer, numbers and ledgers are the same to the bit."""
  for name in TRAIN:
    ours, theirs = F / f'experts/{name}', apart / f'experts/{name}'
    assert runs.digests(ours) == runs.digests(theirs), name
    assert runs.rows(ours) == runs.rows(theirs), name
    last = max(runs.digests(ours))
    a, b = (checkpoint.read_meta(w / 'checkpoints', last) for w in (ours, theirs))
    assert a['leaves'] == b['leaves'] and a['identity'] == b['identity']
    assert {k: v for k, v in a['ledger'].items() if k != 'seconds'} == {
        k: v for k, v in b['ledger'].items() if k != 'seconds'}
  assert digests(F) == digests(apart)


def close(F, apart):
  """Numbers agree within rounding."""
  for name in TRAIN:
    ours, theirs = (metrics.read(folder / f'experts/{name}') for folder in (F, apart))
    for a, b in zip(ours, theirs, strict=True):
      for key in a.keys() - {k for k in a if k.startswith('throughput/')}:
        assert a[key] == pytest.approx(b[key], rel=1e-4), (name, key)


def last_step(workdir):
  rows = metrics.read(workdir)
  return rows[-1]['step'] if rows else 0


# ---- the same ---------------------------------------------------------------------------------

# In a loop's body XLA makes the same of a step only where it optimizes: launch/test.sh.
WORDS = some(['threads', 'map'], ['threads'])


@pytest.mark.parametrize('word', WORDS)
def test_together_is_apart_to_the_bit(copy, apart, word):
  change(copy, train__lift=word)
  ended = forest('run', f'--forest={copy}', '--together')
  assert ended.code == 0, ended
  assert ended.out.count('to be trained') == 3 and ended.out.count('for each of 3 runs') == 2
  same(copy, apart)


def test_vmap_agrees_and_clips_each_by_its_own_norm(copy, apart):
  change(copy, train__lift='vmap')
  assert forest('run', f'--forest={copy}', '--together').code == 0
  close(copy, apart)
  norms = [metrics.read(copy / f'experts/{name}')[0]['train/grad_norm'] for name in TRAIN]
  assert min(norms) > 1 and len(set(norms)) == 3  # above the clip of 1, and not one for all


@pytest.mark.parametrize('word', WORDS)
def test_what_was_begun_alone_goes_on_together_from_wherever_each_is(apart, tmp_path, word):
  """One is done, one is at step 2, one was not begun: they end one after another."""
  F = shutil.copytree(apart, tmp_path / 'F')
  with manifest.edit(F) as found:
    found['experts'] = {}
  change(F, train__lift=word)
  shutil.rmtree(F / 'experts/code/checkpoints/4')
  shutil.rmtree(F / 'experts/verse')
  ended = forest('run', f'--forest={F}', '--together')
  assert ended.code == 0 and 'code: resumed     at step 2' in ended.out, ended
  same(F, apart)


@pytest.mark.long
def test_what_was_begun_together_goes_on_alone(copy, apart):
  assert forest('run', f'--forest={copy}', '--together').code == 0
  with manifest.edit(copy) as found:
    found['experts'] = {}
  for name in TRAIN:
    shutil.rmtree(copy / f'experts/{name}/checkpoints/4')
  ended = forest('run', f'--forest={copy}', '--only=verse')
  assert ended.code == 0 and 'resumed     at step 2' in ended.out
  assert forest('run', f'--forest={copy}').code == 0
  same(copy, apart)


@pytest.mark.long
def test_over_the_expert_axis_they_are_those_of_one_device(copy, apart):
  change(copy, mesh__expert=4)  # 3 runs over 4 x 2 devices
  ended = runs.fresh('forest', 'run', f'--forest={copy}', '--together',
                     env=runs.devices(8))
  assert ended.code == 0 and '(expert=4 data=2)' in ended.out, ended
  close(copy, apart)


# ---- stopped ----------------------------------------------------------------------------------

LONG = {'train__steps': 150, 'train__checkpoint_every': 7, 'optimizer__schedule_steps': 160}


@pytest.fixture(scope='module')
def whole(seeded, tmp_path_factory):
  """Long branches, trained one after another."""
  F = shutil.copytree(seeded, tmp_path_factory.mktemp('whole') / 'F')
  change(F, **LONG)
  assert forest('run', f'--forest={F}').code == 0
  return F


@pytest.mark.long
def test_killed_together_they_go_on_together_and_alone(copy, whole, nursery):
  change(copy, **LONG)
  run = 'forest', 'run', f'--forest={copy}'
  for goal in (10, 60):
    child = nursery.start(*run, '--together')
    runs.until(lambda goal=goal: last_step(copy / 'experts/verse') >= goal)
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
  assert nursery.run(*run, '--only=code').code == 0
  ended = nursery.run(*run, '--together')
  assert ended.code == 0 and 'resumed' in ended.out and ended.said() == []
  same(copy, whole)


@pytest.mark.long
def test_a_signal_saves_all_and_exits_75(copy, whole, nursery):
  change(copy, **LONG)
  child = nursery.start('forest', 'run', f'--forest={copy}', '--together')
  runs.until(lambda: last_step(copy / 'experts/verse') >= 10)
  child.send(signal.SIGTERM)
  message = child.wait().error(75)
  [step] = {checkpoint.steps(copy / f'experts/{name}/checkpoints')[-1] for name in TRAIN}
  for name in TRAIN:
    assert f'step {step} of 150 in {copy / "experts" / name}' in message
  assert message.startswith('SIGTERM: saved ') and 'same command' in message
  assert nursery.run('forest', 'run', f'--forest={copy}', '--together').code == 0
  for name in TRAIN:
    last = [runs.digests(F / f'experts/{name}')[150] for F in (copy, whole)]
    assert last[0] == last[1]
    assert runs.rows(copy / f'experts/{name}') == runs.rows(whole / f'experts/{name}')


def test_a_non_finite_expert_is_named_and_the_others_keep_what_they_saved(
    copy, apart, monkeypatch):
  iterate = Batches.iterate
  def planted(self, start):
    for t, batch in enumerate(iterate(self, start), start):
      bad = self.domains == ('code',) and t == 2
      yield batch | {'weights_BL': batch['weights_BL'] * np.inf} if bad else batch
  with monkeypatch.context() as patch:
    patch.setattr(Batches, 'iterate', planted)
    message = forest('run', f'--forest={copy}', '--together').error(5)
  assert message.startswith('code: step 3: loss nan') and 'worst domain code at' in message
  for name in TRAIN:
    directory = copy / f'experts/{name}/checkpoints'
    assert checkpoint.steps(directory) == [2] and checkpoint.verify(directory, 2) == []
  assert forest('run', f'--forest={copy}', '--together').code == 0
  same(copy, apart)


def test_every_workdir_is_held(copy):
  before = runs.files(copy)
  with workdir.hold(copy / 'experts/verse', 'train'):
    message = forest('run', f'--forest={copy}', '--together').error(6)
  assert str(copy / 'experts/verse') in message and f'pid {os.getpid()}' in message
  assert runs.files(copy) == before


# ---- who goes together ------------------------------------------------------------------------

def test_who_cannot_go_together_trains_apart_and_it_is_said_why(copy, apart):
  change(copy, ('code',), data__batch_size=4)
  ended = forest('run', f'--forest={copy}', '--together')
  assert ended.code == 0, ended
  assert 'code: apart from legal: data.batch_size 2 and 4\n' in ended.out
  assert ended.out.count('for each of 2 runs') == 2
  for name in ('legal', 'verse'):
    assert runs.digests(copy / f'experts/{name}') == runs.digests(apart / f'experts/{name}')
  assert manifest.load(copy)['experts']['code']['tokens'] == 4 * 4 * 32


def test_a_branch_of_a_branch_waits_for_its_parent(copy):
  with manifest.edit(copy) as found:
    found['plan']['experts']['verse']['parent'] = 'legal'
  said = forest('run', f'--forest={copy}', '--together').error(2)  # before anything is trained
  assert 'verse trains for 4 + 8 of its parents updates, past the end of its schedule at 8' in said
  assert list(manifest.load(copy)['experts']) == []
  change(copy, only=('verse',), optimizer__schedule_steps=12)
  ended = forest('run', f'--forest={copy}', '--together')
  assert ended.code == 0 and ended.out.count('for each of 2 runs') == 2, ended
  found = manifest.load(copy)['experts']
  meta = checkpoint.read_meta(copy / 'experts/verse/checkpoints', 4)
  assert meta['init']['content_digest'] == found['legal']['content_digest']


@pytest.mark.parametrize(('changes', 'said'), [
    ({'train__lift': 'vamp'}, "train.lift='vamp': no such choice (did you mean 'vmap'?)"),
    ({'train__lift': 'map', 'mesh__expert': 1, 'mesh__data': 3}, 'does not fit')])
def test_what_cannot_be_is_refused(copy, changes, said):
  change(copy, **changes)
  assert said in forest('run', f'--forest={copy}', '--together').error(2)
  assert not (copy / 'experts/legal/config.json').exists()


def test_several_processes_do_not_each_hold_all_of_them(copy, monkeypatch):
  monkeypatch.setattr(processes, 'count', lambda: 2)
  message = forest('run', f'--forest={copy}', '--together').error(2)
  assert message.startswith('3 runs together in 2 processes') and '--only=NAME' in message
  assert not (copy / 'experts/legal/config.json').exists()


def test_demix_lms_are_not_spread_over_the_axis_of_their_own_experts():
  dense, demix = (SimpleNamespace(
      mesh=AbstractMesh((4, 2, 1, 1), sharding.AXES), model=tiny(ffn=ffn))
      for ffn in ('dense', 'demix'))
  assert together.chosen('auto', dense) == 'vmap'
  with pytest.raises(BadInput, match=r'train\.lift=threads over mesh\.expert=4'):
    together.chosen('threads', dense)
  for word in ('auto', 'threads', 'map', 'vmap'):
    with pytest.raises(BadInput, match=r'several DEMix LMs over mesh\.expert=4'):
      together.chosen(word, demix)
