"""Clusters of many documents: documents/s and memory of `prepare --discover`, on planted topics.

  .venv/bin/python benchmarks/discover.py [--documents=1000000] [--clusters=8]

Memory is what the process holds of its own (RssAnon): token stores are read through the page cache.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout

from demix.data.clusters.discover import discover
from demix.data.clusters.fit import DiscoverConfig
from demix.data.corpus.prepare import PrepareConfig, prepare


def write(folder: Path, documents: int, topics: int):
  """Short documents, one topic after the other, each with 3,000 of 30,000 words."""
  draw = random.Random(0)
  word = lambda: ''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=draw.randint(3, 9)))
  words = [word() for _ in range(30_000)]
  about = [draw.sample(words, 3000) for _ in range(topics)]
  folder.mkdir(parents=True)
  with open(folder / 'train.jsonl', 'w') as f:
    for i in range(documents):
      f.write(json.dumps({'text': ' '.join(draw.choices(about[i % topics], k=15))}) + '\n')


def held() -> int:
  """Bytes of memory that this process holds of its own."""
  lines = Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) << 10 for line in lines if line.startswith('RssAnon'))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--documents', type=int, default=1_000_000)
  parser.add_argument('--clusters', type=int, default=8)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folder, peak, done = Path(folder), [0], threading.Event()
    write(folder / 'in/all', given.documents, given.clusters)
    prepare(folder / 'in', folder / 'tokens', PrepareConfig(tokenizer='bytes'), lambda line: None)

    def watch():
      while not done.wait(0.2):
        peak[0] = max(peak[0], held())

    watching = threading.Thread(target=watch)
    watching.start()
    wall, cpu = time.monotonic(), time.process_time()
    try:
      store = discover(folder / 'tokens', folder / 'clusters',
                       DiscoverConfig(clusters=given.clusters), print)
    finally:
      done.set()
      watching.join()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    size = sum(store.card['domains'][d]['splits']['train']['bytes'] for d in store.domains)
  print(f'\n{given.documents:,} documents, {size / 1e6:.1f} MB: {wall:.1f} s wall, {cpu:.1f} s '
        f'CPU, {given.documents / cpu:,.0f} documents/s and {size / cpu / 1e6:.2f} MB/s of CPU, '
        f'{peak[0] / 1e6:.0f} MB peak')


if __name__ == '__main__':
  main()
