"""attention.py: the mask, the hand-written gradient, and the layer against NumPy."""

import formulas
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx

from demix.model import tree
from demix.model.layers import attention, initializers

SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]], np.int32)
PICTURES = """
#.....  #.....
##....  .#....
..#...  ..#...
..##..  ..##..
..###.  ....#.
.....#  ....##
"""


def picture(visible_LL) -> list[str]:
  return [''.join('#' if v else '.' for v in row) for row in visible_LL]


def test_the_mask_is_causal_and_keeps_to_segments():
  causal = attention.mask_bias(4)
  assert picture(causal == 0) == ['#...', '##..', '###.', '####']
  bias = attention.mask_bias(6, jnp.asarray(SEGMENTS))
  assert bias.shape == (2, 1, 6, 6)
  rows = [line.split() for line in PICTURES.split('\n') if line]
  for b in range(2):
    assert picture(bias[b, 0] == 0) == [row[b] for row in rows]
  for values in (causal, np.asarray(bias)):
    assert set(np.unique(values)) == {np.float32(-1e9), np.float32(0)}
    hidden = values[values < 0] + np.float32(1e3) * np.linspace(-1, 1, (values < 0).sum())
    assert not np.exp(hidden.astype(np.float32)).any()  # whatever the score: an exact zero


def plain(q, k, v, bias):
  """Softmax attention with every head's weights written out; its gradient is JAX's."""
  B, G, M, K = q.shape
  length = k.shape[2]
  q = q.reshape(B, G, M // length, length, K)
  scores = jnp.einsum('bghqk,bgsk->bghqs', q, k)
  allowed = np.broadcast_to(bias, (B, 1, length, length))[:, :, None] == 0
  weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
  return jnp.einsum('bghqs,bgsk->bghqk', weights, v).reshape(B, G, M, K)


def value_and_pull(f, inputs, dy):
  """f(*inputs) and its gradients for the cotangent dy, in the type of the inputs."""
  def run(inputs, dy):
    y, pull = jax.vjp(f, *inputs)
    return y, pull(dy)
  return models.jit(run)(inputs, dy)


@pytest.mark.parametrize('block', [0, 4])
@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('groups,queries', [(3, 1), (2, 3), (1, 4)])
def test_attend_is_softmax_attention_in_value_and_gradient(groups, queries, segments, block):
  random, B, length, K = np.random.default_rng(groups), 2, 6, 5
  q = random.normal(size=(B, groups, queries * length, K)) * 2
  k, v = random.normal(size=(2, B, groups, length, K)) * 2
  dy = random.normal(size=q.shape)
  bias = attention.mask_bias(length, jnp.asarray(SEGMENTS) if segments else None)
  y, grads = value_and_pull(lambda *x: attention.attend(*x, bias, block),
                            [np.float32(x) for x in (q, k, v)], np.float32(dy))
  with jax.enable_x64(True):
    expected, expected_grads = value_and_pull(
        lambda *x: plain(*x, np.asarray(bias)), [q, k, v], dy)
  assert y.dtype == np.float32 and expected.dtype == np.float64
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for name, a, b in zip('qkv', grads, expected_grads):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=f'gradient of {name}')


@pytest.mark.parametrize('block', [0, 64])
def test_bfloat16_rounds_what_goes_in_and_out_and_no_score(block):
  """One rounding of the outputs is 0.0017; with rounded scores y is at 0.0025, dq and dk 0.0105."""
  random, shape = np.random.default_rng(0), (2, 4, 128, 32)
  inputs = [jnp.asarray(random.normal(size=shape) * size, jnp.bfloat16)
            for size in (4 * shape[-1] ** -0.5, 2, 1, 1)]
  bias = attention.mask_bias(shape[2])
  y, grads = value_and_pull(lambda *x: attention.attend(*x, bias, block), inputs[:3], inputs[3])
  double = lambda x: np.asarray(x).astype(np.float64)
  with jax.enable_x64(True):
    *exact, dy = map(double, inputs)
    expected = value_and_pull(lambda *x: plain(*x, bias), exact, dy)
  for name, a, b, most in zip(('y', 'dq', 'dk', 'dv'), (y, *grads), (expected[0], *expected[1]),
                              (0.002, 0.0035, 0.0035, 0.0027)):
    assert a.dtype == jnp.bfloat16
    assert np.linalg.norm(double(a) - double(b)) < most * np.linalg.norm(b), name


def test_bfloat16_queries_are_scaled_and_rounded_once():
  """32 ** -0.5 as a bfloat16 is 0.14 % off, and so would be every score, all in one direction."""
  config = models.tiny(layers=1, ffn='dense', d_model=64, heads=2, biases=False).config
  module = attention.Attention(config, rngs=initializers.Keys(jax.random.key(0)))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 64)) * 4, jnp.bfloat16)
  seen = []
  module(x[None], np.arange(6)[None], lambda q, k, v: seen.append(q) or v)
  scaled = np.asarray(module._linear(x, 'q')).astype(np.float32) * np.float32(32 ** -0.5)
  q_BHLK = scaled.astype(jnp.bfloat16).reshape(1, 6, 2, 32).transpose(0, 2, 1, 3)
  np.testing.assert_array_equal(seen[0], q_BHLK)


@pytest.mark.parametrize('queries', [1, 2])
def test_no_row_in_a_block_sees_a_later_token(queries):
  random, length, block = np.random.default_rng(0), 10, 4  # blocks of 4, 4 and 2
  q = random.normal(size=(2, 3, queries * length, 5)).astype(np.float32)
  k, v = random.normal(size=(2, 2, 3, length, 5)).astype(np.float32)
  bias, each = attention.mask_bias(length), np.arange(queries * length) % length
  run = models.jit(lambda q, k, v, dy: jax.vjp(
      lambda *x: attention.attend(*x, bias, block), q, k, v)[0])
  pull = models.jit(lambda q, k, v, dy: jax.vjp(
      lambda *x: attention.attend(*x, bias, block), q, k, v)[1](dy))
  y = np.asarray(run(q, k, v, q))
  for last in range(length):
    late = np.arange(length) > last
    changed = [np.where(late[:, None], x + 3, x) for x in (k, v)]
    np.testing.assert_array_equal(run(q, *changed, q)[:, :, each <= last], y[:, :, each <= last])
    if late.any():
      assert np.abs(run(q, *changed, q)[:, :, each > last] - y[:, :, each > last]).max() > 0.1
    dk, dv = map(np.asarray, pull(q, k, v, np.where((each <= last)[:, None], q, 0))[1:])
    assert not dk[:, :, late].any() and not dv[:, :, late].any()
    assert np.abs(dv[:, :, ~late]).min() > 0


@pytest.mark.parametrize('length', [1, 64, 65, 128, 1000, 2048])
def test_blocks_cover_every_row_and_skip_nearly_half(length):
  block = attention.causal_block(length)
  spans = attention._spans(length, length, block)
  assert [i for start, end, _ in spans for i in range(start, end)] == list(range(length))
  assert all(end == seen for _, end, seen in spans)
  share = sum((end - start) * seen for start, end, seen in spans) / length ** 2
  assert len(spans) <= 8 and share <= 0.5 + 0.5 / len(spans) + 0.01
  assert (len(spans) == 1) == (length <= 64)


def layer(kind, **changes):
  """Of an Attention layer with drawn leaves: config, function, and the leaves in float64."""
  model = models.tiny(kind, ffn='dense', layers=1, expert_every=1, **changes)
  prefix = 'blocks/0/attention/'
  flat = {n.removeprefix(prefix): x for n, x in model.canonical(models.drawn(model)).items()
          if n.startswith(prefix)}
  module = nnx.eval_shape(lambda: attention.Attention(model.config, rngs=nnx.Rngs(0)))
  graph, _ = nnx.split(module)
  run = models.jit(lambda x, positions, bias: nnx.merge(graph, tree.unflatten(flat))(
      jnp.float32(x), positions, bias))
  return model.config, run, {n: np.float64(x) for n, x in flat.items()}


@pytest.mark.parametrize('kind,changes', [
    ('gpt', {}), ('llama', {}), ('gpt', dict(kv_heads=1, head_size=6, rope_scale=4.0,
                                             positions='rotary', rope_theta=100.0))])
def test_the_layer_is_its_formula(kind, changes):
  config, run, leaves = layer(kind, **changes)
  random = np.random.default_rng(1)
  x = random.normal(size=(2, 6, config.d_model))
  positions = np.array([[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]])
  bias = attention.mask_bias(6, jnp.asarray(SEGMENTS))
  y = run(x, positions, bias)
  np.testing.assert_allclose(y, formulas.attention(config, leaves, x, positions, SEGMENTS),
                             rtol=1e-4, atol=1e-5)


def test_rotary_attention_sees_distances_only():
  config, run, _ = layer('llama')
  x = np.random.default_rng(2).normal(size=(2, 6, config.d_model))
  bias, near = attention.mask_bias(6), np.arange(6)[None]
  y = run(x, near, bias)
  np.testing.assert_allclose(run(x, near + 40, bias), y, rtol=1e-4, atol=1e-5)
  assert np.abs(run(x, near * 2, bias) - y).max() > 0.01
  assert np.abs(run(x, near * 0, bias) - y).max() > 0.01
