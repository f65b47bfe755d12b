"""What averaging costs: time over reading the parents and writing one, and peak memory.

  python benchmarks/merge.py [--parents=4] [--leaves=24] [--megabytes=64] [--repeats=3]

Checkpoints of random leaves are written below --folder (a temporary one by default; it takes
parents + 1 times leaves times megabytes). Then, each time in a process of its own, in turns: every
parent is verified and restored and one is saved; and they are averaged from disk to disk. Both
verify what they read and what they wrote.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import measure


def leaf_names(count: int) -> list[str]:
  return [f'params/blocks/{i}/ffn/up' for i in range(count)]


def make(folder: Path, seed: int, leaves: int, megabytes: float):
  """A checkpoint of random float32 leaves, in this process."""
  import numpy as np

  from demix.checkpoints import checkpoint
  random, shape = np.random.default_rng(seed), (256, int(megabytes * 1e6 / 4 / 256))
  state = {n: random.standard_normal(shape, np.float32) for n in leaf_names(leaves)}
  with checkpoint.Checkpoints(folder) as saver:
    saver.save(1, state, {})


def read(folder: Path):
  """All leaves, verified."""
  import jax

  from demix.checkpoints import checkpoint
  checkpoint.require(folder, 1)
  like = {n: jax.ShapeDtypeStruct(*x) for n, x in checkpoint.names(folder, 1).items()}
  return checkpoint.restore(folder, 1, like)


def run(mode: str, folder: Path, parents: int):
  """One way, in this process (so that its memory is its own); prints its seconds."""
  import jax
  import numpy as np

  from demix.checkpoints import checkpoint
  from demix.lifecycle import average
  jax.devices()
  out, names = folder / 'out', [f'p{i}' for i in range(parents)]
  shutil.rmtree(out, ignore_errors=True)
  start = time.perf_counter(), time.process_time()
  if mode == 'read and write':
    for name in names:
      state = read(folder / name)
  else:
    for name in names:
      checkpoint.require(folder / name, 1)
    saved = {n: SimpleNamespace(directory=folder / n, step=1,
                                meta=checkpoint.read_meta(folder / n, 1)) for n in names}
    state = average.averaged(saved, np.full(parents, 1 / parents), str(folder))
  with checkpoint.Checkpoints(out) as saver:
    saver.save(1, state, {})
    del state
  print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--parents', type=int, default=4)
  parser.add_argument('--leaves', type=int, default=24)
  parser.add_argument('--megabytes', type=float, default=64, help='of each leaf')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--folder', default='', help='where the checkpoints lie')
  parser.add_argument('--json', default='', help='file for the figures')
  parser.add_argument('--child', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child.startswith('p'):
    make(Path(args.folder) / args.child, int(args.child[1:]), args.leaves, args.megabytes)
    print('null')
    return
  if args.child:
    run(args.child, Path(args.folder), args.parents)
    return
  measure.restart()
  each = args.leaves * args.megabytes / 1e3
  print(f'{args.parents} parents of {args.leaves} leaves of {args.megabytes:g} MB ({each:.2f} GB '
        f'each), {args.repeats} rounds\n{measure.machine()}', flush=True)
  with tempfile.TemporaryDirectory(dir=args.folder or None) as temporary:
    for i in range(args.parents):
      # Not in this process: its children would start with its peak.
      measure.child([sys.argv[0], f'--child=p{i}', f'--folder={temporary}',
                     f'--leaves={args.leaves}', f'--megabytes={args.megabytes}'])
    found = {'read and write': [], 'average': []}
    for _ in range(args.repeats):
      for mode, taken in found.items():
        taken.append(measure.child([sys.argv[0], f'--child={mode}', f'--folder={temporary}',
                                    f'--parents={args.parents}']))
  seconds = {m: [t[0] for t, _ in taken] for m, taken in found.items()}
  cpu = {m: [t[1] for t, _ in taken] for m, taken in found.items()}
  peak = {m: [rss / 1e6 for _, rss in taken] for m, taken in found.items()}
  ratios = {kind: [b / a for a, b in zip(times['read and write'], times['average'])]
            for kind, times in (('wall', seconds), ('CPU', cpu))}
  for mode in found:
    print(f'{mode}: {measure.spread(seconds[mode], ".1f")} s, peak RSS '
          f'{measure.spread(peak[mode], ".0f")} MB')
  print('averaging over reading the parents and writing one:',
        *(f'{measure.spread(values)} {kind}' for kind, values in ratios.items()))
  print(f'allowed: 1.5; {2 * args.megabytes + 1000:.0f} MB')
  measure.write_json(args.json, {
      'machine': measure.machine(), 'arguments': vars(args), 'ratios': {
          kind: measure.summary(values) for kind, values in ratios.items()},
      'seconds': {m: measure.summary(v) for m, v in seconds.items()},
      'peak_megabytes': {m: measure.summary(v) for m, v in peak.items()}})


if __name__ == '__main__':
  main()
