"""One small corpus in every format that `prepare` reads: write(format, folder, documents) gives
the entry of a config that names it."""

import json
from pathlib import Path

import numpy as np

from demix.data.tokens.tokenizer import ByteTokenizer

SPLITS = ('train', 'valid', 'test')


def folder_of(folder: Path) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def rows(texts) -> list[dict]:
  """Records of texts, or of supervised (prompt, completion) pairs."""
  return [{'prompt': t[0], 'completion': t[1]} if isinstance(t, tuple) else {'text': t}
          for t in texts]


def jsonl(folder, documents, suffix=''):
  import gzip

  import zstandard
  compress = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}[suffix]
  for split, texts in documents.items():
    half = len(texts) // 2  # two shards
    for i, part in enumerate((texts[:half], texts[half:])):
      lines = ''.join(json.dumps(r) + '\n' for r in rows(part))
      (folder / f'{split}-{i}.jsonl{suffix}').write_bytes(compress(lines.encode()))
  return {'source': 'jsonl', 'path': f'{folder}/{{split}}-*.jsonl{suffix}'}


def text(folder, documents):
  for split, texts in documents.items():
    for i, t in enumerate(texts):
      folder_of(folder / split).joinpath(f'{i:05}.txt').write_bytes(t.encode())
  return {'source': 'text', 'path': f'{folder}/{{split}}/*.txt'}


def parquet(folder, documents):
  import pyarrow
  from pyarrow import parquet
  for split, texts in documents.items():
    table = pyarrow.Table.from_pylist([{'id': i, **r} for i, r in enumerate(rows(texts))])
    parquet.write_table(table, folder / f'{split}.parquet', row_group_size=7)
  return {'source': 'parquet', 'path': f'{folder}/{{split}}.parquet'}


def array_record(folder, documents):
  for split, texts in documents.items():
    write_records(folder / f'{split}.array_record', [json.dumps(r).encode() for r in rows(texts)])
  return {'source': 'array_record', 'path': f'{folder}/{{split}}.array_record'}


def write_records(path, records):
  from array_record.python.array_record_module import ArrayRecordWriter
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def tokens(folder, documents):
  made = ByteTokenizer()
  for split, texts in documents.items():
    ids = [i for t in texts for i in (*made.encode([t])[0], made.eod_id)]
    np.array(ids, '<u2').tofile(folder / f'{split}.bin')
  return {'source': 'tokens', 'path': f'{folder}/{{split}}.bin'}


def huggingface(folder, documents):
  import datasets
  datasets.disable_progress_bars()
  datasets.DatasetDict({
      {'valid': 'validation'}.get(split, split): datasets.Dataset.from_list(
          [{'id': i, **r} for i, r in enumerate(rows(texts))])
      for split, texts in documents.items()}).save_to_disk(folder / 'saved')
  return {'source': 'huggingface', 'path': f'{folder}/saved'}


def tfds(folder, documents):
  import tensorflow_datasets
  core, features = tensorflow_datasets.core, tensorflow_datasets.features
  tensorflow_datasets.disable_progress_bar()
  names = list(rows(documents['train'])[0])

  with core.registered.skip_registration():
    class Little(core.GeneratorBasedBuilder):
      VERSION, pkg_dir_path = core.Version('1.0.0'), None

      def _info(self):
        return core.DatasetInfo(builder=self, disable_shuffling=True,
                                features=features.FeaturesDict({n: features.Text() for n in names}))

      def _split_generators(self, manager):
        return {{'valid': 'validation'}.get(s, s): self._generate_examples(s) for s in documents}

      def _generate_examples(self, split):
        yield from enumerate(rows(documents[split]))
  builder = Little(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare()
  return {'source': 'tfds', 'path': str(builder.data_dir)}


WRITERS = {'jsonl': jsonl, 'jsonl.gz': lambda f, d: jsonl(f, d, '.gz'),
           'jsonl.zst': lambda f, d: jsonl(f, d, '.zst'), 'text': text, 'parquet': parquet,
           'array_record': array_record, 'tokens': tokens, 'huggingface': huggingface,
           'tfds': tfds}


def write(name: str, folder: Path, documents: dict) -> dict:
  """Writes {split: [text or (prompt, completion)]} and returns its entry, without a name."""
  return WRITERS[name](folder_of(folder), documents)
