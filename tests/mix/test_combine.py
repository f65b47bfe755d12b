"""demix/mix/combine.py: weights and members into one distribution."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from demix.mix import combine

E, L, V = 4, 50, 23


def drawn(seed=0):
  """(log weights [E, L], some of them -inf; logits [E, L, V]; targets [L])."""
  random = np.random.default_rng(seed)
  weights = random.dirichlet(np.full(E, 0.5), L).T
  weights[2, :20] = 0
  weights /= weights.sum(0)
  with np.errstate(divide='ignore'):
    log_weights = np.log(weights).astype(np.float32)
  return log_weights, random.normal(0, 3, (E, L, V)).astype(np.float32), random.integers(0, V, L)


def of_targets(logits_ELV, targets_L):
  logp = jax.nn.log_softmax(logits_ELV, -1)
  return np.asarray(jnp.take_along_axis(logp, targets_L[None, :, None], -1)[..., 0])


def test_the_contract():
  log_weights, logits, targets = drawn()
  loglik = of_targets(logits, targets)
  for kind in ('probabilities', 'pick'):
    found = getattr(combine, kind)(log_weights, loglik)
    assert (found.shape, found.dtype) == ((L,), jnp.float32)
    np.testing.assert_allclose(found, mixtures.mixed(np.exp(log_weights), loglik, kind), rtol=2e-6)
  found = combine.logits(log_weights, logits)
  assert (found.shape, found.dtype) == ((L, V), jnp.float32)
  z = sum(np.exp(np.float64(w))[:, None] * x for w, x in zip(log_weights, np.float64(logits)))
  np.testing.assert_allclose(found, z - np.log(np.exp(z).sum(1, keepdims=True)), atol=1e-5)
  assert combine.KINDS == ('probabilities', 'logits', 'pick')


def test_each_is_a_distribution_over_the_vocabulary():
  log_weights, logits, _ = drawn()
  logp = np.asarray(jax.nn.log_softmax(logits, -1))  # [E, L, V]
  wide = np.repeat(log_weights[..., None], V, -1)
  for found in (combine.probabilities(wide, logp), combine.pick(wide, logp),
                combine.logits(log_weights, logits)):
    np.testing.assert_allclose(np.exp(np.float64(found)).sum(1), 1, atol=5e-6)


def test_identical_members_are_the_member():
  log_weights, logits, targets = drawn()
  logits = np.repeat(logits[:1], E, 0)
  loglik = of_targets(logits, targets)
  np.testing.assert_allclose(combine.probabilities(log_weights, loglik), loglik[0], atol=4e-6)
  np.testing.assert_array_equal(combine.pick(log_weights, loglik), loglik[0])
  np.testing.assert_allclose(
      of_targets(combine.logits(log_weights, logits)[None], targets)[0], loglik[0], atol=4e-6)


@pytest.mark.parametrize('e', range(E))
def test_one_member_with_all_the_weight_is_that_member_to_the_bit(e):
  _, logits, targets = drawn()
  loglik = of_targets(logits, targets)
  hot = np.where(np.arange(E)[:, None] == e, 0, -np.inf).repeat(L, 1).astype(np.float32)
  others = np.where(np.isneginf(hot), -np.inf, loglik)  # even if they rule the target out
  for given in (loglik, others):
    np.testing.assert_array_equal(combine.probabilities(hot, given), loglik[e])
    np.testing.assert_array_equal(combine.pick(hot, given), loglik[e])
  np.testing.assert_array_equal(combine.logits(hot, logits), jax.nn.log_softmax(logits[e], -1))


def test_members_in_another_order_mix_to_the_same():
  log_weights, logits, targets = drawn()
  order, loglik = [2, 3, 1, 0], of_targets(logits, targets)
  np.testing.assert_allclose(combine.probabilities(log_weights[order], loglik[order]),
                             combine.probabilities(log_weights, loglik), atol=4e-6)
  np.testing.assert_allclose(combine.logits(log_weights[order], logits[order]),
                             combine.logits(log_weights, logits), atol=1e-5)


def test_what_is_far_below_float32_stays_finite():
  loglik = np.float32([[-1e5, -3e4], [-2e5, -3e4]])
  halves = np.full((2, 2), np.log(0.5), np.float32)
  np.testing.assert_allclose(combine.probabilities(halves, loglik),
                             [-1e5 + np.log(0.5), -3e4], rtol=1e-6)


def test_pick_takes_the_first_of_equals():
  loglik = np.float32([[-1], [-2], [-3]])
  assert combine.pick(np.log(np.float32([[0.2], [0.4], [0.4]])), loglik) == -2
