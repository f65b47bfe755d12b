"""demix/model/params.py: names, round trips, experts taken out, and the published sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from cases import some
from models import BALANCED, EXPERTS, assert_close, assert_same, batch_of, drawn, jit, tiny

from demix.errors import BadInput
from demix.model import tree
from demix.model.params import Model, expert_slice
from demix.model.transformer import preset

ALL = [('gpt', {}), ('gpt', dict(ffn='dense')), ('gpt', dict(tied=False)), ('period 2', {}),
       ('llama', {}), ('llama', dict(ffn='dense', tied=True))]


# ---- names

def leaves_by_contract(config) -> dict:
  """{canonical name: shape} of a model, written from docs/contracts.md and not from the code."""
  D, F, K = config.d_model, config.d_ff, config.head_width
  q, kv = config.heads * K, (config.kv_heads or config.heads) * K
  names = {'embed/tokens': (40, D)}
  if config.positions == 'learned':
    names['embed/positions'] = (8, D)
  if not config.tied:
    names['embed/output'] = (40, D)
  bias = {'layernorm': {'bias': (D,)}, 'rmsnorm': {}}[config.norm]
  names |= {f'final_norm/{n}': s for n, s in ({'scale': (D,)} | bias).items()}
  for i in range(config.layers):
    block = f'blocks/{i}'
    names |= {f'{block}/{norm}_norm/{n}': s for norm in ('attention', 'ffn')
              for n, s in ({'scale': (D,)} | bias).items()}
    names |= {f'{block}/attention/{n}': s for n, s in {
        'q': (D, q), 'k': (D, kv), 'v': (D, kv), 'out': (q, D)}.items()}
    ffn = {'up': (D, F), 'down': (F, D)}
    if config.activation == 'swiglu':
      ffn['gate'] = (D, F)
    if config.qk_norm:
      names |= {f'{block}/attention/{n}_norm/scale': (K,) for n in 'qk'}
    if config.biases:
      ffn |= {'up_bias': (F,), 'down_bias': (D,)}
      names |= {f'{block}/attention/{n}_bias': s for n, s in {
          'q': (q,), 'k': (kv,), 'v': (kv,), 'out': (D,)}.items()}
    expert = config.ffn == 'demix' and (config.expert_every == 1 or i % 2 == 1)
    places = [f'experts/{e}/' for e in config.experts] if expert else ['']
    names |= {f'{block}/ffn/{place}{n}': s for place in places for n, s in ffn.items()}
  return names


@pytest.mark.parametrize('kind,changes', ALL)
def test_leaves_are_named_and_shaped_as_the_contract_says_and_come_back(kind, changes):
  model = tiny(kind, **changes)
  params = drawn(model)
  flat = model.canonical(params)
  assert {n: x.shape for n, x in flat.items()} == leaves_by_contract(model.config)
  back = model.running(dict(reversed(flat.items())))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  assert_same(back, params)
  assert jax.eval_shape(model.init, 0) == model.abstract


def test_the_contract_names_itself():
  names = tiny('period 2').canonical(drawn(tiny('period 2')))
  assert {'blocks/3/ffn/experts/law/up', 'blocks/3/attention/q', 'embed/tokens'} < names.keys()
  assert not any(n.startswith('blocks/2/ffn/experts') for n in names)


@pytest.mark.parametrize('change,named', [
    (lambda n: 'experts/web/' in n, r'blocks/1/ffn/experts/web/\w+ is missing \(and 7 more\)'),
    (lambda n: n.startswith('blocks/3/'), r'leaf blocks/3/.* is missing'),
    (lambda n: n == 'blocks/0/attention/k_bias', 'leaf blocks/0/attention/k_bias is missing$'),
    (lambda n: n == 'embed/positions', 'leaf embed/positions is missing$')])
def test_what_is_missing_is_named(change, named):
  model = tiny('period 2')
  flat = model.canonical(drawn(model))
  with pytest.raises(BadInput, match=named):
    model.running({n: x for n, x in flat.items() if not change(n)})


def test_what_does_not_belong_is_named():
  model = tiny('gpt')
  flat = model.canonical(drawn(model))
  for extra in ('blocks/2/attention/q', 'blocks/0/ffn/experts/med/up', 'embed/output'):
    with pytest.raises(BadInput, match=f'leaf {extra} is there, but'):
      model.running(flat | {extra: jnp.zeros(1)})


# ---- starting

def test_init_is_a_function_of_the_seed_with_equal_experts_and_unequal_layers():
  model = tiny('gpt')
  init = jit(model.init)
  params = init(3)
  assert_same(init(3), params)
  flat, other = model.canonical(params), model.canonical(init(4))
  for name in flat:
    if name.endswith(('norm/scale', 'norm/bias', 'q_bias', 'k_bias', 'v_bias', 'out_bias')):
      assert len(np.unique(flat[name])) == 1  # constants
      continue
    assert np.abs(flat[name] - other[name]).max() > 1e-3, name
    layers = name.replace('blocks/0/', 'blocks/1/')
    if layers != name:
      assert np.abs(flat[name] - flat[layers]).max() > 1e-3, name
    if found := tree.EXPERT.fullmatch(name):
      np.testing.assert_array_equal(flat[name], flat[f'{found[1]}/law/{found[3]}'])
  dense = tiny('gpt', ffn='dense')  # the same numbers without experts
  slices = expert_slice(model, params, 'bio')[1]
  assert_same(slices, jit(dense.init)(3))


def test_init_is_the_papers():
  config = dataclasses.replace(tiny('gpt', ffn='dense').config, d_model=64, d_ff=256, kv_heads=0)
  flat = jax.device_get((lambda m: m.canonical(jit(m.init)(0)))(Model(config)))
  def uniform(name, bound):  # papers.md §1.1
    leaf = flat[name]
    assert 0.97 * bound < np.abs(leaf).max() <= bound, name
    np.testing.assert_allclose(leaf.std(), bound / 3 ** 0.5, rtol=0.1, err_msg=name)
  uniform('blocks/1/attention/q', 0.5 ** 0.5 * (6 / 128) ** 0.5)  # Xavier, gain 1/sqrt(2)
  uniform('blocks/1/attention/v', 0.5 ** 0.5 * (6 / 128) ** 0.5)
  uniform('blocks/1/attention/out', (6 / 128) ** 0.5)
  uniform('blocks/1/ffn/up', 64 ** -0.5)
  uniform('blocks/1/ffn/down', 256 ** -0.5)
  uniform('blocks/1/ffn/up_bias', 64 ** -0.5)
  for name in ('embed/tokens', 'embed/positions'):
    np.testing.assert_allclose(flat[name].std(), 64 ** -0.5, rtol=0.06)
    assert np.abs(flat[name]).max() > 2 * 64 ** -0.5  # normal, not uniform


# ---- experts by name

@pytest.mark.parametrize('kind', some(['gpt', 'period 2'], ['period 2']))
def test_an_expert_taken_out_is_that_expert(kind):
  model, batch = tiny(kind), batch_of(BALANCED)
  params = drawn(model)
  out = jit(lambda p: [model.apply(p, batch['tokens_BL'], jnp.full(8, e))[0] for e in range(4)])(
      params)
  dense = expert_slice(model, params, 'law')[0]
  run = jit(lambda p: dense.apply(p, batch['tokens_BL'], None)[0])
  for e, name in enumerate(EXPERTS):
    alone, slices = expert_slice(model, params, name)
    assert (alone.config.ffn, alone.config.experts) == ('dense', ()) and alone == dense
    np.testing.assert_allclose(run(slices), out[e], rtol=1e-5, atol=1e-5, err_msg=name)
  with pytest.raises(BadInput, match=r"no expert 'lae' \(did you mean 'law'\?\)"):
    expert_slice(model, params, 'lae')


def test_names_that_sort_the_other_way_change_names_only():
  model, batches = tiny('gpt'), [batch_of(BALANCED, seed=s) for s in range(2)]
  names = dict(zip(EXPERTS, ('a', 'z', 'b', 'y')))
  assert sorted(EXPERTS) != [e for _, e in sorted((names[e], e) for e in EXPERTS)]
  renamed = tiny('gpt', experts=tuple(names[e] for e in EXPERTS))
  state, metrics = models.steps(model, drawn(model), batches)
  other, other_metrics = models.steps(renamed, drawn(renamed), batches)
  assert_same(dict(enumerate(metrics)), dict(enumerate(other_metrics)))
  flat = {}
  for name, leaf in model.canonical(state['params']).items():
    found = tree.EXPERT.fullmatch(name)
    flat[f'{found[1]}/{names[found[2]]}/{found[3]}' if found else name] = leaf
  assert_same(flat, renamed.canonical(other['params']))


def test_the_order_of_experts_changes_routes_only():
  model, batch = tiny('period 2'), batch_of(BALANCED)
  params, order = drawn(model), [2, 0, 3, 1]
  shuffled = tiny('period 2', experts=tuple(EXPERTS[i] for i in order))
  value, grads = models.gradient(model, params, batch)
  route = jnp.asarray(np.argsort(order))[batch['domain_B']]
  other, other_grads = models.gradient(
      shuffled, shuffled.running(model.canonical(params)), batch | {'domain_B': route})
  np.testing.assert_allclose(value, other, rtol=1e-6)
  assert_close(grads, other_grads)


# ---- sizes

@pytest.mark.parametrize('size,dense,demix', [  # papers.md §1.1
    ('125m', '124M', '0.52B'), ('350m', '355M', '1.76B'), ('760m', '759M', '3.93B'),
    ('1.3b', '1.31B', '6.95B')])
def test_published_sizes(size, dense, demix):
  table = dict(vocab_size=50264, max_length=1024)
  one = Model(preset(f'gpt-{size}', **table))
  eight = Model(preset(f'gpt-{size}', ffn='demix', experts=tuple('abcdefgh'), **table))
  total, active = one.counts()
  millions = f'{total / 1e6:.0f}M'
  assert dense == (millions if total < 1e9 else f'{total / 1e9:.2f}B')
  assert total == active == eight.counts()[1]
  assert f'{eight.counts()[0] / 1e9:.2f}B' == demix
  c = one.config
  ffn = c.layers * (8 * c.d_model ** 2 + 5 * c.d_model)
  assert eight.counts()[0] == total + 7 * ffn
  for model in (one, eight):
    assert model.flops_per_token(1024) == 6 * total + 12 * c.layers * c.d_model * 1024


def test_counts_are_of_what_is_there():
  for kind, changes in ALL:
    model = tiny(kind, **changes)
    flat = model.canonical(drawn(model))
    others = sum(x.size for n, x in flat.items()
                 if (found := tree.EXPERT.fullmatch(n)) and found[2] != 'law')
    total = sum(x.size for x in flat.values())
    assert model.counts() == (total, total - others)
    assert (others > 0) == (model.config.ffn == 'demix')
  narrow = tiny('llama', head_size=2)  # attention's width is H · K, whatever D is
  assert narrow.flops_per_token(10) == 6 * narrow.counts()[1] + 12 * 2 * 10 * 4 * 2


# ---- bfloat16

def test_bfloat16_computes_what_float32_does_and_stores_float32():
  batches = [batch_of(BALANCED, seed=s) for s in range(3)]
  params = drawn(tiny('gpt'))
  state, metrics = models.steps(tiny('gpt', dtype='bfloat16'), params, batches)
  _, full_metrics = models.steps(tiny('gpt'), params, batches)
  for name in ('count', 'counts'):
    assert state['optimizer'].pop(name).dtype == np.int32
  assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype(np.float32)}
  for a, b in zip(metrics, full_metrics):
    assert a['loss'] != b['loss']  # bfloat16 was really used
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=0.02)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=0.1)
