import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from corpus_cases import document, small, write

from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens.store import TokenStore, token_dtype
from demix.errors import BadInput

BYTES = PrepareConfig(tokenizer='bytes')
QUIET = lambda line: None


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(folder of the corpus, folder of its store): domains in another than alphabetical order."""
  folder = tmp_path_factory.mktemp('store')
  small(folder / 'corpus', ('law', 'med', 'art'))
  config = PrepareConfig(tokenizer='bytes', domains=('med', 'law', 'art'), novel=('art',))
  prepare(folder / 'corpus', folder / 'store', config, QUIET)
  return folder / 'corpus', folder / 'store'


@pytest.fixture
def copy(made, tmp_path):
  """A copy of the store that a test may spoil."""
  return shutil.copytree(made[1], tmp_path / 'store')


def test_layout_is_the_contract_and_numpy_is_enough_to_read_it(made):
  corpus, folder = made
  assert sorted(p.name for p in folder.iterdir()) == ['art', 'card.json', 'law', 'med', 'tokenizer']
  assert {p.name for p in (folder / 'tokenizer').iterdir()} == {'meta.json', 'token_bytes.npy'}
  card = json.loads((folder / 'card.json').read_text())
  assert set(card) == {'version', 'tokenizer', 'domains', 'duplicates', 'inputs', 'config',
                       'fingerprint', 'leakage', 'vocabulary'}
  meta = json.loads((folder / 'tokenizer/meta.json').read_text())
  assert card['tokenizer'] == meta and card['version'] == 1
  assert set(meta) == {'version', 'kind', 'vocab_size', 'eod_id', 'fingerprint'}
  assert set(card['inputs']) == {f'{d}/{s}.jsonl' for d in ('art', 'law', 'med')
                                 for s in ('train', 'valid', 'test')}
  token_bytes_V = np.load(folder / 'tokenizer/token_bytes.npy')
  assert token_bytes_V.dtype == np.int32 and token_bytes_V.tolist() == [1] * 256 + [0]
  for domain in ('law', 'med', 'art'):
    for split in ('train', 'valid', 'test'):
      texts = [json.loads(line)['text'] for line in
               (corpus / domain / f'{split}.jsonl').read_text().splitlines()]
      tokens = np.fromfile(folder / domain / split / 'tokens.bin', '<u2')
      rows = np.load(folder / domain / split / 'documents.npy')
      assert rows.dtype == np.int64 and rows.shape == (len(texts), 2)
      start = 0
      for (end, size), text in zip(rows, texts):
        assert tokens[end - 1] == meta['eod_id'] == 256
        assert bytes(tokens[start:end - 1].tolist()) == text.encode() and size == len(text.encode())
        start = end
      assert start == len(tokens)
      entry = card['domains'][domain]['splits'][split]
      assert entry == {
          'documents': len(texts), 'bytes': rows[:, 1].sum(), 'tokens': len(tokens),
          'tokens_per_byte': len(tokens) / rows[:, 1].sum(), 'skipped': 0,
          'tokens_digest': entry['tokens_digest'], 'documents_digest': entry['documents_digest']}


def test_attributes_keep_the_order_of_the_config(made):
  store = TokenStore.open(made[1])
  assert store.domains == ('med', 'law', 'art')
  assert store.roles == {'med': 'train', 'law': 'train', 'art': 'novel'}
  assert (store.vocab_size, store.eod_id) == (257, 256)
  assert store.splits('med') == ('train', 'valid', 'test')
  assert store.tokenizer().decode(store.tokens('law', 'test')[:5]) == \
      document(20_000)[:5]
  store.verify()


def test_tokens_and_documents_are_read_only(made):
  store = TokenStore.open(made[1])
  for array in (store.tokens('law', 'train'), store.documents('law', 'train')):
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match='read-only'):
      array[0] = 0


def test_pickle_carries_no_tokens_and_opens_them_anew(made):
  store = TokenStore.open(made[1])
  tokens = store.tokens('law', 'train')
  before = len(pickle.dumps(TokenStore.open(made[1])))
  data = pickle.dumps(store)
  assert len(data) == before and tokens.nbytes > 1000
  np.testing.assert_array_equal(pickle.loads(data).tokens('law', 'train'), tokens)


def test_unknown_names_are_refused_with_the_nearest(made):
  store = TokenStore.open(made[1])
  for call in (store.splits, store.domain_fingerprint, lambda d: store.tokens(d, 'train'),
               lambda d: store.documents(d, 'train')):
    with pytest.raises(BadInput, match=r"no domain 'lwa' \(did you mean 'law'\?\)"):
      call('lwa')
  with pytest.raises(BadInput, match=r"'law' has no split 'tests' \(did you mean 'test'\?\)"):
    store.tokens('law', 'tests')


def _rewrite(file, change):
  card = json.loads(file.read_text())
  change(card)
  file.write_text(json.dumps(card))


DAMAGE = {
    'no card': ('card.json', lambda f: f.unlink()),
    'broken card': ('card.json', lambda f: f.write_bytes(f.read_bytes()[:-9])),
    'card of another version': ('card.json', lambda f: _rewrite(f, lambda c: c.update(version=2))),
    'card without an entry': (
        'card.json', lambda f: _rewrite(f, lambda c: c['domains']['law']['splits']['test'].pop(
            'tokens'))),
    'tokens cut off': ('law/test/tokens.bin', lambda f: f.write_bytes(f.read_bytes()[:-2])),
    'tokens too long': ('law/test/tokens.bin', lambda f: f.write_bytes(f.read_bytes() + b'ab')),
    'tokens gone': ('med/train/tokens.bin', lambda f: f.unlink()),
    'documents cut off': ('law/test/documents.npy', lambda f: f.write_bytes(f.read_bytes()[:-8])),
    'a document less': ('law/test/documents.npy', lambda f: np.save(f, np.load(f)[1:])),
    'documents of another type': ('law/test/documents.npy',
                                  lambda f: np.save(f, np.load(f).astype(np.float64))),
    'documents gone': ('law/test/documents.npy', lambda f: f.unlink()),
    'no tokenizer': ('tokenizer/meta.json', lambda f: f.unlink()),
    'token bytes changed': ('tokenizer/token_bytes.npy', lambda f: np.save(f, np.load(f) * 2)),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_open_refuses(copy, name):
  file, spoil = DAMAGE[name]
  spoil(copy / file)
  where = copy / file if name not in ('no card', 'token bytes changed') else (copy / file).parent
  with pytest.raises(BadInput) as e:
    TokenStore.open(copy)
  assert str(e.value).startswith(f'{where}:') and '\n' not in str(e.value)
  assert 'prepare' in str(e.value)


def test_open_refuses_the_tokenizer_of_another_store(copy, tmp_path):
  small(tmp_path / 'corpus')
  other = prepare(tmp_path / 'corpus', tmp_path / 'other',
                  PrepareConfig(tokenizer='bpe', vocab_size=300), QUIET)
  assert other.tokenizer_meta['kind'] == 'bpe'
  shutil.rmtree(copy / 'tokenizer')
  shutil.copytree(tmp_path / 'other/tokenizer', copy / 'tokenizer')
  with pytest.raises(BadInput, match=f'{other.tokenizer_meta["fingerprint"]}, but card.json names'):
    TokenStore.open(copy)


@pytest.mark.parametrize('file', ['law/train/tokens.bin', 'art/valid/documents.npy'])
def test_verify_finds_a_changed_byte_that_open_does_not(copy, file):
  data = bytearray((copy / file).read_bytes())
  data[-8] ^= 1
  (copy / file).write_bytes(data)
  store = TokenStore.open(copy)
  with pytest.raises(BadInput, match=f'{file}: digest [0-9a-f]+, but card.json says'):
    store.verify()


def test_fingerprints_are_of_content_only(made, tmp_path):
  corpus, folder = made
  store = TokenStore.open(folder)
  shutil.copytree(corpus, tmp_path / 'elsewhere')
  other = prepare(tmp_path / 'elsewhere', tmp_path / 'store', BYTES, QUIET)  # alphabetical order
  assert other.domains == ('art', 'law', 'med')
  assert other.fingerprint == store.fingerprint
  assert other.domain_fingerprint('law') == store.domain_fingerprint('law')
  write(tmp_path / 'elsewhere', {'law': {'test': ['another text']}})
  changed = prepare(tmp_path / 'elsewhere', tmp_path / 'store', BYTES, QUIET)
  assert changed.fingerprint != store.fingerprint
  assert changed.domain_fingerprint('law') != store.domain_fingerprint('law')
  assert changed.domain_fingerprint('med') == store.domain_fingerprint('med')


def test_fingerprint_of_the_same_text_differs_with_the_tokenizer(tmp_path):
  write(tmp_path / 'corpus', {'law': {'train': ['abc' * 9]}})
  one = prepare(tmp_path / 'corpus', tmp_path / 'one', BYTES, QUIET)
  two = prepare(tmp_path / 'corpus', tmp_path / 'two',
                PrepareConfig(tokenizer='bpe', vocab_size=260), QUIET)
  assert one.fingerprint != two.fingerprint
  assert one.domain_fingerprint('law') != two.domain_fingerprint('law')


def test_fingerprint_of_a_known_store_stays(tmp_path):
  write(tmp_path / 'corpus', {'law': {'train': ['one', 'two'], 'test': ['three']}})
  store = prepare(tmp_path / 'corpus', tmp_path / 'store', BYTES, QUIET)
  assert store.tokenizer_meta['fingerprint'] == '9b3c15c91390a54c49668227e727d723'
  assert store.fingerprint == 'a37b7377b622fcc747a39a7e95862c44'
  assert store.domain_fingerprint('law') == 'd280b1fb9397776a0cda87ff02a5caec'


def test_ids_are_uint16_while_they_fit():
  assert token_dtype(1 << 16) == np.dtype('<u2') and token_dtype((1 << 16) + 1) == np.dtype('<u4')


def test_opening_and_reading_imports_numpy_and_no_tokenizer_library(made):
  code = ('import sys\nfrom demix.data.tokens.store import TokenStore\n'
          f's = TokenStore.open({str(made[1])!r})\ns.tokens("law", "train"), s.verify()\n'
          'print(sorted({"jax", "tokenizers", "sentencepiece", "grain"} & set(sys.modules)))')
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout == '[]\n'
