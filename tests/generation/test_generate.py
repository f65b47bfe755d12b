"""generate.py: text from a cache is the text of recomputing everything; weights too."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from models import EXPERTS, batch_of, drawn, jit, tiny

from demix.errors import BadInput
from demix.generation.generate import Writer
from demix.generation.sampling import SamplingConfig
from demix.mix.members import ExpertMembers
from demix.mix.mixture import MixConfig, Mixture
from demix.model import loss
from demix.model.params import expert_slice

EOD = 0
PROMPT = [EOD, 5, 17, 3]
GREEDY = SamplingConfig(max_tokens=5, temperature=0)
WAYS = {
    'uniform': {}, 'average': dict(prior='none', posterior='none'),
    'last token': dict(posterior='last_token'),
    'window, decay': dict(window=2, decay=0.7),
    'fixed': dict(prior='fixed', weights=dict(zip(EXPERTS, (0.1, 0.2, 0.3, 0.4)))),
    'weights_k': dict(weights_k=2, temperature=2.0),
    'logits': dict(combine='logits'), 'pick': dict(combine='pick', temperature=3.0)}


@functools.cache
def forward(model):
  """Logits [8, V] of 8 tokens: one program, whatever the length of a text (attention is causal)."""
  V = model.config.vocab_size
  def logits(params, ids):
    hidden, _, _ = model.apply(params, ids[None], jnp.zeros(1, int))
    return loss.logits(hidden[0], model.output_table(params), V)[:, :V]
  return jit(logits)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


class Slow:
  """Each expert taken out as a dense LM; every token recomputes everything, in NumPy from there."""

  def __init__(self, model, params, config):
    self.config = config
    self.experts = [expert_slice(model, params, e) for e in EXPERTS]

  def logits(self, ids) -> np.ndarray:
    """[E, len(ids), V] float64."""
    padded = np.asarray([*ids, *[0] * (8 - len(ids))])
    out = [forward(model)(params, padded) for model, params in self.experts]
    return np.asarray(out, np.float64)[:, :len(ids)]

  def next(self, ids, prior):
    """(log p [V], weights [E]) of the token after `ids`, by the formulas."""
    c, logits = self.config, self.logits(ids)
    logp = np.log(np.apply_along_axis(softmax, 2, logits))
    seen = np.asarray([logp[:, t, ids[t + 1]] for t in range(len(ids) - 1)]).T.reshape(
        len(prior), -1)
    if c.prior == 'none':
      weights = np.full(len(prior), 1 / len(prior))
    else:
      if c.posterior == 'last_token':
        evidence, first = seen[:, -1:].sum(1), seen.shape[1] == 0
        prior = np.ones(len(prior)) if first else prior
      else:
        back = np.arange(seen.shape[1])[::-1]
        evidence = (seen * c.decay ** back * (back < (c.window or 99))).sum(1)
      weights = softmax((np.log(prior) + evidence) / c.temperature)
      if c.weights_k:
        weights[np.argsort(-weights)[c.weights_k:]] = 0
        weights /= weights.sum()
    if c.combine == 'logits':
      return np.log(softmax(weights @ logits[:, -1])), weights
    if c.combine == 'pick':
      return logp[weights.argmax(), -1], weights
    return np.log(weights @ np.exp(logp[:, -1])), weights

  def text(self, ids, count, prior):
    ids, all_weights = list(ids), []
    for _ in range(count):
      logp, weights = self.next(ids, prior)
      all_weights.append(weights)
      ids.append(int(logp.argmax()))
    return ids, np.asarray(all_weights)


def mixture(kind='gpt', way='uniform', **changes):
  model = tiny(kind, scan=changes.pop('scan', True))
  params = drawn(model)
  return Mixture(ExpertMembers(model), params, MixConfig(**WAYS[way] | changes)), model, params


@pytest.mark.parametrize('way', some(WAYS, ['uniform', 'window, decay', 'weights_k', 'logits']))
def test_greedy_text_and_weights_are_those_of_recomputing_everything(way):
  mixed, model, params = mixture(way=way)
  prior = np.asarray(list(WAYS[way].get('weights', dict.fromkeys(EXPERTS, 0.25)).values()))
  for prompt in (PROMPT, [EOD]):
    ids, weights = Slow(model, params, mixed.config).text(prompt, 5, prior)
    tokens = list(Writer(mixed, prompt, GREEDY))
    assert [t.id for t in tokens] == ids[len(prompt):]
    got = np.asarray([[t.weights[e] for e in EXPERTS] for t in tokens])
    np.testing.assert_allclose(got, weights, atol=2e-5)
  assert way == 'average' or np.ptp(weights) > 0.2  # unequal experts, unequal weights


@pytest.mark.parametrize('case', some(
    [('gpt', False), ('llama', True), ('period 2', False), ('period 2', True)], [('llama', True)]))
def test_every_kind_of_model_writes_from_its_cache(case):
  kind, scan = case
  mixed, model, params = mixture(kind, scan=scan)
  ids, weights = Slow(model, params, mixed.config).text(PROMPT, 5, np.full(4, 0.25))
  tokens = list(Writer(mixed, PROMPT, GREEDY))
  assert [t.id for t in tokens] == ids[4:]
  np.testing.assert_allclose([list(t.weights.values()) for t in tokens], weights, atol=2e-5)


@pytest.mark.parametrize('way', some(
    [w for w in WAYS if w != 'logits'], ['average', 'last token', 'fixed', 'pick']))
def test_weights_and_log_probabilities_are_those_of_scoring_the_text(way):
  mixed, _, _ = mixture(way=way)
  sampled = SamplingConfig(max_tokens=5, temperature=1.0, seed=7)
  tokens = list(Writer(mixed, PROMPT, sampled))
  text = [*PROMPT, *(t.id for t in tokens)]
  scored = mixed.score({'tokens_BL': np.asarray([text[:-1]]), 'targets_BL': np.asarray([text[1:]])})
  at = len(PROMPT) - 1
  np.testing.assert_allclose([list(t.weights.values()) for t in tokens],
                             np.exp(scored.log_weights_KBL)[:, 0, at:].T, atol=2e-5)
  np.testing.assert_allclose([t.logp for t in tokens], scored.logp_BL[0, at:], atol=2e-5)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('size', [dict(layers=1, ffn='dense'), dict(layers=1),
                                  dict(layers=2, expert_every=2)])
def test_a_model_of_one_period_writes_what_it_scores(size, scan):
  model = tiny(scan=scan, **size)
  mixed = Mixture(ExpertMembers(model), drawn(model))
  tokens = list(Writer(mixed, PROMPT, SamplingConfig(max_tokens=4, temperature=1.0, seed=3)))
  text = [*PROMPT, *(t.id for t in tokens)]
  scored = mixed.score({'tokens_BL': np.asarray([text[:-1]]), 'targets_BL': np.asarray([text[1:]])})
  np.testing.assert_allclose([t.logp for t in tokens], scored.logp_BL[0, len(PROMPT) - 1:],
                             atol=2e-5)


def test_a_token_and_its_weights_do_not_depend_on_what_follows():
  # A longer run begins as the shorter one; another seed changes no weight before the first
  # difference of the texts.
  mixed, _, _ = mixture()
  runs = [list(Writer(mixed, PROMPT, SamplingConfig(max_tokens=n, temperature=1.5, seed=s)))
          for n, s in ((5, 1), (3, 1), (5, 2))]
  assert runs[0][:3] == runs[1]
  for a, b in itertools.pairwise(runs[::2]):
    same = next(i for i, (x, y) in enumerate(zip(a, b)) if x.id != y.id)
    assert [t.weights for t in a[:same + 1]] == [t.weights for t in b[:same + 1]]


def test_experts_k_by_a_fixed_prior_runs_only_those():
  mixed, model, params = mixture(way='fixed', experts_k=2)
  assert mixed.names == ('web', 'art')
  writer = Writer(mixed, PROMPT, GREEDY)
  assert writer.names == ('web', 'art') and set(writer.after_prompt) == {'web', 'art'}
  others = Mixture(ExpertMembers(model), params, MixConfig(
      prior='fixed', weights={'web': 3 / 7, 'art': 4 / 7}, members=('web', 'art')))
  assert list(writer) == list(Writer(others, PROMPT, GREEDY))


def test_experts_k_by_the_posterior_after_the_prompt():
  mixed, model, params = mixture(experts_k=2)
  writer = Writer(mixed, PROMPT, GREEDY)
  _, weights = Slow(model, params, mixed.config).next(PROMPT, np.full(4, 0.25))
  best = [EXPERTS[i] for i in sorted(np.argsort(-weights)[:2])]
  assert list(writer.names) == best != list(EXPERTS[:2])
  assert list(writer.after_prompt) == list(EXPERTS)
  slow = Slow(model, params, mixed.config)
  slow.experts = [expert_slice(model, params, e) for e in best]
  ids, weights = slow.text(PROMPT, 5, np.full(2, 0.5))
  tokens = list(writer)
  assert [t.id for t in tokens] == ids[4:]
  np.testing.assert_allclose([list(t.weights.values()) for t in tokens], weights, atol=2e-5)


def test_identical_experts_write_as_one():
  model = tiny()
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x[:, :1].repeat(4, 1) if 'experts' in str(path) else x, drawn(model))
  dense, own = expert_slice(model, params, 'law')
  weights = dict(zip(EXPERTS, (0.1, 0.2, 0.3, 0.4)))
  mixed = list(Writer(Mixture(ExpertMembers(model), params, MixConfig(
      prior='fixed', weights=weights)), PROMPT, GREEDY))
  alone = list(Writer(Mixture(ExpertMembers(dense), own), PROMPT, GREEDY))
  assert [t.id for t in mixed] == [t.id for t in alone]
  np.testing.assert_allclose([t.logp for t in mixed], [t.logp for t in alone], atol=4e-6)
  for token in mixed:
    np.testing.assert_allclose(list(token.weights.values()), list(weights.values()), rtol=1e-6)


def test_one_expert_is_that_expert():
  model = tiny()
  params = drawn(model)
  dense, own = expert_slice(model, params, 'bio')
  alone = list(Writer(Mixture(ExpertMembers(dense, 'bio'), own), PROMPT, GREEDY))
  only = list(Writer(Mixture(ExpertMembers(model), params, MixConfig(members=('bio',))), PROMPT,
                     GREEDY))
  assert only == alone and all(t.weights == {'bio': 1.0} for t in only)


@pytest.mark.parametrize('length', [1, 6, 8])
def test_the_context_is_used_to_its_end_and_no_further(length):
  mixed, model, params = mixture()  # a context of 8
  prompt = [EOD, *batch_of([0], length=8)['tokens_BL'][0].tolist()][:length]
  writer = Writer(mixed, prompt, SamplingConfig(max_tokens=99, temperature=0))
  assert writer.room == 9 - length
  ids, _ = Slow(model, params, mixed.config).text(prompt, 9 - length, np.full(4, 0.25))
  assert [t.id for t in writer] == ids[length:]


def test_what_cannot_be_a_prompt_is_refused():
  mixed, _, _ = mixture()
  with pytest.raises(BadInput, match='empty prompt'):
    Writer(mixed, [], GREEDY)
  with pytest.raises(BadInput, match='the prompt has 9 tokens, the context 8'):
    Writer(mixed, [1] * 9, GREEDY)
