"""The quick start's arms over one grid of batch and rate, on valid text.

  python benchmarks/quickstart_grid.py --corpus=W/corpus --workdir=DIR [--batches=32,64]
      [--rates=8e-3,1.6e-2,3.2e-2] [--arms=dense,demix,forest] [--seeds=0] [--set model.d_model=64]

Every cell is a run of as many tokens: fewer sequences an update are more updates. A cell is the
perplexity of valid text (256 sequences of each domain, the expert given), geometric mean over the
domains. The same DIR goes on where it was. Run from the repository root.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLAN = """from ml_collections import ConfigDict

from configs.forest_quickstart import plan
from configs.quickstart import recipe
from demix.config import config_dict


def get_config(arg=''):
  base = config_dict(recipe('forest', {rows}, {rate})).to_dict() | dict(seed={seed})
  for name, value in {changes}.items():
    group, key = name.split('.')
    base[group][key] = value
  return ConfigDict(plan(base))
"""


def demix(*arguments):
  done = subprocess.run([sys.executable, '-m', 'demix', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.STDOUT,
                        stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(done.stdout)


def config_file(folder: Path, arm: str, rows: int, rate: float, seed: int, changes: dict) -> Path:
  """A config of one cell."""
  text = PLAN.format(rows=rows, rate=rate, seed=seed, changes=changes)
  if arm != 'forest':
    text = text.replace("recipe('forest'", f"recipe('{arm}'").replace('plan(base)', 'base')
  path = folder / 'config.py'
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def nll(run: Path) -> dict:
  """{domain: nats a token of valid text at the end of a run}."""
  rows = [json.loads(line) for line in open(run / 'metrics.jsonl')]
  last = [row for row in rows if 'eval/mean/nll' in row][-1]
  return {k.split('/')[1]: v for k, v in last.items()
          if k.startswith('eval/') and k.endswith('/nll') and '/mean/' not in k}


def cell(folder: Path, corpus: str, arm: str, *setting) -> dict:
  """{domain: nats a token}; trains what is not there."""
  run, done = folder / 'run', folder / 'nll.json'
  if not done.is_file():
    config = config_file(folder, arm, *setting)
    if arm == 'forest':
      if not (run / 'forest.json').is_file():
        demix('forest', 'plan', f'--config={config}', f'--forest={run}', f'--data={corpus}')
      demix('forest', 'run', f'--forest={run}', '--together', '--limit=32')
      found = {k: v for expert in sorted((run / 'experts').iterdir())
               for k, v in nll(expert).items() if k == expert.name}
    else:
      demix('train', f'--config={config}', f'--config.data.path={corpus}', f'--workdir={run}')
      found = nll(run)
    done.write_text(json.dumps(found))
  return json.loads(done.read_text())


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, value in (('corpus', ''), ('workdir', ''), ('batches', '32,64'),
                      ('rates', '8e-3,1.6e-2,3.2e-2'), ('arms', 'dense,demix,forest'),
                      ('seeds', '0')):
    parser.add_argument(f'--{name}', default=value)
  parser.add_argument('--set', action='append', default=[], metavar='GROUP.KEY=NUMBER')
  args = parser.parse_args()
  changes = {k: float(v) if '.' in v or 'e' in v else int(v)
             for k, v in (item.split('=') for item in args.set)}
  rates = args.rates.split(',')
  print(f'{"arm":8} {"batch":>5} {"seed":>4}', *(f'{rate:>9}' for rate in rates))
  for arm in args.arms.split(','):
    for rows in map(int, args.batches.split(',')):
      for seed in map(int, args.seeds.split(',')):
        print(f'{arm:8} {rows:5} {seed:4}', end='', flush=True)
        for rate in rates:
          name = '_'.join([arm, str(rows), rate, str(seed), *args.set])
          found = cell(Path(args.workdir).resolve() / name, str(Path(args.corpus).resolve()), arm,
                       rows, float(rate), seed, changes)
          print(f'{math.exp(sum(found.values()) / len(found)):10.3f}', end='', flush=True)
        print(flush=True)


if __name__ == '__main__':
  main()
