"""Tokens/s, FLOP/s and memory of a training step: dense, DEMix balanced, DEMix by any rows.

  python benchmarks/throughput.py [--size=1m|10m] [--repeats=9] [--arms=dense,demix,general]
                                  [--json=FILE]

An arm is dense, demix (8 experts, balanced) or general (the same model through the path that
gathers each row's expert); `/unrolled` behind it turns execution.scan off. Each arm is one train
step, with donation, as the training loop runs it. The arms and a 2048³ float32 product take turns.
Compile time and peak memory are those of a process that runs two steps of one arm.
"""

import argparse
import json
import sys
import time

import measure

ARMS = {'dense': ('dense', True), 'demix': ('demix', True), 'general': ('demix', False)}


class Arm:
  """A train step with its state and one batch of random ids."""

  def __init__(self, name: str, size: measure.Size):
    import jax
    import numpy as np

    from demix.model.params import Model
    from demix.model.transformer import ExecutionConfig, preset
    from demix.optim.optimizer import AdamW, OptimizerConfig
    from demix.optim.step import make_step
    kind, _, walk = name.partition('/')
    ffn, balanced = ARMS[kind]
    config = preset(size.preset, ffn=ffn, vocab_size=size.vocab, max_length=size.length,
                    experts=measure.EXPERTS if ffn == 'demix' else ())
    self.model = Model(config, ExecutionConfig(scan=walk != 'unrolled'))
    self.flops = measure.product_flops(config, size)
    # One learning rate throughout, so that torch_gpt.py can do the same steps.
    self.optimizer = OptimizerConfig(schedule='constant', warmup_share=0.0)
    adamw, domains = AdamW(self.optimizer, 1000), len(measure.EXPERTS)
    ids = np.random.default_rng(0).integers(
        0, size.vocab, (size.batch, size.length + 1), dtype=np.int32)
    self.batch = {
        'tokens_BL': ids[:, :-1], 'targets_BL': ids[:, 1:],
        'weights_BL': np.ones((size.batch, size.length), np.float32),
        'domain_B': np.repeat(np.arange(domains, dtype=np.int32), size.batch // domains)}

    def fresh(seed):
      params = self.model.init(seed)
      return {'params': params, 'optimizer': adamw.init(params)}
    self.state = jax.jit(fresh)(0)
    step = jax.jit(make_step(self.model, adamw, domains=domains, balanced=balanced),
                   donate_argnums=0)
    started, cpu = time.perf_counter(), time.process_time()
    self.step = step.lower(self.state, self.batch).compile()
    self.compile_seconds = time.perf_counter() - started
    self.compile_cpu = time.process_time() - cpu
    self.loss = None

  def __call__(self):
    self.state, out = self.step(self.state, self.batch)
    self.loss = float(out['loss'])


def product():
  """A call that does one 2048³ product, and its FLOPs."""
  import jax
  import jax.numpy as jnp
  x = jnp.ones((2048, 2048), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(x, x).block_until_ready(), 2 * 2048 ** 3


def cost(name: str, size: measure.Size):
  """In a process of its own: prints what compiling and memory of one arm come to, as JSON."""
  import jax
  jax.config.update('jax_enable_compilation_cache', False)
  arm = Arm(name, size)
  arm()
  arm()
  memory = arm.step.memory_analysis()
  print(json.dumps({
      'compile_seconds': arm.compile_seconds, 'compile_cpu_seconds': arm.compile_cpu,
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(arm.state['params'])),
      'state_bytes': memory.argument_size_in_bytes, 'temporary_bytes': memory.temp_size_in_bytes}))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', choices=measure.SIZES, default='1m')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--inner', type=int, default=0, help='steps timed as one; 0: 3 at 1m, else 1')
  parser.add_argument('--arms', default='dense,demix,general')
  parser.add_argument('--json', default='', help='file for the figures')
  parser.add_argument('--cost', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  measure.restart()
  size = measure.SIZES[args.size]
  if args.cost:
    return cost(args.cost, size)
  names = args.arms.split(',')
  for name in names:
    if name.partition('/')[0] not in ARMS or name.partition('/')[2] not in ('', 'unrolled'):
      parser.error(f'no arm {name!r}: {", ".join(ARMS)}, each also with /unrolled')
  print(f'{size.preset}: T {size.length}, batch {size.batch}, V {size.vocab}, float32, '
        f'{args.repeats} rounds\n{measure.machine()}', flush=True)
  costs = {}
  for name in names:
    costs[name], peak = measure.child([__file__, f'--size={args.size}', f'--cost={name}'])
    costs[name]['peak_rss_bytes'] = peak
  arms = {name: Arm(name, size) for name in names}
  multiply, product_flops = product()
  inner = args.inner or (3 if args.size == '1m' else 1)
  times = measure.interleave({'product': multiply, **arms}, args.repeats,
                             {'product': 2, **dict.fromkeys(arms, inner)})
  report(arms, times, costs, size, product_flops, args)


def report(arms, times, costs, size, product_flops, args):
  """Prints the table and writes --json."""
  figures = {'size': args.size, 'machine': measure.machine(), 'command': sys.argv, 'arms': {}}
  walls, cpus = ([t[i] for t in times['product']] for i in (0, 1))
  figures['product_flops_per_second'] = measure.summary(product_flops / w for w in walls)
  print(f'2048³ product: {measure.spread([product_flops / w / 1e9 for w in walls], ".0f")} GFLOP/s '
        f'wall, {measure.spread([product_flops / c / 1e9 for c in cpus], ".0f")} per CPU second')
  for name, arm in arms.items():
    wall, cpu = ([t[i] for t in times[name]] for i in (0, 1))
    share = {kind: [arm.flops / t / (product_flops / p) for t, p in zip(own, other)]
             for kind, own, other in (('wall', wall, walls), ('cpu', cpu, cpus))}
    c = costs[name]
    figures['arms'][name] = c | {
        'step_seconds': measure.summary(wall), 'step_cpu_seconds': measure.summary(cpu),
        'tokens_per_second': measure.summary(size.tokens / w for w in wall),
        'flops_per_step': arm.flops, 'share_of_product_rate': measure.summary(share['wall']),
        'share_of_product_rate_cpu': measure.summary(share['cpu'])}
    rate = measure.spread([size.tokens / w for w in wall], '.0f')
    print(f'{name}: {c["parameters"] / 1e6:.2f}M parameters, {arm.flops / 1e9:.1f} GFLOP a step, '
          f'loss {arm.loss:.2f}\n'
          f'  tokens/s          {rate}\n'
          f'  step              {measure.spread([w * 1e3 for w in wall], ".0f")} ms wall, '
          f'{measure.spread([t * 1e3 for t in cpu], ".0f")} ms CPU\n'
          f'  GFLOP/s           {measure.spread([arm.flops / w / 1e9 for w in wall], ".0f")}\n'
          f'  share of product  {measure.spread(share["wall"])} wall, '
          f'{measure.spread(share["cpu"])} CPU\n'
          f'  compile           {c["compile_seconds"]:.1f} s wall, '
          f'{c["compile_cpu_seconds"]:.1f} s CPU\n'
          f'  memory            {c["peak_rss_bytes"] / 2**20:.0f} MiB peak RSS; compiled step: '
          f'{c["state_bytes"] / 2**20:.0f} MiB in, {c["temporary_bytes"] / 2**20:.0f} temporary')
  first = next(iter(arms))
  for name in arms:
    if name != first:
      ratios = {kind: [a[i] / b[i] for a, b in zip(times[first], times[name])]
                for i, kind in enumerate(('wall', 'cpu'))}
      figures['arms'][name][f'rate_over_{first}'] = {
          kind: measure.summary(r) for kind, r in ratios.items()}
      print(f'{name} / {first}, tokens/s: {measure.spread(ratios["wall"])} wall, '
            f'{measure.spread(ratios["cpu"])} CPU')
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
