"""Tokens/s of the loaders, for each sampling and packing, against what the 1M model trains at.

  python benchmarks/loader.py [--repeats=7] [--batches=200] [--trains=TOKENS_PER_S]
                              [--processes=1] [--json=FILE]

The store is made on the spot: 8 domains of random words, byte-level BPE of 2048 ids, documents of
20 to 4000 characters. A row of the table is Batches.iterate as the training loop calls it (one
thread reads ahead), T 128 and batch 32. What the 1M dense model trains at is measured in the same
rounds, unless --trains says it. The goal is ten times that. With --processes=N each row is the
rate of one process of N, which reads its share of the rows only (the first 1/N of them, as where
`data` or `expert` splits them over N processes): tokens of that share a second.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import measure
import throughput


def write_corpus(folder: Path, characters: int = 400_000):
  """8 domains of documents of random words: each its own words, small ones of half the size."""
  import numpy as np
  import orjson
  for index, name in enumerate(measure.EXPERTS):
    rng = np.random.default_rng(index)
    letters = rng.permutation(list('abcdefghijklmnopqrstuvwxyz'))
    words = np.array([''.join(rng.choice(letters[:16], rng.integers(2, 9))) for _ in range(2000)])
    (folder / name).mkdir(parents=True)
    for split, share in (('train', 1 - index % 2 / 2), ('valid', 0.1), ('test', 0.1)):
      with open(folder / name / f'{split}.jsonl', 'wb') as file:
        written = 0
        while written < share * characters:
          count = int(np.exp(rng.uniform(np.log(4), np.log(700))))
          text = ' '.join(words[np.minimum(rng.zipf(1.3, count), len(words)) - 1])
          file.write(orjson.dumps({'text': text}) + b'\n')
          written += len(text)


def make_store(folder: Path):
  """An open token store of such a corpus, below `folder`."""
  from demix.data.corpus.prepare import PrepareConfig, prepare
  write_corpus(folder / 'corpus')
  return prepare(folder / 'corpus', folder / 'store', PrepareConfig(vocab_size=2048),
                 say=lambda text: None)


class Loader:
  """`batches` batches in a row out of one kind of loader."""

  def __init__(self, store, size, sampling, packing, batches, processes=1):
    from demix.data.sampling.batches import Batches, DataConfig
    weights = {name: 1.0 + i for i, name in enumerate(measure.EXPERTS)}
    config = DataConfig(
        domains=measure.EXPERTS, sampling=sampling, packing=packing, batch_size=size.batch,
        sequence_length=size.length, weights=weights if sampling == 'weights' else {})
    config.check()
    rows = range(size.batch // processes) if processes > 1 else None
    self.count, self.iterator = batches, Batches(store, config, 0, rows=rows).iterate(0)

  def __call__(self):
    for _ in range(self.count):
      next(self.iterator)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--batches', type=int, default=200, help='timed as one')
  parser.add_argument('--trains', type=float, default=0, help='tokens/s of the model; 0: measure')
  parser.add_argument('--processes', type=int, default=1, help='that share the rows of a batch')
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  if args.processes < 1 or measure.SIZES['1m'].batch % args.processes:
    parser.error(f'--processes={args.processes} does not divide {measure.SIZES["1m"].batch} rows')
  measure.restart()
  size = measure.SIZES['1m']
  print(f'T {size.length}, batch {size.batch}, 8 domains, {args.repeats} rounds of {args.batches} '
        f'batches, one process of {args.processes}\n{measure.machine()}', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    store = make_store(Path(folder))
    calls = {f'{sampling}, {packing}': Loader(
        store, size, sampling, packing, args.batches, args.processes)
             for packing in ('continuous', 'document')
             for sampling in ('balanced', 'proportional', 'weights')}
    names = list(calls)
    if not args.trains:
      calls['train step'] = throughput.Arm('dense', size)
    times = measure.interleave(calls, args.repeats, {'train step': 2})
  figures = {'command': sys.argv, 'machine': measure.machine(), 'loaders': {}}
  step = times.get('train step') or [(size.tokens / args.trains,) * 2] * args.repeats
  print(f'the 1M model trains at {measure.spread([size.tokens / t[0] for t in step], ".0f")} '
        f'tokens/s, {measure.spread([size.tokens / t[1] for t in step], ".0f")} per CPU second')
  figures['train_tokens_per_second'] = measure.summary(size.tokens / t[0] for t in step)
  for name in names:
    tokens = args.batches * size.tokens // args.processes
    rates, cpu = ([tokens / t[i] for t in times[name]] for i in (0, 1))
    ratios = [[args.batches / args.processes * s[i] / t[i] for s, t in zip(step, times[name])]
              for i in (0, 1)]
    figures['loaders'][name] = {
        'tokens_per_second': measure.summary(rates), 'per_cpu_second': measure.summary(cpu),
        'over_training': measure.summary(ratios[0]),
        'over_training_cpu': measure.summary(ratios[1])}
    print(f'{name:26s} {measure.spread([r / 1e3 for r in rates], ".0f")} k tokens/s, '
          f'{measure.spread([c / 1e3 for c in cpu], ".0f")} k per CPU second; over training: '
          f'{measure.spread(ratios[0], ".0f")} wall, {measure.spread(ratios[1], ".0f")} CPU')
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
