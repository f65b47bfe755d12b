"""Exact resume: a run that was stopped, killed or damaged goes on as if nothing had happened.

"The same" is: every float of every line of metrics.jsonl that does not depend on the clock, and the
content digests of parameters and optimizer. (Other tests of the loop are in test_train.py.)
"""

import functools
import os
import random
import shutil
import signal
import time

import corpus
import pytest
import runs
from cases import some
from checkpoint_cases import flip

from demix.checkpoints import checkpoint
from demix.training import metrics

pytestmark = pytest.mark.exact

KINDS = {
    'dense': {},
    'demix': {'model__ffn': 'demix'},
    'demix proportional': {'model__ffn': 'demix', 'data__sampling': 'proportional'},
    'documents': {'model__ffn': 'demix', 'data__packing': 'document'},
    'schedule': {  # the stop is in the middle of it
        'model__ffn': 'demix', 'data__sampling': 'weights', 'data__domains': 'legal,code',
        'data__weights__legal': 1, 'data__weights__code': 0, 'data__schedule_kind': 'linear',
        'data__schedule': '3 legal=2 code=1, 6 code=5'},
    'accumulation': {'model__ffn': 'demix', 'train__accumulation': 2},
    'bfloat16': {'model__ffn': 'demix', 'train__compute_dtype': 'bfloat16'},
}


def training(workdir):
  """Rows without the evaluations, which a run does at its last step, wherever that is."""
  return [{k: v for k, v in row.items() if not k.startswith('eval/')} for row in runs.rows(workdir)]


# demix is killed below
@pytest.mark.parametrize('kind', some([k for k in KINDS if k != 'demix'],
                                      ('documents', 'schedule')))
def test_a_run_that_was_stopped_at_a_checkpoint_goes_on_to_the_bit(stores, tmp_path, kind):
  store = shutil.copytree(stores.bytes, tmp_path / 'store')  # document packing writes an index
  for name, stops in (('whole', (8,)), ('parts', (4, 8))):
    for steps in stops:
      assert runs.train(store, tmp_path / name, train__steps=steps, **KINDS[kind]).code == 0
  assert training(tmp_path / 'parts') == training(tmp_path / 'whole')
  assert [row['step'] for row in training(tmp_path / 'parts')] == list(range(1, 9))
  assert runs.digests(tmp_path / 'parts') == runs.digests(tmp_path / 'whole')
  assert runs.rows(tmp_path / 'parts')[-1] == runs.rows(tmp_path / 'whole')[-1]  # evaluation too


# ---- killed -----------------------------------------------------------------------------------

def long(steps):
  """A run that lasts long enough to be killed in."""
  return {'model__ffn': 'demix', 'train__steps': steps, 'optimizer__schedule_steps': steps,
          'train__checkpoint_every': 7, 'train__eval_every': steps // 2}


def last_step(workdir):
  rows = metrics.read(workdir)
  return rows[-1]['step'] if rows else 0


def storm(nursery, store, workdir, steps, kills, draw) -> int:
  """Starts, kills at random moments, and at last ends a run; returns how many kills cost steps."""
  lost, flags = 0, runs.overrides(store, workdir, **long(steps))
  for kill in range(kills):
    child = nursery.start('train', *flags)
    before = last_step(workdir)
    if draw.random() < 0.25:  # while it starts, restores or compiles
      time.sleep(draw.uniform(0, 2))
    else:
      goal = before + draw.randrange(1, max(2, (steps - before) // (kills - kill)))
      runs.until(lambda goal=goal: last_step(workdir) >= goal)
      time.sleep(draw.uniform(0, 0.05))
    child.send(signal.SIGKILL)
    assert child.wait().code in (-signal.SIGKILL, 0)
    logged, saved = last_step(workdir), checkpoint.steps(workdir / 'checkpoints')
    lost += logged > max(saved, default=0)
    if logged == steps:
      break
  ended = nursery.run('train', *flags)
  assert ended.code == 0 and ended.said() == []
  return lost


@pytest.fixture(scope='module')
def whole(stores, tmp_path_factory):
  """The uninterrupted run of so many steps, in an interpreter of its own, compiled anew: nothing is
  shared with the runs that are compared with it."""
  @functools.cache
  def run(steps):
    folder = tmp_path_factory.mktemp('whole')
    ended = runs.fresh('train', *runs.overrides(stores.bytes, folder / 'W', **long(steps)),
                       env={'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')})
    assert ended.code == 0, ended
    return folder / 'W'
  return run


def same(workdir, whole, last):
  rows = runs.rows(workdir)
  assert [row['step'] for row in rows] == list(range(1, last + 1))
  assert rows == runs.rows(whole)
  assert runs.digests(workdir)[last] == runs.digests(whole)[last]
  a, b = (checkpoint.read_meta(w / 'checkpoints', last) for w in (workdir, whole))
  assert a['leaves'] == b['leaves'] and a['content_digest'] == b['content_digest']
  assert {k: v for k, v in a['ledger'].items() if k != 'seconds'} == {
      k: v for k, v in b['ledger'].items() if k != 'seconds'}


def test_a_run_that_was_killed_twice_is_the_uninterrupted_one(
    stores, nursery, whole, tmp_path):
  lost = storm(nursery, stores.bytes, tmp_path / 'W', 24, 2, random.Random(3))
  assert lost, 'the kills did not cost steps: nothing was tested'
  same(tmp_path / 'W', whole(24), 24)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(4))
def test_a_kill_storm(stores, nursery, whole, tmp_path, seed):
  assert storm(nursery, stores.bytes, tmp_path / 'W', 80, 24, random.Random(seed)) >= 6
  same(tmp_path / 'W', whole(80), 80)


# ---- damaged ----------------------------------------------------------------------------------

EIGHT = KINDS['demix'] | {'optimizer__schedule_steps': 12}
TWELVE = EIGHT | {'train__steps': 12}


@pytest.fixture(scope='module')
def eight(stores, tmp_path_factory):
  """A run of 8 steps with checkpoints 4 and 8, and the same experiment run to 12 in one go."""
  folder = tmp_path_factory.mktemp('damage')
  assert runs.train(stores.bytes, folder / 'eight', **EIGHT).code == 0
  assert runs.train(stores.bytes, folder / 'twelve', **TWELVE).code == 0
  assert runs.digests(folder / 'eight').keys() == {4, 8}
  return folder / 'eight', folder / 'twelve'


def biggest(root):
  """The file of a checkpoint that holds the arrays."""
  return max((p for p in root.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    'a flipped bit': (biggest, flip(0.5)),
    'a flipped bit in meta.json': (lambda root: root / 'meta.json', flip(0.9)),
    'a truncated file': (biggest, lambda p: os.truncate(p, p.stat().st_size - 1)),
    'a missing file': (biggest, lambda p: p.unlink()),
}


@pytest.mark.parametrize('kind', some(DAMAGE, ['a flipped bit', 'a missing file']))
def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    eight, stores, tmp_path, kind):
  done, twelve = eight
  copy = shutil.copytree(done, tmp_path / 'W')
  find, damage = DAMAGE[kind]
  file = find(copy / 'checkpoints/8')
  damage(file)
  ended = runs.train(stores.bytes, copy, **TWELVE)
  assert ended.code == 0 and 'resumed     at step 4' in ended.out
  [warning] = ended.said()
  assert warning.startswith(f'warning: checkpoint {copy / "checkpoints/8"} is not used: ')
  assert str(file.relative_to(copy / 'checkpoints/8')) in warning
  assert runs.rows(copy) == runs.rows(twelve)
  assert runs.digests(copy)[12] == runs.digests(twelve)[12]
  assert [row['step'] for row in runs.rows(copy)] == list(range(1, 13))


def test_if_all_checkpoints_are_bad_nothing_is_trained_from_scratch(eight, stores, tmp_path):
  copy = shutil.copytree(eight[0], tmp_path / 'W')
  for step in (4, 8):
    flip(0.5)(biggest(copy / f'checkpoints/{step}'))
  before = runs.files(copy)
  ended = runs.train(stores.bytes, copy, **TWELVE)
  message = ended.error(4)
  assert 'bad: 8, 4' in message and 'delete them to start over' in message
  assert len(ended.said()) == 3 and ended.out == ''  # a warning for each
  assert runs.files(copy) == before


def test_without_checkpoints_a_run_starts_over(eight, stores, tmp_path):
  """What was killed before its first checkpoint: its lines go, the numbers are the same."""
  copy = shutil.copytree(eight[0], tmp_path / 'W')
  shutil.rmtree(copy / 'checkpoints')
  assert runs.train(stores.bytes, copy, **EIGHT).code == 0
  assert runs.rows(copy) == runs.rows(eight[0])
  assert runs.digests(copy) == runs.digests(eight[0])


def test_the_names_of_domains_change_labels_only(stores, eight, tmp_path):
  """The alphabet's order of the domains is turned around: every number stays."""
  names = dict(zip(sorted(corpus.DOMAINS), ('z', 'y', 'x', 'w')))
  text = corpus.write(tmp_path / 'text', names)
  store = corpus.store(text, tmp_path / 'store', names, tokenizer='bytes')
  assert runs.train(store, tmp_path / 'W', **EIGHT).code == 0
  def label(key):
    parts = key.split('/')
    return '/'.join(names.get(p, p) for p in parts)
  assert runs.rows(tmp_path / 'W') == [
      {label(k): v for k, v in row.items()} for row in runs.rows(eight[0])]
  a, b = (checkpoint.read_meta(w / 'checkpoints', 8) for w in (eight[0], tmp_path / 'W'))
  assert sorted(label(n) for n in a['leaves']) == sorted(b['leaves'])
  assert [a['config']['data']['domains'], a['identity']['data.fingerprint']] == [
      list(corpus.DOMAINS), b['identity']['data.fingerprint']]
