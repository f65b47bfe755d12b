"""demix/merge/average.py: Σ w θ in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from demix.errors import BadInput
from demix.merge import average


def drawn(dtype, count, seed=0):
  random = np.random.default_rng(seed)
  most = 4 if dtype == jnp.float16 else 20
  return [(f'p{i}', np.array(jnp.asarray(random.normal(size=(40, 30)) * 10.0 ** random.integers(
      -most, most, (40, 30)), dtype))) for i in range(count)]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('count', range(2, 11))
def test_the_average_of_copies_is_the_copy(dtype, count):
  [(name, copy)] = drawn(dtype, 1, count)
  for weights in (np.full(count, 1 / count), average.check_weights(
      np.random.default_rng(count).dirichlet(np.ones(count)), ['x'] * count)):
    out = average.leaf('x', [(name, copy)] * count, weights)
    assert out.dtype == copy.dtype and out.tobytes() == copy.tobytes()


def test_it_is_the_sum_in_float64_rounded_once():
  parents = drawn(np.float32, 3)
  weights = [0.2, 0.5, 0.3]
  expected = sum(w * a.astype(np.float64) for w, (_, a) in zip(weights, parents))
  np.testing.assert_array_equal(average.leaf('x', parents, weights), expected.astype(np.float32))


def test_a_weight_of_one_is_that_parent_and_of_none_is_not_looked_at():
  parents = drawn(np.float32, 3)
  parents[0][1][3, 3] = np.nan
  out = average.leaf('x', parents, [0, 1, 0])
  assert out.tobytes() == parents[1][1].tobytes()
  with pytest.raises(BadInput, match='p0: x is not finite'):
    average.leaf('x', parents, [0.5, 0.5, 0])


@pytest.mark.parametrize(('weights', 'said'), [
    ([0.5, 0.5], '2 weights for 3 models'), ([0.5, 0.75, -0.25], 'at least 0'),
    ([0.5, 0.5, 0.5], 'sum to 1.5'), ([float('nan'), 0.5, 0.5], 'at least 0')])
def test_weights_that_cannot_be_are_refused(weights, said):
  with pytest.raises(BadInput, match=said):
    average.check_weights(weights, ['a', 'b', 'c'])
