"""LayerNorm and RMSNorm over the last axis, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
  """y = (x - mean) / sqrt(var + 1e-5) · scale + bias; bias only where the model has biases."""

  def __init__(self, size: int, biases: bool):
    self.scale = nnx.Param(jnp.ones((size,)))
    if biases:
      self.bias = nnx.Param(jnp.zeros((size,)))
    self.biases = biases

  def __call__(self, x):
    """x [..., size] → the same shape and dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    y = y * self.scale[...]
    if self.biases:
      y = y + self.bias[...]
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x²) + 1e-5) · scale (Zhang and Sennrich 2019)."""

  def __init__(self, size: int, biases: bool = False):
    self.scale = nnx.Param(jnp.ones((size,)))

  def __call__(self, x):
    """x [..., size] → the same shape and dtype."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-5)
    return (y * self.scale[...]).astype(x.dtype)


KINDS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}
