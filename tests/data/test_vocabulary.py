"""vocabulary.py: overlap of the most frequent words, against a slow reference."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from corpus_cases import write

from demix.data.corpus.card import text as card_text
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.overlap import vocabulary
from demix.data.tokens.tokenizer import ByteTokenizer


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Three domains; word i of a domain stands there 3 + n - i times, so ranks are without ties."""
  folder = tmp_path_factory.mktemp('vocabulary')
  lists = {'a': [f'w{i}' for i in range(60)], 'b': [f'w{i * 2}' for i in range(60)],
           'c': [f'other{i}' for i in range(40)]}
  domains = {}
  for name, known in lists.items():
    flat = [w for i, w in enumerate(known) for _ in range(3 + len(known) - i)]
    np.random.default_rng(0).shuffle(flat)
    domains[name] = {'train': [' '.join(flat[i:i + 50]) for i in range(0, len(flat), 50)],
                     'valid': ['a few words']}
  write(folder / 'in', domains)
  store = prepare(folder / 'in', folder / 'out', PrepareConfig(vocab_size=300), lambda line: None)
  return store, folder / 'in'


def reference(folder, top):
  words = {}
  for path in sorted(folder.glob('*/train.jsonl')):
    texts = [json.loads(line)['text'] for line in path.read_text().splitlines()]
    words[path.parent.name] = Counter(re.findall(r'\w+', ' \n'.join(texts).lower()))
  k = min([top, *map(len, words.values())])
  tops = {d: {w for w, _ in c.most_common(k)} for d, c in words.items()}
  return k, {a: {b: len(tops[a] & tops[b]) / k for b in tops} for a in tops}, words


@pytest.mark.parametrize('top', [10, 35, 10_000])
def test_overlap_is_that_of_a_slow_reference(made, top):
  store, folder = made
  k, overlap, words = reference(folder, top)
  found = vocabulary.vocabulary(store, top)
  assert found == {'top': k, 'overlap': overlap, 'distinct': {d: len(c) for d, c in words.items()}}
  assert found['overlap']['a']['b'] == found['overlap']['b']['a'] > 0
  assert found['overlap']['a']['c'] == 0 and found['overlap']['a']['a'] == 1
  counts = vocabulary.counts(store, 'a')[1].tolist()
  assert counts == sorted(words['a'].values(), reverse=True)


def test_the_card_has_it_as_a_matrix(made):
  store, _ = made
  assert store.card['vocabulary'] == vocabulary.vocabulary(store)
  lines = [line.split() for line in card_text(store.card).splitlines()]
  at = lines.index(['a', 'b', 'c'])
  assert lines[at + 1][:2] == ['a', '100'] and lines[at + 3] == ['c', '0', '0', '100']
  many = {f'd{i:02}': {f'd{j:02}': 1.0 if i == j else 0.1 for j in range(20)} for i in range(20)}
  card = store.card | {'vocabulary': {'top': 5, 'distinct': {}, 'overlap': many}}
  assert max(map(len, card_text(card).splitlines())) < 200


def test_a_long_split_is_looked_at_in_evenly_spaced_pieces(made):
  assert vocabulary.spans(100, 200) == [(0, 100)]
  parts = vocabulary.spans(10**9, 3200, 32)
  assert sum(b - a for a, b in parts) == 3200 and parts[0][0] == 0
  assert all(a < b <= c for (a, b), (c, _) in itertools.pairwise(parts))
  assert 10**9 - 200 < parts[-1][1] <= 10**9
  some = vocabulary.counts(made[0], 'a', ids=1024)[1].sum()
  assert 0 < some < vocabulary.counts(made[0], 'a')[1].sum()


def test_tokens_per_byte_of_any_tokenizer(made):
  store, _ = made
  assert vocabulary.tokens_per_byte(ByteTokenizer(), store, 'a', 'train') == 1
  entry = store.card['domains']['b']['splits']['train']
  own = (entry['tokens'] - entry['documents']) / entry['bytes']  # without ends of documents
  assert vocabulary.tokens_per_byte(store.tokenizer(), store, 'b', 'train') == pytest.approx(own)
