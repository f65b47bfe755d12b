"""batches.py: batch t is a function of (seed, t); shares and epochs are as reported."""

import math
import shutil
import threading
from collections import Counter

import corpus
import numpy as np
import pytest
from cases import some

from demix.data.sampling.batches import Batches, DataConfig, Turns
from demix.data.tokens.packing import sequences
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

NAMES = {'tokens_BL': 'int32', 'targets_BL': 'int32', 'weights_BL': 'float32',
         'segments_BL': 'int32', 'positions_BL': 'int32', 'domain_B': 'int32'}
WEIGHTS = {'legal': 1, 'code': 0.5, 'verse': 0, 'kitchen': 2.3}
KINDS = {
    'balanced': {},
    'proportional': {'sampling': 'proportional'},
    'weights': {'sampling': 'weights', 'weights': WEIGHTS},
    'document': {'packing': 'document'},
    'domain token': {'domain_token': True},
    'one domain': {'domains': ('verse',)},
}


@pytest.fixture(scope='module')
def store(stores, tmp_path_factory):
  """A copy of the store: indices of document packing are written into it."""
  folder = tmp_path_factory.mktemp('batches')
  return TokenStore.open(shutil.copytree(stores.bytes, folder / 'store'))


def config(**changes) -> DataConfig:
  made = DataConfig(**{'domains': corpus.DOMAINS, 'sequence_length': 32, 'batch_size': 8} | changes)
  made.check()
  return made


def make(store, seed=0, **changes) -> Batches:
  made = config(**changes)
  symbols = tuple(range(1000, 1000 + len(made.domains))) if made.domain_token else None
  return Batches(store, made, seed, symbols=symbols)


def same(a, b):
  assert list(a) == list(b)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def text(tokens, targets) -> bytes:
  """First input and all targets of a row; a domain symbol and its target are left out."""
  skip = int(tokens[0] >= 1000)
  return tokens[skip:skip + 1].tobytes() + targets[skip:].tobytes()


def texts_of(store, domain, **changes) -> list[bytes]:
  """The tokens of every sequence of a domain, which tell the sequences apart."""
  made = config(**changes)
  source = sequences(store, domain, 'train', made.body_length, made.packing)
  found = [text(source[i]['tokens'], source[i]['targets']) for i in range(len(source))]
  assert len(set(found)) == len(found), 'two sequences are alike: this test cannot tell them apart'
  return found


def drawn(batches, count) -> dict:
  """{domain index: its rows in the order they were drawn} in the first `count` batches."""
  rows = {}
  for t in range(count):
    for domain, row in rows_of(batches[t]):
      rows.setdefault(domain, []).append(row)
  return rows


def rows_of(batch):
  """[(domain index, text)] of the rows of a batch."""
  return [(d, text(*row)) for d, *row in zip(
      batch['domain_B'].tolist(), batch['tokens_BL'], batch['targets_BL'])]


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_is_the_contract(store, kind):
  batch = make(store, **KINDS[kind])[3]
  assert {n: x.dtype.name for n, x in batch.items()} == NAMES
  assert {n: x.shape for n, x in batch.items()} == {
      n: (8, 32) if n.endswith('BL') else (8,) for n in NAMES}
  assert set(np.unique(batch['weights_BL'])) <= {0, 1}
  assert np.all(batch['weights_BL'][batch['segments_BL'] == 0] == 0)


@pytest.mark.parametrize('kind', KINDS)
def test_batch_t_depends_on_seed_and_t_only(store, kind):
  batches = make(store, **KINDS[kind])
  order = np.random.default_rng(0).permutation(40).tolist()
  by_number = {t: batches[t] for t in order}
  from_start, from_17 = batches.iterate(0), make(store, **KINDS[kind]).iterate(17)
  for t in range(40):
    same(next(from_start), by_number[t])
    if t >= 17:
      same(next(from_17), by_number[t])
  assert len({by_number[t]['targets_BL'].tobytes() for t in order}) == 40, 'batches repeat'
  another = make(store, seed=1, **KINDS[kind])
  assert all(np.any(another[t]['targets_BL'] != by_number[t]['targets_BL']) for t in range(40))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shares', [[(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 3, 5), (1, 2, 4, 6, 7)]])
def test_processes_read_their_rows_of_the_same_batches_and_no_others(store, kind, shares):
  whole = make(store, **KINDS[kind])
  made = config(**KINDS[kind])
  symbols = tuple(range(1000, 1000 + len(made.domains))) if made.domain_token else None
  for rows in shares:
    part = Batches(store, made, 0, symbols=symbols, rows=rows)
    for t in (0, 7, 31):
      same(part[t], {name: x[list(rows)] for name, x in whole[t].items()})
    same(next(part.iterate(3)), part[3])
    assert part.epochs(5) == whole.epochs(5)


def test_a_process_opens_no_row_of_another(store, monkeypatch):
  read = []
  from demix.data.sampling import batches
  row, here = batches.domain_row, threading.get_ident()

  def seen(record, place, symbol):
    if threading.get_ident() == here:  # what earlier tests read ahead is none of it
      read.append(place)
    return row(record, place, symbol)
  monkeypatch.setattr(batches, 'domain_row', seen)
  part = Batches(store, config(), 0, rows=(0, 1, 2, 3))  # of the first two domains
  part[5]
  assert read == [0, 0, 1, 1]


def test_balanced_batches_are_expert_major_with_equal_rows_of_their_own_domain(store):
  batches = make(store)
  own = [set(texts_of(store, d)) for d in corpus.DOMAINS]
  for t in range(50):
    batch = batches[t]
    assert batch['domain_B'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(row in own[domain] for domain, row in rows_of(batch))


@pytest.mark.parametrize('kind', some(
    ['balanced', 'proportional', 'weights', 'document'], ['balanced', 'document']))
def test_a_domain_wraps_with_a_new_shuffle_and_shows_each_sequence_once_an_epoch(store, kind):
  changes = KINDS[kind]
  batches, rounds = make(store, **changes), 0
  rows = drawn(batches, 300)
  for place, domain in enumerate(corpus.DOMAINS):
    if place not in rows:
      assert (kind, domain) == ('weights', 'verse')
      continue
    everything = texts_of(store, domain, **changes)
    seen = rows[place]
    epochs = [seen[i:i + len(everything)] for i in range(0, len(seen), len(everything))]
    whole = [e for e in epochs if len(e) == len(everything)]
    for epoch in whole:
      assert sorted(epoch) == sorted(everything)
    assert len({tuple(e) for e in whole}) == len(whole), 'an epoch has the order of another'
    assert [everything] != whole[:1], 'not shuffled'
    assert len(set(epochs[-1])) == len(epochs[-1]), 'a sequence twice in the last epoch'
    rounds = max(rounds, len(whole))
  assert rounds >= 4, 'too few epochs to tell'


@pytest.mark.parametrize('shares', [
    (1, 1, 1, 1), (1, 2, 3, 4), (0.1, 0.2, 0.3, 0.7), (1000, 3), (1, 2.999, 5), (1, 1, 97, 1),
    (337, 56, 92, 34), (0.25, 0, 1e-3), (7,)])
def test_turns_give_every_source_its_share_to_one_row_after_any_number_of_rows(shares):
  turns, counts, total = Turns(shares), [0] * len(shares), math.fsum(shares)
  for k in range(5000):
    source, before = turns[k]
    assert before == counts[source]
    counts[source] += 1
    for count, share in zip(counts, shares):
      assert abs(count - (k + 1) * share / total) <= 1 + 1e-6
  assert all((c == 0) == (s == 0) for c, s in zip(counts, shares))
  for k in (10**6, 10**9 + 7, 10**12 + 12345):  # errors do not grow
    source, before = turns[k]
    assert abs(before - k * shares[source] / total) <= 1 + 1e-3


@pytest.mark.parametrize('kind', ['proportional', 'weights'])
def test_rows_and_reported_epochs_follow_the_shares(store, kind):
  batches = make(store, **KINDS[kind])
  sizes = {d: len(texts_of(store, d)) for d in corpus.DOMAINS}
  shares = sizes if kind == 'proportional' else WEIGHTS
  for count in (1, 3, 100):
    rows, epochs = drawn(batches, count), batches.epochs(count)
    for place, domain in enumerate(corpus.DOMAINS):
      expected = 8 * count * shares[domain] / sum(shares.values())
      assert abs(len(rows.get(place, ())) - expected) <= 1
      assert abs(len(rows.get(place, ())) / sizes[domain] - epochs[domain]) <= 1 / sizes[domain]
  assert (batches.epochs(100)['verse'] == 0) == (kind == 'weights')


def test_epochs_of_balanced_batches_are_exact(store):
  sizes = {d: len(texts_of(store, d)) for d in corpus.DOMAINS}
  assert len(set(sizes.values())) == 4
  for count in (0, 1, 250):
    assert make(store).epochs(count) == {d: 2 * count / n for d, n in sizes.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_names_of_domains_change_labels_only(stores, store, tmp_path, kind):
  # legal code verse kitchen: another name for each, so that the alphabet's order is turned around.
  names = dict(zip(sorted(corpus.DOMAINS), ('z', 'y', 'x', 'w')))
  text = corpus.write(tmp_path / 'text', names)
  renamed = TokenStore.open(corpus.store(text, tmp_path / 'store', names, tokenizer='bytes'))
  changes = dict(KINDS[kind])
  a = make(store, **changes)
  if 'weights' in changes:
    changes['weights'] = {names[d]: w for d, w in WEIGHTS.items()}
  b = make(renamed, **changes | {'domains': tuple(names[d] for d in a.domains)})
  assert sorted(a.domains) != sorted(a.domains, key=names.get) or len(a.domains) == 1
  for t in range(30):
    same(a[t], b[t])
  assert {names[d]: e for d, e in a.epochs(30).items()} == b.epochs(30)


def test_the_order_of_domains_is_the_configs(store):
  batches = make(store, domains=('verse', 'legal'))
  own = [set(texts_of(store, d)) for d in ('verse', 'legal')]
  rows = rows_of(batches[0])
  assert [domain for domain, _ in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
  assert all(row in own[domain] for domain, row in rows)


def test_a_domain_symbol_starts_each_block_and_is_never_scored(store):
  batches = make(store, domain_token=True)
  everything = [Counter(texts_of(store, d, domain_token=True)) for d in corpus.DOMAINS]
  seen = [Counter() for _ in corpus.DOMAINS]
  steps = max(len(e) for e in everything) // 2 + 1
  for t in range(steps):
    batch = batches[t]
    np.testing.assert_array_equal(batch['tokens_BL'][:, 0], 1000 + batch['domain_B'])
    assert np.all(batch['tokens_BL'][:, 1:] <= 256) and np.all(batch['targets_BL'] <= 256)
    assert np.all(batch['weights_BL'][:, 0] == 0) and np.all(batch['weights_BL'][:, 1:] == 1)
    # Behind the symbol: the block as it is without one, a token shorter.
    np.testing.assert_array_equal(batch['tokens_BL'][:, 2:], batch['targets_BL'][:, 1:-1])
    np.testing.assert_array_equal(batch['targets_BL'][:, 0], batch['tokens_BL'][:, 1])
    np.testing.assert_array_equal(batch['positions_BL'], np.tile(np.arange(32), (8, 1)))
    assert np.all(batch['segments_BL'] == 1)
    for domain, row in rows_of(batch):
      seen[domain][row] += 1
  assert all(s >= e for s, e in zip(seen, everything)), 'a sequence of a domain was left out'


@pytest.mark.parametrize('changes', [{}, {'sampling': 'proportional'}])
def test_a_domain_with_fewer_sequences_than_a_batch_is_refused_with_both_numbers(store, changes):
  size = len(texts_of(store, 'kitchen'))
  share = 1 / 4 if not changes else size / sum(len(texts_of(store, d)) for d in corpus.DOMAINS)
  # The smallest batch that asks for a row more than there are (they are the same sequences).
  batch = next(b for b in range(8, 10**5, 4) if round(b * share) > size)
  with pytest.raises(BadInput, match=rf'kitchen/train: {size} sequences of 32 tokens, one batch '
                                     rf'needs {round(batch * share)}: add text'):
    make(store, batch_size=batch, domains=('kitchen', 'legal', 'code', 'verse'), **changes)
  if not changes:  # one row less a domain is not refused
    assert make(store, batch_size=batch - 4)[0]['tokens_BL'].shape == (batch - 4, 32)


def test_a_domain_of_one_sequence_and_one_without_a_share_can_be_trained_on(store):
  only = make(store, sequence_length=1000, batch_size=2, domains=('kitchen', 'code'))
  assert only.lengths == {'kitchen': 1, 'code': 1}
  same(only[0], only[7])
  none = make(store, sequence_length=1500, batch_size=1, sampling='weights',
              domains=('kitchen', 'code'), weights={'kitchen': 0, 'code': 1})
  assert none.lengths['kitchen'] == 0 and none[5]['domain_B'].tolist() == [1]


@pytest.mark.parametrize(('changes', 'text'), [
    ({'sampling': 'balance'}, r"data\.sampling='balance'.*did you mean 'balanced'"),
    ({'packing': 'continous'}, r"data\.packing='continous'.*did you mean 'continuous'"),
    ({'sequence_length': 0}, r'data\.sequence_length=0'),
    ({'batch_size': 0}, r'data\.batch_size=0'),
    ({'domains': ('legal', 'code', 'legal')}, 'twice'),
    ({'batch_size': 10}, r'data\.batch_size=10 is not a multiple of 4 .*try 8 or 12'),
    ({'batch_size': 3}, 'try 4 or 4'),
    ({'sampling': 'weights'}, r'no share for domain .legal.*--config\.data\.weights\.legal='),
    ({'sampling': 'weights', 'weights': WEIGHTS | {'kitchn': 1}}, 'did you mean .kitchen'),
    ({'sampling': 'weights', 'weights': WEIGHTS | {'code': -1}}, r'weights\.code=-1'),
    ({'sampling': 'weights', 'weights': WEIGHTS | {'code': 'x'}}, r"weights\.code='x'"),
    ({'sampling': 'weights', 'weights': WEIGHTS | {'code': math.nan}}, r'weights\.code=nan'),
    ({'sampling': 'weights', 'weights': WEIGHTS | {'code': math.inf}}, r'weights\.code=inf'),
    ({'sampling': 'weights', 'weights': dict.fromkeys(WEIGHTS, 0)}, 'sum to 0'),
])
def test_values_that_cannot_be_are_refused(changes, text):
  with pytest.raises(BadInput, match=text) as e:
    config(**changes)
  assert '\n' not in str(e.value)
