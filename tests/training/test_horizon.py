"""demix/training/horizon.py: nothing trains past its schedule, and both ways on from there work."""

import re
import shutil

import corpus
import numpy as np
import pytest
import runs

from demix.checkpoints import catalogue
from demix.forest import plan
from demix.optim.optimizer import AdamW, OptimizerConfig, schedule
from demix.training import metrics

pytestmark = pytest.mark.exact

DEMIX = {'model__ffn': 'demix', 'seed': 5}


def rates(workdir) -> dict:
  return {row['step']: row['train/learning_rate'] for row in metrics.read(workdir)}


def newest(workdir) -> dict:
  directory = workdir / 'checkpoints'
  return catalogue.read_meta(directory, catalogue.steps(directory)[-1])


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'wsd'])
def test_no_rate_is_below_its_end_nor_below_zero(kind):
  for final in (0.0, 0.1):
    config = OptimizerConfig(learning_rate=0.003, schedule=kind, final_ratio=final)
    for steps in (7, 19, 100, 333, 1000):
      after = np.asarray(schedule(config, steps)(np.arange(steps - 2, 3 * steps)))
      assert after.min() >= np.float32(0.003 * final), (steps, after.min())


def test_a_schedule_that_was_laid_out_anew_is_the_old_one_and_then_the_new():
  config = OptimizerConfig(learning_rate=0.01, restart=30)
  made = AdamW(config, 20, ((0, 40),))
  count = np.arange(60)
  old, new = (np.asarray(schedule(config, n)(count)) for n in (40, 20))
  expected = np.concatenate([old[:30], new[:30]])
  np.testing.assert_array_equal(made.rate(count), expected)
  np.testing.assert_array_equal(AdamW(config, 20).rate(count)[30:], expected[30:])


@pytest.fixture(scope='module')
def done(models, adapted, tmp_path_factory):
  """{name: workdir}: a run that is done, and what the lifecycle makes of it."""
  F = tmp_path_factory.mktemp('done')
  made = {'run': models['demix'], **{n: F / n for n in ('added', 'removed', 'merged')}}
  def demix(*argv):
    ended = runs.demix(*argv)
    assert ended.code == 0, ended
  run = made['run']
  demix('forest', 'add', f'--model={run}', f'--expert={corpus.NOVEL}',
        f'--from={adapted["better"]}', f'--workdir={F / "added"}')
  demix('forest', 'remove', f'--model={run}', '--expert=code', f'--workdir={F / "removed"}')
  demix('merge', f'--model=a={run}', f'--model=b={run}', f'--workdir={F / "merged"}')
  return made


@pytest.mark.parametrize('name', ['run', 'added', 'removed', 'merged'])
def test_past_the_schedule_is_refused_and_both_remedies_work(done, stores, tmp_path, name):
  W = shutil.copytree(done[name], tmp_path / 'W')
  domains = newest(W)['domains']
  flags = DEMIX | {'data__domains': ','.join(domains), 'data__batch_size': 2 * len(domains)}
  done_already = runs.train(stores.bytes, W, train__steps=40, **flags)
  assert f'done already: step 40 of 40 in {W}' in done_already.out
  before = runs.files(W)
  said = runs.train(stores.bytes, W, train__steps=44, optimizer__schedule_steps=0,
                    **flags).error(2)
  assert said.startswith('train.steps=44 is past the end of the schedule, optimizer.schedule_steps'
                         '=40, and 40 updates are done')
  here, elsewhere = '--config.optimizer.restart=40', f'--config.init.model={W}'
  assert here in said and elsewhere in said and 'optimizer.schedule_steps=44' in said
  assert runs.files(W) == before

  more = {'train__steps': 44, 'optimizer__schedule_steps': 0} | flags
  ended = runs.train(stores.bytes, W, **more, optimizer__restart=40)
  assert ended.code == 0 and 'schedule    anew from update 40 on, for 4' in ended.out, ended
  anew = [rates(W)[s] for s in range(41, 45)]
  assert anew == sorted(anew, reverse=True) and anew[0] == pytest.approx(0.01) and anew[-1] > 1e-3
  meta = newest(W)
  assert (meta['schedules'], meta['updates']) == ([[0, 40]], 44)
  assert (meta['identity']['optimizer.restart'], meta['identity']['optimizer.schedule_steps']) == (
      40, 4)
  assert 'optimizer.restart' not in newest(done[name])['identity']
  assert 'done already' in runs.train(stores.bytes, W, **more).out  # it is known without the flag
  assert 'restart=44' in runs.train(stores.bytes, W, **more | {'train__steps': 46}).error(2)
  assert 'restart: 40 → 39' in runs.train(stores.bytes, W, **more, optimizer__restart=39).error(2)

  if name in ('run', 'added'):
    ended = runs.train(stores.bytes, tmp_path / 'new', init__model=done[name],
                       **more | {'train__steps': 3})
    assert ended.code == 0 and rates(tmp_path / 'new')[2] == pytest.approx(0.01, rel=0.1), ended


def test_a_restarted_run_that_was_stopped_is_the_uninterrupted_one(done, stores, tmp_path):
  """Up to rounding also where it falls back to a checkpoint from before the restart."""
  flags = DEMIX | {'train__steps': 46, 'optimizer__schedule_steps': 0,
                   'optimizer__restart': 40, 'train__checkpoint_every': 2, 'train__max_to_keep': 0}
  found = {}
  for name in ('whole', 'stopped', 'fallen'):
    W = shutil.copytree(done['run'], tmp_path / name)
    if name == 'stopped':  # the length is that of the first restart
      assert runs.train(stores.bytes, W, **flags | {
          'train__steps': 43, 'optimizer__schedule_steps': 6}).code == 0
    if name == 'fallen':
      (W / 'checkpoints/40/meta.json').write_text('{}')
    ended = runs.train(stores.bytes, W, **flags)
    assert ended.code == 0, ended
    found[name] = runs.digests(W), [r['train/loss'] for r in metrics.read(W)]
  digests, losses = found['whole']
  assert found['stopped'][1] == losses
  assert [found['stopped'][0][step] for step in (42, 44, 46)] == [
      digests[step] for step in (42, 44, 46)]
  # Updates 21 to 40 are another program's than they were at first, at the same rates.
  np.testing.assert_allclose(found['fallen'][1], losses, rtol=1e-6)
  assert rates(tmp_path / 'fallen') == rates(tmp_path / 'whole')


def test_a_restart_that_cannot_be_is_refused(done, stores, tmp_path):
  W, flags = done['run'], DEMIX | {'train__steps': 46, 'optimizer__schedule_steps': 0}
  for restart, said in ((39, 'restart=39 lies before the 40 updates'), (-1, 'restart=-1'),
                        (41, 'restart=41 lies behind the end of the schedule, 40')):
    assert said in runs.train(stores.bytes, W, **flags, optimizer__restart=restart).error(2)
  assert 'train.steps=40 ends at 40 updates' in runs.train(
      stores.bytes, W, **flags | {'train__steps': 40}, optimizer__restart=40).error(2)
  fresh = tmp_path / 'fresh'
  assert 'has not trained yet' in runs.train(stores.bytes, fresh, **flags,
                                             optimizer__restart=8).error(2)
  said = runs.train(stores.bytes, fresh, train__steps=9, optimizer__schedule_steps=8).error(2)
  assert 'train.steps=9 is past' in said and 'give optimizer.schedule_steps=9' in said
  assert not (fresh / 'config.json').exists()
  ended = runs.train(stores.bytes, fresh, train__steps=2, optimizer__schedule_steps=1,
                     optimizer__schedule='constant')
  assert ended.code == 0, ended  # has no end


def test_a_branch_counts_the_updates_of_its_parent(models, stores, tmp_path):
  flags = {'init__model': f'{models["dense"]}@20', 'init__optimizer': 'continue',
           'data__domains': 'verse', 'data__batch_size': 2, 'optimizer__schedule_steps': 0}
  said = runs.train(stores.bytes, tmp_path / 'B', train__steps=21, **flags).error(2)
  assert 'train.steps=21 + 20 of the model it goes on from is past' in said
  assert 'optimizer.schedule_steps=41' in said and 'optimizer.restart=20' in said
  ended = runs.train(stores.bytes, tmp_path / 'B', train__steps=3, **flags | {
      'optimizer__restart': 20})
  assert ended.code == 0 and rates(tmp_path / 'B')[1] == pytest.approx(0.01), ended
  meta = newest(tmp_path / 'B')
  assert (meta['updates'], meta['init']['updates'], meta['schedules']) == (23, 20, [[0, 40]])
  # A branch of that branch goes on with the new schedule, which ends at 23.
  said = runs.train(stores.bytes, tmp_path / 'C', train__steps=1, **flags | {
      'init__model': tmp_path / 'B'}).error(2)
  assert 'optimizer.schedule_steps=3 from optimizer.restart=20 on' in said
  assert runs.train(stores.bytes, tmp_path / 'C', train__steps=1, **flags | {
      'init__model': tmp_path / 'B', 'optimizer__restart': 23}).code == 0
  assert newest(tmp_path / 'C')['schedules'] == [[0, 40], [20, 3]]


def planned(seed, branch, **optimizer) -> dict:
  config = {'data': {}, 'train': {'steps': 10, 'checkpoint_every': 5}, 'optimizer': {
      'schedule': 'linear', 'schedule_steps': 0} | optimizer, 'init': {'optimizer': 'fresh'}}
  expert = {'domains': ['d'], 'parent': 'seed', 'changes': branch}
  return {'base': config, 'seed': seed, 'experts': {'a': expert, 'b': expert | {'parent': 'a'}}}


GO_ON = {'init': {'optimizer': 'continue'}}


@pytest.mark.parametrize(('seed', 'branch', 'optimizer', 'said'), [
    ({}, {}, {}, ''),
    ({'optimizer': {'schedule_steps': 30}}, GO_ON, {}, ''),
    ({'optimizer': {'schedule_steps': 29}}, GO_ON, {},
     'b trains for 10 + 20 of its parents updates, past the end of its schedule at 29'),
    ({}, GO_ON, {}, 'a trains for 10 + 10 of its parents updates, past the end of its schedule at '
                    '10: give optimizer.schedule_steps=20'),
    ({}, GO_ON, {'schedule': 'constant'}, ''),
    ({}, {}, {'schedule_steps': 8}, 'seed trains for 10 updates, past the end'),
    ({}, GO_ON | {'optimizer': {'schedule_steps': 30}}, {}, ''),
])
def test_a_plan_past_its_schedule_is_refused(seed, branch, optimizer, said):
  content = planned(seed, branch, **optimizer)
  if not said:
    plan.check(content, 'own.py')
    return
  with pytest.raises(plan.BadInput, match=re.escape(f'own.py: {said}')):
    plan.check(content, 'own.py')
