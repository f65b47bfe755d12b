"""How fast `prepare` is on one core, and how much memory it takes.

  python benchmarks/prepare.py [--full] [--megabytes=64] [--repeats=7] [--texts=FOLDER]
      [--format=jsonl|gz|zst|text|parquet|array_record|huggingface|tfds|tokens|seqio]
  python benchmarks/prepare.py --corpus=FOLDER

Prints the rate of byte-level BPE (beside that of the library given whole documents, in turns), then
runs `python -m demix prepare` on one generated file and prints its wall time, CPU time and peak
memory. --full: a file of 1 GB. --format: what holds the text (not jsonl: by bytes as tokens, so
that reading is what is measured; without the rate of BPE). --texts: files to take text from (*.py
and *.txt, in all folders below); the standard library of this Python by default. seqio needs an
environment with requirements-seqio.txt (.venv-seqio, which launch/test.sh --long makes).
--corpus: no generated file, but a folder of domains, say of .jsonl.gz, by BPE and with all steps.
"""

import argparse
import gzip
import itertools
import os
import pickle
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout, without installing


FORMATS = ('jsonl', 'gz', 'zst', 'text', 'parquet', 'array_record', 'huggingface', 'tfds', 'tokens',
           'seqio')
TASK = '''import functools, seqio, tensorflow as tf
seqio.TaskRegistry.add(
    'generated', metric_fns=[], source=seqio.TextLineDataSource({{'train': {!r}}}),
    preprocessors=[lambda lines: lines.map(lambda line: {{'targets': line}})],
    output_features={{'targets': seqio.Feature(seqio.PassThroughVocabulary(size=1), add_eos=False,
                                             dtype=tf.string, rank=0)}})
'''
CONFIG = '''from ml_collections import ConfigDict
from demix.data.corpus.prepare import PrepareConfig
from demix.settings import to_dict
get_config = lambda: ConfigDict(to_dict(PrepareConfig(corpus={!r})))
'''


def texts(folder: Path):
  """Documents of at most 20 kB from the text files below `folder`, in one order everywhere."""
  for path in sorted(p for s in ('*.py', '*.txt') for p in folder.rglob(s)
                     if 'site-packages' not in p.parts):
    text = path.read_text('utf-8', 'ignore')
    for start in range(0, len(text), 20_000):
      yield text[start:start + 20_000]


def documents(folder: Path, size: int):
  """Texts of `size` bytes together; each round over the texts changes them a little, so that none
  is there twice."""
  written, turn = 0, 0
  while written < size:
    for text in texts(folder):
      text = f'{turn} {text.replace("self", f"self{turn}")}' if turn else text
      yield text
      written += len(text.encode())
      if written >= size:
        break
    turn += 1


def generate(file: Path, folder: Path, size: int) -> int:
  """Writes JSON Lines of `size` bytes of text. Returns the bytes written."""
  written = 0
  with open(file, 'wb') as f:
    for text in documents(folder, size):
      f.write(orjson.dumps({'text': text}) + b'\n')
      written += len(text.encode())
  return written


def generate_as(name: str, target: Path, folder: Path, size: int) -> dict:
  """Writes text of `size` bytes in a format; returns the entry of config.corpus that names it."""
  rows = ({'text': t} for t in documents(folder, size))
  entry = {'name': 'generated', 'source': name, 'path': str(target / 'train')}
  if name in ('gz', 'zst'):
    import zstandard
    path = target / f'train.jsonl.{name}'
    with open(path, 'wb') as f, (gzip.GzipFile(fileobj=f, mode='wb') if name == 'gz' else
                                 zstandard.ZstdCompressor().stream_writer(f)) as out:
      for row in rows:
        out.write(orjson.dumps(row) + b'\n')
    return entry | {'source': 'jsonl', 'path': str(path)}
  if name == 'text':
    (target / 'train').mkdir()
    for i, row in enumerate(rows):
      (target / f'train/{i}.txt').write_text(row['text'], 'utf-8')
    entry['path'] = str(target / '{split}/*.txt')
  elif name == 'seqio':
    with open(target / 'lines.txt', 'wb') as f:
      for row in rows:
        f.write(' '.join(row['text'].split()).encode() + b'\n')
    (target / 'generated_task.py').write_text(TASK.format(str(target / 'lines.txt')))
    return entry | {'path': 'generated', 'module': 'generated_task'}
  elif name == 'parquet':
    import pyarrow
    from pyarrow import parquet
    schema = pyarrow.schema({'text': pyarrow.string()})
    with parquet.ParquetWriter(target / 'train', schema) as out:
      while batch := list(itertools.islice(rows, 5000)):  # a row group: tens of MB
        out.write_table(pyarrow.Table.from_pylist(batch, schema))
  elif name == 'array_record':
    from array_record.python.array_record_module import ArrayRecordWriter
    out = ArrayRecordWriter(str(target / 'train'), 'group_size:1')
    for row in rows:
      out.write(orjson.dumps(row))
    out.close()
  elif name == 'tokens':
    import numpy as np
    with open(target / 'train', 'wb') as f:
      for row in rows:
        f.write(np.frombuffer(row['text'].encode(), np.uint8).astype('<u2'))
        f.write(np.array([256], '<u2'))
  elif name == 'huggingface':
    import datasets
    made = datasets.Dataset.from_generator(
        lambda: ({'text': t} for t in documents(folder, size)), cache_dir=str(target / 'cache'))
    made.save_to_disk(target / 'train', max_shard_size='2GB')
  elif name == 'tfds':
    import tensorflow_datasets as tfds

    class Generated(tfds.core.GeneratorBasedBuilder):
      VERSION, pkg_dir_path = tfds.core.Version('1.0.0'), None

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {'text': tfds.features.Text()}))

      def _split_generators(self, manager):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        yield from enumerate(rows)
    builder = Generated(data_dir=str(target), file_format='array_record')
    builder.download_and_prepare()
    return entry | {'path': str(builder.data_dir)}
  return entry


def spread(values):
  return f'median {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def encoding(folder: Path, repeats: int):
  """Prints rates of encoding 8 MB of documents: ours, and the library's with whole documents."""
  from demix.data.tokens.tokenizer import BpeTokenizer
  sample, size = [], 0
  for text in texts(folder):
    sample.append(text)
    size += len(text.encode())
    if size > 8e6:
      break
  started = time.perf_counter()
  made = BpeTokenizer.train(sample, 8192)
  print(f'training: {made.vocab_size} ids from {size / 1e6:.1f} MB in '
        f'{time.perf_counter() - started:.1f} s')
  library = lambda: made._engine.encode_batch_fast(sample, add_special_tokens=False)
  rates, cpu, ratios, tokens = [], [], [], 0
  for _ in range(repeats):
    times, fresh = [], pickle.loads(pickle.dumps(made))  # remembers no word yet
    for call in (lambda fresh=fresh: fresh.encode(sample), library):
      wall, process = time.perf_counter(), time.process_time()
      out = call()
      times.append((time.perf_counter() - wall, time.process_time() - process))
      tokens = tokens or sum(map(len, out))
      del out
    rates.append(size / 1e6 / times[0][0])
    cpu.append(size / 1e6 / times[0][1])
    ratios.append(times[1][1] / times[0][1])
  print(f'encoding, MB/s of wall time:  {spread(rates)}')
  print(f'encoding, MB/s of CPU time:   {spread(cpu)}, '
        f'{statistics.median(cpu) * tokens / size:.2f} M tokens/s')
  print(f'ours / library, of CPU time:  {spread(ratios)} over {repeats} turns')


def preparing(folder: Path, size: int, name: str):
  """Prints what a whole prepare of one generated file in a format takes."""
  with tempfile.TemporaryDirectory() as temporary:
    temporary = Path(temporary)
    (temporary / 'in/generated').mkdir(parents=True)
    command = [sys.executable, '-m', 'demix', 'prepare', f'--out={temporary / "out"}']
    if name == 'jsonl':
      written = generate(temporary / 'in/generated/train.jsonl', folder, size)
      command += [f'--input={temporary / "in"}', '--config.sample_bytes=33554432']
    else:
      file, written = temporary / 'config.py', size
      # A process of its own, as below: writers of some formats hold all of it.
      if not (child := os.fork()):
        file.write_text(CONFIG.format((generate_as(name, temporary / 'in', folder, size),)))
        os._exit(0)
      assert os.waitpid(child, 0)[1] == 0
      command += [f'--config={file}', '--config.tokenizer=bytes']
    measure(command, temporary / 'out', written, str(temporary / 'in'))
    card = orjson.loads((temporary / 'out/card.json').read_bytes())
    print('  ', card['domains']['generated']['splits']['train'])


def corpus(folder: Path):
  """Prints what prepare of a folder of domains takes."""
  with tempfile.TemporaryDirectory() as temporary:
    out = Path(temporary) / 'out'
    measure([sys.executable, '-m', 'demix', 'prepare', f'--out={out}',
             f'--input={folder.resolve()}'], out)
    print('   fingerprint', orjson.loads((out / 'card.json').read_bytes())['fingerprint'])


def measure(command, out: Path, written: int = 0, modules: str = ''):
  """Runs a prepare twice; prints time and memory for `written` bytes, or what the card counts."""
  for label in ('first time', 'again'):
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               env=os.environ | {'PYTHONPATH': modules})
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    card = orjson.loads((out / 'card.json').read_bytes())
    size = written or sum(e['bytes'] for d in card['domains'].values()
                          for e in d['splits'].values())
    cpu = used.ru_utime + used.ru_stime
    print(f'prepare, {label}: {size / 1e6:.0f} MB of text in {wall:.1f} s wall, {cpu:.1f} s '
          f'CPU: {size / 1e6 / wall:.2f} MB/s, {size / 1e6 / cpu:.2f} MB per CPU second; '
          f'peak memory {used.ru_maxrss / 1e3:.0f} MB')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--full', action='store_true', help='a file of 1 GB')
  parser.add_argument('--megabytes', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--texts', type=Path, default=Path(sysconfig.get_path('stdlib')))
  parser.add_argument('--format', choices=FORMATS, default='jsonl')
  parser.add_argument('--corpus', type=Path, help='a folder of domains to prepare instead')
  args = parser.parse_args()
  core = min(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {core})  # children too: everything below is on one core
  os.environ['RAYON_NUM_THREADS'] = '1'
  if args.corpus:
    corpus(args.corpus)
    return
  # A process of its own: the peak memory of a child starts with that of its parent.
  if args.format == 'jsonl' and os.fork() == 0:
    encoding(args.texts, args.repeats)
    sys.stdout.flush()
    os._exit(0)
  if args.format == 'jsonl':
    os.wait()
  preparing(args.texts, 10**9 if args.full else args.megabytes * 10**6, args.format)


if __name__ == '__main__':
  main()
