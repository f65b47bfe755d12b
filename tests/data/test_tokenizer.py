import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from corpus_cases import document
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from demix.data import pieces
from demix.data.tokenizer import (
  BpeTokenizer,
  ByteTokenizer,
  JsonTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from demix.errors import BadInput

TEXTS = [document(i, 30) for i in range(200)] + ["it's    we'll\t\tthey'd\r\n\n  x=1;  y=22"] * 3
LLAMA = pieces._BLANK_ONLY[0]

# Fragments that pre-tokenizers treat in ways of their own, mixed with arbitrary text.
FRAGMENTS = ["'s", "'", "'ll", "''", ' ', '  ', '\n', '\r\n', '\t', '\u00a0', '\u2003', '\u180e',
             '\u3000', '\u200b', '\x85', '\x1c', 'a', 'the', 'cat', 'é', 'e\u0301', '東', '京。', '😀',
             '👩‍👩‍👧', '1', '42', '.', ';;', '<|endoftext|>', '\x00', '\U0010ffff', 'สวัสดี', 'мат']
ADVERSARIAL = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=60).map(
    ''.join)
RUNS = st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 60)), max_size=12).map(
    lambda runs: ''.join(f * n for f, n in runs))


@pytest.fixture(scope='module')
def bpe():
  return BpeTokenizer.train(TEXTS, 320)


def trained(pre_tokenizer, texts=TEXTS, **kwargs):
  """The tokenizer.json of a byte-level BPE with another pre-tokenizer."""
  engine = hf.Tokenizer(models.BPE())
  engine.pre_tokenizer = pre_tokenizer
  engine.decoder = hf.decoders.ByteLevel()
  engine.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      **kwargs))
  return engine


def opened(tmp_path, engine, change=lambda spec: None) -> JsonTokenizer:
  spec = json.loads(engine.to_str())
  change(spec)
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  return JsonTokenizer.from_file(tmp_path / 'tokenizer.json')


def whole(tokenizer, text):
  """The ids that the library gives for the whole text at once."""
  return tokenizer._engine.encode(text, add_special_tokens=False).ids


# Bytes.


def test_bytes_are_their_values():
  made = ByteTokenizer()
  (ids,) = made.encode(['aé😀'])
  assert ids.dtype == np.int32 and ids.tolist() == list('aé😀'.encode())
  assert (made.vocab_size, made.eod_id) == (257, 256)
  assert made.decode([*ids, 256, 0xff, 0x62]) == 'aé😀\ufffdb'


@given(ADVERSARIAL)
def test_bytes_come_back(text):
  made = ByteTokenizer()
  assert made.decode(made.encode([text])[0]) == text


# Byte-level BPE trained here.


@given(st.one_of(ADVERSARIAL, st.text()))
@settings(deadline=None)
def test_bpe_comes_back_and_its_bytes_are_exact(bpe, text):
  (ids,) = bpe.encode([text])
  assert bpe.decode(ids) == text
  assert bpe.token_bytes_V[ids].sum() == len(text.encode())
  assert bpe.eod_id not in ids


def test_bpe_knows_every_byte_and_learnt_something(bpe):
  assert bpe.vocab_size == 320 and len(bpe.token_bytes_V) == 320
  assert bpe.token_bytes_V[bpe.eod_id] == 0
  assert sorted(bpe.token_bytes_V)[:257] == [0] + [1] * 256 and bpe.token_bytes_V.max() > 3
  assert bpe.decode([i for i in range(320) if bpe.token_bytes_V[i] == 1]).count('\ufffd') > 0


def test_decode_replaces_half_a_character_and_drops_the_end(bpe):
  (ids,) = bpe.encode(['\U0010fff0'])
  assert len(ids) == 4
  assert bpe.decode([*ids, bpe.eod_id]) == '\U0010fff0'
  assert bpe.decode(ids[:3]) == '\ufffd'


@pytest.mark.parametrize('bad', [-1, 320])
def test_decode_refuses_an_id_beyond_the_vocabulary(bpe, bad):
  with pytest.raises(BadInput, match=f'id {bad}: the tokenizer has ids 0 to 319'):
    bpe.decode([3, bad])


def test_training_is_the_same_in_any_order_and_any_process(bpe, tmp_path):
  code = ('import sys\nfrom demix.data.tokenizer import BpeTokenizer\nimport pickle\n'
          'print(BpeTokenizer.train(pickle.load(sys.stdin.buffer), 320).fingerprint)')
  for seed, texts in (('1', TEXTS), ('2', TEXTS[::-1])):
    run = subprocess.run([sys.executable, '-c', code], input=pickle.dumps(texts),
                         capture_output=True, check=True, env={'PYTHONHASHSEED': seed})
    assert run.stdout.decode().strip() == bpe.fingerprint
  assert BpeTokenizer.train(TEXTS[1:50], 320).fingerprint != bpe.fingerprint


def test_training_on_megabytes_without_a_blank_ends():
  """Merging inside one word is quadratic in the library: this took minutes before words were cut."""
  code = ('from demix.data.tokenizer import BpeTokenizer\n'
          'text = "".join(chr(97 + i * i * 7 % 26) for i in range(1_500_000))\n'
          'assert BpeTokenizer.train([text, " " * 1_500_000], 2000).vocab_size > 256')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=30)


# Pieces: never other ids than those of the whole text.


@given(st.one_of(ADVERSARIAL, RUNS), st.integers(1, 12))
@settings(deadline=None, max_examples=300)
def test_pieces_have_the_ids_of_the_whole(bpe, text, size):
  parts = pieces.split(text, bpe._cut, size)
  assert ''.join(parts) == text
  assert [i for p in parts for i in whole(bpe, p)] == whole(bpe, text)


@given(st.one_of(RUNS, st.text('ab', max_size=200), st.text("the cat's.", max_size=200),
                 st.text("'lrves", max_size=200)),
       st.integers(8, 40))
@settings(deadline=None, max_examples=300)
def test_runs_have_the_ids_of_the_whole(bpe, text, window):
  encode = lambda t: np.array(whole(bpe, t), np.int32)
  assert pieces.encode_run(text, encode, bpe.token_bytes_V, window).tolist() == whole(bpe, text)


@pytest.mark.parametrize('unit', ['a', ' ', '\n', "'", 'the', '😀🎉', '東京', 'x9', '.;', 'e\u0301',
                                  'สวัสดี', 'a.'])
def test_windows_of_a_run_are_joined_not_given_up(bpe, unit):
  """A window is encoded at once, never the whole run: else memory would grow with it."""
  text, longest = unit * 3000, 0

  def encode(t):
    nonlocal longest
    longest = max(longest, len(t))
    return np.array(whole(bpe, t), np.int32)

  assert pieces.encode_run(text, encode, bpe.token_bytes_V, 256).tolist() == whole(bpe, text)
  assert longest == 256


def test_a_document_of_megabytes_has_the_ids_of_the_whole(bpe):
  rng = np.random.default_rng(0)
  words = ' '.join(document(int(i), 40) for i in rng.integers(0, 999, 1500))
  letters = ''.join(chr(97 + i) for i in rng.integers(0, 26, pieces.RUN + 200_000))
  text = words + letters + '\n' * (pieces.RUN + 9) + words
  assert len(pieces.split(text, bpe._cut)) > 4
  texts = [text, '', 'short', words]
  for ids, text in zip(bpe.encode(texts), texts, strict=True):
    assert ids.tolist() == whole(bpe, text)


def test_encoding_a_document_takes_memory_by_the_batch():
  """8 MB of words and an unbroken run of 4 MB; the library alone takes over a gigabyte."""
  code = ('import re\nfrom demix.data.tokenizer import BpeTokenizer\n'
          'made = BpeTokenizer.train(["the cat sat"] * 9, 270)\n'
          'made.encode(["the cat " * 500_000 + "x" * 2_000_000])\n'
          'print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])')
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert int(run.stdout) < 300_000


PIPELINES = {
    'gpt2': (pre_tokenizers.ByteLevel(add_prefix_space=False), True, True),
    'llama': (pre_tokenizers.Sequence([
        pre_tokenizers.Split(hf.Regex(LLAMA), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), True, False),
    'prefix': (pre_tokenizers.ByteLevel(add_prefix_space=True), False, False),
    'no regex': (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False, False),
    'digits': (pre_tokenizers.Sequence([
        pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), False, False),
    'blanks kept': (pre_tokenizers.Sequence([
        pre_tokenizers.Split(' ', 'merged_with_previous'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), False, False),
}


@pytest.mark.parametrize('name', PIPELINES)
def test_only_pipelines_known_to_be_safe_are_cut(tmp_path, name):
  pre_tokenizer, cuts, cuts_runs = PIPELINES[name]
  made = opened(tmp_path, trained(pre_tokenizer))
  assert (made._cut is not None, made._cuts_runs) == (cuts, cuts_runs)

  @given(st.one_of(ADVERSARIAL, RUNS), st.integers(1, 12))
  @settings(deadline=None, max_examples=60)
  def check(text, size):
    assert [i for p in pieces.split(text, made._cut, size) for i in whole(made, p)] == \
        whole(made, text)
  check()


@pytest.mark.parametrize('change', [
    lambda s: s.update(normalizer={'type': 'NFC'}),
    lambda s: s['added_tokens'].append(
        {'id': 400, 'content': 'a b', 'special': False, 'single_word': False, 'lstrip': False,
         'rstrip': False, 'normalized': False})], ids=['normalizer', 'added token'])
def test_what_may_look_across_a_cut_is_not_cut(tmp_path, change):
  made = opened(tmp_path, trained(PIPELINES['gpt2'][0]), change)
  assert made._cut is None and not made._cuts_runs


# An existing tokenizer.json.


def test_its_own_end_is_used_and_never_read_from_text(tmp_path):
  for end in ('<|endoftext|>', '</s>'):
    made = opened(tmp_path, trained(PIPELINES['gpt2'][0], special_tokens=['<pad>', end]))
    assert made.eod_id == 1 and made.vocab_size == 400
    text = f'a{end}b {end}\n{end}'
    (ids,) = made.encode([text])
    assert 1 not in ids and 0 not in made.encode(['<pad>'])[0]
    assert made.decode(ids) == text and made.token_bytes_V[ids].sum() == len(text)
    assert made.token_bytes_V[:2].tolist() == [0, 0]


def test_an_end_that_text_could_reach_is_not_used(tmp_path):
  vocabulary = [('<unk>', 0.0), ('</s>', 0.0), ('▁', -1.0), ('a', -2.0), ('s', -3.0), ('▁a', -1.5)]
  engine = hf.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
  engine.pre_tokenizer = pre_tokenizers.Metaspace()
  engine.decoder = hf.decoders.Metaspace()
  engine.add_special_tokens(['</s>'])
  made = opened(tmp_path, engine)
  assert 1 in made.encode(['a</s>'])[0]  # the model itself spells it
  assert made.eod_id == 6 and made.vocab_size == 7 and made.unknown_id == 0
  assert made.token_bytes_V.tolist() == [0, 0, 1, 1, 1, 2, 0]
  assert made.decode([5, 4, 6]) == 'as'


def test_one_id_is_added_where_there_is_no_end(tmp_path):
  made = opened(tmp_path, trained(PIPELINES['gpt2'][0]))
  assert made.eod_id == 400 and made.vocab_size == 401 == len(made.token_bytes_V)
  assert made.decode([*made.encode(['the cat'])[0], 400]) == 'the cat'


def test_a_merge_that_spells_the_end_keeps_it_from_being_used(tmp_path):
  engine = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                   ['<|endoftext|>'] * 50)
  engine.add_special_tokens(['<|endoftext|>'])
  made = opened(tmp_path, engine)
  assert made.eod_id == made.vocab_size - 1 == engine.get_vocab_size()
  assert made.eod_id not in made.encode(['<|endoftext|>'])[0]


def test_truncation_padding_and_templates_in_the_file_do_nothing(tmp_path):
  engine = trained(PIPELINES['gpt2'][0], special_tokens=['<s>'])
  plain = opened(tmp_path, engine).encode(['the cat sat on a mat', 'a'])
  engine.enable_truncation(2)
  engine.enable_padding(length=50)
  engine.post_processor = hf.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)])
  for a, b in zip(plain, opened(tmp_path, engine).encode(['the cat sat on a mat', 'a'])):
    np.testing.assert_array_equal(a, b)


def test_byte_fallback_pieces_are_one_byte(tmp_path):
  vocabulary = {f'<0x{b:02X}>': b for b in range(256)} | {'<unk>': 256, '▁': 257, 'é': 258, 'x': 259}
  engine = hf.Tokenizer(models.BPE(vocabulary, [], unk_token='<unk>', byte_fallback=True))
  engine.normalizer = hf.normalizers.Replace(' ', '▁')
  made = opened(tmp_path, engine)
  (ids,) = made.encode(['é x😀'])
  assert ids.tolist() == [258, 257, 259, *'😀'.encode()]
  assert made.token_bytes_V[ids].sum() == len('é x😀'.encode())


@pytest.mark.parametrize('content, why', [
    (b'{"model": 1}', 'not a tokenizer.json'), (b'\xff', 'not a tokenizer.json'),
    (None, 'cannot read the tokenizer')])
def test_a_file_that_is_no_pipeline_is_refused(tmp_path, content, why):
  if content:
    (tmp_path / 'tokenizer.json').write_bytes(content)
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    with pytest.raises(BadInput, match=f'^{tmp_path}/tokenizer.json: {why}'):
      JsonTokenizer.from_file(path)


def test_dropout_is_refused(tmp_path):
  with pytest.raises(BadInput, match='dropout 0.1 draws ids at random'):
    opened(tmp_path, trained(PIPELINES['gpt2'][0]), lambda s: s['model'].update(dropout=0.1))


# SentencePiece.


def sentencepiece(tmp_path, **kwargs):
  import sentencepiece
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_writer=model, model_type='bpe', vocab_size=400,
      normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True,
      minloglevel=2, **kwargs)
  (tmp_path / 'a.model').write_bytes(model.getvalue())
  return SentencePieceTokenizer.from_file(tmp_path / 'a.model')


@given(st.one_of(ADVERSARIAL, RUNS))
@settings(deadline=None, max_examples=50)
def test_sentencepiece_comes_back_and_its_bytes_are_exact(tmp_path_factory, text):
  text = text.replace('\u2581', '')  # the library's own sign for a blank
  made = _shared_sentencepiece(tmp_path_factory)
  (ids,) = made.encode([text])
  assert made.eod_id not in ids
  assert made.decode([*ids, made.eod_id]) == text
  assert made.token_bytes_V[ids].sum() == len(text.encode())


def _shared_sentencepiece(tmp_path_factory, cache=[]):
  if not cache:
    cache.append(sentencepiece(tmp_path_factory.mktemp('sp'), add_dummy_prefix=False))
  return cache[0]


def test_sentencepiece_ends_with_its_control_piece(tmp_path):
  made = sentencepiece(tmp_path)
  assert (made.eod_id, made.unknown_id, made.vocab_size) == (2, 0, 400)
  assert made.token_bytes_V[:3].tolist() == [0, 0, 0]
  assert 2 not in made.encode(['a</s>b </s>'])[0]


def test_sentencepiece_without_an_end_gets_one(tmp_path):
  made = sentencepiece(tmp_path, eos_id=-1)
  assert made.eod_id == 400 and made.vocab_size == 401
  # A user's symbol is spelt in text, so it cannot end documents either.
  made = sentencepiece(tmp_path, eos_id=-1, user_defined_symbols=['<|endoftext|>', '</s>'])
  assert made.eod_id == 400 and 400 not in made.encode(['</s><|endoftext|>'])[0]


def test_a_file_that_is_no_model_is_refused(tmp_path):
  (tmp_path / 'a.model').write_bytes(b'nothing')
  with pytest.raises(BadInput, match='a.model: not a SentencePiece model'):
    SentencePieceTokenizer.from_file(tmp_path / 'a.model')


# All kinds.


@pytest.fixture(params=['bytes', 'bpe', 'json', 'sentencepiece'])
def any_kind(request, tmp_path, bpe):
  return {'bytes': ByteTokenizer, 'bpe': lambda: bpe,
          'json': lambda: opened(tmp_path, trained(PIPELINES['llama'][0])),
          'sentencepiece': lambda: sentencepiece(tmp_path)}[request.param]()


def test_saved_and_pickled_tokenizers_are_the_same(any_kind, tmp_path):
  any_kind.save(tmp_path / 'saved')
  texts = ["it's the <|endoftext|> 東京", '', 'x' * 99]
  for other in (Tokenizer.load(tmp_path / 'saved'), pickle.loads(pickle.dumps(any_kind))):
    assert type(other) is type(any_kind) and other.meta() == any_kind.meta()
    np.testing.assert_array_equal(other.token_bytes_V, any_kind.token_bytes_V)
    for a, b in zip(other.encode(texts), any_kind.encode(texts), strict=True):
      assert a.dtype == np.int32 and a.tolist() == b.tolist()
  assert (tmp_path / 'saved/token_bytes.npy').exists()


def test_load_refuses_another_content(any_kind, tmp_path):
  any_kind.save(tmp_path / 'saved')
  model = next((f for f in (tmp_path / 'saved').iterdir() if f.suffix in ('.model', '.json')
                and f.name != 'meta.json'), tmp_path / 'saved/token_bytes.npy')
  data = bytearray(model.read_bytes())
  data[-3] ^= 1
  model.write_bytes(data)
  with pytest.raises(BadInput, match='fingerprint [0-9a-f]{32}, but meta.json says'):
    Tokenizer.load(tmp_path / 'saved')


def test_encode_keeps_the_order_of_texts(any_kind):
  texts = [document(i) for i in range(50)]
  for text, ids in zip(texts, any_kind.encode(texts), strict=True):
    assert ids.tolist() == any_kind.encode([text])[0].tolist()
