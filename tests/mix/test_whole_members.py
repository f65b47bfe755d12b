"""demix/mix/members.py: whole LMs as members score and write as each alone."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from cases import some

from demix.eval.perplexity import token_nll
from demix.generation.generate import Writer
from demix.generation.sampling import SamplingConfig
from demix.mix.members import ExpertMembers, WholeMembers
from demix.mix.mixture import MixConfig, Mixture

NAMES = ('law', 'bio', 'art')
PROMPT = [0, 5, 17, 3]
GREEDY = SamplingConfig(max_tokens=4, temperature=0)


@functools.cache
def forest(kind='gpt', copies=False):
  """Three LMs that share nothing: (members, stacked parameters, one model, a list of its trees)."""
  model = models.tiny(kind, ffn='dense')
  trees = [models.drawn(model, 0 if copies else seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  return WholeMembers(model, NAMES), stacked, model, trees


def batch(**more):
  found = models.batch_of([0, 0], **more)
  return {n: x for n, x in found.items() if n not in ('weights_BL', 'domain_B')}


@pytest.mark.parametrize('kind', some(models.KINDS, ['period 2']))
def test_each_member_scores_as_it_does_alone(kind):
  members, stacked, model, trees = forest(kind)
  scored = Mixture(members, stacked).score(batch())
  for e, params in enumerate(trees):
    alone = token_nll(model, params, batch() | {'domain_B': np.zeros(2, int)})
    np.testing.assert_array_equal(scored.loglik_KBL[e], -alone)


def test_segments_reach_the_members_and_restart_the_evidence():
  members, stacked, _, _ = forest()
  cut = batch(segments=True)
  scored = Mixture(members, stacked).score(cut)
  first = np.asarray(cut['segments_BL'] != jnp.pad(cut['segments_BL'], ((0, 0), (1, 0)))[:, :-1])
  weights = np.exp(scored.log_weights_KBL)
  np.testing.assert_allclose(weights[:, first], 1 / 3, rtol=1e-6)
  assert np.ptp(weights[:, ~first]) > 0.2
  whole = Mixture(members, stacked).score(batch())
  assert not np.array_equal(scored.loglik_KBL, whole.loglik_KBL)  # attention stays inside too


def test_only_members_that_are_chosen_run():
  members, stacked, _, _ = forest()
  both = Mixture(members, stacked).score(batch())
  one = Mixture(members, stacked, MixConfig(members=('art',))).score(batch())
  np.testing.assert_array_equal(one.logp_BL, both.loglik_KBL[2])
  kept, params = members.take(stacked, np.asarray([0, 2]))
  assert kept.names == ('law', 'art')
  two = Mixture(kept, params).score(batch())
  np.testing.assert_array_equal(two.loglik_KBL, both.loglik_KBL[np.asarray([0, 2])])


@pytest.mark.parametrize('combine', ['probabilities', 'logits', 'pick'])
def test_copies_of_one_lm_mix_to_that_lm(combine):
  members, stacked, _, _ = forest(copies=True)
  mixed = Mixture(members, stacked, MixConfig(combine=combine)).score(batch())
  np.testing.assert_allclose(mixed.logp_BL, mixed.loglik_KBL[0], atol=4e-6)
  np.testing.assert_allclose(np.exp(mixed.log_weights_KBL), 1 / 3, rtol=1e-6)


def test_logits_are_mixed_by_each_ones_own_table():
  members, stacked, model, trees = forest()
  weights = {'law': 0.2, 'bio': 0.3, 'art': 0.5}
  config = MixConfig(prior='fixed', weights=weights, posterior='none', combine='logits')
  mixed = Mixture(members, stacked, config).score(batch())
  expected = 0
  for w, params in zip(weights.values(), trees):
    hidden, _, _ = model.apply(params, batch()['tokens_BL'], jnp.zeros(2, int))
    expected = expected + w * (hidden @ model.output_table(params).T)[..., :models.V]
  logp = jax.nn.log_softmax(expected, -1)
  np.testing.assert_allclose(mixed.logp_BL, jnp.take_along_axis(
      logp, batch()['targets_BL'][..., None], -1)[..., 0], atol=2e-5)


@pytest.mark.parametrize('kind', some(['gpt', 'llama'], ['gpt']))
def test_each_member_writes_as_it_does_alone(kind):
  members, stacked, model, trees = forest(kind)
  for name, params in zip(NAMES, trees):
    alone = list(Writer(Mixture(ExpertMembers(model, name), params), PROMPT, GREEDY))
    chosen = list(Writer(Mixture(members, stacked, MixConfig(members=(name,))), PROMPT, GREEDY))
    assert [t.id for t in alone] == [t.id for t in chosen]
    np.testing.assert_allclose([t.logp for t in alone], [t.logp for t in chosen], atol=2e-6)


def test_a_mixture_writes_with_the_weights_that_scoring_gives():
  members, stacked, _, _ = forest()
  mixture = Mixture(members, stacked, MixConfig(experts_k=0))
  tokens = list(Writer(mixture, PROMPT, GREEDY))
  text = [*PROMPT, *(t.id for t in tokens)]
  scored = mixture.score({'tokens_BL': np.asarray([text[:-1]]),
                          'targets_BL': np.asarray([text[1:]])})
  np.testing.assert_allclose([list(t.weights.values()) for t in tokens],
                             np.exp(scored.log_weights_KBL)[:, 0, 3:].T, atol=2e-5)
  two = Writer(Mixture(members, stacked, MixConfig(experts_k=2)), PROMPT, GREEDY)
  assert len(two.names) == 2 and len(list(two)) == 4
