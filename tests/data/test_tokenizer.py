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
from tokenizer_cases import ADVERSARIAL, PIPELINES, RUNS, TEXTS, opened, trained
from tokenizers import models, pre_tokenizers

from demix.data.tokens.tokenizer import (
  BpeTokenizer,
  ByteTokenizer,
  JsonTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from demix.errors import BadInput


@pytest.fixture(scope='module')
def bpe():
  return BpeTokenizer.train(TEXTS, 320)


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
  code = ('import sys\nfrom demix.data.tokens.tokenizer import BpeTokenizer\nimport pickle\n'
          'print(BpeTokenizer.train(pickle.load(sys.stdin.buffer), 320).fingerprint)')
  for seed, texts in (('1', TEXTS), ('2', TEXTS[::-1])):
    run = subprocess.run([sys.executable, '-c', code], input=pickle.dumps(texts),
                         capture_output=True, check=True, env={'PYTHONHASHSEED': seed})
    assert run.stdout.decode().strip() == bpe.fingerprint
  assert BpeTokenizer.train(TEXTS[1:50], 320).fingerprint != bpe.fingerprint


def test_training_on_megabytes_without_a_blank_ends():
  """Merging inside one word is quadratic in the library: minutes, before words were cut."""
  code = ('from demix.data.tokens.tokenizer import BpeTokenizer\n'
          'text = "".join(chr(97 + i * i * 7 % 26) for i in range(1_500_000))\n'
          'assert BpeTokenizer.train([text, " " * 1_500_000], 2000).vocab_size > 256')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


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
  vocabulary = {f'<0x{b:02X}>': b for b in range(256)}
  vocabulary |= {'<unk>': 256, '▁': 257, 'é': 258, 'x': 259}
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
    with pytest.raises(BadInput, match=rf'^{tmp_path}/tokenizer\.json: {why}'):
      JsonTokenizer.from_file(path)


ADDED = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
         'special': True}


def spec_of(model, *added):
  engine = hf.Tokenizer(model)
  engine.pre_tokenizer = pre_tokenizers.Whitespace()
  return json.loads(engine.to_str()) | {'added_tokens': [
      {'id': i, 'content': content, **ADDED} for i, content in added]}


def unigram(**change):
  spec = spec_of(models.Unigram([('a', -1.0), ('b', -2.0)], 0))
  return spec | {'model': spec['model'] | change}


@pytest.mark.parametrize('spec, why', [
    (spec_of(models.WordLevel({'a': 0, 'u': 1}, 'u'), (70000, '<x>')), 'has id 70000, but is read'),
    (spec_of(models.WordLevel({'a': 0, 'u': 1}, 'u'), (1, '<x>')), 'has id 1, but is read as 2'),
    (spec_of(models.WordLevel({'a': 0, 'u': 1}, 'u'), (2, '<x>'), (2, '<y>')), 'is read as 3'),
    ({'model': {'type': 'WordLevel', 'vocab': {'a': 0, 'b': 0, 'u': 1}, 'unk_token': 'u'}},
     'both have id 0'),
    (spec_of(models.WordLevel({'a': 1 << 31, 'u': 1}, 'u')), 'has id 2147483648: ids are below'),
    (spec_of(models.WordLevel({'a': 0}, 'u')), "lacks its unknown token 'u'"),
    (spec_of(models.WordPiece({'a': 0}, unk_token='u')), "lacks its unknown token 'u'"),
    (spec_of(models.BPE({'a': 0}, [], unk_token='u')), 'cannot encode every text'),
    (unigram(unk_id=None), 'lacks its unknown token'),
    ({'model': {'type': 'WordLevel', 'vocab': {'a': -1}, 'unk_token': 'a'}}, 'not a tokenizer'),
])
def test_ids_that_cannot_be_are_refused(tmp_path, spec, why):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec))
  with pytest.raises(BadInput, match=why) as error:
    JsonTokenizer.from_file(path)
  assert str(path) in str(error.value)


def test_ids_with_a_gap_in_the_vocabulary_are_read(tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec_of(models.WordLevel({'a': 7, 'u': 1}, 'u'))))
  made = JsonTokenizer.from_file(path)
  assert made.vocab_size == 9 and made.encode(['a b'])[0].tolist() == [7, 1]


def test_dropout_is_refused(tmp_path):
  with pytest.raises(BadInput, match=r'dropout 0\.1 draws ids at random'):
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


@pytest.fixture(scope='module')
def without_prefix(tmp_path_factory):
  return sentencepiece(tmp_path_factory.mktemp('sentencepiece'), add_dummy_prefix=False)


@given(st.one_of(ADVERSARIAL, RUNS))
@settings(deadline=None, max_examples=50)
def test_sentencepiece_comes_back_and_its_bytes_are_exact(without_prefix, text):
  text, made = text.replace('\u2581', ''), without_prefix  # the library's own sign for a blank
  (ids,) = made.encode([text])
  assert made.eod_id not in ids
  assert made.decode([*ids, made.eod_id]) == text
  assert made.token_bytes_V[ids].sum() == len(text.encode())


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
  with pytest.raises(BadInput, match=r'a\.model: not a SentencePiece model'):
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
  with pytest.raises(BadInput, match=r'fingerprint [0-9a-f]{32}, but meta.json says'):
    Tokenizer.load(tmp_path / 'saved')


def test_nothing_is_no_ids_and_no_text(any_kind):
  (ids,) = any_kind.encode([''])
  assert ids.tolist() == [] and any_kind.encode([]) == []
  assert any_kind.decode([]) == any_kind.decode([any_kind.eod_id]) == ''


def test_encode_keeps_the_order_of_texts(any_kind):
  texts = [document(i) for i in range(50)]
  for text, ids in zip(texts, any_kind.encode(texts), strict=True):
    assert ids.tolist() == any_kind.encode([text])[0].tolist()


def test_spellings_make_the_text(any_kind):
  for text in TEXTS[:9]:
    ids = any_kind.encode([text])[0]
    spelt = b''.join(any_kind.spelling(int(i)) for i in ids).decode()
    assert spelt.lstrip() == any_kind.decode(ids).lstrip() and text.split() == spelt.split()
  assert any_kind.spelling(any_kind.eod_id) == b''


def test_spellings_of_word_pieces_have_the_blanks_between_words(tmp_path):
  engine = hf.Tokenizer(hf.models.WordPiece(
      {'[UNK]': 0, 'clus': 1, '##ter': 2, '##s': 3, 'cat': 4}, unk_token='[UNK]'))
  engine.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  engine.decoder = hf.decoders.WordPiece()
  made = opened(tmp_path, engine)
  ids = made.encode(['clusters cat clus'])[0]
  assert b''.join(made.spelling(int(i)) for i in ids).split() == [b'clusters', b'cat', b'clus']
  assert made.token_bytes_V[1:5].tolist() == [4, 3, 1, 3]
