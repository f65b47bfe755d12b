"""Every way of mixing, scored in one pass over the data: members run once, each mode is arithmetic
on their log-likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orjson

from demix import settings
from demix.data.sampling.batches import domain_row, stack
from demix.data.tokens.packing import empty_row
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval.nearest import Nearest, compare
from demix.eval.perplexity import Part, Score
from demix.eval.sequences import Protocol
from demix.eval.ways import Ways, clustered, options
from demix.mix import combine, prior
from demix.mix.mixture import log_weights, mixed_logits, moving_prior
from demix.settings import nearest


@dataclasses.dataclass
class Mixed:
  """What was scored of one domain.

  Attributes:
    scores: one per mode. members: the single expert of modes that have one, by name, else None.
    priors: {posterior: prior.Prior} that were estimated. weights: mean weight of each expert over
      the scored tokens, {expert: weight} per mode; {} where nothing was scored.
    nearest: the experts compared on development text, where one was chosen by it, else None.
  """
  scores: list
  members: list
  priors: dict
  weights: list
  nearest: Nearest | None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What development text says: {posterior: prior.Prior}, and which expert is nearest."""
  priors: dict
  nearest: Nearest | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(members, configs, params, routes_R, batch, full_B, priors, places, states):
  """One batch through the members and every mode.

  Args:
    configs: a MixConfig per mode. routes_R: members that run, R of them.
    full_B: rows that move a prior.
    priors: log prior [k] per mode. places: int [k] per mode, its members among the R.
    states: (log prior [k], count) per mode, for those that move.

  Returns:
    loglik_RBL; per mode logp_BL, log weights [k, B, L], log priors [k, B], and the new state.
  """
  logits = any(c.combine == 'logits' for c in configs)
  segments = batch.get('segments_BL')
  nll_RBL, hidden_RBLD = members.score(params, batch, routes_R, hidden=logits)
  out = []
  for config, log_prior, place, state in zip(configs, priors, places, states):
    loglik = -nll_RBL[place]
    prior_kB = jnp.repeat(log_prior[:, None], loglik.shape[1], 1)
    if config.prior == 'updating':
      prior_kB, state = moving_prior(config, loglik, full_B, state, segments)
    distances = batch['distances_RBL'][place] if 'distances_RBL' in batch else None
    weights = log_weights(config, loglik, prior_kB, segments, distances)
    if config.combine == 'logits':
      logp = mixed_logits(members, params, routes_R[place], hidden_RBLD[place], weights,
                          batch['targets_BL'])
    else:
      logp = getattr(combine, config.combine)(weights, loglik)
    out.append((logp, weights, prior_kB, state))
  return -nll_RBL, out


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_dev(members, configs, params, routes_R, batch, full_B, states):
  """Development text: -log p of each target, [R, B, L], and the moved prior per config."""
  nll_RBL = members.score(params, batch, routes_R)[0]
  segments = batch.get('segments_BL')
  return nll_RBL, [moving_prior(c, -nll_RBL, full_B, s, segments)[1]
                   for c, s in zip(configs, states)]


def batches(source, places, protocol: Protocol, batch_size: int, domain: int = 0):
  """Sequences of a source at some places: (batch, rows that are no padding, rows that move a
  prior: full blocks; of documents by themselves those that are at least half full)."""
  padding = {**empty_row(protocol.length), 'domain': np.int32(domain)}
  least = 0.5 if protocol.packing == 'document' else 1.0
  for at in range(0, len(places), batch_size):
    rows = [domain_row(source[i], domain, None) for i in places[at:at + batch_size]]
    used = len(rows)
    batch = stack(rows + [padding] * (batch_size - used))
    yield batch, used, (batch['segments_BL'] > 0).mean(1) >= least


class Evaluation:
  """All modes for one model on the domains of one store.

  Args:
    members, params: mix.members.ExpertMembers and their parameters; with `pick`, params is None.
    digests: content digest of each member, for the priors.
    store: an open token store.
    ways: columns.
    protocol: how the text is cut and how much of it is scored.
    batch_size: rows per forward pass; rounded up to whole updates of the prior.
    stored: prior.Prior of these experts that are used instead of estimating. shared: the domain
      whose prior is used on every domain; '': each domain has its own.
    dump: a Dump that takes the arrays, or None.
    pick: names of members → (members, params) with these and perhaps others: what is read from disk
      only when it is needed.
    clusterer: for modes whose evidence is clusters: a data.clusterer.Clusterer whose centres are
      those of the members.
  """

  def __init__(self, members, params, digests, store: TokenStore, ways: Ways, protocol: Protocol, *,
               batch_size: int = 32, stored=(), shared: str = '', dump=None, pick=None,
               clusterer=None):
    self.dump, self.pick = dump, pick or (lambda names: (members, params))
    self.members, self.digests, self.clusterer = members, digests, clusterer
    modes = ways.modes
    if clusterer:
      self._tokenizer, self._seen = store.tokenizer(), clustered(modes).kernel_tokens
    self.store, self.modes, self.protocol, self.blocks = store, modes, protocol, ways.blocks
    self.names, self.stored, self.shared = members.names, tuple(stored), shared
    chosen = ways.options.get('members', ())
    for name in chosen:
      if name not in self.names:
        raise BadInput(f'mix.members: no expert {name!r}{nearest(name, self.names)}')
    self.taking_part = np.asarray([i for i, n in enumerate(self.names)
                                   if not chosen or n in chosen], np.int32)
    here = [self.names[i] for i in self.taking_part]
    for key in ('experts_k', 'weights_k'):
      if (k := ways.options.get(key, 0)) > len(here):
        raise BadInput(f'mix.{key}={k} for {len(here)} experts ({", ".join(here)}): at most that '
                       'many')
    if protocol.stride and any(m.config.prior == 'updating' for m in modes):
      raise BadInput(f'--stride={protocol.stride} with prior=updating: windows overlap, and what '
                     'they say would be counted many times over; leave one of them out')
    group = max((m.config.blocks_per_update for m in modes), default=1)
    self.batch_size = -(-batch_size // group) * group
    # Without what is in arrays: one program for every prior.
    self.static = tuple(dataclasses.replace(
        m.config, members=(), weights={}, experts_k=0, clusterer='', prior=m.config.prior if (
            m.config.prior in ('none', 'updating')) else 'uniform') for m in modes)

  def _read(self, routes):
    """Members, parameters and places among them of the members `routes`."""
    names = [self.names[i] for i in routes]
    members, params = self.pick(names)
    return members, params, np.asarray([members.names.index(n) for n in names], np.int32)

  # ---- development text ------------------------------------------------------------------------

  def estimate(self, domain: str, split: str = 'valid', progress=lambda count: None) -> Estimate:
    """Priors and the nearest expert by the domain's development text.

    Args:
      progress: called with the number of sequences that were read since the last call.

    Raises:
      BadInput: fewer full blocks there than one update of the prior reads; nothing is scored.
    """
    configs = {m.config.posterior: m.config for m in self.modes if m.config.prior == 'cached'}
    if split not in self.store.splits(domain):
      raise BadInput(f'{self.store.path}/{domain} has no {split} text to choose an expert or '
                     'estimate a prior by: give it some, or name the expert (--force, W#EXPERT)')
    source, places = self.protocol.development(self.store, domain, self.blocks, split)
    static = tuple(dataclasses.replace(c, members=(), weights={}, experts_k=0)
                   for c in configs.values())
    R = len(self.taking_part)
    states = [(jnp.asarray(prior.uniform(R)), jnp.int32(0)) for _ in static]
    members, params, routes = self._read(self.taking_part)
    nats, tokens, whole = [], [], 0
    for batch, used, full in batches(source, places, self.protocol, self.batch_size):
      full[used:] = False
      whole += int(full.sum())
      arrays = {n: batch[n] for n in self.protocol.names}
      nll_RBL, states = read_dev(members, static, params, routes, arrays, full, states)
      weights = batch['weights_BL'][:used]
      nats.append((np.asarray(nll_RBL, np.float64)[:, :used] * weights).sum(2))
      tokens.append(weights.sum(1))
      progress(used)
    need = max((c.blocks_per_update for c in configs.values()), default=0)
    if whole < need:
      raise BadInput(f'{self.store.path}/{domain}/{split}: {whole} full blocks of '
                     f'{self.protocol.length} tokens, a prior needs {need}: give it more '
                     'development text, or another prior')
    names = tuple(self.names[i] for i in self.taking_part)
    found = compare(names, np.concatenate(nats, 1), np.concatenate(tokens), domain)
    text = self.store.card['domains'][domain]['splits'][split]['tokens_digest']
    out = {}
    for (posterior, config), (log_prior, _) in zip(configs.items(), states):
      out[posterior] = prior.Prior(
          experts=names, digests=tuple(self.digests[i] for i in self.taking_part),
          log_weights=tuple(float(x) for x in log_prior), posterior=posterior,
          options=options(config), alpha=config.alpha, blocks=len(places),
          blocks_per_update=config.blocks_per_update, block_length=self.protocol.length,
          domain=domain, split=split, text=text, nll=found.nll, packing=self.protocol.packing)
    return Estimate(out, found)

  def _own(self, domain: str) -> prior.Prior | None:
    """A stored prior that knows the experts' losses on this domain's valid text, cut as here."""
    entry = self.store.card['domains'][domain]['splits'].get('valid', {})
    return next((p for p in self.stored if p.domain == domain
                 and p.text == entry.get('tokens_digest')
                 and (p.packing, p.block_length) == (self.protocol.packing, self.protocol.length)),
                None)

  def _asks(self, domain: str, given: str | None) -> tuple[set, bool, bool]:
    """Posteriors of the priors that are wanted, whether an expert is chosen by development text,
    and whether that text must be read."""
    wanted = {m.config.posterior for m in self.modes if m.config.prior == 'cached'}
    names = [self.names[i] for i in self.taking_part]
    chosen = any(m.name == 'best' or (m.name == 'given' and given not in names) for m in self.modes)
    # Which expert is nearest is said by the domain's own text, never by that of another's prior.
    return wanted, chosen, bool((wanted and not self.stored) or (chosen and not self._own(domain)))

  def count(self, part: Part, given: str | None) -> int:
    """How many sequences `run` reads, development text included."""
    read = self.protocol.count(self.store, part.domain, part.split)
    if self._asks(part.domain, given)[2] and 'valid' in self.store.splits(part.domain):
      read += len(self.protocol.development(self.store, part.domain, self.blocks)[1])
    return read

  def _known(self, domain: str, given: str | None, progress) -> Estimate:
    """`estimate`, as far as stored priors do not say it."""
    names = [self.names[i] for i in self.taking_part]
    digests = [self.digests[i] for i in self.taking_part]
    wanted, chosen, must_read = self._asks(domain, given)
    stored = {p.posterior: p for p in self.stored if p.domain == (self.shared or domain)}
    if self.stored and (missing := wanted - stored.keys()):
      raise BadInput(f'--prior has no prior of {self.shared or domain} by {", ".join(missing)} for '
                     f'{", ".join(names)}: name a domain that it has as FILE:DOMAIN, or leave '
                     '--prior out, and it is estimated')
    found = self.estimate(domain, progress=progress) if must_read else None
    if found and not self.stored:
      return found if chosen else dataclasses.replace(found, nearest=None)
    priors = {k: dataclasses.replace(
        p, experts=tuple(names), digests=tuple(digests),
        log_weights=tuple(map(float, p.log_prior(names, digests)))) for k, p in stored.items()}
    if found or not chosen:
      return Estimate(priors, found and found.nearest)
    own = self._own(domain)
    nll = [own.nll[own.experts.index(n)] for n in names]
    ahead = np.sort(nll)[1] - min(nll) if len(nll) > 1 else np.inf
    return Estimate(priors, Nearest(tuple(names), tuple(nll), float(ahead), None, own.blocks))

  # ---- the text that is scored -----------------------------------------------------------------

  def run(self, part: Part, given: str | None, progress=lambda count: None) -> Mixed:
    """Scores one domain under every mode.

    Args:
      part: domain and split; its route is the domain's number in `dump`.
      given: the domain's own expert; None on a novel domain, which is given the nearest by its
        development text.
      progress: called with the number of sequences that were read since the last call.
    """
    domain, names = part.domain, [self.names[i] for i in self.taking_part]
    known = self._known(domain, given, progress)
    routes, places, log_priors, singles = self._plan(names, known, given)
    members, params, rows = self._read(routes)
    states = [(jnp.asarray(lp), jnp.int32(0)) for lp in log_priors]
    source, which = self.protocol.sequences(self.store, domain, part.split)
    scores = [Score() for _ in self.modes]
    mass = [np.zeros(len(p)) for p in places]
    pending = None

    def collect(batch, used, loglik, out):
      weights_BL = batch['weights_BL']
      size = self.store.token_bytes_V[np.minimum(batch['targets_BL'], self.store.vocab_size - 1)]
      for score, total, (logp, log_w, _, _) in zip(scores, mass, out):
        score.add(-np.asarray(logp, np.float64)[:used], weights_BL[:used], size[:used])
        total += np.einsum('kbl,bl->k', np.exp(np.asarray(log_w, np.float64)), weights_BL)
      if self.dump:
        self.dump.add(batch, used, loglik, out, places)

    for batch, used, full in batches(source, which, self.protocol, self.batch_size,
                                     part.route or 0):
      full[used:] = False
      arrays = {n: batch[n] for n in self.protocol.names}
      if self.clusterer:
        distances_EBL = self.clusterer.before_rows(
            self._tokenizer, batch['targets_BL'], self._seen,
            batch['segments_BL'] if self.protocol.packing == 'document' else None)
        arrays['distances_RBL'] = batch['distances_RBL'] = distances_EBL[routes]
      loglik, out = read(members, self.static, params, rows, arrays, full, log_priors, places,
                         states)
      states = [o[3] for o in out]
      if pending:
        collect(*pending)
      pending = batch, used, loglik, out
      progress(used)
    collect(*pending)
    total = scores[0].tokens
    weights = [{self.names[routes[r]]: float(w) / total for r, w in zip(place, m)} if total else {}
               for place, m in zip(places, mass)]
    estimated = {} if self.stored else known.priors
    return Mixed(scores, singles, estimated, weights, known.nearest)

  def _plan(self, names, known: Estimate, given):
    """Which members run, and for each mode: its places among them, log prior, single member."""
    count = len(names)
    chosen, log_priors, singles = [], [], []
    for mode in self.modes:
      single = None
      log_prior, mine = prior.uniform(count), np.arange(count)
      if mode.name == 'given' and given in names:
        single = names.index(given)
      elif mode.single:
        single = names.index(known.nearest.expert)
      elif mode.config.prior == 'fixed':
        log_prior = prior.from_weights(mode.config.weights, self.names)[self.taking_part]
      elif mode.config.prior == 'cached':
        log_prior = np.asarray(known.priors[mode.config.posterior].log_weights, np.float32)
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

  def __init__(self, names, domains, modes, protocol: Protocol):
    self.names, self.domains, self.protocol, self.parts = names, domains, protocol, []
    self.index = next((i for i, m in enumerate(modes) if not m.single), 0)
    self.mode = modes[self.index]

  def add(self, batch, used, loglik_EBL, out, places):
    """Rows of one batch; padding is left out. Experts without a part in the mode have weight 0."""
    _, log_w, prior_kB, _ = out[self.index]
    def whole(x_k):
      x_E = np.full((loglik_EBL.shape[0], *x_k.shape[1:]), -np.inf, np.float32)
      x_E[places[self.index]] = x_k
      return x_E[:, :used]
    self.parts.append({
        'loglik_EBL': np.asarray(loglik_EBL)[:, :used], 'weights_EBL': np.exp(whole(log_w)),
        'log_prior_EB': whole(prior_kB), **{n: batch[n][:used] for n in (
            'targets_BL', 'weights_BL', 'segments_BL', 'domain_B')}})
    if 'distances_RBL' in batch:
      self.parts[-1]['distances_EBL'] = batch['distances_RBL'][:, :used]

  def arrays(self) -> dict:
    """What is written. log_prior_E is the prior of the first row; log_prior_EB has each row's."""
    out = {}
    for name in self.parts[0]:
      out[name] = np.concatenate([p[name] for p in self.parts], int(name.endswith(('EBL', 'EB'))))
    config = orjson.dumps(settings.to_dict(self.mode.config)).decode()
    return out | {'log_prior_E': out['log_prior_EB'][:, 0], 'expert_names': np.asarray(self.names),
                  'domain_names': np.asarray(self.domains), 'way': np.asarray(self.mode.way),
                  'mix': np.asarray(config), 'protocol': np.asarray(str(self.protocol))}
