"""A dense LM whose FFN is copied into the experts of a DEMix LM; what else init.model brings."""

import corpus
import jax
import numpy as np
import pytest
import runs
from models import SIZES, assert_same, drawn, tiny

from demix.checkpoints import catalogue
from demix.loading.reference import load
from demix.model.params import expert_slice, upcycled

pytestmark = pytest.mark.exact

UPCYCLE = {'model__ffn': 'demix', 'optimizer__schedule_steps': 8}
TWO = {'data__domains': 'verse,code', 'data__batch_size': 4}


def newest(workdir) -> dict:
  directory = workdir / 'checkpoints'
  return catalogue.read_meta(directory, catalogue.steps(directory)[-1])


@pytest.mark.parametrize('every', [1, 2])
def test_every_expert_is_the_dense_model_to_the_bit(every):
  dense = tiny(ffn='dense', layers=4)
  demix = tiny(layers=4, expert_every=every, experts=('law', 'bio', 'web'))
  params = drawn(dense)
  made = upcycled(dense, params, demix.config)
  random = np.random.default_rng(0)
  rows = (5, 1, 2)  # unequal domains
  domains = np.repeat(np.arange(3), rows)
  tokens = random.integers(0, SIZES['vocab_size'], (sum(rows), 6))
  run = lambda model, params, tokens, route: jax.jit(
      lambda p: model.apply(p, tokens, route)[0] @ model.output_table(p).T)(params)
  expected = run(dense, params, tokens, domains)
  np.testing.assert_array_equal(run(demix, made, tokens, domains), expected)
  for d, name in enumerate(demix.config.experts):
    taken, own = expert_slice(demix, made, name)
    assert taken.config == dense.config
    assert_same(own, params)
    np.testing.assert_array_equal(run(demix, made, tokens, np.int32(d)), expected)
  experts = {n for n in demix.canonical(made) if '/experts/' in n}
  assert {n.split('/')[1] for n in experts} == ({'0', '1', '2', '3'} if every == 1 else {'1', '3'})


@pytest.mark.parametrize('trainable', ['all', 'ffn'])
def test_a_dense_run_becomes_a_demix_lm(models, stores, tmp_path, trainable):
  W, dense = tmp_path / 'W', models['dense']
  flags = UPCYCLE | TWO | {'init__model': dense, 'init__trainable': trainable, 'seed': 5}
  ended = runs.train(stores.bytes, W, train__steps=1, train__eval_every=1, **flags)
  assert ended.code == 0 and ended.said() == [], ended
  assert f'starts from {dense}, step 40' in ended.out
  meta = newest(W)
  assert meta['init']['upcycled'] == ['verse', 'code'] == meta['config']['model']['experts']
  assert meta['updates'] == 1 and meta['identity']['model.ffn'] == 'demix'
  before, after = load(str(dense)), load(str(W))
  old, new = (x.model.canonical(x.params) for x in (before, after))
  trunk = [n for n in old if '/ffn/' not in n]
  moved = [n for n in trunk if np.asarray(old[n]).tobytes() != np.asarray(new[n]).tobytes()]
  assert moved == (trunk if trainable == 'all' else [])
  for name, leaf in new.items():
    if '/experts/' in name:
      copied = np.asarray(old[name.replace('/experts/verse', '').replace('/experts/code', '')])
      assert 0 < np.abs(np.asarray(leaf) - copied).max() <= 0.011  # one update at 0.01
  # It goes on without the dense run, and under the flags that it was started with.
  ended = runs.train(stores.bytes, W, train__steps=2, **flags)
  assert ended.code == 0 and 'resumed     at step 1' in ended.out, ended


@pytest.mark.parametrize(('changes', 'said'), [
    # 4 layers are the default, which was asked for all the same.
    ({'model__layers': 4, 'model__norm': 'rmsnorm', 'model__d_ff': 32},
     'model.layers=4 (it has 2), model.d_ff=32 (it has 0), '
     "model.norm='rmsnorm' (it has 'layernorm'); leave these out"),
    ({'init__model': '{demix}#code', 'model__ffn': 'demix'},
     "model.ffn='demix' (it has 'dense')"),
    ({'init__optimizer': 'continue', 'model__ffn': 'demix'}, 'becomes 1 experts without moments'),
    ({'model__ffn': 'demix', 'model__activation': 'gelu_tanh'},
     "model.activation='gelu_tanh' (it has 'gelu')"),
    ({'model__d_ff': 64, 'model__kv_heads': 2}, ''),  # as they are, written out
])
def test_what_a_model_brings_is_not_overridden_in_silence(models, stores, tmp_path, changes, said):
  changes = {k: v.format(**models) if isinstance(v, str) else v for k, v in changes.items()}
  flags = {'init__model': models['dense'], 'data__domains': corpus.NOVEL, 'train__steps': 1}
  ended = runs.train(stores.bytes, tmp_path / 'W', **flags | changes)
  if not said:
    assert ended.code == 0, ended
    return
  assert said in ended.error(2)
  assert not (tmp_path / 'W/config.json').exists()


def test_a_symbol_of_the_first_document_only_is_refused(stores, tmp_path):
  said = runs.train(stores.bytes, tmp_path / 'W', data__domain_token=True,
                    data__packing='document').error(2)
  assert 'data.domain_token with data.packing=document' in said
