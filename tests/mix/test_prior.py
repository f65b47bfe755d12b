"""demix/mix/prior.py: uniform, fixed, moving; stored priors and whom they are refused for."""

import dataclasses
import json
import math

import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from demix.errors import BadInput, Refused
from demix.mix import prior
from demix.mix.mixture import MixConfig, moving_prior

NAMES = ('law', 'bio', 'web')  # not in alphabetical order
WHO = NAMES, ('a', 'b', 'c')
E, B, L = 3, 12, 6


def loglik(seed=0, scale=2.0):
  return np.random.default_rng(seed).normal(-5, scale, (E, B, L)).astype(np.float32)


def start(count=E):
  return jnp.asarray(prior.uniform(count)), jnp.int32(0)


def moved(config, loglik_EBL, full_B, state=None):
  log_priors, state = moving_prior(config, jnp.asarray(loglik_EBL), jnp.asarray(full_B),
                                   state or start(len(loglik_EBL)))
  return np.exp(np.float64(log_priors)), np.exp(np.float64(state[0])), state


# ---- moving ------------------------------------------------------------------------------------


SHORT = np.isin(np.arange(B), (3, 6, 7, 8, 11), invert=True)  # whole groups of 2 and of 3 are out


@pytest.mark.parametrize('changes', [
    {}, {'posterior': 'last_token'}, {'alpha': 1.0}, {'alpha': 0.05}, {'blocks_per_update': 1},
    {'blocks_per_update': 3, 'posterior': 'last_token'}, {'decay': 0.7, 'window': 3},
    {'temperature': 3.0}], ids=str)
@pytest.mark.parametrize('full', [np.ones(B, bool), SHORT, np.zeros(B, bool)],
                         ids=['full', 'short', 'none'])
def test_the_mean_that_moves(changes, full):
  config = MixConfig(**{'prior': 'updating'} | changes)
  options = {'group' if n == 'blocks_per_update' else n: v for n, v in changes.items()}
  priors, last, (_, count) = moved(config, loglik(), full)
  expected, end = mixtures.moved(loglik(), full, **options)
  np.testing.assert_allclose(priors, expected, atol=2e-6)
  np.testing.assert_allclose(last, end, atol=2e-6)
  assert count == full.reshape(-1, config.blocks_per_update).any(1).sum()
  if full.all():  # and the first value stands alone, each later one has weight alpha
    assert np.abs(priors[:, 0] - 1 / E).max() < 1e-6 < np.abs(priors[:, -1] - 1 / E).max()


def test_a_block_moves_the_priors_of_later_groups_only():
  config, before = MixConfig(prior='updating', blocks_per_update=2), loglik()
  priors, _, _ = moved(config, before, np.ones(B, bool))
  changed = before.copy()
  changed[:, 5] = loglik(7)[:, 5]
  others, _, _ = moved(config, changed, np.ones(B, bool))
  np.testing.assert_array_equal(others[:, :6], priors[:, :6])
  assert (others[:, 6:] != priors[:, 6:]).any(0).all()


def test_the_last_token_of_a_block_does_not_move_it():
  changed = loglik()
  changed[:, :, -1] = loglik(7)[:, :, -1]
  for posterior in ('prefix', 'last_token'):
    config = MixConfig(prior='updating', posterior=posterior)
    np.testing.assert_array_equal(moved(config, changed, SHORT)[0],
                                  moved(config, loglik(), SHORT)[0])


def test_blocks_may_be_read_in_any_number_of_batches():
  config = MixConfig(prior='updating', blocks_per_update=3)
  whole, _, _ = moved(config, loglik(), SHORT)
  state, parts = None, []
  for part in (slice(0, 3), slice(3, 9), slice(9, 12)):
    priors, _, state = moved(config, loglik()[:, part], SHORT[part], state)
    parts.append(priors)
  np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize('posterior', ['prefix', 'last_token'])
def test_identical_members_leave_it_where_it_was(posterior):
  config = MixConfig(prior='updating', posterior=posterior)
  same = np.repeat(loglik()[:1], E, 0)
  priors, _, _ = moved(config, same, SHORT)
  np.testing.assert_allclose(priors, 1 / E, atol=1e-6)


def test_members_in_another_order_have_their_own_prior():
  config, order = MixConfig(prior='updating'), [2, 0, 1]
  np.testing.assert_allclose(moved(config, loglik()[order], SHORT)[0],
                             moved(config, loglik(), SHORT)[0][order], rtol=1e-5)


@pytest.mark.parametrize('changes', [
    {}, {'weights_k': 1}, {'weights_k': 2, 'order': 'softmax_topk'},
    {'weights_k': 2, 'order': 'softmax_topk', 'renormalise': False}], ids=str)
def test_it_sums_to_1_and_nobody_is_out_for_ever(changes):
  """What the gate cuts off at each token is not cut off the prior."""
  config = MixConfig(prior='updating', blocks_per_update=1, **changes)
  turn = np.zeros((E, B, L), np.float32)
  turn[1:, :4], turn[:2, 4:] = -40, -40  # only the first member fits, then only the last
  priors, last, (log_prior, _) = moved(config, turn, np.ones(B, bool))
  np.testing.assert_allclose(priors.sum(0), 1, atol=1e-6)
  assert np.isfinite(log_prior).all() and priors[0, 4] > 0.99 and last[2] > 0.9


def test_one_member_has_it_all():
  priors, last, _ = moved(MixConfig(prior='updating'), loglik()[:1], SHORT)
  np.testing.assert_allclose(np.append(priors, last), 1, atol=1e-6)
  assert (prior.uniform(1) == 0).all()


def test_it_stays_finite_over_very_different_members():
  priors, _, (log_prior, _) = moved(MixConfig(prior='updating'), loglik() * [[[1]], [[1e5]], [[1]]],
                                    SHORT)
  assert np.isfinite(log_prior).all() and np.isfinite(priors).all()


# ---- fixed -------------------------------------------------------------------------------------


def test_weights_by_name_or_in_order():
  found = prior.from_weights({'web': 0.25, 'law': 0.75}, NAMES)
  assert found.dtype == np.float32
  np.testing.assert_allclose(np.exp(found), [0.75, 0, 0.25])
  np.testing.assert_array_equal(prior.from_weights([0.75, 0, 0.25], NAMES), found)
  np.testing.assert_allclose(np.exp(prior.uniform(7)).sum(), 1, rtol=1e-6)
  near = prior.from_weights([0.3333, 0.3333, 0.3333], NAMES)  # as people write thirds
  np.testing.assert_allclose(np.exp(near), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(('weights', 'text'), [
    ({'lw': 1.0}, r"no expert 'lw' \(did you mean 'law'\?\)"),
    ([0.5, 0.5], r'prior of 2 weights for 3 experts \(law, bio, web\)'),
    ([0.5, 1.0, -0.5], 'numbers of at least 0'), ([math.nan, 0.5, 0.5], 'numbers of at least 0'),
    ([math.inf, 0, 0], 'numbers of at least 0'), (['1', 0, 0], 'numbers of at least 0'),
    ([0.5, 0.2, 0.2], 'sums to 0.9, not to 1'), ({}, 'sums to 0, not to 1'),
])
def test_what_is_no_prior_is_refused(weights, text):
  with pytest.raises(BadInput, match=text):
    prior.from_weights(weights, NAMES)


# ---- stored ------------------------------------------------------------------------------------


def made(**changes):
  log_weights = np.log(np.float32([0.7, 0.2, 0.1]))
  return prior.Prior(**dict(
      experts=NAMES, digests=('a', 'b', 'c'), log_weights=tuple(map(float, log_weights)),
      posterior='prefix', options={'decay': 1.0}, alpha=0.3, blocks=9, blocks_per_update=2,
      block_length=32, domain='law', split='valid', text='x', nll=(1.5, 2.5, 3.5)) | changes)


def test_what_is_stored_comes_back_bit_for_bit(tmp_path):
  priors = [made(), made(domain='new', posterior='last_token')]
  prior.save(tmp_path / 'p.json', priors)
  assert prior.load(tmp_path / 'p.json') == priors
  content = json.loads((tmp_path / 'p.json').read_text())
  assert content['version'] == 1 and list(content['priors'][0]['weights']) == list(NAMES)
  assert content['priors'][0]['weights']['law'] == pytest.approx(0.7)
  log_prior = prior.find(tmp_path / 'p.json', *WHO, 'law').log_prior(*WHO)
  np.testing.assert_array_equal(log_prior, np.log(np.float32([0.7, 0.2, 0.1])))


@pytest.mark.parametrize(('names', 'digests', 'text'), [
    (('law', 'bio'), ('a', 'b'), 'for the experts law, bio, web; this model mixes law, bio'),
    (NAMES, ('a', 'B', 'c'), 'expert bio had content digest b; it has B'),
])
def test_it_is_refused_for_other_experts(names, digests, text):
  with pytest.raises(Refused, match=text):
    made().log_prior(names, digests)


def test_experts_in_another_order_have_their_own_weights():
  found = made().log_prior(('bio', 'law', 'web'), ('b', 'a', 'c'))
  np.testing.assert_array_equal(found, np.log(np.float32([0.2, 0.7, 0.1])))


def test_one_is_found_by_experts_domain_and_posterior(tmp_path):
  """A file of two models, as `evaluate` of two writes it, serves both afterwards."""
  path, other = tmp_path / 'p.json', (NAMES, ('d', 'e', 'f'))
  priors = [made(), made(posterior='last_token'), made(domain='new'), made(digests=other[1])]
  prior.save(path, priors)
  assert prior.find(path, *WHO, 'law', 'last_token') == priors[1]
  assert prior.find(path, *WHO, 'new') == priors[2]
  assert prior.find(path, *other, 'law') == prior.find(path, *other) == priors[3]
  there = r'\(there: law \(prefix\), law \(last_token\)'
  with pytest.raises(BadInput, match=f'2 priors of domain law, posterior any {there}'):
    prior.find(path, *WHO, 'law')
  with pytest.raises(BadInput, match=f'0 priors of domain lw, posterior any {there}'):
    prior.find(path, *WHO, 'lw')
  with pytest.raises(BadInput, match='3 priors of domain any'):
    prior.find(path, *WHO)
  with pytest.raises(Refused, match='expert law had content digest a; it has x'):
    prior.find(path, NAMES, ('x', 'b', 'c'))


@pytest.mark.parametrize('name', ['p.json', 'a:b.json', 'a:b/p.json', 'p:law'])
def test_a_file_of_priors_may_have_a_colon_in_its_name(tmp_path, name):
  file = tmp_path / name
  file.parent.mkdir(exist_ok=True)
  prior.save(file, [made()])
  assert prior.split_reference(str(file)) == (str(file), '')
  assert prior.split_reference(f'{file}:law') == (str(file), 'law')


@pytest.mark.parametrize(('content', 'text'), [
    (None, 'cannot be read'), ('{', 'not a file of priors'), ('[]', 'not a file of priors'),
    ('{"version": 2, "priors": []}', 'priors of version 2, this demix reads 1'),
    ('{"version": 1}', 'not a file of priors'),
    ('{"version": 1, "priors": [{"experts": []}]}', 'not a file of priors'),
    ('{"version": 1, "priors": [7]}', 'not a file of priors'),
])
def test_what_is_no_file_of_priors_is_refused(tmp_path, content, text):
  if content is not None:
    (tmp_path / 'p.json').write_text(content)
  with pytest.raises(BadInput, match=rf'p\.json: .*{text}'):
    prior.load(tmp_path / 'p.json')


def test_a_prior_of_any_field_amiss_is_not_read(tmp_path):
  whole = json.loads(prior.orjson.dumps(prior.entry(made())))
  for field in dataclasses.fields(prior.Prior):
    if field.name == 'packing':  # files of before there was a choice
      continue
    entry = {k: v for k, v in whole.items() if k != field.name}
    (tmp_path / 'p.json').write_text(json.dumps({'version': 1, 'priors': [entry]}))
    with pytest.raises(BadInput, match=field.name):
      prior.load(tmp_path / 'p.json')


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(BadInput, match='cannot be written'):
    prior.save(tmp_path / 'none/p.json', [made()])
