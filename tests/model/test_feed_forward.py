"""demix/model/ffn/feed_forward.py: the activations, their gradients, and what these keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from demix.model.ffn.feed_forward import ACTIVATIONS

THEIRS = {'gelu': lambda x: jax.nn.gelu(x, approximate=False),
          'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True), 'swiglu': jax.nn.silu}
X = np.concatenate([np.linspace(-12, 12, 4001), [0, 1e-30, -1e-30, 60, -60, 1e4, -1e4]])


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_value_and_gradient_are_those_of_jax_in_float64(name):
  dy = np.random.default_rng(0).normal(size=X.shape)
  y, pull = jax.vjp(ACTIVATIONS[name], np.float32(X))
  with jax.enable_x64(True):
    expected, expected_pull = jax.vjp(THEIRS[name], X)
    expected_dx, = expected_pull(dy)
  np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(pull(np.float32(dy))[0], expected_dx, rtol=2e-5, atol=4e-6)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_bfloat16_is_computed_in_float32(name):
  x, dy = jnp.asarray(X, jnp.bfloat16), jnp.asarray(np.cos(X), jnp.bfloat16)
  y, pull = jax.vjp(ACTIVATIONS[name], x)
  assert y.dtype == jnp.bfloat16 and pull(dy)[0].dtype == jnp.bfloat16
  wide, wide_pull = jax.vjp(ACTIVATIONS[name], x.astype(jnp.float32))
  np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))  # rounded once
  np.testing.assert_array_equal(
      pull(dy)[0], wide_pull(dy.astype(jnp.float32))[0].astype(jnp.bfloat16))


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_the_backward_pass_keeps_the_input_alone(name, capsys):
  x = jnp.ones((3, 7), jnp.bfloat16)
  print_saved_residuals(ACTIVATIONS[name], x)
  kept = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in kept] == ['bf16[3,7]'], kept
