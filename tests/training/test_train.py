"""demix/training/train.py: every kind of run, what it writes, and how it ends."""

import json
import math
import os
import shutil
import signal
import time

import corpus
import jax
import numpy as np
import pytest
import runs
from cases import some

from demix.checkpoints import checkpoint
from demix.config import domain_symbols
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.sampling.batches import Batches, DataConfig
from demix.data.tokens.store import TokenStore
from demix.eval import perplexity
from demix.loading.reference import load
from demix.model import loss
from demix.optim import together
from demix.runtime import digests, workdir
from demix.training import metrics

KINDS = {
    'dense': {},
    'dense proportional': {'data__sampling': 'proportional'},
    'dense weights': {'data__sampling': 'weights', **{
        f'data__weights__{d}': w for d, w in zip(corpus.DOMAINS, (1, 0, 0.5, 2))}},
    'domain token': {'data__domain_token': True},
    'demix': {'model__ffn': 'demix'},
    'demix every second': {'model__ffn': 'demix', 'model__expert_every': 2},
    'demix proportional': {'model__ffn': 'demix', 'data__sampling': 'proportional'},
    'documents': {'model__ffn': 'demix', 'data__packing': 'document'},
    'accumulation': {'model__ffn': 'demix', 'train__accumulation': 2},
    'bfloat16': {'model__ffn': 'demix', 'train__compute_dtype': 'bfloat16'},
}
DEMIX = KINDS['demix']


@pytest.fixture(scope='module')
def finished(stores, tmp_path_factory):
  """The workdir of a DEMix run of 8 steps; tests take copies."""
  folder = tmp_path_factory.mktemp('train') / 'W'
  ended = runs.train(stores.bytes, folder, **DEMIX)
  assert ended.code == 0 and ended.said() == []
  return folder


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'W', copy_function=shutil.copy2)


@pytest.mark.parametrize('kind', some(KINDS, (
    'dense weights', 'demix', 'domain token')))
def test_a_run_of_each_kind_and_what_it_logs(stores, tmp_path, kind):
  store = shutil.copytree(stores.bytes, tmp_path / 'store')  # document packing writes an index
  ended = runs.train(store, tmp_path / 'W', train__steps=3, **KINDS[kind])
  assert ended.code == 0 and ended.said() == []
  assert runs.digests(tmp_path / 'W').keys() == {3}
  rows = metrics.read(tmp_path / 'W')
  assert [row['step'] for row in rows] == [1, 2, 3]
  domains = [d for d in corpus.DOMAINS if (kind, d) != ('dense weights', 'code')]
  for row in rows:
    assert all(math.isfinite(x) for x in row.values())
    always = {'step', 'train/loss', 'train/grad_norm', 'train/learning_rate'}
    always |= {f'data/{d}/epochs' for d in corpus.DOMAINS}
    by_domain = {f'train/{d}/nll' for d in domains}
    rates = {'throughput/tokens_per_second', 'throughput/flops_per_second'}
    evaluation = {f'eval/{d}/nll' for d in corpus.DOMAINS} | {'eval/mean/nll'}
    last = row['step'] == 3
    assert always <= row.keys() and evaluation & row.keys() == (evaluation if last else set())
    assert row.keys() <= always | by_domain | rates | evaluation
    assert row['step'] == 1 or rates <= row.keys()
    if 'proportional' not in kind and 'weights' not in kind:
      assert by_domain <= row.keys()
    if 'document' not in kind and by_domain <= row.keys() and 'data__sampling' not in KINDS[kind]:
      mean = np.mean([row[f'train/{d}/nll'] for d in domains])  # equal tokens: the loss is the mean
      np.testing.assert_allclose(row['train/loss'], mean, rtol=1e-5)
    if last:
      mean = np.mean([row[f'eval/{d}/nll'] for d in corpus.DOMAINS])
      np.testing.assert_allclose(row['eval/mean/nll'], mean, rtol=1e-12)
  ledger = checkpoint.read_meta(tmp_path / 'W/checkpoints', 3)['ledger']
  tokens = {'domain token': 3 * 8 * 31}.get(kind, 3 * 8 * 32)
  assert ledger['tokens'] == tokens or (kind == 'documents' and 500 < ledger['tokens'] < tokens)
  assert rows[0]['train/loss'] == pytest.approx(math.log(257), abs=0.7)


@pytest.mark.parametrize('kind', some(['demix', 'documents', 'domain token'], ['documents']))
def test_the_first_loss_is_that_of_the_fresh_model_on_batch_0(stores, tmp_path, kind):
  """What the loop gives to the step: its batch, its seed, segments and positions of documents."""
  store = TokenStore.open(shutil.copytree(stores.bytes, tmp_path / 'store'))
  data = DataConfig(domains=corpus.DOMAINS, sequence_length=32, batch_size=8, packing='document')
  # A seed whose first batch has more than one document in a row.
  seed = next(s for s in range(4, 99) if Batches(store, data, s)[0]['segments_BL'].max() > 1)
  runs.train(store.path, tmp_path / 'W', train__steps=1, seed=seed, **KINDS[kind])
  loaded = load(str(tmp_path / 'W'))
  model, config = loaded.model, loaded.config
  params = jax.jit(model.init)(seed)
  batch = Batches(store, config.data, seed, symbols=domain_symbols(config))[0]
  def mean(**more):
    hidden, _, _ = model.apply(params, batch['tokens_BL'], batch['domain_B'], **more)
    nll = loss.nll(hidden, model.output_table(params), batch['targets_BL'],
                   model.config.vocab_size)
    return float((nll * batch['weights_BL']).sum() / batch['weights_BL'].sum())
  expected = mean(segments_BL=batch['segments_BL'], positions_BL=batch['positions_BL'])
  assert metrics.read(tmp_path / 'W')[0]['train/loss'] == pytest.approx(expected, rel=1e-6)
  assert (abs(mean() - expected) > 1e-4) == (kind == 'documents')


def test_evaluations_while_training_are_those_of_evaluate(finished, tmp_path):
  [*_, row] = metrics.read(finished)
  out = tmp_path / 'results.json'
  flags = [f'--model={finished}', '--split=valid', f'--domains={",".join(corpus.DOMAINS)}']
  assert runs.demix('evaluate', *flags, '--limit=64', f'--out={out}').code == 0
  for scored in json.loads(out.read_text())['rows']:
    assert row[f'eval/{scored["domain"]}/nll'] == pytest.approx(scored['nll'], rel=1e-6)


def test_the_header_says_what_runs(stores, tmp_path):
  ended = runs.train(stores.bytes, tmp_path / 'W', train__steps=1, **DEMIX)
  head = dict(line.split(maxsplit=1) for line in ended.out.splitlines()[:6]
              if not line.startswith('per step'))
  assert head['run'] == str(tmp_path / 'W') and head['devices'].startswith('1 × ')
  loaded = load(str(tmp_path / 'W'))
  total, active = loaded.model.counts()
  assert total > active and head['parameters'] == (
      f'{total / 1e3:.3g}k total, {active / 1e3:.3g}k active per token')
  flops = 256 * (6 * active + 12 * 2 * 32 * 16)
  assert f'per step    256 tokens, {flops / 1e6:.3g}M FLOPs' in ended.out
  for setting in ('model.ffn=demix', 'model.d_model=16', 'train.steps=1', 'model.vocab_size=257',
                  'optimizer.schedule_steps=8'):
    assert setting in head['config'].split(' ')
  assert 'step 1: valid perplexity legal ' in ended.out
  assert 'epochs      legal 0.0' in ended.out and 'done        step 1 in ' in ended.out


def test_evaluating_while_training_changes_no_number(finished, stores, tmp_path):
  runs.train(stores.bytes, tmp_path / 'W', train__eval_every=3, **DEMIX)
  rows = runs.rows(tmp_path / 'W')
  assert [row['step'] for row in rows] == list(range(1, 9)), 'one object a step'
  assert [row['step'] for row in rows if 'eval/mean/nll' in row] == [3, 6, 8]
  without = [{k: v for k, v in row.items() if not k.startswith('eval/') or row['step'] == 8}
             for row in rows]
  assert without == runs.rows(finished)
  assert runs.digests(tmp_path / 'W') == runs.digests(finished)


def test_log_every_logs_those_steps_and_the_last(finished, stores, tmp_path):
  runs.train(stores.bytes, tmp_path / 'W', train__log_every=3, train__eval_every=4, **DEMIX)
  rows = runs.rows(tmp_path / 'W')
  assert [row['step'] for row in rows] == [3, 4, 6, 8]
  assert [row['step'] for row in rows if 'train/loss' in row] == [3, 6, 8]
  losses = {row['step']: row['train/loss'] for row in runs.rows(finished)}
  assert {r['step']: r['train/loss'] for r in rows if 'train/loss' in r} == {
      s: losses[s] for s in (3, 6, 8)}


def test_checkpoints_are_kept_as_asked(stores, tmp_path):
  runs.train(stores.bytes, tmp_path / 'W', train__steps=11, train__checkpoint_every=2,
             train__max_to_keep=2, train__keep_every=4, **DEMIX)
  assert runs.digests(tmp_path / 'W').keys() == {4, 8, 10, 11}
  meta = checkpoint.read_meta(tmp_path / 'W/checkpoints', 8)
  assert (meta['step'], meta['data_index'], meta['skipped']) == (8, 8, 0)
  assert meta['ledger']['tokens'] == 8 * 256 and meta['domains'] == list(corpus.DOMAINS)
  assert meta['identity']['model.d_model'] == 16 and meta['config']['data']['batch_size'] == 8


def test_a_workdir_holds_what_the_contract_says(finished, stores):
  files = runs.files(finished)
  assert {p.split('/')[0] for p in files} == {'config.json', 'metrics.jsonl', 'data', 'checkpoints'}
  assert files['data/card.json'][0] == (stores.bytes / 'card.json').read_bytes()
  saved = json.loads(files['config.json'][0])
  assert saved.keys() == {'version', 'config', 'identity'} and saved['version'] == 1
  assert saved['config']['model']['experts'] == list(corpus.DOMAINS)
  assert saved['identity'] == checkpoint.read_meta(finished / 'checkpoints', 8)['identity']


def test_tensorboard_files_are_written_unless_turned_off(finished, stores, tmp_path):
  assert not (finished / 'tensorboard').exists()
  runs.train(stores.bytes, tmp_path / 'W', train__steps=1, train__tensorboard=True, **DEMIX)
  assert [p.name.startswith('events') for p in (tmp_path / 'W/tensorboard').iterdir()] == [True]


# ---- the same workdir again -------------------------------------------------------------------


def test_a_finished_workdir_says_so_and_nothing_changes(copy, stores):
  before = runs.files(copy)
  ended = runs.train(stores.bytes, copy, **DEMIX)
  assert (ended.code, ended.said()) == (0, [])
  assert ended.out == f'done already: step 8 of 8 in {copy}\n'
  assert runs.files(copy) == before


def test_another_experiment_is_refused_with_every_difference_and_nothing_is_written(
    copy, finished, stores):
  before = runs.files(copy)
  ended = runs.train(stores.bytes, copy, seed=3, data__batch_size=16, optimizer__clip=0.5,
                     train__steps=20, model__ffn='dense')
  message = ended.error(2)
  for difference in ('seed: 0 → 3', 'data.batch_size: 8 → 16', 'optimizer.clip: 1.0 → 0.5',
                     'model.ffn: "demix" → "dense"', 'another workdir'):
    assert difference in message
  assert 'train.steps' not in message and 'd_model' not in message
  message = runs.train(stores.bpe, copy, **DEMIX).error(2)
  for name in ('model.vocab_size: 257 → 300', 'data.fingerprint: "', 'tokenizer.fingerprint: "'):
    assert name in message
  assert runs.files(copy) == before
  shutil.rmtree(copy / 'checkpoints')  # it was killed before its first
  assert 'seed: 0 → 3' in runs.train(stores.bytes, copy, seed=3, **DEMIX).error(2)
  shutil.copytree(finished / 'checkpoints', copy / 'checkpoints')
  (copy / 'config.json').unlink()  # a checkpoint says it too
  assert 'seed: 0 → 3' in runs.train(stores.bytes, copy, seed=3, **DEMIX).error(2)
  assert not (copy / 'config.json').exists()


@pytest.fixture(scope='module')
def half(stores, tmp_path_factory):
  """8 of 12 updates of a schedule."""
  folder = tmp_path_factory.mktemp('half') / 'W'
  ended = runs.train(stores.bytes, folder, optimizer__schedule_steps=12, **DEMIX)
  assert ended.code == 0, ended
  return folder


def test_operational_fields_may_change_and_the_schedule_keeps_its_length(half, stores, tmp_path):
  copy, finished = shutil.copytree(half, tmp_path / 'W'), half
  store = shutil.copytree(stores.bytes, tmp_path / 'elsewhere')
  ended = runs.train(store, copy, train__steps=12, train__log_every=2, train__eval_every=5,
                     train__checkpoint_every=3, train__max_to_keep=0, execution__remat='full',
                     optimizer__schedule_steps=0, **DEMIX)
  assert ended.code == 0 and 'resumed     at step 8' in ended.out
  rows = metrics.read(copy)
  assert [row['step'] for row in rows] == [*range(1, 9), 10, 12]
  assert runs.rows(copy)[:8] == runs.rows(finished)
  assert runs.digests(copy).keys() == {4, 8, 9, 12}
  saved = json.loads((copy / 'config.json').read_text())
  assert saved['config']['optimizer']['schedule_steps'] == 12 and saved['config']['train'][
      'steps'] == 12
  rates = [row['train/learning_rate'] for row in rows]  # linear to 0 over the 12 of the first start
  assert rates == sorted(rates, reverse=True)
  assert rates[-2:] == pytest.approx([0.01 * 3 / 11, 0.01 / 11])


def test_a_damaged_config_file_is_refused(copy, stores):
  for text in ('{"config"', '{}', '{"identity": 3}'):
    (copy / 'config.json').write_text(text)
    before = runs.files(copy)
    assert f'{copy / "config.json"}: ' in runs.train(stores.bytes, copy, **DEMIX).error(2)
    assert runs.files(copy) == before


# ---- non-finite -------------------------------------------------------------------------------


def intact(folder, steps):
  directory = folder / 'checkpoints'
  assert checkpoint.steps(directory) == steps
  assert all(checkpoint.verify(directory, s) == [] for s in steps)


def test_a_rate_that_diverges_ends_the_run(stores, tmp_path):
  ended = runs.train(stores.bytes, tmp_path / 'W', optimizer__learning_rate=1e30, **DEMIX)
  message = ended.error(5)
  assert message.startswith('step 2: loss ') and 'optimizer.learning_rate' in message
  assert any(f'worst domain {d} at ' in message for d in corpus.DOMAINS)
  assert [row['step'] for row in metrics.read(tmp_path / 'W')] == [1]
  intact(tmp_path / 'W', [])


def plant(monkeypatch, step, domain):
  """From here on the batch of `step` has an infinite weight in a row of `domain`."""
  iterate = Batches.iterate

  def planted(self, start):
    for t, batch in enumerate(iterate(self, start), start):
      if t == step - 1:
        weights = batch['weights_BL'].copy()
        weights[list(batch['domain_B']).index(self.domains.index(domain)), 3] = np.inf
        batch = batch | {'weights_BL': weights}
      yield batch
  monkeypatch.setattr(Batches, 'iterate', planted)


@pytest.mark.parametrize('case', some(
    [(6, 'verse', [4]), (5, 'code', [4]), (8, 'kitchen', [4]), (4, 'legal', [])],
    [(6, 'verse', [4]), (4, 'legal', [])]))
def test_a_bad_batch_ends_the_run_and_a_good_one_goes_on_as_if_it_had_not_been(
    finished, stores, tmp_path, monkeypatch, case):
  step, domain, kept = case
  # The save of step 4 takes long: it is under way when step 5 or 6 ends the run.
  seal = digests.seal
  monkeypatch.setattr(digests, 'seal', lambda *a: (time.sleep(0.3), seal(*a)))
  with monkeypatch.context() as planted:
    plant(planted, step, domain)
    message = runs.train(stores.bytes, tmp_path / 'W', **DEMIX).error(5)
  assert f'step {step}: ' in message and f'worst domain {domain} at ' in message
  assert 'no parameter was changed' in message
  intact(tmp_path / 'W', kept)
  assert runs.rows(tmp_path / 'W') == runs.rows(finished)[:step - 1]
  assert runs.train(stores.bytes, tmp_path / 'W', **DEMIX).code == 0
  assert runs.rows(tmp_path / 'W') == runs.rows(finished)
  assert runs.digests(tmp_path / 'W')[8] == runs.digests(finished)[8]


def test_a_bad_expert_is_named_by_its_domain_and_its_checkpoint_is_not_touched(copy, stores):
  """A NaN in one expert of a checkpoint: that domain is the worst; nothing is written."""
  directory = copy / 'checkpoints'
  like = {n: jax.ShapeDtypeStruct(shape, dtype)
          for n, (shape, dtype) in checkpoint.names(directory, 8).items()}
  state = {n: np.array(x) for n, x in checkpoint.restore(directory, 8, like).items()}
  state['params/blocks/1/ffn/experts/verse/up'][0, 0] = np.nan
  state['optimizer/count'] += 1
  meta = checkpoint.read_meta(directory, 8)
  for added in ('version', 'leaves', 'content_digest', 'state_digest', 'step', 'updates'):
    del meta[added]
  with checkpoint.Checkpoints(directory, max_to_keep=0) as saver:
    saver.save(9, state, meta)
  before = runs.files(directory)
  message = runs.train(stores.bytes, copy, train__steps=12, optimizer__schedule_steps=3,
                       optimizer__restart=9, **DEMIX).error(5)
  assert 'step 10: loss nan' in message and 'worst domain verse at nan' in message
  assert runs.files(directory) == before


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  """A store whose first blocks are prompts only, of one domain, and of another all."""
  folder = tmp_path_factory.mktemp('prompts')
  for domain, prompt in (('asked', 400), ('plain', 0)):
    (folder / 'text' / domain).mkdir(parents=True)
    record = {'prompt': 'q' * prompt, 'completion': 'a' * 40} if prompt else {'text': 'ab ' * 300}
    for split in ('train', 'valid'):
      (folder / 'text' / domain / f'{split}.jsonl').write_text((json.dumps(record) + '\n') * 2)
  prepare(folder / 'text', folder / 'store', PrepareConfig(tokenizer='bytes'), lambda line: None)
  return folder / 'store'


def test_where_nothing_was_scored_there_is_no_number(prompts, tmp_path):
  """Not a loss of 0, a perplexity of 1.00, or a mean with these in it."""
  few = {'train__eval_sequences': 1, 'train__eval_every': 4, 'data__batch_size': 1,
         'train__tensorboard': True}
  ended = runs.train(prompts, tmp_path / 'A', data__domains='asked', **few)
  assert ended.code == 0 and 'step 8: valid perplexity asked -\n' in ended.out, ended
  rows = metrics.read(tmp_path / 'A')
  assert not any(n.startswith('eval/') for row in rows for n in row)
  blank = [row for row in rows if row['train/loss'] is None]
  assert 0 < len(blank) < len(rows)
  for row in rows:
    assert ('train/asked/nll' in row) == (row not in blank)
    assert (row['train/grad_norm'] is None) == (row in blank) and row['train/loss'] != 0
  updates = checkpoint.read_meta(tmp_path / 'A/checkpoints', 8)['updates']
  assert updates == len(rows) - len(blank)
  few['data__batch_size'] = 2
  ended = runs.train(prompts, tmp_path / 'B', data__domains='asked,plain', **few)
  assert ended.code == 0 and 'step 8: valid perplexity asked -, plain ' in ended.out, ended
  last = metrics.read(tmp_path / 'B')[-1]
  assert last['eval/mean/nll'] == last['eval/plain/nll'] > 0 and 'eval/asked/nll' not in last


# ---- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', some(['SIGTERM', 'SIGUSR1'], ['SIGTERM']))
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(stores, nursery, tmp_path, name):
  long = DEMIX | {'train__steps': 4000, 'train__checkpoint_every': 0,
                  'optimizer__schedule_steps': 4000}
  child = nursery.start('train', *runs.overrides(stores.bytes, tmp_path / 'W', **long))
  runs.until(lambda: len(metrics.read(tmp_path / 'W')) > 5)
  child.send(getattr(signal, name))
  message = child.wait().error(75)
  [step] = checkpoint.steps(tmp_path / 'W/checkpoints')
  assert message.startswith(f'{name}: saved step {step} of 4000') and 'same command' in message
  intact(tmp_path / 'W', [step])
  assert [r['step'] for r in metrics.read(tmp_path / 'W')] == list(range(1, step + 1))
  ended = runs.train(stores.bytes, tmp_path / 'W', **long | {'train__steps': step + 2})
  assert ended.code == 0 and f'resumed     at step {step}' in ended.out
  assert [r['step'] for r in metrics.read(tmp_path / 'W')] == list(range(1, step + 3))


@pytest.mark.parametrize('moment', some(['evaluation', 'save', 'start'], ['save']))
def test_a_signal_at_any_moment_ends_with_the_step_that_is_named_saved(
    finished, stores, tmp_path, monkeypatch, moment):
  module, name = {'evaluation': (perplexity, 'evaluate'), 'save': (checkpoint.Checkpoints, 'save'),
                  'start': (checkpoint, 'latest')}[moment]
  real, sent = getattr(module, name), []

  def call(*args, **more):
    if not sent:
      sent.append(os.kill(os.getpid(), signal.SIGTERM))
    return real(*args, **more)
  monkeypatch.setattr(module, name, call)
  more = {'train__eval_every': 2, 'train__checkpoint_every': 3 if moment == 'save' else 0}
  message = runs.train(stores.bytes, tmp_path / 'W', **DEMIX, **more).error(75)
  step = {'evaluation': 3, 'save': 4, 'start': 1}[moment]
  assert f'saved step {step} of 8' in message
  assert checkpoint.steps(tmp_path / 'W/checkpoints')[-1] == step
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  monkeypatch.setattr(module, name, real)
  assert runs.train(stores.bytes, tmp_path / 'W', **DEMIX).code == 0
  assert runs.digests(tmp_path / 'W')[8] == runs.digests(finished)[8]


def test_numbers_are_read_while_the_next_step_runs_and_its_batch_is_there(
    stores, tmp_path, monkeypatch):
  begin, seen = together.Each._begin, []
  def watched(self, i, batch):
    assert all(isinstance(x, jax.Array) for x in batch.values())  # copied before the step
    read, number = begin(self, i, batch), 1 + sum(what == 'begun' for what, _ in seen)
    seen.append(('begun', number))
    def numbers():
      seen.append(('read', number))
      return read()
    return numbers
  monkeypatch.setattr(together.Each, '_begin', watched)
  assert runs.train(stores.bytes, tmp_path / 'W', train__steps=4, **DEMIX).code == 0
  assert seen == [('begun', 1), ('begun', 2), ('read', 1), ('begun', 3), ('read', 2), ('begun', 4),
                  ('read', 3), ('read', 4)]


# ---- one process at a time --------------------------------------------------------------------


def test_a_second_process_is_refused_in_two_seconds_by_name(stores, copy):
  before = runs.files(copy)
  with workdir.hold(copy, 'train'):
    start = time.monotonic()
    ended = runs.fresh('train', *runs.overrides(stores.bytes, copy, train__steps=20, **DEMIX))
    seconds = time.monotonic() - start
  message = ended.error(6)
  assert f'pid {os.getpid()} ' in message and 'train' in message and seconds < 2
  assert runs.files(copy) == before and ended.out == ''


def test_a_training_process_holds_its_workdir_from_start_to_end(stores, nursery, tmp_path):
  flags = runs.overrides(stores.bytes, tmp_path / 'W', train__steps=4000, **DEMIX)
  child = nursery.start('train', *flags)
  runs.until((tmp_path / 'W/.lock').exists)
  runs.until((tmp_path / 'W/.lock').read_text)
  for condition in (lambda: True, (tmp_path / 'W/metrics.jsonl').exists):
    runs.until(condition)
    assert f'pid {child.pid} ' in nursery.run('train', *flags).error(6)
  child.send(signal.SIGTERM)
  child.wait().error(75)
  with workdir.hold(tmp_path / 'W'):
    pass
