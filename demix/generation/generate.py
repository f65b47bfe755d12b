"""Text from a Mixture, token by token, with a key and value cache for each expert that runs.

The posterior moves with every token, the prompt's and the written ones: the weights of a token are
those that scoring the same text as one block would give. Of the two k (design decision 7),
`experts_k` is chosen once (by a fixed prior before the prompt is read, else by the posterior after
all members have scored it) and only those run on; `weights_k` truncates the weights of each token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from demix.errors import BadInput
from demix.generation.sampling import SamplingConfig, draw
from demix.mix import combine
from demix.mix.mixture import Mixture, next_log_weights

_SHORTEST = 16  # prompts are padded to this or a larger power of two: few programs for all lengths


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of a text.

  Attributes:
    id: in the vocabulary. logp: its log-probability under the mixture, before temperature.
    weights: {expert: weight} that it was drawn with.
  """
  id: int
  logp: float
  weights: dict


@functools.partial(jax.jit, static_argnums=0)
def read_prompt(members, params, tokens_P, length):
  """Reads a prompt of `length` tokens, padded to P.

  Returns:
    {'cache', 'logits_KV': of the next token, 'loglik_KC': of the tokens after the first, 'length':
    how many of those there are}.
  """
  hidden_KPD, cache = members.advance(params, members.empty(), tokens_P, 0)
  P, C = tokens_P.shape[0], members.context
  targets = jnp.broadcast_to(jnp.pad(tokens_P[1:], (0, 1)), hidden_KPD.shape[:2])
  loglik_KP = -members.nll(params, hidden_KPD, targets)
  loglik_KP = jnp.where(jnp.arange(P) < length - 1, loglik_KP, 0.0)
  last_KD = jax.lax.dynamic_index_in_dim(hidden_KPD, length - 1, 1, keepdims=False)
  return {'cache': cache, 'logits_KV': members.logits(params, last_KD),
          'loglik_KC': jnp.pad(loglik_KP, ((0, 0), (0, C - P))), 'length': length - 1}


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def step(members, config, sampling, params, state, log_prior_K, key, distances_K=None):
  """Draws the next token and reads it.

  Returns:
    state, (token, its log p, weights [K] it was drawn with).
  """
  logp_KV = jax.nn.log_softmax(state['logits_KV'], -1)
  length, loglik_KC = state['length'], state['loglik_KC']
  weights_K = next_log_weights(config, loglik_KC, log_prior_K, length, distances_K)
  if config.combine == 'logits':
    logp_V = combine.logits(weights_K, state['logits_KV'])
  elif config.combine == 'pick':
    logp_V = logp_KV[weights_K.argmax()]
  else:
    logp_V = combine.probabilities(weights_K[:, None], logp_KV)
  token = draw(logp_V, jax.random.fold_in(key, length), sampling).astype(jnp.int32)
  loglik_KC = jax.lax.dynamic_update_index_in_dim(loglik_KC, logp_KV[:, token], length, 1)
  hidden_K1D, cache = members.advance(params, state['cache'], token[None], length + 1)
  state = {'cache': cache, 'logits_KV': members.logits(params, hidden_K1D[:, 0]),
           'loglik_KC': loglik_KC, 'length': length + 1}
  return state, (token, logp_V[token], jnp.exp(weights_K))


@functools.partial(jax.jit, static_argnums=0)
def posterior(config, loglik_KC, log_prior_K, length, distances_K=None):
  """log weights for the next token, [K], every member kept."""
  config = dataclasses.replace(config, weights_k=0)
  return next_log_weights(config, loglik_KC, log_prior_K, length, distances_K)


class Writer:
  """A mixture that has read a prompt. Iterating writes on: one Token at a time.

  Args:
    mixture: what writes.
    ids: the prompt, with what starts a text (end-of-document) before it; at least that.
    sampling: a SamplingConfig.
    reading: evidence of clusters: what is told every id after the first (`read`) and has the
      `distances` [E] of all members (data.clusterer.Reading); else None.

  Attributes:
    names: of the experts that run. after_prompt: {expert: weight} of all that read the prompt.
    room: tokens that the context has place for.

  Raises:
    BadInput: the prompt is empty, or longer than the context.
  """

  def __init__(self, mixture: Mixture, ids, sampling: SamplingConfig, reading=None):
    sampling.check()
    members, config = mixture.members, mixture.config
    ids, C = np.asarray(ids, np.int32), members.context
    if config.prior == 'updating':
      raise BadInput('mix.prior=updating moves from block to block, and a text that is written is '
                     'one block: take uniform, which is what it would be')
    if not len(ids):
      raise BadInput('an empty prompt: nothing to go on from')
    if len(ids) > C:
      raise BadInput(f'the prompt has {len(ids)} tokens, the context {C}: shorten the prompt')
    self.sampling, self.room = sampling, C - len(ids) + 1
    members, params = members.take(mixture.params, mixture.routes_K)
    size = min(C, max(_SHORTEST, 1 << (len(ids) - 1).bit_length()))
    padded = np.zeros(size, np.int32)
    padded[:len(ids)] = ids
    state = read_prompt(members, params, padded, len(ids))
    log_prior_K, names = mixture.log_prior_K, mixture.names
    self._reading, self._routes = reading, mixture.routes_K
    if reading:
      for i in ids[1:]:
        reading.read(int(i))
    weights = np.exp(posterior(mixture.static, state['loglik_KC'], log_prior_K, len(ids) - 1,
                               self._distances()))
    self.after_prompt = dict(zip(names, weights.tolist()))
    if config.experts_k and config.experts_k < len(names):
      chosen = np.sort(np.argsort(-weights, kind='stable')[:config.experts_k])
      members, params = members.take(params, chosen)
      state |= {'cache': members.keep(state['cache'], chosen),
                'logits_KV': state['logits_KV'][chosen], 'loglik_KC': state['loglik_KC'][chosen]}
      log_prior_K, names = log_prior_K[chosen], tuple(names[i] for i in chosen)
      self._routes = self._routes[chosen]
    self.names = names
    self._step = functools.partial(step, members, mixture.static, sampling, params)
    self._state, self._log_prior = state, log_prior_K
    self._key = jax.random.key(sampling.seed)

  def _distances(self):
    """Of the text so far, to the members that run; None where they are no evidence."""
    return np.float32(self._reading.distances[self._routes]) if self._reading else None

  def __iter__(self):
    """Tokens until `max_tokens` or the end of the context; the caller stops earlier."""
    pending = None
    for _ in range(min(self.sampling.max_tokens, self.room)):
      self._state, out = self._step(self._state, self._log_prior, self._key, self._distances())
      if self._reading:  # the next weights wait for this token's text
        self._reading.read(int(out[0]))
      if pending:  # read while the next one is computed
        yield self._token(pending)
      pending = out
    yield self._token(pending)

  def _token(self, out) -> Token:
    token, logp, weights = jax.device_get(out)
    return Token(int(token), float(logp), dict(zip(self.names, weights.tolist())))
