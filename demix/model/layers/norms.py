"""LayerNorm and RMSNorm over the last axis, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


def _normalisation(statistics):
  """(x, scale) → float32 (x - mean) · inverse · scale over the last axis, (mean, inverse) by
  `statistics`, with mean 0 where it is None.

  Its own backward pass keeps x, in x's type, and the statistics; the one that JAX derives keeps
  float32 copies of x's size (docs/memory.md). Its time gains too little to be told from noise.
  """
  def normed(x, mean, inverse):
    x = x.astype(jnp.float32)
    return (x if mean is None else x - mean) * inverse

  def forward(x, scale):
    found = statistics(x.astype(jnp.float32))
    return normed(x, *found) * scale, (x, scale, found)

  def backward(saved, dy):
    x, scale, (mean, inverse) = saved
    y = normed(x, mean, inverse)
    dscale = (dy * y).sum(tuple(range(dy.ndim - 1)))
    dy = dy * scale
    dx = dy - y * (dy * y).mean(-1, keepdims=True)
    if mean is not None:
      dx -= dy.mean(-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), dscale

  norm = jax.custom_vjp(lambda x, scale: forward(x, scale)[0])
  norm.defvjp(forward, backward)
  return norm


def _moments(x):
  mean = x.mean(-1, keepdims=True)
  return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)


layer_norm = _normalisation(_moments)
rms_norm = _normalisation(
    lambda x: (None, jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)))


class LayerNorm(nnx.Module):
  """y = (x - mean) / sqrt(var + 1e-5) · scale + bias; bias only where the model has biases."""

  def __init__(self, size: int, biases: bool):
    self.scale = nnx.Param(jnp.ones((size,)))
    if biases:
      self.bias = nnx.Param(jnp.zeros((size,)))
    self.biases = biases

  def __call__(self, x):
    """x [..., size] → the same shape and dtype."""
    y = layer_norm(x, self.scale[...])
    if self.biases:
      y = y + self.bias[...]
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x²) + 1e-5) · scale (Zhang and Sennrich 2019)."""

  def __init__(self, size: int, biases: bool = False):
    self.scale = nnx.Param(jnp.ones((size,)))

  def __call__(self, x):
    """x [..., size] → the same shape and dtype."""
    return rms_norm(x, self.scale[...]).astype(x.dtype)


KINDS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}
