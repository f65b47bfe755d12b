"""step.make_step: one update has the gradient of one scalar, and reaches whom it should."""

import jax.numpy as jnp
import jaxprs
import models
import numpy as np
import pytest
from cases import some
from models import BALANCED, EXPERTS, adamw, assert_close, assert_same, batch_of, drawn, steps, tiny

from demix.model import tree
from demix.optim.state import canonical_state, running_state
from demix.optim.step import make_step, micro_batches

pytestmark = pytest.mark.exact


def expert_of(name):
  """The expert a canonical leaf belongs to; None for shared ones."""
  found = tree.EXPERT.fullmatch(name)
  return found[2] if found else None


# ---- whom a batch reaches

@pytest.mark.parametrize('balanced', some([False, True], [True]))
def test_a_domain_gives_other_experts_exactly_no_gradient(balanced):
  model = tiny('period 2')
  batch = batch_of(BALANCED if balanced else [2, 0, 2, 2, 0])
  if balanced:  # rows of all domains go through; those of two count
    batch['weights_BL'] *= jnp.isin(batch['domain_B'], jnp.asarray([0, 2]))[:, None]
  _, grads = models.gradient(model, drawn(model), batch, balanced=balanced)
  for name, grad in grads.items():
    touched = np.asarray(grad).any()
    assert touched == (expert_of(name) not in (EXPERTS[1], EXPERTS[3])), name


def test_absent_experts_do_not_move_one_bit_through_a_step():
  model = tiny('gpt')
  # Every expert at first, then without `bio` and `art`: one has no row, the other no weight.
  batches = [batch_of([0, 1, 2, 3, 0, 2], seed=s) for s in range(3)]
  batches[2]['domain_B'] = jnp.asarray([0, 2, 2, 3, 0, 2])
  batches[2]['weights_BL'] = batches[2]['weights_BL'].at[3].set(0)
  (before, _), (after, metrics) = (
      steps(model, drawn(model), batches[:n], balanced=False) for n in (2, 3))
  np.testing.assert_array_equal(metrics[2]['tokens_D'] > 0, [True, False, True, False])
  assert before['optimizer']['count'] == 2 and after['optimizer']['count'] == 3
  for kind, a, b in (('params', before['params'], after['params']),
                     *((k, before['optimizer'][k], after['optimizer'][k]) for k in ('mu', 'nu'))):
    a, b = model.canonical(a), model.canonical(b)
    for name in a:
      moved = (np.asarray(a[name]) != np.asarray(b[name])).any()
      assert moved == (expert_of(name) not in ('bio', 'art')), (kind, name)


def test_in_a_balanced_batch_an_expert_whose_rows_score_nothing_does_not_move():
  """And the others move as if it were not there: what it holds is in no norm and no mean."""
  model, batches = tiny('period 2'), [batch_of(BALANCED, seed=s) for s in range(2)]
  prompts = batches[1]['domain_B'] == 2
  batches[1]['weights_BL'] = jnp.where(prompts[:, None], 0, batches[1]['weights_BL'])
  (before, _), (after, _) = (steps(model, drawn(model), batches[:n]) for n in (1, 2))
  np.testing.assert_array_equal(after['optimizer']['counts'], [2, 2, 1, 2])
  for kind in ('params', 'mu', 'nu'):
    a, b = (model.canonical(s[kind] if kind in s else s['optimizer'][kind])
            for s in (before, after))
    for name in a:
      same = np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes()
      assert same == (expert_of(name) == EXPERTS[2]), (kind, name)


def test_the_count_of_each_expert_is_a_leaf_and_that_of_all_stands_in():
  model = tiny('gpt')
  state, _ = steps(model, drawn(model), [batch_of(BALANCED)])
  state['optimizer']['counts'] = np.arange(4, dtype=np.int32)
  flat = canonical_state(model, state)
  counts = {f'optimizer/counts/{e}': i for i, e in enumerate(EXPERTS)}
  assert {n: x for n, x in flat.items() if n.startswith('optimizer/counts/')} == counts
  back, _ = running_state(model, flat)
  assert_same(back, state)
  saved = {n: x for n, x in flat.items() if n not in list(counts)[:3]}  # of before there were any
  back, _ = running_state(model, saved)
  np.testing.assert_array_equal(back['optimizer']['counts'], [1, 1, 1, 3])
  dense = tiny(ffn='dense')
  assert 'counts' not in steps(dense, drawn(dense), [])[0]['optimizer']


def test_a_batch_without_a_scored_token_changes_nothing():
  model, batch = tiny('gpt'), batch_of(BALANCED)
  params = drawn(model)
  nothing = batch | {'weights_BL': jnp.zeros_like(batch['weights_BL'])}
  broken = batch | {'weights_BL': batch['weights_BL'].at[3, 2].set(jnp.inf)}
  one, _ = steps(model, params, [batch])
  state, metrics = steps(model, params, [batch, nothing, broken])
  assert [m['applied'] for m in metrics] == [True, False, False]
  assert_same(state, one)


# ---- the scalar

def test_metrics_are_sums_by_domain_and_the_loss_is_their_mean():
  model, batch = tiny('gpt'), batch_of([1, 3, 3, 0, 1, 1])
  params = drawn(model)
  _, (metrics,) = steps(model, params, [batch], balanced=False)
  hidden = models.jit(lambda p: model.apply(p, batch['tokens_BL'], batch['domain_B'])[0])(params)
  scores = np.float64(hidden) @ np.float64(params['embed']['tokens'])[:models.V].T
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  nll = -np.log(np.take_along_axis(p, np.asarray(batch['targets_BL'])[..., None], -1)[..., 0])
  weights, domains = np.asarray(batch['weights_BL']), np.asarray(batch['domain_B'])
  for d in range(4):
    at = domains == d
    np.testing.assert_allclose(metrics['nll_D'][d], (nll * weights)[at].sum(), rtol=1e-5)
    assert metrics['tokens_D'][d] == weights[at].sum()
  np.testing.assert_allclose(metrics['loss'], (nll * weights).sum() / weights.sum(), rtol=1e-5)
  _, grads = models.gradient(model, params, batch)
  norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)


@pytest.fixture(scope='module')
def whole():
  """{kind: batches, state and metrics of two updates without micro-batches}."""
  made = {}
  def make(kind):
    if kind not in made:
      balanced = kind != 'llama'
      domains = np.repeat(np.arange(4), 4) if balanced else np.arange(16) * 7 % 3
      batches = [batch_of(domains, seed=s, segments=not balanced) for s in range(2)]
      for batch in batches:  # rows weigh differently, so that micro-batches do
        batch['weights_BL'] *= jnp.arange(1, 17)[:, None] % 5
      model = tiny(kind)
      made[kind] = batches, balanced, steps(model, drawn(model), batches, balanced=balanced)
    return made[kind]
  return make


@pytest.mark.parametrize('case', some([('gpt', 2), ('gpt', 4), ('llama', 4)], [('gpt', 2)]))
def test_micro_batches_give_the_gradient_of_the_whole_batch(whole, case):
  kind, count = case
  batches, balanced, (state, metrics) = whole(kind)
  micro = micro_batches(batches[0], count)
  totals = np.asarray(micro['weights_BL']).sum((1, 2))
  assert len(set(totals)) > 1  # a mean of the micro-batches' means would be another number
  model = tiny(kind)
  got, got_metrics = steps(model, drawn(model), batches, balanced=balanced, accumulation=count)
  assert_close(dict(enumerate(got_metrics)), dict(enumerate(metrics)), rtol=1e-5, atol=1e-6)
  assert_close(got, state)


def test_an_auxiliary_loss_is_the_mean_over_micro_batches():
  """A loss like a router's: of the size of one batch, however many rows that has."""
  class Routed(type(tiny('gpt'))):
    def apply(self, params, *args, **more):
      hidden, _, taps = super().apply(params, *args, **more)
      return hidden, {'balance': jnp.square(params['embed']['tokens'][0]).sum()}, taps

  model, plain = (kind(tiny('gpt').config) for kind in (Routed, type(tiny('gpt'))))
  params, batch = drawn(plain), batch_of(BALANCED)
  extra = np.square(np.asarray(params['embed']['tokens'][0])).sum()
  _, (without,) = steps(plain, params, [batch])
  found = {n: steps(model, params, [batch], accumulation=n) for n in (1, 2)}
  for state, (metrics,) in found.values():
    np.testing.assert_allclose(metrics['loss'] - without['loss'], extra, rtol=1e-4)
    assert_close(state, found[1][0])


@pytest.mark.parametrize('count,groups', [(1, 4), (2, 4), (3, 4), (6, 4), (4, 1), (8, 3)])
def test_micro_batches_share_out_every_row_once_and_stay_balanced(count, groups):
  domains = np.repeat(np.arange(groups), 24 // groups)
  batch = {'domain_B': domains, 'row_B': np.arange(24),
           'x_BL': np.arange(24)[:, None] * 10 + np.arange(3)}
  micro = micro_batches(batch, count)
  assert sorted(np.ravel(micro['row_B'])) == list(range(24))
  np.testing.assert_array_equal(micro['domain_B'], np.tile(
      np.repeat(np.arange(groups), 24 // groups // count), (count, 1)))  # expert-major
  np.testing.assert_array_equal(micro['x_BL'], micro['row_B'][..., None] * 10 + np.arange(3))


def test_documents_and_blocks_reach_the_model_and_the_loss():
  batch = batch_of(BALANCED, segments=True)
  params = drawn(tiny('gpt'))
  with_segments, (a,) = steps(tiny('gpt'), params, [batch])
  for name in ('segments_BL', 'positions_BL'):
    _, (b,) = steps(tiny('gpt'), params, [{n: x for n, x in batch.items() if n != name}])
    assert abs(a['loss'] - b['loss']) > 1e-3
  blocks, (c,) = steps(tiny('gpt', loss_block=7), params, [batch])
  np.testing.assert_allclose(a['loss'], c['loss'], rtol=1e-6)
  assert_close(blocks, with_segments)
  def scores(block):
    """Whether the step holds the logits of all of its tokens."""
    step = make_step(tiny('gpt', loss_block=block), adamw(), domains=4, balanced=True)
    state = {'params': params, 'optimizer': adamw().init(params)}
    table, tokens = params['embed']['tokens'].shape[0], batch['tokens_BL'].size
    return (tokens, table) in jaxprs.shapes(step, state, batch)
  assert scores(0) and not scores(7)


# ---- models that are the same

@pytest.mark.parametrize('kind', some(['gpt', 'period 2'], ['gpt']))
def test_balanced_is_the_general_path(kind):
  model, batches = tiny(kind), [batch_of(BALANCED, seed=s) for s in range(3)]
  params = drawn(model)
  state, metrics = steps(model, params, batches)
  general, general_metrics = steps(model, params, batches, balanced=False)
  for a, b in zip(metrics, general_metrics):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-5)
  assert_close(general, state)


@pytest.mark.parametrize('balanced', some([True, False], [True]))
def test_one_expert_is_the_dense_model_step_for_step(balanced):
  dense, one = tiny('gpt', ffn='dense'), tiny('gpt', experts=('law',))
  flat = dense.canonical(drawn(dense))
  rename = lambda n: n.replace('/ffn/', '/ffn/experts/law/')
  batches = [batch_of([0] * 4, seed=s) for s in range(4)]
  state, metrics = steps(dense, dense.running(flat), batches, balanced=False, domains=1)
  got, got_metrics = steps(one, one.running({rename(n): x for n, x in flat.items()}), batches,
                           balanced=balanced, domains=1)
  # Not to the bit: the same operations are fused otherwise, and a · b + c is then rounded once or
  # twice. Measured after four steps: 2e-7 of the norm, 2e-7 in parameters of size 1.
  for a, b in zip(got_metrics, metrics):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=2e-6)
  got = canonical_state(one, got)
  assert got.pop('optimizer/counts/law') == 4
  assert_close(got, {
      rename(n): x for n, x in canonical_state(dense, state).items()}, rtol=1e-5, atol=5e-7)


def test_an_update_lowers_the_loss_of_its_batch():
  model, batch = tiny('llama'), batch_of(BALANCED)
  _, metrics = steps(model, drawn(model), [batch] * 8, learning_rate=0.03)
  assert metrics[-1]['loss'] < 0.7 * metrics[0]['loss']
