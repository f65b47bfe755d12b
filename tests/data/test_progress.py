"""Progress of preparing: what is done comes to the total, however much of it is read."""

import gzip

import pytest
import zstandard
from corpus_cases import document, jsonl

from demix.data.clusters.discover import discover
from demix.data.clusters.fit import DiscoverConfig
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.runtime import progress

QUIET = lambda line: None
TEXTS = [document(i) for i in range(300)]


@pytest.fixture
def shown(monkeypatch):
  """[(label, [what was done …], total)] of every Progress that was closed."""
  out, close, update = [], progress.Progress.close, progress.Progress.update
  def closed(self, *args):
    out.append((self.label, self.__dict__.get('steps', []), self.total))
    close(self, *args)
  def updated(self, done, *args):
    self.__dict__.setdefault('steps', []).append(done)
    update(self, done, *args)
  monkeypatch.setattr(progress.Progress, 'close', closed)
  monkeypatch.setattr(progress.Progress, 'update', updated)
  return out


def check(shown, *labels):
  assert [label for label, _, _ in shown if label in labels] == list(labels)
  for label, steps, total in shown:
    assert steps == sorted(steps) and (steps[-1] if steps else 0) == total, label
  shown.clear()


LAYOUTS = {
    'plain': lambda d: (d / 'train.jsonl').write_bytes(jsonl(TEXTS)),
    'gz': lambda d: (d / 'train.jsonl.gz').write_bytes(gzip.compress(jsonl(TEXTS))),
    'zst': lambda d: (d / 'train.jsonl.zst').write_bytes(
        zstandard.ZstdCompressor().compress(jsonl(TEXTS))),
    'txt': lambda d: [(d / f'{i}.txt').write_text(t * (1 + 99 * (i == 3)))
                      for i, t in enumerate(TEXTS[:30])],
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('most', [0, 500])
def test_what_is_read_comes_to_the_total(tmp_path, shown, layout, most):
  for name in 'ab':
    (tmp_path / 'in' / name).mkdir(parents=True)
    LAYOUTS[layout](tmp_path / 'in' / name)
    (tmp_path / 'in' / name / 'valid.jsonl').write_bytes(jsonl(TEXTS[:9])) \
        if layout != 'txt' else None
    (tmp_path / 'in' / name / 'notes.md').write_text('not read' * 99)
    (tmp_path / 'in' / name / '.hidden').write_text('nor this')
  config = PrepareConfig(vocab_size=300, max_bytes=most, max_record_bytes=5000,
                         on_bad_record='skip')
  prepare(tmp_path / 'in', tmp_path / 's', config, QUIET)
  shown[:] = [s for s in shown if s[0] != 'training the tokenizer']  # its total is not known
  check(shown, 'reading', 'sampling for the tokenizer', 'tokenizing',
        'comparing evaluation with train text')


def test_discovering_comes_to_the_total(tmp_path, shown):
  for name in 'ab':
    (tmp_path / 'in' / name).mkdir(parents=True)
    LAYOUTS['gz'](tmp_path / 'in' / name)
  prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(tokenizer='bytes'), QUIET)
  check(shown)
  discover(tmp_path / 's', tmp_path / 'c', DiscoverConfig(clusters=2, block=64, dimensions=4),
           QUIET)
  check(shown, 'sampling documents', 'words of the sample', 'balanced k-means', 'assigning')


@pytest.mark.parametrize('kind', ['parquet', 'heldout', 'two'])
def test_sources_of_a_config_come_to_the_total(tmp_path, shown, kind):
  folder = tmp_path / 'in'
  folder.mkdir()
  if kind == 'parquet':
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'text': TEXTS}), folder / 'train.parquet')
    entries = ({'name': 'a', 'source': 'parquet', 'path': 'train.parquet'},)
  else:
    (folder / 'train.jsonl').write_bytes(jsonl(TEXTS))
    entries = ({'name': 'a', 'path': 'train.jsonl', 'heldout': 0.1 * (kind == 'heldout')},) * (
        1 + (kind == 'two'))
  for most in (0, 500):
    prepare(folder, tmp_path / f'{kind}{most}', PrepareConfig(
        tokenizer='bytes', corpus=entries, max_bytes=most), QUIET)
    check(shown, 'reading', 'tokenizing')
