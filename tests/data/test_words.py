"""words.py: the same words whatever the tokenizer, and wherever the text is cut."""

import re

import numpy as np
import pytest
from corpus_cases import write

from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.overlap import words

TEXT = ('The cat, the CAT; héllo wörld_1 foo—bar “quoted” 日本語 text한국、x\u00a0y a。b 😀z\n\n42 '
        "4 don't (see) e.g. Ünder ünder ")
WORD = re.compile(r'[日本語한국😀]|[0-9a-zA-Z_éöÜü]+')  # what stands in TEXT
KINDS = ('bytes', 'bpe', 'sentencepiece', 'json')


def found(*chunks):
  """(hashes, documents) of byte strings."""
  parts = list(words.hashes(np.frombuffer(c, np.uint8) for c in chunks))
  return tuple(np.concatenate(x) for x in zip(*parts))


def lower(text):
  return ''.join(c.lower() if c.isascii() else c for c in text)


def test_words_are_told_apart_as_a_slow_reference_tells_them():
  hashes, _ = found((TEXT * 3).encode())
  expected = [lower(w) for w in WORD.findall(TEXT * 3)]
  assert len(hashes) == len(expected)
  of = dict(zip(expected, hashes.tolist()))
  assert [of[w] for w in expected] == hashes.tolist()
  assert len(set(of.values())) == len(of)


@pytest.mark.parametrize('size', [1, 2, 3, 5, 64])
def test_where_the_text_is_cut_does_not_matter(size):
  data = b'\xff'.join([TEXT.encode(), b'', b'one', TEXT.encode()[:-1]]) + b'\xff'
  whole = found(data)
  parts = found(*(data[i:i + size] for i in range(0, len(data), size)))
  for a, b in zip(whole, parts):
    np.testing.assert_array_equal(a, b)
  assert sorted(set(whole[1].tolist())) == [0, 2, 3], 'documents, the empty one counted'


def test_a_word_without_an_end_is_cut_and_takes_no_memory(monkeypatch):
  monkeypatch.setattr(words, '_LONGEST', 1000)
  hashes, _ = found(*[b'a' * 400] * 10, b' b')
  assert 2 <= len(hashes) <= 6


@pytest.mark.parametrize('kind', KINDS)
def test_a_store_has_the_words_of_its_text_whatever_the_tokenizer(tmp_path, kind):
  documents = [f'{TEXT} number {i}' for i in range(60)]
  write(tmp_path / 'in', {'law': {'train': documents}})
  config = PrepareConfig(tokenizer='bytes')
  if kind == 'bpe':
    config = PrepareConfig(vocab_size=300)
  elif kind == 'sentencepiece':
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(tmp_path / 'sp'), vocab_size=330,
        byte_fallback=True, normalization_rule_name='identity', minloglevel=2, model_type='bpe',
        remove_extra_whitespaces=False)
    config = PrepareConfig(tokenizer=kind, tokenizer_path=str(tmp_path / 'sp.model'))
  elif kind == 'json':  # whose ids say nothing alone: decoded document by document
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    engine = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    engine.train_from_iterator(documents, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=['[UNK]'], show_progress=False))
    engine.save(str(tmp_path / 'wp.json'))
    config = PrepareConfig(tokenizer=kind, tokenizer_path=str(tmp_path / 'wp.json'))
  store = prepare(tmp_path / 'in', tmp_path / 'out', config, lambda line: None)
  hashes, of = found(*(t.tobytes() for t in words.texts(store, 'law', 'train')))
  expected = found(*(d.encode() + b'\xff' for d in documents))
  np.testing.assert_array_equal(hashes, expected[0])
  np.testing.assert_array_equal(of, expected[1])
  assert (store.tokenizer().spelling_V() is None) == (kind == 'json')
