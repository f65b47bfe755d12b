"""The DEMix layer (Gururangan et al. 2021, §3): a feed-forward layer for each domain.

Four ways through it, one contract (tokens in, route in, tokens out):

1. balanced: rows are expert-major, equally many per expert: a matmul batched over E. No gather, no
   all-to-all; the way training goes.
2. `domain_B`: any rows: the row's expert is gathered. Evaluation and unbalanced batches.
3. one `domain` for all rows: its FFN alone, as a dense LM's. Members of a mixture.
4. `weights_BE` or `weights_BLE`: the weighted sum of all experts' outputs.

All experts start identical, as in the released code (the same seed on every rank).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from demix.layers import feed_forward


class DomainExperts(nnx.Module):
  """The leaves of E experts, stacked on a leading axis: up [E, D, F], down [E, F, D], …"""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.names = ()
    for name, value in feed_forward.weights(config, rngs).items():
      copies = jnp.broadcast_to(value, (len(config.experts), *value.shape))
      setattr(self, name, nnx.Param(copies))
      self.names += (name,)

  def leaves(self) -> dict:
    return {n: getattr(self, n)[...] for n in self.names}


class DomainExpertFFN(nnx.Module):
  """E feed-forward layers, chosen or weighted by the domain of the row."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.experts = DomainExperts(config, rngs=rngs)
    self.activation, self.num_experts = config.activation, len(config.experts)

  def __call__(self, x_BLD, route, balanced: bool = False):
    """x [B, L, D], route int [] or [B], float [B, E] or float [B, L, E] → [B, L, D].

    `balanced` promises that `route` is 0…0 1…1 … E-1…E-1 with B / E rows each; it is not read then.
    """
    B, L, D = x_BLD.shape
    leaves = self.experts.leaves()
    if balanced:
      x_ESD = x_BLD.reshape(self.num_experts, B // self.num_experts * L, D)
      return feed_forward.forward(leaves, x_ESD, self.activation).reshape(B, L, D)
    if route.ndim == 0:
      own = {n: leaf[route] for n, leaf in leaves.items()}
      return feed_forward.forward(own, x_BLD.reshape(B * L, D), self.activation).reshape(B, L, D)
    if route.ndim == 1:
      own = {n: leaf[route] for n, leaf in leaves.items()}
      return feed_forward.forward(own, x_BLD, self.activation)
    weights_BLE = route if route.ndim == 3 else route[:, None, :]
    def add(total, expert):
      leaf, weight = expert
      y = feed_forward.forward(leaf, x_BLD, self.activation)
      return total + weight[..., None].astype(y.dtype) * y, None
    return jax.lax.scan(add, jnp.zeros_like(x_BLD), (leaves, jnp.moveaxis(weights_BLE, -1, 0)))[0]
