"""The evaluation of several models on the domains of one store: what `evaluate` does."""

import dataclasses
import functools

import numpy as np

from demix.config import digest, domain_symbols
from demix.data.overlap.leakage import flagged
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval import mixing, perplexity, results, seen
from demix.eval.given import find_nearest
from demix.eval.sequences import Protocol
from demix.eval.ways import Ways, clustered, ways
from demix.loading import reference
from demix.mix import prior
from demix.mix.mixture import MixConfig
from demix.runtime.progress import Progress
from demix.runtime.workdir import write_atomic
from demix.settings import nearest


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be scored, and how.

  Attributes:
    data: token store; the first model's own if ''.
    domains: names, of groups too; () for all that have the split.
    split, batch_size: of the text; rows per forward pass.
    packing, stride, limit: see sequences.Protocol; packing '': as each model was trained.
    force: expert or <domain> symbol for domains that a model was not trained on; '' takes the one
      with the lowest NLL on the domain's valid text.
    ways: columns for DEMix LMs and forests; None for the given expert alone.
    prior: file of stored priors, FILE or FILE:DOMAIN, used instead of estimating; ''.
    dump: a file for the arrays of the one mixed model and the first way that mixes; ''.
    verify_data: compare the text that is read with the digests of the store's card first.
  """
  data: str = ''
  domains: tuple = ()
  split: str = 'test'
  batch_size: int = 32
  packing: str = ''
  stride: int = 0
  limit: int = 0
  force: str = ''
  ways: Ways | None = None
  prior: str = ''
  dump: str = ''
  verify_data: bool = True


def evaluate(models: dict, request: Request, estimated=None) -> dict:
  """Scores models on domains.

  Args:
    models: {run name: model reference}.
    estimated: a list that takes the priors (prior.Prior) that were estimated.

  Returns:
    The content of results.json.

  Raises:
    BadInput: unknown model, domain or expert; a tokenizer that differs from a checkpoint's; a
      request that has no effect on any of the models.
  """
  if request.batch_size < 1:
    raise BadInput(f'--batch_size={request.batch_size}: at least 1')
  Protocol(1 << 30, request.packing or 'continuous', request.stride, request.limit)
  loaded = {name: reference.load(ref) for name, ref in models.items()}
  store = TokenStore.open(request.data or next(iter(loaded.values())).config.data.path)
  domains = store.leaves(request.domains)
  for name in domains:
    if request.split not in store.splits(name):
      raise BadInput(f'{store.path}/{name} has no {request.split} text')
  domains = domains or tuple(d for d in store.domains if request.split in store.splits(d))
  if not domains:
    raise BadInput(f'{store.path} has no {request.split} text'
                   f'{nearest(request.split, ("train", "valid", "test"))}')
  for name, one in loaded.items():
    check_tokenizer(name, one, store)
  if request.verify_data:
    store.verify(domains, (request.split, 'valid'))
  mixed = [n for n, one in loaded.items() if isinstance(one, reference.LoadedForest)
           or (request.ways and one.model.config.ffn == 'demix')]
  _check_effect(request, loaded, mixed, domains)
  runs, rows, mixtures, notes, trained = {}, [], {}, [], set()
  for name, one in loaded.items():
    trained |= seen.domains_of(one, store, domains)
    if not request.packing and len(getattr(one, 'packings', ())) > 1:
      raise BadInput(f'run {name}: its experts were trained on text cut in several ways '
                     f'({", ".join(one.packings)}): say how it is scored with --packing')
    protocol = Protocol.of(one.config.data, request.packing, request.stride, request.limit)
    if len(lengths := getattr(one, 'lengths', ())) > 1:  # whichever stands first
      protocol = dataclasses.replace(protocol, length=max(lengths))
      notes.append(f'{name}: its experts were trained on sequences of '
                   f'{", ".join(map(str, lengths))} tokens; all are scored with {max(lengths)}')
    runs[name] = run_entry(one)
    if name in mixed:
      more, mixtures[name] = mixed_rows(name, one, store, domains, protocol, request, estimated,
                                        notes.append)
    else:
      more = rows_of(name, one, store, domains, protocol, request, notes.append)
    rows += more
  seed = next(iter(loaded.values())).config.seed
  return results.results(runs, rows, seed=seed, heldout=[d for d in domains if d not in trained],
                         mixing=mixtures, leakage=leaks(loaded, store, domains, request.split),
                         groups=store.groups, notes=list(dict.fromkeys(notes)))


def _check_effect(request, loaded, mixed, domains):
  """Raises BadInput for what is asked for and would change nothing."""
  if request.ways and not mixed:
    raise BadInput(f'--mix: none of {", ".join(loaded)} is a DEMix LM or a forest: there is '
                   'nothing to mix')
  if request.dump and len(mixed) != 1:
    raise BadInput(f'--dump: {len(mixed)} runs are mixed: name one --model, and --mix')
  if request.force:
    others = [one for n, one in loaded.items() if n not in mixed and _routed(one)
              and any(d not in one.domains for d in domains)]
    if not others:
      raise BadInput(f'--force={request.force} has no effect: it is for domains that a DEMix LM or '
                     '+DomainToken LM was not trained on, scored without --mix; leave it out')


def _routed(one) -> bool:
  return one.model.config.ffn == 'demix' or domain_symbols(one.config) is not None


def leaks(loaded: dict, store, domains, split: str) -> list[dict]:
  """Which evaluated text stands in text that a run was trained on, as results.json names it.

  The card knows the store's own train text: a run's domain counts where the store has one of its
  name.
  """
  return [{'run': name, 'domain': e['evaluation'].partition('/')[0],
           'train': e['train'].partition('/')[0], 'runs': e['runs'], 'documents': e['documents']}
          for name, one in loaded.items()
          for e in flagged(store.card, one.domains, domains, split)]


def check_tokenizer(name, loaded, store):
  """Raises BadInput when a checkpoint's tokenizer is not the store's."""
  had, has = loaded.meta['tokenizer'], store.tokenizer_meta['fingerprint']
  if had != has:
    raise BadInput(f'run {name} was trained with tokenizer {had}, {store.path} has {has}: '
                   'prepare the text with the tokenizer of the run')


def run_entry(loaded) -> dict:
  """A run's entry in results.json: the ledger of its checkpoint."""
  total, active = loaded.counts()
  ledger = loaded.meta['ledger']
  return {'train_tokens': ledger['tokens'], 'train_flops': ledger['flops'],
          'params_total': total, 'params_active': active, 'seconds': ledger['seconds'],
          'config_digest': digest(loaded.meta['identity']), 'seed': loaded.config.seed,
          'step': loaded.step, 'content_digest': loaded.meta['content_digest'],
          **({'unearned': loaded.unearned} if loaded.unearned else {})}


# ---- a model by itself -----------------------------------------------------------------------


def rows_of(name, loaded, store, domains, protocol: Protocol, request: Request, note) -> list[dict]:
  """One row of results.json per domain for one model."""
  model, symbols = loaded.model, domain_symbols(loaded.config)
  if request.force and _routed(loaded) and request.force not in loaded.domains:
    raise BadInput(f'--force={request.force}: run {name} has no such domain'
                   f'{nearest(request.force, loaded.domains)}')
  say = lambda line: note(f'{name}: {line}')
  parts = [perplexity.Part(d, request.split, _route(loaded, store, d, protocol, request, say))
           for d in domains]
  total = perplexity.count(store, parts, protocol, symbols is not None)
  with Progress(total, 'sequences', f'evaluate {name}') as progress:
    scores = perplexity.evaluate(
        model, loaded.params, store, parts, protocol=protocol, batch_size=request.batch_size,
        symbols=symbols, progress=progress.update)
  def mix(part):
    if model.config.ffn == 'demix':
      return f'expert:{loaded.domains[part.route]}'
    if loaded.expert:
      return f'expert:{loaded.expert}'
    return 'none' if symbols is None else f'token:{loaded.domains[part.route]}'
  return [results.row(name, mix(p), p.domain, request.split, s, protocol=protocol)
          for p, s in zip(parts, scores)]


def _route(loaded, store, domain, protocol, request, note) -> int | None:
  """The expert or <domain> symbol that a model is given on a domain; None if it has neither."""
  if not _routed(loaded):
    return None
  given = domain if domain in loaded.domains else request.force
  if given:
    return loaded.domains.index(given)
  if 'valid' not in store.splits(domain):
    raise BadInput(f'{store.path}/{domain} has no valid text to choose an expert by: name one '
                   'with --force')
  found = find_nearest(loaded, store, domain, protocol, request.batch_size)
  if warning := found.warning(domain):
    note(warning)
  return loaded.domains.index(found.expert)


# ---- mixtures --------------------------------------------------------------------------------


def mixed_rows(name, loaded, store, domains, protocol: Protocol, request: Request, estimated, note):
  """Rows of results.json for one model, every domain under every way; and its entry of `mixing`:
  options, the priors that were estimated, the mean weights of experts."""
  chosen = request.ways or ways(('given',), (), MixConfig())
  modes = chosen.modes
  taking = mixing.Dump(loaded.members.names, domains, modes, protocol) if request.dump else None
  file, shared = prior.split_reference(request.prior) if request.prior else ('', '')
  stored = ()
  if file:
    members = [n for n in loaded.members.names
               if n in chosen.options.get('members', loaded.members.names)]
    digests = dict(zip(loaded.members.names, loaded.member_digests))
    stored = prior.of_experts(file, prior.load(file), members, [digests[n] for n in members])
    for line in unlike(stored, protocol, modes):
      note(f'{name}: {line}')
  @functools.lru_cache(1)  # of a forest the last that were asked for stay
  def pick(names):
    part = loaded.take(names)
    return part.members, part.params
  near = clustered(modes)
  evaluation = mixing.Evaluation(
      loaded.members, None, loaded.member_digests, store, chosen, protocol,
      batch_size=request.batch_size, stored=stored, shared=shared, dump=taking,
      pick=lambda names: pick(tuple(names)),
      clusterer=loaded.clusterer(near.clusterer) if near else None)
  parts = [perplexity.Part(d, request.split, i) for i, d in enumerate(domains)]
  rows, priors, weights, done = [], [], {}, 0
  total = sum(evaluation.count(part, loaded.given(part.domain)) for part in parts)
  with Progress(total, 'sequences', f'evaluate {name}, mixed') as progress:
    def count(sequences):
      nonlocal done
      done += sequences
      progress.update(done)
    for part in parts:
      found = evaluation.run(part, loaded.given(part.domain), progress=count)
      for mode, score, single, mass in zip(modes, found.scores, found.members, found.weights):
        mix = f'expert:{single}' if single else 'ensemble'
        rows.append(results.row(name, mix, part.domain, request.split, score, mode.prior,
                                mode.posterior, protocol=protocol))
        if not single and mass:
          key = ' '.join(filter(None, (mode.prior, mode.posterior)))
          weights.setdefault(key, {})[part.domain] = mass
      twins = getattr(loaded, 'trained_alone', lambda domain: ())(part.domain)
      if len(twins) > 1 and any(m.name == 'given' for m in modes):
        note(f'{name}: {part.domain}: {", ".join(twins)} were each trained on it alone; given is '
             'the first')
      if found.nearest and (warning := found.nearest.warning(part.domain)):
        note(f'{name}: {warning}')
      priors += found.priors.values()
  if estimated is not None:
    estimated += priors
  if taking:
    write_dump(request.dump, taking.arrays())
  order = {mode: i for i, mode in enumerate(dict.fromkeys((m.prior, m.posterior) for m in modes))}
  rows.sort(key=lambda r: order[r['prior'], r['posterior']])
  return rows, {'options': chosen.options, 'read_by': chosen.read_by, 'mean_weights': weights,
                'priors': [prior.entry(p) for p in priors]}


def unlike(stored, protocol: Protocol, modes) -> list[str]:
  """Lines on stored priors that were estimated in another way than the text is read."""
  out = []
  here = f'{protocol.packing} {protocol.length}'
  cut = sorted({f'{p.packing} {p.block_length}' for p in stored} - {here})
  if cut:
    out.append(f'its stored priors were estimated on text cut as {", ".join(cut)}, the text is '
               f'scored as {protocol}')
  configs = {m.config.posterior: mixing.options(m.config) for m in modes
             if m.config.prior == 'cached'}
  other = {(k, p.options[k], here[k]) for p in stored if (here := configs.get(p.posterior))
           for k in here if k in p.options and p.options[k] != here[k]}
  if other:
    out.append('its stored priors were estimated with ' + ', '.join(
        f'mix.{k}={was} (now {now})' for k, was, now in sorted(other, key=str)))
  return out


def write_dump(path, arrays: dict):
  """Writes the arrays of a Dump, whole or not at all. BadInput: it cannot be written there."""
  try:
    write_atomic(path, lambda f: np.savez(f, **arrays))
  except OSError as e:
    raise BadInput(f'{path}: cannot be written ({e.strerror}); name another file') from None


def report(content: dict, tables=('perplexity',)) -> str:
  """Tables for a terminal: those named (verbs.evaluate.TABLES); what must be known of them stands
  below."""
  made = {'priors': results.priors, 'ledger': results.ledger}
  parts = [made[name](content) if name in made else results.table(content, name)
           for name in tables]
  return '\n\n'.join(filter(None, [*parts, results.remarks(content)]))
