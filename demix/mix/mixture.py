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
from demix.settings import check_values, nearest, option

PRIORS = ('none', 'uniform', 'updating', 'cached', 'fixed')

# What reads each option, in words and as a test of the config: set without that, it is refused.
_PREFIX = 'an option of posterior=prefix', lambda c: c.prior != 'none' and c.posterior == 'prefix'
_CLUSTERS = 'an option of posterior=clusters', lambda c: c.posterior == 'clusters'
_GATE = 'a simple average has no gate', lambda c: c.prior != 'none'
_MOVES = 'an option of priors updating and cached', lambda c: c.prior in ('updating', 'cached')
WHEN = {
    'window': _PREFIX, 'decay': _PREFIX,
    'clusterer': _CLUSTERS, 'kernel': _CLUSTERS, 'kernel_temperature': _CLUSTERS,
    'kernel_tokens': _CLUSTERS,
    'temperature': _GATE, 'weights_k': _GATE, 'experts_k': _GATE,
    'order': ('it orders softmax and weights_k', lambda c: c.prior != 'none' and c.weights_k > 0),
    'renormalise': ('an option of order=softmax_topk with weights_k', lambda c: (
        c.prior != 'none' and c.weights_k > 0 and c.order == 'softmax_topk')),
    'alpha': _MOVES, 'blocks_per_update': _MOVES,
    'blocks': ('an option of prior=cached', lambda c: c.prior == 'cached'),
}


@dataclasses.dataclass(frozen=True)
class MixConfig:
  """How members are mixed."""
  prior: str = option('uniform', 'none (simple average, whatever the text), uniform, updating '
                      '(moves with the blocks read), cached (estimated on dev text) or fixed')
  posterior: str = option('prefix', 'evidence: prefix (the papers), last_token (as released), '
                          'clusters (c-BTM) or none (the prior is the weights)')
  members: tuple = option((), 'experts that take part; (): all')
  weights: dict = option({}, 'prior=fixed: weight of each expert, --mix.weights.NAME=0.5')
  window: int = option(0, 'prefix: evidence of the last so many tokens only; 0: all', low=0)
  decay: float = option(1.0, 'prefix: older evidence fades by this factor a token',
                       above=0, high=1)
  clusterer: str = option('', 'clusters: a token store that prepare --discover made; that of the '
                          'models by default')
  kernel: str = option('d2', 'clusters: d2, exp(-d²/T) as c-BTM is written, or d4, exp(-d⁴/T) as '
                       'released')
  kernel_temperature: float = option(0.1, 'clusters: T of the kernel (mix.weights_k=1: the '
                                     'nearest one alone)', above=0)
  kernel_tokens: int = option(0, 'clusters: only the first so many tokens of a block count, then '
                              'the weights stay; 0: all before each token', low=0)
  temperature: float = option(1.0, 'gate: log prior + evidence are divided by it '
                              '(mix.combine=pick: the best one alone)', above=0)
  experts_k: int = option(0, 'experts that are run: the largest of a fixed or cached prior, or, in '
                          'generation, of the posterior after the prompt; 0: all', low=0)
  weights_k: int = option(0, 'gate: experts with a weight at each token (saves no time); 0: all',
                         low=0)
  order: str = option('topk_softmax', 'gate: topk_softmax or softmax_topk')
  renormalise: bool = option(True, 'gate: weights that are kept sum to 1')
  combine: str = option('probabilities', 'probabilities (the papers), logits or pick')
  alpha: float = option(0.3, 'updating, cached: weight of a new value in the moving mean',
                       above=0, high=1)
  blocks: int = option(200, 'cached, given, best: full blocks of dev text, a fixed sample '
                        'in shuffled order', low=1)
  blocks_per_update: int = option(2, 'updating, cached: blocks read between two updates', low=1)

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'mix.')
    choices = {'prior': PRIORS, 'posterior': evidence.POSTERIORS, 'order': gate.ORDERS,
               'combine': combine.KINDS, 'kernel': evidence.KERNELS}
    for name, known in choices.items():
      value = getattr(self, name)
      if value not in known:
        raise BadInput(f'mix.{name}={value!r}: no such choice{nearest(str(value), known)}')
    if self.posterior == 'clusters' and self.prior in ('none', 'updating', 'cached'):
      raise BadInput(f'mix.prior={self.prior} with mix.posterior=clusters: a prior moves by '
                     'likelihoods, clusters look at the words; choose uniform or fixed')
    if self.prior in ('updating', 'cached') and self.posterior == 'none':
      raise BadInput(f'mix.prior={self.prior} with mix.posterior=none: without evidence no prior '
                     'moves; choose prefix or last_token')
    if bool(self.weights) != (self.prior == 'fixed'):
      raise BadInput(f'mix.prior={self.prior} with {len(self.weights)} mix.weights: prior=fixed '
                     'needs them, no other prior reads them')
    for name in self.idle():
      raise BadInput(f'mix.{name}={getattr(self, name)} has no effect with mix.prior={self.prior}, '
                     f'mix.posterior={self.posterior}: {WHEN[name][0]}; leave it out')

  def idle(self) -> list[str]:
    """Names of fields that are set, and that nothing reads with these priors and evidence."""
    return [name for name, (_, used) in WHEN.items()
            if getattr(self, name) != getattr(type(self), name) and not used(self)]

  def effective(self) -> 'MixConfig':
    """The config without what is idle, each at its default."""
    return dataclasses.replace(self, **{name: getattr(type(self), name) for name in self.idle()})

  @property
  def fixed(self) -> bool:
    """The prior is known before any text is read, and not uniform: it can choose experts."""
    return self.prior in ('fixed', 'cached')


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
