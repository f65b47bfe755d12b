import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from corpus_cases import document, flags, jsonl, small, snapshot, verb, write

from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.overlap import duplicates
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

BYTES = PrepareConfig(tokenizer='bytes')
QUIET = lambda line: None
ROOT = Path(__file__).parents[2]


# What it makes.


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'json', 'sentencepiece'])
def test_texts_come_back_from_the_store(tmp_path, capsys, kind):
  small(tmp_path / 'in')
  more = ['--config.vocab_size=300'] if kind == 'bpe' else []
  if kind == 'json':
    prepare(tmp_path / 'in', tmp_path / 'first', PrepareConfig(vocab_size=300), QUIET)
    more = [f'--config.tokenizer_path={tmp_path / "first/tokenizer/tokenizer.json"}']
  if kind == 'sentencepiece':
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(document(i) for i in range(40)), model_prefix=str(tmp_path / 'sp'),
        vocab_size=330, byte_fallback=True, normalization_rule_name='identity', minloglevel=2,
        remove_extra_whitespaces=False, model_type='bpe', add_dummy_prefix=False)
    more = [f'--config.tokenizer_path={tmp_path / "sp.model"}']
  code, out, err = verb(capsys, *flags(tmp_path, *more, tokenizer=kind))
  assert code == 0, err
  store = TokenStore.open(tmp_path / 'out')
  store.verify()
  made = store.tokenizer()
  assert made.kind == kind and made.vocab_size > 256
  for domain in store.domains:
    for split in store.splits(domain):
      texts = [json.loads(line)['text'] for line in
               (tmp_path / f'in/{domain}/{split}.jsonl').read_text().splitlines()]
      tokens, start = store.tokens(domain, split), 0
      for (end, size), text in zip(store.documents(domain, split), texts, strict=True):
        assert made.decode(tokens[start:end - 1]) == text and tokens[end - 1] == store.eod_id
        assert store.token_bytes_V[tokens[start:end]].sum() == size == len(text.encode())
        start = end
  assert 'approximate' not in out


def test_many_batches_are_one_stream(tmp_path, monkeypatch):
  small(tmp_path / 'in', train=50)
  whole = prepare(tmp_path / 'in', tmp_path / 'whole', BYTES, QUIET)
  monkeypatch.setattr('demix.data.corpus.prepare._BATCH', 100)
  parts = prepare(tmp_path / 'in', tmp_path / 'parts', BYTES, QUIET)
  assert parts.fingerprint == whole.fingerprint
  parts.verify()


def test_the_table_and_the_card_say_the_same(tmp_path, capsys):
  small(tmp_path / 'in', ('law', 'med'), train=1200)
  (tmp_path / 'in/med/test.jsonl').unlink()
  (tmp_path / 'in/law/notes.md').write_text('x')
  code, out, _ = verb(capsys, *flags(tmp_path, '--config.novel=med'))
  assert code == 0
  card = json.loads((tmp_path / 'out/card.json').read_text())
  entry = card['domains']['law']['splits']['train']
  assert entry['documents'] == 1200
  rows = [line.split() for line in out.splitlines()]
  assert ['domain', 'split', 'documents', 'bytes', 'tokens', 'tokens/byte', 'skipped'] == rows[0]
  assert rows[2][:3] == ['law', 'train', '1,200'] and float(rows[2][5]) == pytest.approx(
      entry['tokens_per_byte'], abs=1e-4)
  assert rows[5][:4] == ['med', '(novel)', 'train', '1,200']
  assert [r[0] for r in rows[3:5] + rows[6:7]] == ['valid', 'test', 'valid']
  assert 'warning: med has no test split' in out
  assert 'warning: law: not used: notes.md' in out
  assert f'{tmp_path / "out"}: a token store of 257 ids, fingerprint {card["fingerprint"]}' in out
  assert 'exact duplicates across splits: none' in out


def test_duplicates_are_found_across_splits_and_domains(tmp_path, capsys):
  write(tmp_path / 'in', {
      'law': {'train': ['a', 'b', 'c', 'c', 'd'], 'valid': ['v', 'b'], 'test': ['c', 'c', 'x']},
      'med': {'train': ['z', 'c'], 'test': ['x', 'a', 'C', 'c ']}})
  _, out, _ = verb(capsys, *flags(tmp_path))
  pairs = [(p['a'], p['b'], p['documents'])
           for p in TokenStore.open(tmp_path / 'out').card['duplicates']]
  assert pairs == [('law/train', 'law/valid', 1), ('law/train', 'law/test', 1),
                   ('law/train', 'med/train', 1), ('law/train', 'med/test', 1),
                   ('law/test', 'med/train', 1), ('law/test', 'med/test', 1)]
  assert '  law/train and law/valid: 1' in out


def test_duplicates_do_not_depend_on_how_many_fit_in_memory(tmp_path):
  rng, sets, files = np.random.default_rng(0), {}, {}
  for name in 'abcd':
    digests = rng.integers(0, 400, 300).astype(np.uint64)
    sets[name] = set(digests.tolist())
    files[name] = tmp_path / name
    # Digests are uniform: spread the few values over all leading bits, the second half equal.
    spread = digests * np.uint64(0x9E3779B97F4A7C15)
    np.stack([spread, np.zeros_like(spread)], 1).tofile(files[name])
  expected = [{'a': a, 'b': b, 'documents': len(sets[a] & sets[b])}
              for a in 'abcd' for b in 'abcd' if a < b]
  for rows in (10_000, 100, 7):
    assert duplicates.shared(files, rows) == expected


def test_max_bytes_cuts_train_only(tmp_path):
  small(tmp_path / 'in', train=100)
  store = prepare(tmp_path / 'in', tmp_path / 'out',
                  PrepareConfig(tokenizer='bytes', max_bytes=150), QUIET)
  entry = store.card['domains']['law']['splits']
  assert 150 <= entry['train']['bytes'] < 240 < entry['test']['bytes']
  assert entry['test']['documents'] == 4


def test_domains_are_chosen_and_ordered_by_the_config(tmp_path, capsys):
  small(tmp_path / 'in', ('art', 'law', 'med'))
  (tmp_path / 'in/not a domain').mkdir()  # not asked for, so not in the way
  code, _, err = verb(capsys, *flags(tmp_path, '--config.domains=med,art', '--config.novel=art'))
  assert code == 0, err
  store = TokenStore.open(tmp_path / 'out')
  assert store.domains == ('med', 'art') and store.roles == {'med': 'train', 'art': 'novel'}


# The tokenizer that is trained.


def test_bpe_learns_from_train_splits_of_train_domains_only(tmp_path):
  secret = 'qzjxvkwqzjxvkw'
  write(tmp_path / 'in', {'law': {'train': ['the law of the land'] * 3, 'test': [secret] * 50},
                          'new': {'train': [secret] * 50}})
  learnt = {}
  for novel in ((), ('new',)):
    store = prepare(tmp_path / 'in', tmp_path / 'out',
                    PrepareConfig(vocab_size=300, novel=novel), QUIET)
    learnt[novel] = len(store.tokenizer().encode([secret])[0])
  assert learnt[()] < 4 and learnt[('new',)] == len(secret)


def test_bpe_sample_is_bounded_balanced_and_the_same_in_any_order(tmp_path, monkeypatch):
  seen = []
  from demix.data.tokens.tokenizer import BpeTokenizer
  train = BpeTokenizer.train.__func__
  monkeypatch.setattr(BpeTokenizer, 'train', classmethod(
      lambda cls, texts, size: train(cls, seen.append(list(texts)) or seen[-1], size)))
  texts = {d: [f'{d} {document(i, 10 + i % 50)}' for i in range(300)] for d in ('law', 'med')}
  stores = []
  for order in (1, -1):
    write(tmp_path / f'in{order}', {d: {'train': t[::order]} for d, t in texts.items()})
    stores.append(prepare(tmp_path / f'in{order}', tmp_path / f'out{order}',
                          PrepareConfig(vocab_size=300, sample_bytes=20_000), QUIET))
  assert sorted(seen[0]) == sorted(seen[1])
  for domain in ('law', 'med'):
    size = sum(len(t.encode()) for t in seen[0] if t.startswith(domain))
    assert 9_000 < size <= 10_000  # its share, less at most a document
  a, b = (s.tokenizer_meta['fingerprint'] for s in stores)
  assert a == b


def test_a_document_above_the_share_gives_a_part_of_it(tmp_path):
  write(tmp_path / 'in', {'law': {'train': ['cat sat ' * 5000]}})
  store = prepare(tmp_path / 'in', tmp_path / 'out',
                  PrepareConfig(vocab_size=300, sample_bytes=1024), QUIET)
  assert store.vocab_size > 257 and len(store.tokenizer().encode([' cat'])[0]) == 1


def test_too_little_text_for_the_vocabulary_is_said(tmp_path, capsys):
  small(tmp_path / 'in')
  code, out, _ = verb(capsys, *flags(tmp_path, '--config.vocab_size=5000', tokenizer='bpe'))
  store = TokenStore.open(tmp_path / 'out')
  assert code == 0 and store.vocab_size < 5000
  assert f'config.vocab_size=5000, but so little text gave only {store.vocab_size} ids' in out


def test_a_vocabulary_that_cannot_spell_the_text_is_said(tmp_path, capsys):
  from tokenizers import Tokenizer, models, pre_tokenizers
  engine = Tokenizer(models.WordLevel({'<unk>': 0, 'the': 1}, unk_token='<unk>'))
  engine.pre_tokenizer = pre_tokenizers.Whitespace()
  engine.save(str(tmp_path / 'words.json'))
  write(tmp_path / 'in', {'law': {'train': ['the cat'], 'valid': ['the'], 'test': ['the the']}})
  code, out, _ = verb(capsys, *flags(
      tmp_path, f'--config.tokenizer_path={tmp_path / "words.json"}', tokenizer='json'))
  assert code == 0
  assert 'law/train: 1 of 3 ids are "unknown"' in out and 'law/valid' not in out
  assert 'law/train: its ids stand for 3 bytes, its text has 7' in out


# Again.


def test_again_does_nothing_and_says_so_in_one_line(tmp_path, capsys):
  small(tmp_path / 'in')
  verb(capsys, *flags(tmp_path, tokenizer='bpe'))
  before = snapshot(tmp_path / 'out')
  for file in (tmp_path / 'in').rglob('*.jsonl'):
    os.utime(file)  # newer, but the same
  code, out, err = verb(capsys, *flags(tmp_path, tokenizer='bpe'))
  assert code == 0 and out.count('\n') == 1 and 'nothing to do' in out and err == ''
  assert snapshot(tmp_path / 'out') == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


def test_again_with_other_inputs_settings_or_tokenizer_makes_another(tmp_path):
  small(tmp_path / 'in')
  kinds = PrepareConfig(tokenizer='json', tokenizer_path=str(tmp_path / 'tokenizer.json'))
  for i in (0, 1):
    small(tmp_path / f'sample{i}', salt=i)
    prepare(tmp_path / f'sample{i}', tmp_path / f'made{i}', PrepareConfig(vocab_size=300), QUIET)
  tokenizer = lambda i: shutil.copy(tmp_path / f'made{i}/tokenizer/tokenizer.json', tmp_path)
  text = tmp_path / 'in/law/test.jsonl'
  steps = [
      (BYTES, lambda: None),
      (BYTES, lambda: text.write_bytes(text.read_bytes().replace(b'2x', b'2y'))),
      (BYTES, lambda: write(tmp_path / 'in', {'art': {'train': ['a']}})),
      (PrepareConfig(tokenizer='bytes', domains=('med', 'art')), lambda: None),
      (kinds, lambda: tokenizer(0)), (kinds, lambda: tokenizer(1))]
  text.write_bytes(jsonl([document(1), document(2) + 'x']))
  seen = []
  for config, change in steps:
    change()
    said = []
    store = prepare(tmp_path / 'in', tmp_path / 'out', config, said.append)
    assert 'nothing to do' not in said[0]
    store.verify()
    seen.append(store.fingerprint)
  assert len(set(seen)) == len(steps)
  assert {p.name for p in tmp_path.iterdir()} >= {'in', 'out'} and not list(tmp_path.glob('.*'))
  shutil.move(tmp_path / 'tokenizer.json', tmp_path / 'same.json')  # another path, same content
  said = []
  prepare(tmp_path / 'in', tmp_path / 'out', PrepareConfig(
      tokenizer='json', tokenizer_path=str(tmp_path / 'same.json')), said.append)
  assert store.fingerprint == TokenStore.open(tmp_path / 'out').fingerprint


def test_a_damaged_store_is_made_again(tmp_path):
  small(tmp_path / 'in')
  store = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET)
  (tmp_path / 'out/law/test/tokens.bin').unlink()
  assert prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET).fingerprint == store.fingerprint


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
  small(tmp_path / 'in')
  from demix.data.corpus import documents
  read = documents.Reader.documents

  def changing(self, parts):
    yield from read(self, parts)
    write(tmp_path / 'in', {'law': {'train': ['another text']}})
  monkeypatch.setattr(documents.Reader, 'documents', changing)
  with pytest.raises(BadInput, match=r'in/law/train\.jsonl: it changed while it was read'):
    prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET)
  assert [p.name for p in tmp_path.iterdir()] == ['in']


# What it says, and needs.


def test_progress_goes_to_stderr_over_the_bytes_of_the_input(tmp_path, capsys, monkeypatch):
  small(tmp_path / 'in')
  from demix.data.corpus import prepare as module
  total = sum(p.stat().st_size for p in (tmp_path / 'in').rglob('*.jsonl'))
  train = sum(p.stat().st_size for p in (tmp_path / 'in').rglob('train.jsonl'))
  ends = {}
  close = module._Bytes.close

  def closing(self, note=''):
    ends[self.label] = (self._done, self.total)
    close(self, f'{self._done} {note}')
  monkeypatch.setattr(module._Bytes, 'close', closing)
  code, out, err = verb(capsys, *flags(tmp_path, tokenizer='bpe'))
  assert code == 0
  assert ends == {'reading': (total, total), 'tokenizing': (total, total),
                  'sampling for the tokenizer': (train, train)}
  assert 'tokenizing' in err and 'tokenizing' not in out


def test_local_text_is_written_beside_the_store_with_its_roles(tmp_path, capsys, monkeypatch):
  asked = []

  def local(folder, domains=None):
    asked.append((folder, domains))
    small(folder, ('py', 'docs'))
    return {'py': {'role': 'train'}, 'docs': {'role': 'novel'}}
  monkeypatch.setitem(sys.modules, 'demix.data.local.local_text',
                      types.SimpleNamespace(write=local))
  monkeypatch.delattr('demix.data.local.local_text', raising=False)
  for said in ('a token store of 257 ids', 'nothing to do'):
    code, out, err = verb(capsys, '--input=local_text', f'--out={tmp_path / "out"}',
                          '--config.tokenizer=bytes')
    assert code == 0 and said in out, err
  assert TokenStore.open(tmp_path / 'out').roles == {'py': 'train', 'docs': 'novel'}
  assert asked == [(tmp_path / 'out_text', None)] * 2


def test_a_local_domain_that_the_machine_lacks_is_left_out(tmp_path, capsys, monkeypatch):
  def local(folder, domains=None):
    small(folder, ('py', 'docs'))
    return {'py': {'role': 'train'}, 'docs': {'role': 'novel'}}
  monkeypatch.setitem(sys.modules, 'demix.data.local.local_text',
                      types.SimpleNamespace(write=local))
  monkeypatch.delattr('demix.data.local.local_text', raising=False)
  for domains, novel, roles in (('docs,py,c', 'c', {'docs': 'novel', 'py': 'train'}),
                                ('py,c', 'c', {'py': 'train'}),
                                ('c,py,docs', 'c,py', {'py': 'novel', 'docs': 'train'})):
    code, _, err = verb(capsys, '--input=local_text', f'--out={tmp_path / "out"}',
                        '--config.tokenizer=bytes', f'--config.domains={domains}',
                        f'--config.novel={novel}')
    assert code == 0, err
    store = TokenStore.open(tmp_path / 'out')
    assert (store.domains, store.roles) == (tuple(roles), roles)


def test_prepare_imports_no_jax(tmp_path):
  small(tmp_path / 'in')
  code = ('import sys\nfrom demix.__main__ import main\n'
          'assert main(["prepare", *sys.argv[1:]]) == 0\n'
          'print(sorted({"jax", "flax", "grain", "tensorflow"} & set(sys.modules)))')
  run = subprocess.run([sys.executable, '-c', code, *flags(tmp_path, tokenizer='bpe')], cwd=ROOT,
                       capture_output=True, text=True, check=True)
  assert run.stdout.splitlines()[-1] == '[]'


def test_a_card_names_no_path_of_the_machine(tmp_path):
  small(tmp_path / 'in')
  prepare(tmp_path / 'in', tmp_path / 'first', PrepareConfig(vocab_size=300), QUIET)
  prepare(tmp_path / 'in', tmp_path / 'out', PrepareConfig(
      tokenizer='json', tokenizer_path=str(tmp_path / 'first/tokenizer/tokenizer.json')), QUIET)
  assert str(tmp_path) not in (tmp_path / 'out/card.json').read_text()


def test_a_note_is_said_once_for_all_domains_and_pairs(tmp_path):
  write(tmp_path / 'in', {f'd{i}': {'train': [document(i), 'the same']} for i in range(7)})
  said = []
  prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(tokenizer='bytes'), said.append)
  lines = '\n'.join(said).splitlines()
  assert 'warning: d0, d1, d2, d3, d4, d5, d6 have no valid and no test split' in lines
  assert sum('no valid' in line for line in lines) == 1
  pairs = [line for line in lines if ' and d' in line and 'train: 1' in line]
  assert len(pairs) == 12 and '  and 9 pairs more' in lines
