"""The tables of `inspect`: parameters by group of leaves, and memory by kind."""

import dataclasses

import jax

from demix.analysis import memory
from demix.config import Config, complete
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.model.sharding import AXES
from demix.runtime.progress import quantity


@dataclasses.dataclass(frozen=True)
class Blank:
  """What a config is completed from where there is no token store yet."""
  domains: tuple
  vocab_size: int
  path: str = 'no store'

  @property
  def roles(self) -> dict:
    return dict.fromkeys(self.domains, 'train')

  @property
  def groups(self) -> dict:
    return {}

  def leaves(self, names) -> tuple:
    return tuple(names)


def completed(config: Config, vocab_size: int, experts: int) -> Config:
  """The config with the sizes of its store, or of one that is made up."""
  if config.init.model:
    raise BadInput('init.model: inspect knows configs that start from fresh parameters; give that '
                   'model\'s own config')
  if config.data.path:
    return complete(config, TokenStore.open(config.data.path))
  names = config.data.domains or tuple(f'domain{i}' for i in range(experts))
  return complete(config, Blank(names, vocab_size))


def parameter_lines(plan: memory.Plan) -> list[str]:
  """One line a running leaf: shape, scalars, bytes on a device, PartitionSpec; then the totals."""
  rows = []
  for name, (leaf, spec, parts) in memory.leaves(plan, plan.model.abstract).items():
    rows.append((name, '×'.join(map(str, leaf.shape)), quantity(leaf.size),
                 size(leaf.size * leaf.dtype.itemsize / parts),
                 ', '.join(axis or '-' for axis in spec)))
  total, active = plan.model.counts()
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [f'{n:<{widths[0]}}  {s:<{widths[1]}}  {c:>{widths[2]}}  {b:>{widths[3]}}  {p}'
           for n, s, c, b, p in rows]
  return [*lines, f'{quantity(total)} parameters, {quantity(active)} active per token, float32; '
          'bytes are those of one device']


def size(count: float) -> str:
  """Bytes as text: '1.50 GiB'."""
  for unit in ('B', 'KiB', 'MiB'):
    if count < 1024:
      return f'{count:.0f} {unit}'
    count /= 1024
  return f'{count:.2f} GiB'


def memory_lines(plan: memory.Plan, compiled: bool) -> list[str]:
  """One line a kind, and their sum; beside the compiled step's if asked for."""
  parts = memory.predict(plan)
  total = sum(parts.values())
  lines = [f'{kind:<12} {size(count):>10}  {count / total:5.1%}' for kind, count in parts.items()]
  lines.append(f'{"predicted":<12} {size(total):>10}  on each device, at the worst moment of a '
               'step')
  if compiled:
    found = memory.compiled(plan, jax.devices())
    lines.append(f'{"compiled":<12} {size(found):>10}  predicted / compiled {total / found:.2f}')
  return lines


def show(config: Config, *, vocab_size: int, experts: int, devices: int, parameters: bool,
         memory_too: bool, compiled: bool = False):
  """Prints the tables.

  Args:
    vocab_size, experts: where neither config nor a token store says.
    devices: to plan for; 0: those that are there.
    compiled: compile the step too; it needs those devices.

  Raises:
    BadInput: the config cannot be, the mesh does not fit, or the devices are not there.
  """
  there = len(jax.devices())
  if compiled and devices not in (0, there):
    raise BadInput(f'--compile for --devices={devices}, but {there} are there: leave one of them '
                   'out (XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU)')
  plan = memory.plan(completed(config, vocab_size, experts), devices or there)
  c = plan.config
  mesh = ' '.join(f'{axis}={plan.sizes[axis]}' for axis in AXES if plan.sizes[axis] > 1)
  print(f'{c.data.batch_size} × {c.data.sequence_length} tokens an update in '
        f'{c.train.accumulation} parts, V {c.model.table_rows}, E {len(c.model.experts)}, '
        f'{c.train.compute_dtype}, remat {c.execution.remat}, loss_block {c.execution.loss_block}, '
        f'{devices or there} devices{f" ({mesh})" if mesh else ""}')
  if parameters:
    print('', *parameter_lines(plan), sep='\n')
  if memory_too:
    print('', *memory_lines(plan, compiled), sep='\n')
