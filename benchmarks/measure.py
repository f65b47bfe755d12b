"""What the benchmarks share: the two settings, interleaved timing, and how figures are printed.

The machine may be shared, so variants take turns and every figure is a median over the rounds with
its spread. CPU time (of all threads) is printed beside wall time: it is the figure to judge by
where others use the cores.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout, without installing
# As launch/environment.sh; read when a process starts, so `restart` is needed where it is not set.
TUNABLES = 'glibc.malloc.hugetlb=1'


@dataclasses.dataclass(frozen=True)
class Size:
  """One setting of the issue: a preset, T targets per sequence, B sequences, V ids."""
  preset: str
  length: int
  batch: int
  vocab: int

  @property
  def tokens(self) -> int:
    return self.length * self.batch


SIZES = {'1m': Size('gpt-1m', 128, 32, 2048), '10m': Size('gpt-10m', 256, 16, 8192),
         **{size: Size(f'gpt-{size}', 1024, batch, 50304) for size, batch in (
             ('125m', 64), ('350m', 32), ('760m', 16), ('1.3b', 8))}}
EXPERTS = tuple(f'domain{i}' for i in range(8))


def restart():
  """Runs this process again with malloc set as in launch/environment.sh, unless it is set."""
  if not os.environ.get('GLIBC_TUNABLES'):
    os.environ['GLIBC_TUNABLES'] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.argv])


def product_flops(config, size: Size) -> int:
  """FLOPs of a training step's matrix products: 6 per weight and token, and what plain attention
  computes of the square.

  Position tables, biases and norms, which Model.flops_per_token counts as parameters, do no product
  and are left out here: 2% at 1M.
  """
  from demix.model.layers.attention import causal_block
  c, width, block = config, config.heads * config.head_width, causal_block(size.length)
  ends = [min(i + block, size.length) for i in range(0, size.length, block)] if block else []
  square = sum((end - i) * end for i, end in zip([0, *ends], ends)) or size.length ** 2
  weights = c.layers * (4 * c.d_model * width + 2 * c.d_model * c.ff_width)
  weights += c.vocab_size * c.d_model
  return size.tokens * (6 * weights + 12 * c.layers * square // size.length * width)


def interleave(calls: dict, repeats: int, inner: dict | None = None) -> dict:
  """{name: call} → {name: [(wall, CPU) seconds of one call, a round]}; the calls take turns.

  Args:
    calls: each runs to its end (blocks). repeats: rounds, after one that is not counted.
    inner: {name: calls in a row that are timed as one}; 1 where it has no entry.
  """
  times = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      count = (inner or {}).get(name, 1)
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(count):
        call()
      taken = (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
      if turn:
        times[name].append(taken)
  return times


def spread(values, form='.3f') -> str:
  """'median [min … max]'."""
  values = list(values)
  return f'{statistics.median(values):{form}} [{min(values):{form}} … {max(values):{form}}]'


def summary(values) -> dict:
  """What --json writes for a list of repeats."""
  values = list(values)
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values),
          'repeats': len(values)}


def machine() -> str:
  """Processor, cores and load, in a line: figures mean little without them."""
  model = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo')
                if line.startswith('model name')), 'unknown processor')
  return (f'{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, '
          f'GLIBC_TUNABLES={os.environ.get("GLIBC_TUNABLES", "")!r}')


def child(arguments: list) -> tuple[dict, float]:
  """Runs this Python on `arguments`; → (the JSON object it prints last, its peak RSS in bytes)."""
  process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE,
                             text=True)
  out = process.stdout.read()
  _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise SystemExit(f'{arguments[0]}: exit {process.returncode}')
  return json.loads(out.splitlines()[-1]), used.ru_maxrss * 1024


def write_json(path: str, figures: dict):
  """Writes what was printed, if a path was given."""
  if path:
    Path(path).write_text(json.dumps(figures, indent=2) + '\n')
