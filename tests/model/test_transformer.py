"""demix/model/transformer.py: what a position may see, and that ways to run the model agree."""

import dataclasses

import formulas
import jax
import jax.numpy as jnp
import jaxprs
import models
import numpy as np
import pytest
from cases import some
from models import BALANCED, L, assert_close, assert_same, batch_of, drawn, jit, tiny

from demix.errors import BadInput
from demix.model.params import Model
from demix.model.transformer import PRESETS, TAPS, ModelConfig, preset

pytestmark = pytest.mark.exact

SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]])
ROUTE = jnp.asarray([2, 0, 2])


@pytest.mark.parametrize('kind,changes', [
    ('gpt', {}), ('llama', {}), ('period 2', {}), ('llama', dict(ffn='dense', embed_scale=True)),
    ('gpt', dict(norm_placement='post', biases=False))])
def test_the_model_is_its_formula(kind, changes):
  model, tokens = tiny(kind, **changes), np.random.default_rng(5).integers(0, models.V, (3, 6))
  params = drawn(model)
  hidden = jit(lambda p: model.apply(p, tokens, ROUTE, segments_BL=jnp.asarray(SEGMENTS),
                                     positions_BL=jnp.asarray(POSITIONS))[0])(params)
  expected = formulas.transformer(model.config, model.canonical(params), tokens, ROUTE, POSITIONS,
                                  SEGMENTS)
  np.testing.assert_allclose(hidden, expected, rtol=2e-4, atol=2e-5)


def visible(segments) -> np.ndarray:
  """bool [target, source] over all tokens of a batch, row after row: what may have influence."""
  B, length = segments.shape
  picture = np.zeros((B, length, B, length), bool)
  for b in range(B):
    for t in range(length):
      for s in range(t + 1):
        picture[b, t, b, s] = segments[b, t] == segments[b, s]
  return picture.reshape(B * length, B * length)


@pytest.mark.parametrize('documents', some([False, True], [True]))
@pytest.mark.parametrize('kind,changes', [
    ('gpt', {}), ('llama', dict(remat='full')), ('period 2', dict(remat='dots', scan=False))])
def test_influence_is_what_the_mask_shows_and_nothing_else(kind, changes, documents):
  model = tiny(kind, **changes)
  params, count = drawn(model), SEGMENTS.size
  more = {}
  if documents:
    more = dict(segments_BL=jnp.asarray(SEGMENTS), positions_BL=jnp.asarray(POSITIONS))
  tokens = np.random.default_rng(0).permutation(count)  # each once: a table row is a position
  def hidden(params, tokens_N):
    out = model.apply(params, tokens_N.reshape(SEGMENTS.shape), ROUTE, **more)[0]
    return out.reshape(count, -1)

  @jit
  def run(params, tokens, changed):
    out, pull = jax.vjp(lambda p: hidden(p, tokens), params)
    direction = jnp.cos(jnp.arange(out.shape[1]))  # no sum over D: LayerNorm fixes that one
    gradients = jax.vmap(lambda at: pull(jnp.zeros_like(out).at[at].set(direction))[0])(
        jnp.arange(count))['embed']['tokens'][:, tokens]  # [target, source, D]
    return gradients, jax.lax.map(lambda t: hidden(params, t), changed)
  # Variant s has another token at s; the last one is `tokens`.
  changed = np.where(np.eye(count + 1, count, dtype=bool), count + 1, tokens)
  gradients, hiddens = map(np.asarray, run(params, tokens, changed))

  expected = visible(SEGMENTS if documents else np.ones_like(SEGMENTS))
  np.testing.assert_array_equal((gradients != 0).any(-1), expected)  # exactly zero elsewhere
  moved = (hiddens[:-1] != hiddens[-1]).any(-1).T  # not one bit elsewhere
  np.testing.assert_array_equal(moved, expected)


def test_packed_documents_are_what_they_are_alone():
  model = tiny('gpt')
  params, tokens = drawn(model), np.random.default_rng(1).integers(0, models.V, SEGMENTS.shape)
  run = jit(lambda tokens, segments, positions: model.apply(
      params, tokens, ROUTE, segments_BL=segments, positions_BL=positions)[0])
  packed = run(tokens, SEGMENTS, POSITIONS)
  row, at = 0, SEGMENTS[0] == 2
  alone = np.zeros_like(tokens)
  alone[row, :at.sum()] = tokens[row, at]
  by_itself = run(alone, np.ones_like(SEGMENTS), np.tile(np.arange(L), (3, 1)))
  np.testing.assert_allclose(packed[row, at], by_itself[row, :at.sum()], rtol=1e-5, atol=1e-5)


# ---- experts

def hidden_by_route(model, params, batch, routes):
  """{name: hidden} of the same tokens under several (route, balanced)."""
  run = lambda route, balanced: model.apply(params, batch['tokens_BL'], route, balanced=balanced)[0]
  return jit(lambda: {name: run(*route) for name, route in routes.items()})()


@pytest.mark.parametrize('kind', some(['gpt', 'period 2'], ['gpt']))
def test_equal_experts_are_the_dense_model(kind):
  dense = tiny(kind, ffn='dense')
  flat = dense.canonical(drawn(dense))
  model = tiny(kind)
  copies = {}
  for name in jax.eval_shape(model.canonical, model.abstract):
    parts = name.split('/')
    copies[name] = flat['/'.join(parts[:3] + parts[5:]) if 'experts' in parts else name]
  batch, random = batch_of(BALANCED), np.random.default_rng(0)
  draw = lambda *shape: jnp.float32(random.dirichlet(np.ones(4), shape))
  routes = {'balanced': (BALANCED, True), 'domain_B': (random.permutation(BALANCED), False),
            'weights_BE': (draw(8), False), 'weights_BLE': (draw(8, L), False)}
  out = hidden_by_route(model, model.running(copies), batch, routes)
  expected = hidden_by_route(dense, dense.running(flat), batch, {'dense': (None, False)})['dense']
  assert_close(out, dict.fromkeys(routes, expected), rtol=1e-5, atol=1e-5)


def test_weights_that_name_one_expert_are_that_expert():
  model, random = tiny('period 2'), np.random.default_rng(0)
  params, batch = drawn(model), batch_of(BALANCED)
  mixed = random.permutation(BALANCED)
  hot = jax.nn.one_hot(mixed, 4)
  out = hidden_by_route(model, params, batch, {
      'rows': (mixed, False), 'BE': (hot, False), 'other': ((mixed + 1) % 4, False),
      'BLE': (jnp.repeat(hot[:, None], L, 1), False),
      'sorted rows': (BALANCED, False), 'balanced': (BALANCED, True)})
  for a, b in (('BE', 'rows'), ('BLE', 'rows'), ('balanced', 'sorted rows')):
    np.testing.assert_allclose(out[a], out[b], rtol=1e-5, atol=1e-5, err_msg=a)
  assert np.abs(out['other'] - out['rows']).max(-1).min() > 1e-3  # the experts do differ


# ---- scan, remat, taps

def outputs_and_gradients(model, params, batch):
  """Hidden states, taps and all gradients of a weighted sum of the hidden states."""
  def f(params):
    hidden, _, taps = model.apply(params, batch['tokens_BL'], batch['domain_B'], TAPS,
                                  balanced=True)
    return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), (hidden, taps)
  (_, (hidden, taps)), grads = jit(jax.value_and_grad(f, has_aux=True))(params)
  return {'hidden': hidden, 'taps': taps, 'grads': grads}


@pytest.fixture(scope='module', params=['gpt', 'period 2'])
def plain(request):
  """kind, parameters, batch, and what the plain scan without remat makes of them."""
  model, batch = tiny(request.param), batch_of(BALANCED)
  params = drawn(model)
  return request.param, params, batch, outputs_and_gradients(model, params, batch)


def test_scan_is_the_unrolled_loop(plain):
  kind, params, batch, expected = plain
  unrolled = tiny(kind, scan=False)
  assert_close(outputs_and_gradients(unrolled, params, batch), expected, 1e-5, 1e-5)
  run = lambda model: lambda p: model.apply(p, batch['tokens_BL'], batch['domain_B'])[0]
  assert 'scan' not in jaxprs.primitives(run(unrolled), params)
  assert 'scan' in jaxprs.primitives(run(tiny(kind)), params)


@pytest.mark.parametrize('remat', some(['dots', 'offload', 'full'], ['full']))
def test_remat_changes_no_number(plain, remat):
  kind, params, batch, expected = plain
  assert_close(outputs_and_gradients(tiny(kind, remat=remat), params, batch), expected, 1e-5, 1e-5)


@pytest.mark.parametrize('ffn', some(['dense', 'demix'], ['demix']))
def test_remat_keeps_what_it_says_for_the_backward_pass(ffn):
  batch, kept, with_checkpoint = batch_of(BALANCED), {}, {}
  for remat in ('none', 'dots', 'full'):
    model = tiny(ffn=ffn, remat=remat)
    gradient = jax.grad(lambda p, model=model: model.apply(
        p, batch['tokens_BL'], batch['domain_B'], balanced=True)[0].sum())
    jaxpr = jax.make_jaxpr(gradient)(drawn(model))
    layers = next(e for e in jaxprs.equations(jaxpr) if e.primitive.name == 'scan')
    body = getattr(layers.params['jaxpr'], 'jaxpr', layers.params['jaxpr'])  # open in JAX 0.12
    kept[remat] = {v.aval.shape[1:] for v, one in zip(layers.outvars, body.outvars)
                   if v.aval.ndim > one.aval.ndim}
    with_checkpoint[remat] = 'remat2' in {e.primitive.name for e in jaxprs.equations(jaxpr)}
  assert with_checkpoint == {'none': False, 'dots': True, 'full': True}
  wide = (4, 12, 24) if ffn == 'demix' else (48, 24)  # what `up` makes: batched over experts
  scores = (8, 4, L, L)
  assert kept['full'] == {(8, L, 16)}  # the residual stream between blocks
  assert kept['dots'] == {(8, L, 16), (48, 16), wide}  # and q, k, v, out: no scores
  assert kept['none'] >= kept['dots'] | {scores}


def test_offload_moves_what_dots_keeps_to_the_host_and_back():
  model, batch = tiny(remat='offload'), batch_of(BALANCED)
  gradient = jax.grad(lambda p: model.apply(
      p, batch['tokens_BL'], batch['domain_B'], balanced=True)[0].sum())
  moved = [e for e in jaxprs.equations(jax.make_jaxpr(gradient)(drawn(model)))
           if e.primitive.name == 'device_put']
  to_host = lambda e: 'host' in str(e.params['devices']).lower()
  there, back = ([e.invars[0].aval.shape for e in moved if to_host(e) == host]
                 for host in (True, False))
  # q, k, v, what attention and FFN give, and what `up` makes; nothing batched over heads.
  assert sorted(there) == sorted(back) and set(there) <= {(8, L, 16), (48, 16), (4, 12, 24)}
  assert (4, 12, 24) in there and len(there) >= 5


def test_offload_needs_a_memory_to_go_to():
  class Device:
    device_kind, platform = 'abacus', 'cpu'
    def addressable_memories(self):
      return [type('Memory', (), {'kind': 'device'})]
  tiny(remat='dots').execution.check_devices([Device()])
  with pytest.raises(BadInput, match='abacus has memory device and no pinned_host'):
    tiny(remat='offload').execution.check_devices([Device()])


def test_taps_are_shaped_and_ordered_by_layer(plain):
  kind, params, _, out = plain
  taps, N = out['taps'], tiny(kind).config.layers
  assert {n: t.shape for n, t in taps.items()} == dict.fromkeys(TAPS, (N, 8, L, 16))
  # Pre-norm: every block adds its attention and its ffn; the last one is normed into hidden.
  steps = np.diff(taps['block'], axis=0)
  np.testing.assert_allclose(steps, (taps['attention'] + taps['ffn'])[1:], rtol=1e-4, atol=1e-5)
  last = np.float64(taps['block'][-1])
  centred = last - last.mean(-1, keepdims=True)
  normed = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
  norm = params['final_norm']
  np.testing.assert_allclose(out['hidden'], normed * norm['scale'] + norm['bias'],
                             rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', some(['gpt', 'period 2'], ['period 2']))
def test_tap_i_is_layer_i(kind):
  model, batch = tiny(kind), batch_of(BALANCED)
  params, N = drawn(model), model.config.layers
  flat, variants = model.canonical(params), []
  for i in range(N):  # layer i's FFN and attention are silenced
    off = tuple(f'blocks/{i}/{part}' for part in ('ffn', 'attention/'))
    outputs = ('down', 'down_bias', '/out', '/out_bias')
    variants.append(model.running({
        n: x * 0 if n.startswith(off) and n.endswith(outputs) else x for n, x in flat.items()}))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), params, *variants)
  taps = jit(jax.vmap(lambda p: model.apply(
      p, batch['tokens_BL'], batch['domain_B'], TAPS)[2]))(stacked)
  for name in ('ffn', 'attention'):
    silent = ~np.asarray(taps[name]).any((2, 3, 4))
    np.testing.assert_array_equal(silent, np.eye(N + 1, N, k=-1, dtype=bool), err_msg=name)


def test_taps_do_not_change_hidden(plain):
  kind, params, batch, expected = plain
  model = tiny(kind)
  run = lambda taps: jit(lambda p: model.apply(p, batch['tokens_BL'], batch['domain_B'], taps,
                                               balanced=True))(params)
  (bare, _, none), (hidden, _, some) = run(()), run(('block',))
  assert none == {} and some.keys() == {'block'}
  assert_same({'hidden': bare}, {'hidden': hidden})
  np.testing.assert_allclose(bare, expected['hidden'], rtol=1e-5, atol=1e-5)


# ---- types, presets and refusals

@pytest.mark.parametrize('kind', ['gpt', 'llama', 'period 2'])
def test_the_computation_has_the_type_that_was_asked_for(kind):
  batch, model = batch_of(BALANCED), tiny(kind, dtype='bfloat16')
  hidden, _, taps = jax.eval_shape(lambda p: model.apply(
      p, batch['tokens_BL'], batch['domain_B'], TAPS, balanced=True), model.abstract)
  assert {x.dtype for x in jax.tree.leaves((hidden, taps))} == {jnp.dtype('bfloat16')}
  products = {v.aval.dtype for e in jaxprs.equations(jax.make_jaxpr(lambda p: model.apply(
      p, batch['tokens_BL'], batch['domain_B'])[0])(model.abstract))
              if e.primitive.name == 'dot_general' for v in e.invars}
  assert products == {jnp.dtype('bfloat16')}  # none crept back to float32


@pytest.mark.parametrize('field,value,named', [
    ('ffn', 'mox', 'ffn'), ('norm', 'batchnorm', 'layernorm'), ('norm_placement', 'both', 'post'),
    ('positions', 'rotari', "did you mean 'rotary'"), ('activation', 'relu', 'gelu'),
    ('init', 'zeros', 'fairseq'), ('expert_every', 3, 'at most 2'),
    ('heads', 3, 'd_model=16.*heads=3'), ('kv_heads', 3, 'heads=4.*kv_heads=3'),
    ('experts', (), 'domains'),
    ('layers', 3, 'layers=3.*period=2')])
def test_a_model_that_cannot_be_is_refused(field, value, named):
  config = dataclasses.replace(tiny('period 2').config, kv_heads=2)
  Model(config)
  with pytest.raises(BadInput, match=named):
    Model(dataclasses.replace(config, **{field: value}))


def test_odd_heads_cannot_turn_and_unknown_policies_are_named():
  with pytest.raises(BadInput, match='head_size=3'):
    tiny('llama', head_size=3)
  tiny('gpt', head_size=3)
  with pytest.raises(BadInput, match=r"remat='dot'.*did you mean 'dots'"):
    tiny(remat='dot')
  with pytest.raises(BadInput, match='loss_block=-1'):
    tiny(loss_block=-1)


def test_what_the_model_does_not_have_is_refused_not_made_up():
  model = tiny()
  run = lambda length, *taps: jax.eval_shape(lambda p: model.apply(
      p, jnp.zeros((4, length), int), jnp.arange(4), taps), model.abstract)
  assert run(8)[0].shape == (4, 8, 16)
  with pytest.raises(BadInput, match=r'9 positions .* 8'):
    run(9)
  with pytest.raises(BadInput, match=r"'blok'.*'block'"):
    run(8, 'blok')
  llama = tiny('llama')  # rotary: any length
  assert jax.eval_shape(lambda p: llama.apply(p, jnp.zeros((4, 99), int), jnp.arange(4))[0],
                        llama.abstract).shape == (4, 99, 16)


def test_presets_differ_from_each_other_as_their_names_say():
  for size, fields in PRESETS.items():
    gpt, llama = preset(f'gpt-{size}'), preset(f'llama-{size}', kv_heads=1)
    for config in (gpt, llama):
      config.check()
      assert {f: getattr(config, f) for f in fields} == fields
    assert gpt == ModelConfig(**fields)  # the papers' form is the default
    assert (llama.norm, llama.positions, llama.activation, llama.biases, llama.kv_heads) == (
        'rmsnorm', 'rotary', 'swiglu', False, 1)
    # Three matrices cost what two did, within the rounding of F to 64.
    assert abs(3 * llama.ff_width - 2 * gpt.ff_width) < 3 * 64
  with pytest.raises(BadInput, match="did you mean 'gpt-125m'"):
    preset('gpt-124m')

