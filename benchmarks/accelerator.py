"""Speed on one accelerator, unattended: sanity, 125M to 1.3B dense, 125M DEMix, torch.compile.

Run by benchmarks/accelerator.sh, which finds or makes the environment. Each job
(accelerator_jobs.py) is a process of its own with a time limit; this one imports no JAX.
OUT/results.json is written after each job, OUT/JOB.log has what it said.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerator_jobs
import bench
import measure

SIZES = ('125m', '350m', '760m', '1.3b')
DEMIX_GOAL = 0.98  # of dense, tokens/s
LIMITS = {'sanity': 110, '125m': 140, 'torch': 130}  # seconds of a job; of other sizes 100
LEAST = 25  # seconds: with less left, a job is not begun
SHARE = '0.92'  # of the device's memory, for JAX
OOM = 'RESOURCE_EXHAUSTED', 'out of memory', 'OutOfMemory'


def one_gpu() -> dict:
  """The first GPU that may be seen, and no other: JAX takes memory of all that it sees."""
  return {'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}


class Runner:
  """Starts jobs one after another within the time that is left, and keeps the results."""

  def __init__(self, args):
    self.args, self.out = args, Path(args.out)
    self.end = time.monotonic() + 60 * args.minutes - args.spent
    self.results = {'command': sys.argv, 'minutes': args.minutes, 'tiny': args.tiny, 'device': {},
                    'sanity': [], 'rows': []}
    self.out.mkdir(parents=True, exist_ok=True)

  @property
  def left(self) -> float:
    return self.end - time.monotonic()

  def command(self, name: str, *more) -> list:
    """What a job's process runs."""
    a = self.args
    return [sys.executable, __file__, f'--job={name}', f'--set={a.set}', f'--seconds={a.seconds}',
            f'--torch-python={a.torch_python}', *(['--tiny'] if a.tiny else []), *more]

  def begin(self, name: str, limit: float, *more, **env):
    """Starts a job: (process, its log, the file of its rows)."""
    log, rows = (self.out / f'{name.replace(" ", "-")}.{end}' for end in ('log', 'jsonl'))
    rows.unlink(missing_ok=True)
    with open(log, 'wb') as file:
      process = subprocess.Popen(
          self.command(name, f'--rows={rows}', f'--limit={limit:.0f}', *more), stdout=file,
          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
          env={'XLA_PYTHON_CLIENT_MEM_FRACTION': SHARE, 'GLIBC_TUNABLES': measure.TUNABLES,
               **os.environ, **one_gpu(), **env})
    return process, log, rows, time.monotonic() + limit

  def finish(self, process, log, rows, end) -> tuple[list, str]:
    """Waits for a job, or ends it: its rows, and why it failed ('' if it did not)."""
    try:
      code = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
      code = None
    finally:  # what it started goes with it
      try:
        os.killpg(process.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass
      process.wait()
    text, written = log.read_text(errors='replace'), rows.read_text() if rows.exists() else ''
    rows.unlink(missing_ok=True)
    # A job that was ended may have left a part of a line.
    found = [json.loads(line) for line in written.splitlines(True) if line.endswith('\n')]
    if code == 0 and found:
      return found, ''
    if code is None:
      return found, 'its time was over'
    oom = next((line for line in text.splitlines() if any(word in line for word in OOM)), '')
    last = oom or next((line for line in reversed(text.splitlines()) if line.strip()), '')
    return found, f'{"out of memory: " if oom else ""}{last.strip()[:200] or f"exit {code}"}'

  def limit(self, name: str) -> float:
    return min(LIMITS.get(name.split()[0], 100), self.left)

  def sanity(self) -> bool:
    """The checks; whether there is a device to go on with."""
    limit = self.limit('sanity')
    beside = self.begin('cpu', limit, JAX_PLATFORMS='cpu')
    checks, why = self.finish(*self.begin('sanity', limit))
    reference, cpu_why = self.finish(*beside)
    expected = {row['check'].removeprefix('cpu '): row['losses'] for row in reference}
    for row in checks:
      if 'losses' in row:
        there = expected.get(row['check'].removeprefix('losses '), [math.nan])
        off = max(abs(a / b - 1) for a, b in zip(row['losses'], there))
        row |= {'ok': row['ok'] and off < 1e-3, 'cpu_losses': there,
                'text': f'five steps in float32 within {off:.1e} of CPU; {row["text"]}'}
    for name, said in (('sanity', why), ('cpu', cpu_why)):
      if said:
        checks.append({'check': name, 'ok': False, 'text': said})
    self.results['sanity'] = checks
    self.results['device'] = next((r for r in checks if r['check'] == 'device'), {})
    self.save()
    for row in checks:
      word = {True: 'ok', False: 'FAILED', None: '-'}[row['ok']]
      print(f'  {row["check"]:<16} {word:<7} {row["text"]}', flush=True)
    return bool(self.results['device'].get('ok'))

  def size(self, name: str):
    """A size, smaller again where memory did not suffice."""
    rung, tried = 0, []
    while True:
      if self.left < LEAST:
        return self.add([], name, 'dense', f'{self.left:.0f} s left' + (
            f' after {"; ".join(tried)}' if tried else ''), 'failed' if tried else 'skipped')
      rows, why = self.finish(*self.begin(name, self.limit(name), f'--rung={rung}'))
      self.add(rows, name, 'dense', why)
      if not why.startswith('out of memory'):
        return
      used = max([row['rung'] for row in rows if 'rung' in row] or [rung])
      if used + 1 >= len(accelerator_jobs.rungs(accelerator_jobs.TINY)):
        return
      rung, tried = used + 1, [*tried, why]

  def torch(self, name: str):
    """torch.compile at dense's shape; half the rows where memory did not suffice."""
    dense = next((r for r in self.results['rows'] if (r['size'], r['arm']) == (name, 'dense')), {})
    batch = dense.get('batch', 0)
    if dense.get('status') != 'measured':
      return self.add([], name, 'torch', 'dense was not measured', 'skipped')
    while self.left >= LEAST:
      rows, why = self.finish(*self.begin(
          f'torch {name}', self.limit('torch'), f'--batch={batch}',
          XLA_PYTHON_CLIENT_PREALLOCATE='false'))
      for row in rows if batch == dense['batch'] else ():
        ours, theirs = dense['first_loss'], row.get('first_loss', dense['first_loss'])
        if not abs(ours - theirs) < 0.05:  # then two different models are compared
          row |= {'status': 'failed', 'why': f'first loss {theirs:.4f}, and {ours:.4f} here'}
      self.add(rows, name, 'torch', why)
      if not why.startswith('out of memory') or batch < 4:
        return
      batch //= 2
    self.add([], name, 'torch', f'{self.left:.0f} s left', 'skipped')

  def add(self, rows, size: str, arm: str, why: str, status='failed'):
    """Takes a job's rows in: the last of each arm; one that was measured stays measured."""
    kept = {(r['size'], r['arm']): r for r in self.results['rows']}
    last = {(r['size'], r['arm']): r for r in rows} or {
        (size, arm): {'size': size, 'arm': arm, 'status': status, 'why': why}}
    for key, row in last.items():
      if row['status'] == 'failed' and why:
        row['why'] = f'{row["why"]}: {why}' if row['why'] != why else why
      if row['status'] == 'measured' or kept.get(key, {}).get('status') != 'measured':
        kept[key] = row
        print(line(row), flush=True)
    self.results['rows'] = list(kept.values())
    self.save()

  def save(self):
    """Writes results.json, whole or not at all."""
    part = self.out / 'results.json.part'
    part.write_text(json.dumps(self.results, indent=2) + '\n')
    part.replace(self.out / 'results.json')


def line(row: dict) -> str:
  """A row of the table."""
  head = f'{row["size"]:<5} {row["arm"]:<6}'
  if row['status'] != 'measured':
    return f'{head} {row["status"]}: {row["why"]}'
  rate, mfu = row['tokens_per_second'], row['mfu']
  keys = '' if row['arm'] == 'torch' else f', remat {row["remat"]}, loss_block {row["loss_block"]}'
  spread = f'{rate["median"]:.0f} [{rate["min"]:.0f} … {rate["max"]:.0f}]'
  return (f'{head} {spread:>26} {f"{mfu:.3f}" if mfu else "-":>6} '
          f'{row["bytes"] / 2**30:>7.2f} {row["compile_seconds"]:>7.1f}  '
          f'{row["batch"]} rows{keys}, {row["attention"]}')


def goals(results: dict) -> list[dict]:
  """Each goal with what was found: met, missed or not measured."""
  rows = {(r['size'], r['arm']): r for r in results['rows']
          if r['status'] == 'measured' and not results['tiny']}
  kind = results['device'].get('kind', '')
  known = 'H100' in kind or 'H200' in kind
  median = lambda row, key: (row.get(key) or {}).get('median')
  wanted = [(f'{s} dense, tokens/s', median(rows.get((s, 'dense'), {}), 'tokens_per_second'),
             bench.GOALS[s][1]) for s in SIZES]
  wanted.append(('125m DEMix over dense', median(rows.get(('125m', 'demix'), {}), 'over_dense'),
                 DEMIX_GOAL))
  return [{'goal': name, 'wanted': goal, 'found': found, 'verdict': 'not measured'
           if found is None or not known else 'met' if found >= goal else 'missed'}
          for name, found, goal in wanted]


def table(results: dict) -> str:
  """What is printed at the end."""
  device = results['device']
  out = [f'{device.get("kind", "no device")}, jax {device.get("jax", "-")}, bfloat16 with float32 '
         f'parameters, random tokens{", TINY sizes" if results["tiny"] else ""}']
  bad = [r['check'] for r in results['sanity'] if r['ok'] is False]
  out.append(f'sanity: {"FAILED: " + ", ".join(bad) if bad else "ok"}')
  if not device.get('peak_flops_per_second'):
    out.append('MFU left out: no data sheet of this device in SHEETS of benchmarks/bench.py')
  out.append(f'\n{"size":<5} {"arm":<6} {"tokens/s":>26} {"MFU":>6} {"GiB":>7} {"compile":>7}')
  out += map(line, results['rows'])
  rate = {(r['size'], r['arm']): r['tokens_per_second']['median'] for r in results['rows']
          if r['status'] == 'measured'}
  out += [f'{s}: dense over torch.compile {rate[s, "dense"] / rate[s, "torch"]:.2f}'
          for s in SIZES if (s, 'torch') in rate]
  out.append('\ngoals, for one H100 or H200:')
  for g in results['goals']:
    found = '-' if g['found'] is None else f'{g["found"]:.2f}' if g['wanted'] < 2 else (
        f'{g["found"]:.0f}')
    out.append(f'{g["goal"]:<24} {g["wanted"]:>8g} {found:>8}  {g["verdict"]}')
  return '\n'.join(out)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--minutes', type=float, default=8, help='for everything')
  parser.add_argument('--sizes', default=','.join(SIZES), help=', '.join(SIZES))
  parser.add_argument('--torch-python', default='', help='a Python that has torch')
  parser.add_argument('--set', default='', help='keys of execution, as scan=False')
  parser.add_argument('--out', default=str(measure.ROOT / 'runs/accelerator'), help='folder')
  parser.add_argument('--tiny', action='store_true', help='tiny models, on CPU too: a rehearsal')
  parser.add_argument('--spent', type=float, default=0, help=argparse.SUPPRESS)  # seconds, before
  parser.add_argument('--seconds', type=float, default=8, help='of timing, for each arm')
  for name, kind in (('job', str), ('rows', str), ('limit', float), ('rung', int), ('batch', int)):
    parser.add_argument(f'--{name}', type=kind, default=kind(), help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.job:
    return accelerator_jobs.job(args)
  names = args.sizes.split(',')
  for name in names:
    if name not in SIZES:
      parser.error(f'no size {name!r}: {", ".join(SIZES)}')
  if not args.minutes > 0:
    parser.error(f'--minutes={args.minutes:g}: more than 0')
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a job that runs is ended
  runner = Runner(args)
  if runner.sanity():
    for name in names:
      runner.size(name)
    for name in names if args.torch_python else ():
      runner.torch(name)
  else:
    print('no accelerator that JAX sees: no size is measured (--tiny rehearses on CPU)')
  runner.results['goals'] = goals(runner.results)
  runner.save()
  text = table(runner.results)
  (runner.out / 'table.txt').write_text(text + '\n')
  print(f'\n{text}\n\nall of it: {runner.out}/results.json')
  bad = [r for r in runner.results['sanity'] if r['ok'] is False]
  return int(bool(bad) or any(r['status'] == 'failed' for r in runner.results['rows']))


if __name__ == '__main__':
  sys.exit(main())
