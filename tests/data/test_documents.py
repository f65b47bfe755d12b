import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
import zstandard
from cases import some
from corpus_cases import document, jsonl, refused, small, verb, write

from demix.data.corpus.documents import Reader, source
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens.store import TokenStore

ROOT = Path(__file__).parents[2]
TEXTS = [document(i) for i in range(30)]
COMPRESS = {'': lambda b: b, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}


def read(*files, **kwargs):
  return [text for text, _ in Reader(1 << 20, **kwargs).texts(files)]


@pytest.mark.parametrize('suffix', COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path, suffix):
  file = tmp_path / f'train.jsonl{suffix}'
  file.write_bytes(COMPRESS[suffix](jsonl(TEXTS)))
  assert read(file) == TEXTS


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_members_and_frames_follow_each_other(tmp_path, suffix):
  file = tmp_path / f'train.jsonl{suffix}'
  data = jsonl(TEXTS)
  file.write_bytes(b''.join(COMPRESS[suffix](data[i:i + 100]) for i in range(0, len(data), 100)))
  assert read(file) == TEXTS


@pytest.mark.parametrize('change', [
    lambda b: b[:-1], lambda b: b.replace(b'\n', b'\r\n'), lambda b: b'\xef\xbb\xbf' + b,
    lambda b: b.replace(b'\n', b'\n\n  \n')], ids=['no last newline', 'crlf', 'mark', 'blanks'])
def test_harmless_layouts_are_read(tmp_path, change):
  file = tmp_path / 'train.jsonl'
  file.write_bytes(change(jsonl(TEXTS)))
  assert read(file) == TEXTS


def test_lines_longer_than_a_chunk_are_whole(tmp_path):
  texts = ['a' * 700_000, 'b', 'c' * 262_144, 'd' * 262_130, 'é' * 100_000]
  (tmp_path / 'train.jsonl').write_bytes(jsonl(texts))
  assert read(tmp_path / 'train.jsonl') == texts


def test_parts_of_a_split_are_read_in_the_order_of_their_names(tmp_path, capsys):
  write(tmp_path / 'in', {'law': {'train-01.jsonl': TEXTS[10:], 'train-00.jsonl.gz': TEXTS[:10],
                                  'valid.part1.jsonl': ['v'], 'test.jsonl': ['t']}})
  found = source(tmp_path / 'in/law')
  assert read(*found.splits['train']) == TEXTS
  assert list(found.splits) == ['train', 'valid', 'test'] and found.unused == ()


def test_plain_text_is_a_document_a_file_split_by_the_hash_of_its_content(tmp_path):
  (tmp_path / 'law').mkdir()
  texts = {f'{i:03}.txt': document(i) + '\r\nline' for i in range(300)}
  for name, text in texts.items():
    (tmp_path / 'law' / name).write_bytes(text.encode())
  found = source(tmp_path / 'law')
  for split, buckets in (('train', range(8)), ('valid', [8]), ('test', [9])):
    expected = [t for t in texts.values() if xxhash.xxh3_128_intdigest(t.encode()) % 10 in buckets]
    assert read(*found.splits[split]) == expected  # line ends as they are
  counts = [len(found.splits[s]) for s in ('train', 'valid', 'test')]
  assert sum(counts) == 300 and 220 < counts[0] < 260 and min(counts[1:]) > 15
  assert list(found.digests) == ['law/*.txt']
  # Another name is the same split; other content is another digest.
  (tmp_path / 'law/000.txt').rename(tmp_path / 'law/zzz.txt')
  moved = source(tmp_path / 'law')
  assert {s: len(f) for s, f in moved.splits.items()} == {
      s: len(f) for s, f in found.splits.items()}
  assert moved.digests != found.digests


BAD_LINES = {
    'UTF-8': (b'{"text": "caf\xe9"}', 'not UTF-8 (byte 0xe9 at byte 14)'),
    'JSON': (b'{"text": "a"', 'not JSON'),
    'lone surrogate': (b'{"text": "\\ud800"}', 'not JSON'),
    'list': (b'["text"]', 'a JSON list, not an object'),
    'no text': (b'{"content": "a", "id": 1}', 'no "text" in the record (keys: content, id)'),
    'text is a number': (b'{"text": 1}', '"text" is a JSON number, not a string'),
    'text is null': (b'{"text": null}', '"text" is a JSON null, not a string'),
    'too long': (b'{"text": "' + b'a' * 5000 + b'"}', 'more than max_record_bytes=4000 bytes'),
}
FLAGS = ('--config.tokenizer=bytes', '--config.max_record_bytes=4000')


@pytest.mark.parametrize('suffix', COMPRESS)
@pytest.mark.parametrize('name', BAD_LINES)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, capsys, name, suffix):
  line, why = BAD_LINES[name]
  small(tmp_path / 'in')
  file = tmp_path / f'in/law/train-1.jsonl{suffix}'
  file.write_bytes(COMPRESS[suffix](jsonl(TEXTS[:6]) + line + b'\n' + jsonl(TEXTS[6:])))
  err = refused(capsys, f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}', *FLAGS)
  assert f'{file}:7: {why}' in err and 'on_bad_record=skip' in err
  assert [p.name for p in tmp_path.iterdir()] == ['in']  # nothing is left


def test_bad_records_and_empty_texts_are_skipped_and_counted(tmp_path, capsys):
  small(tmp_path / 'in')
  bad = [line + b'\n' for line, _ in BAD_LINES.values()]
  file = tmp_path / 'in/law/train.jsonl'
  file.write_bytes(jsonl(['', TEXTS[0]]) + b''.join(bad) + jsonl([TEXTS[1], '']) + bad[-1][:-1])
  code, out, err = verb(capsys, f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}', *FLAGS,
                        '--config.on_bad_record=skip')
  assert code == 0, err
  store = TokenStore.open(tmp_path / 'out')
  entry = store.card['domains']['law']['splits']['train']
  assert entry['documents'] == 2 and entry['skipped'] == len(bad) + 1 + 2
  assert store.tokenizer().decode(store.tokens('law', 'train')) == TEXTS[0] + TEXTS[1]
  assert f'law/train: {len(bad) + 1} unreadable records left out; first: {file}:3: not UTF-8' in out
  assert 'law/train: 2 empty texts left out' in out


def test_a_text_file_that_is_not_utf8_or_too_long_is_refused(tmp_path, capsys):
  (tmp_path / 'in/law').mkdir(parents=True)
  for i in range(30):
    (tmp_path / f'in/law/{i}.txt').write_text(document(i))
  flags = f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}', *FLAGS
  (tmp_path / 'in/law/x.txt').write_bytes(b'a' * 4001)
  assert f'{tmp_path}/in/law/x.txt: more than max_record_bytes=4000' in refused(capsys, *flags)
  (tmp_path / 'in/law/x.txt').write_bytes(b'abc\xff')
  assert f'{tmp_path}/in/law/x.txt: not UTF-8 (byte 0xff at byte 4)' in refused(capsys, *flags)


def _without(folder, *names):
  for name in names:
    (folder / name).unlink()


LAYOUTS = {  # what is done to a good corpus: (change, file it names, what it says)
    'missing folder': (lambda d: d.rename(d.with_name('gone')), '', 'no such folder'),
    'a file': (lambda d: (d.rename(d.with_name('gone')), d.write_text('')), '', 'not a folder'),
    'no domains': (lambda d: (d.rename(d.with_name('gone')), d.mkdir()), '', 'no domain folders'),
    'no train split': (lambda d: _without(d, 'law/train.jsonl'), 'law', 'no train split (it holds '
                       'test.jsonl, valid.jsonl)'),
    'an empty domain': (lambda d: (d / 'new').mkdir(), 'new', 'no train split (it holds nothing)'),
    'an empty file': (lambda d: (d / 'law/test.jsonl').write_bytes(b''), 'law/test.jsonl',
                      'an empty file'),
    'blank lines only': (lambda d: (d / 'law/test.jsonl').write_bytes(b'\n \n'), 'law/test.jsonl',
                         'no record in it'),
    'empty gzip': (lambda d: (d / 'law/test-1.jsonl.gz').write_bytes(gzip.compress(b'')),
                   'law/test-1.jsonl.gz', 'no record in it'),
    'empty texts only': (lambda d: (d / 'law/test.jsonl').write_bytes(jsonl(['', ''])),
                         'law/test.jsonl', 'no document with text in law/test (2 empty'),
    'one part twice': (lambda d: (d / 'law/test.jsonl.gz').write_bytes(gzip.compress(b'{}')),
                       'law/test.jsonl.gz', 'test.jsonl is the same part of test'),
    'name with a blank': (lambda d: (d / 'law').rename(d / 'my law'), 'my law',
                          "'my law' cannot be a domain"),
    'name of a letter beyond ASCII': (lambda d: (d / 'law').rename(d / 'loi-é'), 'loi-é',
                                      'cannot be a domain'),
    'name that the store needs': (lambda d: (d / 'law').rename(d / 'tokenizer'), 'tokenizer',
                                  'cannot be a domain'),
    'a split as plain text': (lambda d: (d / 'new').mkdir() or
                              (d / 'new/train.txt').write_text('a'),
                              'new/train.txt', 'write train.jsonl'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_layout_that_cannot_be_read_is_refused(tmp_path, capsys, name):
  change, file, why = LAYOUTS[name]
  folder = small(tmp_path / 'in')
  change(folder)
  err = refused(capsys, f'--input={folder}', f'--out={tmp_path / "out"}', *FLAGS)
  assert f'{folder / file}: ' in err and why in err
  assert not (tmp_path / 'out').exists()


def test_too_few_text_files_for_a_train_split_are_refused(tmp_path, capsys):
  (tmp_path / 'in/law').mkdir(parents=True)
  i = next(i for i in range(99) if xxhash.xxh3_128_intdigest(str(i).encode()) % 10 == 9)
  (tmp_path / 'in/law/a.txt').write_text(str(i))
  err = refused(capsys, f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}', *FLAGS)
  assert 'in/law: none of its 1 .txt files is in train' in err


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
@pytest.mark.parametrize('skip', ['fail', 'skip'])
def test_compressed_files_that_are_cut_off_or_corrupt_are_refused(tmp_path, capsys, suffix, skip):
  small(tmp_path / 'in')
  file = tmp_path / f'in/law/train-1.jsonl{suffix}'
  data = COMPRESS[suffix](jsonl([document(i * i) for i in range(3000)]))
  flags = (f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}', '--config.tokenizer=bytes',
           f'--config.on_bad_record={skip}')
  for size in (5, len(data) // 2, len(data) - 1):
    file.write_bytes(data[:size])
    assert f'{file}:' in (err := refused(capsys, *flags)) and 'cut off here' in err
  file.write_bytes(data + b'garbage')
  assert f'{file}:3001: the compressed file is corrupt' in refused(capsys, *flags)


@pytest.mark.parametrize('suffix', COMPRESS)
@pytest.mark.parametrize('byte', some([b'a', b'\n'], [b'a']))
def test_a_line_without_end_and_a_bomb_take_bounded_memory(tmp_path, suffix, byte):
  """200 MB in one line, or millions of lines, read by a process that may have 120 MB."""
  file = tmp_path / f'train.jsonl{suffix}'
  size = 200_000_000 if byte == b'a' else 16_000_000 if suffix == '.zst' else 5_000_000
  file.write_bytes(COMPRESS[suffix](b'{"text": "x"}\n' + byte * size))
  # Not getrusage: its peak starts with that of the process that was forked, this one.
  code = ('import re, sys\nfrom pathlib import Path\n'
          'from demix.data.corpus.documents import Reader\n'
          'reader = Reader(1 << 20, skip_bad=True)\n'
          'print(len(list(reader.texts([Path(sys.argv[1])]))), reader.bad)\n'
          'print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])')
  run = subprocess.run([sys.executable, '-c', code, file], capture_output=True, text=True)
  documents, bad, kilobytes = run.stdout.split()
  assert (documents, bad) == ('1', '1' if byte == b'a' else '0')
  assert int(kilobytes) < 120_000


def test_progress_counts_the_bytes_on_disk(tmp_path):
  for suffix, compress in COMPRESS.items():
    file, seen = tmp_path / f'train.jsonl{suffix}', []
    file.write_bytes(compress(jsonl(TEXTS)))
    read(file, on_bytes=seen.append)
    assert sum(seen) == file.stat().st_size


def test_records_may_have_other_keys(tmp_path):
  file = tmp_path / 'train.jsonl'
  file.write_text(json.dumps({'id': 1, 'text': 'a\nb', 'meta': {'text': 'no'}}))
  assert read(file) == ['a\nb']


LATIN1 = os.fsdecode(b'caf\xe9')


@pytest.mark.parametrize('named', ['jsonl', 'txt', 'corpus', 'corpus text', 'unused'])
def test_names_of_files_need_not_be_text(tmp_path, named):
  folder = tmp_path / 'in' / 'd'
  folder.mkdir(parents=True)
  config = {'tokenizer': 'bytes'}
  file = folder / f'train-{LATIN1}.jsonl'
  if 'text' in named or named == 'txt':
    for i in range(9):
      (folder / f'{LATIN1}{i}.txt').write_text(f'text {i}')
  else:
    (folder / 'train.jsonl' if named == 'unused' else file).write_bytes(jsonl(['one']))
  if named == 'unused':
    (folder / LATIN1).write_text('x')
  if 'corpus' in named:
    kind = 'text' if 'text' in named else 'jsonl'
    config['corpus'] = ({'name': 'd', 'source': kind, 'path': 'd/*'},)
  said = []
  made = prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(**config), said.append)
  assert prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(**config), said.append)
  assert 'nothing to do' in said[-1] and made.fingerprint
  ''.join(said).encode()


def test_arguments_that_are_no_text_are_named_at_once(tmp_path):
  folder = tmp_path / LATIN1
  folder.mkdir()
  for where, flag in ((None, f'--input={folder}'), (folder, '--input=x')):
    done = subprocess.run([sys.executable, '-m', 'demix', 'prepare', flag, '--out=s'], cwd=where,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True)
    assert done.returncode == 2 and b'udce9' in done.stderr and b'is not UTF-8' in done.stderr


@pytest.mark.parametrize('log', [27, 28, 31])
def test_frames_of_any_window_are_read(tmp_path, log):
  file = tmp_path / 'train.jsonl.zst'
  window = zstandard.ZstdCompressionParameters(window_log=log, hash_log=6, chain_log=6)
  writer = zstandard.ZstdCompressor(compression_params=window).compressobj()
  file.write_bytes(writer.compress(jsonl(TEXTS)) + writer.flush())
  assert zstandard.get_frame_parameters(file.read_bytes()).window_size == 1 << log
  assert read(file) == TEXTS


def test_frames_that_hold_no_text_are_passed_over(tmp_path):
  file = tmp_path / 'train.jsonl.zst'
  skippable = b'\x50\x2a\x4d\x18\x05\0\0\0hello'
  whole = COMPRESS['.zst'](jsonl(TEXTS))
  file.write_bytes(skippable + whole + skippable + COMPRESS['.zst'](b''))
  assert read(file) == TEXTS
