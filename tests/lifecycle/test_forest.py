"""The verb `forest`, and a forest as a Mixture: planned, grown, mixed, removed from."""

import json
import os
import shutil
import signal
from pathlib import Path

import corpus
import numpy as np
import pytest
import runs
from forests import TRAIN, config_file, digests, forest

import demix
from demix.checkpoints import checkpoint
from demix.data.tokens.store import TokenStore
from demix.eval import perplexity
from demix.eval.sequences import Protocol
from demix.forest import manifest
from demix.loading.reference import load
from demix.training import metrics

pytestmark = pytest.mark.exact

TEXT = corpus.document('code', 'some text to score 3')

@pytest.fixture(scope='module')
def grown(stores, tmp_path_factory):
  """A forest of three experts that are grown by its plan."""
  folder = tmp_path_factory.mktemp('forest') / 'me@host:a=b' / 'run#1@2'
  folder.mkdir(parents=True)  # names that references have signs of
  F = folder / 'F'
  planned = forest('plan', f'--config={config_file(folder)}', f'--forest={F}',
                   f'--data={stores.bytes}')
  assert planned.code == 0 and planned.out.splitlines()[-1] == 'tokens       1,536 in all', planned
  ended = forest('run', f'--forest={F}')
  assert ended.code == 0, ended
  return F


@pytest.mark.parametrize('domains', ['legal,code,verse', 'legal,code,verse,kitchen,mixed'])
def test_a_plan_of_ones_own_domains(stores, tmp_path, domains):
  """Three or five do not divide the eight sequences of the recipe's update."""
  F = tmp_path / 'F'
  planned = forest('plan', f'--config=configs/forest_domains.py:{domains}', f'--forest={F}',
                   f'--data={stores.bytes}')
  assert planned.code == 0 and list(manifest.load(F)['plan']['experts']) == domains.split(',')


def test_a_forest_of_ones_own_domains_grows(stores, tmp_path):
  (tmp_path / 'plan.py').write_text(
      'from ml_collections import ConfigDict\nfrom demix import settings\n'
      'from demix.config import Config\nfrom configs.forest_domains import plan_of\n'
      f'def get_config():\n  base, tiny = settings.to_dict(Config()), {runs.TINY!r}\n'
      '  for path, value in tiny.items():\n    group, key = path.split(".")\n'
      '    base[group][key] = value\n'
      f'  base["data"] |= dict(domains={TRAIN!r}, batch_size=3)\n'
      '  base["train"] |= dict(steps=2)\n  return ConfigDict(plan_of(base, 1))\n')
  planned = forest('plan', f'--config={tmp_path / "plan.py"}', f'--forest={tmp_path / "F"}',
                   f'--data={stores.bytes}')
  assert planned.code == 0 and 'tokens       192 in all' in planned.out, planned
  ended = forest('run', f'--forest={tmp_path / "F"}')
  assert ended.code == 0, ended
  assert set(manifest.load(tmp_path / 'F')['experts']) == set(TRAIN)


@pytest.fixture
def copy(grown, tmp_path):
  return shutil.copytree(grown, tmp_path / 'F')


def test_a_plan_becomes_a_seed_and_branches_that_go_on_from_it(grown):
  found = manifest.load(grown)
  assert list(found['experts']) == list(TRAIN) and found['base']['step'] == 4
  seed = [r['train/learning_rate'] for r in metrics.read(grown / 'seed')]
  for name, entry in found['experts'].items():
    assert entry['parents'] == {'seed': 1.0} and entry['domains'] == [name]
    assert (entry['steps'], entry['tokens'], entry['kind']) == (4, 4 * 2 * 32, 'full')
    meta = checkpoint.read_meta(grown / f'experts/{name}/checkpoints', 4)
    assert meta['content_digest'] == entry['content_digest']
    assert meta['init']['content_digest'] == found['base']['content_digest']
    rates = [r['train/learning_rate'] for r in metrics.read(grown / f'experts/{name}')]
    assert rates[0] < max(seed) and rates == sorted(rates, reverse=True)  # the schedule goes on
  assert len(set(digests(grown).values())) == 3


def test_the_forest_is_shown(grown):
  tree = forest('tree', f'--forest={grown}').out.splitlines()
  assert tree == ['seed: step 4', '├─ legal: step 4 on legal', '├─ code: step 4 on code',
                  '└─ verse: step 4 on verse']
  listed = forest('list', f'--forest={grown}').out.splitlines()
  assert [line.split()[0] for line in listed] == ['expert', *TRAIN]
  status = forest('status', f'--forest={grown}').out.splitlines()
  assert [line.split()[0] for line in status] == ['name', 'seed', *TRAIN]
  assert all('registered, step 4 of 4' in line for line in status[1:])


def test_running_again_trains_nothing(copy):
  before = runs.files(copy)
  ended = forest('run', f'--forest={copy}')
  assert ended.code == 0 and ended.out.count('is there') == 4
  assert runs.files(copy) == before


def test_an_expert_needs_its_own_data_and_its_parent_only(grown, stores, tmp_path):
  """In a folder with the manifest and the seed, on a store where other domains' text is gone."""
  F, store = tmp_path / 'F', shutil.copytree(stores.bytes, tmp_path / 'store')
  F.mkdir()
  shutil.copyfile(grown / manifest.FILE, F / manifest.FILE)
  with manifest.edit(F) as found:
    found['experts'] = {}
  shutil.copytree(grown / 'seed', F / 'seed')
  for domain in ('legal', 'verse', 'kitchen'):
    for split in ('train', 'valid', 'test'):
      file = store / domain / split / 'tokens.bin'
      file.write_bytes(bytes(file.stat().st_size))  # as long, all zeros
  ended = forest('run', f'--forest={F}', '--only=code', f'--data={store}')
  assert ended.code == 0, ended
  assert digests(F) == {'code': digests(grown)['code']}
  assert not (F / 'experts/legal').exists()


def test_an_interrupted_expert_is_the_uninterrupted_one(grown, copy):
  with manifest.edit(copy) as found:
    del found['experts']['verse']
  shutil.rmtree(copy / 'experts/verse/checkpoints/4')
  assert 'training, step 2 of 4' in forest('status', f'--forest={copy}').out
  ended = forest('run', f'--forest={copy}')
  assert ended.code == 0 and 'resumed     at step 2' in ended.out
  assert digests(copy) == digests(grown)


def test_a_signal_in_the_last_step_of_an_expert_begins_no_other(copy, monkeypatch):
  kept = digests(copy)
  with manifest.edit(copy) as found:
    for name in ('code', 'verse'):
      del found['experts'][name]
      shutil.rmtree(copy / f'experts/{name}')
  save, sent = checkpoint.Checkpoints.save, []
  def signalled(self, step, *args, **more):
    if step == 4 and not sent:  # the loop looks for signals before it saves, not after
      sent.append(os.kill(os.getpid(), signal.SIGTERM))
    return save(self, step, *args, **more)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', signalled)
  message = forest('run', f'--forest={copy}').error(75)
  assert message.startswith('SIGTERM: code is there; to be trained or registered: verse;')
  assert not (copy / 'experts/verse').exists() and 'code' in digests(copy)
  assert forest('run', f'--forest={copy}').code == 0
  assert digests(copy) == kept


def test_a_forest_is_a_mixture_of_its_experts(grown):
  lm = demix.load(f'forest:{grown}')
  assert lm.experts == TRAIN
  score = lm.score(TEXT)
  alone = [demix.load(f'forest:{grown}#{name}').score(TEXT).logp for name in TRAIN]
  mixed = np.log((score.weights * np.exp(alone)).sum(0))
  np.testing.assert_allclose(score.logp, mixed, atol=2e-5)
  by_workdir = demix.load(str(grown / 'experts/code')).score(TEXT)
  np.testing.assert_array_equal(by_workdir.logp, alone[1])
  one_hot = demix.load(f'forest:{grown}', prior={'code': 1.0}).score(TEXT)
  np.testing.assert_allclose(one_hot.logp, alone[1], atol=4e-6)
  out = lm.generate('def f', max_tokens=5, temperature=0)
  assert set(out.weights) == set(TRAIN)


def test_copies_of_the_seed_mix_to_the_seed(copy):
  with manifest.edit(copy) as found:
    for entry in found['experts'].values():
      entry |= found['base']
  mixed = demix.load(f'forest:{copy}').score(TEXT)
  np.testing.assert_allclose(mixed.logp, demix.load(str(copy / 'seed')).score(TEXT).logp, atol=4e-6)
  np.testing.assert_allclose(mixed.weights, 1 / 3, rtol=1e-6)


def test_a_fixed_prior_reads_only_the_experts_it_needs(copy, monkeypatch):
  weights = {'legal': 0.1, 'code': 0.6, 'verse': 0.3}
  read, restore = [], checkpoint.restore
  def spy(directory, *more, **options):
    read.append(Path(directory).parent.name)
    return restore(directory, *more, **options)
  monkeypatch.setattr(checkpoint, 'restore', spy)
  lm = demix.load(f'forest:{copy}', {'experts_k': 2}, prior=weights)
  assert read == ['code', 'verse'] and lm.experts == ('code', 'verse')
  two = demix.load(f'forest:{copy}', {'members': ('code', 'verse')},
                   prior={'code': 2 / 3, 'verse': 1 / 3})
  np.testing.assert_allclose(lm.score(TEXT).logp, two.score(TEXT).logp, atol=4e-6)


def test_evaluate_mixes_a_forest_and_gives_each_domain_its_expert(grown, stores, tmp_path):
  out = tmp_path / 'r.json'
  ended = runs.demix('evaluate', f'--model=forest:{grown}', f'--data={stores.bytes}',
                     '--mix=given,uniform,cached', '--domains=code,mixed', '--mix.blocks=4',
                     f'--out={out}')
  assert ended.code == 0, ended
  content = json.loads(out.read_text())
  rows = {(r['domain'], r['prior'], r['posterior']): r for r in content['rows']}
  one = load(f'forest:{grown}#code')
  [score] = perplexity.evaluate(one.model, one.params, TokenStore.open(stores.bytes),
                                [perplexity.Part('code', 'test')], protocol=Protocol(32))
  assert rows['code', None, None]['mix'] == 'expert:code'
  assert rows['code', None, None]['nll'] == pytest.approx(score.mean_nll, rel=1e-6)
  run = content['runs']['F']
  assert run['train_tokens'] == 4 * 6 * 32 + 3 * 4 * 2 * 32  # the seed and its branches
  assert run['params_total'] == 3 * run['params_active']
  plain = runs.demix('evaluate', f'--model=forest:{grown}', '--domains=code', '--limit=2')
  assert plain.code == 0, plain


def test_verify_names_expert_and_file_of_one_flipped_bit(copy):
  assert 'every byte is as it was written' in forest('verify', f'--forest={copy}').out
  for name in ('seed', 'experts/verse'):
    files = [p for p in (copy / name / 'checkpoints/4').rglob('*') if p.is_file()]
    for file in files:
      content = file.read_bytes()
      at = len(content) // 2
      file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
      said = forest('verify', f'--forest={copy}').error(4)
      assert f'{name.split("/")[-1]}: ' in said and file.name in said, (file, said)
      file.write_bytes(content)


def test_a_removed_expert_is_gone_and_its_descendants_are_named(copy, grown):
  with manifest.edit(copy) as found:
    found['experts']['late'] = found['experts']['verse'] | {'parents': {'legal': 0.5, 'code': 0.5}}
  removed = digests(copy)['legal']
  ended = forest('remove', f'--forest={copy}', '--expert=legal')
  assert ended.code == 0 and 'tainted     late: branched from legal' in ended.out
  assert 'not unlearning' in ended.out
  assert not (copy / 'experts/legal').exists() and removed not in digests(copy).values()
  assert manifest.load(copy)['experts']['late']['parents'] == {'code': 1.0}
  with manifest.edit(copy) as found:
    del found['experts']['late']
  left = demix.load(f'forest:{copy}').score(TEXT)
  never = demix.load(f'forest:{grown}', {'members': ('code', 'verse')}).score(TEXT)
  np.testing.assert_array_equal(left.logp, never.logp)


def test_experts_that_cannot_be_mixed_are_refused_with_every_difference(copy, models):
  shutil.copytree(models['bpe'], copy / 'experts/other')
  with manifest.edit(copy) as found:
    there = checkpoint.read_meta(models['bpe'] / 'checkpoints', 40)
    found['experts']['other'] = found['experts']['code'] | {
        'workdir': 'experts/other', 'step': 40, 'content_digest': there['content_digest']}
  with pytest.raises(Exception, match=r'other tokenizer=.*; other model\.vocab_size=300'):
    load(f'forest:{copy}')


@pytest.mark.parametrize(('break_it', 'said'), [
    (lambda F: shutil.rmtree(F / 'experts/code'), 'checkpoint'),
    (lambda F: (F / 'experts/code/checkpoints/4/digests.json').unlink(), 'checkpoint'),
    (lambda F: shutil.rmtree(F / 'experts'), 'checkpoint')])
def test_a_forest_with_a_broken_expert_says_which(copy, break_it, said):
  break_it(copy)
  with pytest.raises(Exception, match=said):
    load(f'forest:{copy}')


@pytest.mark.parametrize(('argv', 'said'), [
    (['run'], '--forest is missing'), (['run', '--forest=/no/such'], 'no forest.json'),
    (['remove', '--forest={F}', '--expert=cod'], "did you mean 'code'"),
    (['run', '--forest={F}', '--only=cod'], "did you mean 'code'"),
    (['plan', '--forest={F}'], '--config is missing'), (['grow'], 'no such action'),
    (['tree', '--forest=/no/such'], 'no forest.json')])
def test_what_is_asked_wrongly_is_one_line(grown, argv, said):
  assert said in forest(*(a.format(F=grown) for a in argv)).error(2)


def test_a_branch_without_its_seed_and_another_plan_are_refused(copy, stores, tmp_path):
  with manifest.edit(copy) as found:
    found['base'] = None
    found['experts'] = {}
  shutil.rmtree(copy / 'seed')
  said = forest('run', f'--forest={copy}', '--only=code').error(2)
  assert 'code branches from seed, which is not trained yet' in said


def test_a_plan_does_not_change_under_what_is_trained(copy, stores, tmp_path):
  other = {d: {'domains': [d], 'changes': {'train': {'steps': 3}}} for d in TRAIN}
  file = config_file(tmp_path, **other)
  before = (copy / manifest.FILE).read_bytes()
  said = forest('plan', f'--config={file}', f'--forest={copy}', f'--data={stores.bytes}').error(2)
  assert 'legal is there already, by another plan' in said
  file = config_file(tmp_path, new={'domains': ['nosuch']})
  said = forest('plan', f'--config={file}', f'--forest={copy}', f'--data={stores.bytes}').error(2)
  assert "no such domain" in said
  for changes, why in (({'optimizer': {'clip': -1}}, 'new: optimizer.clip=-1.0 is out of range'),
                       ({'init': {'limit': 3}}, 'new: init.limit=3 has no effect')):
    file = config_file(tmp_path, new={'domains': ['mixed'], 'changes': changes})
    said = forest('plan', f'--config={file}', f'--forest={copy}', f'--data={stores.bytes}').error(2)
    assert why in said
  assert (copy / manifest.FILE).read_bytes() == before
