"""Every way of mixing, scored in one pass over the data: members run once, each mode is arithmetic
on their log-likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from demix.data.batches import domain_row, stack
from demix.data.packing import Stream, empty_row
from demix.data.store import TokenStore
from demix.errors import BadInput
from demix.eval.perplexity import Part, Score
from demix.mix import combine, prior
from demix.mix.mixture import OF_CLUSTERS, MixConfig, log_weights, mixed_logits, moving_prior
from demix.settings import nearest

NAMES = ('given', 'best', 'average', 'uniform', 'updating', 'cached')
CLUSTERS = 'clusters'  # not one of all: it needs a clusterer


@dataclasses.dataclass(frozen=True)
class Mode:
  """A column of the table.

  Attributes:
    name: one of NAMES, or `mix` for a config of one's own.
    config: how members are mixed; `given` and `best` run one member.
  """
  name: str
  config: MixConfig

  @property
  def prior(self):
    """As results.json names it; None where there is none."""
    return {'given': None, 'best': 'dev', 'average': 'none'}.get(self.name, self.config.prior)

  @property
  def posterior(self):
    """As results.json names it; None where there is none."""
    single = self.name in ('given', 'best', 'average') or self.config.prior == 'none'
    return None if single or self.config.posterior == 'none' else self.config.posterior

  @property
  def single(self) -> bool:
    return self.name in ('given', 'best')


def modes(names, posteriors, base: MixConfig) -> tuple[Mode, ...]:
  """The columns for names out of NAMES; those that look at evidence once per posterior.

  Raises:
    BadInput: no such mode or posterior, or options that do not go together.
  """
  out, usual, whole = [], MixConfig(), base
  base = dataclasses.replace(base, **{k: getattr(usual, k) for k in OF_CLUSTERS})
  for name in names:
    if name == CLUSTERS:
      out.append(Mode(name, dataclasses.replace(whole, prior='uniform', posterior=CLUSTERS)))
      continue
    if name not in NAMES:
      raise BadInput(f'--mix={name}: no such way of mixing{nearest(name, (*NAMES, CLUSTERS))}; or '
                     'name a config file, configs/mix.py:ARG')
    if name in NAMES[:3]:
      out.append(Mode(name, dataclasses.replace(base, prior='none', posterior='none')))
      continue
    for posterior in posteriors:
      out.append(Mode(name, dataclasses.replace(base, prior=name, posterior=posterior)))
  for mode in out:
    mode.config.check()
  return tuple(out)


def options(config: MixConfig) -> dict:
  """What of a config changes the weights of a cached prior, beside prior and posterior."""
  names = ('decay', 'window', 'temperature', 'weights_k', 'experts_k', 'order', 'renormalise')
  return {n: getattr(config, n) for n in names}


def clustered(modes) -> MixConfig | None:
  """The config of the first mode whose evidence is clusters, or None."""
  return next((m.config for m in modes if m.config.posterior == CLUSTERS), None)


@dataclasses.dataclass
class Mixed:
  """What was scored of one domain.

  Attributes:
    scores: one per mode. members: the single expert of modes that have one, by name, else None.
    priors: {posterior: prior.Prior} that were estimated. weights: mean weight of each expert over
      the scored tokens, {expert: weight} per mode.
  """
  scores: list
  members: list
  priors: dict
  weights: list


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(members, configs, params, routes_R, batch, full_B, priors, places, states):
  """One batch through the members and every mode.

  Args:
    configs: a MixConfig per mode. routes_R: members that run, R of them.
    full_B: rows that are full blocks.
    priors: log prior [k] per mode. places: int [k] per mode, its members among the R.
    states: (log prior [k], count) per mode, for those that move.

  Returns:
    loglik_RBL; per mode logp_BL, log weights [k, B, L], log priors [k, B], and the new state.
  """
  logits = any(c.combine == 'logits' for c in configs)
  nll_RBL, hidden_RBLD = members.score(params, batch, routes_R, hidden=logits)
  out = []
  for config, log_prior, place, state in zip(configs, priors, places, states):
    loglik = -nll_RBL[place]
    prior_kB = jnp.repeat(log_prior[:, None], loglik.shape[1], 1)
    if config.prior == 'updating':
      prior_kB, state = moving_prior(config, loglik, full_B, state)
    distances = batch['distances_RBL'][place] if 'distances_RBL' in batch else None
    weights = log_weights(config, loglik, prior_kB, distances_EBL=distances)
    if config.combine == 'logits':
      logp = mixed_logits(members, params, routes_R[place], hidden_RBLD[place], weights,
                          batch['targets_BL'])
    else:
      logp = getattr(combine, config.combine)(weights, loglik)
    out.append((logp, weights, prior_kB, state))
  return -nll_RBL, out


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_dev(members, configs, params, routes_R, batch, full_B, states):
  """Development text: summed log-likelihood [R] of full blocks, and the moved prior per config."""
  loglik = -members.score(params, batch, routes_R)[0]
  total = jnp.where(full_B[:, None], loglik, 0.0).sum((1, 2))
  return total, [moving_prior(c, loglik, full_B, s)[1] for c, s in zip(configs, states)]


def batches(stream: Stream, count: int, length: int, batch_size: int, domain: int = 0):
  """Rows 0 … count of a stream in order: (batch, rows that are no padding, full_B)."""
  padding = {**empty_row(length), 'domain': np.int32(domain)}
  for at in range(0, count, batch_size):
    rows = [domain_row(stream[i], domain, None) for i in range(at, min(count, at + batch_size))]
    used = len(rows)
    batch = stack(rows + [padding] * (batch_size - used))
    yield batch, used, batch['segments_BL'].all(1)


class Evaluation:
  """All modes for one model on the domains of one store.

  Args:
    members, params: mix.members.ExpertMembers and their parameters; with `pick`, params is None.
    digests: content digest of each member, for the priors.
    store: an open token store.
    modes: columns.
    length: L, tokens of a block.
    batch_size: rows per forward pass; rounded up to whole updates of the prior.
    stored: cached priors by (domain, posterior) that are used instead of estimating; domain '' is
      any.
    dump: a Dump that takes the arrays, or None.
    pick: names of members → (members, params) with these and perhaps others: what is read from disk
      only when it is needed.
    clusterer: for modes whose evidence is clusters: a data.clusterer.Clusterer whose centres are
      those of the members.
  """

  def __init__(self, members, params, digests, store: TokenStore, modes, *, length: int,
               batch_size: int = 32, stored=None, dump=None, pick=None, clusterer=None):
    self.dump, self.pick = dump, pick or (lambda names: (members, params))
    self.members, self.digests, self.clusterer = members, digests, clusterer
    if clusterer:
      self._tokenizer, self._seen = store.tokenizer(), clustered(modes).kernel_tokens
    self.store, self.modes, self.length = store, modes, length
    self.names, self.stored = members.names, stored or {}
    base = modes[0].config
    for name in base.members:
      if name not in self.names:
        raise BadInput(f'mix.members: no expert {name!r}{nearest(name, self.names)}')
    self.taking_part = np.asarray([i for i, n in enumerate(self.names)
                                   if not base.members or n in base.members], np.int32)
    here = [self.names[i] for i in self.taking_part]
    for key in ('experts_k', 'weights_k'):
      if max(getattr(m.config, key) for m in modes) > len(here):
        raise BadInput(f'mix.{key}={getattr(base, key)} for {len(here)} experts '
                       f'({", ".join(here)}): at most that many')
    group = base.blocks_per_update
    self.batch_size = -(-batch_size // group) * group
    # The program knows nothing of what arrays say.
    self.static = tuple(dataclasses.replace(
        m.config, members=(), weights={}, experts_k=0, clusterer='', prior=m.config.prior if (
            m.config.prior in ('none', 'updating')) else 'uniform') for m in modes)

  def _read(self, routes):
    """Members, parameters and places among them of the members `routes`."""
    names = [self.names[i] for i in routes]
    members, params = self.pick(names)
    return members, params, np.asarray([members.names.index(n) for n in names], np.int32)

  # ---- development text ------------------------------------------------------------------------

  def estimate(self, domain: str, split: str = 'valid') -> dict:
    """{posterior: prior.Prior} from the domain's development text.

    Raises:
      BadInput: fewer full blocks there than one update of the prior reads.
    """
    configs = {m.config.posterior: m.config for m in self.modes if m.config.prior == 'cached'}
    if not configs:  # `given` and `best` need one all the same
      configs = {'prefix': dataclasses.replace(self.modes[0].config, prior='cached',
                                               posterior='prefix')}
    one = next(iter(configs.values()))
    have = len(self.store.tokens(domain, split)) if split in self.store.splits(domain) else 0
    need = one.blocks_per_update
    if have // self.length < need:
      raise BadInput(f'{self.store.path}/{domain}/{split}: {have} tokens are '
                     f'{have // self.length} full blocks of {self.length}, a prior needs {need}: '
                     'give it more development text, or another prior')
    stream = Stream(self.store, domain, split, self.length)
    count = min(len(stream), one.blocks)
    R = len(self.taking_part)
    static = tuple(dataclasses.replace(c, members=(), weights={}, experts_k=0)
                   for c in configs.values())
    states = [(jnp.asarray(prior.uniform(R)), jnp.int32(0)) for _ in static]
    total = np.zeros(R)
    members, params, routes = self._read(self.taking_part)
    for batch, used, full in batches(stream, count, self.length, self.batch_size):
      full[used:] = False
      arrays = {n: batch[n] for n in ('tokens_BL', 'targets_BL')}
      part, states = read_dev(members, static, params, routes, arrays, full, states)
      total += np.asarray(part, np.float64)
    entry = self.store.card['domains'][domain]['splits'][split]
    nll = tuple(float(x) for x in -total / (count * self.length))
    out = {}
    for (posterior, config), (log_prior, _) in zip(configs.items(), states):
      out[posterior] = prior.Prior(
          experts=tuple(self.names[i] for i in self.taking_part),
          digests=tuple(self.digests[i] for i in self.taking_part),
          log_weights=tuple(float(x) for x in log_prior), posterior=posterior,
          options=options(config),
          alpha=config.alpha, blocks=count, blocks_per_update=config.blocks_per_update,
          block_length=self.length, domain=domain, split=split, text=entry['tokens_digest'],
          nll=nll)
    return out

  # ---- the text that is scored -----------------------------------------------------------------

  def run(self, part: Part, given: str | None, *, stride: int = 0, limit: int = 0,
          progress=None) -> Mixed:
    """Scores one domain under every mode.

    Args:
      part: domain and split; its route is the domain's number in `dump`.
      given: the domain's own expert; None on a novel domain, which is given the argmax of the
        prior on its development text.
      stride, limit: see perplexity.evaluate.
    """
    domain, names = part.domain, [self.names[i] for i in self.taking_part]
    stored = {p: x for (d, p), x in self.stored.items() if d in (domain, '')}
    for found in stored.values():
      found.log_prior(names, [self.digests[i] for i in self.taking_part])
    needs_dev = any(m.name == 'best' or (m.name == 'given' and given not in names) or
                    (m.config.prior == 'cached' and m.config.posterior not in stored)
                    for m in self.modes)
    estimated = self.estimate(domain) if needs_dev else {}
    priors = estimated | stored
    routes, places, log_priors, singles = self._plan(names, priors, given)
    members, params, rows = self._read(routes)
    states = [(jnp.asarray(lp), jnp.int32(0)) for lp in log_priors]
    stream = Stream(self.store, domain, part.split, self.length, stride=stride, partial=True)
    if not len(stream):
      raise BadInput(f'{self.store.path}/{domain}/{part.split} is empty: nothing to score')
    count = min(len(stream), limit) if limit else len(stream)
    scores = [Score() for _ in self.modes]
    mass = [np.zeros(len(p)) for p in places]
    pending = None

    def collect(batch, used, loglik, out):
      weights_BL = batch['weights_BL']
      size = self.store.token_bytes_V[np.minimum(batch['targets_BL'], self.store.vocab_size - 1)]
      tokens, text = int(weights_BL.sum()), int((size * weights_BL).sum())
      for score, total, (logp, log_w, _, _) in zip(scores, mass, out):
        score.nll -= float((np.asarray(logp, np.float64) * weights_BL).sum())
        score.tokens += tokens
        score.bytes += text
        total += np.einsum('kbl,bl->k', np.exp(np.asarray(log_w, np.float64)), weights_BL)
      if self.dump:
        self.dump.add(batch, used, loglik, out, places)

    for batch, used, full in batches(stream, count, self.length, self.batch_size, part.route):
      full[used:] = False
      arrays = {n: batch[n] for n in ('tokens_BL', 'targets_BL')}
      if self.clusterer:
        distances_EBL = self.clusterer.before_rows(self._tokenizer, batch['targets_BL'],
                                                   self._seen)
        arrays['distances_RBL'] = batch['distances_RBL'] = distances_EBL[routes]
      loglik, out = read(members, self.static, params, rows, arrays, full, log_priors, places,
                         states)
      states = [o[3] for o in out]
      if pending:
        collect(*pending)
      pending = batch, used, loglik, out
      if progress:
        progress(used)
    collect(*pending)
    total = max(1, scores[0].tokens)
    weights = [{self.names[routes[r]]: float(w) / total for r, w in zip(place, m)}
               for place, m in zip(places, mass)]
    return Mixed(scores, singles, estimated, weights)

  def _plan(self, names, priors, given):
    """Which members run, and for each mode: its places among them, log prior, single member."""
    count = len(names)
    chosen, log_priors, singles = [], [], []
    first = next(iter(priors.values()), None)
    for mode in self.modes:
      single = None
      log_prior, mine = prior.uniform(count), np.arange(count)
      if mode.name == 'given':
        single = names.index(given) if given in names else int(np.argmax(first.log_weights))
      elif mode.name == 'best':
        single = int(np.argmin(first.nll))
      elif mode.config.prior == 'fixed':
        log_prior = prior.from_weights(mode.config.weights, self.names)[self.taking_part]
      elif mode.config.prior == 'cached':
        log_prior = np.asarray(priors[mode.config.posterior].log_weights, np.float32)
      if single is not None:
        mine = np.asarray([single])
      elif mode.config.fixed and mode.config.experts_k:
        mine = np.sort(np.argsort(-log_prior, kind='stable')[:mode.config.experts_k])
      log_prior = log_prior[mine].astype(np.float64)
      log_priors.append((log_prior - np.logaddexp.reduce(log_prior)).astype(np.float32))
      chosen.append(mine)
      singles.append(None if single is None else names[single])
    # Members that no mode needs are not run; as many for every domain, so one program does.
    same = len(self.modes) == 1 and not self.dump
    run = chosen[0] if same else np.arange(count)
    places = [np.searchsorted(run, mine).astype(np.int32) for mine in chosen]
    return self.taking_part[run], places, log_priors, singles


class Dump:
  """Collects the arrays of `evaluate --dump` (docs/contracts.md) for one mode."""

  def __init__(self, names, domains, mode: int):
    self.names, self.domains, self.mode = names, domains, mode
    self.parts = []

  def add(self, batch, used, loglik_EBL, out, places):
    """Rows of one batch; padding is left out. Experts without a part in the mode have weight 0."""
    _, log_w, prior_kB, _ = out[self.mode]
    def whole(x_k):
      x_E = np.full((loglik_EBL.shape[0], *x_k.shape[1:]), -np.inf, np.float32)
      x_E[places[self.mode]] = x_k
      return x_E[:, :used]
    self.parts.append({
        'loglik_EBL': np.asarray(loglik_EBL)[:, :used], 'weights_EBL': np.exp(whole(log_w)),
        'log_prior_EB': whole(prior_kB), 'targets_BL': batch['targets_BL'][:used],
        'weights_BL': batch['weights_BL'][:used], 'domain_B': batch['domain_B'][:used]})
    if 'distances_RBL' in batch:
      self.parts[-1]['distances_EBL'] = batch['distances_RBL'][:, :used]

  def arrays(self) -> dict:
    """What is written. log_prior_E is the prior of the first row; log_prior_EB has each row's."""
    out = {}
    for name in self.parts[0]:
      out[name] = np.concatenate([p[name] for p in self.parts], int(name.endswith(('EBL', 'EB'))))
    return out | {'log_prior_E': out['log_prior_EB'][:, 0], 'expert_names': np.asarray(self.names),
                  'domain_names': np.asarray(self.domains)}
