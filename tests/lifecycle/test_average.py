"""The verb `merge`: whole LMs averaged into an ordinary workdir."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs

import demix
from demix.checkpoints import checkpoint
from demix.lifecycle import average
from demix.lifecycle.workdirs import Saved
from demix.loading.reference import load

DOMAINS = ('verse', 'code')


@pytest.fixture(scope='module')
def branches(models, stores, tmp_path_factory):
  """{name: workdir}: two branches of the dense LM."""
  folder = tmp_path_factory.mktemp('branches') / 'a@b:c=d#e'  # signs of references
  for name in DOMAINS:
    ended = runs.train(stores.bytes, folder / name, init__model=models['dense'],
                       init__optimizer='continue', data__domains=name, data__batch_size=2,
                       train__steps=4, optimizer__schedule_steps=60)
    assert ended.code == 0, ended
  return {name: folder / name for name in DOMAINS}


def merge(workdir, *models, **flags):
  flags = [f'--{k}={v}' if v is not True else f'--{k}' for k, v in flags.items()]
  return runs.demix('merge', *(f'--model={m}' for m in models), f'--workdir={workdir}', *flags)


def leaves(workdir):
  directory = workdir / 'checkpoints'
  step = checkpoint.latest(directory)
  return checkpoint.read_meta(directory, step)


def arrays(workdir):
  loaded = load(str(workdir))
  return {n: np.asarray(x, np.float64) for n, x in loaded.model.canonical(loaded.params).items()}


def test_given_weights_are_the_weighted_sum_and_name_their_parents(branches, tmp_path, models):
  ended = merge(tmp_path / 'W', *branches.values(), weights='0.3,0.7')
  assert ended.code == 0, ended
  a, b = (arrays(branches[n]) for n in DOMAINS)
  for name, leaf in arrays(tmp_path / 'W').items():
    np.testing.assert_array_equal(leaf, (0.3 * a[name] + 0.7 * b[name]).astype(np.float32))
  meta = leaves(tmp_path / 'W')
  [record] = meta['lifecycle']
  assert [(p['name'], p['weight'], p['content_digest']) for p in record['parents']] == [
      (n, w, leaves(branches[n])['content_digest']) for n, w in zip(DOMAINS, (0.3, 0.7))]
  assert leaves(models['dense'])['content_digest'] in record['ancestors']
  assert meta['domains'] == list(DOMAINS) and 'init' not in meta
  # Both branches and, once, the model that they came from.
  assert meta['ledger']['tokens'] == 2 * 4 * 2 * 32 + 40 * 8 * 32
  assert sum(p['tokens'] for p in record['phases'].values()) == meta['ledger']['tokens']


def test_copies_and_one_hot_weights_are_that_model_to_the_bit(branches, models, tmp_path):
  own = leaves(branches['code'])['content_digest']
  assert merge(tmp_path / 'A', f'a={branches["code"]}', f'b={branches["code"]}',
               f'c={branches["code"]}').code == 0
  assert leaves(tmp_path / 'A')['content_digest'] == own
  assert merge(tmp_path / 'B', *branches.values(), weights='0,1').code == 0
  assert leaves(tmp_path / 'B')['content_digest'] == own
  assert leaves(tmp_path / 'B')['state_digest'] == leaves(branches['code'])['state_digest']


def test_counts_of_updates_are_the_largest(models, tmp_path):
  a, b = (Saved(models['demix'], step, meta, None) for step in (20, 40) for meta in [
      checkpoint.read_meta(models['demix'] / 'checkpoints', step)])
  old = {'optimizer/counts/verse', 'optimizer/counts/code'}  # the second knows none of these
  b.meta['leaves'] = {n: x for n, x in b.meta['leaves'].items() if n not in old}
  state = average.averaged({'a': a, 'b': b}, [0.5, 0.5])
  counts = {n: int(x.make()) for n, x in state.items() if n.startswith('optimizer/count')}
  assert len(counts) == 5 and set(counts.values()) == {40}


@pytest.mark.long
def test_the_result_is_evaluated_and_trains_on(branches, stores, tmp_path):
  assert merge(tmp_path / 'W', *branches.values()).code == 0
  ended = runs.demix('evaluate', f'--model={tmp_path / "W"}', '--domains=code', '--limit=2')
  assert ended.code == 0, ended
  assert demix.load(str(tmp_path / 'W')).experts == ('model',)
  ended = runs.train(stores.bytes, tmp_path / 'on', init__model=tmp_path / 'W', train__steps=2,
                     init__optimizer='continue', data__domains='verse,code',
                     optimizer__schedule_steps=60)
  assert ended.code == 0, ended
  same = runs.train(stores.bytes, tmp_path / 'W', data__domains='verse,code', data__batch_size=4,
                    optimizer__schedule_steps=60, train__steps=6)
  assert same.code == 0 and 'resumed     at step 4' in same.out, same


def test_the_posterior_weights_are_the_cached_prior_on_dev_text(branches, tmp_path):
  ended = merge(tmp_path / 'W', *branches.values(), weights='posterior', domain='verse')
  assert ended.code == 0, ended
  record = leaves(tmp_path / 'W')['lifecycle'][0]
  weights = {p['name']: p['weight'] for p in record['parents']}
  assert weights['verse'] > 0.8 and record['domain'] == 'verse'
  assert merge(tmp_path / 'M', *branches.values(), weights='argmax', domain='verse').code == 0
  assert leaves(tmp_path / 'M')['content_digest'] == leaves(branches['verse'])['content_digest']


def test_the_guard_refuses_a_result_that_is_worse_than_its_best_parent(branches, tmp_path):
  said = merge(tmp_path / 'W', *branches.values(), weights='0,1', guard='verse').error(3)
  assert 'worse than its best parent on valid text of verse' in said and 'verse has' in said
  assert list(tmp_path.iterdir()) == []
  ended = merge(tmp_path / 'W', *branches.values(), weights='1,0', guard='verse')
  assert ended.code == 0
  guard = leaves(tmp_path / 'W')['lifecycle'][0]['guard']['verse']
  assert guard[''] == guard['verse'] <= guard['code']


def test_models_without_a_common_ancestor_are_refused(branches, stores, models, tmp_path):
  ended = runs.train(stores.bytes, tmp_path / 'other', seed=9, train__steps=2)
  assert ended.code == 0, ended
  said = merge(tmp_path / 'W', branches['code'], tmp_path / 'other').error(3)
  assert 'no common ancestor' in said and not (tmp_path / 'W').exists()
  assert merge(tmp_path / 'W', branches['code'], tmp_path / 'other', unrelated=True).code == 0


def test_every_difference_is_named(branches, stores, models, tmp_path):
  said = merge(tmp_path / 'W', branches['code'], f'other={models["bpe"]}').error(3)
  assert 'other tokenizer=' in said and 'model.vocab_size=300' in said and 'embed/tokens' in said


def test_groups_of_leaves_hold_what_they_may(monkeypatch):
  monkeypatch.setattr(average, '_GROUP', 100)
  leaves = {'a': ((20,), 'float32'), 'b': ((5,), 'float32'), 'c': ((50,), 'float32'),
            'd': ((2,), 'float32')}
  assert [list(g) for g in average.groups(leaves)] == [['a', 'b'], ['c'], ['d']]


@pytest.mark.parametrize(('flags', 'said'), [
    ({'weights': '0.5'}, '1 weights for 2 models'), ({'weights': '0.5,0.6'}, 'sum to 1.1'),
    ({'weights': '1.5,-0.5'}, 'at least 0'), ({'weights': 'unifrm'}, 'or one of uniform'),
    ({'weights': 'posterior'}, 'without --domain'),
    ({'weights': 'argmax', 'domain': 'nosuch'}, 'nosuch'), ({'guard': 'nosuch'}, 'nosuch')])
def test_what_cannot_be_averaged_is_one_line(branches, tmp_path, flags, said):
  assert said in merge(tmp_path / 'W', *branches.values(), **flags).error(2)
  assert not (tmp_path / 'W').exists()


def test_too_few_models_and_taken_folders_are_refused(branches, tmp_path):
  assert '1 models to average' in merge(tmp_path / 'W', branches['code']).error(2)
  assert '--model is missing' in merge(tmp_path / 'W').error(2)
  full = shutil.copytree(branches['code'], tmp_path / 'full')
  assert 'is not empty' in merge(full, *branches.values()).error(2)
  assert 'are named' in merge(tmp_path / 'W', branches['code'], branches['code']).error(2)


@pytest.mark.long
def test_it_takes_two_leaves_and_a_gigabyte_whatever_the_size_of_the_parents(tmp_path):
  """Parents and result of 16 × 100 MB each."""
  done = subprocess.run(
      [sys.executable, runs.ROOT / 'benchmarks/merge.py', '--parents=2', '--leaves=16',
       '--megabytes=100', '--repeats=1', f'--folder={tmp_path}', f'--json={tmp_path / "found"}'],
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  peak = json.loads((tmp_path / 'found').read_text())['peak_megabytes']
  assert peak['average']['max'] <= 2 * 100 + 1000
  assert peak['read and write']['max'] > 1600  # what it is spared
