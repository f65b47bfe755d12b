"""Members of a mixture: whole next-token distributions, run as cheaply as they can be.

`ExpertMembers` are the experts of one DEMix LM, each taken out to the dense program; embeddings and
all before the first expert FFN are run once for all. A single LM is one member. (Whole LMs of a
forest come with it, behind the same four methods.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from demix import loss
from demix.layers.attention import mask_bias
from demix.params import Model


@dataclasses.dataclass(frozen=True)
class ExpertMembers:
  """The experts of a DEMix LM, or a dense LM as the only member.

  Attributes:
    model: params.Model; hashable, so that programs are compiled once for it.
    name: what a dense LM is called.
  """
  model: Model
  name: str = 'model'

  @property
  def names(self) -> tuple:
    """E names, in the order of every axis E."""
    return self.model.config.experts or (self.name,)

  @property
  def context(self) -> int:
    """The longest text that it can read, in tokens."""
    return self.model.config.max_length

  # ---- scoring -------------------------------------------------------------------------------

  def each(self, params, tokens_BL, routes_K, what, *, segments_BL=None, positions_BL=None):
    """`what(hidden [B, L, D])` of the members `routes_K` (int indices), stacked on an axis K."""
    L = tokens_BL.shape[1]
    positions = np.arange(L)[None] if positions_BL is None else positions_BL
    bias, one = mask_bias(L, segments_BL), self.model.bind(params)
    x = one.stem(tokens_BL, positions, bias)
    # One after the other: what is kept of each is small, and the machine is full with one.
    return jax.lax.map(lambda route: what(one.branch(x, route, positions, bias)[0]), routes_K)

  def nll(self, params, hidden_BLD, targets_BL):
    """-log p of targets, [B, L]."""
    return loss.nll(hidden_BLD, self.model.output_table(params), targets_BL,
                    self.model.config.vocab_size, self.model.execution.loss_block)

  def logits(self, params, hidden):
    """[..., D] → float32 [..., V]; padded rows of the table are left out."""
    V = self.model.config.vocab_size
    return loss.logits(hidden, self.model.output_table(params), V)[..., :V]

  # ---- generation ----------------------------------------------------------------------------

  def take(self, params, routes_K) -> tuple['ExpertMembers', dict]:
    """The members `routes_K` (NumPy ints) alone, with their leaves only."""
    config = self.model.config
    if config.ffn != 'demix':
      return self, params
    names = tuple(config.experts[i] for i in routes_K)
    if names == config.experts:
      return self, params
    routes = jnp.asarray(routes_K)
    def pick(path, leaf):
      return leaf[:, routes] if any(getattr(k, 'key', '') == 'experts' for k in path) else leaf
    model = dataclasses.replace(self.model, config=dataclasses.replace(config, experts=names))
    return ExpertMembers(model, self.name), jax.tree_util.tree_map_with_path(pick, params)

  def empty(self) -> dict:
    """A cache without text: {'stem': one (k, v) [1, G, C, K] per shared block, 'rest': one pair
    [blocks, E, G, C, K] per place of the period}."""
    c, E = self.model.config, len(self.names)
    dtype = jnp.dtype(self.model.dtype)
    def pair(*lead):
      shape = (*lead, c.kv_heads or c.heads, self.context, c.head_width)
      return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return {'stem': {i: pair(1) for i in range(c.period)},
            'rest': {i: pair(c.layers // c.period - 1, E) for i in range(c.period)}}

  def advance(self, params, cache, tokens_L, start):
    """Reads L more tokens after the first `start` ones.

    Returns:
      hidden [E, L, D]; the cache with them in it. (Padding behind the text is overwritten by what
      comes next, and nothing before it looks at it.)
    """
    L = tokens_L.shape[0]
    positions = start + jnp.arange(L)[None]
    bias = jnp.where(jnp.arange(self.context)[None] <= positions.T, 0.0, -1e9)
    one, stem = self.model.bind(params), dict(cache['stem'])
    def remember(i):
      def keep(k, v):
        stem[i] = tuple(jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, start, 0))
                        for old, new in zip(stem[i], (k, v)))
        return stem[i]
      return keep
    x = one.stem(tokens_L[None], positions, bias, remember)
    x = jnp.broadcast_to(x, (len(self.names), *x.shape[1:]))
    hidden, rest = one.branch(x, None, positions, bias, balanced=True, cache=cache['rest'],
                              start=start)
    return hidden, {'stem': stem, 'rest': rest}

  def keep(self, cache: dict, routes_K) -> dict:
    """The cache of the members `routes_K` alone."""
    rows = jnp.asarray(routes_K)
    return cache | {'rest': jax.tree.map(lambda x: x[:, rows], cache['rest'])}
