"""Evidence of clusters: the kernels in NumPy, temperature, top-k, causality through a model."""

import functools

import mixtures
import models
import numpy as np
import pytest
from cases import some

from demix.data.clusters.clusterer import Clusterer
from demix.data.tokens.tokenizer import ByteTokenizer
from demix.errors import BadInput
from demix.generation.generate import Writer
from demix.generation.sampling import SamplingConfig
from demix.mix import evidence
from demix.mix import mixture as module
from demix.mix.members import ExpertMembers
from demix.mix.mixture import MixConfig, Mixture, log_weights, next_log_weights

E, B, L = 4, 3, 6
SCORE = models.jit(module.scored.__wrapped__, static_argnums=(0, 1))
GATES = [{}, dict(kernel='d4'), dict(kernel_temperature=1.0), dict(weights_k=2),
         dict(weights_k=1, kernel='d4'), dict(temperature=3.0),
         dict(weights_k=3, order='softmax_topk', renormalise=False)]


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
  monkeypatch.setattr(module, 'scored', SCORE)


def distances(seed=0, rows=B):
  return np.random.default_rng(seed).uniform(0, 2, (E, rows, L)).astype(np.float32)


def expected(config, distances_E, prior_E=None):
  """Weights [E] by the formulas: exp(-d²/T), or exp(-(d²)²/T) as released."""
  d = np.sqrt(np.float64(distances_E))
  kernel = {'d2': d ** 2, 'd4': (d ** 2) ** 2}[config.kernel] / config.kernel_temperature
  prior = np.full(E, 1 / E) if prior_E is None else prior_E
  return mixtures.gate(np.log(prior) - kernel, temperature=config.temperature,
                       top_k=config.weights_k, order=config.order, renormalise=config.renormalise)


@pytest.mark.parametrize('gate', GATES, ids=str)
def test_both_kernels_in_numpy(gate):
  config, d = MixConfig(posterior='clusters', **gate), distances()
  uniform, any_loglik = np.log(np.full((E, B), 0.25, np.float32)), np.zeros((E, B, L), np.float32)
  found = np.exp(log_weights(config, any_loglik, uniform, distances_EBL=d))
  for b in range(B):
    for t in range(L):
      np.testing.assert_allclose(found[:, b, t], expected(config, d[:, b, t]), atol=1e-6)
      after = next_log_weights(config, any_loglik[:, b], uniform[:, b], t, d[:, b, t])
      np.testing.assert_allclose(np.exp(after), found[:, b, t], atol=1e-6)


def test_the_kernels_at_a_known_distance():
  d = np.array([0.5, 2.0])
  np.testing.assert_allclose(evidence.clusters(d), [-5, -20])
  np.testing.assert_allclose(evidence.clusters(d, kernel='d4', temperature=1.0), [-0.25, -4])


@pytest.mark.parametrize('kernel', evidence.KERNELS)
def test_a_temperature_of_almost_0_is_the_nearest_and_of_much_is_uniform(kernel):
  d, uniform = distances(), np.zeros((E, B), np.float32)
  weights = lambda T: np.exp(log_weights(MixConfig(
      posterior='clusters', kernel=kernel, kernel_temperature=T), d, uniform, distances_EBL=d))
  nearest = np.arange(E)[:, None, None] == d.argmin(0)
  np.testing.assert_allclose(weights(1e-6), nearest, atol=1e-6)
  np.testing.assert_allclose(weights(1e6), 0.25, atol=1e-4)
  top = np.exp(log_weights(MixConfig(posterior='clusters', kernel=kernel, weights_k=1), d, uniform,
                           distances_EBL=d))
  np.testing.assert_array_equal(top, nearest)


def test_members_of_another_order_have_their_own_weights():
  order, d, config = [2, 0, 3, 1], distances(), MixConfig(posterior='clusters')
  find = lambda d: np.asarray(log_weights(config, d, np.zeros((E, B)), distances_EBL=d))
  np.testing.assert_allclose(find(d[order]), find(d)[order], atol=1e-6)


# ---- through a model ---------------------------------------------------------------------------


def batch(seed=0, rows=B):
  here = models.batch_of([0] * rows, L, seed)
  return {n: np.array(here[n]) for n in ('tokens_BL', 'targets_BL')} | {
      'distances_EBL': distances(seed, rows)}


def mixture(**config):
  tiny = models.tiny(layers=2)
  return Mixture(ExpertMembers(tiny), models.drawn(tiny), MixConfig(posterior='clusters', **config))


@pytest.mark.parametrize('config', [{}, dict(members=('web', 'law')), dict(
    prior='fixed', weights=dict(zip(models.EXPERTS, (0.1, 0.2, 0.3, 0.4))), experts_k=2),
    dict(combine='logits', weights_k=2), dict(combine='pick')], ids=str)
def test_scores_are_mixed_by_the_distances_of_those_that_run(config):
  here, read = mixture(**config), batch()
  found, places = here.score(read), [models.EXPERTS.index(n) for n in here.names]
  prior = np.asarray([0.1, 0.2, 0.3, 0.4] if 'weights' in config else [0.25] * 4)[places]
  for b in range(B):
    for t in range(L):
      scores = np.log(prior) - read['distances_EBL'][places, b, t] / 0.1
      np.testing.assert_allclose(np.exp(found.log_weights_KBL[:, b, t]), mixtures.gate(
          scores, top_k=config.get('weights_k', 0)), atol=1e-5)
  if config.get('combine') != 'logits':
    kind = config.get('combine', 'probabilities')
    for b in range(B):
      np.testing.assert_allclose(found.logp_BL[b], mixtures.mixed(np.exp(np.float64(
          found.log_weights_KBL[:, b])), found.loglik_KBL[:, b], kind), atol=1e-5)


def test_likelihoods_are_no_evidence_and_weights_pass_no_gradient_to_experts():
  """Other tokens, other likelihoods: the weights are those of the distances, bit for bit."""
  here, read, other = mixture(), batch(), batch(5)
  a = here.score(read)
  b = here.score(other | {'distances_EBL': read['distances_EBL']})
  np.testing.assert_array_equal(a.log_weights_KBL, b.log_weights_KBL)
  assert np.any(a.loglik_KBL != b.loglik_KBL)


@functools.cache
def clusterer():
  """Four words, each the centre of a member's cluster."""
  words, one = ('aa', 'bb', 'cc', 'dd'), np.ones(4, np.float32)
  return Clusterer('balanced', models.EXPERTS, words, one, np.eye(4, dtype=np.float32),
                   np.eye(4, dtype=np.float32))


class Letters(ByteTokenizer):
  """Ids of the tiny model's vocabulary, spelt as text that is about one thing or another."""

  def spelling(self, i):
    return b'aa bb cc dd  '[i % 12:i % 12 + 3]


@pytest.mark.parametrize('config', [{}, dict(kernel='d4', kernel_temperature=2.0),
                                    dict(weights_k=2), dict(kernel_tokens=3)], ids=str)
def test_no_weight_looks_at_its_token_or_later_ones(config):
  here, made = mixture(**config), Letters()
  limit = config.get('kernel_tokens', 0)
  def score(read):
    return here.score(read | {'distances_EBL': clusterer().before_rows(
        made, read['targets_BL'], limit)})
  read, other = batch(), batch(9)
  found, moved = score(read), 0
  for t in range(L):
    changed = {n: x.copy() for n, x in read.items()}
    changed['targets_BL'][:, t:] = other['targets_BL'][:, t:]
    changed['tokens_BL'][:, t + 1:] = other['tokens_BL'][:, t + 1:]
    later = score(changed)
    np.testing.assert_array_equal(later.log_weights_KBL[..., :t + 1],
                                  found.log_weights_KBL[..., :t + 1])
    np.testing.assert_array_equal(later.logp_BL[:, :t], found.logp_BL[:, :t])
    moved += np.any(later.log_weights_KBL[..., t + 1:] != found.log_weights_KBL[..., t + 1:])
  assert moved >= (limit or L) - 1
  assert limit == 0 or np.ptp(found.log_weights_KBL[..., limit:], -1).max() == 0


@pytest.mark.parametrize('config', some([
    {}, dict(weights_k=2, kernel='d4'), dict(kernel_tokens=4), dict(experts_k=2)],
    [dict(weights_k=2, kernel='d4'), dict(kernel_tokens=4)]), ids=str)
def test_written_tokens_have_the_weights_that_scoring_them_gives(config):
  here, made = mixture(**config), Letters()
  limit, prompt = config.get('kernel_tokens', 0), [36, 4, 15]
  from demix.data.clusters.clusterer import Reading
  tokens = list(Writer(here, prompt, SamplingConfig(max_tokens=5, temperature=1.5, seed=3),
                       Reading(clusterer(), made, limit)))
  text = np.asarray([*prompt, *(t.id for t in tokens)])
  names = list(tokens[0].weights)
  there = mixture(**{k: v for k, v in config.items() if k != 'experts_k'}, members=tuple(names))
  scored = there.score({'tokens_BL': text[None, :-1], 'targets_BL': text[None, 1:],
                        'distances_EBL': clusterer().before_rows(made, text[None, 1:], limit)})
  np.testing.assert_allclose([list(t.weights.values()) for t in tokens],
                             np.exp(scored.log_weights_KBL)[:, 0, 2:].T, atol=2e-5)
  np.testing.assert_allclose([t.logp for t in tokens], scored.logp_BL[0, 2:], atol=2e-5)
  assert len(names) == config.get('experts_k', 4)


@pytest.mark.parametrize(('config', 'message'), [
    (dict(posterior='clusters', prior='cached'), 'choose uniform or fixed'),
    (dict(posterior='clusters', prior='updating'), 'choose uniform or fixed'),
    (dict(posterior='clusters', kernel='d3'), 'no such choice'),
    (dict(posterior='clusters', kernel_temperature=0.0), 'mix.weights_k=1'),
    (dict(posterior='clusters', kernel_tokens=-1), 'at least 0'),
    (dict(posterior='clusters', decay=0.9), 'option of posterior=prefix'),
    (dict(posterior='cluster'), "did you mean 'clusters'"),
    (dict(kernel='d4'), 'option of posterior=clusters'),
    (dict(clusterer='W'), 'option of posterior=clusters')])
def test_settings_that_cannot_be(config, message):
  with pytest.raises(BadInput, match=message):
    MixConfig(**config).check()
