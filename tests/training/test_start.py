"""start.py, state.py: training from a model that exists, all of it or its FFNs."""

import json
import shutil
import signal

import corpus
import jax
import numpy as np
import pytest
import runs

from demix.checkpoints import checkpoint
from demix.data.sampling.batches import Batches
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval import perplexity
from demix.eval.given import find_nearest
from demix.eval.nearest import compare
from demix.eval.sequences import Protocol
from demix.loading.reference import load
from demix.model.sharding import MeshConfig, make_mesh
from demix.optim.optimizer import AdamW
from demix.optim.state import canonical_state, running_state
from demix.optim.step import Program
from demix.training import metrics

pytestmark = pytest.mark.exact

NOVEL = corpus.NOVEL
# Weight decay is on (0.1, the default): what is not frozen by structure would move.
ADAPT = {'data__domains': NOVEL, 'train__steps': 6, 'optimizer__schedule_steps': 6,
         'train__checkpoint_every': 2, 'train__max_to_keep': 0}


def adapt(store, workdir, model, **changes):
  return runs.train(store, workdir, init__model=model, **ADAPT | changes)


def leaves(workdir, prefix='params/'):
  """{name: content digest} of the newest checkpoint."""
  directory = workdir / 'checkpoints'
  found = checkpoint.read_meta(directory, checkpoint.latest(directory))['leaves']
  return {n.removeprefix(prefix): leaf['digest'] for n, leaf in found.items()
          if n.startswith(prefix)}


def numbers(reference):
  loaded = load(str(reference))
  return {n: np.asarray(x) for n, x in loaded.model.canonical(loaded.params).items()}


@pytest.fixture(scope='module')
def frozen(models, stores, tmp_path_factory):
  """A workdir: expert legal of the DEMix LM, its FFNs trained on the novel domain."""
  folder = tmp_path_factory.mktemp('start') / 'A'
  ended = adapt(stores.bytes, folder, models['demix'], init__expert='legal', init__trainable='ffn')
  assert ended.code == 0 and ended.said() == []
  assert f'starts from {models["demix"]}, step 40, expert legal\n' in ended.out
  return folder


def test_frozen_leaves_stay_to_the_bit_and_all_others_move(models, frozen):
  before, after = numbers(f'{models["demix"]}#legal'), numbers(frozen)
  assert before.keys() == after.keys() and any('/ffn/' in n for n in after)
  for name in before:
    same = before[name].tobytes() == after[name].tobytes()
    assert same == ('/ffn/' not in name), name
    if '/ffn/' in name and before[name].size > 16:
      assert np.mean(before[name] != after[name]) > 0.99, name
  # The trunk has the digests it has in the DEMix LM, under the same names.
  trunk = {n: d for n, d in leaves(frozen).items() if '/ffn/' not in n}
  assert trunk == {n: d for n, d in leaves(models['demix']).items() if '/ffn/' not in n}


def test_its_checkpoint_is_complete_and_has_moments_of_what_was_trained(frozen):
  params = leaves(frozen)
  for kind in ('mu', 'nu'):
    assert leaves(frozen, f'optimizer/{kind}/').keys() == {n for n in params if '/ffn/' in n}
  loaded = load(str(frozen))
  assert loaded.domains == (NOVEL,) and loaded.model.config.ffn == 'dense'
  assert loaded.model.canonical(loaded.params).keys() == params.keys()


def test_the_first_loss_is_that_of_the_expert_and_it_falls(models, frozen, stores):
  part = perplexity.Part(NOVEL, 'valid')
  store = TokenStore.open(stores.bytes)
  scores = []
  for reference in (f'{models["demix"]}#legal', frozen):
    one = load(str(reference))
    scores += perplexity.evaluate(one.model, one.params, store, [part],
                                  protocol=Protocol(32, limit=64))
  # Its training text is in the style of legal (tests/corpus.py), so it starts well.
  rows = metrics.read(frozen)
  assert rows[0]['train/loss'] < 3 and rows[-1]['train/loss'] < rows[0]['train/loss']
  assert rows[-1]['eval/mean/nll'] == pytest.approx(scores[1].mean_nll, rel=1e-6)
  assert scores[0].mean_nll != scores[1].mean_nll


def test_what_was_resolved_is_recorded_and_identity(models, frozen):
  parent = checkpoint.read_meta(models['demix'] / 'checkpoints', 40)
  meta = checkpoint.read_meta(frozen / 'checkpoints', 6)
  saved = json.loads((frozen / 'config.json').read_text())
  expected = {'model': str(models['demix']), 'workdir': str(models['demix']), 'step': 40,
              'content_digest': parent['content_digest'], 'expert': 'legal', 'asked': 'legal',
              'schedule_steps': 40,
              'ancestors': [parent['content_digest']], 'trained_on': list(corpus.TRAIN)}
  assert meta['init'] == saved['init'] == expected
  assert meta['identity'] == saved['identity']
  own = {k: v for k, v in meta['identity'].items() if k.startswith('init.')}
  assert own == {'init.step': 40, 'init.content_digest': parent['content_digest'],
                 'init.expert': 'legal', 'init.trainable': 'ffn', 'init.optimizer': 'fresh'}
  assert 'init' not in checkpoint.read_meta(models['demix'] / 'checkpoints', 40)
  assert not any(k.startswith('init.') for k in parent['identity'])


@pytest.mark.parametrize(('kind', 'trainable'), [
    ('dense', 'all'), pytest.param('dense', 'ffn', marks=pytest.mark.long),
    pytest.param('demix#legal', 'all', marks=pytest.mark.long), ('demix', 'ffn')])
def test_every_kind_of_model_is_adapted(models, stores, tmp_path, kind, trainable):
  name, _, expert = kind.partition('#')
  reference = f'{models[name]}@20{kind[len(name):]}'
  more = {'data__domains': ','.join(corpus.DOMAINS)} if kind == 'demix' else {}
  ended = adapt(stores.bytes, tmp_path / 'A', reference, init__trainable=trainable,
                train__steps=2, **more)
  assert ended.code == 0 and ended.said() == []
  before, after = numbers(reference), numbers(tmp_path / 'A')
  moved = {n for n in before if before[n].tobytes() != after[n].tobytes()}
  assert moved == {n for n in before if trainable == 'all' or '/ffn/' in n}
  assert checkpoint.read_meta(tmp_path / 'A/checkpoints', 2)['init']['expert'] == expert


def test_a_run_starts_from_an_expert_of_a_forest(models, stores, tmp_path):
  """A whole LM by its name, an expert of a DEMix LM as LM/EXPERT: as from their own workdirs."""
  for name in ('dense', 'demix'):
    ended = runs.demix('forest', 'add', f'--forest={tmp_path / "F"}', f'--expert={name}',
                       f'--from={models[name]}', '--parent=none')
    assert ended.code == 0, ended
  for here, there in (('dense', models['dense']), ('demix/legal', f'{models["demix"]}#legal')):
    name = here.replace('/', '-')
    assert adapt(stores.bytes, tmp_path / name, f'forest:{tmp_path / "F"}#{here}',
                 train__steps=2).code == 0
    assert adapt(stores.bytes, tmp_path / f'{name}-own', there, train__steps=2).code == 0
    assert runs.digests(tmp_path / name) == runs.digests(tmp_path / f'{name}-own')


# ---- the nearest expert -----------------------------------------------------------------------


@pytest.mark.parametrize('sequences', [2, 4, 16])
def test_the_nearest_expert_has_the_lowest_nll_on_valid_text(models, stores, sequences):
  """The novel domain's valid text is code, its training text legal, its test text verse."""
  whole, store = load(str(models['demix'])), TokenStore.open(stores.bytes)
  found = find_nearest(whole, store, NOVEL, Protocol(32), sequences=sequences)
  assert found.expert == 'code' and found.sequences <= sequences
  assert found.certain or sequences == 2
  # By another way: each expert by itself, on the same blocks.
  stream = Protocol(32).development(store, NOVEL, sequences)
  for name, nll in zip(found.names, found.nll):
    one, losses = load(f'{models["demix"]}#{name}'), []
    for i in stream[1]:
      row = stream[0][i]
      losses.append(perplexity.token_nll(one.model, one.params, {
          'tokens_BL': row['tokens'][None], 'targets_BL': row['targets'][None],
          'domain_B': np.zeros(1, int)}))
    assert nll == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_a_margin_within_its_error_is_said():
  """Two experts that differ by noise, and two that differ clearly: the same rule for both."""
  random, tokens = np.random.default_rng(0), np.full(50, 32)
  noise = random.normal(size=(2, 50)) * 3
  unsure = compare(('a', 'b'), 100 + noise, tokens, 'law')
  assert not unsure.certain and 'within its error' in unsure.warning('law')
  sure = compare(('a', 'b'), 100 + noise + [[0], [10]], tokens, 'law')
  assert sure.certain and not sure.warning('law') and sure.expert == 'a'
  shifts = (noise[1] - noise[0]) / 32
  assert unsure.error == pytest.approx(1.96 * shifts.std(ddof=1) / 50 ** 0.5, rel=1e-9)
  # One sequence says nothing of its error; an expert alone is nearest; nothing scored is no number.
  assert not compare(('a', 'b'), [[1.0], [2.0]], [4], 'law').certain
  assert compare(('a',), [[1.0]], [4], 'law').certain
  with pytest.raises(BadInput, match='law: no token of its 2 sequences'):
    compare(('a', 'b'), np.zeros((2, 2)), [0, 0], 'law')


def test_nearest_is_resolved_once_and_going_on_needs_no_parent(models, stores, tmp_path,
                                                               monkeypatch):
  parent = shutil.copytree(models['demix'], tmp_path / 'W')
  flags = dict(init__expert='nearest', init__trainable='ffn')
  whole = adapt(stores.bytes, tmp_path / 'whole', parent, **flags)
  assert whole.code == 0 and ', expert code (nearest: lowest NLL on ' in whole.out
  assert adapt(stores.bytes, tmp_path / 'A', parent, train__steps=4, **flags).code == 0
  record = json.loads((tmp_path / 'A/config.json').read_text())['init']
  assert (record['expert'], record['asked']) == ('code', 'nearest')
  assert record['nll'].keys() == set(corpus.DOMAINS) and record['margin'] > record['error'] > 0
  shutil.rmtree(parent)
  monkeypatch.setattr('demix.training.start.find_nearest', None)
  for asked in ('nearest', 'code'):  # the name it led to is the same experiment
    ended = adapt(stores.bytes, tmp_path / 'A', parent, **flags | {'init__expert': asked})
    assert ended.code == 0 and ended.said() == []
  assert runs.digests(tmp_path / 'A') == runs.digests(tmp_path / 'whole')
  assert runs.rows(tmp_path / 'A')[-1] == runs.rows(tmp_path / 'whole')[-1]
  saved = json.loads((tmp_path / 'A/config.json').read_text())
  assert saved['init'] == record == checkpoint.read_meta(tmp_path / 'A/checkpoints', 6)['init']
  ended = adapt(stores.bytes, tmp_path / 'A', parent, **flags | {'init__expert': 'legal'})
  assert 'init.expert: "code" → "legal"' in ended.error(2)
  message = adapt(stores.bytes, tmp_path / 'A', parent, init__expert='nearest').error(2)
  assert 'init.trainable: "ffn" → "all"' in message


def test_a_parent_that_moved_is_the_same_by_content_and_another_is_refused(models, stores,
                                                                           tmp_path):
  parent = shutil.copytree(models['demix'], tmp_path / 'W')
  flags = dict(init__expert='legal', init__trainable='ffn')
  assert adapt(stores.bytes, tmp_path / 'A', parent, train__steps=2, **flags).code == 0
  moved = parent.rename(tmp_path / 'elsewhere')
  assert adapt(stores.bytes, tmp_path / 'A', moved, train__steps=4, **flags).code == 0
  message = adapt(stores.bytes, tmp_path / 'A', f'{moved}@20', **flags).error(2)
  assert 'init.step: 40 → 20' in message and 'init.content_digest: "' in message
  assert 'belongs to another experiment: init.' in message


# ---- exact resume -----------------------------------------------------------------------------


@pytest.mark.long
def test_a_frozen_run_that_was_killed_is_the_uninterrupted_one(models, stores, nursery, tmp_path):
  long = dict(init__model=models['demix'], init__expert='legal', init__trainable='ffn',
              data__domains=NOVEL, train__steps=90, optimizer__schedule_steps=90,
              train__checkpoint_every=7)
  assert runs.train(stores.bytes, tmp_path / 'whole', **long).code == 0
  flags = runs.overrides(stores.bytes, tmp_path / 'A', **long)
  for step in (3, 30):  # before the first checkpoint, and between two
    child = nursery.start('train', *flags)
    runs.until(lambda step=step: len(metrics.read(tmp_path / 'A')) >= step)
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
  ended = nursery.run('train', *flags)
  assert ended.code == 0 and 'resumed     at step ' in ended.out
  assert runs.rows(tmp_path / 'A') == runs.rows(tmp_path / 'whole')
  assert runs.digests(tmp_path / 'A') == runs.digests(tmp_path / 'whole')
  assert leaves(tmp_path / 'A') == leaves(tmp_path / 'whole')


def test_a_run_killed_before_its_first_checkpoint_needs_the_same_parent(models, stores, tmp_path):
  parent = shutil.copytree(models['demix'], tmp_path / 'W')
  flags = dict(init__expert='legal', init__trainable='ffn')
  assert adapt(stores.bytes, tmp_path / 'A', parent, **flags).code == 0
  done = runs.digests(tmp_path / 'A')
  shutil.rmtree(tmp_path / 'A/checkpoints')
  assert adapt(stores.bytes, tmp_path / 'A', parent, **flags).code == 0
  assert runs.digests(tmp_path / 'A') == done
  shutil.rmtree(tmp_path / 'A/checkpoints')
  shutil.rmtree(parent / 'checkpoints/40')
  message = adapt(stores.bytes, tmp_path / 'A', parent, **flags).error(2)
  assert 'has no checkpoint of its own yet' in message and 'no checkpoint of step 40' in message
  shutil.copytree(models['dense'] / 'checkpoints/40', parent / 'checkpoints/40')
  assert 'this run started from' in adapt(stores.bytes, tmp_path / 'A', parent, **flags).error(2)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(('changes', 'text'), [
    ({'init__model': '{none}'}, "no such workdir '{none}'"),
    ({'init__model': '{demix}@7'}, 'no checkpoint of step 7 (there: 20, 40)'),
    ({'init__model': '{demix}@'}, 'is not W, W@STEP or W#EXPERT'),
    ({'init__expert': 'lega'}, "init.expert='lega': {demix} has no such expert (did you mean "
                               "'legal'?)"),
    ({'init__model': '{demix}#lega'}, "no such expert (did you mean 'legal'?)"),
    ({'init__model': '{demix}#code', 'init__expert': 'legal'}, "names expert 'code', init.expert="),
    ({'init__model': '{dense}', 'init__expert': 'legal'}, 'is a dense LM and has no experts'),
    ({'init__model': '{dense}', 'init__expert': 'nearest'}, 'is a dense LM and has no experts'),
    ({'init__expert': 'nearest', 'data__domains': 'mixed,code'}, 'nearest with 2 training domains'),
    ({'init__expert': 'nearest', 'data__path': '{no_valid}'}, 'mixed has no valid text to'),
    ({'init__model': '', 'init__expert': 'legal'}, "init.expert='legal' has no effect with"),
    ({'init__model': '', 'init__trainable': 'ffn'}, "init.trainable='ffn' has no effect"),
    ({'init__trainable': 'fn'}, "init.trainable='fn': no such choice (did you mean 'ffn'?)"),
    ({'init__limit': -1}, 'init.limit=-1 is out of range'),
    ({'init__expert': 'legal', 'data__sequence_length': 64},
     'data.sequence_length=64, but the model of init.model was trained with 32'),
    ({'init__expert': 'legal', 'data__path': '{bpe}'}, 'was trained with tokenizer '),
    ({'init__model': '{token}'}, 'was trained with <domain> symbols'),
    ({'init__model': '{dense}', 'data__domain_token': True}, 'data.domain_token with init.model'),
    ({}, 'data.domains=mixed, but the experts of init.model are legal,code,verse,kitchen'),
    ({'init__expert': 'legal', 'data__domains': 'mixd'}, "'mixd' (did you mean 'mixed'?)"),
])
def test_what_cannot_be_started_from_is_refused_in_one_line(models, stores, tmp_path, changes,
                                                            text):
  places = models | {'none': tmp_path / 'none', 'bpe': stores.bpe, 'no_valid': tmp_path / 'store'}
  if 'no_valid' in str(changes):
    shutil.copytree(stores.bytes, tmp_path / 'store')
    card = json.loads((tmp_path / 'store/card.json').read_text())
    del card['domains'][NOVEL]['splits']['valid']
    (tmp_path / 'store/card.json').write_text(json.dumps(card))
  changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
  flags = {'init__model': models['demix']} | ADAPT | changes
  ended = runs.train(stores.bytes, tmp_path / 'A', **flags)
  assert text.format(**places) in ended.error(2)
  assert ended.out == '' and not [p for p in (tmp_path / 'A').glob('*') if p.name != '.lock']


@pytest.mark.long
def test_ffn_of_an_expert_among_shared_ffns_is_refused(stores, tmp_path):
  every_second = dict(model__ffn='demix', model__expert_every=2, train__steps=1)
  assert runs.train(stores.bytes, tmp_path / 'W', **every_second).code == 0
  message = adapt(stores.bytes, tmp_path / 'A', tmp_path / 'W', init__expert='legal',
                  init__trainable='ffn').error(2)
  assert 'expert_every=2: FFNs that all experts share would be trained too' in message
  assert adapt(stores.bytes, tmp_path / 'A', tmp_path / 'W', init__expert='legal',
               train__steps=1).code == 0


def test_a_run_from_fresh_parameters_does_not_become_another(models, stores, tmp_path):
  workdir = shutil.copytree(models['demix'], tmp_path / 'W')
  before = runs.files(workdir)
  message = adapt(stores.bytes, workdir, models['demix'], init__expert='legal').error(2)
  assert 'started from fresh parameters, not from init.model=' in message
  assert runs.files(workdir) == before


def test_the_step_reads_frozen_leaves_and_returns_none(models):
  """No gradient, moment or output of the step belongs to a frozen leaf: that is the structure."""
  from demix.optim.optimizer import AdamW, OptimizerConfig
  from demix.optim.state import abstract
  from demix.optim.step import make_step
  model = load(f'{models["demix"]}#legal').model
  adamw = AdamW(OptimizerConfig(), 8)
  state, frozen = abstract(model, adamw, '/ffn/')
  batch = {n: jax.ShapeDtypeStruct((2, 8), t) for n, t in (
      ('tokens_BL', np.int32), ('targets_BL', np.int32), ('weights_BL', np.float32))}
  batch['domain_B'] = jax.ShapeDtypeStruct((2,), np.int32)
  step = make_step(model, adamw, domains=1, balanced=True)
  after, _ = jax.eval_shape(step, state, batch, frozen)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(after) == shapes(state)
  assert all('attention' in n or 'norm' in n for n in frozen['block_0'])
  assert state['params'].keys() == {'block_0'} and state['params']['block_0'].keys() == {'ffn'}


@pytest.mark.long
def test_a_frozen_run_on_a_mesh_is_the_same_run(models, frozen, stores, tmp_path):
  """Four devices, parameters split over two: losses agree, frozen leaves are equal to the bit."""
  flags = runs.overrides(stores.bytes, tmp_path / 'A', init__model=models['demix'],
                         init__expert='legal', init__trainable='ffn', mesh__fsdp=2, **ADAPT)
  ended = runs.fresh('train', *flags, env=runs.devices(4))
  assert ended.code == 0 and 'devices     4 × cpu (data=2 fsdp=2)' in ended.out, ended
  losses = [[row['train/loss'] for row in metrics.read(w)] for w in (frozen, tmp_path / 'A')]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  trunk = [{n: d for n, d in leaves(w).items() if '/ffn/' not in n}
           for w in (frozen, tmp_path / 'A')]
  assert trunk[0] == trunk[1]


# ---- going on with the optimizer ---------------------------------------------------------------


def branch(store, workdir, model, **changes):
  """A dense LM goes on with its moments on one domain."""
  return runs.train(store, workdir, **dict(
      init__model=model, init__optimizer='continue', data__domains='verse', data__batch_size=2,
      train__steps=4, train__checkpoint_every=2, train__max_to_keep=0,
      optimizer__schedule_steps=0) | changes)


def test_a_branch_goes_on_with_moments_count_and_schedule(models, stores, tmp_path):
  """Its first update is the one that the parent's whole state makes on the branch's first batch."""
  parent = f'{models["dense"]}@20'
  ended = branch(stores.bytes, tmp_path / 'B', parent, train__checkpoint_every=1)
  assert ended.code == 0, ended
  config = load(str(tmp_path / 'B')).config
  assert config.optimizer.schedule_steps == 40  # the parent's
  rates = [row['train/learning_rate'] for row in metrics.read(tmp_path / 'B')]
  whole = [row['train/learning_rate'] for row in metrics.read(models['dense'])]
  assert rates == whole[20:24]

  old = load(parent)
  store = TokenStore.open(stores.bytes)
  adamw = AdamW(config.optimizer, 40)
  state, _ = running_state(old.model, checkpoint.restore(
      models['dense'] / 'checkpoints', 20, {n: jax.ShapeDtypeStruct(*of) for n, of in
                                            checkpoint.names(models['dense'] / 'checkpoints',
                                                             20).items()}))
  batch = Batches(store, config.data, config.seed)[0]
  # Compiled as the run's own: the gradient of k_bias is rounding and no more, and Adam scales it.
  step = Program(old.model, adamw, '', 1, True, 1, make_mesh(MeshConfig())).step
  state, _ = step(state, {n: batch[n] for n in ('tokens_BL', 'targets_BL', 'weights_BL',
                                                'domain_B')}, {})
  flat = canonical_state(old.model, state)
  saved = checkpoint.restore(tmp_path / 'B/checkpoints', 1, {
      n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in flat.items()})
  assert int(saved['optimizer/count']) == 21
  for name, leaf in flat.items():
    np.testing.assert_allclose(saved[name], leaf, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_branch_that_was_stopped_is_the_uninterrupted_one(models, stores, tmp_path):
  longer = {'optimizer__schedule_steps': 50}
  assert branch(stores.bytes, tmp_path / 'whole', models['dense'], **longer).code == 0
  parent = shutil.copytree(models['dense'], tmp_path / 'parent')
  assert branch(stores.bytes, tmp_path / 'B', parent, train__steps=2, **longer).code == 0
  shutil.rmtree(parent)
  ended = branch(stores.bytes, tmp_path / 'B', parent)  # the schedule is the one of its first start
  assert ended.code == 0 and 'resumed     at step 2' in ended.out
  assert runs.digests(tmp_path / 'B') == runs.digests(tmp_path / 'whole')


@pytest.mark.parametrize(('changes', 'said'), [
    ({'init__optimizer': 'contine'}, "did you mean 'continue'"),
    ({'init__trainable': 'ffn'}, 'trained whole'), ({'init__expert': 'code'}, 'trained whole'),
    ({'init__model': ''}, "init.optimizer='continue' has no effect with init.model=''")])
def test_what_cannot_go_on_is_refused(models, stores, tmp_path, changes, said):
  flags = {'init__model': models['demix']} | changes
  assert said in branch(stores.bytes, tmp_path / 'B', flags.pop('init__model'), **flags).error(2)
  assert not (tmp_path / 'B/config.json').exists()
