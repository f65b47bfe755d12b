"""demix/mix/evidence.py: what precedes a token, and never the token itself.

Log-likelihoods are whole numbers where bits are compared: their sums are exact in any order.
"""

import jax.numpy as jnp
import models
import numpy as np
import pytest
from cases import some

from demix.mix import evidence

E, B, L = 3, 4, 40
preceding = models.jit(evidence.preceding, static_argnames=('decay', 'window'))
OPTIONS = [{}, {'decay': 0.5}, {'decay': 0.9}, {'window': 1}, {'window': 7},
           {'window': 5, 'decay': 0.8}, {'window': L - 1}, {'window': L}, {'window': 3 * L}]


def whole(seed=0, shape=(E, B, L)):
  return np.float32(-np.random.default_rng(seed).integers(0, 12, shape))


def segments(seed=1):
  """[B, L]: rows cut into 1 to 5 pieces, the last one padding in some."""
  random = np.random.default_rng(seed)
  out = np.stack([1 + (np.arange(L)[:, None] >= random.integers(1, L, n)).sum(1)
                  for n in (0, 1, 3, 4)])
  out[1, -6:] = out[3, -9:] = 0
  return out


def loop(loglik_EBL, decay=1.0, window=0, segments_BL=None):
  """Relative to the best member of each token, as evidence is."""
  behind = np.float64(loglik_EBL) - loglik_EBL.max(0)
  segments_BL = np.ones(loglik_EBL.shape[1:]) if segments_BL is None else segments_BL
  out = np.zeros(loglik_EBL.shape)
  for b, t in np.ndindex(loglik_EBL.shape[1:]):
    s = t
    while s > 0 and segments_BL[b, s - 1] == segments_BL[b, t] and (not window or t - s < window):
      s -= 1
      out[:, b, t] += decay ** (t - 1 - s) * behind[:, b, s]
  return out


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_contract(options, cut):
  loglik, where = whole(), segments() if cut else None
  found = preceding(loglik, segments_BL=where, **options)
  assert (found.shape, found.dtype) == ((E, B, L), jnp.float32)
  np.testing.assert_allclose(found, loop(loglik, segments_BL=where, **options), atol=1e-4)
  assert not np.asarray(found)[:, :, 0].any()
  assert (np.asarray(found) < 0).mean() > 0.5
  if 'decay' not in options:
    np.testing.assert_array_equal(found, loop(loglik, segments_BL=where, **options))


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_token_and_those_after_it_are_no_evidence(options):
  loglik = np.random.default_rng(0).normal(-5, 3, (E, B, L)).astype(np.float32)
  found = np.asarray(preceding(loglik, **options))
  for t in (0, 1, 17, L - 1):
    changed = loglik.copy()
    changed[:, :, t:] = whole(3)[:, :, t:] * 7
    other = np.asarray(preceding(changed, **options))
    np.testing.assert_array_equal(other[..., :t + 1], found[..., :t + 1])
    assert t == L - 1 or np.any(other[..., t + 1] != found[..., t + 1])


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_other_segments_and_rows_are_no_evidence(options):
  loglik, where = np.random.default_rng(0).normal(-5, 3, (E, B, L)).astype(np.float32), segments()
  found = np.asarray(preceding(loglik, segments_BL=where, **options))
  changed = np.where(where == 2, 2 * loglik - 1, loglik)
  changed[:, 0] = -3 * loglik[:, 0] ** 2
  other = np.asarray(preceding(changed, segments_BL=where, **options))
  kept = (where != 2) & (np.arange(B) > 0)[:, None]
  np.testing.assert_array_equal(other[:, kept], found[:, kept])
  assert np.any(other[:, where == 2] != found[:, where == 2])


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_identical_members_have_no_evidence_and_order_does_not_count(options):
  loglik = np.random.default_rng(0).normal(-5, 3, (E, B, L)).astype(np.float32)
  assert not np.any(preceding(np.repeat(loglik[:1], E, 0), **options))
  order = [2, 0, 1]
  np.testing.assert_array_equal(preceding(loglik[order], **options),
                                np.asarray(preceding(loglik, **options))[order])


def test_a_window_of_one_is_the_token_before():
  loglik = whole()
  behind = loglik - loglik.max(0)
  np.testing.assert_array_equal(preceding(loglik, window=1)[..., 1:], behind[..., :-1])


@pytest.mark.parametrize('options', some([{}, {'window': 1000}], [{}]), ids=str)
def test_a_very_long_text_neither_overflows_nor_forgets(options):
  loglik = np.full((3, 1, 100_000), -1.0, np.float32)
  loglik[1] -= 10
  loglik[2, :, ::2] -= 1
  found = np.asarray(preceding(loglik, **options), np.float64)[:, 0]
  assert np.isfinite(found).all() and not found[0].any()
  last = loop(loglik[..., -2000:], **options)[:, 0, -1] if options else [0, -999_990, -50_000]
  np.testing.assert_allclose(found[:, -1], last, rtol=1e-5)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_what_follows_a_text_is_what_precedes_its_next_token(options):
  loglik = whole(shape=(E, 1, L))
  found = np.asarray(preceding(loglik, **options))[:, 0]
  unread = np.where(np.arange(L) < np.arange(L)[:, None], loglik[:, 0, None], np.nan)  # [E, t, L]
  for t in (0, 1, 2, 9, L - 1):
    after = evidence.following(np.float32(unread[:, t]), t, **options)
    np.testing.assert_allclose(after, found[:, t], atol=1e-4)


def test_a_given_member_is_the_only_one():
  np.testing.assert_array_equal(evidence.given(1, 3), [-np.inf, 0, -np.inf])
  np.testing.assert_array_equal(evidence.given(jnp.array([2, 0]), 3).T,
                                [[-np.inf, -np.inf, 0], [0, -np.inf, -np.inf]])
