"""What a config needs on each device: predicted without compiling, and by the compiled step."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from demix.analysis.liveness import Program, nbytes, peak
from demix.config import TRAINABLE, Config
from demix.errors import BadInput
from demix.model import sharding, tree
from demix.model.params import Model
from demix.optim.optimizer import AdamW
from demix.optim.state import abstract
from demix.optim.step import make_step

KINDS = ('parameters', 'optimizer', 'batch', 'gradients', 'activations', 'logits')


@dataclasses.dataclass(frozen=True)
class Plan:
  """A completed config as the step that would run.

  Attributes:
    config: completed. sizes: {mesh axis: size}.
  """
  config: Config
  sizes: dict

  @property
  def model(self) -> Model:
    return Model(self.config.model, self.config.execution, self.config.train.compute_dtype)

  @property
  def adamw(self) -> AdamW:
    return AdamW(self.config.optimizer, self.config.optimizer.schedule_steps)

  @property
  def ways(self) -> int:
    """How many parts the rows of a batch are in."""
    return math.prod(self.sizes[axis] for axis in sharding.BATCH[0])

  def batch(self, rows: int) -> dict:
    """Abstract arrays of a batch, as the loop gives them to the step."""
    data = self.config.data
    names = ['tokens_BL', 'targets_BL', 'weights_BL']
    if data.packing == 'document':
      names += ['segments_BL', 'positions_BL']
    types = {'weights_BL': np.float32}
    out = {n: jax.ShapeDtypeStruct((rows, data.sequence_length), types.get(n, np.int32))
           for n in names}
    return out | {'domain_B': jax.ShapeDtypeStruct((rows,), np.int32)}

  def step(self, model: Model, mesh=None):
    """`step.make_step` with what the config says."""
    c = self.config
    # A device has the rows of its own experts only.
    domains = len(model.config.experts) or len(c.data.domains)
    return make_step(model, self.adamw, domains=domains,
                     balanced=c.data.sampling == 'balanced', accumulation=c.train.accumulation,
                     mesh=mesh)


def plan(config: Config, devices: int) -> Plan:
  """A completed config on `devices` devices, none of which need exist.

  Raises:
    BadInput: the mesh does not fit the devices, or a size does not divide.
  """
  given = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
  known = math.prod(n for n in given.values() if n != -1)
  sizes = {axis: n if n != -1 else devices // known for axis, n in given.items()}
  if math.prod(sizes.values()) != devices or list(given.values()).count(-1) > 1:
    shape = ', '.join(f'{a}={n}' for a, n in given.items())
    raise BadInput(f'mesh {shape} does not fit {devices} devices: sizes must multiply to that, and '
                   'at most one may be -1')
  out = Plan(config, sizes)
  rows = config.data.batch_size // config.train.accumulation
  if rows % out.ways:
    raise BadInput(f'{rows} sequences of a micro-batch over {out.ways} devices: not a multiple; '
                   'change data.batch_size, train.accumulation or mesh')
  return out


def part(spec, sizes: dict) -> int:
  """How many parts a PartitionSpec cuts a leaf into."""
  return math.prod(sizes[axis] for axis in spec if axis)


def leaves(plan: Plan, params: dict) -> dict:
  """{running name: (leaf, PartitionSpec, parts)}."""
  specs = sharding.specs(params)
  return {n: (x, specs[n], part(specs[n], plan.sizes)) for n, x in tree.flatten(params).items()}


def local(plan: Plan) -> Model:
  """The model of one device: its experts, its heads and columns of feed-forward and vocabulary.

  Splits over `fsdp` are not in it: leaves are gathered where they are used.
  """
  c, ways = plan.config.model, plan.sizes['model']
  return dataclasses.replace(plan.model, config=dataclasses.replace(
      c, heads=c.heads // ways, kv_heads=(c.kv_heads or c.heads) // ways, head_size=c.head_width,
      d_ff=c.ff_width // ways, vocab_size=c.table_rows // ways, vocab_multiple=1,
      experts=c.experts[:len(c.experts) // plan.sizes['expert']]))


def predict(plan: Plan) -> dict:
  """{kind: bytes} a device needs at the worst moment of a step; nothing is compiled or run.

  What is held throughout is counted by the table of shardings, exactly; the rest by walking the
  program of one device (demix/analysis/liveness.py). Gradients lie as their parameters do.
  """
  config, part_of = plan.config, TRAINABLE[plan.config.init.trainable]
  state, frozen = abstract(plan.model, plan.adamw, part_of)
  held = lambda params: sum(x.size * x.dtype.itemsize // parts
                            for x, _, parts in leaves(plan, params).values())
  own = local(plan)
  state_here, frozen_here = abstract(own, plan.adamw, part_of)
  accumulation = config.train.accumulation
  rows = accumulation * max(config.data.batch_size // accumulation // plan.ways,
                            len(own.config.experts) or 1)
  batch = plan.batch(rows)
  jaxpr = jax.make_jaxpr(plan.step(own))(state_here, batch, frozen_here)
  # What the update reads in a leaf's shape is its gradient: split over fsdp as it is.
  like = {}
  for leaf, spec, _ in leaves(plan, state_here['params']).values():
    like[leaf.shape] = plan.sizes['fsdp'] if 'fsdp' in spec else 1
  table = own.config.vocab_size
  # XLA's CPU backend has no bfloat16 products: it computes in float32 and keeps what it computed.
  wider = 2 if jax.default_backend() == 'cpu' else 1
  def kind(aval, summed):
    size = nbytes(aval) * (wider if aval.dtype == jnp.bfloat16 else 1)
    shape = getattr(aval, 'shape', ())
    if summed and shape in like:
      return 'gradients', size // like[shape]
    wide = len(shape) > 1 and shape[-1] == table
    return ('logits' if wide else 'activations'), size
  donated = len(jax.tree.leaves(state_here))
  worst = peak(Program(jaxpr.jaxpr, kind, given=range(donated)))
  out = {'parameters': held(state['params']) + held(frozen) if frozen else held(state['params']),
         'optimizer': 2 * held(state['params']) + 4 + 4 * tree.expert_axis(state['params']),
         'batch': sum(nbytes(x) for x in plan.batch(config.data.batch_size).values()) // plan.ways}
  return {k: (Counter(out) + worst)[k] for k in KINDS}


def compiled(plan: Plan, devices) -> int:
  """Bytes a device needs by what XLA says of the compiled step: arguments, results that are not
  written over them, and scratch."""
  config = plan.config
  mesh = sharding.make_mesh(config.mesh, devices)
  state, frozen = abstract(plan.model, plan.adamw, TRAINABLE[config.init.trainable])
  where = sharding.state_shardings(mesh, state['params'])
  rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  step = jax.jit(plan.step(plan.model, mesh),
                 in_shardings=(where, rows, sharding.shardings(mesh, frozen)),
                 out_shardings=(where, None), donate_argnums=0)
  program = step.lower(state, plan.batch(config.data.batch_size), frozen).compile()
  m = program.memory_analysis()
  return (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
          + m.temp_size_in_bytes)
