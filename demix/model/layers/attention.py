"""Causal self-attention: grouped queries, optional qk-norm, rotary positions and segments.

Forms that XLA's CPU backend runs fast, found with benchmarks/throughput.py at 1M parameters: flat
[B·L, D] projections, products batched over [B, H, L, K] (B and H apart: a mesh can split either), a
backward pass of its own that keeps one [L, L] array a head (up to 6% of the step's CPU time).
Masked scores get -1e9, whose exponential is an exact zero: causality and document isolation hold
bit for bit. Scores, their gradient and all sums are float32 in bfloat16 too: a score of 16 rounded
to 8 bits is off by up to 1/16, and so is its exponential (tests/model/test_attention.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from demix.model.layers import initializers
from demix.model.layers.norms import RMSNorm


def rotate(x_BHLK, positions_BL, theta: float, scale: float):
  """Rotary positions (Su et al. 2021), halves convention; positions are divided by `scale`."""
  half = x_BHLK.shape[-1] // 2
  frequency = theta ** (-np.arange(half, dtype=np.float32) / half)
  angle = (positions_BL.astype(jnp.float32) / scale)[:, None, :, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x_BHLK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BHLK.dtype)


def mask_bias(length: int, segments_BL=None):
  """What is added to scores, float32 [L, L] or [B, 1, L, L]: 0 where a target row may see a source
  column (not later, same segment), -1e9 elsewhere."""
  causal = np.tril(np.ones((length, length), bool))
  if segments_BL is None:
    return np.where(causal, 0, -1e9).astype(np.float32)
  same = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
  return jnp.where(causal & same, 0.0, -1e9)


def causal_block(length: int) -> int:
  """Rows that `attend` takes at a time when a sequence attends to itself; 0: all at once.

  All at once, XLA computes the half of the scores that the mask hides too. In blocks a row sees the
  columns up to the end of its block: 3/4 of the square at 128 tokens, 5/8 at 256, towards 9/16. A
  step takes about 5% less CPU time at 1M and 8% at 10M. On CPU only: elsewhere many small products
  cost launches, and the fused kernels skip what is hidden.
  """
  if jax.default_backend() != 'cpu':
    return 0
  return -(-length // min(8, -(-length // 64)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BGMK, k_BGLK, v_BGLK, bias, block=0):
  """softmax(q kᵀ + bias) v for G groups of heads that share keys and values.

  Args:
    q_BGMK: scaled queries; M = query heads of a group · rows of the bias.
    k_BGLK, v_BGLK: keys and values.
    bias: from `mask_bias`.
    block: static; rows done at a time, which promises that row i sees no column after i. 0: all.

  Returns:
    [B, G, M, K] in the dtype of v.
  """
  return _attend(q_BGMK, k_BGLK, v_BGLK, bias, block)[0]


def _spans(rows, columns, block):
  """(first row, end, columns seen) of each block of rows."""
  if not block or block >= rows:
    return [(0, rows, columns)]
  ends = [min(i + block, rows) for i in range(0, rows, block)]
  return [(i, end, end) for i, end in zip(range(0, rows, block), ends)]


def _rows(x_BGMK, rows, i, end):
  """Rows i … end of each head of a group: [B, G, M, K] → [B, G, M / rows · (end - i), K]."""
  if end - i == rows:
    return x_BGMK
  B, G, M, K = x_BGMK.shape
  return x_BGMK.reshape(B, G, M // rows, rows, K)[:, :, :, i:end].reshape(B, G, -1, K)


def _whole(parts, rows, spans):
  """The inverse of `_rows` over all spans."""
  if len(parts) == 1:
    return parts[0]
  B, G, _, K = parts[0].shape
  parts = [x.reshape(B, G, -1, end - i, K) for x, (i, end, _) in zip(parts, spans)]
  return jnp.concatenate(parts, 3).reshape(B, G, -1, K)


def _product(a, b):
  """a b over the last two axes, float32 whatever the inputs are; those of one type."""
  return jax.lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))),
                             preferred_element_type=jnp.float32)


def _attend(q, k, v, bias, block):
  rows, columns, saved, y = bias.shape[-2], k.shape[2], [], []
  spans = _spans(rows, columns, block)
  for i, end, seen in spans:
    scores = _product(_rows(q, rows, i, end), k[:, :, :seen].mT)
    part = bias[..., i:end, :seen]
    B, G, M, _ = scores.shape
    if M == end - i:
      scores = scores + part
    else:
      part = part[:, None] if part.ndim == 4 else part
      scores = (scores.reshape(B, G, -1, end - i, seen) + part).reshape(scores.shape)
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    # Dividing after the product with the values takes K divisions a query, not L.
    inverse = 1 / e.sum(-1, keepdims=True)
    e = e.astype(v.dtype)
    y.append((_product(e, v[:, :, :seen]) * inverse).astype(v.dtype))
    saved.append((e, inverse))
  y = _whole(y, rows, spans)
  return y, (q, k, v, saved, y)


def _attend_backward(block, residuals, dy):
  q, k, v, saved, y = residuals
  columns = k.shape[2]
  rows = columns if block else q.shape[2]  # all at once: no need to know the rows of a head
  spans, dq, dk, dv = _spans(rows, columns, block), [], 0, 0
  for (i, end, seen), (e, inverse) in zip(spans, saved):
    part, seen_k, seen_v = _rows(dy, rows, i, end), k[:, :, :seen], v[:, :, :seen]
    pad = lambda x, seen=seen: jnp.pad(x, ((0, 0), (0, 0), (0, columns - seen), (0, 0)))
    dv += pad(_product(e.mT, (part * inverse).astype(v.dtype)))
    slope = _product(part, seen_v.mT)
    if y.dtype == jnp.float32:
      along = (part * _rows(y, rows, i, end)).sum(-1, keepdims=True)
    else:  # the same but for rounding, of which nearly equal numbers would leave nothing else
      along = (e * slope).sum(-1, keepdims=True) * inverse
    dscores = (e * ((slope - along) * inverse)).astype(v.dtype)
    dq.append(_product(dscores, seen_k).astype(q.dtype))
    dk += pad(_product(dscores.mT, _rows(q, rows, i, end)))
  return _whole(dq, rows, spans), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_attend, _attend_backward)


class Attention(nnx.Module):
  """softmax(q kᵀ / sqrt(K)) v with H query heads over `kv_heads` key and value heads."""

  def __init__(self, config, *, rngs: initializers.Keys):
    c = self.config = config
    inputs = {'q': c.heads, 'k': c.kv_heads or c.heads, 'v': c.kv_heads or c.heads}
    for name, heads in inputs.items():
      width = heads * c.head_width
      kernel = initializers.attention_input(rngs.params(), (c.d_model, width), c.init)
      setattr(self, name, nnx.Param(kernel))
      if c.biases:
        setattr(self, f'{name}_bias', nnx.Param(jnp.zeros((width,))))
    self.out = nnx.Param(initializers.attention_output(
        rngs.params(), (c.heads * c.head_width, c.d_model), c.init, c.layers))
    if c.biases:
      self.out_bias = nnx.Param(jnp.zeros((c.d_model,)))
    if c.qk_norm:
      self.q_norm, self.k_norm = RMSNorm(c.head_width), RMSNorm(c.head_width)

  def __call__(self, x_BLD, positions_BL, bias, remember=None):
    """x [B, L, D], positions int [B or 1, L], bias from `mask_bias` → [B, L, D].

    In place of a bias, a kernel that `fused_attention.choose` returned.

    `remember`, for generation, takes the keys and values of x, [B, kv_heads, L, K], and returns
    those to attend to, [B, kv_heads, C, K]; bias is then [L, C].
    """
    c = self.config
    B, L, D = x_BLD.shape
    kv_heads, K = c.kv_heads or c.heads, c.head_width
    x = x_BLD.reshape(B * L, D)
    q, k, v = (self._linear(x, n).reshape(B, L, -1, K).transpose(0, 2, 1, 3) for n in 'qkv')
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if c.positions == 'rotary':
      q = rotate(q, positions_BL, c.rope_theta, c.rope_scale)
      k = rotate(k, positions_BL, c.rope_theta, c.rope_scale)
    with jax.named_scope('attend'):
      q = (q.astype(jnp.float32) * K ** -0.5).astype(q.dtype)  # bfloat16 would round K^-½ as well
      block = 0 if remember else causal_block(L)
      if remember:
        k, v = remember(k, v)
        bias = jnp.tile(bias, (c.heads // kv_heads, 1))
      if callable(bias):
        y = bias(q, k, v)
      else:
        q = q.reshape(B, kv_heads, c.heads // kv_heads * L, K)
        y = attend(q, k, v, bias, block).reshape(B, c.heads, L, K)
    return self._linear(y.transpose(0, 2, 1, 3).reshape(B * L, -1), 'out').reshape(B, L, D)

  def _linear(self, x, name):
    y = x @ getattr(self, name)[...].astype(x.dtype)
    return y + getattr(self, f'{name}_bias')[...].astype(x.dtype) if self.config.biases else y
