"""Texts and pipelines that the tests of tokenizers share."""

import json

import tokenizers as hf
from corpus_cases import document
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from demix.data.tokens import pieces
from demix.data.tokens.tokenizer import JsonTokenizer

TEXTS = [document(i, 30) for i in range(200)] + ["it's    we'll\t\tthey'd\r\n\n  x=1;  y=22"] * 3
LLAMA = pieces._BLANK_ONLY[0]

# Fragments that pre-tokenizers treat in ways of their own, mixed with arbitrary text.
FRAGMENTS = ["'s", "'", "'ll", "''", ' ', '  ', '\n', '\r\n', '\t', '\u00a0', '\u2003', '\u180e',
             '\u3000', '\u200b', '\x85', '\x1c', 'a', 'the', 'cat', 'é', 'e\u0301', '東', '京。',
             '😀', '👩‍👩‍👧', '1', '42', '.', ';;', '<|endoftext|>', '\x00', '\U0010ffff', 'สวัสดี',
             'мат']
ADVERSARIAL = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=60).map(
    ''.join)
RUNS = st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 60)), max_size=12).map(
    lambda runs: ''.join(f * n for f, n in runs))

PIPELINES = {
    'gpt2': (pre_tokenizers.ByteLevel(add_prefix_space=False), True, True),
    'llama': (pre_tokenizers.Sequence([
        pre_tokenizers.Split(hf.Regex(LLAMA), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), True, False),
    'prefix': (pre_tokenizers.ByteLevel(add_prefix_space=True), False, False),
    'no regex': (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False, False),
    'digits': (pre_tokenizers.Sequence([
        pre_tokenizers.Digits(True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)]), False, False),
    'blanks kept': (pre_tokenizers.Sequence([
        pre_tokenizers.Split(' ', 'merged_with_previous'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), False, False),
}


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
