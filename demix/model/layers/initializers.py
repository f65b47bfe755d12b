"""How weights start. Two schemes: `fairseq`, what DEMix and BTM trained with, and `normal`.

`fairseq` (the papers' code): embeddings N(0, 1/d), attention Xavier-uniform with gain 1/sqrt(2) for
q, k, v, FFN uniform in ±1/sqrt(fan_in). `normal`: N(0, 0.02), and residual outputs scaled by
1/sqrt(2 N) as in GPT-2.
"""

import jax
import jax.numpy as jnp


class Keys:
  """The keys of nnx.Rngs(params=key), counted in Python.

  Flax counts in a variable, and sets it after asking both numbers for their sharding. A traced one
  has none, which JAX says with a print of all equations so far: half the time of tracing an init.
  """

  def __init__(self, key):
    self._key, self._count = key, 0

  def params(self):
    """The next key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count - 1)


def embedding(key, shape, scheme: str):
  """[V or L, D] table."""
  std = shape[-1] ** -0.5 if scheme == 'fairseq' else 0.02
  return std * jax.random.normal(key, shape)


def attention_input(key, shape, scheme: str):
  """[D, heads · K] kernel of q, k or v."""
  if scheme == 'fairseq':
    return _uniform(key, shape, (0.5 * 6 / sum(shape)) ** 0.5)
  return 0.02 * jax.random.normal(key, shape)


def attention_output(key, shape, scheme: str, layers: int):
  """[H · K, D] kernel back to the residual stream."""
  if scheme == 'fairseq':
    return _uniform(key, shape, (6 / sum(shape)) ** 0.5)
  return 0.02 * (2 * layers) ** -0.5 * jax.random.normal(key, shape)


def feed_forward_input(key, shape, scheme: str):
  """[D, F] kernel."""
  if scheme == 'fairseq':
    return _uniform(key, shape, shape[0] ** -0.5)
  return 0.02 * jax.random.normal(key, shape)


def feed_forward_output(key, shape, scheme: str, layers: int):
  """[F, D] kernel back to the residual stream."""
  if scheme == 'fairseq':
    return _uniform(key, shape, shape[0] ** -0.5)
  return 0.02 * (2 * layers) ** -0.5 * jax.random.normal(key, shape)


def feed_forward_bias(key, size: int, fan_in: int, scheme: str):
  """[size] bias; the papers' framework starts it uniform in ±1/sqrt(fan_in)."""
  return _uniform(key, (size,), fan_in ** -0.5) if scheme == 'fairseq' else jnp.zeros((size,))


def _uniform(key, shape, bound):
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
