"""A forest's life: experts from elsewhere, branch policies, gates, growing, removal."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from forests import TRAIN, config_file, forest
from test_forest import grown  # noqa: F401 (a fixture)

from demix.checkpoints import checkpoint
from demix.forest import manifest
from demix.lifecycle.workdirs import open_saved
from demix.loading.reference import load

BRANCH = {'train': {'steps': 4}, 'data': {'batch_size': 2}, 'init': {'optimizer': 'continue'}}


@pytest.fixture
def copy(grown, tmp_path):  # noqa: F811
  return shutil.copytree(grown, tmp_path / 'F')


@pytest.fixture(scope='module')
def elsewhere(grown, stores, tmp_path_factory):  # noqa: F811
  """A run on kitchen that started from the forest's seed, outside the forest."""
  folder = tmp_path_factory.mktemp('elsewhere') / 'W'
  ended = runs.train(stores.bytes, folder, init__model=grown / 'seed', init__optimizer='continue',
                     data__domains='kitchen', data__batch_size=2, train__steps=4,
                     train__checkpoint_every=2, train__max_to_keep=0)
  assert ended.code == 0, ended
  return folder


def plan_of(tmp_path, **more):
  old = {d: {'domains': [d], 'changes': BRANCH} for d in TRAIN}
  return config_file(tmp_path, **old, **more)


def replan(F, stores, tmp_path, **more):
  ended = forest('plan', f'--config={plan_of(tmp_path, **more)}', f'--forest={F}',
                 f'--data={stores.bytes}')
  assert ended.code == 0, ended


def leaves(workdir):
  step = checkpoint.latest(Path(workdir) / 'checkpoints')
  return open_saved(f'{workdir}@{step}', 'model').arrays()


def test_an_expert_from_elsewhere_is_copied_compared_and_shown(copy, elsewhere):
  ended = forest('add', f'--forest={copy}', '--expert=kitchen', f'--from={elsewhere}')
  assert ended.code == 0 and 'gate        kitchen: ' in ended.out, ended
  entry = manifest.load(copy)['experts']['kitchen']
  there = checkpoint.read_meta(elsewhere / 'checkpoints', 4)
  assert entry['parents'] == {'seed': 1.0} and entry['domains'] == ['kitchen']
  assert entry['content_digest'] == there['content_digest'] and entry['tokens'] == 4 * 2 * 32
  assert entry['gate']['gain'] == entry['gate']['parent_nll'] - entry['gate']['nll']
  assert checkpoint.steps(copy / 'experts/kitchen/checkpoints') == [4]
  shown = forest('show', f'--forest={copy}', '--expert=kitchen').out
  assert entry['content_digest'] in shown and 'seed' in shown
  assert f'gain {entry["gate"]["gain"]:.4f} nats' in forest('list', f'--forest={copy}').out
  assert 'every byte' in forest('verify', f'--forest={copy}').out
  before = runs.files(copy)
  said = forest('add', f'--forest={copy}', '--expert=kitchen', f'--from={elsewhere}').error(2)
  assert "has an expert 'kitchen' already" in said and runs.files(copy) == before


def half_written(W):
  shutil.rmtree(W / 'checkpoints/4')


def without_seal(W):
  for step in (2, 4):
    (W / f'checkpoints/{step}/digests.json').unlink()


def with_nan(W):
  meta = checkpoint.read_meta(W / 'checkpoints', 4)
  state = leaves(W)
  state['params/embed/tokens'] = state['params/embed/tokens'].copy()
  state['params/embed/tokens'][3, 3] = np.nan
  shutil.rmtree(W / 'checkpoints/4')
  added = ('version', 'leaves', 'content_digest', 'state_digest')
  with checkpoint.Checkpoints(W / 'checkpoints', max_to_keep=0) as saver:
    saver.save(4, state, {k: v for k, v in meta.items() if k not in added})


@pytest.mark.parametrize(('break_it', 'flags', 'said'), [
    (half_written, (), 'half-written: step 2 of 4'), (without_seal, (), 'no finished checkpoint'),
    (with_nan, (), 'params/embed/tokens is not finite'),
    (lambda W: None, ('--parent=sed',), "did you mean 'seed'"),
    (lambda W: None, ('--expert=seed',), 'cannot be the name'),
    (shutil.rmtree, (), 'no such workdir')])
def test_what_cannot_be_added_changes_nothing(copy, elsewhere, tmp_path, break_it, flags, said):
  W = shutil.copytree(elsewhere, tmp_path / 'W')
  break_it(W)
  before = runs.files(copy)
  assert said in forest('add', f'--forest={copy}', '--expert=new', f'--from={W}', *flags).error(2)
  assert runs.files(copy) == before


def test_an_expert_whose_parent_the_forest_lacks_is_refused_unless_one_is_named(
    copy, models, stores, tmp_path):
  ended = runs.train(stores.bytes, tmp_path / 'W', init__model=models['dense'], train__steps=2,
                     data__domains='kitchen', data__batch_size=2)
  assert ended.code == 0, ended
  add = ('add', f'--forest={copy}', '--expert=k', f'--from={tmp_path / "W"}')
  assert 'does not have: add that one first' in forest(*add).error(2)
  assert forest(*add, '--parent=none').code == 0
  assert manifest.load(copy)['experts']['k']['parents'] == {}


def test_the_gate_refuses_and_flags_what_learned_nothing(copy, stores, tmp_path):
  stuck = {'domains': ['kitchen'], 'changes': BRANCH | {'optimizer': {'learning_rate': 1e-30}}}
  replan(copy, stores, tmp_path, stuck=stuck)
  said = forest('run', f'--forest={copy}', '--require_gain').error(3)
  assert 'stuck has no gain over its parent' in said
  assert 'stuck' not in manifest.load(copy)['experts']
  ended = forest('run', f'--forest={copy}')
  assert ended.code == 0 and 'FLAGGED' in ended.out
  out = runs.demix('evaluate', f'--model=forest:{copy}', f'--data={stores.bytes}',
                   '--domains=code', '--limit=1').out
  assert 'expert stuck did not beat its parent' in out


def test_branches_start_from_what_the_plan_says(copy, stores, tmp_path):
  """A second round: posterior and given weights, a share of the seed; then removal of a parent."""
  even = {'legal': 0.25, 'code': 0.75}
  longer = BRANCH | {'optimizer': {'schedule_steps': 12}}  # the first round's ends at 8
  replan(copy, stores, tmp_path,
         late={'domains': ['kitchen'], 'parent': 'posterior', 'of': ['legal', 'code'],
               'changes': longer},
         given={'domains': ['kitchen'], 'parent': even, 'changes': longer},
         early={'domains': ['kitchen'], 'parent': 'seed@25%', 'changes': BRANCH},
         fresh={'domains': ['kitchen'], 'parent': 'random', 'changes': {'train': {'steps': 2}}})
  ended = forest('run', f'--forest={copy}')
  assert ended.code == 0, ended
  found = manifest.load(copy)['experts']
  assert found['given']['parents'] == even and found['fresh']['parents'] == {}
  assert found['early']['init']['step'] == 2 and found['early']['parents'] == {'seed': 1.0}
  weights = found['late']['parents']
  assert set(weights) == {'legal', 'code'} and sum(weights.values()) == pytest.approx(1)
  legal, code = (leaves(copy / 'experts' / n) for n in ('legal', 'code'))
  for name, w in (('given', even), ('late', weights)):
    made = leaves(copy / 'parents' / name)
    for leaf, array in made.items():
      if leaf != 'optimizer/count':
        exact = legal[leaf].astype(np.float64) * w['legal'] + code[leaf].astype(
            np.float64) * w['code']
        np.testing.assert_array_equal(array, exact.astype(np.float32), err_msg=leaf)
    meta = checkpoint.read_meta(copy / f'experts/{name}/checkpoints', 4)
    assert meta['init']['content_digest'] == found[name]['init']['content_digest']
  # Of two generations, with one ancestor.
  ended = runs.demix('merge', f'--model=forest:{copy}#late', f'--model=b=forest:{copy}#verse',
                     f'--workdir={tmp_path / "A"}')
  assert ended.code == 0, ended
  said = forest('remove', f'--forest={copy}', '--expert=legal').out
  for line in ('tainted     late: branched from legal', 'tainted     given: branched from legal',
               'parents/late, checkpoints', 'is an average of legal and others', f'{tmp_path}/A, '):
    assert line in said, said
  assert 'legal' not in manifest.load(copy)['plan']['experts']
  assert 'is there' in forest('run', f'--forest={copy}').out  # legal is not trained again
  assert not (copy / 'experts/legal').exists()


def test_a_prior_over_it_and_a_clusterer_are_tainted_when_an_expert_goes(copy, stores, tmp_path):
  made = runs.demix('prepare', f'--input={stores.bytes}', f'--out={tmp_path}/clusters',
                    '--discover=2')
  assert made.code == 0, made
  ended = runs.demix('evaluate', f'--model=forest:{copy}', f'--data={stores.bytes}', '--mix=cached',
                     '--domains=code', '--mix.blocks=4', f'--save_priors={tmp_path}/priors.json')
  assert ended.code == 0, ended
  said = forest('remove', f'--forest={copy}', '--expert=verse').out
  assert 'priors.json: a prior over experts with verse' in said
  assert 'clusters/clusterer: a clusterer that was fitted on text of verse' in said


def test_evaluating_with_a_fixed_prior_reads_k_experts(copy, stores, monkeypatch):
  read, restore = [], checkpoint.restore
  def spy(directory, *more, **options):
    read.append(Path(directory).parent.name)
    return restore(directory, *more, **options)
  monkeypatch.setattr(checkpoint, 'restore', spy)
  shutil.rmtree(copy / 'experts/verse/checkpoints/4/state')  # not opened at all
  ended = runs.demix(
      'evaluate', f'--model=forest:{copy}', f'--data={stores.bytes}',
      '--mix=configs/mix.py:uniform', '--mix.prior=fixed',
      '--mix.weights.legal=0.5', '--mix.weights.code=0.4', '--mix.weights.verse=0.1',
      '--mix.experts_k=2', '--domains=code,kitchen', '--limit=2')
  assert ended.code == 0, ended
  assert read == ['legal', 'code']


def test_the_parameters_of_k_experts_take_the_room_of_k(copy):
  whole = load(f'forest:{copy}')
  size = lambda params: sum(x.nbytes for x in jax.tree.leaves(params))
  one = size(load(f'forest:{copy}#code').params)
  assert size(whole.take(('legal', 'code')).params) == 2 * one


@pytest.mark.parametrize(('branch', 'said'), [
    ({'parent': {'legal': 0.5, 'code': 0.6}}, 'sum to 1.1'),
    ({'parent': {'legal': 1.5, 'code': -0.5}}, 'at least 0'),
    ({'parent': {'legl': 1.0}}, "did you mean 'legal'"),
    ({'parent': 'seed@3'}, 'with a checkpoint every 2'), ({'parent': 'seed@200%'}, '4 steps'),
    ({'parent': 'posterior', 'of': ['nobody']}, "'nobody'"),
    ({'parent': 'posterior', 'domains': ['kitchen', 'code']}, 'the text of one'),
    ({'parent': 'new'}, 'in a circle')])
def test_parents_that_cannot_be_are_refused(copy, stores, tmp_path, branch, said):
  before = (copy / manifest.FILE).read_bytes()
  file = plan_of(tmp_path, new={'domains': ['kitchen'], 'changes': BRANCH} | branch)
  assert said in forest('plan', f'--config={file}', f'--forest={copy}',
                        f'--data={stores.bytes}').error(2)
  assert (copy / manifest.FILE).read_bytes() == before


def test_verify_reads_what_lies_beside_the_checkpoints(copy):
  for file in ('experts/code/config.json', 'seed/data/card.json', 'experts/code/metrics.jsonl'):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    said = forest('verify', f'--forest={copy}').error(4)
    assert Path(file).name in said and Path(file).parts[-2 if 'data' not in file else 0] in said
    (copy / file).write_bytes(content)
  found = json.loads((copy / manifest.FILE).read_text())
  found['experts']['code']['tokens'] += 1
  (copy / manifest.FILE).write_text(json.dumps(found))
  assert 'forest.json: changed' in forest('verify', f'--forest={copy}').error(4)
