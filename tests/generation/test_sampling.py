"""sampling.py: thresholds equal those of sorting; draws follow the distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from demix.errors import BadInput
from demix.generation.sampling import SamplingConfig, among_top_k, among_top_p, draw, ordered

floats = st.floats(-80, 20, width=32)
# XLA takes subnormal numbers for 0.
floats = floats.filter(lambda x: x == 0 or abs(x) > 1.2e-38)
vectors = arrays.arrays(np.float32, 12, elements=floats)


@settings(deadline=None, max_examples=100)
@given(vectors, st.integers(1, 12))
def test_top_k_is_that_of_a_sorted_vocabulary(x, k):
  expected = x >= np.sort(x)[::-1][k - 1]  # ties with the last stay in
  np.testing.assert_array_equal(among_top_k(jnp.asarray(x), k), expected)


@settings(deadline=None, max_examples=100)
@given(vectors, st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.999]))
def test_top_p_is_the_fewest_tokens_with_that_probability(x, p):
  kept = np.asarray(among_top_p(jnp.asarray(x), p))
  prob = np.asarray(jax.nn.softmax(jnp.asarray(x)), np.float64)
  assert kept.any()
  assert prob[kept].min() > prob[~kept].max(initial=-1)  # the most likely ones
  assert prob[kept].sum() >= p - 1e-6
  last = prob == prob[kept].min()
  assert prob[kept & ~last].sum() < p + 1e-6  # none of them too many


@settings(deadline=None, max_examples=50)
@given(vectors)
def test_ordered_keeps_the_order(x):
  x = np.append(x, [-np.inf, np.inf])
  keys = np.asarray(ordered(jnp.asarray(x)), np.uint64)
  for a in range(len(x)):
    assert ((keys[a] < keys) == (x[a] < x)).all()


def test_greedy_takes_the_first_of_the_most_likely():
  logp = jnp.log(jnp.asarray([0.1, 0.4, 0.4, 0.1]))
  assert draw(logp, jax.random.key(3), SamplingConfig(temperature=0)) == 1


@pytest.mark.parametrize(('options', 'expected'), [
    ({'temperature': 1.0}, [0.5, 0.3, 0.15, 0.05]),
    ({'temperature': 0.5}, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
    ({'temperature': 1.0, 'top_k': 2}, [0.625, 0.375, 0, 0]),
    ({'temperature': 1.0, 'top_p': 0.75}, [0.625, 0.375, 0, 0]),
    ({'temperature': 1.0, 'top_p': 0.85}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    # Temperature comes first: at 0.5 the first two have 0.93.
    ({'temperature': 0.5, 'top_p': 0.9}, [0.25 / 0.34, 0.09 / 0.34, 0, 0])])
def test_draws_follow_the_distribution(options, expected):
  logp = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
  config = SamplingConfig(**options)
  keys = jax.random.split(jax.random.key(0), 20000)
  drawn = jax.jit(jax.vmap(lambda k: draw(logp, k, config)))(keys)
  counts = np.bincount(drawn, minlength=4) / len(keys)
  np.testing.assert_allclose(counts, expected, atol=0.015)  # 4 sigma
  assert (counts[np.asarray(expected) == 0] == 0).all()


def test_no_draw_sorts():
  for options in ({}, {'top_k': 3}, {'top_p': 0.5}, {'temperature': 0.0}):
    text = str(jax.make_jaxpr(lambda x, o=options: draw(x, jax.random.key(0), SamplingConfig(**o)))(
        jnp.zeros(8)))
    assert 'sort' not in text and 'top_k[' not in text


@pytest.mark.parametrize(('options', 'said'), [
    ({'max_tokens': 0}, 'max_tokens=0'), ({'temperature': math.nan}, 'temperature=nan'),
    ({'top_p': math.nan}, 'top_p=nan'), ({'stop': ('a', '')}, "stop=''")])
def test_options_out_of_range_are_refused(options, said):
  with pytest.raises(BadInput, match=said):
    SamplingConfig(**options).check()
