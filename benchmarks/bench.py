"""One table: model size × mesh × arm. tokens/s, MFU, memory, compile time, time to the first step.

  python benchmarks/bench.py [--sizes=1m,10m] [--meshes='data=-1;data=-1,expert=2']
      [--dtype=float32] [--arms=dense,demix,general,together,linen,torch,unmeshed] [--repeats=5]
      [--torch-python=VENV/bin/python] [--set=remat=dots,loss_block=8192]
      [--json=FILE] [--compare=EARLIER.json] [--profile=DIR]

The arms of one size and mesh take turns. What each figure means: benchmarks/README.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure
import torch_gpt

ARMS = ('dense', 'demix', 'general', 'together', 'linen', 'torch', 'unmeshed')
ONE_DEVICE = ('linen', 'torch', 'unmeshed')
# Dense bfloat16 (without sparsity) FLOP/s of a chip by its data sheet, by part of device_kind; the
# first that fits counts. An H100 or H200 without a word behind it is SXM; JAX calls a v5p 'TPU v5'.
SHEETS = {'H200 NVL': 836e12, 'H100 NVL': 836e12, 'H100 PCIe': 756e12, 'H200': 989e12,
          'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'TPU v6': 918e12, 'TPU v5 lite': 197e12,
          'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v4': 275e12}
# Goals on one H200 in bfloat16, T 1024: tokens/s of a dense LM, and the stretch.
GOALS = {'125m': (345e3, 460e3), '350m': (145e3, 175e3), '760m': (78e3, 90e3),
         '1.3b': (49e3, 55e3)}


class Arm:
  """A train step as training compiles it, with its state and one batch of random ids."""

  def __init__(self, name: str, size: measure.Size, mesh, dtype: str, execution: dict):
    import jax
    import numpy as np

    from demix.model import sharding
    from demix.model.params import Model
    from demix.model.transformer import ExecutionConfig, preset
    from demix.optim.optimizer import AdamW, OptimizerConfig
    from demix.optim.state import begin
    from demix.optim.step import Program, make_step
    started = time.perf_counter()
    ffn = 'demix' if name in ('demix', 'general') else 'dense'
    self.model = Model(
        preset(size.preset, ffn=ffn, vocab_size=size.vocab, max_length=size.length,
               experts=measure.EXPERTS if ffn == 'demix' else ()),
        ExecutionConfig(**execution), dtype)
    self.flops = size.tokens * self.model.flops_per_token(size.length)
    self.optimizer = OptimizerConfig(schedule='constant', warmup_share=0.0)
    adamw, domains = AdamW(self.optimizer, 1000), len(measure.EXPERTS)
    ids = np.random.default_rng(0).integers(
        0, size.vocab, (size.batch, size.length + 1), dtype=np.int32)
    self.batch = {
        'tokens_BL': ids[:, :-1], 'targets_BL': ids[:, 1:],
        'weights_BL': np.ones((size.batch, size.length), np.float32),
        'domain_B': np.arange(size.batch, dtype=np.int32) * domains // size.batch}
    if name == 'unmeshed':
      step, where = jax.jit(make_step(self.model, adamw, domains=domains, balanced=True),
                            donate_argnums=0), None
    else:
      sharding.check_rows(mesh, size.batch)
      program = Program(model=self.model, adamw=adamw, part='', domains=domains,
                        balanced=name != 'general', accumulation=1, mesh=mesh)
      step, where = program.step, program.shardings
      self.batch = jax.device_put(self.batch, jax.sharding.NamedSharding(mesh, sharding.BATCH))
    fresh = jax.jit(lambda seed: begin(self.model.init(seed), adamw), out_shardings=where)
    self.state, self.frozen = fresh(0)
    compiling = time.perf_counter()
    self.step = step.lower(self.state, self.batch, self.frozen).compile()
    self.compile_seconds = time.perf_counter() - compiling
    self.bytes = held(self.step.memory_analysis())
    self()
    self.first_loss, self.first_seconds = self.loss, time.perf_counter() - started

  def __call__(self):
    self.state, out = self.step(self.state, self.batch, self.frozen)
    self.loss = float(out['loss'])


def held(analysis) -> int:
  """Bytes that a compiled program needs on a device."""
  return (analysis.argument_size_in_bytes + analysis.output_size_in_bytes
          - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes)


class Together:
  """As many dense LMs as there are domains, trained side by side (together.py), each with its
  share of the rows; with the attributes of an Arm. `loss` is that of the first."""

  def __init__(self, size: measure.Size, mesh, dtype: str, execution: dict):
    import numpy as np

    from demix.model import sharding
    from demix.model.params import Model
    from demix.model.transformer import ExecutionConfig, preset
    from demix.optim.optimizer import AdamW, OptimizerConfig
    from demix.optim.step import Program
    from demix.optim.together import chosen, lift
    started, runs = time.perf_counter(), len(measure.EXPERTS)
    rows = size.batch // runs
    sharding.check_rows(mesh, rows, ('data', 'fsdp'))
    model = Model(preset(size.preset, vocab_size=size.vocab, max_length=size.length),
                  ExecutionConfig(**execution), dtype)
    self.flops = size.tokens * model.flops_per_token(size.length)
    program = Program(model, AdamW(OptimizerConfig(schedule='constant', warmup_share=0.0), 1000),
                      '', 1, True, 1, mesh)
    ids = np.random.default_rng(0).integers(
        0, size.vocab, (runs, rows, size.length + 1), dtype=np.int32)
    self.batches = [{'tokens_BL': x[:, :-1], 'targets_BL': x[:, 1:],
                     'weights_BL': np.ones((rows, size.length), np.float32),
                     'domain_B': np.zeros(rows, np.int32)} for x in ids]
    word = chosen('auto', program)
    self.lifted = lift(word, [program] * runs, [program.fresh(i) for i in range(runs)])
    compiling = time.perf_counter()
    if word == 'threads':  # each run's own program, on as many cores at once
      step = program.step.lower(program.abstract[0], self.batches[0], {}).compile()
      m = step.memory_analysis()
      self.bytes = runs * m.argument_size_in_bytes + max(1, len(self.lifted._threads)) * (
          held(m) - m.argument_size_in_bytes)
    else:
      stacked = {n: np.stack([b[n] for b in self.batches]) for n in self.batches[0]}
      self.bytes = held(self.lifted._step.lower(
          self.lifted.states[0], stacked, self.lifted.states[1]).compile().memory_analysis())
    self.compile_seconds = time.perf_counter() - compiling
    self()
    self.first_loss, self.first_seconds = self.loss, time.perf_counter() - started

  def __call__(self):
    rows = [read() for read in self.lifted.step(self.batches)]  # waits for all
    self.loss = float(rows[0]['loss'])


def start(size: measure.Size):
  """What a peer starts from, so that its losses can be compared with dense's: a dense model, its
  optimizer, running parameters and batch."""
  import jax
  import numpy as np

  from demix.model.params import Model
  from demix.model.transformer import preset
  from demix.optim.optimizer import OptimizerConfig
  model = Model(preset(size.preset, vocab_size=size.vocab, max_length=size.length))
  ids = np.random.default_rng(0).integers(
      0, size.vocab, (size.batch, size.length + 1), dtype=np.int32)
  return (model, OptimizerConfig(schedule='constant', warmup_share=0.0), jax.jit(model.init)(0),
          {'tokens_BL': ids[:, :-1], 'targets_BL': ids[:, 1:]})


class Linen:
  """linen_gpt.Linen, with the attributes of an Arm."""

  def __init__(self, size: measure.Size):
    import linen_gpt
    started = time.perf_counter()
    model, optimizer, params, batch = start(size)
    self.run = linen_gpt.Linen(model.config, optimizer, model.canonical(params), batch)
    self.flops = size.tokens * model.flops_per_token(size.length)
    self.compile_seconds = self.run.compile_seconds
    self.bytes = held(self.run.step.memory_analysis())
    self()
    self.first_loss, self.first_seconds = self.loss, time.perf_counter() - started

  def __call__(self):
    self.run()
    self.loss = self.run.loss


class Torch:
  """torch_gpt.py's other process, with the attributes of an Arm. Memory is that of its process; CPU
  time too, so `rounds` has the times and not the caller's clock."""

  def __init__(self, size: measure.Size, python: str, dtype: str):
    started = time.perf_counter()
    model, optimizer, params, batch = start(size)
    with tempfile.TemporaryDirectory() as folder:
      file = Path(folder) / 'start.npz'
      torch_gpt.hand_over(file, model, optimizer, params, batch)
      self.run = torch_gpt.Torch(python, file, True, dtype)
    self.flops = size.tokens * model.flops_per_token(size.length)
    self.compile_seconds, self.bytes = (self.run.first[n] for n in ('compile_seconds', 'bytes'))
    self.first_loss, self.first_seconds = self.run.first['loss'], time.perf_counter() - started
    self.taken = []

  def __call__(self):
    self.taken.append(self.run(1))
    self.loss = self.taken[-1]['loss']

  def rounds(self, inner: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of a step, a round; the first round is not counted, as in interleave."""
    times = [(t['wall'], t['cpu']) for t in self.taken[inner:]]
    return [tuple(statistics.fmean(x) for x in zip(*times[i:i + inner]))
            for i in range(0, len(times), inner)]


def product(dtype: str):
  """A call that does one square product on the first device, and its FLOPs."""
  import jax
  import jax.numpy as jnp
  cpu = jax.default_backend() == 'cpu'
  n = 2048 if cpu else 8192
  x = jnp.ones((n, n), 'float32' if cpu else dtype)
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(x, x).block_until_ready(), 2 * n ** 3


def peak(kind: str) -> float | None:
  """FLOP/s of a device by its data sheet; None where it is not known."""
  return next((rate for name, rate in SHEETS.items() if name.lower() in kind.lower()), None)


def settings(text: str) -> dict:
  """'remat=dots,loss_block=8192' → ExecutionConfig's fields."""
  out = {}
  for word in filter(None, text.split(',')):
    name, _, value = word.partition('=')
    out[name] = (int(value) if value.lstrip('-').isdigit()
                 else {'True': True, 'False': False}.get(value, value))
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sizes', default='1m', help=', '.join(measure.SIZES))
  parser.add_argument('--meshes', default='data=-1', help='axes with sizes; several with ; between')
  parser.add_argument('--arms', default='dense,demix', help=', '.join(ARMS))
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--set', default='', help='keys of execution, as remat=dots,loss_block=8192')
  parser.add_argument('--torch-python', default='', help='a Python that has torch, for that arm')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--inner', type=int, default=1, help='steps timed as one')
  parser.add_argument('--json', default='', help='file for the rows')
  parser.add_argument('--compare', default='', help='a file that --json wrote earlier')
  parser.add_argument('--profile', default='', help='folder for a jax.profiler trace of one round')
  args = parser.parse_args()
  names, sizes = args.arms.split(','), args.sizes.split(',')
  for given, known in ((names, ARMS), (sizes, measure.SIZES)):
    for name in given:
      if name not in known:
        parser.error(f'no {name!r}: {", ".join(known)}')
  if 'torch' in names and not args.torch_python:
    parser.error('the arm torch needs --torch-python, a Python that has it: benchmarks/README.md')
  earlier = json.loads(Path(args.compare).read_text()) if args.compare else {'rows': []}
  measure.restart()
  if 'torch' in names:  # on a GPU JAX would take three quarters of the memory at the start
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax

  from demix.model.sharding import MeshConfig, make_mesh
  kind, multiply = jax.devices()[0].device_kind, product(args.dtype)
  sheet = peak(kind)
  print(f'{jax.device_count()} × {kind}, jax {jax.__version__}, {args.dtype}, {args.repeats} rounds'
        f'{", " + args.set if args.set else ""}\n{measure.machine()}', flush=True)
  rows = []
  for size in sizes:
    for text in args.meshes.split(';'):
      mesh = make_mesh(MeshConfig(**settings(text)))
      rows += table(size, text, mesh, names, args, multiply, sheet, kind)
  compare(rows, earlier['rows'])
  measure.write_json(args.json, {'machine': measure.machine(), 'device': kind, 'command': sys.argv,
                                 'jax': jax.__version__, 'rows': rows})


def table(size: str, text: str, mesh, names, args, multiply, sheet, kind) -> list[dict]:
  """Measures and prints the arms of one size and mesh; their rows."""
  import jax
  call, product_flops = multiply
  shape, devices = measure.SIZES[size], mesh.size
  made = {'linen': lambda *_: Linen(shape), 'together': Together,
          'torch': lambda *_: Torch(shape, args.torch_python, args.dtype)}
  arms = {n: made[n](shape, mesh, args.dtype, settings(args.set)) if n in made
          else Arm(n, shape, mesh, args.dtype, settings(args.set)) for n in names}
  times = measure.interleave({'product': call, **arms}, args.repeats,
                             dict.fromkeys(arms, args.inner))
  if 'torch' in arms:
    times['torch'] = arms['torch'].rounds(args.inner)
  if args.profile:
    with jax.profiler.trace(args.profile):
      for arm in arms.values():
        arm()
  print(f'\n{size}: T {shape.length}, batch {shape.batch}, V {shape.vocab}, mesh {text}; '
        f'product {measure.spread([product_flops / w / 1e9 for w, _ in times["product"]], ".0f")} '
        'GFLOP/s')
  print(f'{"arm":<9} {"tokens/s":>28} {"of product":>10} {"CPU time":>9} {"sheet":>6} '
        f'{"MiB":>7} {"compile":>8} {"first":>7} {"over " + names[0]:>12} {"CPU time":>9}  loss')
  rows = []
  for name, arm in arms.items():
    used = 1 if name in ONE_DEVICE else devices
    wall, cpu = zip(*times[name])
    share = [[arm.flops / t[i] / (product_flops / p[i]) / (used if i == 0 else 1)
              for t, p in zip(times[name], times['product'])] for i in (0, 1)]
    ratio = [[a[i] / b[i] for a, b in zip(times[names[0]], times[name])] for i in (0, 1)]
    rate = [shape.tokens / w for w in wall]
    of_sheet = statistics.median(arm.flops / w for w in wall) / (sheet * used) if sheet else None
    rows.append({
        'size': size, 'mesh': text, 'arm': name, 'dtype': args.dtype, 'set': args.set,
        'devices': used, 'tokens_per_second': measure.summary(rate),
        'step_seconds': measure.summary(wall), 'step_cpu_seconds': measure.summary(cpu),
        'mfu_of_product': measure.summary(share[0]),
        'mfu_of_product_cpu': measure.summary(share[1]),
        'mfu_of_sheet': of_sheet, 'bytes_per_device': arm.bytes, 'first_loss': arm.first_loss,
        'compile_seconds': arm.compile_seconds, 'first_step_seconds': arm.first_seconds,
        f'over_{names[0]}': {'wall': measure.summary(ratio[0]), 'cpu': measure.summary(ratio[1])}})
    print(f'{name:<9} {measure.spread(rate, ".0f"):>28} {statistics.median(share[0]):>10.2f} '
          f'{statistics.median(share[1]):>9.2f} {f"{of_sheet:.2f}" if sheet else "-":>6} '
          f'{arm.bytes / 2**20:>7.0f} {arm.compile_seconds:>6.1f} s {arm.first_seconds:>5.1f} s '
          f'{statistics.median(ratio[0]):>12.2f} {statistics.median(ratio[1]):>9.2f}  '
          f'{arm.first_loss:.5f}', flush=True)
  if 'H200' in kind and devices == 1 and size in GOALS:
    goal, stretch = GOALS[size]
    print(f'goal on one H200 in bfloat16: {goal:.0f} tokens/s dense, stretch {stretch:.0f}; DEMix '
          '0.97 of dense')
  return rows


def compare(rows: list[dict], earlier: list[dict]):
  """Prints tokens/s over those of an earlier run, where it had the same row."""
  key = lambda row: tuple(row[n] for n in ('size', 'mesh', 'arm', 'dtype', 'set'))
  before = {key(row): row['tokens_per_second']['median'] for row in earlier}
  for row in rows:
    if key(row) in before:
      print(f'{" ".join(filter(None, key(row)))}: '
            f'{row["tokens_per_second"]["median"] / before[key(row)]:.2f} of the earlier tokens/s')


if __name__ == '__main__':
  main()
