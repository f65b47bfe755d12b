"""From log-probabilities to a token: greedy, temperature, top-k, top-p. The vocabulary is never
sorted: XLA's CPU backend takes 50 times a matrix product for that. A threshold is found bit by bit.
"""

import jax
import jax.numpy as jnp

from demix.generation.sampling_config import SamplingConfig


def ordered(x):
  """float32 → uint32 in the same order."""
  x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0 is 0
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def threshold(x_V, holds):
  """The largest value t (as `ordered`) for which `holds(ordered(x) >= t)`; 0 if for none. `holds`
  is true of a set if it is true of a smaller one that it contains."""
  keys = ordered(x_V)
  def bit(i, t):
    candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(holds(keys >= candidate), candidate, t)
  return jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))


def among_top_k(logp_V, k: int):
  """bool [V]: the k most likely; ties with the last of them stay in."""
  return ordered(logp_V) >= threshold(logp_V, lambda kept: kept.sum() >= k)


def among_top_p(logp_V, p: float):
  """bool [V]: the fewest most likely tokens whose probabilities sum to at least p (Holtzman et al.
  2020); ties with the last of them stay in."""
  probability = jax.nn.softmax(logp_V)
  return ordered(probability) >= threshold(
      probability, lambda kept: jnp.where(kept, probability, 0).sum() >= p)


def draw(logp_V, key, config: SamplingConfig):
  """A token id from log-probabilities [V]: temperature, then top-k, then top-p, then a draw."""
  if config.temperature == 0:
    return logp_V.argmax()
  scores = logp_V / config.temperature
  if config.top_k and config.top_k < scores.shape[0]:
    scores = jnp.where(among_top_k(scores, config.top_k), scores, -jnp.inf)
  if config.top_p < 1:
    scores = jnp.where(among_top_p(scores, config.top_p), scores, -jnp.inf)
  # The Gumbel trick: its argmax is a draw from softmax(scores).
  return (scores + jax.random.gumbel(key, scores.shape)).argmax()
