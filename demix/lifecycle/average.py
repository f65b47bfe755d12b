"""Whole LMs into one: checkpoints averaged from disk, into a workdir that names its parents.

Moments are averaged with the parameters, so that training goes on from the result. Some leaves of
one parent are read at a time; the result is in memory until it is written.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from demix import checkpoint, reference
from demix.config import InitConfig
from demix.data.store import TokenStore
from demix.errors import BadInput, Refused
from demix.eval import mixing, perplexity
from demix.lifecycle.workdirs import Saved, check_free, open_saved, with_domains, with_entry, write
from demix.merge import average
from demix.mix.members import WholeMembers
from demix.mix.mixture import MixConfig
from demix.params import Model
from demix.progress import Progress

HOW = ('uniform', 'posterior', 'argmax')
_GROUP = 1 << 27  # bytes of leaves that are read at once: a read has a cost of its own


def parents_of(models: dict) -> dict:
  """{name: Saved}; a reference to a forest stands for all its experts.

  Raises:
    BadInput: fewer than two models, or two of one name.
  """
  out = {}
  for name, text in models.items():
    ref = reference.parse(text)
    found = {name: text}
    if ref.forest and not ref.expert:
      found = {n: f'{text}#{n}' for n in reference.load_forest(ref.workdir).names}
    for each, reference_text in found.items():
      if each in out:
        raise BadInput(f'two models are named {each!r}: write OTHER={reference_text}')
      out[each] = _open(reference_text)
  if len(out) < 2:
    raise BadInput(f'{len(out)} models to average: name two or more with --model, or a forest')
  return out


def _open(text: str) -> Saved:
  ref, _, step = reference.locate(text)
  if ref.expert:
    raise BadInput(f'--model={text}: one expert of a DEMix LM has no checkpoint of its own: '
                   'average whole LMs')
  return open_saved(f'{ref.workdir}@{step}', 'model')


def ancestors(saved: Saved) -> set:
  """Content digests that a checkpoint goes back to: its own, what its run started from, parents."""
  out = {saved.meta['content_digest']}
  if saved.meta.get('init'):
    out.add(saved.meta['init']['content_digest'])
  for record in saved.meta.get('lifecycle', []):
    out |= set(record.get('ancestors', []))
  return out


def check(parents: dict, unrelated: bool) -> set:
  """What averaging needs; the common ancestors.

  Raises:
    Refused: other shapes, another model or tokenizer (every difference is named), or no common
      ancestor.
  """
  (first, base), *others = parents.items()
  problems = []
  def shapes(saved):
    leaves = saved.meta['leaves'].items()
    return {n: (tuple(x['shape']), x['dtype']) for n, x in leaves if n.startswith('params/')}

  for name, saved in others:
    pairs = [('tokenizer', saved.meta['tokenizer'], base.meta['tokenizer'])]
    theirs, ours = (dataclasses.asdict(s.config.model) for s in (saved, base))
    pairs += [(f'model.{k}', theirs[k], ours[k]) for k in ours]
    mine, wanted = shapes(saved), shapes(base)
    pairs += [(n, mine.get(n, 'missing'), wanted.get(n, 'missing'))
              for n in sorted(mine.keys() | wanted.keys())]
    problems += [f'{name} {k}={a!r}, {first} {b!r}' for k, a, b in pairs if a != b]
  if problems:
    raise Refused(f'these models cannot be averaged: {"; ".join(problems)}')
  common = set.intersection(*(ancestors(s) for s in parents.values()))
  if not common and not unrelated:
    raise Refused(f'{", ".join(parents)} have no common ancestor: their average is noise (BTM §5); '
                  '--unrelated makes it all the same')
  return common


def posterior(parents: dict, store: TokenStore, domain: str, config: MixConfig):
  """The cached prior (prior.Prior) of the parents on a domain's valid text."""
  loaded = [reference.load(f'{s.workdir}@{s.step}') for s in parents.values()]
  stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *(x.params for x in loaded))
  members = WholeMembers(loaded[0].model, tuple(parents))
  evaluation = mixing.Evaluation(
      members, stacked, [x.meta['content_digest'] for x in loaded], store,
      (mixing.Mode('cached', config),), length=loaded[0].config.data.sequence_length)
  return evaluation.estimate(domain)[config.posterior]


def merge(models: dict, workdir: str, *, weights='uniform', domain: str = '', data: str = '',
          guard=(), unrelated: bool = False, mix: MixConfig | None = None, say=print) -> dict:
  """Averages checkpoints into a new workdir.

  Args:
    models: {name: reference}. workdir: of the result; must be free.
    weights: numbers in the order of the models, or one of HOW: posterior takes the cached prior on
      the valid text of `domain`, argmax the one model with the largest.
    data: token store, by default the first model's.
    guard: domains on whose valid text the result may not be worse than its best parent.
    unrelated: average even models without a common ancestor.
    mix: how the posterior is estimated.

  Returns:
    {name: weight}.

  Raises:
    BadInput: models, weights, domain or workdir that cannot be.
    Refused: models that do not go together, or a result that the guard refuses; nothing is written.
  """
  target = Path(workdir)
  check_free(target)
  parents = parents_of(models)
  names, first = list(parents), next(iter(parents.values()))
  common = check(parents, unrelated)
  store, used = None, None
  if weights in ('posterior', 'argmax') or guard:
    store = TokenStore.open(data or first.config.data.path)
  if isinstance(weights, str) and weights not in HOW:
    raise BadInput(f'--weights={weights}: numbers, or one of {", ".join(HOW)}')
  if weights == 'uniform':
    share = np.full(len(names), 1 / len(names))
  elif weights in ('posterior', 'argmax'):
    if not domain:
      raise BadInput(f'--weights={weights} without --domain: whose valid text shall they fit?')
    used = posterior(parents, store, domain, mix or MixConfig(prior='cached'))
    share = np.exp(np.asarray(used.log_weights, np.float64))
    if weights == 'argmax':
      share = (np.arange(len(names)) == share.argmax()).astype(float)
    share /= share.sum()
  else:
    share = weights
  share = average.check_weights(share, names)
  state = averaged(parents, share)
  measured = guarded(parents, state, store, guard) if guard else None
  record = {'operation': 'average', 'how': weights if isinstance(weights, str) else 'given',
            'parents': [{'name': n, 'weight': float(w), **s.lineage()}
                        for (n, s), w in zip(parents.items(), share)],
            'domain': domain or None, 'ancestors': sorted(common), 'guard': measured}
  write_result(target, parents, state, record)
  for name, weight in zip(names, share):
    say(f'{weight:8.4f}  {name}')
  say(f'written     {target}')
  return dict(zip(names, share.tolist()))


def averaged(parents: dict, share) -> dict:
  """{name: array} of all leaves, parameters and moments; the count of updates is the largest."""
  saved = [s for s, w in zip(parents.values(), share) if w]
  weights, names = [w for w in share if w], [n for n, w in zip(parents, share) if w]
  leaves = checkpoint.names(saved[0].directory, saved[0].step)
  for s in saved[1:]:
    there = checkpoint.names(s.directory, s.step)
    leaves = {n: x for n, x in leaves.items() if n in there}
  out = {}
  with Progress(len(leaves), 'leaves', 'average') as progress:
    for group in groups(leaves):
      parts = {name: [] for name in group}
      for s in saved:
        found = checkpoint.restore(s.directory, s.step, group)
        for name in group:
          parts[name].append(np.asarray(found.pop(name)))
      for name, arrays in parts.items():
        out[name] = max(arrays) if name == 'optimizer/count' else average.leaf(
            name, zip(names, arrays), weights)
      progress.update(len(out))
  return out


def groups(leaves: dict):
  """Leaves, {name: (shape, dtype)}, in groups of at most _GROUP bytes, a larger leaf alone; as
  jax.ShapeDtypeStruct."""
  group, size = {}, 0
  for name, (shape, dtype) in leaves.items():
    like = jax.ShapeDtypeStruct(shape, dtype)
    if group and size + like.size * like.dtype.itemsize > _GROUP:
      yield group
      group, size = {}, 0
    group[name] = like
    size += like.size * like.dtype.itemsize
  yield group


def guarded(parents: dict, state: dict, store: TokenStore, domains) -> dict:
  """{domain: {name: nats per token on valid text}}, the result's own under ''.

  Raises:
    BadInput: a domain without valid text. Refused: the result is worse than its best parent.
  """
  parts = [perplexity.Part(d, 'valid') for d in domains]
  for part in parts:
    if 'valid' not in store.splits(part.domain):
      raise BadInput(f'--guard={part.domain}: {store.path} has no valid text of it')
  config = next(iter(parents.values())).config
  model = Model(config.model, config.execution, config.train.compute_dtype)
  def score(params):
    return perplexity.evaluate(model, params, store, parts, length=config.data.sequence_length)
  params = model.running({n.removeprefix('params/'): jax.numpy.asarray(x)
                          for n, x in state.items() if n.startswith('params/')})
  found = {'': score(params)}
  for name, saved in parents.items():
    found[name] = score(reference.load(f'{saved.workdir}@{saved.step}').params)
  out = {d: {name: scores[i].mean_nll for name, scores in found.items()}
         for i, d in enumerate(domains)}
  worse = []
  for d, nll in out.items():
    best = min((n for n in nll if n), key=nll.get)
    if nll[''] > nll[best]:
      worse.append(f'{d}: {nll[""]:.4f} nats, {best} has {nll[best]:.4f}')
  if worse:
    raise Refused(f'the average is worse than its best parent on valid text of {"; ".join(worse)}: '
                  'other weights, or no --guard')
  return out


def write_result(target: Path, parents: dict, state: dict, record: dict):
  """Writes the workdir: the first parent's config on the domains of all."""
  first = next(iter(parents.values()))
  domains = tuple(dict.fromkeys(d for s in parents.values() for d in s.config.data.domains))
  card = first.card()
  for saved in parents.values():
    other = saved.card()
    for d in saved.config.data.domains:
      card = with_entry(card, d, other, d)
  ledger = {k: sum(s.meta['ledger'][k] for s in parents.values())
            for k in ('tokens', 'flops', 'seconds')}
  config = with_domains(dataclasses.replace(first.config, init=InitConfig()), domains)
  meta = {n: x for n, x in first.meta.items() if n not in ('init', 'lifecycle')}
  meta['identity'] = {n: x for n, x in meta['identity'].items() if not n.startswith('init.')}
  write(target, dataclasses.replace(first, meta=meta), state, config, card, record, ledger=ledger)
