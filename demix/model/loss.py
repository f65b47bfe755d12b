"""Negative log-likelihood per token, plain or in blocks that never store [B, L, V] logits."""

import jax
import jax.numpy as jnp


def logits(hidden, table_VD, vocab_size: int):
  """Scores over the vocabulary: hidden [..., D], table [rows, D] → float32 [..., rows].

  Rows past `vocab_size` are padding and can never be predicted (-1e9).
  """
  # The barrier keeps the transpose out of the products: the table's gradient is then x.T @ dlogits,
  # which XLA's CPU backend runs at twice the rate of dlogits.T @ x.
  table_DV = jax.lax.optimization_barrier(table_VD.astype(hidden.dtype).T)
  out = jnp.matmul(hidden, table_DV, preferred_element_type=jnp.float32)
  if table_VD.shape[0] == vocab_size:
    return out
  return jnp.where(jnp.arange(table_VD.shape[0]) < vocab_size, out, -1e9)


def nll(hidden_BLD, table_VD, targets_BL, vocab_size: int, block: int = 0):
  """-log p(target) in nats.

  Args:
    hidden_BLD: final hidden states.
    table_VD: output table, one row per id, padded rows last.
    targets_BL: ids to score.
    vocab_size: real rows of the table.
    block: tokens per block; logits exist for one block at a time and are computed again in the
      backward pass. 0: all at once. B · L need not be a multiple of it.

  Returns:
    float32 [B, L].
  """
  def some(hidden, targets):
    # logsumexp minus the target's logit: nothing of the size of the logits but the logits.
    scores = logits(hidden, table_VD, vocab_size)
    return jax.nn.logsumexp(scores, -1) - jnp.take_along_axis(scores, targets[:, None], -1)[:, 0]

  count = targets_BL.size
  # One axis of tokens: with [B, L] kept apart the gradient products lose what the barrier won.
  hidden, targets = hidden_BLD.reshape(count, -1), targets_BL.reshape(count)
  if not block or block >= count:
    return some(hidden, targets).reshape(targets_BL.shape)
  blocks = -(-count // block)
  pad = lambda x: jnp.pad(x, [(0, blocks * block - count)] + [(0, 0)] * (x.ndim - 1))
  hidden, targets = (pad(x).reshape(blocks, block, *x.shape[1:]) for x in (hidden, targets))
  _, out = jax.lax.scan(lambda _, xs: (None, jax.checkpoint(some)(*xs)), None, (hidden, targets))
  return out.reshape(-1)[:count].reshape(targets_BL.shape)
