"""Gate: scores of members (log prior + evidence) into weights: temperature, top-k, in which order,
renormalised or not. All in log space."""

import jax
import jax.numpy as jnp

ORDERS = ('topk_softmax', 'softmax_topk')


def among_largest(scores, k: int):
  """bool like `scores` [E, ...]: the k largest of each column; of equal ones the first."""
  place = jnp.zeros(scores.shape, jnp.int32)
  index = jnp.arange(scores.shape[0]).reshape(-1, *[1] * (scores.ndim - 1))
  for e in range(scores.shape[0]):
    place += (scores[e] > scores) | ((scores[e] == scores) & (e < index))
  return place < k


def log_weights(scores, *, temperature: float = 1.0, top_k: int = 0, order: str = 'topk_softmax',
                renormalise: bool = True):
  """Weights of members along the first axis.

  Args:
    scores: [E, ...] in nats; -inf for a member that is out.
    temperature: scores are divided by it.
    top_k: members that keep a weight (0: all).
    order: topk_softmax: softmax over the k kept; softmax_topk: over all, then k are kept.
    renormalise: softmax_topk only: the kept weights are scaled to sum to 1. (Without it the
      mixture is no distribution: its NLL is an upper bound.)

  Returns:
    log weights like `scores`, -inf for a weight of 0.
  """
  scores = scores / temperature
  if not top_k or top_k >= scores.shape[0]:
    return jax.nn.log_softmax(scores, 0)
  kept = among_largest(scores, top_k)
  if order == 'topk_softmax' or renormalise:  # equal: softmax restricted and rescaled
    return jax.nn.log_softmax(jnp.where(kept, scores, -jnp.inf), 0)
  return jnp.where(kept, jax.nn.log_softmax(scores, 0), -jnp.inf)
