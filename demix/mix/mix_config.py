"""How members are mixed, as data: read without JAX."""

import dataclasses

from demix.errors import BadInput
from demix.settings import check_values, option

OF_CLUSTERS = ('clusterer', 'kernel', 'kernel_temperature', 'kernel_tokens')
PRIORS = ('none', 'uniform', 'updating', 'cached', 'fixed')
POSTERIORS = ('prefix', 'last_token', 'clusters', 'none')


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
  blocks: int = option(200, 'cached: full blocks of dev text that are read, in file order', low=1)
  blocks_per_update: int = option(2, 'updating, cached: blocks read between two updates', low=1)

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'mix.')
    if self.posterior in ('last_token', 'clusters') and (self.window or self.decay != 1):
      raise BadInput(f'mix.posterior={self.posterior} with window={self.window}, decay='
                     f'{self.decay}: these are options of prefix')
    changed = [k for k in OF_CLUSTERS if getattr(self, k) != getattr(type(self), k)]
    if changed and self.posterior != 'clusters':
      raise BadInput(f'mix.{changed[0]}={getattr(self, changed[0])} with mix.posterior='
                     f'{self.posterior}: an option of clusters')
    if self.posterior == 'clusters' and self.prior in ('none', 'updating', 'cached'):
      raise BadInput(f'mix.prior={self.prior} with mix.posterior=clusters: a prior moves by '
                     'likelihoods, clusters look at the words; choose uniform or fixed')
    if self.prior in ('updating', 'cached') and self.posterior == 'none':
      raise BadInput(f'mix.prior={self.prior} with mix.posterior=none: without evidence no prior '
                     'moves; choose prefix or last_token')
    if bool(self.weights) != (self.prior == 'fixed'):
      raise BadInput(f'mix.prior={self.prior} with {len(self.weights)} mix.weights: prior=fixed '
                     'needs them, no other prior reads them')

  @property
  def fixed(self) -> bool:
    """The prior is known before any text is read, and not uniform: it can choose experts."""
    return self.prior in ('fixed', 'cached')
