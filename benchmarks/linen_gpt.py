"""The same model as a plain Flax Linen GPT: einsum attention, optax's loss and AdamW. A peer.

What one writes without looking at XLA's CPU backend: nn.Dense and nn.LayerNorm, attention by
einsum over [B, L, H, K] with a masked softmax, optax.softmax_cross_entropy_with_integer_labels,
optax.chain(clip_by_global_norm, adamw), a Python loop over layers, jit with donation. It starts
from the same parameters as ours, so the losses must agree; benchmarks/bench.py prints both.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class Block(nn.Module):
  heads: int

  @nn.compact
  def __call__(self, x):
    B, L, D = x.shape
    h = nn.LayerNorm(epsilon=1e-5, name='attention_norm')(x)
    q, k, v = (nn.Dense(D, name=n)(h).reshape(B, L, self.heads, -1) for n in 'qkv')
    scores = jnp.einsum('bqhk,bshk->bhqs', q, k) / np.sqrt(D // self.heads)
    scores = jnp.where(np.tril(np.ones((L, L), bool)), scores, -1e9)
    y = jnp.einsum('bhqs,bshk->bqhk', nn.softmax(scores), v).reshape(B, L, D)
    x = x + nn.Dense(D, name='out')(y)
    h = nn.LayerNorm(epsilon=1e-5, name='ffn_norm')(x)
    return x + nn.Dense(D, name='down')(nn.gelu(nn.Dense(4 * D, name='up')(h), approximate=False))


class Gpt(nn.Module):
  layers: int
  heads: int
  width: int
  vocab_size: int

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(self.vocab_size, self.width, name='tokens')
    positions = self.param('positions', nn.initializers.normal(), (tokens.shape[1], self.width))
    x = embed(tokens) * self.width ** 0.5 + positions
    for i in range(self.layers):
      x = Block(self.heads, name=f'block_{i}')(x)
    return embed.attend(nn.LayerNorm(epsilon=1e-5, name='final_norm')(x))


def parameters(flat: dict) -> dict:
  """Canonical leaves of our dense LM as this model's parameters."""
  dense = lambda n: {'kernel': flat[n], 'bias': flat[f'{n}_bias']}
  norm = lambda n: {'scale': flat[f'{n}/scale'], 'bias': flat[f'{n}/bias']}
  out = {'tokens': {'embedding': flat['embed/tokens']}, 'positions': flat['embed/positions'],
         'final_norm': norm('final_norm')}
  for i in range(1 + max(int(n.split('/')[1]) for n in flat if n.startswith('blocks/'))):
    b = f'blocks/{i}'
    out[f'block_{i}'] = {
        **{n: dense(f'{b}/attention/{n}') for n in ('q', 'k', 'v', 'out')},
        **{n: dense(f'{b}/ffn/{n}') for n in ('up', 'down')},
        **{n: norm(f'{b}/{n}') for n in ('attention_norm', 'ffn_norm')}}
  return out


class Linen:
  """A train step like throughput.Arm: called, it does one and keeps the loss."""

  def __init__(self, config, optimizer, flat: dict, batch: dict):
    """config: ModelConfig of a dense gpt. optimizer: OptimizerConfig. flat: canonical leaves."""
    model = Gpt(config.layers, config.heads, config.d_model, config.vocab_size)
    c = optimizer
    rule = optax.chain(optax.clip_by_global_norm(c.clip), optax.adamw(
        c.learning_rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay))
    params = {'params': jax.tree.map(jnp.array, parameters(flat))}
    self.state = params, rule.init(params)
    tokens, targets = jnp.asarray(batch['tokens_BL']), jnp.asarray(batch['targets_BL'])

    def step(state):
      params, moments = state
      mean = lambda p: optax.softmax_cross_entropy_with_integer_labels(
          model.apply(p, tokens), targets).mean()
      loss, grads = jax.value_and_grad(mean)(params)
      updates, moments = rule.update(grads, moments, params)
      return (optax.apply_updates(params, updates), moments), loss
    started = time.perf_counter()
    self.step = jax.jit(step, donate_argnums=0).lower(self.state).compile()
    self.compile_seconds, self.loss = time.perf_counter() - started, None

  def __call__(self):
    self.state, loss = self.step(self.state)
    self.loss = float(loss)
