"""demix/mix/gate.py: scores into weights."""

import itertools

import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from demix.mix import gate

E, n = 5, 200
WAYS = [dict(zip(('temperature', 'top_k', 'order', 'renormalise'), way)) for way in
        itertools.product((0.3, 1.0, 4.0), (0, 1, 2, E, E + 3), gate.ORDERS, (True, False))]


def scores(seed=0, scale=4.0):
  """[E, n] with members that are out, ties, and columns that are far apart."""
  out = np.random.default_rng(seed).normal(0, scale, (E, n)).astype(np.float32)
  out[3, :40] = -np.inf
  out[1, 20:60] = out[4, 20:60]
  out[:, 80:90] *= 1e4
  out[:, 90:95] = 0
  return out


@pytest.mark.parametrize('way', WAYS, ids=lambda w: '-'.join(map(str, w.values())))
def test_the_contract(way):
  given = scores()
  found = gate.log_weights(jnp.asarray(given), **way)
  assert (found.shape, found.dtype) == (given.shape, jnp.float32)
  weights = np.exp(np.asarray(found, np.float64))
  assert not np.isnan(weights).any() and (weights[3, :40] == 0).all()
  np.testing.assert_allclose(weights, np.stack([
      mixtures.gate(s, **{**way, 'top_k': min(way['top_k'], E)}) for s in given.T], 1), atol=1e-5)
  cut = 0 < way['top_k'] < E
  assert (np.count_nonzero(weights[:, 95:], 0) == way['top_k']).all() or not cut
  if cut and way['order'] == 'softmax_topk' and not way['renormalise']:
    assert (weights.sum(0) < 1 + 1e-5).all() and (weights.sum(0)[95:] < 0.999).any()
  else:
    np.testing.assert_allclose(weights.sum(0), 1, atol=2e-6)


@pytest.mark.parametrize('way', WAYS[::3], ids=lambda w: '-'.join(map(str, w.values())))
def test_members_in_another_order_have_their_own_weights(way):
  given, order = np.random.default_rng(0).normal(0, 3, (E, n)).astype(np.float32), [3, 0, 4, 1, 2]
  there, here = gate.log_weights(given[order], **way), gate.log_weights(given, **way)
  np.testing.assert_allclose(there, np.asarray(here)[order], atol=2e-6)


def test_a_common_score_changes_nothing():
  given = np.random.default_rng(0).integers(-9, 9, (E, n)).astype(np.float32)
  np.testing.assert_array_equal(gate.log_weights(given - 512), gate.log_weights(given))


@pytest.mark.parametrize('k', range(1, E))
def test_of_equal_scores_the_first_are_kept(k):
  kept = gate.among_largest(jnp.zeros((E, 2, 3)), k)
  np.testing.assert_array_equal(kept[:, 1, 2], np.arange(E) < k)
  some = np.float32([1, 7, 7, 0, 7])
  best = np.sort(np.argsort(-some, kind='stable')[:k])
  np.testing.assert_array_equal(np.flatnonzero(gate.among_largest(some, k)), best)


def test_top_1_is_one_hot_and_a_cold_gate_nearly_so():
  given = np.random.default_rng(0).normal(0, 3, (E, n)).astype(np.float32)
  hot = np.arange(E)[:, None] == given.argmax(0)
  np.testing.assert_array_equal(np.exp(gate.log_weights(given, top_k=1)), hot)
  apart = np.sort(given, 0)[-1] - np.sort(given, 0)[-2] > 0.01
  cold = np.exp(gate.log_weights(given, temperature=1e-3))
  np.testing.assert_allclose(cold[:, apart], hot[:, apart], atol=1e-4)
