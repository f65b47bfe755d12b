"""The DEMix layer (Gururangan et al. 2021, §3): a feed-forward layer for each domain.

Four ways through it, one contract (tokens in, route in, tokens out):

1. balanced: rows are expert-major, equally many per expert: a matmul batched over E. No gather, no
   all-to-all; the way training goes.
2. `domain_B`: any rows: `gathered` or `grouped`. Evaluation and unbalanced batches.
3. one `domain` for all rows: its FFN alone, as a dense LM's. Members of a mixture.
4. `weights_BE` or `weights_BLE`: the weighted sum of all experts' outputs.

All experts start identical, as in the released code (the same seed on every rank).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from demix.model.ffn import feed_forward
from demix.model.layers import initializers


class DomainExperts(nnx.Module):
  """The leaves of E experts, stacked on a leading axis: up [E, D, F], down [E, F, D], …"""

  def __init__(self, config, *, rngs: initializers.Keys):
    self.names = ()
    for name, value in feed_forward.weights(config, rngs).items():
      copies = jnp.broadcast_to(value, (len(config.experts), *value.shape))
      setattr(self, name, nnx.Param(copies))
      self.names += (name,)

  def leaves(self) -> dict:
    return {n: getattr(self, n)[...] for n in self.names}


def gathered(leaves: dict, x_BLD, domain_B, activation: str):
  """Each row with a copy of its expert: B products of [L, D] and [D, F].

  The copies are made again in the backward pass: kept, they are B · D · F scalars a kernel and
  layer. At 1M the compiled step's scratch is 323 MiB with it, not 387, and its rate 0.84 of dense,
  not 0.81, by CPU time in turns on a busy machine; the loss has the same bits.
  """
  @functools.partial(jax.checkpoint, policy=keep_no_copies)
  def run(leaves, x, domain):
    own = {n: leaf[domain] for n, leaf in leaves.items()}
    return feed_forward.forward(own, x, activation)
  return run(leaves, x_BLD, domain_B)


def keep_no_copies(primitive, *_, **params) -> bool:
  """Checkpoint policy: everything is kept but gathered weights, as they are or in another type."""
  return primitive.name not in ('gather', 'convert_element_type')


def grouped(leaves: dict, x_BLD, domain_B, activation: str):
  """Rows sorted by expert, then products over groups of unequal size (`jax.lax.ragged_dot`)."""
  B, L, D = x_BLD.shape
  order = jnp.argsort(domain_B)
  domain = domain_B[order]
  sizes = L * jnp.bincount(domain, length=leaves['up'].shape[0]).astype(jnp.int32)
  def product(x, name):
    y = jax.lax.ragged_dot(x, leaves[name].astype(x.dtype), sizes)
    bias = leaves.get(f'{name}_bias')
    if bias is None:
      return y
    return (y.reshape(B, L, -1) + bias[domain][:, None].astype(y.dtype)).reshape(y.shape)
  y = feed_forward.forward(leaves, x_BLD[order].reshape(B * L, D), activation, product)
  return y.reshape(B, L, D)[jnp.argsort(order)]


def any_rows():
  """The form for rows of any domains, by backend.

  On CPU XLA runs `ragged_dot` as E masked dense products: 8.5 times a dense FFN, forward and
  backward, at d 256, E 8, 16 rows; gathering 1.1 (2 cores, jax 0.10). On one GPU or TPU the grouped
  kernel reads each expert once, and gathering would write B copies of its weights: not measured, no
  accelerator was at hand. On several devices rows stay where they are: gathering.
  """
  one = jax.device_count() == 1 and jax.default_backend() in ('gpu', 'tpu')
  return grouped if one else gathered


class DomainExpertFFN(nnx.Module):
  """E feed-forward layers, chosen or weighted by the domain of the row."""

  def __init__(self, config, *, rngs: initializers.Keys):
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
      return any_rows()(leaves, x_BLD, route, self.activation)
    weights_BLE = route if route.ndim == 3 else route[:, None, :]
    def add(total, expert):
      leaf, weight = expert
      y = feed_forward.forward(leaf, x_BLD, self.activation)
      return total + weight[..., None].astype(y.dtype) * y, None
    return jax.lax.scan(add, jnp.zeros_like(x_BLD), (leaves, jnp.moveaxis(weights_BLE, -1, 0)))[0]
