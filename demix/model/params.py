"""The border to Flax NNX: outside this file parameters are a nested dict of arrays.

`Model` turns a ModelConfig into two functions, `init` and `apply`, and knows the tree between them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from demix.errors import BadInput
from demix.model import tree
from demix.model.layers import initializers
from demix.model.transformer import ExecutionConfig, ModelConfig, Transformer
from demix.settings import nearest


def _make(config: ModelConfig, seed) -> Transformer:
  return Transformer(config, rngs=initializers.Keys(jax.random.key(seed)))


@functools.cache
def _traced(config: ModelConfig):
  """(graph, abstract running tree, canonical names) of a model: once for all like it;
  every expert that is taken out is one."""
  graph, state = nnx.split(nnx.eval_shape(lambda: _make(config, 0)))
  leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
  return graph, leaves, jax.eval_shape(lambda x: tree.canonical(x, config.experts), leaves).keys()


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as functions of its parameters.

  Attributes:
    config: what the model is; sizes that come from data must be filled in.
    execution: how it is run.
    dtype: of the computation; parameters stay float32.
  """
  config: ModelConfig
  execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
  dtype: str = 'float32'

  def __post_init__(self):
    self.config.check()
    if self.config.ffn == 'demix' and not self.config.experts:
      raise BadInput('model.ffn=demix without experts: name domains in data.domains')
    self.execution.check()

  @property
  def _graph(self):
    return _traced(self.config)[0]

  def init(self, seed) -> dict:
    """Fresh parameters (a running tree, float32); a function of `seed` and the config only."""
    return nnx.to_pure_dict(nnx.state(_make(self.config, seed)))

  @property
  def abstract(self) -> dict:
    """The running tree as jax.ShapeDtypeStruct: nothing is computed."""
    return jax.tree.map(lambda leaf: leaf, _traced(self.config)[1])  # the caller's own

  def apply(self, params, tokens_BL, route, taps=(), *, segments_BL=None, positions_BL=None,
            balanced=False, constrain=lambda x: x, spread=lambda f: f):
    """→ hidden [B, L, D], aux, taps; see transformer.Transformer.__call__."""
    return nnx.merge(self._graph, params)(
        tokens_BL, route, taps, segments_BL=segments_BL, positions_BL=positions_BL,
        balanced=balanced, execution=self.execution, dtype=jnp.dtype(self.dtype),
        constrain=constrain, spread=spread)

  def bind(self, params) -> 'Bound':
    """The two halves of `apply` with parameters in them; for mixing."""
    return Bound(nnx.merge(self._graph, params), self.execution, jnp.dtype(self.dtype))

  def output_table(self, params):
    """[table_rows, D]: the matrix whose products with hidden states are the logits."""
    return params['embed']['tokens' if self.config.tied else 'output']

  def canonical(self, params) -> dict:
    """Running tree → flat canonical leaves."""
    return tree.canonical(params, self.config.experts)

  @functools.partial(jax.jit, static_argnums=0)
  def stacked(self, flat: dict) -> dict:
    """`running`, compiled once for equal models."""
    return self.running(flat)

  def running(self, flat: dict) -> dict:
    """Flat canonical leaves → running tree.

    Raises:
      BadInput: leaves that this model has are missing, or others are there; the first is named.
    """
    known = _traced(self.config)[2]
    for names, what in ((known - flat.keys(), 'missing'),
                        (flat.keys() - known, 'there, but not part of this model')):
      if names:
        more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
        raise BadInput(f'leaf {min(names)} is {what}{more}')
    return tree.running(flat, self.config.period, self.config.experts)

  def counts(self) -> tuple[int, int]:
    """(total, active) parameters: active leaves out all experts but one."""
    flat = tree.flatten(self.abstract)
    total = tree.size(flat)
    experts = sum(leaf.size for name, leaf in flat.items() if '/experts/' in name)
    return total, total - experts + experts // max(1, len(self.config.experts))

  def flops_per_token(self, length: int) -> int:
    """Training FLOPs per token: 6 · active parameters + 12 · N · L · H · K (full causal square)."""
    c = self.config
    return 6 * self.counts()[1] + 12 * c.layers * length * c.heads * c.head_width


@dataclasses.dataclass(frozen=True)
class Bound:
  """A model with its parameters, in two halves: what experts share, and one expert's own."""
  _transformer: Transformer
  _execution: ExecutionConfig
  _dtype: object

  def bias(self, shape_BL, segments_BL=None):
    """See Transformer.bias."""
    return self._transformer.bias(shape_BL, segments_BL, self._execution, self._dtype)

  def stem(self, tokens_BL, positions, bias, remember=lambda i: None):
    """See Transformer.stem."""
    return self._transformer.stem(tokens_BL, positions, bias, dtype=self._dtype, remember=remember)

  def branch(self, x, route, positions, bias, **more):
    """See Transformer.branch."""
    return self._transformer.branch(x, route, positions, bias, execution=self._execution, **more)


def upcycled(model: Model, params: dict, config: ModelConfig) -> dict:
  """A dense LM as a DEMix LM: copies of its FFN as experts, all else as it is.

  Sparse upcycling (Komatsuzaki et al. 2022, 2212.05055) without a router: whichever expert a
  domain takes, the outputs are the dense LM's.

  Args:
    model, params: the dense LM, a running tree. config: of the DEMix LM: the same but for `ffn`,
      `experts` and `expert_every`; FFNs that all domains share stay one.

  Returns:
    The running tree of the DEMix LM.
  """
  flat = {}
  for name, leaf in model.canonical(params).items():
    layer, inside, last = name.rpartition('/ffn/')
    if not inside or int(layer.split('/')[1]) % config.period != config.period - 1:
      flat[name] = leaf
      continue
    for expert in config.experts:
      flat[f'{layer}/ffn/experts/{expert}/{last}'] = leaf
  return Model(config).running(flat)


def expert_slice(model: Model, params: dict, expert: str) -> tuple[Model, dict]:
  """One expert of a DEMix LM as a dense LM: its FFNs in place of all, the trunk as it is.

  Raises:
    BadInput: the model has no such expert.
  """
  names = model.config.experts
  if expert not in names:
    raise BadInput(f'no expert {expert!r}{nearest(expert, names)}')
  dense = dataclasses.replace(model, config=dataclasses.replace(
      model.config, ffn='dense', experts=(), expert_every=1))
  flat = {}
  for name, leaf in model.canonical(params).items():
    found = tree.EXPERT.fullmatch(name)
    if not found:
      flat[name] = leaf
    elif found[2] == expert:
      flat[f'{found[1].removesuffix("/experts")}/{found[3]}'] = leaf
  return dense, dense.running(flat)
