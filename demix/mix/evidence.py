"""Evidence: what tells us that a member fits, in nats, at each position, from what precedes it.

prefix: Σ_{s<t} log p_e(y_s), the whole text so far (the papers' posterior). last_token: the
likelihood of the one token before (what the released code computes). none: nothing. Between them
lie a window of the last w tokens and a decay γ of older ones. clusters: how near the text so far is
to the cluster that a member was trained on (c-BTM); no member need be run to know it.

No evidence at position t depends on the token that t predicts, or on later ones. It restarts with
each row, and with each segment where rows hold several.
"""

import jax
import jax.numpy as jnp

KERNELS = ('d2', 'd4')


def relative(loglik):
  """loglik [E, ...] → what each member is behind the best one: its sums over thousands of tokens
  stay small where it matters, and are exactly 0 for identical members."""
  return loglik - loglik.max(0)


def given(member, count: int):
  """A known domain: 0 for `member`, -inf for the others; int [...] → [count, ...]."""
  same = jnp.arange(count).reshape(-1, *[1] * jnp.ndim(member)) == member
  return jnp.where(same, 0.0, -jnp.inf)


def starts(shape, segments_BL=None):
  """bool [B, L] or [1, L]: positions that nothing precedes."""
  L = shape[1]
  if segments_BL is None:
    return (jnp.arange(L) == 0)[None]
  before = jnp.pad(segments_BL, ((0, 0), (1, 0)))[:, :L]
  return (segments_BL != before) | (jnp.arange(L) == 0)


def preceding(loglik_EBL, *, decay: float = 1.0, window: int = 0, segments_BL=None):
  """Σ_{s<t} decay^(t-1-s) · loglik(s), the last `window` terms of it (0: all).

  Args:
    loglik_EBL: log p of each target under each member.
    segments_BL: int [B, L]; sums stay inside a segment. None: one segment.

  Returns:
    [E, B, L] float32, relative to the best member token by token; 0 where nothing precedes.
  """
  L = loglik_EBL.shape[-1]
  terms = jnp.pad(relative(loglik_EBL.astype(jnp.float32)), ((0, 0), (0, 0), (1, 0)))[..., :L]
  first = starts(loglik_EBL.shape[1:], segments_BL)
  terms = jnp.where(first, 0.0, terms)
  if window == 1:
    return terms
  keep = jnp.where(first, 0.0, decay)
  keep = jnp.broadcast_to(keep, terms.shape).astype(jnp.float32)
  def join(a, b):
    return a[0] * b[0], a[1] * b[0] + b[1]
  _, sums = jax.lax.associative_scan(join, (keep, terms), axis=-1)
  if not window or window >= L:
    return sums
  # The sum up to w positions ago is taken off again, if it is of the same segment.
  old = jnp.pad(sums, ((0, 0), (0, 0), (window, 0)))[..., :L] * decay ** window
  since = jnp.arange(L) - jax.lax.cummax(jnp.where(first, jnp.arange(L), 0), axis=1)
  return jnp.where(since >= window, sums - old, sums)


def clusters(distances_EBL, *, kernel: str = 'd2', temperature: float = 0.1):
  """-d²/T or -d⁴/T, so that a softmax gives the weights of c-BTM (Gururangan et al. 2023, §2.3).

  Args:
    distances_EBL: squared distances from what precedes each target to each member's centre.
    kernel: d2 as the paper has it; d4 as released, where the square is squared again.
    temperature: T.
  """
  power = distances_EBL if kernel == 'd2' else distances_EBL ** 2
  return -power / temperature


def following(loglik_KC, length, *, decay: float = 1.0, window: int = 0):
  """Evidence for the token after the first `length` of [K, C]: [K]. What `preceding` gives there,
  for one row of one segment, in time C."""
  back = length - 1 - jnp.arange(loglik_KC.shape[-1])  # 0 for the newest token
  counts = (back >= 0) & ((back < window) if window else True)
  terms = relative(loglik_KC) * jnp.where(counts, decay ** jnp.maximum(back, 0), 0.0)
  return jnp.where(counts, terms, 0.0).sum(-1)
