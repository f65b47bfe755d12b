"""demix/model/layers/norms.py: values and gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from models import jit

from demix.model.layers.norms import LayerNorm, RMSNorm


def formula(kind, leaves, x):
  """y = (x - mean) / sqrt(var + 1e-5) · scale + bias; RMSNorm leaves out mean and bias."""
  centred = x - x.mean(-1, keepdims=True) if kind is LayerNorm else x
  y = centred / jnp.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5) * leaves['scale']
  return y + leaves.get('bias', 0)


@pytest.mark.parametrize('kind,biases', [(LayerNorm, True), (LayerNorm, False), (RMSNorm, False)])
def test_values_and_gradients_are_the_formula(kind, biases):
  random = np.random.default_rng(0)
  x, dy = random.normal(size=(2, 3, 4, 6)) * np.array([[[1e-3]], [[1]], [[50]]]) + 0.2
  leaves = {'scale': random.normal(size=6)} | ({'bias': random.normal(size=6)} if biases else {})
  graph, state = nnx.split(kind(6, biases))
  assert nnx.to_pure_dict(state).keys() == leaves.keys()
  def run(f, leaves, x, dy):
    y, pull = jax.vjp(f, leaves, x)
    return y, pull(dy)
  short = jax.tree.map(np.float32, (leaves, x, dy))
  y, grads = jit(run, static_argnums=0)(lambda w, x: nnx.merge(graph, w)(x), *short)
  with jax.enable_x64(True):
    expected, expected_grads = jit(run, static_argnums=0)(
        lambda w, x: formula(kind, w, x), leaves, x, dy)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  (dw, dx), (expected_dw, expected_dx) = jax.device_get((grads, expected_grads))
  largest = np.abs(expected_dx).max(-1, keepdims=True)
  np.testing.assert_allclose(dx / largest, expected_dx / largest, atol=1e-4)
  for name in leaves:
    np.testing.assert_allclose(dw[name], expected_dw[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('kind', [LayerNorm, RMSNorm])
def test_bfloat16_is_normed_in_float32(kind):
  x = jnp.asarray(100 + np.random.default_rng(1).normal(size=(5, 64)), jnp.bfloat16)
  y = kind(64, False)(x)
  assert y.dtype == jnp.bfloat16
  exact = formula(kind, {'scale': 1}, np.float64(x))
  np.testing.assert_allclose(np.float64(y), exact, rtol=2 ** -8, atol=1e-6)  # rounded once


@pytest.mark.parametrize('kind,scalars', [(LayerNorm, 2), (RMSNorm, 1)])
def test_the_backward_pass_keeps_the_input_and_scalars_of_tokens(kind, scalars, capsys):
  graph, leaves = nnx.split(kind(64, True))
  print_saved_residuals(lambda leaves, x: nnx.merge(graph, leaves)(x), leaves,
                        jnp.ones((5, 64), jnp.bfloat16))
  kept = sorted(line.split()[0] for line in capsys.readouterr().out.splitlines())
  assert kept == ['bf16[5,64]', *['f32[5,1]'] * scalars, 'f32[64]'], kept
