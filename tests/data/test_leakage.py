"""leakage.py: evaluation text in train text, against a slow reference and as planted."""

import re
import types

import numpy as np
import orjson
import pytest
from corpus_cases import small, snapshot, write

from demix.data.corpus.card import text as card_text
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.overlap import leakage, words
from demix.data.tokens.store import CARD, TokenStore
from demix.eval import protocol, results

BYTES = PrepareConfig(tokenizer='bytes')


def quiet(line):
  pass


def documents(rng, count, low, high, vocabulary):
  """Lists of words."""
  return [[f'w{x}' for x in rng.integers(0, vocabulary, rng.integers(low, high))]
          for _ in range(count)]


def chunks(texts, size=700):
  data = b''.join(' '.join(t).encode() + b'\xff' for t in texts)
  return words.hashes(np.frombuffer(data[i:i + size], np.uint8)
                      for i in range(0, len(data), size))


@pytest.mark.parametrize('length', [1, 3, 13])
def test_shares_are_those_of_a_slow_reference(length):
  rng = np.random.default_rng(length)
  tested = {n: documents(rng, 60, 0, 40, 9) for n in ('a', 'b')}
  train = documents(rng, 25, 0, 40, 9)
  train += [d[3:] + ['x'] for d in tested['b'][::7]]
  held = leakage.Held()
  for name, texts in tested.items():
    held.add(name, leakage.runs(chunks(texts), length))
  held.close()
  runs = lambda d: [tuple(d[i:i + length]) for i in range(len(d) - length + 1)]
  seen = {r for d in train for r in runs(d)}
  found = held.overlap(leakage.runs(chunks(train), length))
  assert held.sampled == 1 and 0 < found['b'][0] <= 1
  for name, texts in tested.items():
    hits = [[r in seen for r in runs(d)] for d in texts if runs(d)]
    assert held.totals[name] == sum(map(len, hits))
    assert found[name][0] == pytest.approx(np.mean(np.concatenate(hits)), abs=1e-12)
    assert found[name][1] == pytest.approx(np.mean([np.mean(h) >= 0.5 for h in hits]), abs=1e-12)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """1 % of the test documents of law stand, in other dress, in the train text of med."""
  folder, rng = tmp_path_factory.mktemp('planted'), np.random.default_rng(0)
  test, train = documents(rng, 1500, 40, 80, 5000), documents(rng, 1000, 40, 80, 5000)
  for place, copied in zip(range(0, 1000, 60), test[::100]):
    dressed = ',\n'.join(copied).upper()
    train[place] = [*train[place][:20], f'({dressed}).', *train[place][20:]]
  line = lambda texts: [' '.join(t) for t in texts]
  write(folder / 'in', {
      'law': {'train': line(documents(rng, 50, 40, 80, 5000)), 'test': line(test)},
      'med': {'train': line(train), 'valid': line(documents(rng, 50, 40, 80, 5000))}})
  return prepare(folder / 'in', folder / 'out', BYTES, quiet)


@pytest.mark.parametrize('most', [1 << 22, 30_000])
def test_a_planted_overlap_of_one_percent_is_found(planted, most):
  found = leakage.leakage(planted, most)
  assert found == planted.card['leakage'] or most == 30_000
  assert (found['sampled'] == 1) == (most > 30_000) and found['sampled'] >= 0.2
  [pair] = found['overlap']
  assert (pair['train'], pair['evaluation']) == ('med/train', 'law/test')
  assert abs(pair['runs'] - 0.01) <= 0.002 and abs(pair['documents'] - 0.01) <= 0.002
  assert found['evaluation']['law/test']['runs'] > 60_000
  assert found['evaluation'].keys() == {'law/test', 'med/valid'}


def test_the_card_names_the_pair(planted):
  assert re.search(r'\n  law/test in med/train: (0\.9|1\.[01])% of its runs, 1\.0% of its doc',
                   card_text(planted.card))
  clean = planted.card | {'leakage': planted.card['leakage'] | {'overlap': []}}
  assert 'stand in train text: none' in card_text(clean)
  old = {k: v for k, v in clean.items() if k not in ('leakage', 'vocabulary')}
  assert 'stand in train text' not in card_text(old)


def test_tables_mark_a_domain_whose_text_was_trained_on(planted):
  loaded = {'dense': types.SimpleNamespace(domains=('law', 'med')),
            'own': types.SimpleNamespace(domains=('law',))}
  found = protocol.leaks(loaded, planted, ('law', 'med'), 'test')
  [entry] = found
  assert (entry['run'], entry['domain'], entry['train']) == ('dense', 'law', 'med')
  assert protocol.leaks(loaded, planted, ('law',), 'valid') == []
  row = lambda d: {'run': 'dense', 'mix': 'none', 'prior': None, 'posterior': None, 'domain': d,
                   'split': 'test', 'perplexity': 2.0}
  runs = {'dense': {}}
  made = results.results(runs, [row('law'), row('med')], seed=0, heldout=[], leakage=found)
  assert made['leakage'] == found
  lines = results.table(made).splitlines()
  assert lines[2].split() == ['law*', '2.000'] and lines[3].split() == ['med', '2.000']
  made['rows'] = [r | {'tokens': 9, 'n': 1} for r in made['rows']]
  [said] = results.remarks(made).splitlines()
  assert said.startswith('* law: ') and re.search(r': 1\.\d% in med$', said)
  assert 'leakage' not in results.results(runs, [], seed=0, heldout=[])


def test_a_store_without_evaluation_sets_has_no_overlap(tmp_path):
  write(tmp_path / 'in', {'law': {'train': ['a b c ' * 20]}})
  card = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, quiet).card
  assert card['leakage']['overlap'] == [] and card['leakage']['evaluation'] == {}


def test_a_store_of_before_gets_what_its_card_lacks_and_nothing_else(tmp_path):
  small(tmp_path / 'in')
  made = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, quiet)
  old = {k: v for k, v in made.card.items() if k not in ('leakage', 'vocabulary')}
  (tmp_path / 'out' / CARD).write_bytes(orjson.dumps(old))
  before, said = snapshot(tmp_path / 'out'), []
  again = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, said.append)
  after = snapshot(tmp_path / 'out')
  assert 'nothing to do' in said[0] and again.card == made.card
  assert TokenStore.open(tmp_path / 'out').card == made.card
  assert {n for n in after if after[n] != before.get(n)} == {CARD}


def test_what_nobody_asked_for_changes_nothing(tmp_path):
  """The fingerprint of this corpus from before there were leakage, vocabulary and placeholders."""
  small(tmp_path / 'in')
  store = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, quiet)
  assert store.fingerprint == '7da7d638b48c145e6a07b8ad57b7e816'
  assert 'anonymise' not in store.card['config']
  assert 'anonymised' not in store.card['domains']['law']['splits']['train']
