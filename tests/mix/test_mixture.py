"""demix/mix/mixture.py: scoring through a tiny model, and every mode against NumPy."""

import functools
import itertools

import jax.numpy as jnp
import mixtures
import models
import numpy as np
import pytest
from cases import some

from demix.errors import BadInput
from demix.mix import combine, evidence, prior
from demix.mix import mixture as module
from demix.mix.members import ExpertMembers
from demix.mix.mixture import MixConfig, Mixture, log_weights, next_log_weights
from demix.model import tree
from demix.model.params import expert_slice

E, B, L = 4, 5, 8
PRIOR = np.array([0.1, 0.2, 0.3, 0.4])
WEIGHTS = dict(zip(models.EXPERTS, (0.1, 0.2, 0.3, 0.4)))
SCORE = models.jit(module.scored.__wrapped__, static_argnums=(0, 1))
# What can be combined: priors × evidence × gates.
EVIDENCE = [dict(posterior='prefix'), dict(posterior='prefix', window=3),
            dict(posterior='prefix', decay=0.7), dict(posterior='prefix', window=4, decay=0.5),
            dict(posterior='last_token'), dict(posterior='none')]
GATES = [dict(), dict(temperature=2.5), dict(weights_k=2), dict(weights_k=1),
         dict(weights_k=3, order='softmax_topk'),
         dict(weights_k=3, order='softmax_topk', renormalise=False)]
MODES = [MixConfig(prior=p, **e, **g) for p, e, g in itertools.product(
    ('none', 'uniform', 'fixed'), EVIDENCE, GATES)]  # a moved or cached prior is a fixed one here


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
  monkeypatch.setattr(module, 'scored', SCORE)


def name(config):
  return '-'.join(str(v) for k, v in vars(config).items() if v != getattr(MixConfig(), k)) or '-'


def log_prior(config, rows=B):
  given = np.full(E, 0.25) if config.prior == 'uniform' else PRIOR
  return np.log(given).astype(np.float32)[:, None].repeat(rows, 1)


def batch(seed=0, rows=B, segments=False):
  """Rows whose inputs are the targets before them, as text has it."""
  more = models.batch_of([0] * rows, L, seed, segments)
  return {n: np.array(x) for n, x in more.items() if n not in ('weights_BL', 'domain_B')}


def changed_from(t):
  """`batch()` with other targets from t on, and other inputs after it."""
  here, other = batch(), batch(9)
  here['targets_BL'][:, t:] = other['targets_BL'][:, t:]
  here['tokens_BL'][:, t + 1:] = other['tokens_BL'][:, t + 1:]
  return here


@functools.cache
def model(same=False):
  """(members, parameters); with `same` all experts are the first one."""
  tiny = models.tiny(layers=2)
  params = models.drawn(tiny)
  if same:
    flat = tree.flatten(params)
    params = tree.unflatten({n: jnp.repeat(x[:, :1], E, 1) if '/experts/' in n else x
                             for n, x in flat.items()})
  return ExpertMembers(tiny), params


def mixture(same=False, **config):
  config = MixConfig(**config)
  if config.prior == 'fixed' and not config.weights:
    config = MixConfig(**vars(config) | {'weights': WEIGHTS})
  given = np.log(PRIOR) if config.prior == 'cached' else None
  return Mixture(*model(same), config, given)


@functools.cache
def loglik(seed=0):
  """[E, B, L] of the tiny model on `batch(seed)`."""
  return np.asarray(mixture().score(batch(seed)).loglik_KBL)


def expected(config, loglik_EBL, priors_EB, segments_BL=None):
  """Weights [E, B, L] in NumPy."""
  options = {k: getattr(config, k) for k in ('posterior', 'window', 'decay', 'temperature', 'order',
                                             'renormalise')} | {'top_k': config.weights_k}
  if config.prior == 'none':
    return np.full(loglik_EBL.shape, 1 / E)
  return np.stack([mixtures.weights(
      loglik_EBL[:, b], priors_EB[:, b], segments_L=None if segments_BL is None else segments_BL[b],
      **options) for b in range(loglik_EBL.shape[1])], 1)


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize('config', MODES, ids=name)
def test_every_mode_in_numpy(config):
  priors = log_prior(config)
  found = np.exp(np.float64(log_weights(config, loglik(), priors)))
  np.testing.assert_allclose(found, expected(config, loglik(), np.exp(priors)), atol=3e-5)
  assert (found >= 0).all()
  if config.renormalise or config.prior == 'none':
    np.testing.assert_allclose(found.sum(0), 1, atol=2e-6)


@pytest.mark.parametrize('config', MODES, ids=name)
def test_a_weight_does_not_look_at_its_token_or_later_ones(config):
  """A real model on real changes: targets from t on, inputs after it. Bit for bit."""
  found = np.asarray(log_weights(config, loglik(), log_prior(config)))
  for t in (1, 5):
    changed = np.asarray(mixture().score(changed_from(t)).loglik_KBL)
    assert np.any(changed[..., t:] != loglik()[..., t:])
    np.testing.assert_array_equal(changed[..., :t], loglik()[..., :t])
    later = np.asarray(log_weights(config, changed, log_prior(config)))
    np.testing.assert_array_equal(later[..., :t + 1], found[..., :t + 1])
    fixed = config.prior == 'none' or config.posterior == 'none'
    assert np.any(later[..., t + 1:] != found[..., t + 1:]) != fixed


@pytest.mark.parametrize('config', [c for c in MODES if c.prior == 'fixed'], ids=name)
def test_both_posteriors_agree_at_the_second_token(config):
  other = {'prefix': 'last_token', 'last_token': 'prefix', 'none': 'none'}[config.posterior]
  twin = MixConfig(**vars(config) | {'posterior': other, 'window': 0, 'decay': 1.0})
  a, b = (np.asarray(log_weights(c, loglik(), log_prior(c))) for c in (config, twin))
  np.testing.assert_array_equal(a[..., 1], b[..., 1])
  if config.posterior != 'none' and config.weights_k != 1:
    assert np.any(a[..., 0] != b[..., 0]) and np.any(a[..., 2] != b[..., 2])


# Of equal scores the first are kept.
WITHOUT_TIES = [c for c in MODES if not c.weights_k or c.prior == 'none' or (
    c.prior == 'fixed' and c.posterior != 'last_token')]


@pytest.mark.parametrize('config', WITHOUT_TIES, ids=name)
def test_permuted_experts_have_their_own_weights(config):
  order, priors = [2, 0, 3, 1], log_prior(config)
  found = np.asarray(log_weights(config, loglik(), priors))
  np.testing.assert_allclose(log_weights(config, loglik()[order], priors[order]), found[order],
                             atol=2e-6)


@pytest.mark.parametrize('options', [e for e in EVIDENCE if e['posterior'] != 'none'], ids=str)
def test_identical_experts_leave_the_prior_as_it_is(options):
  same = np.repeat(loglik()[:1], E, 0)
  found = np.exp(log_weights(MixConfig(**options), same, log_prior(MixConfig(prior='cached'))))
  first = options['posterior'] == 'last_token'
  np.testing.assert_allclose(found[..., first:], np.broadcast_to(
      PRIOR[:, None, None], found.shape)[..., first:], atol=1e-6)
  if first:
    np.testing.assert_array_equal(found[..., 0], 0.25)


@pytest.mark.parametrize('config', MODES[::5], ids=name)
def test_evidence_restarts_with_a_segment(config):
  segments = batch(segments=True)['segments_BL']
  assert (segments == 2).any(1).all()
  found = np.exp(log_weights(config, loglik(), log_prior(config), segments))
  np.testing.assert_allclose(
      found, expected(config, loglik(), np.exp(log_prior(config)), segments), atol=3e-5)


@pytest.mark.parametrize('config', MODES[::5], ids=name)
def test_the_next_token_has_the_weights_that_scoring_gives_it(config):
  found = np.asarray(log_weights(config, loglik(), log_prior(config)))[:, 0]
  text = loglik()[:, 0]
  for t in (0, 1, 4, 7):
    unread = np.where(np.arange(L) < t, text, np.nan)
    after = next_log_weights(config, jnp.asarray(unread), log_prior(config)[:, 0], t)
    np.testing.assert_allclose(np.exp(after), np.exp(found[:, t]), atol=2e-6)


def test_a_very_long_text_gives_finite_weights():
  long = np.full((2, 1, 100_000), -1, np.float32)
  long[1] -= 10
  config = MixConfig()
  weights = models.jit(lambda x, p: log_weights(config, x, p))(long, np.log([[0.5], [0.5]]))
  logp = combine.probabilities(weights, long)
  assert np.isfinite(weights).all() and np.isfinite(logp).all()
  np.testing.assert_allclose(weights[1, 0, -1], -999_990, rtol=1e-5)
  np.testing.assert_allclose(logp[0, 1000:], -1, atol=1e-6)


@pytest.mark.parametrize('planted', range(E))
def test_a_planted_domain_is_recognised_within_a_few_tokens(planted):
  """Unigram experts; text drawn from one of them."""
  random = np.random.default_rng(planted)
  unigrams = random.dirichlet(np.full(50, 0.3), E)
  text = random.choice(50, (64, 40), p=unigrams[planted])
  lik = np.log(np.maximum(unigrams, 1e-8)).astype(np.float32)[:, text]
  uniform = np.log(np.full((E, 64), 0.25, np.float32))
  prefix, last = (np.exp(log_weights(MixConfig(posterior=p), lik, uniform))[planted]
                  for p in ('prefix', 'last_token'))
  assert (prefix[:, 0] == 0.25).all() and prefix[:, 8].mean() > 0.95
  assert (prefix[:, 20:] > 0.99).mean() > 0.99
  assert 0.5 < last[:, 20:].mean() < prefix[:, 20:].mean() - 0.1  # never surer than one token


# ---- scores of a model -------------------------------------------------------------------------


SCORED = [dict(), dict(prior='cached', posterior='last_token'), dict(prior='none'),
          dict(prior='fixed', decay=0.8, combine='pick'),
          dict(prior='uniform', window=3, weights_k=2, combine='logits'),
          dict(prior='cached', experts_k=2, posterior='last_token', combine='logits'),
          dict(prior='fixed', members=('web', 'law'), temperature=2.0)]


@pytest.mark.parametrize(('config', 'segments'), [
    *((c, False) for c in SCORED), *((c, True) for c in SCORED[::4])], ids=str)
def test_scores_in_numpy(config, segments):
  """Members are run one by one by `apply`; all else is NumPy."""
  here, (members, params) = mixture(**config), model()
  read = batch(segments=segments)
  more = {n: read[n] for n in ('segments_BL', 'positions_BL') if segments}
  apply = models.jit(lambda p, r: members.logits(p, members.model.apply(
      p, read['tokens_BL'], r, **more)[0]))
  logits = np.stack([np.float64(apply(params, np.full(B, models.EXPERTS.index(n))))
                     for n in here.names])
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  lik = np.take_along_axis(logp, read['targets_BL'][None, ..., None], -1)[..., 0]
  K = len(here.names)
  p = {'none': np.ones(E), 'uniform': np.ones(E)}.get(here.config.prior, PRIOR)
  p = p[[models.EXPERTS.index(n) for n in here.names]]
  p = p / p.sum()
  weights = (np.full(lik.shape, 1 / K) if here.config.prior == 'none' else
             expected(here.config, lik, p[:, None].repeat(B, 1), more.get('segments_BL')))
  found = here.score(read)
  assert found.logp_BL.shape == (B, L) and found.log_weights_KBL.shape == (K, B, L)
  np.testing.assert_allclose(here.log_prior_K, np.log(p), atol=1e-6)
  np.testing.assert_allclose(found.loglik_KBL, lik, atol=1e-4)
  np.testing.assert_allclose(np.exp(found.log_weights_KBL), weights, atol=1e-4)
  if here.config.combine == 'logits':
    z = (weights[..., None] * logits).sum(0)
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    mixed = np.take_along_axis(z, read['targets_BL'][..., None], -1)[..., 0]
  else:
    mixed = np.stack([mixtures.mixed(weights[:, b], lik[:, b], here.config.combine)
                      for b in range(B)])
  np.testing.assert_allclose(found.logp_BL, mixed, atol=1e-4)


@pytest.mark.parametrize('config', some(SCORED, SCORED[1::2]), ids=str)
def test_nothing_scored_looks_ahead(config):
  here = mixture(**config)
  found = here.score(batch())
  for t in (1, 5):
    changed = here.score(changed_from(t))
    np.testing.assert_array_equal(changed.logp_BL[:, :t], found.logp_BL[:, :t])
    np.testing.assert_array_equal(changed.log_weights_KBL[..., :t + 1],
                                  found.log_weights_KBL[..., :t + 1])
    assert np.any(changed.logp_BL[:, t:] != found.logp_BL[:, t:])


@pytest.mark.parametrize('config', some(SCORED, SCORED[::2]), ids=str)
def test_identical_experts_are_the_dense_model(config):
  members, params = model(same=True)
  dense, own = expert_slice(members.model, params, 'law')
  alone = Mixture(ExpertMembers(dense), own).score(batch())
  np.testing.assert_allclose(mixture(same=True, **config).score(batch()).logp_BL, alone.logp_BL,
                             atol=4e-6, rtol=0)
  np.testing.assert_array_equal(alone.logp_BL, alone.loglik_KBL[0])


@pytest.mark.parametrize('kind', combine.KINDS)
@pytest.mark.parametrize('posterior', ['prefix', 'last_token', 'none'])
def test_a_prior_on_one_expert_is_that_expert(posterior, kind):
  found = mixture(prior='fixed', weights={'web': 1.0}, posterior=posterior, combine=kind).score(
      batch())
  own = np.asarray(found.loglik_KBL[2])
  first = posterior == 'last_token'  # whose first token is mixed uniformly, as released
  np.testing.assert_allclose(found.logp_BL[:, first:], own[:, first:], atol=2e-6)
  if kind == 'probabilities':
    np.testing.assert_array_equal(found.logp_BL[:, first:], own[:, first:])
  if first:
    np.testing.assert_allclose(np.exp(found.log_weights_KBL[..., 0]), 0.25, rtol=1e-6)
    assert np.abs(found.logp_BL[:, 0] - own[:, 0]).min() > 1e-4


def test_a_given_member_is_a_prior_on_it():
  found = mixture().score(batch(), np.asarray(evidence.given(jnp.array([0, 3, 1, 1, 2]), E)))
  own = np.take_along_axis(np.asarray(found.loglik_KBL), np.array([0, 3, 1, 1, 2])[None, :, None],
                           0)[0]
  np.testing.assert_array_equal(found.logp_BL, own)


def test_experts_renamed_and_reordered_score_the_same():
  members, params = model()
  order = np.array([2, 0, 3, 1])
  moved, own = members.take(params, order)
  assert moved.names == ('web', 'law', 'art', 'bio')
  for config in (MixConfig(), MixConfig(prior='fixed', weights=WEIGHTS, posterior='last_token')):
    a, b = (Mixture(m, p, config).score(batch()) for m, p in ((members, params), (moved, own)))
    np.testing.assert_allclose(b.logp_BL, a.logp_BL, atol=4e-6)
    np.testing.assert_allclose(b.log_weights_KBL, np.asarray(a.log_weights_KBL)[order], atol=4e-6)


def test_a_mixture_of_one():
  dense = models.tiny(ffn='dense')
  for config in (MixConfig(), MixConfig(posterior='last_token'), MixConfig(combine='pick')):
    here = Mixture(ExpertMembers(dense), models.drawn(dense), config)
    found = here.score(batch())
    np.testing.assert_array_equal(found.logp_BL, found.loglik_KBL[0])
    assert here.names == ('model',) and (here.log_prior_K == 0).all()
    np.testing.assert_allclose(found.log_weights_KBL, 0, atol=1e-7)


# ---- who is mixed ------------------------------------------------------------------------------


def test_which_members_run():
  assert mixture().names == models.EXPERTS
  assert mixture(members=('art', 'law')).names == ('law', 'art')
  two = mixture(prior='cached', experts_k=2)
  assert two.names == ('web', 'art') and two.routes_K.tolist() == [2, 3]
  np.testing.assert_allclose(np.exp(two.log_prior_K), [3 / 7, 4 / 7], rtol=1e-6)
  assert mixture(prior='fixed', members=('law', 'bio', 'web'), experts_k=1).names == ('web',)
  equal = dict(weights=dict.fromkeys(models.EXPERTS, 0.25))
  assert mixture(prior='fixed', experts_k=2, **equal).names == ('law', 'bio')  # the first
  assert mixture(experts_k=2).names == models.EXPERTS  # nothing to choose by before there is text


@pytest.mark.parametrize(('config', 'text'), [
    (dict(prior='cachd'), r"mix.prior='cachd': no such choice \(did you mean 'cached'\?\)"),
    (dict(posterior='prefx'), r"mix.posterior='prefx'.*did you mean 'prefix'"),
    (dict(order='topk'), "mix.order='topk'"), (dict(combine='sum'), "mix.combine='sum'"),
    (dict(window=-1), 'mix.window=-1 is out of range'),
    (dict(temperature=float('nan')), 'mix.temperature=nan'),
    (dict(posterior='last_token', window=3), 'option of posterior=prefix'),
    (dict(posterior='last_token', decay=0.5), 'option of posterior=prefix'),
    (dict(prior='updating', posterior='none'), 'without evidence no prior moves'),
    (dict(prior='cached', posterior='none'), 'without evidence no prior moves'),
    (dict(prior='fixed'), 'prior=fixed with 0 mix.weights'),
    (dict(weights={'law': 1.0}), 'prior=uniform with 1 mix.weights'),
    (dict(members=('law', 'arts')), r"no expert 'arts' \(did you mean 'art'\?\)"),
    (dict(experts_k=5), r'mix.experts_k=5 for 4 experts \(law, bio, web, art\): at most'),
    (dict(weights_k=3, members=('law', 'art')), r'mix.weights_k=3 for 2 experts \(law, art\)'),
    (dict(prior='fixed', weights={'law': 0.5, 'bo': 0.5}), r"no expert 'bo' \(did you mean 'bio'"),
    (dict(prior='fixed', weights={'law': 0.5}), 'sums to 0.5, not to 1'),
    (dict(prior='fixed', weights={'law': 1.5, 'bio': -0.5}), 'at least 0'),
    (dict(prior='fixed', weights={'law': 1.0}, members=('bio', 'web')),
     'gives no weight to any of bio, web'),
])
def test_what_cannot_be_mixed_is_refused(config, text):
  with pytest.raises(BadInput, match=text):
    Mixture(*model(), MixConfig(**config))


def test_a_cached_prior_has_to_come_from_somewhere():
  with pytest.raises(BadInput, match='cached without a prior: estimate one'):
    Mixture(*model(), MixConfig(prior='cached'))
  with pytest.raises(BadInput, match='prior of 3 weights for 4 experts'):
    Mixture(*model(), MixConfig(), prior.from_weights([0.2, 0.3, 0.5], models.EXPERTS))
