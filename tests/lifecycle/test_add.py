"""demix/lifecycle/add.py, workdirs.py, listing.py: an expert more, and nothing else changes."""

import dataclasses
import json
import shutil

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from demix.checkpoints import catalogue, checkpoint
from demix.config import Config
from demix.data.sampling.batches import DataConfig
from demix.data.tokens.store import TokenStore
from demix.eval import perplexity
from demix.eval.sequences import Protocol
from demix.lifecycle import workdirs
from demix.lifecycle.workdirs import with_domains
from demix.loading.reference import load
from demix.model.transformer import ModelConfig

NOVEL = corpus.NOVEL
FIVE = (*corpus.DOMAINS, NOVEL)


def add(model, source, workdir, *more, expert=NOVEL):
  return runs.demix('forest', 'add', f'--model={model}', f'--expert={expert}', f'--from={source}',
                    f'--workdir={workdir}', *more)


def newest(workdir):
  directory = workdir / 'checkpoints'
  return checkpoint.read_meta(directory, checkpoint.latest(directory))


def digests(workdir):
  return {n: leaf['digest'] for n, leaf in newest(workdir)['leaves'].items()}


def state(workdir):
  directory = workdir / 'checkpoints'
  step = checkpoint.latest(directory)
  like = {n: jax.ShapeDtypeStruct(*of) for n, of in checkpoint.names(directory, step).items()}
  return {n: np.asarray(x) for n, x in checkpoint.restore(directory, step, like).items()}


def logits(reference, domains):
  """Of the experts of `domains` on random rows."""
  loaded = load(str(reference))
  routes = jnp.array([loaded.domains.index(d) for d in domains])
  tokens = np.random.default_rng(1).integers(0, 257, (len(domains), 32))
  @jax.jit
  def compute(params, tokens, routes):
    hidden, _, _ = loaded.model.apply(params, tokens, routes)
    return hidden @ loaded.model.output_table(params).T
  return np.asarray(compute(loaded.params, tokens, routes))



@pytest.fixture(scope='module')
def grown(models, adapted, tmp_path_factory):
  """The DEMix LM with the novel domain's expert."""
  folder = tmp_path_factory.mktemp('grown') / 'W2'
  ended = add(models['demix'], adapted['better'], folder, '--require_gain')
  assert ended.code == 0 and ended.said() == []
  return folder


def test_old_experts_and_trunk_are_the_same_to_the_bit(models, grown):
  """Though the run that made the new expert had weight decay on, for 20 steps."""
  old, new = digests(models['demix']), digests(grown)
  assert newest(grown)['config']['optimizer']['weight_decay'] == 0.1
  assert {n: new[n] for n in old} == old
  assert {n for n in new if n not in old} == {
      n.replace('/verse', f'/{NOVEL}') for n in old if '/verse' in n}
  assert logits(models['demix'], corpus.DOMAINS).tobytes() == logits(
      grown, corpus.DOMAINS).tobytes()


def test_the_new_expert_is_the_one_that_was_trained(adapted, grown):
  a, w = state(adapted['better']), state(grown)
  seen = 0
  for name, leaf in w.items():
    if f'/experts/{NOVEL}/' in name:
      np.testing.assert_array_equal(leaf, a[name.replace(f'/experts/{NOVEL}', '')], err_msg=name)
      seen += 1
  assert seen == 3 * sum('/ffn/' in n and 'params/' in n for n in a) > 0  # and both moments
  taken, run = load(f'{grown}#{NOVEL}'), load(str(adapted['better']))
  assert taken.model.config == run.model.config
  for name, leaf in run.model.canonical(run.params).items():
    np.testing.assert_array_equal(taken.model.canonical(taken.params)[name], leaf, err_msg=name)
  assert w['optimizer/count'] == 40
  assert {n.split('/')[2]: int(w[n]) for n in w if n.startswith('optimizer/counts/')} == {
      **dict.fromkeys(corpus.DOMAINS, 40), NOVEL: 20}  # its run's


def test_the_workdir_says_what_it_is(models, adapted, grown, stores):
  meta, saved = newest(grown), json.loads((grown / 'config.json').read_text())
  assert {p.name for p in grown.iterdir()} == {'config.json', 'data', 'checkpoints'}
  assert catalogue.steps(grown / 'checkpoints') == [40] == [meta['step']]
  assert meta['domains'] == meta['config']['model']['experts'] == list(FIVE)
  assert meta['config']['data']['batch_size'] == 10  # two rows each, as before
  parts = [newest(models['demix']), newest(adapted['better'])]
  assert meta['ledger'] == {k: sum(p['ledger'][k] for p in parts) for k in meta['ledger']}
  assert meta['epochs'] == parts[0]['epochs'] | parts[1]['epochs']
  [record] = meta['lifecycle']
  assert saved['lifecycle'] == [record] and saved['identity'] == meta['identity']
  assert (record['operation'], record['expert'], record['parent']) == ('add', NOVEL, 'verse')
  assert record['from']['content_digest'] == parts[1]['content_digest']
  assert record['model']['content_digest'] == parts[0]['content_digest']
  assert json.loads((grown / 'data/card.json').read_text()) == json.loads(
      (stores.bytes / 'card.json').read_text())


def test_the_gate_is_what_evaluate_says(models, adapted, grown, stores):
  gate = newest(grown)['lifecycle'][0]['gate']
  store, part = TokenStore.open(stores.bytes), perplexity.Part(NOVEL, 'valid')
  for key, reference in (('parent_nll', f'{models["demix"]}#verse'), ('nll', adapted['better'])):
    one = load(str(reference))
    [score] = perplexity.evaluate(one.model, one.params, store, [part], protocol=Protocol(32))
    assert gate[key] == pytest.approx(score.mean_nll, rel=1e-6)
    assert gate['tokens'] == score.tokens
  assert gate['passed'] and gate['gain'] == gate['parent_nll'] - gate['nll'] > 0


def test_no_gain_is_flagged_and_refused_where_a_gain_is_required(models, adapted, tmp_path):
  refused = add(models['demix'], adapted['worse'], tmp_path / 'W2', '--require_gain')
  assert 'expert mixed has no gain over its parent on valid text of mixed' in refused.error(3)
  assert list(tmp_path.iterdir()) == []
  ended = add(models['demix'], adapted['worse'], tmp_path / 'W2')
  assert ended.code == 0
  assert '\nflagged     expert mixed has no gain over its parent code' in ended.out
  gate = newest(tmp_path / 'W2')['lifecycle'][0]['gate']
  assert not gate['passed'] and gate['gain'] < 0
  listed = runs.demix('forest', 'list', f'--model={tmp_path / "W2"}').out
  assert 'FLAGGED: no gain over its parent (-' in listed
  flag = 'W2: expert mixed did not beat its parent when it was added'
  table = runs.demix('evaluate', f'--model={tmp_path / "W2"}', '--domains=code', '--limit=2').out
  assert table.count(flag) == 1


@pytest.mark.long
def test_it_is_evaluated_listed_and_trained_on_like_any_workdir(grown, stores, tmp_path):
  copy = shutil.copytree(grown, tmp_path / 'W2')
  ended = runs.demix('evaluate', f'--model={copy}', f'--domains={NOVEL},code', '--limit=2')
  assert ended.code == 0 and 'held out' not in ended.out and 'did not beat' not in ended.out
  lines = runs.demix('forest', 'list', f'--model={copy}').out.splitlines()
  assert [line.split()[0] for line in lines] == ['expert', *FIVE, '(trunk)']
  assert 'added: from verse, on mixed, ' in lines[5] and '; gain ' in lines[5]
  flags = dict(model__ffn='demix', seed=5, optimizer__schedule_steps=4, optimizer__restart=40,
               data__domains=','.join(FIVE), train__steps=44)
  assert 'data.batch_size: 10 → 15' in runs.train(
      stores.bytes, copy, **flags, data__batch_size=15).error(2)
  ended = runs.train(stores.bytes, copy, **flags, data__batch_size=10)
  assert ended.code == 0 and 'resumed     at step 40' in ended.out
  assert [row['step'] for row in runs.rows(copy)] == [41, 42, 43, 44]
  saved = json.loads((copy / 'config.json').read_text())
  assert newest(copy)['lifecycle'] == saved['lifecycle'] == newest(grown)['lifecycle']


def test_a_second_expert_from_the_first_one(grown, stores, tmp_path):
  """What was added can be a parent; the run's store calls the domain by its name."""
  ended = runs.train(stores.bytes, tmp_path / 'A', data__domains=NOVEL, train__steps=2,
                     init__model=f'{grown}#{NOVEL}', init__trainable='ffn')
  assert ended.code == 0
  assert add(grown, tmp_path / 'A', tmp_path / 'W3', expert='second').code == 0
  old, new = digests(grown), digests(tmp_path / 'W3')
  assert {n: new[n] for n in old} == old
  assert [r['parent'] for r in newest(tmp_path / 'W3')['lifecycle']] == ['verse', NOVEL]


@pytest.mark.parametrize(('data', 'rows', 'weights'), [
    (dict(sampling='balanced', batch_size=8), 10, {}),
    (dict(sampling='proportional', batch_size=8), 8, {}),
    (dict(sampling='weights', batch_size=8, weights=dict.fromkeys('abcd', 2.0) | {'d': 6.0}), 8,
     {'a': 2.0, 'b': 2.0, 'c': 2.0, 'd': 6.0, 'e': 3.0})])
def test_the_config_of_more_domains(data, rows, weights):
  """Balanced: as many rows of each as before; weights: the new one gets the mean share."""
  config = Config(model=ModelConfig(ffn='demix'), data=DataConfig(domains=tuple('abcd'), **data))
  more = with_domains(config, tuple('abcde'))
  more.data.check()
  assert (more.data.batch_size, more.data.weights) == (rows, weights)
  assert more.model.experts == more.data.domains == tuple('abcde')
  assert with_domains(more, tuple('abcd')).data == config.data
  dense = with_domains(dataclasses.replace(config, model=ModelConfig()), tuple('abcde'))
  assert dense.model.experts == ()
  timed = dataclasses.replace(config, data=dataclasses.replace(
      config.data, sampling='weights', weights=dict.fromkeys('abcd', 1.0),
      schedule='5 a=2 d=3, 9 d=1', schedule_kind='linear'))
  fewer = with_domains(timed, tuple('abc')).data
  fewer.check()
  assert (fewer.schedule, fewer.schedule_kind) == ('5 a=2', 'linear')
  assert with_domains(timed, tuple('bc')).data.schedule_kind == 'piecewise'


def test_what_fails_while_it_is_written_leaves_nothing(models, adapted, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as patched:
    patched.setattr(workdirs, 'write_atomic', full)
    message = add(models['demix'], adapted['better'], tmp_path / 'W2').error(2)
  assert 'W2: cannot be made (No space left on device)' in message
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'W2').mkdir()  # an empty folder will do
  assert add(models['demix'], adapted['better'], tmp_path / 'W2').code == 0
  assert [p.name for p in tmp_path.iterdir()] == ['W2']


# ---- refusals ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def others(models, stores, tmp_path_factory):
  """Runs that are no source of an expert."""
  folder = tmp_path_factory.mktemp('others')
  kinds = {'all': dict(init__model=models['demix'], init__expert='verse'),
           'early': dict(init__model=f'{models["demix"]}@20', init__expert='verse',
                         init__trainable='ffn'),
           'two': dict(init__model=models['demix'], init__expert='verse', init__trainable='ffn',
                       data__domains=f'{NOVEL},code'),
           'dense': dict(init__model=models['dense'], init__trainable='ffn')}
  for name, changes in kinds.items():
    ended = runs.train(stores.bytes, folder / name, train__steps=1,
                       **{'data__domains': NOVEL} | changes)
    assert ended.code == 0, ended
  return {name: folder / name for name in kinds}


@pytest.mark.parametrize(('source', 'more', 'code', 'text'), [
    ('all', {}, 3, 'is not that of {demix}: blocks/0/attention/'),
    ('early', {}, 3, 'is not that of {demix}: blocks/0/attention/'),
    ('two', {}, 2, 'trained on mixed, code: an expert has one domain'),
    ('dense', {}, 2, 'did not start from an expert: train it with --config.init.model={demix}'),
    ('better', {'expert': 'code'}, 2, '--expert=code: {demix} has that expert already'),
    ('better', {'expert': 'a/b'}, 2, '--expert=a/b: not a name'),
    ('better', {'expert': 'nearest'}, 2, '--expert=nearest: not a name'),
    ('better', {'expert': ''}, 2, '--expert is missing'),
    ('better', {'model': '{dense}'}, 2, '{dense} is a dense LM and has no experts'),
    ('better', {'model': '{demix}#code'}, 2, 'names one expert: give the whole model'),
    ('better', {'model': '{demix}@7'}, 2, 'no checkpoint of step 7'),
    ('better', {'workdir': '{demix}'}, 2, 'is not empty, and nothing is overwritten'),
    ('better', {'data': '{bpe_store}'}, 2, 'is not the text that {better} trained on'),
])
def test_what_cannot_be_added_is_refused_in_one_line(models, adapted, others, stores, tmp_path,
                                                     source, more, code, text):
  places = models | adapted | others | {'bpe_store': stores.bpe}
  flags = {'model': '{demix}', 'expert': NOVEL, 'from': str(places[source]),
           'workdir': str(tmp_path / 'W2')} | more
  before = runs.files(models['demix'])
  ended = runs.demix('forest', 'add', *(
      f'--{k}={v.format(**places)}' for k, v in flags.items()))
  assert text.format(**places) in ended.error(code)
  assert ended.out == '' and list(tmp_path.iterdir()) == []
  assert runs.files(models['demix']) == before


def test_all_differences_of_the_trunk_are_counted(models, others, tmp_path):
  message = add(models['demix'], others['all'], tmp_path / 'W2').error(3)
  trunk = [n for n in digests(models['demix']) if 'params/' in n and '/experts/' not in n]
  assert message.count(': another value') == 6
  assert f'(and {len(trunk) - 6} more)' in message and 'init.trainable=ffn' in message


@pytest.mark.parametrize(('argv', 'text'), [
    ((), 'forest: no action given (known: plan, run, status, tree, verify, list, show, '
     'add, remove)'),
    (('ad',), "forest: no such action 'ad' (did you mean 'add'?)"),
    (('list',), '--model is missing'), (('add', '--model=W'), '--expert is missing'),
    (('add', '--model=W', '--expert=a'), '--from is missing'),
    (('add', '--model=W', '--expert=a', '--from=A'), '--workdir is missing'),
    (('add', '--modl=W'), "'modl'. Did you mean: model"),
    (('list', '--model=none'), "no such workdir 'none'")])
def test_what_is_typed_wrong(argv, text):
  assert text in runs.demix('forest', *argv).error(2)


@pytest.mark.parametrize('argv', [('--help',), ('list', '-h'), ('add', '--help')])
def test_help(argv):
  ended = runs.demix('forest', *argv)
  assert (ended.code, ended.err) == (0, '') and 'python -m demix forest' in ended.out
