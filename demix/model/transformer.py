"""The decoder-only language model: embeddings, a repeating period of blocks walked by scan, a norm.

A period is what repeats: one block when every FFN is of one kind, two when every second FFN holds
the domain experts. The leaves of equal blocks are stacked on a leading layer axis, so compile time
does not grow with depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from demix.errors import BadInput
from demix.model.ffn.domain_expert_ffn import DomainExpertFFN
from demix.model.ffn.feed_forward import FeedForward
from demix.model.layers import fused_attention, initializers
from demix.model.layers.attention import Attention, mask_bias
from demix.model.layers.norms import KINDS
from demix.model.model_config import PRESETS, ExecutionConfig, ModelConfig, preset
from demix.settings import nearest

__all__ = ['PRESETS', 'ExecutionConfig', 'ModelConfig', 'Transformer', 'preset']

TAPS = ('attention', 'ffn', 'block')


def keep_dots(primitive, *_, **params) -> bool:
  """Checkpoint policy: keeps products with weights (batched over experts at most), not those of
  attention, which are batched over rows and heads and grow with L²."""
  return primitive is jax.lax.dot_general_p and len(params['dimension_numbers'][1][0]) < 2


def offload_dots(primitive, *_, **params):
  """Checkpoint policy: what `keep_dots` keeps goes to the host's memory and comes back."""
  move = jax.checkpoint_policies.offload_dot_with_no_batch_dims('device', 'pinned_host')
  if keep_dots(primitive, **params):  # JAX's own would compute products batched over experts again
    params['dimension_numbers'] = params['dimension_numbers'][0], ((), ())
  return move(primitive, *_, **params)


REMAT = {
    'none': lambda f: f,
    'dots': lambda f: jax.checkpoint(f, policy=keep_dots),
    'offload': lambda f: jax.checkpoint(f, policy=offload_dots),
    'full': jax.checkpoint,
}


class Embedding(nnx.Module):
  """Token table [V, D], learned positions [max_length, D], and the output table when untied."""

  def __init__(self, config: ModelConfig, *, rngs: initializers.Keys):
    c = self.config = config
    make = lambda rows: nnx.Param(
        initializers.embedding(rngs.params(), (rows, c.d_model), c.init))
    self.tokens = make(c.table_rows)
    if c.positions == 'learned':
      self.positions = make(c.max_length)
    if not c.tied:
      self.output = make(c.table_rows)

  def __call__(self, tokens_BL, positions_BL, dtype):
    """int [B, L], int [B or 1, L] → [B, L, D] in `dtype`."""
    x = self.tokens[...][tokens_BL]
    if self.config.embed_scale:
      x = x * self.config.d_model ** 0.5
    if self.config.positions == 'learned':
      x = x + self.positions[...][positions_BL]
    return x.astype(dtype)


class Block(nnx.Module):
  """Attention and feed-forward, each with its norm and residual.

  pre:  x + f(norm(x));  post (OLMo 2): x + norm(f(x)).
  """

  def __init__(self, config: ModelConfig, experts: bool, *, rngs: initializers.Keys):
    norm = KINDS[config.norm]
    self.placement = config.norm_placement
    self.attention = Attention(config, rngs=rngs)
    self.ffn = (DomainExpertFFN if experts else FeedForward)(config, rngs=rngs)
    self.attention_norm = norm(config.d_model, config.biases)
    self.ffn_norm = norm(config.d_model, config.biases)

  def attend(self, x, positions, bias, remember=None):
    """x [B, L, D] → x with attention added, and what was added; `remember`: see Attention."""
    with jax.named_scope('attention'):
      return self._add(x, self.attention_norm, lambda x: self.attention(
          x, positions, bias, remember))

  def feed(self, x, route, balanced=False):
    """x [B, L, D] → x with the feed-forward layer added, and what was added."""
    with jax.named_scope('ffn'):
      return self._add(x, self.ffn_norm, lambda x: self.ffn(x, route, balanced))

  def _add(self, x, norm, sublayer):
    if self.placement == 'pre':
      y = sublayer(norm(x))
      return x + y, y
    y = sublayer(x)
    return x + norm(y), y

  def __call__(self, x, route, balanced, positions, bias, taps):
    """x [B, L, D] → x [B, L, D], {tap: [B, L, D]}."""
    x, a = self.attend(x, positions, bias)
    x, f = self.feed(x, route, balanced)
    return x, {n: v for n, v in (('attention', a), ('ffn', f), ('block', x)) if n in taps}


class Transformer(nnx.Module):
  """The whole model. Blocks at the same place of the period are one module with stacked leaves."""

  def __init__(self, config: ModelConfig, *, rngs: initializers.Keys):
    self.config = config
    self.embed = Embedding(config, rngs=rngs)
    keys = jax.random.split(rngs.params(), config.layers)
    for place in range(config.period):
      experts = config.ffn == 'demix' and place == config.period - 1
      make = lambda key, experts=experts: Block(config, experts, rngs=initializers.Keys(key))
      graph, _ = nnx.split(nnx.eval_shape(make, keys[0]))
      leaves = jax.vmap(lambda key, make=make: nnx.split(make(key))[1])(
          keys[place::config.period])
      setattr(self, f'block_{place}', nnx.merge(graph, leaves))
    self.final_norm = KINDS[config.norm](config.d_model, config.biases)

  def __call__(self, tokens_BL, route, taps=(), *, segments_BL=None, positions_BL=None,
               balanced=False, execution=ExecutionConfig(), dtype=jnp.float32,
               constrain=lambda x: x, spread=lambda f: f):
    """Runs the model.

    Args:
      tokens_BL: int [B, L].
      route: int [B] domain of each row, or float [B, E] / [B, L, E] weights of the experts' FFN
        outputs; a dense model ignores it.
      taps: names out of TAPS.
      segments_BL: int [B, L]; attention stays inside a segment. None: one segment.
      positions_BL: int [B, L]; None: 0 … L-1.
      balanced: rows are expert-major with equally many per expert (static).
      execution: an ExecutionConfig (static).
      dtype: of the computation.
      constrain: called on the residual stream, [B, L, D], between blocks: where it shall lie.
      spread: see fused_attention.choose.

    Returns:
      hidden [B, L, D] after the final norm; aux {} (auxiliary losses by name);
      taps {name: [N, B, L, D]}.

    Raises:
      BadInput: more positions than the model has learned, or no such tap.
    """
    c = self.config
    self._check_length(tokens_BL.shape[1])
    for name in taps:
      if name not in TAPS:
        raise BadInput(f'no tap {name!r}{nearest(name, TAPS)}')
    L = tokens_BL.shape[1]
    positions = np.arange(L)[None] if positions_BL is None else positions_BL
    bias = self.bias(tokens_BL.shape, segments_BL, execution, dtype, spread)
    x = constrain(self.embed(tokens_BL, positions, dtype))
    graphs, leaves = self._blocks()

    def period(x, leaves):
      out = []
      for graph, leaf in zip(graphs, leaves):
        x, tapped = nnx.merge(graph, leaf)(x, route, balanced, positions, bias, taps)
        x = constrain(x)
        out.append(tapped)
      return x, jax.tree.map(lambda *t: jnp.stack(t), *out)

    period = REMAT[execution.remat](period)
    if execution.scan:
      x, tapped = jax.lax.scan(period, x, leaves)
    else:
      out, count = [], c.layers // c.period
      # The gradient of a split is one concatenation, that of leaf[i] a sum of padded leaves.
      leaves, tree = jax.tree.flatten(leaves)
      layers = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
      for layer in zip(*layers):
        x, t = period(x, tree.unflatten(leaf[0] for leaf in layer))
        out.append(t)
      tapped = jax.tree.map(lambda *t: jnp.stack(t), *out)
    tapped = jax.tree.map(lambda t: t.reshape(c.layers, *t.shape[2:]), tapped)
    return constrain(self.final_norm(x)), {}, tapped

  def bias(self, shape_BL, segments_BL, execution, dtype, spread=lambda f: f):
    """What attention sees by: `attention.mask_bias`, or a fused kernel that knows it."""
    kernel = fused_attention.choose(execution.attention, self.config, shape_BL, dtype, segments_BL,
                                    spread)
    return kernel or mask_bias(shape_BL[1], segments_BL)

  def _check_length(self, L):
    learned = self.config.positions == 'learned'
    if learned and L > self.config.max_length:  # a gather would repeat the last row
      raise BadInput(f'{L} positions for a model that has learned {self.config.max_length}: '
                     'shorten the sequences')

  def _blocks(self):
    """Graphs and stacked leaves of the blocks of a period."""
    return zip(*(nnx.split(getattr(self, f'block_{p}')) for p in range(self.config.period)))

  # ---- for mixing: what experts share is run once ------------------------------------------------

  def stem(self, tokens_BL, positions, bias, *, dtype, remember=lambda i: None):
    """All that comes before the first expert FFN: [B, L] → x [B, L, D].

    Args:
      positions: int [B or 1, L]. bias: for attention.
      remember: i → what Attention's `remember` shall be in block i.
    """
    self._check_length(tokens_BL.shape[1])
    x = self.embed(tokens_BL, positions, dtype)
    for i, (graph, leaves) in enumerate(zip(*self._blocks())):
      block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], leaves))
      x, _ = block.attend(x, positions, bias, remember(i))
      if i < self.config.period - 1:
        x, _ = block.feed(x, None)
    return x

  def branch(self, x, route, positions, bias, *, balanced=False, execution=ExecutionConfig(),
             cache=None, start=None):
    """All that comes from the first expert FFN on, for one expert (route: int scalar) or for rows
    as `__call__` takes them.

    Args:
      x: [B, L, D] of `stem`. positions, bias: as there.
      cache, start: keys and values of the later blocks, {place: (k, v)}, each
        [N / period - 1, B, kv_heads, C, K], and where those of x go; None: attend to x itself.

    Returns:
      hidden [B, L, D] after the final norm; the cache with x in it.
    """
    c = self.config
    graphs, leaves = map(tuple, self._blocks())
    first = nnx.merge(graphs[-1], jax.tree.map(lambda leaf: leaf[0], leaves[-1]))
    x, _ = first.feed(x, route, balanced)

    def period(carry, i):
      x, cache = carry
      for place, (graph, leaf) in enumerate(zip(graphs, leaves)):
        # One layer at a time: a tail of the stacked leaves would be a copy of nearly all of them.
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], leaf))
        remember = None
        if cache is not None:
          def remember(k, v, place=place):
            cache[place], kv = keep(cache[place], i - 1, k, v, start)
            return kv
        x, _ = block.attend(x, positions, bias, remember)
        x, _ = block.feed(x, route, balanced)
      return (x, cache), None

    cache = dict(cache) if cache is not None else None
    later = range(1, c.layers // c.period)
    if execution.scan and later:  # of no periods a scan would still trace one, on an empty cache
      (x, cache), _ = jax.lax.scan(period, (x, cache), jnp.asarray(later))
    else:
      for i in later:
        (x, cache), _ = period((x, cache), i)
    return self.final_norm(x), cache


def keep(cache, i, k, v, start):
  """Writes keys and values [B, G, L, K] of layer i at position `start` of a cache, a pair of
  [layers, B, G, C, K]; returns the cache and the layer's own pair [B, G, C, K]."""
  cache = tuple(jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (i, 0, 0, start, 0))
                for old, new in zip(cache, (k, v)))
  return cache, tuple(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in cache)
