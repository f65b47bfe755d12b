"""demix/lifecycle/remove.py, traces.py: the expert is gone, and what still holds it is named."""

import json
import os
import re
import shutil

import corpus
import jax
import numpy as np
import pytest
import runs

from demix.checkpoints import checkpoint
from demix.loading.reference import load
from demix.model.params import Model

NOVEL = corpus.NOVEL
LEFT = ('legal', 'verse', 'kitchen')


def remove(model, workdir, *more, expert='code'):
  return runs.demix('forest', 'remove', f'--model={model}', f'--expert={expert}',
                    f'--workdir={workdir}', *more)


def newest(workdir):
  directory = workdir / 'checkpoints'
  return checkpoint.read_meta(directory, checkpoint.latest(directory))


@pytest.fixture(scope='module')
def place(models, stores, tmp_path_factory):
  """A folder of runs around a DEMix LM, `code` removed from it."""
  F = tmp_path_factory.mktemp('removed')
  for name in ('dense', 'demix'):
    shutil.copytree(models[name], F / name)
  (F / 'demix/checkpoints/20.bad').mkdir()
  (F / 'foreign/checkpoints').mkdir(parents=True)
  def adapt(name, model, trainable='all', domain=NOVEL):
    ended = runs.train(stores.bytes, F / name, data__domains=domain, train__steps=1,
                       init__model=model, init__trainable=trainable)
    assert ended.code == 0, ended
  adapt('from_code', f'{F / "demix"}#code', 'ffn')
  adapt('from_from_code', F / 'from_code')
  adapt('from_legal', f'{F / "demix"}#legal', 'ffn')
  adapt('on_code', f'{F / "demix"}#legal', 'ffn', 'code')
  adapt('from_dense', F / 'dense', domain='legal')
  ended = runs.train(stores.bytes, F / 'verse_only', data__domains='verse', train__steps=1)
  assert ended.code == 0
  for name, experts in (('priors.json', ['legal', 'code']), ('priors-2.json', ['legal']),
                        ('prior.json', ['code'])):
    (F / 'demix' / name).write_text(json.dumps({'version': 1, 'priors': [
        {'experts': ['verse']}, {'experts': experts}]}))
  (F / 'verse_only/priors_bad.json').write_text('{')
  elsewhere = tmp_path_factory.mktemp('elsewhere')
  shutil.copytree(F / 'from_code', elsewhere / 'deep/er/copy')
  before = runs.files(F)
  ended = remove(F / 'demix', F / 'W2', f'--search={elsewhere}')
  assert ended.code == 0 and ended.said() == []
  after = runs.files(F)
  assert {p: after[p] for p in before} == before
  return F, elsewhere, ended.out


def test_leaves_moments_and_digests_are_gone_and_all_others_the_same(place):
  F = place[0]
  old, new = newest(F / 'demix')['leaves'], newest(F / 'W2')['leaves']
  gone = {n for n in old if '/experts/code/' in n or n == 'optimizer/counts/code'}
  assert new == {n: leaf for n, leaf in old.items() if n not in gone}
  assert {n.split('/blocks')[0] for n in gone} == {
      'params', 'optimizer/mu', 'optimizer/nu', 'optimizer/counts/code'}
  text = (F / 'W2/checkpoints/40/meta.json').read_text()
  assert not any(old[n]['digest'] in text for n in gone)
  meta = newest(F / 'W2')
  assert meta['domains'] == meta['config']['model']['experts'] == list(LEFT)
  assert meta['config']['data']['batch_size'] == 6 and 'code' not in meta['epochs']
  assert 'code' not in json.dumps([meta['config'], meta['identity']])
  assert meta['ledger'] == newest(F / 'demix')['ledger']


def test_outputs_are_those_of_a_model_built_without_the_expert(place):
  F = place[0]
  whole, rest = load(str(F / 'demix')), load(str(F / 'W2'))
  flat = {n: x for n, x in whole.model.canonical(whole.params).items() if '/code/' not in n}
  by_hand = Model(rest.model.config)
  params = by_hand.running(flat)
  tokens, routes = np.random.default_rng(0).integers(0, 257, (6, 32)), np.arange(6) % 3
  def hidden(model, params, routes):
    return np.asarray(jax.jit(lambda p, t, r: model.apply(p, t, r)[0])(params, tokens, routes))
  got = hidden(rest.model, rest.params, routes)
  assert got.tobytes() == hidden(by_hand, params, routes).tobytes()
  # And what the experts that stay computed before.
  old = np.array([whole.domains.index(d) for d in LEFT])[routes]
  assert got.tobytes() == hidden(whole.model, whole.params, old).tobytes()


def test_all_that_still_holds_it_is_named(place):
  F, elsewhere, out = place
  [record] = newest(F / 'W2')['lifecycle']
  assert (record['operation'], record['expert']) == ('remove', 'code')
  assert record['model']['content_digest'] == newest(F / 'demix')['content_digest']
  found = {os.path.relpath(e['path'], F): (e['checkpoints'], e['why']) for e in record['tainted']}
  assert found == {
      'demix': (['20', '40', '20.bad'], 'contains expert code, was trained on domain code'),
      'dense': (['20', '40'], 'was trained on domain code'),
      'from_code': (['1'], 'started from expert code'),
      'from_from_code': (['1'], f'started from {F / "from_code"}, which holds it'),
      'from_dense': (['1'], f'started from {F / "dense"}, which holds it'),
      'on_code': (['1'], 'was trained on domain code'),
      os.path.relpath(elsewhere / 'deep/er/copy', F): (['1'], 'started from expert code'),
      'demix/priors.json': ([], 'a prior over experts with code'),
      'verse_only/priors_bad.json': ([], 'priors that cannot be read: look for yourself')}
  for entry in record['tainted']:
    assert f'tainted     {entry["path"]}' in out and entry['why'] in out
  assert f'{F / "demix"}, checkpoints 20, 40, 20.bad: contains expert code' in out
  assert 'not unlearning' in record['residue'] and f'residue     {record["residue"]}' in out
  assert json.loads((F / 'W2/config.json').read_text())['lifecycle'] == [record]


@pytest.mark.long
def test_it_is_evaluated_listed_and_trained_on_like_any_workdir(place, stores, tmp_path):
  copy = shutil.copytree(place[0] / 'W2', tmp_path / 'W2')
  ended = runs.demix('evaluate', f'--model={copy}', '--domains=code,legal', '--limit=2')
  # Its trunk was trained on code, which is no new domain to it: the nearest that is left speaks.
  assert ended.code == 0 and 'held out' not in ended.out
  assert re.search(r'^code +[\d.]+ \[legal\]$', ended.out, re.M), ended.out
  lines = runs.demix('forest', 'list', f'--model={copy}').out.splitlines()
  assert [line.split()[0] for line in lines] == ['expert', *LEFT, '(trunk)', 'removed']
  assert '9 places still hold it or its data' in lines[-1] and 'not unlearning' in lines[-1]
  ended = runs.train(stores.bytes, copy, model__ffn='demix', seed=5, train__steps=42,
                     optimizer__schedule_steps=2, optimizer__restart=40,
                     data__domains=','.join(LEFT), data__batch_size=6)
  assert ended.code == 0 and 'resumed     at step 40' in ended.out
  assert newest(copy)['lifecycle'] == newest(place[0] / 'W2')['lifecycle']


def test_an_expert_that_was_started_from_it_is_named_too(models, adapted, tmp_path):
  F = tmp_path / 'F'
  F.mkdir()
  ended = runs.demix('forest', 'add', f'--model={models["demix"]}', f'--expert={NOVEL}',
                     f'--from={adapted["better"]}', f'--workdir={F / "W2"}')
  assert ended.code == 0
  assert remove(F / 'W2', F / 'W3', expert='verse').code == 0
  first, second = newest(F / 'W3')['lifecycle'][-1]['tainted']
  assert first == {'path': str(F / 'W3'), 'checkpoints': [],
                   'why': 'expert mixed was started from verse'}
  assert second['path'] == str(F / 'W2') and second['why'] == (
      'contains expert verse, expert mixed was started from verse, was trained on domain verse')
  # Taking away what was added gives back the model it was added to, to the bit.
  assert remove(F / 'W2', F / 'W4', expert=NOVEL).code == 0
  back, old = newest(F / 'W4'), newest(models['demix'])
  assert back['state_digest'] == old['state_digest'] and back['identity'] == old['identity']


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(('more', 'code', 'text'), [
    ({'expert': 'cod'}, 2, "--expert=cod: {demix} has no such expert (did you mean 'code'?)"),
    ({'expert': ''}, 2, '--expert is missing'),
    ({'model': '{dense}'}, 2, 'is a dense LM and has no experts'),
    ({'workdir': '{dense}'}, 2, 'is not empty, and nothing is overwritten'),
    ({'workdir': '{file}/W'}, 2, '{file}/W: cannot be a workdir (Not a directory)'),
    ({'search': '{none}'}, 2, '--search={none}: no such folder'),
])
def test_what_cannot_be_removed_is_refused_in_one_line(models, stores, tmp_path, more, code, text):
  places = models | {'file': stores.bytes / 'card.json', 'none': tmp_path / 'none'}
  flags = {'model': '{demix}', 'expert': 'code', 'workdir': str(tmp_path / 'W2')} | more
  ended = runs.demix('forest', 'remove', *(
      f'--{k}={v.format(**places)}' for k, v in flags.items()))
  assert text.format(**places) in ended.error(code)
  assert ended.out == '' and list(tmp_path.iterdir()) == []


def test_the_last_expert_stays(models, tmp_path):
  for i, expert in enumerate(corpus.DOMAINS[:3]):
    model = tmp_path / f'{i}' if i else models['demix']
    assert remove(model, tmp_path / f'{i + 1}', expert=expert).code == 0
  message = remove(tmp_path / '3', tmp_path / '4', expert='kitchen').error(3)
  assert 'kitchen is the last expert of ' in message and not (tmp_path / '4').exists()
