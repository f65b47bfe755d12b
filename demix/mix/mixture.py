"""The Mixture: members + evidence + gate + combine, scored and written with.

Whatever its members are (experts of one DEMix LM, a single LM, whole LMs of a forest), what uses a
Mixture sees log-probabilities per token and the weights that made them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from demix.errors import BadInput
from demix.mix import combine, evidence, gate, prior
from demix.mix.mix_config import MixConfig
from demix.settings import nearest

__all__ = ['MixConfig', 'Mixture']


def log_weights(config: MixConfig, loglik_EBL, log_prior_EB, segments_BL=None,
                distances_EBL=None):
  """Weights of members for each token, from what precedes it: log [E, B, L].

  p(D = e | x_<t) ∝ p(x_<t | e) p(e) (DEMix §5, BTM §2.2). With last_token the evidence is the one
  token before, and the first token of a block gets uniform weights whatever the prior, as in the
  released code. With clusters it is distances_EBL, see evidence.clusters.
  """
  if config.prior == 'none':
    return jnp.full(loglik_EBL.shape, -np.log(loglik_EBL.shape[0]), jnp.float32)
  scores = jnp.broadcast_to(log_prior_EB[:, :, None], loglik_EBL.shape)
  if config.posterior == 'prefix':
    scores = scores + evidence.preceding(loglik_EBL, decay=config.decay, window=config.window,
                                         segments_BL=segments_BL)
  elif config.posterior == 'last_token':
    first = evidence.starts(loglik_EBL.shape[1:], segments_BL)
    scores = jnp.where(first, 0.0, scores + evidence.preceding(
        loglik_EBL, window=1, segments_BL=segments_BL))
  elif config.posterior == 'clusters':
    scores = scores + near(config, distances_EBL)
  return gated(config, scores)


def near(config: MixConfig, distances):
  """Evidence of clusters, like `distances`."""
  return evidence.clusters(distances, kernel=config.kernel, temperature=config.kernel_temperature)


def next_log_weights(config: MixConfig, loglik_KC, log_prior_K, length, distances_K=None):
  """`log_weights` for the token after the first `length` of one text, [K], in time C."""
  K = loglik_KC.shape[0]
  if config.prior == 'none':
    return jnp.full(K, -np.log(K), jnp.float32)
  scores = log_prior_K
  if config.posterior == 'prefix':
    scores = scores + evidence.following(loglik_KC, length, decay=config.decay,
                                         window=config.window)
  elif config.posterior == 'last_token':
    scores = jnp.where(length == 0, 0.0, scores + evidence.following(loglik_KC, length, window=1))
  elif config.posterior == 'clusters':
    scores = scores + near(config, distances_K)
  return gated(config, scores)


def gated(config: MixConfig, scores):
  """The gate of a config over the first axis."""
  return gate.log_weights(scores, temperature=config.temperature, top_k=config.weights_k,
                          order=config.order, renormalise=config.renormalise)


def moving_prior(config: MixConfig, loglik_EBL, full_B, state, segments_BL=None):
  """Priors of blocks that are read in order; see prior.moving.

  Evidence is what precedes the last position of a block. Of a block of several documents it is all
  of them together, up to the last token: they are of one domain, and the last may be short. The
  posterior is the whole one: a member that `weights_k` cuts off at a token could never recover.
  """
  last = dict(decay=config.decay, window=config.window) if config.posterior == 'prefix' else dict(
      window=1)
  before_EBL = evidence.preceding(loglik_EBL, **last)
  last_EB = before_EBL[..., -1]
  if segments_BL is not None:
    end_B = jnp.maximum((segments_BL > 0).sum(1) - 1, 0)
    last_EB = jnp.take_along_axis(before_EBL, end_B[None, :, None], 2)[..., 0]
  whole = functools.partial(gate.log_weights, temperature=config.temperature)
  return prior.moving(whole, last_EB, full_B, state, alpha=config.alpha,
                      group=config.blocks_per_update)


@dataclasses.dataclass(frozen=True)
class Scored:
  """What `Mixture.score` returns: natural logarithms, float32.

  Attributes:
    logp_BL: of each target. log_weights_KBL, loglik_KBL: of the members that ran.
  """
  logp_BL: jax.Array
  log_weights_KBL: jax.Array
  loglik_KBL: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def scored(members, config: MixConfig, params, routes_K, batch, log_prior_KB, full_B):
  """The program behind `Mixture.score`."""
  segments = batch.get('segments_BL')
  mixes_logits = config.combine == 'logits'
  nll_KBL, hidden_KBLD = members.score(params, batch, routes_K, hidden=mixes_logits)
  if config.prior == 'updating':
    log_prior_KB, _ = moving_prior(config, -nll_KBL, full_B, (log_prior_KB[:, 0], jnp.int32(0)),
                                   segments)
  weights = log_weights(config, -nll_KBL, log_prior_KB, segments, batch.get('distances_KBL'))
  if mixes_logits:
    logp = mixed_logits(members, params, routes_K, hidden_KBLD, weights, batch['targets_BL'])
  else:
    logp = getattr(combine, config.combine)(weights, -nll_KBL)
  return Scored(logp, weights, -nll_KBL)


def mixed_logits(members, params, routes_K, hidden_KBLD, log_weights_KBL, targets_BL):
  """log p of targets when logits are mixed, [B, L]; row by row, so that [K, B, L, V] is never
  stored."""
  def row(parts):
    hidden_KLD, weights_KL, targets_L = parts
    logp_LV = combine.logits(weights_KL, members.logits(params, hidden_KLD, routes_K))
    return jnp.take_along_axis(logp_LV, targets_L[:, None], 1)[:, 0]
  return jax.lax.map(row, (jnp.moveaxis(hidden_KBLD, 1, 0), jnp.moveaxis(log_weights_KBL, 1, 0),
                           targets_BL))


jax.tree_util.register_dataclass(Scored, ['logp_BL', 'log_weights_KBL', 'loglik_KBL'], [])


def starting_prior(config: MixConfig, names, log_prior_E=None) -> np.ndarray:
  """log prior [E] over `names`: the config's own, the one that is given, or uniform.

  Raises:
    BadInput: fixed weights that are none, or a cached prior that is missing.
  """
  if config.prior == 'fixed':
    log_prior_E = prior.from_weights(config.weights, names)
  elif config.prior == 'cached' and log_prior_E is None:
    raise BadInput('mix.prior=cached without a prior: estimate one on dev text (evaluate '
                   '--mix=cached --save_priors=FILE), name it as --prior=FILE:DOMAIN')
  elif log_prior_E is None:
    log_prior_E = prior.uniform(len(names))
  return np.asarray(log_prior_E, np.float32)


def choose(config: MixConfig, names, log_prior_E) -> list[int]:
  """Which members are run: those of `config.members`, and of them, with a fixed prior, the
  `config.experts_k` largest.

  Raises:
    BadInput: an unknown expert, or a k above their number.
  """
  for name in config.members:
    if name not in names:
      raise BadInput(f'mix.members: no expert {name!r}{nearest(name, names)}')
  routes = [i for i, name in enumerate(names) if not config.members or name in config.members]
  for key in ('experts_k', 'weights_k'):
    if getattr(config, key) > len(routes):
      raise BadInput(f'mix.{key}={getattr(config, key)} for {len(routes)} experts '
                     f'({", ".join(names[i] for i in routes)}): at most that many')
  if config.fixed and config.experts_k:
    routes = sorted(sorted(routes, key=lambda i: -log_prior_E[i])[:config.experts_k])
  return routes


class Mixture:
  """Members with a prior.

  Args:
    members: mix.members.ExpertMembers, or what has its methods.
    params: their parameters.
    config: a MixConfig.
    log_prior_E: over all members of `members`; None for priors that need none. `config.members`
      and, with a fixed prior, `config.experts_k` choose among them, and only those are run.

  Attributes:
    names: of the members that run, in order. log_prior_K: theirs, summing to 1.

  Raises:
    BadInput: an unknown expert, a k above their number, a prior that is missing.
  """

  def __init__(self, members, params, config: MixConfig = MixConfig(), log_prior_E=None):
    config.check()
    self.members, self.params, self.config = members, params, config
    names = members.names
    log_prior_E = starting_prior(config, names, log_prior_E)
    routes = choose(config, names, log_prior_E)
    self.routes_K = np.asarray(routes, np.int32)
    self.names = tuple(names[i] for i in routes)
    chosen = log_prior_E[self.routes_K].astype(np.float64)
    if not np.isfinite(chosen.max()):
      raise BadInput(f'the prior gives no weight to any of {", ".join(self.names)}: name members '
                     'that it knows')
    self.log_prior_K = (chosen - np.logaddexp.reduce(chosen)).astype(np.float32)

  def score(self, batch: dict, log_prior_KB=None, full_B=None) -> Scored:
    """Scores the targets of a batch. With an updating prior its rows are blocks in order.

    Args:
      batch: tokens_BL, targets_BL and, where rows hold several documents, segments_BL and
        positions_BL; with clusters distances_EBL: of what precedes each target, squared, to the
        cluster of each of `members`.
      log_prior_KB: another prior for each row.
      full_B: rows that move an updating prior; None: all.

    Raises:
      BadInput: an updating prior, and rows that are not a multiple of mix.blocks_per_update.
    """
    rows, group = batch['tokens_BL'].shape[0], self.config.blocks_per_update
    if self.config.prior == 'updating' and rows % group:
      raise BadInput(f'{rows} blocks are not a multiple of mix.blocks_per_update={group}: add '
                     'empty ones, not full')
    if log_prior_KB is None:
      log_prior_KB = np.repeat(self.log_prior_K[:, None], rows, 1)
    used = {n: batch[n] for n in ('tokens_BL', 'targets_BL', 'segments_BL', 'positions_BL')
            if n in batch}
    if self.config.posterior == 'clusters':
      used['distances_KBL'] = np.asarray(batch['distances_EBL'], np.float32)[self.routes_K]
    full_B = np.ones(rows, bool) if full_B is None else full_B
    return scored(self.members, self.static, self.params, self.routes_K, used, log_prior_KB, full_B)

  @functools.cached_property
  def static(self) -> MixConfig:
    """The config without what is in arrays: hashable, the same program for every prior."""
    kind = self.config.prior if self.config.prior in ('none', 'updating') else 'uniform'
    return dataclasses.replace(self.config, members=(), weights={}, prior=kind, clusterer='')
