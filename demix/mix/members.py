"""Members of a mixture: whole next-token distributions, run as cheaply as they can be.

`ExpertMembers` are the experts of one DEMix LM, each taken out to the dense program; embeddings and
all before the first expert FFN are run once for all. A single LM is one member. `WholeMembers` are
whole LMs of one architecture, the experts of a forest. What uses them sees the same methods.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from demix.errors import BadInput
from demix.model import loss
from demix.model.params import Model


def nll(model: Model, params, hidden, targets):
  """-log p of targets [..., L] by hidden states [..., L, D]."""
  return loss.nll(hidden, model.output_table(params), targets, model.config.vocab_size,
                  model.execution.loss_block)


def rows(batch: dict) -> dict:
  """What a batch says of its rows beside tokens and targets, by the names of `apply`."""
  return {name: batch.get(name) for name in ('segments_BL', 'positions_BL')}


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
    one = self.model.bind(params)
    bias = one.bias(tokens_BL.shape, segments_BL)
    x = one.stem(tokens_BL, positions, bias)
    # One after the other: what is kept of each is small, and the machine is full with one.
    return jax.lax.map(lambda route: what(one.branch(x, route, positions, bias)[0]), routes_K)

  def score(self, params, batch, routes_K, hidden: bool = False):
    """What `routes_K` make of a batch: -log p of its targets, [K, B, L]; and, if asked for, their
    hidden states [K, B, L, D], else None."""
    def what(hidden_BLD):
      return self.nll(params, hidden_BLD, batch['targets_BL']), hidden_BLD if hidden else None
    return self.each(params, batch['tokens_BL'], routes_K, what, **rows(batch))

  def nll(self, params, hidden, targets):
    """-log p of targets [..., L] by hidden states [..., L, D] of any members."""
    return nll(self.model, params, hidden, targets)

  def logits(self, params, hidden, routes_K=None):
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


def over(function, *trees):
  """`function` of every member's part of trees with a leading axis of members.

  One after another on CPU: a batch of matrices times a vector each runs at half the speed of the
  products (8 members at 1M write 115 tokens/s, at once 69). At once on accelerators.
  """
  if jax.default_backend() == 'cpu' and len(jax.tree.leaves(trees)[0]) > 1:
    return jax.lax.map(lambda one: function(*one), trees)
  return jax.vmap(function)(*trees)


@dataclasses.dataclass(frozen=True)
class WholeMembers:
  """Whole LMs of one architecture: their parameters are one running tree, every leaf with a leading
  axis E.

  Attributes:
    model: of each, dense: a DEMix LM is as many members as it has experts, each taken out.
    names: E names, in the order of every axis E.
  """
  model: Model
  names: tuple

  def __post_init__(self):
    if self.model.config.ffn == 'demix':
      raise BadInput(f'{", ".join(self.names)}: DEMix LMs are no members by themselves, their '
                     'experts are: name one of each as W#EXPERT')

  @property
  def context(self) -> int:
    """The longest text that they can read, in tokens."""
    return self.model.config.max_length

  @property
  def _one(self) -> ExpertMembers:
    return ExpertMembers(self.model)

  def score(self, params, batch, routes_K, hidden: bool = False):
    """See ExpertMembers.score."""
    tokens = batch['tokens_BL']
    def run(route):
      own = jax.tree.map(lambda x: x[route], params)
      h, _, _ = self.model.apply(own, tokens, jnp.zeros(tokens.shape[0], jnp.int32), **rows(batch))
      return nll(self.model, own, h, batch['targets_BL']), h if hidden else None
    return jax.lax.map(run, routes_K)

  def nll(self, params, hidden, targets):
    """-log p of targets [E, L] by hidden states [E, L, D], each under its own LM."""
    return jax.vmap(lambda own, h, t: nll(self.model, own, h, t))(params, hidden, targets)

  def logits(self, params, hidden, routes_K=None):
    """[K, ..., D] → float32 [K, ..., V]; of all members, or of `routes_K`."""
    tables = self.model.output_table(params)
    tables = tables if routes_K is None else tables[routes_K]
    V = self.model.config.vocab_size
    return over(lambda h, table: loss.logits(h, table, V)[..., :V], hidden, tables)

  def take(self, params, routes_K) -> tuple['WholeMembers', dict]:
    """The members `routes_K` (NumPy ints) alone, with their leaves only."""
    names = tuple(self.names[i] for i in routes_K)
    if names == self.names:
      return self, params
    return WholeMembers(self.model, names), self.keep(params, routes_K)

  def empty(self) -> dict:
    """A cache without text: that of one LM, with a leading axis E."""
    return jax.tree.map(lambda x: jnp.zeros((len(self.names), *x.shape), x.dtype),
                        self._one.empty())

  def advance(self, params, cache, tokens_L, start):
    """See ExpertMembers.advance."""
    hidden, cache = over(lambda own, kept: self._one.advance(own, kept, tokens_L, start), params,
                         cache)
    return hidden[:, 0], cache

  def keep(self, cache: dict, routes_K) -> dict:
    """The cache of the members `routes_K` alone."""
    chosen = jnp.asarray(routes_K)
    return jax.tree.map(lambda x: x[chosen], cache)
