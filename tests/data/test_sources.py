import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import formats
import numpy as np
import pytest
from corpus_cases import document, jsonl, refused, verb, write

from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.sampling.batches import Batches, DataConfig
from demix.data.sources import corpus, token_files
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

ROOT = Path(__file__).parents[2]
QUIET = lambda line: None
DOCUMENTS = {split: [document(1000 * i + j, 5 + j % 9) for j in range(n)]
             for i, (split, n) in enumerate((('train', 41), ('valid', 5), ('test', 6)))}
SUPERVISED = {s: [(t[:9], t[9:]) for t in texts] for s, texts in DOCUMENTS.items()}


def made(out, *entries, input='', say=QUIET, **config):
  config = PrepareConfig(**{'tokenizer': 'bytes', **config}, corpus=tuple(
      {'name': 'law', **e} for e in entries))
  return prepare(input, out, config, say)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """The documents in the folder layout of --input."""
  folder = tmp_path_factory.mktemp('plain')
  write(folder / 'in', {'law': DOCUMENTS})
  return prepare(folder / 'in', folder / 'out', PrepareConfig(tokenizer='bytes'), QUIET)


# The same documents, whatever holds them.


@pytest.mark.parametrize('name', formats.WRITERS)
def test_equal_batches_whatever_format_holds_the_documents(tmp_path, plain, name):
  entry = formats.write(name, tmp_path / 'in', DOCUMENTS)
  store = made(tmp_path / 'out', entry)
  store.verify()
  assert store.fingerprint == plain.fingerprint
  assert store.card['domains']['law']['splits'] == plain.card['domains']['law']['splits']
  config = DataConfig(domains=('law',), sequence_length=16, batch_size=4)
  ours, theirs = (Batches(s, config, 3)[5] for s in (store, plain))
  assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
  said = []
  made(tmp_path / 'out', entry, say=said.append)
  assert 'nothing to do' in said[0]
  assert str(tmp_path) not in json.dumps(store.card)


@pytest.mark.parametrize('name', ['jsonl.zst', 'parquet', 'array_record', 'huggingface', 'tfds'])
def test_progress_reaches_the_size_of_every_format(tmp_path, name):
  entry = formats.write(name, tmp_path, DOCUMENTS)
  entries = corpus.entries([{'name': 'law', **entry}])['law']
  splits, seen = corpus.open_domain('law', entries, '', None), []
  for part in splits['train']:
    assert sum(1 for _ in part.records(1 << 20, seen.append))
  assert sum(seen) == sum(p.size for p in splits['train']) > 0


def test_tfds_and_the_light_formats_import_no_tensorflow(tmp_path):
  entries = [{'name': name, **formats.write(name, tmp_path / name, DOCUMENTS)}
             for name in ('tfds', 'array_record', 'parquet')]
  (tmp_path / 'config.py').write_text(
      'from ml_collections import ConfigDict\nfrom demix.data.corpus.prepare import PrepareConfig\n'
      'from demix.settings import to_dict\n'
      f'get_config = lambda: ConfigDict(to_dict(PrepareConfig(corpus={tuple(entries)!r})))')
  code = ('import sys\nfrom demix.__main__ import main\n'
          'assert main(["prepare", *sys.argv[1:]]) == 0\n'
          'print(sorted({"jax", "flax", "grain", "tensorflow", "datasets"} & set(sys.modules)))')
  run = subprocess.run(
      [sys.executable, '-c', code, f'--out={tmp_path / "out"}', '--config.tokenizer=bytes',
       f'--config={tmp_path / "config.py"}', '--config.domains=parquet,tfds,array_record'],
      cwd=ROOT, capture_output=True, text=True, check=True)
  assert run.stdout.endswith('[]\n'), run.stdout
  assert TokenStore.open(tmp_path / 'out').domains == ('parquet', 'tfds', 'array_record')


@pytest.mark.parametrize('name', ['jsonl', 'parquet', 'array_record', 'huggingface', 'tfds'])
def test_prompts_are_read_and_not_predicted(tmp_path, plain, name):
  """In every format, by both packings: weights are 0 on the prompt's tokens and 1 on all else."""
  store = made(tmp_path / 'out', formats.write(name, tmp_path / 'in', SUPERVISED))
  store.verify()
  assert np.array_equal(store.tokens('law', 'train'), plain.tokens('law', 'train'))
  assert store.fingerprint != plain.fingerprint  # other weights are other data
  expected = np.concatenate([[0] * len(p.encode()) + [1] * (len(c.encode()) + 1)
                             for p, c in SUPERVISED['train']])
  stream, packed = (_weights(store, packing) for packing in ('continuous', 'document'))
  assert np.array_equal(stream, expected[:len(stream)]) and len(stream) > len(expected) - 16
  assert packed.sum() == expected.sum()


def _weights(store, packing):
  from demix.data.tokens.packing import sequences
  rows = sequences(store, 'law', 'train', 16, packing)
  if packing == 'document':
    for i in range(len(rows)):  # what is scored of a piece is what stands behind its prompt
      row = rows[i]
      assert not row['weights'][row['segments'] == 0].any()
  return np.concatenate([rows[i]['weights'] for i in range(len(rows))])


def test_a_prompt_ends_at_a_token_even_where_its_text_would_merge(tmp_path):
  write(tmp_path / 'in', {'law': {'train': ['abcabc abc'] * 20}})
  bpe = prepare(tmp_path / 'in', tmp_path / 'bpe', PrepareConfig(vocab_size=262), QUIET)
  (tmp_path / 'in/law/train.jsonl').write_text(
      json.dumps({'prompt': 'abca', 'completion': 'bc abc'}) + '\n' + json.dumps({'text': 'abc'}))
  store = prepare(tmp_path / 'in', tmp_path / 'out', PrepareConfig(
      tokenizer='json', tokenizer_path=str(tmp_path / 'bpe/tokenizer/tokenizer.json')), QUIET)
  made, tokens = store.tokenizer(), store.tokens('law', 'train')
  size, none = store.prompts('law', 'train')
  assert none == 0 and bpe.vocab_size > 257
  assert list(tokens[:size]) == list(made.encode(['abca'])[0])
  assert made.decode(tokens[size:store.documents('law', 'train')[0, 0]]) == 'bc abc'


# Domains as data.


def test_a_domain_may_have_several_sources_and_relative_paths(tmp_path):
  half = {s: t[:len(t) // 2] for s, t in DOCUMENTS.items()}
  rest = {s: t[len(t) // 2:] for s, t in DOCUMENTS.items()}
  entries = [formats.write('parquet', tmp_path / 'in/a', half),
             formats.write('jsonl', tmp_path / 'in/b', rest)]
  whole = made(tmp_path / 'whole', formats.write('jsonl', tmp_path / 'in/c', DOCUMENTS))
  for e in entries:
    e['path'] = str(Path(e['path']).relative_to(tmp_path / 'in'))
  store = made(tmp_path / 'out', *entries, input=tmp_path / 'in')
  assert store.fingerprint == whole.fingerprint


def test_heldout_cuts_train_by_the_hash_of_the_text(tmp_path):
  texts = [document(i) for i in range(600)]
  entry = formats.write('jsonl', tmp_path / 'in', {'train': texts + texts[:50]})
  store = made(tmp_path / 'out', {**entry, 'heldout': 0.1})
  found = {s: _texts(store, s) for s in store.splits('law')}
  assert set().union(*found.values()) == set(texts)
  assert sum(map(len, found.values())) == len(set(texts))  # a copy is in the split of the original
  assert 30 < len(found['valid']) < 90 and 30 < len(found['test']) < 90
  assert store.card['duplicates'] == []
  kept = made(tmp_path / 'kept', {**formats.write('parquet', tmp_path / 'b', {
      'train': texts[::-1], 'valid': ['v']}), 'heldout': 0.1})
  assert _texts(kept, 'valid') == {'v'}  # a split that is there is taken as it is
  assert _texts(kept, 'test') == found['valid']  # the first share goes to the first that lacks


def _texts(store, split):
  tokens, start, out, made = store.tokens('law', split), 0, set(), store.tokenizer()
  for end, _ in store.documents('law', split):
    out.add(made.decode(tokens[start:end - 1]))
    start = end
  return out


def test_splits_are_named_by_the_entry(tmp_path):
  folder = tmp_path / 'in'
  formats.write('jsonl', folder, {'one': ['a', 'b'], 'two': ['c', 'd']})
  for entry in ({'path': f'{folder}/{{split}}-*.jsonl', 'splits': {'train': 'one', 'test': 'two'}},
                {'path': str(folder), 'splits': {'train': 'one-*', 'test': 'two-*'}}):
    store = made(tmp_path / 'out', entry)
    assert store.splits('law') == ('train', 'test') and _texts(store, 'test') == {'c', 'd'}
  for name, slices in (('tfds', ('train[:50%]', 'train[50%:]')),
                       ('huggingface', ('train[:50%]', 'train[-20:]'))):
    entry = formats.write(name, tmp_path / name, {'train': DOCUMENTS['train'][:40]})
    store = made(tmp_path / 'out', {**entry, 'splits': dict(zip(('train', 'test'), slices))})
    assert _texts(store, 'train') == set(DOCUMENTS['train'][:20])
    assert _texts(store, 'test') == set(DOCUMENTS['train'][20:40])


def test_fields_are_named_by_the_entry(tmp_path):
  import pyarrow
  from pyarrow import parquet
  parquet.write_table(pyarrow.table({'body': ['a', 'b'], 'text': [1, 2]}), tmp_path / 'x.parquet')
  store = made(tmp_path / 'out', {'source': 'parquet', 'path': f'{tmp_path}/x.parquet',
                                  'text': 'body'})
  assert _texts(store, 'train') == {'a', 'b'}
  formats.write_records(tmp_path / 'x.array_record', ['naïve'.encode(), b'b'])
  store = made(tmp_path / 'out', {'source': 'array_record', 'path': f'{tmp_path}/x.array_record',
                                  'text': ''})
  assert _texts(store, 'train') == {'naïve', 'b'}


def test_groups_and_licences_stand_in_the_card(tmp_path, capsys):
  entry = formats.write('jsonl', tmp_path / 'in', DOCUMENTS)
  config = PrepareConfig(tokenizer='bytes', corpus=tuple(
      {'name': n, 'group': g, 'licence': w, **entry}
      for n, g, w in (('b', 'art', 'CC0'), ('c', '', ''), ('a', 'art', 'CC BY'))))
  store = prepare('', tmp_path / 'out', config, QUIET)
  assert store.domains == ('b', 'c', 'a') and store.groups == {'art': ('b', 'a')}
  assert store.card['domains']['a']['licence'] == 'CC BY'
  assert 'group' not in store.card['domains']['c']
  assert store.leaves(('c', 'art')) == ('c', 'b', 'a')
  with pytest.raises(BadInput, match=r"domain 'a' is named twice: group 'art' has it"):
    store.leaves(('art', 'a'))


# What cannot be read.


def bad_parquet(folder):
  import pyarrow
  from pyarrow import parquet
  parquet.write_table(pyarrow.table({'text': ['a', None, 'c']}), folder / 'x')


def bad_bytes_parquet(folder):
  import pyarrow
  from pyarrow import parquet
  parquet.write_table(pyarrow.table({'text': [b'a', b'caf\xe9', b'c']}), folder / 'x')


def bad_tfds(folder):
  return formats.write('tfds', folder, {'train': ['a', b'caf\xe9', 'c']})['path']


def bad_huggingface(folder):
  return formats.write('huggingface', folder, {'train': ['a', None, 'c']})['path']


def bad_tokens(folder):
  np.array([97, 256, 98, 999, 256, 99, 256], '<u2').tofile(folder / 'x')


BAD_RECORDS = {
    'jsonl': (lambda f: (f / 'x').write_bytes(jsonl(['a']) + b'{"txt": 1}\n' + jsonl(['c'])),
              'jsonl', 'x:2', 'no "text" in the record (keys: txt)'),
    'prompt': (lambda f: (f / 'x').write_bytes(
        jsonl(['a']) + b'{"prompt": "a", "completion": 1}\n' + jsonl(['c'])), 'jsonl', 'x:2',
               '"completion" is a JSON number, not a string'),
    'parquet': (bad_parquet, 'parquet', 'x:2', '"text" is a JSON null, not a string'),
    'parquet bytes': (bad_bytes_parquet, 'parquet', 'x:2', 'not UTF-8 (byte 0xe9 at byte 4)'),
    'array_record': (lambda f: formats.write_records(f / 'x', [b'{"text": "a"}', b'{"te',
                                                               b'{"text": "c"}']),
                     'array_record', 'x:2', 'not JSON'),
    'tokens': (bad_tokens, 'tokens', 'x:2', 'id 999 (number 3 of the file), but the tokenizer has '
                                            '257'),
    'huggingface': (bad_huggingface, 'huggingface', 'saved[train]:2', '"text" is a JSON null'),
    'tfds': (bad_tfds, 'tfds', 'little/1.0.0[train]:2', 'not UTF-8 (byte 0xe9 at byte 4)'),
}


@pytest.mark.parametrize('name', BAD_RECORDS)
def test_a_bad_record_is_named_or_left_out(tmp_path, capsys, name):
  change, source, where, why = BAD_RECORDS[name]
  (tmp_path / 'in').mkdir()
  path = change(tmp_path / 'in')
  entry = {'source': source, 'path': path if isinstance(path, str) else str(tmp_path / 'in/x')}
  flags = _flags(tmp_path, entry)
  err = refused(capsys, *flags)
  assert f'{where}: {why}' in err and '--config.on_bad_record=skip' in err
  assert not (tmp_path / 'out').exists()
  code, out, _ = verb(capsys, *flags, '--config.on_bad_record=skip')
  assert code == 0 and '1 unreadable records left out; first: ' in out and where in out
  assert _texts(TokenStore.open(tmp_path / 'out'), 'train') == {'a', 'c'}
  code, out, _ = verb(capsys, *flags, '--config.on_bad_record=skip',
                      '--config.max_record_bytes=1')  # `a` and `c` have one
  assert code == (0 if source not in ('jsonl', 'tokens') else 2)


def _flags(folder, *entries):
  config = folder / 'config.py'
  config.write_text(
      'from ml_collections import ConfigDict\nfrom demix.data.corpus.prepare import PrepareConfig\n'
      'from demix.settings import to_dict\ndef get_config():\n'
      '  return ConfigDict(to_dict(PrepareConfig(tokenizer="bytes", corpus='
      f'{tuple({"name": "law", **e} for e in entries)!r})))\n')
  return f'--out={folder / "out"}', f'--config={config}'


@pytest.mark.parametrize('name', ['parquet', 'array_record', 'huggingface', 'tfds'])
@pytest.mark.parametrize('damage', ['cut off', 'garbage'])
@pytest.mark.parametrize('skip', ['fail', 'skip'])
def test_a_damaged_file_is_refused(tmp_path, capsys, name, damage, skip):
  formats_of = {'parquet': '*.parquet', 'array_record': '*.array_record',
                'huggingface': '**/*.arrow', 'tfds': '**/*array_record*'}
  entry = formats.write(name, tmp_path / 'in', {'train': [document(i) for i in range(200)]})
  [file] = (tmp_path / 'in').glob(formats_of[name])
  data = file.read_bytes()
  file.write_bytes(data[:len(data) // 2] if damage == 'cut off' else
                   data[:40] + b'garbage' * 300 + data[2140:])
  err = refused(capsys, *_flags(tmp_path, entry), f'--config.on_bad_record={skip}')
  assert 'damaged' in err and ('saved' in err or 'little/' in err or str(file) in err)


ENTRIES = {
    'unknown key': ({'pth': 'x'}, "config.corpus[0].pth: no such key (did you mean 'path'?)"),
    'unknown source': ({'source': 'parket', 'path': 'x'}, "'parket' is no source (did you mean "
                                                          "'parquet'?)"),
    'no path': ({}, 'config.corpus[0].path is missing'),
    'no such file': ({'path': 'nothing/*.jsonl'}, "config.corpus law: no file"),
    'a folder': ({'path': '.'}, 'a folder; name the files in it'),
    'name': ({'name': 'a b', 'path': 'x'}, "'a b' cannot be a domain"),
    'another source reads it': ({'path': 'x', 'dtype': 'uint32'}, "has no effect with "
                                 "config.corpus[0].source='jsonl'"),
    'split': ({'path': 'x', 'splits': {'dev': 'x'}}, "no split 'dev'"),
    'heldout': ({'path': 'x', 'heldout': 0.5}, 'heldout=0.5 is out of range'),
    'dtype': ({'path': 'x', 'source': 'tokens', 'dtype': 'int8'}, "dtype='int8': no such choice"),
    'a type': ({'path': 3}, 'config.corpus[0].path: expected str'),
    'data set': ({'source': 'tfds', 'path': 'lm1b_'}, 'lm1b_: not a folder of TFDS'),
    'hub': ({'source': 'huggingface', 'path': 'nobody/nothing'}, 'nobody/nothing: not a folder of '
                                                                  'save_to_disk, and no data set'),
}


@pytest.mark.parametrize('name', ENTRIES)
def test_an_entry_that_cannot_be_is_refused(tmp_path, capsys, name):
  entry, why = ENTRIES[name]
  assert why in refused(capsys, *_flags(tmp_path, entry), f'--input={tmp_path}')


def test_domains_that_cannot_be_are_refused(tmp_path, capsys):
  entry = formats.write('jsonl', tmp_path / 'in', {'train': ['a', 'b']})
  file = f'{tmp_path}/in/train-0.jsonl'
  for entries, flag, why in (
      ([{'group': 'x', **entry}, {'group': 'y', **entry}], '', "'law' has two groups, x and y"),
      ([{'group': 'law', **entry}], '', "'law' is a group and a domain"),
      ([entry], '--config.domains=lwa', "no entry 'lwa' in config.corpus (did you mean 'law'?)"),
      ([entry], '--config.novel=lwa', "config.novel: no domain 'lwa'"),
      ([{'path': '{split}', 'splits': {'train': file, 'test': file}}], '', 'in train and in test'),
      ([{'path': '{split}', 'splits': {'test': file}}], '', "has no train split (it has test)"),
      ([{**entry, 'source': 'tokens'}], '--config.tokenizer=bpe', '--config.tokenizer (bytes'),
      ([entry], '--input=nowhere', '--input=nowhere: no such folder')):
    assert why in refused(capsys, *_flags(tmp_path, *entries), *filter(None, [flag])), why


def test_token_files_of_odd_size_and_of_other_ends_are_refused(tmp_path, capsys):
  file = tmp_path / 'x.bin'
  file.write_bytes(b'abc')
  flags = _flags(tmp_path, {'source': 'tokens', 'path': str(file)})
  assert '3 bytes are no whole number of uint16 ids' in refused(capsys, *flags)
  np.array([97, 256, 98, 0], '<u2').tofile(file)
  flags = _flags(tmp_path, {'source': 'tokens', 'path': str(file), 'eod_id': 0})
  assert "end-of-document id 256 inside a document" in refused(capsys, *flags)


def test_a_token_file_without_an_end_takes_bounded_memory(tmp_path, monkeypatch):
  from demix.data.sources import token_files
  from demix.data.tokens.tokenizer import ByteTokenizer
  monkeypatch.setattr(token_files, '_IDS', 7)
  ids = [97] * 30 + [256] + [98] * 3 + [256, 256] + [99] * 9 + [256] + [100] * 4
  np.array(ids, '<u2').tofile(tmp_path / 'x')
  part = token_files.TokenFile(tmp_path / 'x', 'x', ByteTokenizer(), 'uint16', 256)
  found = [(w.rpartition(':')[2], r and (r[0], ''.join(map(chr, r[1]))))
           for w, r in part.records(20, lambda n: None)]
  assert found == [('1', None), ('2', (31, 'bbb')), ('3', (35, '')), ('4', (36, 'c' * 9)),
                   ('5', (46, 'dddd'))]


def test_a_dtype_that_ids_do_not_fit_is_refused(tmp_path):
  file = tmp_path / 'x'
  np.array([5, 0, 6, 0], '<u2').tofile(file)
  def opened(vocab_size, end, eod_id, dtype):
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eod_id=end)
    return token_files.TokenFile(file, 'x', tokenizer, dtype, eod_id)
  for case in ((65_536, 65_535, 65_535), (65_537, 65_536, 0), (257, 256, 256)):
    opened(*case, 'uint16')
  for case in ((65_537, 65_536, 65_536), (65_538, 65_537, 0), (70_000, 3, 3), (257, 256, 65_536)):
    opened(*case, 'uint32')
    with pytest.raises(BadInput, match='uint16 holds 65535 at most: set dtype'):
      opened(*case, 'uint16')
