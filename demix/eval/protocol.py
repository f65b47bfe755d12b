"""The evaluation of several models on the domains of one store: what `evaluate` does."""

import functools

import numpy as np

from demix import reference, settings
from demix.config import digest, domain_symbols
from demix.data.leakage import flagged
from demix.data.store import TokenStore
from demix.errors import BadInput
from demix.eval import mixing, perplexity, results
from demix.mix import prior
from demix.mix.mixture import MixConfig
from demix.progress import Progress
from demix.settings import nearest


def evaluate(models: dict, *, data: str = '', domains=(), split: str = 'test', stride: int = 0,
             limit: int = 0, batch_size: int = 32, force: str = '', modes=(), stored=None,
             dump: str = '', estimated=None) -> dict:
  """Scores models on domains.

  Args:
    models: {run name: model reference}.
    data: token store; the first model's own if ''.
    domains: names, of groups too; () for all that have the split.
    split, stride, limit, batch_size: see perplexity.evaluate.
    force: expert or <domain> symbol for domains that a model was not trained on; '' takes the one
      with the lowest NLL on the domain's valid text.
    modes: mixing.Mode columns for DEMix LMs; () for the given expert alone.
    stored: cached priors by (domain, posterior), domain '' for any, used instead of estimating.
    dump: a file for the arrays of the one DEMix LM and the first mode that mixes.
    estimated: a list that takes the priors (prior.Prior) that were estimated.

  Returns:
    The content of results.json.

  Raises:
    BadInput: unknown model, domain or expert; a tokenizer that differs from a checkpoint's.
  """
  if stride < 0 or limit < 0 or batch_size < 1:
    raise BadInput(f'--stride={stride} --limit={limit} --batch_size={batch_size}: at least 0, 0, 1')
  loaded = {name: reference.load(ref) for name, ref in models.items()}
  store = TokenStore.open(data or next(iter(loaded.values())).config.data.path)
  domains = store.leaves(domains)
  for name in domains:
    if split not in store.splits(name):
      raise BadInput(f'{store.path}/{name} has no {split} text')
  domains = domains or tuple(d for d in store.domains if split in store.splits(d))
  if not domains:
    raise BadInput(f'{store.path} has no {split} text{nearest(split, ("train", "valid", "test"))}')
  for name, one in loaded.items():
    check_tokenizer(name, one, store)
  mixed = [n for n, one in loaded.items() if isinstance(one, reference.LoadedForest)
           or (modes and one.model.config.ffn == 'demix')]
  if modes and not mixed:
    raise BadInput(f'--mix: none of {", ".join(loaded)} is a DEMix LM or a forest: there is '
                   'nothing to mix')
  if dump and len(mixed) != 1:
    raise BadInput(f'--dump: {len(mixed)} runs are mixed: name one --model, and --mix')
  runs, rows, seen, mixtures = {}, [], set(), {}
  for name, one in loaded.items():
    seen |= set(one.domains)
    runs[name] = run_entry(one)
    if name in mixed:
      more, mixtures[name] = mixed_rows(name, one, store, domains, split, modes, stride, limit,
                                        batch_size, stored, dump, estimated)
      rows += more
    else:
      rows += rows_of(name, one, store, domains, split, stride, limit, batch_size, force)
  heldout = [d for d in domains if d not in seen]
  seed = next(iter(loaded.values())).config.seed
  return results.results(runs, rows, seed=seed, heldout=heldout, mixing=mixtures,
                         leakage=leaks(loaded, store, domains, split), groups=store.groups)


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


def rows_of(name, loaded, store, domains, split, stride, limit, batch_size, force) -> list[dict]:
  """One row of results.json per domain for one model."""
  config, model = loaded.config, loaded.model
  symbols, length = domain_symbols(config), config.data.sequence_length
  routed = model.config.ffn == 'demix' or symbols is not None
  if force and routed and force not in loaded.domains:
    raise BadInput(f'--force={force}: run {name} has no such domain'
                   f'{nearest(force, loaded.domains)}')
  parts = []
  for domain in domains:
    route = 0
    if routed:
      if domain in loaded.domains:
        route = loaded.domains.index(domain)
      elif force:
        route = loaded.domains.index(force)
      elif 'valid' not in store.splits(domain):
        raise BadInput(f'{store.path}/{domain} has no valid text to choose an expert by: name one '
                       'with --force')
      else:
        route = perplexity.best_route(
            model, loaded.params, store, domain, routes=len(loaded.domains), length=length,
            limit=limit, symbols=symbols, batch_size=batch_size)
    parts.append(perplexity.Part(domain, split, route))
  total = perplexity.windows(store, parts, length - (symbols is not None), stride, limit)
  with Progress(total, 'windows', f'evaluate {name}') as progress:
    scores = perplexity.evaluate(
        model, loaded.params, store, parts, length=length, batch_size=batch_size, stride=stride,
        limit=limit, symbols=symbols, progress=progress.update)
  def mix(part):
    if model.config.ffn == 'demix':
      return f'expert:{loaded.domains[part.route]}'
    if loaded.expert:
      return f'expert:{loaded.expert}'
    return 'none' if symbols is None else f'token:{loaded.domains[part.route]}'
  return [results.row(name, mix(p), p.domain, split, s) for p, s in zip(parts, scores)]


def mixed_rows(name, loaded, store, domains, split, modes, stride, limit, batch_size, stored, dump,
               estimated):
  """Rows of results.json for one model, every domain under every mode; and its entry of `mixing`:
  options, the priors that were estimated, the mean weights of experts."""
  modes = modes or mixing.modes(('given',), (), MixConfig())
  taking = mixing.Dump(loaded.members.names, domains, next(
      (i for i, m in enumerate(modes) if not m.single), 0)) if dump else None
  @functools.lru_cache(1)  # of a forest the last that were asked for stay
  def pick(names):
    part = loaded.take(names)
    return part.members, part.params
  near = mixing.clustered(modes)
  clusterer = loaded.clusterer(near.clusterer) if near else None
  evaluation = mixing.Evaluation(
      loaded.members, None, loaded.member_digests, store, modes, batch_size=batch_size,
      length=loaded.config.data.sequence_length, stored=stored, dump=taking,
      pick=lambda names: pick(tuple(names)), clusterer=clusterer)
  parts = [perplexity.Part(d, split, i) for i, d in enumerate(domains)]
  total = perplexity.windows(store, parts, loaded.config.data.sequence_length, stride, limit)
  rows, priors, weights, done = [], [], {}, 0
  with Progress(total, 'windows', f'evaluate {name}, mixed') as progress:
    def count(windows):
      nonlocal done
      done += windows
      progress.update(done)
    for part in parts:
      found = evaluation.run(part, loaded.given(part.domain), stride=stride, limit=limit,
                             progress=count)
      for mode, score, single, mass in zip(modes, found.scores, found.members, found.weights):
        mix = f'expert:{single}' if single else 'ensemble'
        rows.append(results.row(name, mix, part.domain, split, score, mode.prior, mode.posterior))
        if not single:
          key = ' '.join(filter(None, (mode.prior, mode.posterior)))
          weights.setdefault(key, {})[part.domain] = mass
      priors += found.priors.values()
  if estimated is not None:
    estimated += priors
  if taking:
    with open(dump, 'wb') as f:
      np.savez(f, **taking.arrays())
  order = {mode: i for i, mode in enumerate(dict.fromkeys((m.prior, m.posterior) for m in modes))}
  rows.sort(key=lambda r: order[r['prior'], r['posterior']])
  one, usual = settings.flatten(near or modes[0].config), settings.flatten(MixConfig())
  unusual = {k: v for k, v in one.items() if v != usual[k] and k not in ('prior', 'posterior')}
  return rows, {'options': one, 'unusual': unusual, 'mean_weights': weights,
                'priors': [prior.entry(p) for p in priors]}


def report(content: dict) -> str:
  """Both tables and the ledger, for a terminal."""
  parts = [results.table(content, 'perplexity'), results.table(content, 'bits_per_byte'),
           results.priors(content), results.ledger(content)]
  return '\n\n'.join(filter(None, parts))
