"""The model in NumPy and float64, written from the papers' formulas: what tests compare with."""

import math

import numpy as np


def part(leaves: dict, prefix: str) -> dict:
  """Canonical leaves below `prefix/`, without it."""
  return {n.removeprefix(f'{prefix}/'): x for n, x in leaves.items() if n.startswith(f'{prefix}/')}


def linear(leaves: dict, name: str, x):
  return x @ leaves[name] + leaves.get(f'{name}_bias', 0)


def norm(kind: str, leaves: dict, x):
  """layernorm or rmsnorm over the last axis."""
  centred = x - x.mean(-1, keepdims=True) if kind == 'layernorm' else x
  y = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
  return y * leaves['scale'] + leaves.get('bias', 0)


def attention(config, leaves: dict, x, positions, segments):
  """Causal attention in segments: heads one by one, rotation in ℂ. x [B, L, D] → [B, L, D]."""
  B, length, _ = x.shape
  heads, kv_heads, K = config.heads, config.kv_heads or config.heads, config.head_width
  q, k, v = (linear(leaves, n, x).reshape(B, length, -1, K) for n in 'qkv')
  if config.qk_norm:
    q, k = norm('rmsnorm', part(leaves, 'q_norm'), q), norm('rmsnorm', part(leaves, 'k_norm'), k)
  if config.positions == 'rotary':
    frequency = config.rope_theta ** (-2 * np.arange(K // 2) / K)
    turn = np.exp(1j * positions[..., None] / config.rope_scale * frequency)[:, :, None]
    def rotated(t):
      z = (t[..., :K // 2] + 1j * t[..., K // 2:]) * turn
      return np.concatenate([z.real, z.imag], -1)
    q, k = rotated(q), rotated(k)
  out = np.zeros((B, length, heads, K))
  for b in range(B):
    for h in range(heads):
      g = h * kv_heads // heads
      for t in range(length):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, h] @ k[b, s, g] for s in seen]) / np.sqrt(K)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, g]
  return linear(leaves, 'out', out.reshape(B, length, -1))


def feed_forward(activation: str, leaves: dict, x):
  """down(act(up(x))), or down(silu(gate(x)) · up(x))."""
  h = linear(leaves, 'up', x)
  if activation == 'gelu':
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / 2 ** 0.5))
  elif activation == 'gelu_tanh':
    h = h * 0.5 * (1 + np.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3)))
  else:
    gate = linear(leaves, 'gate', x)
    h = h * gate / (1 + np.exp(-gate))
  return linear(leaves, 'down', h)


def transformer(config, leaves: dict, tokens, domains, positions, segments):
  """Final hidden states [B, L, D] from canonical leaves; row b goes to expert `domains[b]`."""
  leaves = {n: np.float64(x) for n, x in leaves.items()}
  x = leaves['embed/tokens'][tokens]
  if config.embed_scale:
    x = x * config.d_model ** 0.5
  if config.positions == 'learned':
    x = x + leaves['embed/positions'][positions]
  for i in range(config.layers):
    block = part(leaves, f'blocks/{i}')
    normed = lambda name, x, block=block: norm(config.norm, part(block, f'{name}_norm'), x)
    def ffn(x, block=block):
      if not any('experts/' in n for n in block):
        return feed_forward(config.activation, part(block, 'ffn'), x)
      rows = [feed_forward(config.activation, part(block, f'ffn/experts/{config.experts[d]}'), row)
              for d, row in zip(domains, x)]
      return np.stack(rows)
    layers = {'attention': lambda x, block=block: attention(
        config, part(block, 'attention'), x, positions, segments), 'ffn': ffn}
    for name, f in layers.items():
      x = x + (f(normed(name, x)) if config.norm_placement == 'pre' else normed(name, f(x)))
  return norm(config.norm, part(leaves, 'final_norm'), x)
