"""Experts trained side by side in one process against one after another.

  python benchmarks/together.py [--size=1m|10m] [--experts=8] [--rows=4] [--repeats=9]
                                [--lifts=threads,map,vmap] [--json=FILE]
  python benchmarks/together.py --table [--repeats=5]     when it pays: sizes x number of experts

A round is one step of every expert, with donation, as the training loop begins and reads it: apart,
an expert's numbers are read while its own next step runs; together, while those of all run. Ways
take turns; figures are medians over the rounds. An expert's batch is --rows sequences, the quick
start's share of one branch. Apart is what `forest run` does, without what it loses between
experts: starting, compiling, evaluating, waiting for the last checkpoint.
"""

import argparse
import functools
import sys

import measure


class Apart:
  """Steps of runs one after another: of each a few, with the numbers read one step later."""

  def __init__(self, programs, states):
    from demix.optim.together import Each
    self.runs = [Each([program], [state]) for program, state in zip(programs, states)]

  def round(self, batches, steps: int):
    for run, batch in zip(self.runs, batches):
      before = None
      for _ in range(steps):
        [out] = run.step([batch])
        if before:
          before()
        before = out
      before()


class Together:
  """Steps of all runs at once, by one way of lifting."""

  def __init__(self, word, programs, states):
    from demix.optim.together import lift
    self.lifted = lift(word, programs, states)

  def round(self, batches, steps: int):
    before = []
    for _ in range(steps):
      out = self.lifted.step(batches)
      for read in before:
        read()
      before = out
    for read in before:
      read()


def ways(size: measure.Size, experts: int, rows: int, lifts) -> dict:
  """{name: call that makes two steps of every expert}."""
  import jax
  import numpy as np

  from demix.model.params import Model
  from demix.model.sharding import MeshConfig, make_mesh
  from demix.model.transformer import preset
  from demix.optim.optimizer import AdamW, OptimizerConfig
  from demix.optim.state import begin
  from demix.optim.step import Program
  model = Model(preset(size.preset, ffn='dense', vocab_size=size.vocab, max_length=size.length))
  adamw = AdamW(OptimizerConfig(schedule='constant', warmup_share=0.0), 1000)
  program = Program(model, adamw, '', 1, True, 1, make_mesh(MeshConfig()))
  fresh = jax.jit(lambda seed: begin(model.init(seed), adamw), out_shardings=program.shardings)
  def batch(seed):
    ids = np.random.default_rng(seed).integers(
        0, size.vocab, (rows, size.length + 1), dtype=np.int32)
    return {'tokens_BL': ids[:, :-1], 'targets_BL': ids[:, 1:],
            'weights_BL': np.ones((rows, size.length), np.float32),
            'domain_B': np.zeros(rows, np.int32)}
  batches, programs = [batch(k) for k in range(experts)], [program] * experts
  states = lambda: [fresh(k) for k in range(experts)]
  made = {'apart': Apart(programs, states())}
  made |= {word: Together(word, programs, states()) for word in lifts}
  return {name: functools.partial(way.round, batches, 2) for name, way in made.items()}


def one(size_name: str, experts: int, rows: int, lifts, repeats: int) -> dict:
  """Measures and prints one setting."""
  size = measure.SIZES[size_name]
  calls = ways(size, experts, rows, lifts)
  times = measure.interleave(calls, repeats)
  print(f'{size_name}, {experts} experts, {rows} rows of {size.length} tokens each')
  figures = {'size': size_name, 'experts': experts, 'rows': rows, 'ways': {}}
  tokens = 2 * experts * rows * size.length
  for name in calls:
    wall, cpu = ([t[i] for t in times[name]] for i in (0, 1))
    ratio = [[a[i] / b[i] for a, b in zip(times['apart'], times[name])] for i in (0, 1)]
    busy = [c / w for w, c in times[name]]
    print(f'  {name:<8} {measure.spread([tokens / w for w in wall], ".0f")} tokens/s; over apart '
          f'{measure.spread(ratio[0], ".2f")} wall, {measure.spread(ratio[1], ".2f")} CPU; '
          f'{measure.spread(busy, ".2f")} cores busy', flush=True)
    figures['ways'][name] = {
        'tokens_per_second': measure.summary(tokens / w for w in wall),
        'wall_seconds': measure.summary(wall), 'cpu_seconds': measure.summary(cpu),
        'over_apart_wall': measure.summary(ratio[0]), 'over_apart_cpu': measure.summary(ratio[1])}
  return figures


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', choices=measure.SIZES, default='1m')
  parser.add_argument('--experts', type=int, default=8)
  parser.add_argument('--rows', type=int, default=4, help='sequences in the batch of an expert')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--lifts', default='threads,map,vmap')
  parser.add_argument('--table', action='store_true', help='sizes x number of experts')
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  measure.restart()
  print(measure.machine(), flush=True)
  lifts = args.lifts.split(',')
  settings = [(args.size, args.experts, args.rows)]
  if args.table:
    settings = [('1m', k, rows) for k in (2, 4, 8) for rows in (1, 4, 16)] + [
        ('10m', k, 2) for k in (2, 4)]
  found = [one(*setting, lifts, args.repeats) for setting in settings]
  measure.write_json(args.json, {'machine': measure.machine(), 'command': sys.argv,
                                 'settings': found})


if __name__ == '__main__':
  main()
