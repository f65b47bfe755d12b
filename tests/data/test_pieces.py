import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tokenizers as hf
from corpus_cases import document
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import ADVERSARIAL, PIPELINES, RUNS, TEXTS, opened, trained, whole
from tokenizers import models, pre_tokenizers

from demix.data.tokens import pieces
from demix.data.tokens.tokenizer import BpeTokenizer


@pytest.fixture(scope='module')
def bpe():
  return BpeTokenizer.train(TEXTS, 320)


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


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
  """Merges ba, cb, dc, …: in 'zyx…a' the last letter decides how all before it pair up; and sa."""
  pairs = [(chr(c + 1), chr(c)) for c in range(ord('a'), ord('z'))] + [('s', 'a')]
  vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in pairs]
  engine = hf.Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, pairs))
  engine.pre_tokenizer = PIPELINES['gpt2'][0]
  engine.decoder = hf.decoders.ByteLevel()
  return opened(tmp_path_factory.mktemp('chain'), engine)


@pytest.mark.parametrize('unit', ['zyxwvutsrqponmlkjihgfedcba', "..'sa", "sa''sa", 'gfedcba.'])
def test_runs_are_not_joined_where_the_ids_would_differ(chain, unit):
  """The end of a window far away changes its ids here, and so does where a contraction starts."""
  text = unit * 12
  encode = lambda t: np.array(whole(chain, t), np.int32)
  for window in range(8, 90):
    assert pieces.encode_run(text, encode, chain.token_bytes_V, window).tolist() == \
        whole(chain, text), window


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
  texts = [text, '', 'short', words, 'abc ' * 20_000 + letters]
  for ids, text in zip(bpe.encode(texts), texts, strict=True):
    assert ids.tolist() == whole(bpe, text)


def test_encoding_a_document_takes_memory_by_the_batch():
  """6 MB of words and an unbroken run of 2 MB; the library alone takes over a gigabyte."""
  code = ('import re\nfrom demix.data.tokens.tokenizer import BpeTokenizer\n'
          'made = BpeTokenizer.train(["the cat sat"] * 9, 270)\n'
          'made.encode(["the cat " * 750_000 + "x" * 2_000_000])\n'
          'print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])')
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert int(run.stdout) < 200_000


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


WHITE = st.lists(st.sampled_from(['a', 'é', ' ', '\n', '\u180e', '\xa0', '\x0b', '\u3000', '.']),
                 max_size=30).map(''.join)


@given(st.one_of(ADVERSARIAL, RUNS, WHITE))
@settings(deadline=None)
def test_pieces_that_are_remembered_lie_between_all_cuts(text):
  cuts = [0, *(m.start() for m in pieces.BEFORE_WHITE.finditer(text)), len(text)]
  assert pieces._PIECES.findall(text) == [text[a:b] for a, b in pairwise(cuts) if a < b]


@given(st.lists(st.one_of(ADVERSARIAL, RUNS, WHITE, st.text("the cat's. ", max_size=150)),
                max_size=6))
@settings(deadline=None, max_examples=200)
def test_what_is_remembered_has_the_ids_of_the_whole(bpe, texts):
  small = pieces.Remembered(bpe._library, bpe.token_bytes_V, held=2000)
  for _ in range(2):
    for found, text in zip(small(texts), texts, strict=True):
      assert found.dtype == np.int32 and found.tolist() == whole(bpe, text)
  assert all(len(piece) <= pieces.LONGEST for piece in small._ids)


def test_bytes_that_a_vocabulary_lacks_leave_words_apart(tmp_path):
  """Nothing is known of how many bytes the ids of a text stand for."""
  alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set('xy'))
  engine = hf.Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
  engine.pre_tokenizer, engine.decoder = PIPELINES['gpt2'][0], hf.decoders.ByteLevel()
  made = opened(tmp_path, engine)
  texts = ['ab x cd xy yx e', 'x', ' x', 'x x', 'a x']
  for found, text in zip(made.encode(texts), texts, strict=True):
    assert found.tolist() == whole(made, text)
