"""demix/optim/optimizer.py: against optax, the schedules, and what must not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import assert_close, assert_same, jit

from demix.errors import BadInput
from demix.model import tree
from demix.optim.optimizer import AdamW, OptimizerConfig, schedule

TRUE = jnp.asarray(True)


def leaves(seed: int, scale: float = 1.0) -> dict:
  """A running tree with two experts-leaves of three experts, drawn."""
  random = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape) * scale, jnp.float32)
  return {'embed': {'tokens': draw(5, 4)},
          'block_0': {'ffn': {'experts': {'up': draw(2, 3, 4, 2), 'up_bias': draw(2, 3, 2)}},
                      'attention_norm': {'scale': draw(2, 4)}}}


def ours(config, steps=10):
  """A jitted (grads, state, params, finite, present_E) → params, state, metrics, and init."""
  adamw = AdamW(config, steps)
  return adamw.init, jit(lambda g, s, p, finite=TRUE, present=None: adamw.update(
      g, s, p, finite=finite, present_E=present))


def test_defaults_are_the_papers_recipe():  # papers.md §1.2
  c = OptimizerConfig()
  assert (c.b1, c.b2, c.eps, c.weight_decay, c.clip) == (0.9, 0.95, 1e-7, 0.1, 0.1)
  assert (c.learning_rate, c.schedule, c.warmup_share, c.final_ratio) == (5e-4, 'linear', 0.08, 0)
  assert c.no_decay == ''


def moments(state) -> optax.ScaleByAdamState:
  """The Adam state inside a chain's."""
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  return next(s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))


def test_it_is_optax_adamw_to_the_bit():
  """Operation by operation, as compilers contract a · b + c where they like."""
  config = OptimizerConfig(learning_rate=0.03, clip=0.0, eps=1e-3)
  theirs, adamw = optax.adamw(schedule(config, 4), 0.9, 0.95, 1e-3, weight_decay=0.1), AdamW(
      config, 4)
  draw = lambda seed: {'embed': leaves(seed)['embed']}
  params = other = draw(0)
  state, other_state = adamw.init(params), theirs.init(params)
  for i in range(3):
    params, state, _ = adamw.update(draw(i + 1), state, params, finite=TRUE)
    updates, other_state = theirs.update(draw(i + 1), other_state, other)
    other = optax.apply_updates(other, updates)
    adam = moments(other_state)
    assert_same({'p': params, 'mu': state['mu'], 'nu': state['nu'], 'count': state['count']},
                {'p': other, 'mu': adam.mu, 'nu': adam.nu, 'count': adam.count})


def test_it_is_optax_clip_and_adamw():
  config = OptimizerConfig(learning_rate=0.03, clip=1.0, eps=1e-3)
  init, update = ours(config)
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
      schedule(config, 10), 0.9, 0.95, 1e-3, weight_decay=0.1))
  params = other = leaves(0)
  state, other_state = init(params), theirs.init(params)
  @jit
  def their_update(grads, state, params):
    updates, state = theirs.update(grads, state, params)
    return optax.apply_updates(params, updates), state
  for i in range(6):
    grads = leaves(10 + i, 0.02 if i == 2 else 2)  # clipped, but for the third
    params, state, metrics = update(grads, state, params)
    other, other_state = their_update(grads, other_state, other)
    np.testing.assert_allclose(metrics['grad_norm'], optax.global_norm(grads), rtol=1e-6)
    assert (metrics['grad_norm'] > 1) == (i != 2) and metrics['applied']
    # optax divides by the norm and multiplies by the clip, demix multiplies by their quotient.
    assert_close(params, other, rtol=1e-6, atol=1e-6)
    assert_close(state['mu'], moments(other_state).mu, rtol=1e-6, atol=1e-7)


def test_the_clip_counts_every_expert_once():
  grads = leaves(3)
  flat = tree.flatten(grads)
  norm = np.sqrt(sum((np.float64(x) ** 2).sum() for x in flat.values()))
  init, update = ours(OptimizerConfig(clip=norm / 4))
  _, state, metrics = update(grads, init(grads), leaves(4))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-6)
  for name, mu in tree.flatten(state['mu']).items():
    np.testing.assert_allclose(mu, 0.1 * flat[name] / 4, rtol=1e-5, err_msg=name)


def test_no_gradient_is_not_clipped_to_nan():
  init, update = ours(OptimizerConfig(weight_decay=0.0))
  params = leaves(1)
  zero = jax.tree.map(jnp.zeros_like, params)
  after, state, metrics = update(zero, init(params), params)
  assert metrics['applied'] and metrics['grad_norm'] == 0 and state['count'] == 1
  assert_same(after, params)


def test_absent_experts_do_not_move_one_bit_and_present_ones_as_ever():
  init, update = ours(OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
  params = leaves(0)
  state = init(params)
  for seed in (1, 2):  # moments that are not zero
    params, state, _ = update(leaves(seed), state, params)
  grads = leaves(3)
  before = {'params': params, 'mu': state['mu'], 'nu': state['nu']}
  all_present, all_state, _ = update(grads, state, params)
  moved = {'params': all_present, 'mu': all_state['mu'], 'nu': all_state['nu']}
  some, some_state, metrics = update(grads, state, params, TRUE, jnp.asarray([True, False, True]))
  got = {'params': some, 'mu': some_state['mu'], 'nu': some_state['nu']}
  before, moved, got = map(tree.flatten, (before, moved, got))
  for name in got:
    assert (before[name] != moved[name]).any()
    if '/experts/' in name:
      np.testing.assert_array_equal(got[name][:, 1], before[name][:, 1], err_msg=name)
      np.testing.assert_array_equal(got[name][:, ::2], moved[name][:, ::2], err_msg=name)
    else:
      np.testing.assert_array_equal(got[name], moved[name], err_msg=name)
  assert metrics['applied'] and some_state['count'] == 3
  np.testing.assert_array_equal(some_state['counts'], [3, 2, 3])


def test_an_expert_that_was_absent_is_corrected_by_its_own_updates():
  """Its first update is Adam's first, at the rate of the schedule; by the global count it would be
  0.41 of it (1 - 0.9 over 1 - 0.9¹¹, and the root of the second moment's)."""
  config = OptimizerConfig(learning_rate=0.1, schedule='constant', warmup_share=0, weight_decay=0,
                           clip=0)
  init, update = ours(config)
  params = leaves(0)
  state = init(params)
  for seed in range(1, 11):
    params, state, _ = update(leaves(seed), state, params, TRUE, jnp.asarray([True, False, True]))
  first, _, _ = update(leaves(11), init(params), params)
  after, state, _ = update(leaves(11), state, params, TRUE, jnp.asarray([False, True, False]))
  np.testing.assert_array_equal(state['counts'], [10, 1, 10])
  for name in ('up', 'up_bias'):
    got, fresh, old = (x['block_0']['ffn']['experts'][name] for x in (after, first, params))
    np.testing.assert_array_equal(got[:, 1], fresh[:, 1])
    np.testing.assert_allclose(np.abs(got - old)[:, 1], 0.1, rtol=1e-4)
    np.testing.assert_array_equal(got[:, ::2], old[:, ::2])


@pytest.mark.parametrize('bad', ['loss', 'nan', 'inf', 'overflow'])
def test_what_is_not_finite_changes_nothing(bad):
  init, update = ours(OptimizerConfig())
  params, _, _ = update(leaves(1), init(leaves(0)), leaves(0))
  state = update(leaves(1), init(leaves(0)), leaves(0))[1]
  grads = leaves(2)
  value = {'nan': jnp.nan, 'inf': -jnp.inf, 'overflow': 1e30}.get(bad)
  if value is not None:
    up = grads['block_0']['ffn']['experts']['up']
    grads['block_0']['ffn']['experts']['up'] = up.at[1, 2, 0, 0].set(value)
  after, after_state, metrics = update(grads, state, params, jnp.asarray(bad != 'loss'))
  assert not metrics['applied'] and state['count'] == 1
  assert_same(after, params)
  assert_same(after_state, state)
  moved, moved_state, metrics = update(leaves(2), after_state, after)  # and goes on from there
  assert metrics['applied'] and moved_state['count'] == 2
  assert all((a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params)))


def test_no_decay_leaves_those_that_match():
  config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, no_decay='bias|norm|embed',
                           schedule='constant', warmup_share=0.0)
  init, update = ours(config)
  params = leaves(0)
  after = update(jax.tree.map(jnp.zeros_like, params), init(params), params)[0]
  flat = tree.flatten(params)
  for name, leaf in tree.flatten(after).items():
    factor = 0.95 if name.endswith('/up') else 1
    np.testing.assert_allclose(leaf, factor * flat[name], rtol=1e-6, err_msg=name)
    assert factor < 1 or (np.asarray(leaf) == flat[name]).all()
  everything = ours(OptimizerConfig(learning_rate=0.1, schedule='constant', warmup_share=0.0))
  after = everything[1](jax.tree.map(jnp.zeros_like, params), everything[0](params), params)[0]
  assert_close(after, jax.tree.map(lambda p: 0.99 * p, params))  # the papers decay every leaf


@pytest.mark.parametrize('kind,expected', [
    # {updates done: share of the peak}; 100 steps, 8 of warm-up, final ratio 0.1
    ('linear', {0: 1 / 8, 3: 4 / 8, 7: 1, 8: 1, 54: 0.55, 99: 0.1 + 0.9 / 92, 100: 0.1, 150: 0.1}),
    ('cosine', {0: 1 / 8, 7: 1, 8: 1, 31: 0.1 + 0.45 * (1 + 0.5 ** 0.5), 54: 0.55, 100: 0.1}),
    ('wsd', {0: 1 / 8, 7: 1, 8: 1, 50: 1, 80: 1, 90: 0.55, 100: 0.1, 101: 0.1}),
    ('constant', {0: 1 / 8, 7: 1, 8: 1, 50: 1, 100: 1, 200: 1})])
def test_schedules(kind, expected):
  config = OptimizerConfig(learning_rate=0.02, schedule=kind, final_ratio=0.1)
  config.check()
  rate = schedule(config, 100)
  for step, share in expected.items():
    np.testing.assert_allclose(rate(step), 0.02 * share, rtol=1e-5, err_msg=f'step {step}')
  rates = np.array([rate(i) for i in range(0, 100, 3)])
  assert rates.min() > 0 and rates.max() <= 0.02 * (1 + 1e-6)


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'wsd', 'constant'])
def test_schedules_of_one_step_and_without_warmup(kind):
  for steps in (1, 2):
    rate = schedule(OptimizerConfig(learning_rate=1.0, schedule=kind), steps)
    assert rate(0) == 1
  rate = schedule(OptimizerConfig(learning_rate=1.0, schedule=kind, warmup_share=0.0), 50)
  assert rate(0) == rate(1) == 1 and (rate(50) == 1) == (kind == 'constant')
  whole = schedule(OptimizerConfig(learning_rate=1.0, schedule=kind, warmup_share=0.5,
                                   decay_share=0.5), 10)
  np.testing.assert_allclose([whole(i) for i in range(5)], np.arange(1, 6) / 5, rtol=1e-6)


def test_the_rate_is_that_of_the_update():
  config = OptimizerConfig(learning_rate=0.02)
  init, update = ours(config, 100)
  params = leaves(0)
  state, rates = init(params), []
  for i in range(3):
    params, state, metrics = update(leaves(i), state, params)
    rates.append(metrics['learning_rate'])
  np.testing.assert_allclose(rates, np.array([1, 2, 3]) * 0.02 / 8, rtol=1e-5)


@pytest.mark.parametrize('changes,named', [
    (dict(schedule='linar'), "did you mean 'linear'"), (dict(clip=-1.0), r'clip=-1\.0'),
    (dict(no_decay='['), r"optimizer\.no_decay='\[' is no regular expression \(unterminated"),
    (dict(schedule='wsd', warmup_share=0.5, decay_share=0.6), 'warmup_share=0.5 .*0.6 is above 1')])
def test_values_that_cannot_be_are_refused(changes, named):
  with pytest.raises(BadInput, match=named):
    OptimizerConfig(**changes).check()
  OptimizerConfig(warmup_share=0.5, decay_share=0.6).check()  # decay_share is of wsd only
