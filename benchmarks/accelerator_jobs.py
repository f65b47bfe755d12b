"""The jobs of accelerator.py: each is a process of its own, whose rows are lines of a file."""

import dataclasses
import json
import math
import signal
import time
import traceback

import bench
import measure

TINY = measure.Size('gpt-tiny', 64, 16, 512)


def rungs(size: measure.Size) -> list[tuple[measure.Size, dict]]:
  """(shape, execution keys) from the fastest, as is thought, to the smallest."""
  b = size.batch
  steps = [(2 * b, 0, 'none'), (b, 0, 'none'), (b, 8192, 'none'), (b // 2, 0, 'none'),
           (b // 2, 8192, 'dots'), (b // 4, 8192, 'full')]
  return [(dataclasses.replace(size, batch=batch), dict(loss_block=block, remat=remat))
          for batch, block, remat in steps]


def predicted(arms, size: measure.Size, execution: dict) -> int:
  """Bytes that arms which take turns in one process need: all states, and the widest step."""
  from demix.analysis import memory, needs
  from demix.config import Config, TrainConfig
  from demix.data.sampling.data_config import DataConfig
  from demix.model.transformer import ExecutionConfig, preset
  states, steps = 0, []
  for arm in arms:
    config = Config(model=preset(size.preset, ffn=arm), execution=ExecutionConfig(**execution),
                    data=DataConfig(batch_size=size.batch, sequence_length=size.length),
                    train=TrainConfig(compute_dtype='bfloat16'))
    experts = len(measure.EXPERTS) if arm == 'demix' else 1
    parts = memory.predict(memory.plan(needs.completed(config, size.vocab, experts), 1))
    state = parts['parameters'] + parts['optimizer']
    states, steps = states + state, [*steps, sum(parts.values()) - state]
  return states + max(steps)


def choose(arms, size: measure.Size, first: int, limit: int | None):
  """(rung, shape, execution, predicted bytes or None): the first from `first` that fits."""
  steps = rungs(size)
  for i in range(first, len(steps)):
    try:
      need = predicted(arms, *steps[i])
    except Exception as e:  # a prediction is a help: without it, memory is found by trying
      print(f'no prediction of memory: {said(e)}')
      return max(first, 1), *steps[max(first, 1)], None
    print(f'{steps[i][0].batch} rows, {steps[i][1]}: {need / 2**30:.1f} GiB predicted')
    if limit is None or need < 0.8 * limit or i == len(steps) - 1:
      return i, *steps[i], need
  raise SystemExit('no smaller setting is left')


def mesh():
  """One device, whatever is there."""
  import jax

  from demix.model.sharding import MeshConfig, make_mesh
  return make_mesh(MeshConfig(), jax.devices()[:1])


def timed(calls: dict, flops: dict, seconds: float, tokens: int) -> dict:
  """{name: figures} of calls (n) → n steps, in turns; some seconds each."""
  for call in calls.values():
    call(1)
  started = time.perf_counter()
  for call in calls.values():
    call(1)
  once = (time.perf_counter() - started) / len(calls)
  inner = max(1, min(20, round(min(0.5, seconds / 4) / once)))
  repeats = max(3, min(10, int(seconds / (inner * once * len(calls)))))
  times = measure.interleave({n: lambda c=c: c(inner) for n, c in calls.items()}, repeats)
  import jax
  sheet, out = bench.peak(jax.devices()[0].device_kind), {}
  first = next(iter(calls))
  for name in calls:
    wall = [w / inner for w, _ in times[name]]
    rate = measure.summary(tokens / w for w in wall)
    out[name] = {'tokens_per_second': rate, 'step_seconds': measure.summary(wall),
                 'mfu': flops[name] / tokens * rate['median'] / sheet if sheet else None}
    if name != first:
      out[name][f'over_{first}'] = measure.summary(
          a[0] / b[0] for a, b in zip(times[first], times[name]))
  return out


def steps_of(arm):
  """A call (n) that dispatches n steps of a bench.Arm and waits for the last."""
  def run(count):
    for _ in range(count):
      arm.state, out = arm.step(arm.state, arm.batch, arm.frozen)
    arm.loss = float(out['loss'])
  return run


def kernel(text: str) -> str:
  """The attention that a compiled program runs, by its text."""
  return 'cudnn' if 'fmha' in text else 'splash' if 'tpu_custom_call' in text else 'plain'


def size_job(name: str, args, emit):
  """Dense of a size, and at 125M DEMix in turns with it."""
  import jax
  jax.config.update('jax_enable_compilation_cache', False)
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  size = shapes(args)[name]
  names = ('dense', 'demix') if name == '125m' else ('dense',)
  rung, size, execution, need = choose(names, size, args.rung, stats.get('bytes_limit'))
  execution |= bench.settings(args.set)
  arms, rows = {}, {}
  for arm in names:
    rows[arm] = {'size': name, 'arm': arm, 'status': 'failed', 'why': 'ended while compiling',
                 'rung': rung, 'batch': size.batch, 'length': size.length, 'vocab': size.vocab,
                 **execution, 'dtype': 'bfloat16', 'predicted_bytes': need}
    emit(rows[arm])
    made = arms[arm] = bench.Arm(arm, size, mesh(), 'bfloat16', execution)
    rows[arm] |= {'why': 'ended while timing', 'compile_seconds': made.compile_seconds,
                  'first_step_seconds': made.first_seconds, 'bytes': made.bytes,
                  'first_loss': made.first_loss, 'attention': kernel(made.step.as_text())}
    emit(rows[arm])
    found = timed({n: steps_of(a) for n, a in arms.items()}, {n: a.flops for n, a in arms.items()},
                  args.seconds, size.tokens)
    stats = device.memory_stats() or {}
    rows[arm]['peak_bytes_in_use'] = stats.get('peak_bytes_in_use')
    for n in arms:
      rows[n] |= found[n]
      if math.isfinite(arms[n].loss):
        rows[n] |= {'status': 'measured', 'why': ''}
      else:
        rows[n]['why'] = f'loss {arms[n].loss}'
      emit(rows[n])


def torch_job(name: str, args, emit):
  """PyTorch with torch.compile, bfloat16 by autocast, from dense's parameters and batch."""
  size = dataclasses.replace(shapes(args)[name], batch=args.batch)
  row = {'size': name, 'arm': 'torch', 'status': 'failed', 'why': 'ended while compiling',
         'batch': size.batch, 'length': size.length, 'vocab': size.vocab, 'dtype': 'bfloat16'}
  emit(row)
  torch = bench.Torch(size, args.torch_python, 'bfloat16')
  found = timed({'torch': torch.run}, {'torch': torch.flops}, args.seconds, size.tokens)['torch']
  emit(row | found | {
      'status': 'measured', 'why': '', 'compile_seconds': torch.compile_seconds,
      'bytes': torch.bytes, 'first_loss': torch.first_loss, 'version': torch.run.first['version'],
      'device': torch.run.first['device'], 'attention': 'sdpa'})
  torch.run.process.stdin.close()


def few_losses(arm: str, dtype: str) -> list[float]:
  """Five steps of a tiny LM on one batch."""
  made = bench.Arm(arm, TINY, mesh(), dtype, {})
  losses = [made.loss]
  for _ in range(4):
    made()
    losses.append(made.loss)
  return losses


def sanity_job(args, emit):
  """Each check is a row: ok True, False, or None where it does not apply."""
  import jax
  jax.config.update('jax_default_matmul_precision', 'highest')  # float32 products, not TF32
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  emit({'check': 'device', 'ok': args.tiny or device.platform != 'cpu', 'kind': device.device_kind,
        'platform': device.platform, 'jax': jax.__version__,
        'memory_bytes': stats.get('bytes_limit'), 'machine': measure.machine(),
        'peak_flops_per_second': bench.peak(device.device_kind),
        'text': f'{device.device_kind}, jax {jax.__version__}'})
  if not args.tiny and device.platform == 'cpu':
    return
  for name, check in {
      'losses dense': lambda: losses_check('dense'), 'losses demix': lambda: losses_check('demix'),
      'attention': attention_check, 'generation': generation_check}.items():
    try:
      emit({'check': name} | check())
    except Exception as e:  # the next check is not about this
      traceback.print_exc()
      emit({'check': name, 'ok': False, 'text': said(e)})


def losses_check(arm: str) -> dict:
  """float32, for the other process to compare with CPU's; bfloat16 is finite and near it."""
  full, half = few_losses(arm, 'float32'), few_losses(arm, 'bfloat16')
  off = max(abs(a - b) for a, b in zip(full, half))
  return {'ok': all(map(math.isfinite, half)) and off < 0.05, 'losses': full,
          'bfloat16_losses': half, 'text': f'bfloat16 finite, within {off:.1e} of float32'}


def attention_check() -> dict:
  """The fused kernel is chosen, is in the compiled program, and agrees with plain attention."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from demix.model.layers import fused_attention
  from demix.model.layers.attention import attend, mask_bias
  from demix.model.model_config import ModelConfig
  B, H, L, K = 2, 4, 256, 64
  name = fused_attention.NATIVE.get(jax.default_backend())
  if not name:
    return {'ok': None, 'text': f'plain: {jax.default_backend()} has no fused kernel'}
  run = fused_attention.choose('auto', ModelConfig(heads=H, d_model=H * K), (B, L), jnp.bfloat16)
  if run is None:
    return {'ok': False, 'text': f'plain, not {name}: why is in sanity.log'}
  random = np.random.default_rng(0)
  q, k, v, dy = (jnp.asarray(x, jnp.bfloat16) for x in random.normal(size=(4, B, H, L, K)))
  q = (q * K ** -0.5).astype(jnp.bfloat16)
  plain = lambda q, k, v: attend(q, k, v, mask_bias(L))
  def values(call, *x):
    y, pull = jax.vjp(call, *x[:3])
    return y, *pull(x[3])
  fused = jax.jit(lambda *x: values(run, *x)).lower(q, k, v, dy).compile()
  exact = jax.jit(lambda *x: values(plain, *x))(*(x.astype(jnp.float32) for x in (q, k, v, dy)))
  off = [float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
         for a, b in zip(fused(q, k, v, dy), exact)]
  found = kernel(fused.as_text())
  return {'ok': found == name and max(off) < 0.03, 'kernel': found, 'off': off,
          'text': f'{found}; output, dq, dk, dv within {max(off):.1e} of plain in float32'}


def generation_check() -> dict:
  """A tiny DEMix LM of random parameters writes 16 tokens, all experts mixed."""
  import jax

  from demix.generation.generate import Writer
  from demix.generation.sampling import SamplingConfig
  from demix.mix.members import ExpertMembers
  from demix.mix.mixture import MixConfig, Mixture
  from demix.model.params import Model
  from demix.model.transformer import preset
  model = Model(preset(TINY.preset, ffn='demix', experts=measure.EXPERTS, vocab_size=TINY.vocab,
                       max_length=TINY.length))
  mixture = Mixture(ExpertMembers(model), jax.jit(model.init)(0), MixConfig())
  tokens = list(Writer(mixture, [1, 2, 3], SamplingConfig(max_tokens=16, temperature=0)))
  fine = len(tokens) == 16 and all(math.isfinite(t.logp) for t in tokens)
  return {'ok': fine, 'text': f'{len(tokens)} tokens'}


def cpu_job(args, emit):
  """The losses that the device's are compared with."""
  for arm in ('dense', 'demix'):
    emit({'check': f'cpu {arm}', 'losses': few_losses(arm, 'float32')})


def job(args):
  """Runs one job in this process; its rows are lines of args.rows."""
  signal.alarm(max(1, int(args.limit) + 10))  # also where the process that counts the time is gone
  def emit(row):
    with open(args.rows, 'a') as file:
      file.write(json.dumps(row) + '\n')
  kind, _, name = args.job.partition(' ')
  if kind == 'probe':  # has this Python what is needed, and does its JAX see a device?
    import jax

    from demix.generation.generate import Writer  # noqa: F401
    from demix.optim.step import Program  # noqa: F401
    raise SystemExit(jax.devices()[0].platform == 'cpu')
  try:
    if kind in ('sanity', 'cpu'):
      {'sanity': sanity_job, 'cpu': cpu_job}[kind](args, emit)
    else:
      (torch_job if kind == 'torch' else size_job)(name or kind, args, emit)
  except Exception as e:
    traceback.print_exc()
    raise SystemExit(said(e)) from None  # the last line, whatever JAX adds to its errors


def said(error: Exception) -> str:
  """An error in a line."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def shapes(args) -> dict:
  """{size: measure.Size}; with --tiny all of them tiny."""
  return dict.fromkeys(measure.SIZES, TINY) if args.tiny else measure.SIZES
