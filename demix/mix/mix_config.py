"""How members are mixed, as data: read without JAX."""

import dataclasses

from demix.errors import BadInput
from demix.settings import check_values, option

PRIORS = ('none', 'uniform', 'updating', 'cached', 'fixed')
POSTERIORS = ('prefix', 'last_token', 'clusters', 'none')

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
                      '(moves with the blocks read), cached (estimated on dev text) or fixed',
                      choices=PRIORS)
  posterior: str = option('prefix', 'evidence: prefix (the papers), last_token (as released), '
                          'clusters (c-BTM) or none (the prior is the weights)',
                          choices=POSTERIORS)
  members: tuple = option((), 'experts that take part; (): all')
  weights: dict = option({}, 'prior=fixed: weight of each expert, --mix.weights.NAME=0.5')
  window: int = option(0, 'prefix: evidence of the last so many tokens only; 0: all', low=0)
  decay: float = option(1.0, 'prefix: older evidence fades by this factor a token',
                       above=0, high=1)
  clusterer: str = option('', 'clusters: a token store that prepare --discover made; that of the '
                          'models by default')
  kernel: str = option('d2', 'clusters: d2, exp(-d²/T) as c-BTM is written, or d4, exp(-d⁴/T) as '
                       'released', choices=('d2', 'd4'))
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
  order: str = option('topk_softmax', 'gate: topk_softmax or softmax_topk',
                      choices=('topk_softmax', 'softmax_topk'))
  renormalise: bool = option(True, 'gate: weights that are kept sum to 1')
  combine: str = option('probabilities', 'probabilities (the papers), logits or pick',
                        choices=('probabilities', 'logits', 'pick'))
  alpha: float = option(0.3, 'updating, cached: weight of a new value in the moving mean',
                       above=0, high=1)
  blocks: int = option(200, 'cached, given, best: full blocks of dev text, a fixed sample '
                       'in shuffled order', low=1)
  blocks_per_update: int = option(2, 'updating, cached: blocks read between two updates', low=1)

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'mix.')
    if self.posterior == 'clusters' and self.prior in ('none', 'updating', 'cached'):
      raise BadInput(f'mix.prior={self.prior} with mix.posterior=clusters: a prior moves by '
                     'likelihoods, clusters look at the words; choose uniform or fixed')
    if self.prior == 'cached' and self.blocks < self.blocks_per_update:
      raise BadInput(f'mix.blocks={self.blocks} is below mix.blocks_per_update='
                     f'{self.blocks_per_update}, and a cached prior needs one update: give more '
                     'blocks')
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
