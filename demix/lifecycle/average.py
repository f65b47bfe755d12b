"""Whole LMs into one: checkpoints averaged from disk, into a workdir that names its parents.

Moments are averaged with the parameters, so that training goes on from the result. From disk to
disk: a group of leaves is read of one parent after the other, and written before the next is read.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from demix import settings
from demix.checkpoints import checkpoint
from demix.checkpoints.leaves import Later, in_order
from demix.config import Config, InitConfig
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, Refused
from demix.eval import mixing
from demix.eval.given import score_given
from demix.eval.sequences import Protocol
from demix.eval.ways import Mode, Ways
from demix.forest import lineage
from demix.lifecycle.workdirs import Saved, check_free, with_domains, with_entry, write
from demix.loading import reference
from demix.merge import average
from demix.mix.members import WholeMembers
from demix.mix.mixture import MixConfig
from demix.model.params import Model
from demix.optim.state import COUNTS, saved_part
from demix.runtime.progress import Progress
from demix.settings import nearest

HOW = ('uniform', 'posterior', 'argmax')
_COUNT = 'optimizer/count'
_GROUP = 1 << 26  # bytes of leaves that are read at once: a read has a cost of its own


def parents_of(models: dict, least: int = 2) -> dict:
  """{name: Saved}; a reference to a forest stands for all its experts.

  Raises:
    BadInput: fewer than `least` models, or two of one name.
  """
  out = {}
  for name, text in models.items():
    ref = reference.parse(text)
    found = {name: text}
    if ref.forest and not ref.expert:  # a DEMix LM of it is one, by its name
      names = [n.partition('/')[0] for n in reference.load_forest(ref.workdir).names]
      found = {n: f'{text}#{n}' for n in dict.fromkeys(names)}
    for each, reference_text in found.items():
      if each in out:
        raise BadInput(f'two models are named {each!r}: write OTHER={reference_text}')
      out[each] = _open(reference_text)
  if len(out) < least:
    raise BadInput(f'{len(out)} models to average: name two or more with --model, or a forest')
  return out


def _open(text: str) -> Saved:
  ref, directory, step = reference.locate(text)
  if ref.expert:
    raise BadInput(f'--model={text}: one expert of a DEMix LM has no checkpoint of its own: '
                   'average whole LMs')
  meta = checkpoint.read_meta(directory, step)
  return Saved(ref.workdir, step, meta, settings.from_dict(Config, meta['config']))


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
    theirs, ours = (dataclasses.asdict(s.config.model) | {'experts': sorted(s.experts)}
                    for s in (saved, base))  # leaves have their names, whatever their order
    pairs += [(f'model.{k}', theirs[k], ours[k]) for k in ours]
    mine, wanted = shapes(saved), shapes(base)
    pairs += [(n, mine.get(n, 'missing'), wanted.get(n, 'missing'))
              for n in sorted(mine.keys() | wanted.keys())]
    problems += [f'{name} {k}={a!r}, {first} {b!r}' for k, a, b in pairs if a != b]
  if problems:
    raise Refused(f'these models cannot be averaged: {"; ".join(problems)}')
  common = set.intersection(*(lineage.ancestors(s.meta) for s in parents.values()))
  if not common and not unrelated:
    raise Refused(f'{", ".join(parents)} have no common ancestor: their average is noise (BTM §5); '
                  '--unrelated makes it all the same')
  return common


def posterior(parents: dict, store: TokenStore, domain: str, config: MixConfig):
  """The cached prior (prior.Prior) of the parents on a domain's valid text. Of DEMix LMs the expert
  of that domain says how well they fit.

  Raises:
    BadInput: DEMix LMs without an expert of the domain, or +DomainToken LMs.
  """
  first = next(iter(parents.values())).config
  if first.data.domain_token:
    raise BadInput('--weights=posterior of +DomainToken LMs: a posterior would not give them their '
                   'symbol; give numbers')
  expert = domain if first.model.ffn == 'demix' else None
  if expert and expert not in first.model.experts:
    raise BadInput(f'--domain={domain}: the DEMix LMs have no such expert'
                   f'{nearest(domain, first.model.experts)}')
  params = reference.stacked([(s.workdir, s.step, expert) for s in parents.values()])
  model = Model(reference.dense_of(first.model), first.execution, first.train.compute_dtype)
  ways = Ways.of((Mode('cached', config),), config)
  evaluation = mixing.Evaluation(
      WholeMembers(model, tuple(parents)), params,
      [reference.digest_of_member(s.meta, expert) for s in parents.values()], store, ways,
      Protocol.of(first.data))
  return evaluation.estimate(domain).priors[config.posterior]


def merge(models: dict, workdir: str, *, weights='uniform', domain: str = '', data: str = '',
          guard=(), unrelated: bool = False, mix: MixConfig | None = None, single: bool = False,
          verify_data: bool = True, say=print) -> dict:
  """Averages checkpoints into a new workdir.

  Args:
    models: {name: reference}. workdir: of the result; must be free.
    weights: numbers in the order of the models, or one of HOW: posterior takes the cached prior on
      the valid text of `domain`, argmax the one model with the largest.
    data: token store, by default the first model's.
    guard: domains on whose valid text the result may not be worse than its best parent.
    unrelated: average even models without a common ancestor.
    mix: how the posterior is estimated. single: one model may be the only one.
    verify_data: compare the text that is read with the digests in its store's card first.

  Returns:
    {name: weight}.

  Raises:
    BadInput: models, weights, domain or workdir that cannot be.
    Refused: models that do not go together, or a result that the guard refuses; nothing is written.
  """
  target = Path(workdir)
  check_free(target)
  parents = parents_of(models, 1 if single else 2)
  names, first = list(parents), next(iter(parents.values()))
  common = check(parents, unrelated)
  store, used = None, None
  if weights in ('posterior', 'argmax') or guard:
    store = TokenStore.open(data or first.config.data.path)
    read = [d for d in dict.fromkeys((*guard, domain)) if d in store.domains]
    if verify_data and read:
      store.verify(read, ('valid',))
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
  measured = guarded(parents, averaged(parents, share), store, guard) if guard else None
  record = {'operation': 'average', 'how': weights if isinstance(weights, str) else 'given',
            'parents': [{'name': n, 'weight': float(w), **s.lineage()}
                        for (n, s), w in zip(parents.items(), share)],
            'domain': domain or None, 'ancestors': sorted(common), 'guard': measured}
  with Progress(0, 'leaves', 'average') as progress:
    state = averaged(parents, share, str(target.absolute().parent), progress)
    write_result(target, parents, state, record)
  cuts = {name: str(Protocol.of(s.config.data)) for name, s in parents.items()}
  if len(set(cuts.values())) > 1:
    say('text cut    ' + ', '.join(f'{cut} by {name}' for name, cut in cuts.items())
        + f': the result is scored and trained on as {cuts[names[0]]}')
  for name, weight in zip(names, share):
    say(f'{weight:8.4f}  {name}')
  say(f'written     {target}')
  return dict(zip(names, share.tolist()))


def averaged(parents: dict, share, folder: str = '', progress=None) -> dict:
  """{name: leaves.Later} of all leaves, parameters and moments; counts of updates are the
  largest. BadInput, when one is made: a parent's leaf is not finite.

  Args:
    folder: for sums of leaves that are too large for memory. progress: a Progress that counts.
  """
  chosen = {n: (s, w) for (n, s), w in zip(parents.items(), share) if w}
  leaves, counts = {}, {}
  for saved, _ in chosen.values():
    there = checkpoint.names(saved.directory, saved.step)
    leaves = {n: x for n, x in (leaves or there).items() if n in there}
    counts |= {n: x for n, x in there.items() if n.startswith(COUNTS)}
  leaves |= counts
  sums = _Sums(chosen, {n: leaves[n] for n in in_order(leaves)}, folder, progress)
  return {n: Later(n, *leaves[n], make=functools.partial(sums.take, n)) for n in sums.group_of}


class _Sums:
  """Averaged leaves, a group at a time; the last group is kept until its leaves are taken."""

  def __init__(self, chosen: dict, leaves: dict, folder: str, progress):
    self.chosen, self.folder, self.progress = chosen, folder, progress
    self.group_of = {name: group for group in groups(leaves) for name in group}
    self._made, self._count = {}, 0
    if progress:
      progress.resize(len(leaves))

  def take(self, name: str) -> np.ndarray:
    if name not in self._made:
      self._made = self._make(self.group_of[name])
    self._count += 1
    if self.progress:
      self.progress.update(self._count)
    return self._made.pop(name)

  def _make(self, group: dict) -> dict:
    large = sum(x.size * x.dtype.itemsize for x in group.values()) > _GROUP
    sums = {name: average.Sum(name, self.folder if large else '') for name in group}
    counts = {name: [] for name in group if name == _COUNT or name.startswith(COUNTS)}
    for parent, (saved, weight) in self.chosen.items():
      like = saved_part(group, saved.meta['leaves'])
      if len(like) < len(group):  # that of all updates stands for those of experts
        like[_COUNT] = jax.ShapeDtypeStruct((), np.int32)
      found = checkpoint.restore(saved.directory, saved.step, like, host=True)
      for name in group:
        array = found.pop(name) if name in found and name != _COUNT else found[_COUNT]
        if name in counts:
          counts[name].append(array)
        else:
          sums[name].add(parent, array, weight)
        del array
    return {name: max(counts[name]) if name in counts else total.total()
            for name, total in sums.items()}


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
  for domain in domains:
    if 'valid' not in store.splits(domain):
      raise BadInput(f'--guard={domain}: {store.path} has no valid text of it')
  config = next(iter(parents.values())).config
  model = Model(config.model, config.execution, config.train.compute_dtype)
  def score(model, params, config=config):
    return score_given(config, model, params, store, domains, 'valid', Protocol.of(config.data))
  params = model.running({n.removeprefix('params/'): jax.numpy.asarray(x.make())
                          for n, x in state.items() if n.startswith('params/')})
  found = {'': score(model, params)}
  for name, saved in parents.items():
    one = reference.load_at(saved.workdir, saved.step)
    # The text is cut as for the result; experts stand in the order of their own LM.
    own = dataclasses.replace(config, model=one.config.model, data=dataclasses.replace(
        config.data, domains=one.config.data.domains))
    found[name] = score(one.model, one.params, own)
  out = {d: {name: scores[i].mean_nll for name, scores in found.items()}
         for i, d in enumerate(domains)}
  for d, nll in out.items():
    if nll[''] is None:
      raise BadInput(f'--guard={d}: no token of its valid text is scored, it holds prompts only: '
                     'name another domain')
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
  phases = lineage.together(*(lineage.phases(s.workdir, s.meta) for s in parents.values()))
  ledger = {k: sum(phase[k] for phase in phases.values()) for k in ('tokens', 'flops', 'seconds')}
  record = record | {'phases': phases}
  config = with_domains(dataclasses.replace(first.config, init=InitConfig()), domains)
  # The count of updates is the largest, and stands in its leaf.
  meta = {n: x for n, x in first.meta.items() if n not in ('init', 'lifecycle', 'updates')}
  meta['identity'] = {n: x for n, x in meta['identity'].items() if not n.startswith('init.')}
  write(target, dataclasses.replace(first, meta=meta), state, config, card, record, ledger=ledger)
