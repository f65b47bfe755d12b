"""The mesh, and one table: parameter path → PartitionSpec.

Axes are Auto (GSPMD); shardings are stated where arrays enter and leave `jax.jit`. Modules know no
mesh. Because experts lead their leaves' axes and rows are expert-major, gradients of an expert are
reduced inside its own group of devices only, and no collective of the forward pass crosses
`expert` (DEMix, docs/method.md).
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demix import tree
from demix.errors import BadInput
from demix.settings import option

AXES = ('expert', 'data', 'fsdp', 'model')

# First match wins; a leaf that nothing matches is an error. Dimensions as in the canonical leaf,
# behind 'expert' where experts are stacked; the layer axis of stacked blocks is never split.
RULES = (
    (r'^embed/(tokens|output)$', ('model', 'fsdp')),
    (r'^embed/positions$', (None, 'fsdp')),
    (r'/attention/[qkv]$', ('fsdp', 'model')),
    (r'/attention/[qkv]_bias$', ('model',)),
    (r'/attention/out$', ('model', 'fsdp')),
    (r'/attention/out_bias$', (None,)),
    (r'/ffn/experts/(up|gate)$', ('expert', 'fsdp', 'model')),
    (r'/ffn/experts/down$', ('expert', 'model', 'fsdp')),
    (r'/ffn/experts/(up|gate)_bias$', ('expert', 'model')),
    (r'/ffn/experts/down_bias$', ('expert', None)),
    (r'/ffn/(up|gate)$', ('fsdp', 'model')),
    (r'/ffn/down$', ('model', 'fsdp')),
    (r'/ffn/(up|gate)_bias$', ('model',)),
    (r'/ffn/down_bias$', (None,)),
    (r'norm/(scale|bias)$', (None,)),
)

BATCH = PartitionSpec(('expert', 'data', 'fsdp'))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1 (what is left of the devices)."""
  data: int = option(-1, 'copies of the model, each with its share of the batch', operational=True)
  fsdp: int = option(1, 'as data, with parameters split over the copies', operational=True)
  expert: int = option(1, 'groups of domain experts', operational=True)
  model: int = option(1, 'splits of heads and feed-forward width', operational=True)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The device mesh (expert, data, fsdp, model); BadInput when sizes and devices do not agree."""
  devices = devices if devices is not None else jax.devices()
  sizes = [getattr(config, axis) for axis in AXES]
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes or len(devices) % known or (
      -1 not in sizes and known != len(devices)):
    shape = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes))
    raise BadInput(f'mesh {shape} does not fit {len(devices)} devices: sizes must multiply to '
                   'that, and at most one may be -1')
  sizes = [s if s != -1 else len(devices) // known for s in sizes]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def specs(params) -> dict:
  """{running name: PartitionSpec} of a running tree; BadInput names a leaf without a rule."""
  out = {}
  for name, leaf in tree.flatten(params).items():
    spec = tree.match(RULES, name)
    spec = (None, *spec) if name.startswith('block_') else spec
    if len(spec) != len(leaf.shape):
      raise BadInput(f'leaf {name!r} has shape {leaf.shape}, its rule {spec} has {len(spec)} '
                     'dimensions: mend the table')
    out[name] = PartitionSpec(*spec)
  return out


def shardings(mesh: Mesh, params) -> dict:
  """A tree like `params` of NamedSharding.

  Raises:
    BadInput: a dimension is not a multiple of the axis it is split over; all sizes are named.
  """
  out = {}
  flat = tree.flatten(params)
  for name, spec in specs(params).items():
    for size, axis in zip(flat[name].shape, spec):
      ways = mesh.shape[axis] if axis else 1
      if size % ways:
        what = 'experts' if axis == 'expert' else f'dimension of {name}'
        fits = [n for n in range(1, size + 1) if size % n == 0]
        raise BadInput(f'{size} {what} over mesh axis {axis}={ways}: not a multiple; '
                       f'sizes that work for {axis}: {fits if len(fits) < 12 else fits[:12]}')
    out[name] = NamedSharding(mesh, spec)
  return tree.unflatten(out)


def check_rows(mesh: Mesh, rows: int, over: tuple = BATCH[0]):
  """Raises BadInput when a micro-batch of `rows` sequences cannot be shared out evenly."""
  ways = math.prod(mesh.shape[axis] for axis in over)
  if rows % ways:
    axes = ' · '.join(f'{axis}={mesh.shape[axis]}' for axis in over if mesh.shape[axis] > 1)
    raise BadInput(f'{rows} sequences of a micro-batch over {ways} devices ({axes}): not a '
                   'multiple; change data.batch_size, train.accumulation or mesh')


def constraints(mesh: Mesh | None, rows: PartitionSpec = BATCH):
  """Two functions for inside a step: activations [B, …] → the same, split by `rows` as the batch;
  a tree of gradients → the same, each where its parameter is. On one device they do nothing."""
  if mesh is None or mesh.size == 1:
    return (lambda x: x), (lambda grads: grads)
  constrain = jax.lax.with_sharding_constraint
  return (lambda x: constrain(x, NamedSharding(mesh, rows)),
          lambda grads: constrain(grads, shardings(mesh, grads)))


def by_rows_and_heads(mesh: Mesh | None):
  """A kernel (q, k, v [B, H, L, K], segments [B, L] or None) → [B, H, L, K] that GSPMD cannot split
  → the same, each device running it on its rows and heads."""
  if mesh is None or mesh.size == 1:
    return lambda kernel: kernel
  heads, rows = PartitionSpec(BATCH[0], 'model'), BATCH
  def spread(kernel):
    def run(q, k, v, segments):
      inputs = (q, k, v) if segments is None else (q, k, v, segments)
      return jax.shard_map(kernel, mesh=mesh, in_specs=(heads, heads, heads, rows)[:len(inputs)],
                           out_specs=heads, check_vma=False)(*inputs)
    return run
  return spread


def state_shardings(mesh: Mesh, params) -> dict:
  """Shardings of {'params', 'optimizer'}: moments lie as their parameters do."""
  like = shardings(mesh, params)
  count = NamedSharding(mesh, PartitionSpec())
  return {'params': like, 'optimizer': {'count': count, 'mu': like, 'nu': like}}
