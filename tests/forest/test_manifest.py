"""demix/forest/: the manifest's edits are atomic, and what cannot be is refused."""

import json
import multiprocessing
import os
import signal

import pytest

from demix.errors import BadInput, Locked
from demix.forest import manifest, plan
from demix.runtime.workdir import hold


def entry(*parents, **more):
  weights = dict.fromkeys(parents, 1 / max(1, len(parents)))
  return {'kind': 'full', 'parents': weights, 'domains': ['d'], 'workdir': 'experts/x', 'step': 1,
          'content_digest': '0', 'artefacts': {}} | more


def make(folder, **experts):
  with manifest.edit(folder) as forest:
    forest['base'] = {'workdir': 'seed', 'step': 1, 'content_digest': '0'}
    forest['experts'] = experts
  return folder


def test_an_edit_is_written_whole_and_unknown_fields_survive(tmp_path):
  make(tmp_path, a=entry('seed', ours={'x': 1}))
  with manifest.edit(tmp_path) as forest:
    forest['experts']['b'] = entry('a')
    forest['ours too'] = [1]
  loaded = manifest.load(tmp_path)
  assert list(loaded['experts']) == ['a', 'b'] and loaded['ours too'] == [1]
  assert loaded['experts']['a']['ours'] == {'x': 1} and loaded['version'] == 1
  before = (tmp_path / manifest.FILE).stat().st_mtime_ns
  with manifest.edit(tmp_path):
    pass
  assert (tmp_path / manifest.FILE).stat().st_mtime_ns == before  # nothing to write


def add(folder, start, count):
  for i in range(start, start + count):
    with manifest.edit(folder) as forest:
      forest['experts'][f'e{i}'] = entry('seed')


def test_two_writers_at_once_lose_nothing(tmp_path):
  make(tmp_path)
  context = multiprocessing.get_context('spawn')
  writers = [context.Process(target=add, args=(tmp_path, s, 20)) for s in (0, 100, 200)]
  for w in writers:
    w.start()
  for w in writers:
    w.join()
    assert w.exitcode == 0
  assert len(manifest.load(tmp_path)['experts']) == 60


def killed(folder):
  with manifest.edit(folder) as forest:
    forest['experts'].clear()
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_edit_that_is_killed_or_fails_changes_nothing_and_holds_no_lock(tmp_path):
  make(tmp_path, a=entry('seed'))
  before = (tmp_path / manifest.FILE).read_bytes()
  child = multiprocessing.get_context('spawn').Process(target=killed, args=(tmp_path,))
  child.start()
  child.join()
  assert child.exitcode == -signal.SIGKILL
  with pytest.raises(ZeroDivisionError), manifest.edit(tmp_path) as forest:
    forest['experts'].clear()
    raise ZeroDivisionError
  with pytest.raises(BadInput, match="has parent 'nobody'"), manifest.edit(tmp_path) as forest:
    forest['experts']['b'] = entry('nobody')
  assert (tmp_path / manifest.FILE).read_bytes() == before
  add(tmp_path, 0, 1)


def test_a_writer_waits_for_another_and_not_forever(tmp_path):
  make(tmp_path)
  with hold(tmp_path, 'test'), pytest.raises(Locked), manifest.edit(tmp_path, wait=0.1):
    pass


@pytest.mark.parametrize(('experts', 'said'), [
    ({'a': entry('b'), 'b': entry('c'), 'c': entry('a')}, 'in a circle: a → b → c → a'),
    ({'a': entry('a')}, 'in a circle: a → a'), ({'a': entry('sed')}, "did you mean 'seed'"),
    ({'a': entry('seed', parents={'seed': 0.5})}, '1 together'),
    ({'a': entry('seed'), 'b': entry(parents={'seed': 1.5, 'a': -0.5})}, 'at least 0'),
    ({'a': {'kind': 'full'}}, 'has no parents, domains, workdir'), ({'seed': entry()}, "'seed'"),
    ({'a b': entry()}, "'a b'")])
def test_what_cannot_be_a_forest_is_refused(tmp_path, experts, said):
  with pytest.raises(BadInput, match=said):
    make(tmp_path, **experts)
  assert not (tmp_path / manifest.FILE).exists()


@pytest.mark.parametrize(('content', 'said'), [
    (None, 'no forest.json, so no forest'), ('{', 'not JSON'), ('[]', 'version None'),
    ('{"version": 2}', 'version 2, this demix reads 1')])
def test_what_cannot_be_read_is_refused(tmp_path, content, said):
  if content:
    (tmp_path / manifest.FILE).write_text(content)
  with pytest.raises(BadInput, match=said):
    manifest.load(tmp_path)


def test_order_and_descendants(tmp_path):
  make(tmp_path, d=entry('b', 'c'), c=entry('a'), b=entry('seed'), a=entry('seed'), e=entry())
  forest = manifest.load(tmp_path)
  order = manifest.order(forest)
  for name, found in forest['experts'].items():
    assert all(p == 'seed' or order.index(p) < order.index(name) for p in found['parents'])
  assert manifest.descendants(forest, 'a') == ['c', 'd']
  assert manifest.descendants(forest, 'd') == [] == manifest.descendants(forest, 'e')


def test_names(tmp_path):
  forest = manifest.load(make(tmp_path, legal=entry('seed')))
  with pytest.raises(BadInput, match="did you mean 'legal'"):
    manifest.require(forest, 'legl', tmp_path)
  with pytest.raises(BadInput, match='already'):
    manifest.free(forest, 'legal', tmp_path)
  with pytest.raises(BadInput, match='cannot be the name'):
    manifest.free(forest, 'seed', tmp_path)
  manifest.free(forest, 'news', tmp_path)


# ---- plans -------------------------------------------------------------------------------------


BASE = {'train': {'steps': 8, 'checkpoint_every': 2},
        'data': {'batch_size': 8, 'sequence_length': 4, 'domains': [], 'path': ''},
        'init': {'model': '', 'optimizer': 'fresh'}}


def planned(**experts):
  return {'base': BASE, 'seed': {'train': {'steps': 4}}, 'experts': experts}


def test_a_plan_is_the_base_with_changes_and_counts_tokens():
  found = planned(a={'domains': ['x'], 'changes': {'data': {'batch_size': 2}}},
                  b={'domains': ['y', 'z'], 'parent': 'seed@2'})
  plan.check(found, 'p')
  config = plan.config_of(found, 'a')
  assert config['data'] == BASE['data'] | {'batch_size': 2, 'domains': ['x']}
  assert BASE['data']['batch_size'] == 8  # untouched
  assert [plan.tokens_of(found, n) for n in ('seed', 'a', 'b')] == [128, 64, 256]
  assert plan.parents(found, 'b') == ('seed',) and plan.step_of(found, 'b') == 2
  assert plan.parents(planned(a={'domains': ['x'], 'parent': 'random'}), 'a') == ()


@pytest.mark.parametrize(('change', 'said'), [
    ({'experts': {'a': {'domains': []}}}, 'has no domains'),
    ({'experts': {'a': {'domains': ['x'], 'parent': 'sead'}}}, "did you mean 'seed'"),
    ({'experts': {'a': {'domains': ['x'], 'parnt': 'seed'}}}, "did you mean 'parent'"),
    ({'experts': {'a': {'domains': ['x'], 'parent': 'b'},
                  'b': {'domains': ['x'], 'parent': 'a'}}}, 'in a circle'),
    ({'experts': {'seed': {'domains': ['x']}}}, 'cannot be the name'),
    ({'seed': None, 'experts': {'a': {'domains': ['x']}}}, 'the plan has none')])
def test_what_cannot_be_a_plan_is_refused(change, said):
  with pytest.raises(BadInput, match=said):
    plan.check(planned() | change, 'p')
  with pytest.raises(BadInput, match='seed is missing'):
    plan.check({'base': BASE, 'experts': {}}, 'p')


@pytest.mark.parametrize('experts', [{}, [{'domains': ['x']}], [{'name': 'a'}, {'name': 'a'}], [1]])
def test_experts_are_a_list_and_have_names_of_their_own(experts):
  with pytest.raises(BadInput, match=r'experts are a list|no name of its own'):
    plan.named(planned() | {'experts': experts}, 'p')


def test_a_change_of_an_unknown_key_is_refused():
  found = planned(a={'domains': ['x'], 'changes': {'train': {'step': 2}}})
  with pytest.raises(BadInput, match=r"plan of a\.train: no key 'step' .*steps"):
    plan.config_of(found, 'a')


def test_the_quick_starts_forest_has_the_tokens_of_its_dense_run():
  import sys
  from pathlib import Path
  sys.path.insert(0, str(Path(__file__).parents[2]))
  from configs import forest_quickstart, quickstart
  found = plan.named(json.loads(json.dumps(forest_quickstart.get_config().to_dict())), 'p')
  assert tuple(found['experts']) == forest_quickstart.TRAIN
  plan.check(found, 'p')
  dense = quickstart.get_config('dense')
  names = ['seed', *found['experts']]
  assert sum(plan.tokens_of(found, n) for n in names) == (
      dense.train.steps * dense.data.batch_size * dense.data.sequence_length)
