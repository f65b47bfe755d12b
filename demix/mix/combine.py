"""Combine: what is mixed with the weights. Probabilities (the papers), logits, or pick one."""

import jax
import jax.numpy as jnp

KINDS = ('probabilities', 'logits', 'pick')


def probabilities(log_weights, loglik):
  """log Σ_e w_e p_e: [E, ...], [E, ...] → [...]. A member of weight 0 takes no part, even where
  its own log p is -inf."""
  mixed = jnp.where(jnp.isneginf(log_weights), -jnp.inf, log_weights + loglik)
  return jax.nn.logsumexp(mixed, 0)


def pick(log_weights, loglik):
  """log p of the member with the largest weight (of equal ones the first): [E, ...] → [...]."""
  best = log_weights.argmax(0)
  return jnp.take_along_axis(loglik, best[None], 0)[0]


def logits(log_weights, logits_V):
  """log softmax(Σ_e w_e logits_e): [E, ...], [E, ..., V] → [..., V]."""
  weights = jnp.exp(log_weights)[..., None]
  # A weight of 0 times padding's -1e9 stays 0; times -inf it would not.
  return jax.nn.log_softmax((weights * logits_V).sum(0), -1)
