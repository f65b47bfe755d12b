"""schedule.py: shares over time, exact to a row at every step, random access."""

from fractions import Fraction

import corpus
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demix.data.sampling.batches import Batches, DataConfig
from demix.data.sampling.schedule import KINDS, ScheduledTurns, only, parse
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

WEIGHTS = {'legal': 1, 'code': 0.5, 'verse': 0, 'kitchen': 2.5}
LATE = '10 code=4 verse=1, 25 legal=0 kitchen=.25'
share = st.one_of(st.just(Fraction(0)), st.fractions(0, 10, max_denominator=1000),
                  st.sampled_from([Fraction(1, 10**6), Fraction(1000)]))


@st.composite
def mixtures(draw):
  """(knots, kind, rows of a batch, steps to look at), by hand, not by `parse`."""
  sources = draw(st.integers(1, 9))
  shares = st.lists(share, min_size=sources, max_size=sources).filter(any)
  steps = [0, *sorted(draw(st.sets(st.integers(1, 40), max_size=3)))]
  knots = []
  for step in steps:
    row = draw(shares)
    knots.append((step, {str(i): x / sum(row) for i, x in enumerate(row)}))
  return knots, draw(st.sampled_from(KINDS)), draw(st.integers(1, 20)), draw(st.integers(1, 50))


def exact(knots, kind, rows, t):
  """B ∫_0^t w_d for every source: the area under the knots, trapezoid by trapezoid."""
  sums = [Fraction(0)] * len(knots[0][1])
  for i, (start, shares) in enumerate(knots):
    end = knots[i + 1][0] if i + 1 < len(knots) else max(t, start + 1)
    stop = min(t, end)
    if stop <= start:
      continue
    goal = list(knots[min(i + 1, len(knots) - 1)][1].values())
    for d, a in enumerate(shares.values()):
      z = a + (goal[d] - a) * Fraction(stop - start, end - start) if kind == 'linear' else a
      sums[d] += rows * (a + z) / 2 * (stop - start)
  return sums


@settings(deadline=None, max_examples=30)
@given(mixtures())
def test_every_source_has_had_its_share_to_a_row_at_every_step(mixture):
  knots, kind, rows, steps = mixture
  turns, before = ScheduledTurns(knots, kind, rows), (0,) * len(knots[0][1])
  for t in range(steps + 1):
    counts, shares = turns.counts(t), exact(knots, kind, rows, t)
    assert sum(counts) == t * rows == sum(shares)
    assert all(abs(c - s) < 1 for c, s in zip(counts, shares))
    assert all(a <= b for a, b in zip(before, counts))
    assert [Fraction(x, turns.unit) for x in turns.shares_until(t)] == shares
    before = counts


@settings(deadline=None, max_examples=15)
@given(mixtures(), st.randoms(use_true_random=False))
def test_a_turn_is_the_same_in_any_order_of_asking(mixture, random):
  knots, kind, rows, steps = mixture
  order, had = list(range(rows * steps)), [0] * len(knots[0][1])
  turns = ScheduledTurns(knots, kind, rows)
  walked = []
  for k in order:
    source, before = turns[k]
    assert before == had[source]
    had[source] += 1
    walked.append((source, before))
  random.shuffle(order)
  asked = ScheduledTurns(knots, kind, rows)
  for k in order[:50]:
    assert asked[k] == walked[k]


def test_far_steps_need_no_more_memory_or_precision():
  knots = parse('700 b=3 c=1, 1500 a=0', {'a': 0.1, 'b': 0.2, 'c': 0}, ('a', 'b', 'c'))
  turns = ScheduledTurns(knots, 'linear', 64)
  assert abs(turns.counts(20_000)[1] - exact(knots, 'linear', 64, 20_000)[1]) < 1
  assert len(turns._marks) == 20_000 // 128 + 1
  assert turns.counts(20_000)[0] == turns.counts(1500)[0], 'a has no share from 1500 on'


@pytest.fixture(scope='module')
def store(stores):
  return TokenStore.open(stores.bytes)


def make(store, seed=0, **changes) -> Batches:
  config = DataConfig(**{'domains': corpus.DOMAINS, 'sequence_length': 32, 'batch_size': 8,
                         'sampling': 'weights', 'weights': WEIGHTS, 'schedule': LATE} | changes)
  config.check()
  return Batches(store, config, seed)


@pytest.mark.parametrize('kind', KINDS)
def test_batch_t_depends_on_seed_and_t_only_and_has_the_shares_of_its_step(store, kind):
  batches = make(store, schedule_kind=kind)
  order = np.random.default_rng(0).permutation(40).tolist()
  by_number = {t: batches[t] for t in order}
  from_start, from_17 = batches.iterate(0), make(store, schedule_kind=kind).iterate(17)
  for t in range(40):
    for iterator in (from_start, from_17)[:1 + (t >= 17)]:
      batch = next(iterator)
      for name in batch:
        np.testing.assert_array_equal(batch[name], by_number[t][name])
  rows = np.array([np.bincount(by_number[t]['domain_B'], minlength=4) for t in range(40)])
  knots = parse(LATE, WEIGHTS, corpus.DOMAINS)
  for t in range(1, 41):
    shares = exact(knots, kind, 8, t)
    assert all(abs(n - float(s)) < 1 for n, s in zip(rows[:t].sum(0), shares))
    epochs = batches.epochs(t)
    for name, s in zip(corpus.DOMAINS, shares):
      assert epochs[name] == pytest.approx(float(s) / batches.lengths[name])
  legal, verse = corpus.DOMAINS.index('legal'), corpus.DOMAINS.index('verse')
  assert rows[25:, legal].sum() == 0 or kind == 'linear'
  assert (rows[:10, verse].sum() == 0) == (kind == 'piecewise')


def test_a_domain_goes_on_where_it_was_when_its_share_changes(store):
  """Across a jump no sequence of an epoch is left out or shown twice."""
  batches, seen = make(store, domains=('legal', 'code'), weights={'legal': 1, 'code': 3},
                       schedule='7 legal=9'), []
  t = 0
  while len(seen) < batches.lengths['legal']:
    batch = batches[t]
    seen += [row.tobytes() for row in batch['targets_BL'][batch['domain_B'] == 0]]
    t += 1
  assert t > 8, 'one epoch ends before the jump: nothing was tested'
  epoch = seen[:batches.lengths['legal']]
  assert len(set(epoch)) == len(epoch)


def test_without_a_schedule_weights_draw_what_they_drew(store):
  """Turns of constant weights are as they were: old runs go on with the same batches."""
  a = make(store, schedule='')
  from demix.data.sampling.batches import Turns
  turns = Turns([WEIGHTS[d] for d in corpus.DOMAINS])
  for t in range(5):
    assert a[t]['domain_B'].tolist() == [turns[8 * t + r][0] for r in range(8)]


def test_a_large_late_share_needs_its_rows(store):
  with pytest.raises(BadInput, match=r'kitchen/train: \d+ sequences of 32 tokens, one batch needs'):
    make(store, batch_size=250, domains=('legal', 'kitchen'),
         weights={'legal': 1, 'kitchen': 0}, schedule='5 kitchen=1000000')


def test_only_the_named_domains_stay():
  assert only('8 a=1 b=2, 9 b=3, 12 a=0', ('a', 'c')) == '8 a=1, 12 a=0'
  assert only('', ('a',)) == only('9 b=1', ('a',)) == ''


@pytest.mark.parametrize(('changes', 'text'), [
    ({'sampling': 'proportional', 'weights': {}}, r"schedule=.* no effect with data\.sampling='p"),
    ({'schedule_kind': 'linaer'}, r"data\.schedule_kind='linaer'.*did you mean 'linear'"),
    ({'schedule': '', 'schedule_kind': 'linear'}, r"no effect with data\.schedule=''"),
    ({'schedule': 'code=4'}, r"'code=4' is not a step and its shares: write 'STEP NAME=SHARE"),
    ({'schedule': '10'}, r"'10' is not a step and its shares"),
    ({'schedule': '-3 code=4'}, r"'-3 code=4' is not a step"),
    ({'schedule': '10 code=4,'}, r"'' is not a step"),
    ({'schedule': '10 code=4, 10 code=5'}, r'step 10 is out of order, 10 comes before it'),
    ({'schedule': '10 code=4, 9 code=5'}, r'step 9 is out of order, 10 comes before it: .*rise'),
    ({'schedule': '0 code=4'}, r'step 0 is out of order, data\.weights are those of step 0'),
    ({'schedule': '10 cdoe=4'}, r"step 10: 'cdoe' is not one of .*did you mean 'code'"),
    ({'schedule': '10 code=4 code=5'}, r"step 10 gives 'code' two shares"),
    ({'schedule': '10 code=-1'}, r"'code=-1': a share is a number of at least 0"),
    ({'schedule': '10 code=nan'}, r"'code=nan': a share"),
    ({'schedule': '10 code=1e999'}, r"'code=1e999': a share"),
    ({'schedule': '10 code'}, r"'code': a share"),
    ({'schedule': '10 code=0 legal=0 kitchen=0'}, r'all shares are 0 from step 10 on'),
])
def test_schedules_that_cannot_be_are_refused(changes, text):
  with pytest.raises(BadInput, match=text) as e:
    DataConfig(**{'domains': corpus.DOMAINS, 'sampling': 'weights', 'weights': WEIGHTS,
                  'schedule': LATE} | changes).check()
  assert '\n' not in str(e.value)
