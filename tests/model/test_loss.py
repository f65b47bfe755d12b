"""demix/model/loss.py: against NumPy in float64, plain and in blocks."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from models import jit

from demix.model import loss

B, L, D, V, ROWS = 3, 5, 4, 11, 16  # ROWS - V rows of the table are padding


@pytest.fixture(scope='module')
def case():
  """hidden, table, targets and a cotangent."""
  random = np.random.default_rng(0)
  return (random.normal(size=(B, L, D)) * 3, random.normal(size=(ROWS, D)) * 3,
          random.integers(0, V, (B, L)), random.normal(size=(B, L)))


def reference(hidden, table, targets, cotangent):
  """(nll, gradient of hidden, gradient of the table) from the formulas."""
  scores = hidden @ table[:V].T
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  own = np.eye(V)[targets]
  dscores = (p - own) * cotangent[..., None]
  dtable = np.zeros_like(table)
  dtable[:V] = np.einsum('blv,bld->vd', dscores, hidden)
  return -np.log((p * own).sum(-1)), dscores @ table[:V], dtable


def run(hidden, table, targets, cotangent, block):
  def f(hidden, table):
    return loss.nll(hidden, table, targets, V, block)
  out, pull = jax.vjp(f, hidden, table)
  return out, *pull(cotangent)


compiled = jit(run, static_argnums=4)


@pytest.mark.parametrize('block', [0, 1, 4, 5, 14, 15, 16, 100])
def test_loss_and_gradients_are_the_formula_whatever_the_block(case, block):
  hidden, table, targets, cotangent = case
  got = compiled(np.float32(hidden), np.float32(table), targets, np.float32(cotangent),
                 block)
  for name, a, b in zip(('nll', 'hidden', 'table'), got, reference(*case)):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
  assert not np.asarray(got[2])[V:].any()  # padding: exactly no gradient


@pytest.mark.parametrize('block', [0, 4])
def test_padding_rows_have_no_probability_whatever_they_hold(case, block):
  hidden, table, targets, cotangent = map(np.copy, case)
  short = [np.float32(hidden), np.float32(table), targets, np.float32(cotangent)]
  before = compiled(*short, block)
  table[V:] = 1e4
  short[1] = np.float32(table)
  np.testing.assert_array_equal(compiled(*short, block)[0], before[0])
  scores = loss.logits(np.float32(hidden), np.float32(table), V)
  assert scores.shape == (B, L, ROWS) and scores.dtype == np.float32
  assert not np.asarray(jax.nn.softmax(scores))[..., V:].any()
  np.testing.assert_allclose(scores[..., :V], hidden @ table[:V].T, rtol=1e-4, atol=1e-4)


def test_blocks_never_hold_the_logits_of_all_tokens(case):
  def largest(block):
    """Tokens whose scores over the table exist at once, forward and backward."""
    f = lambda h, t, y, c: run(h, t, y, c, block)
    args = np.float32(case[0]), np.float32(case[1]), case[2], np.float32(case[3])
    return max(int(np.prod(s[:-1])) for s in jaxprs.shapes(f, *args) if s and s[-1] == ROWS
               and s != (D, ROWS))
  assert largest(0) == B * L
  assert [largest(block) for block in (1, 6, 7)] == [1, 6, 7]


def test_blocks_never_hold_the_logits_in_the_compiled_step(case):
  args = np.float32(case[0]), np.float32(case[1]), case[2], np.float32(case[3])
  text = {block: jax.jit(run, static_argnums=4).lower(*args, block).compile().as_text()
          for block in (0, 6)}
  assert f'f32[{B * L},{ROWS}]' in text[0]
  assert f'f32[6,{ROWS}]' in text[6]
  # Neither together nor stacked over the three blocks.
  for shape in (f'[{B * L},{ROWS}]', f'[{B},{L},{ROWS}]', f'[18,{ROWS}]', f'[3,6,{ROWS}]'):
    assert shape not in text[6]


def test_large_scores_do_not_overflow():
  hidden = jnp.full((1, 2, D), 1e4)
  table = jnp.concatenate([jnp.ones((1, D)), -jnp.ones((V - 1, D)), jnp.zeros((ROWS - V, D))])
  nll, dhidden, dtable = compiled(hidden, table, jnp.asarray([[0, 1]]), jnp.ones((1, 2)), 0)
  np.testing.assert_allclose(nll, [[0, 2e4 * D]])
  assert np.isfinite(dhidden).all() and np.isfinite(dtable).all()


def test_bfloat16_states_give_float32_losses(case):
  hidden, table, targets, cotangent = case
  half = jnp.asarray(hidden, jnp.bfloat16)
  nll, dhidden, dtable = compiled(
      half, jnp.asarray(table, jnp.float32), targets, jnp.float32(cotangent), 4)
  assert (nll.dtype, dhidden.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  # The scores are of bfloat16 factors, but are summed and kept in float32.
  rounded = np.float64(jnp.asarray(table, jnp.bfloat16))
  expected = reference(np.float64(half), rounded, targets, cotangent)[0]
  np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-4)
