"""How long a start takes: `python -m demix --help`, and from start to the first step at 1M.

  python benchmarks/startup.py [--repeats=7] [--starts=3] [--json=FILE]

A first step is the moment its row is in metrics.jsonl; the store is made on the spot as in
loader.py. Once with an empty compilation cache, then with the cache that this left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import loader
import measure


def timed(command: list, environment: dict, until: Path | None = None) -> tuple:
  """(wall seconds to the end, or to the first line in the file `until`; CPU seconds to the end)."""
  started, seen = time.perf_counter(), None
  with tempfile.TemporaryFile('w+') as errors:
    process = subprocess.Popen(command, cwd=measure.ROOT, env=environment,
                               stdout=subprocess.DEVNULL, stderr=errors)
    while True:
      done, status, used = os.wait4(process.pid, os.WNOHANG)
      now = time.perf_counter() - started
      if until and seen is None and until.exists() and until.stat().st_size:
        seen = now
      if done:
        break
      time.sleep(0.002)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      errors.seek(0)
      raise SystemExit(f'{" ".join(command)}: exit {process.returncode}: {errors.read()}')
  return seen or now, used.ru_utime + used.ru_stime


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--repeats', type=int, default=7, help='of --help')
  parser.add_argument('--starts', type=int, default=3, help='of training, cold and warm each')
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  measure.restart()
  print(measure.machine(), flush=True)
  base = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1'}
  figures = {'command': sys.argv, 'machine': measure.machine()}
  demix = [sys.executable, '-m', 'demix']
  helps = [timed([*demix, '--help'], base) for _ in range(args.repeats + 1)][1:]
  print(f'python -m demix --help: {measure.spread([h[0] for h in helps], ".2f")} s wall, '
        f'{measure.spread([h[1] for h in helps], ".2f")} s CPU over {args.repeats} starts',
        flush=True)
  figures['help_seconds'] = measure.summary(h[0] for h in helps)
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    store = loader.make_store(folder)
    taken = {(arm, kind): [] for arm in ('dense', 'demix') for kind in ('cold', 'warm')}
    for turn in range(args.starts):
      for arm in ('dense', 'demix'):
        environment = base | {'JAX_COMPILATION_CACHE_DIR': str(folder / f'cache-{arm}-{turn}')}
        for kind in ('cold', 'warm'):
          workdir = folder / f'{arm}-{kind}-{turn}'
          command = [*demix, 'train', f'--workdir={workdir}', f'--config.data.path={store.path}',
                     f'--config.model.ffn={arm}', '--config.train.steps=3',
                     '--config.train.log_every=1', '--config.train.eval_sequences=1']
          taken[arm, kind].append(timed(command, environment, workdir / 'metrics.jsonl'))
  for (arm, kind), seconds in taken.items():
    name = f'{arm}, {"empty cache" if kind == "cold" else "second start"}'
    wall, cpu = zip(*seconds)
    print(f'start to first step, 1M {name}: {measure.spread(wall, ".1f")} s wall over '
          f'{len(wall)} starts (whole run of 3 steps: {measure.spread(cpu, ".1f")} s CPU)')
    figures[f'first_step_seconds, {name}'] = measure.summary(wall)
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
