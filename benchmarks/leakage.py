"""How fast evaluation text is looked for in train text, and how much memory that takes.

  python benchmarks/leakage.py [--megabytes=64] [--planted=0.01] [--tokenizer=bpe]

Makes a token store of generated text (benchmarks/prepare.py's, train, and a tenth as much test text
of which a share is planted in the train text), then compares them on one core: MB of text a second
(train and test), the peak memory of the process, the share that was found. Then vocabulary overlap.
"""

import argparse
import os
import resource
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import prepare

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout, without installing


def write(folder: Path, size: int, planted: float):
  """law/train and law/test: words of their own in every test document, so that only what is planted
  is shared."""
  (folder / 'law').mkdir(parents=True)
  prepare.generate(folder / 'law/train.jsonl', Path(sysconfig.get_path('stdlib')), size)
  rng, written, count = np.random.default_rng(0), 0, 0
  with open(folder / 'law/test.jsonl', 'wb') as test, open(folder / 'law/train.jsonl', 'ab') as f:
    while written < size // 10:
      line = orjson.dumps({'text': ' '.join(f'word{x}' for x in rng.integers(0, 10**6, 200))})
      test.write(line + b'\n')
      if count % round(1 / planted) == 0:
        f.write(line + b'\n')
      written, count = written + len(line), count + 1


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--megabytes', type=int, default=64)
  parser.add_argument('--planted', type=float, default=0.01)
  parser.add_argument('--tokenizer', default='bpe', choices=('bpe', 'bytes'))
  args = parser.parse_args()
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  os.environ['RAYON_NUM_THREADS'] = '1'
  from demix.data.corpus.prepare import PrepareConfig
  from demix.data.corpus.prepare import prepare as make
  from demix.data.overlap import leakage, vocabulary
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    write(folder / 'in', args.megabytes * 10**6, args.planted)
    if os.fork() == 0:  # so that the peak below is not that of making the store
      config = PrepareConfig(tokenizer=args.tokenizer)
      make(folder / 'in', folder / 'out', config, lambda line: None)
      os._exit(0)
    os.wait()
    from demix.data.tokens.store import TokenStore
    store = TokenStore.open(folder / 'out')
    entries = store.card['domains']['law']['splits'].values()
    size, tokens = (sum(e[k] for e in entries) for k in ('bytes', 'tokens'))
    for name, call in (('leakage', leakage.leakage), ('vocabulary', vocabulary.vocabulary)):
      wall, cpu = time.perf_counter(), time.process_time()
      found = call(store)
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      print(f'{name}: {size / 1e6:.0f} MB of text, {tokens / 1e6:.1f} M {args.tokenizer} ids in '
            f'{wall:.1f} s wall, {cpu:.1f} s CPU: {size / 1e6 / wall:.1f} MB/s, '
            f'{size / 1e6 / cpu:.1f} MB per CPU second; peak memory of the process '
            f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB', flush=True)
      if name == 'leakage':
        [pair] = found['overlap']
        print(f'  planted {args.planted:.2%}, found {pair["runs"]:.3%} of runs, '
              f'{pair["documents"]:.3%} of documents; sampled {found["sampled"]:.3g}')


if __name__ == '__main__':
  main()
