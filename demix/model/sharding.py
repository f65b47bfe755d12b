"""The mesh, and one table: parameter path → PartitionSpec.

Axes are Auto (GSPMD); shardings are stated where arrays enter and leave `jax.jit`. Modules know no
mesh. Because experts lead their leaves' axes and rows are expert-major, gradients of an expert are
reduced inside its own group of devices only, and no collective of the forward pass crosses
`expert` (DEMix, docs/method.md).
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demix.errors import BadInput, Refused
from demix.model import tree
from demix.model.mesh_config import MeshConfig
from demix.runtime.progress import quantity

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


# Less than this is never worth a refusal: biases and scales are whole on every device by rule.
_SMALL = 1 << 20


def make_mesh(config: MeshConfig, devices=None, experts: int = 0) -> Mesh:
  """The device mesh (expert, data, fsdp, model).

  Args:
    config: sizes. devices: all there are (of all processes) by default.
    experts: E of the model; 0: it has none.

  Raises:
    BadInput: sizes and devices do not agree, or E is not a multiple of the expert axis.
  """
  devices = devices if devices is not None else jax.devices()
  sizes = {axis: getattr(config, axis) for axis in AXES}
  _check_experts(sizes, len(devices), experts)
  known = math.prod(s for s in sizes.values() if s != -1)
  open_ends = list(sizes.values()).count(-1)
  if open_ends > 1 or min(sizes.values()) < -1 or not known or len(devices) % known or (
      not open_ends and known != len(devices)):
    shape = ', '.join(f'{a}={s}' for a, s in sizes.items())
    raise BadInput(f'mesh {shape} does not fit {len(devices)} devices: sizes must multiply to '
                   'that, and at most one may be -1')
  sizes = [s if s != -1 else len(devices) // known for s in sizes.values()]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _check_experts(sizes: dict, devices: int, experts: int):
  """Raises BadInput when E experts cannot be shared out over the expert axis."""
  others = math.prod(s for a, s in sizes.items() if a != 'expert' and s > 0)
  ways = sizes['expert'] if sizes['expert'] != -1 else devices // others
  if ways < 1 or not experts or experts % ways == 0:
    return
  # What divides E and, with the other axes, the devices.
  fits = [n for n in range(1, experts + 1) if experts % n == 0 and devices % (n * others) == 0]
  near = [*[n for n in fits if n < ways][-1:], *[n for n in fits if n > ways][:1]]
  raise BadInput(f'{experts} experts over mesh axis expert={ways} on {devices} devices: not a '
                 f'multiple; nearest sizes that work: '
                 f'{" or ".join(f"mesh.expert={n}" for n in near) or "none with the other axes"}')


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


def check_replicated(mesh: Mesh, params, share: float):
  """Refuses a mesh whose axis is there to split parameters and leaves many of them whole.

  The trunk is whole in each group of experts and all is in each copy over `data`: that is what
  these axes mean. Over `fsdp` and `model` only biases and scales are, a few parts in a thousand.

  Args:
    mesh: its axes. params: a running tree; its shapes are looked at.
    share: of the bytes that may stay whole; less than a megabyte always may.

  Raises:
    Refused: more does; the largest leaves are named.
  """
  flat, where = tree.flatten(params), specs(params)
  size = {n: math.prod(x.shape) * np.dtype(x.dtype).itemsize for n, x in flat.items()}
  for axis in ('expert', 'fsdp', 'model'):
    ways = mesh.shape[axis]
    meant = [n for n in flat if axis != 'expert' or '/experts/' in n]
    whole = sorted((n for n in meant if axis not in where[n]), key=lambda n: -size[n])
    left, total = sum(size[n] for n in whole), sum(size[n] for n in meant)
    if ways > 1 and left > max(share * total, _SMALL):
      named = ', '.join(f'{n} ({quantity(size[n])}B)' for n in whole[:3])
      more = f' and {len(whole) - 3} more' if len(whole) > 3 else ''
      raise Refused(f'mesh axis {axis}={ways} leaves {left / total:.0%} of what it is to split '
                    f'whole on every device, {share:.0%} may be: {named}{more}; name {axis} in '
                    'their rules in demix/model/sharding.py, or allow it with mesh.max_replicated')


def row_ways(mesh: Mesh, over: tuple = BATCH[0]) -> int:
  """Over how many devices the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in over)


def check_rows(mesh: Mesh, rows: int, over: tuple = BATCH[0]):
  """Raises BadInput when a micro-batch of `rows` sequences cannot be shared out evenly."""
  ways = row_ways(mesh, over)
  if rows % ways:
    axes = ' · '.join(f'{axis}={mesh.shape[axis]}' for axis in over if mesh.shape[axis] > 1)
    raise BadInput(f'{rows} sequences of a micro-batch over {ways} devices ({axes}): not a '
                   'multiple; change data.batch_size, train.accumulation or mesh')


def process_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """The rows of a batch of `rows` that lie on devices of this process, ascending."""
  where = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,))
  return np.unique(np.concatenate([np.arange(rows)[index] for index in where.values()]))


def place(mesh: Mesh, batch: dict, rows: int, mine: np.ndarray) -> dict:
  """Starts to copy a batch to the devices; does not wait for it.

  Args:
    batch: {name: [len(mine), …]}, the rows of this process. rows: of the whole batch.
    mine: `process_rows`.

  Returns:
    {name: global array [rows, …]}, split by rows as BATCH.
  """
  where = NamedSharding(mesh, BATCH)
  if len(mine) == rows and jax.process_count() == 1:
    return jax.device_put(batch, where)
  def put(x):
    def part(index):  # the rows of a device are neighbours among those of its process
      start, stop, _ = index[0].indices(rows)
      at = np.searchsorted(mine, start)
      return x[at:at + stop - start]
    return jax.make_array_from_callback((rows, *x.shape[1:]), where, part)
  return {name: put(x) for name, x in batch.items()}


def put(arrays, where: NamedSharding):
  """A tree of whole arrays that every process has, on the devices that `where` says."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, where)
  return jax.tree.map(lambda x: jax.make_array_from_callback(
      x.shape, where, lambda index: np.asarray(x)[index]), arrays)


def spread(mesh: Mesh, leaves: dict) -> dict:
  """Shardings of canonical leaves between the running tree and a checkpoint: as many devices as
  divide a leaf have a part of it each, so that no device ever holds a whole state."""
  out = {}
  for name, leaf in leaves.items():
    spec = [[] for _ in leaf.shape]
    ways = [1] * len(leaf.shape)
    for axis in AXES:
      size = mesh.shape[axis]
      at = next((i for i, n in enumerate(leaf.shape) if n % (ways[i] * size) == 0), None)
      if size > 1 and at is not None:
        spec[at].append(axis)
        ways[at] *= size
    out[name] = NamedSharding(mesh, PartitionSpec(*(tuple(s) or None for s in spec)))
  return out


def constraints(mesh: Mesh | None, rows: PartitionSpec = BATCH):
  """Three functions for inside a step: activations [B, …] → the same, split by `rows` as the batch;
  a tree of gradients → the same, each where its parameter is; a small array → the same, whole on
  every device. On one device they do nothing."""
  if mesh is None or mesh.size == 1:
    return (lambda x: x), (lambda grads: grads), (lambda x: x)
  constrain = jax.lax.with_sharding_constraint
  return (lambda x: constrain(x, NamedSharding(mesh, rows)),
          lambda grads: constrain(grads, shardings(mesh, grads)),
          lambda x: constrain(x, NamedSharding(mesh, PartitionSpec())))


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
  """Shardings of {'params', 'optimizer'}: moments lie as their parameters do, and an expert's count
  of updates where it is read, with the expert."""
  like = shardings(mesh, params)
  count = NamedSharding(mesh, PartitionSpec())
  counts = {}
  if tree.expert_axis(params):
    counts['counts'] = NamedSharding(mesh, PartitionSpec('expert'))
  return {'params': like, 'optimizer': {'count': count, **counts, 'mu': like, 'nu': like}}
