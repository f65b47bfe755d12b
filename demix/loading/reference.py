"""Model references: one syntax wherever a model is named.

`W` is the newest trusted checkpoint of the workdir W, `W@20000` a step, `W#legal` one expert of a
DEMix LM as a dense LM, `W@20000#legal` both. `forest:F` is all experts of the forest F,
`forest:F#legal` one of them. (`hf:DIR` comes with its work.) What code
builds from paths is a Reference.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path

from demix.errors import BadInput
from demix.settings import nearest


@dataclasses.dataclass(frozen=True)
class Reference:
  """A parsed model reference: step and expert are None where none is named; `workdir` is the
  forest's folder where `forest` is true. It may be given wherever a reference is."""
  workdir: Path
  step: int | None = None
  expert: str | None = None
  forest: bool = False

  def __str__(self):
    """A text that `parse` takes for this, whatever the folders are called."""
    kind, path = 'forest:' if self.forest else '', str(self.workdir)
    if path.startswith(_KINDS):
      path = f'./{path}'
    end = '' if self.step is None else f'@{self.step}'
    end += f'#{self.expert}' if self.expert else ''
    texts = [f'{kind}{path}{close}{end}' for close in ('', '/', '/.')]
    return next((text for text in texts if _read(text) == self), texts[-1])


_KINDS = ('forest:', 'hf:')
_NAME = '[A-Za-z0-9_-]+'


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model that was loaded.

  Attributes:
    model: params.Model. params: its running tree. config: the whole Config it was trained with.
    meta: the checkpoint's meta.json. step: which checkpoint. expert: the one taken out, or None.
    workdir: where it lies.
  """
  model: object
  params: dict
  config: object
  meta: dict
  step: int
  expert: str | None
  workdir: Path

  def tokenizer(self, data: str = ''):
    """The tokenizer that the model was trained with: the workdir's copy, or that of a token store.

    Raises:
      BadInput: it is not there, or another.
    """
    from demix.data.tokens.tokenizer import Tokenizer, read_meta
    folder = Path(data) / 'tokenizer' if data else self.workdir / 'data' / 'tokenizer'
    if not folder.is_dir() and not data:  # runs before there was a copy
      folder = Path(self.config.data.path) / 'tokenizer'
    had, has = self.meta['tokenizer'], read_meta(folder)[0]['fingerprint']
    if had != has:
      raise BadInput(f'{folder}: tokenizer {has}, but {self.workdir} was trained with {had}: name '
                     'its token store with --data')
    return Tokenizer.load(folder)

  def clusterer(self, folder: str = ''):
    """The data.clusterer.Clusterer of the clusters that the members were trained on, its centres in
    the order of the members.

    Args:
      folder: where it is; by default in the token store of the training.

    Raises:
      BadInput: a member was not trained on a cluster, or there is no clusterer. Refused: it is not
        the one that made the member's domain.
    """
    return _clusterer(self, {self.workdir: self.members.names}, folder or self.config.data.path)

  @property
  def domains(self) -> tuple:
    """Training domains, in the order of routes."""
    return self.config.data.domains

  @property
  def trained_in(self) -> list:
    """[(workdir, domains that it was trained on)], whose data cards say what was read; of what it
    goes back to as well. A workdir that is gone is None."""
    return [(self.workdir, self.domains), *((w, d) for w, _, d in self._history)]

  @property
  def trained_from(self) -> list:
    """[(token store, domains of it that were trained on)], wherever that is now."""
    return [(self.config.data.path, self.domains), *((s, d) for _, s, d in self._history if s)]

  @functools.cached_property
  def _history(self) -> list:
    from demix.forest import lineage
    return lineage.history([self.meta])

  def given(self, domain: str) -> str | None:
    """The member that was trained on a domain, or None."""
    return domain if domain in self.members.names else None

  def counts(self) -> tuple[int, int]:
    """(total, active) parameters."""
    return self.model.counts()

  @property
  def unearned(self) -> list:
    """Experts that were added without a gain over their parent, or were not compared."""
    return [r['expert'] for r in self.meta.get('lifecycle', []) if r['operation'] == 'add'
            and r['expert'] in self.members.names and not (r['gate'] or {}).get('passed')]

  def take(self, names) -> 'Loaded':
    """Itself: its experts share their parameters."""
    return self

  @property
  def members(self):
    """mix.members.ExpertMembers: the experts, or the LM as the only member."""
    from demix.mix.members import ExpertMembers
    return ExpertMembers(self.model, self.expert or 'model')

  @property
  def member_digests(self) -> tuple:
    """Content digest of each member as a whole LM: its own leaves and those it shares."""
    names = (self.expert,) if self.expert else self.members.names
    return tuple(digest_of_member(self.meta, name) for name in names)


def digest_of_member(meta: dict, expert: str | None = None) -> str:
  """Content digest of an LM, or of one expert of a DEMix LM with what the experts share."""
  from demix.model import tree
  from demix.runtime import digests
  shared, own = {}, {}
  for name, leaf in meta['leaves'].items():
    if name.startswith('params/'):
      found = tree.EXPERT.fullmatch(name)
      (own.setdefault(found[2], {}) if found else shared)[name] = leaf['digest']
  return digests.of_tree(shared | own.get(expert, {}))


def dense_of(model):
  """The config of one expert of a DEMix LM, taken out as a dense LM; of a dense LM its own."""
  return dataclasses.replace(model, ffn='dense', experts=(), expert_every=1)


@dataclasses.dataclass(frozen=True)
class LoadedForest:
  """Experts of a forest as members of a mixture, all of one architecture. Their parameters are read
  when they are asked for: `take` first, and the others never are.

  A DEMix LM of the forest is as many members as it has experts, named LM/EXPERT, each taken out as
  a dense LM.

  Attributes:
    workdir: the forest's folder. names: of the members. steps: of their checkpoints.
    metas: their meta.json. folders: their workdirs. trained: what each was trained on.
    earned: whether each beat its parent when it was registered, or has none.
    experts: the expert of a DEMix LM that each is, or None for a whole LM.
    seed_meta: the seed's meta.json, or None; for the ledger.
  """
  workdir: Path
  names: tuple
  steps: tuple
  metas: tuple
  folders: tuple
  trained: tuple
  earned: tuple
  experts: tuple
  seed_meta: dict | None
  expert: str | None = None

  tokenizer = Loaded.tokenizer

  def clusterer(self, folder: str = ''):
    """See Loaded.clusterer."""
    members = {}
    for where, name in zip(self.folders, self.names):
      members[where] = (*members.get(where, ()), name)
    return _clusterer(self, members, folder or self.config.data.path)

  @functools.cached_property
  def config(self):
    """The config of the first expert; what mixing needs of it is the same in all."""
    return _config_of(self.metas[0])

  @functools.cached_property
  def model(self):
    """The architecture of every expert."""
    from demix.model.params import Model
    return Model(dense_of(self.config.model), self.config.execution,
                 self.config.train.compute_dtype)

  @property
  def members(self):
    """mix.members.WholeMembers."""
    from demix.mix.members import WholeMembers
    return WholeMembers(self.model, self.names)

  @property
  def member_digests(self) -> tuple:
    """Content digest of each member."""
    return tuple(map(digest_of_member, self.metas, self.experts))

  @functools.cached_property
  def params(self) -> dict:
    """The running tree with a leading axis E: every expert's parameters, restored and verified."""
    return stacked(list(zip(self.folders, self.steps, self.experts)))

  @property
  def unearned(self) -> list:
    """Experts that did not beat their parent when they were registered, or were not compared."""
    return [name for name, earned in zip(self.names, self.earned) if not earned]

  @property
  def domains(self) -> tuple:
    """All that the experts and the seed were trained on."""
    seed = tuple(self.seed_meta['domains']) if self.seed_meta else ()
    return tuple(dict.fromkeys(d for group in (*self.trained, seed) for d in group))

  @property
  def trained_in(self) -> list:
    """See Loaded.trained_in."""
    return [*zip(self.folders, self.trained), *((w, d) for w, _, d in self._history)]

  @functools.cached_property
  def _history(self) -> list:
    from demix.forest import lineage
    return lineage.history(self.metas)

  @property
  def trained_from(self) -> list:
    """See Loaded.trained_from."""
    metas = [*self.metas, *([self.seed_meta] if self.seed_meta else [])]
    found = [(meta['config']['data']['path'], tuple(meta['domains'])) for meta in metas]
    return list(dict.fromkeys([*found, *((s, d) for _, s, d in self._history if s)]))

  @property
  def packings(self) -> tuple:
    """The ways in which the experts' text was cut, data.packing, each once."""
    return tuple(dict.fromkeys(_config_of(meta).data.packing for meta in self.metas))

  @property
  def lengths(self) -> tuple:
    """The sequence lengths that the experts were trained with, ascending, each once."""
    return tuple(sorted({_config_of(meta).data.sequence_length for meta in self.metas}))

  @property
  def step(self) -> int:
    """The largest of the experts' steps."""
    return max(self.steps)

  @property
  def meta(self) -> dict:
    """As one meta.json: tokenizer, ledger of all phases, digests over the experts'."""
    from demix.runtime import digests
    each = dict(zip(self.folders, self.metas))
    metas = [*each.values(), *([self.seed_meta] if self.seed_meta else [])]
    ledger = {k: sum(m['ledger'][k] for m in metas) for k in ('tokens', 'flops', 'seconds')}
    return {'tokenizer': self.metas[0]['tokenizer'], 'ledger': ledger,
            'identity': {n: m['identity'] for n, m in zip(self.names, self.metas)},
            'content_digest': digests.of_tree(dict(zip(self.names, self.member_digests)))}

  def given(self, domain: str) -> str | None:
    """The expert that was trained on that domain alone, or None."""
    return next(iter(self.trained_alone(domain)), None)

  def trained_alone(self, domain: str) -> list:
    """Members that were trained on that domain alone."""
    return [n for n, trained in zip(self.names, self.trained) if trained == (domain,)]

  def counts(self) -> tuple[int, int]:
    """(total, active) parameters; what the experts of a DEMix LM share counts once."""
    from demix.model.params import Model
    each = {folder: _config_of(meta).model for folder, meta in zip(self.folders, self.metas)}
    kept = {f: tuple(e for g, e in zip(self.folders, self.experts) if g == f) for f in each}
    total = sum(Model(dataclasses.replace(
        c, experts=kept[f]) if c.ffn == 'demix' else c).counts()[0] for f, c in each.items())
    return total, self.model.counts()[0]

  def take(self, names) -> 'LoadedForest':
    """The forest of these experts only, in its own order."""
    kept = [i for i, n in enumerate(self.names) if n in names]
    pick = lambda values: tuple(values[i] for i in kept)
    return dataclasses.replace(self, **{f: pick(getattr(self, f)) for f in (
        'names', 'steps', 'metas', 'folders', 'trained', 'earned', 'experts')})


def _config_of(meta: dict):
  from demix import settings
  from demix.config import Config
  return settings.from_dict(Config, meta['config'])


def stacked(members) -> dict:
  """The running trees of LMs of one architecture as one, every leaf with a leading axis E.

  Beside the result one of them is in memory at a time.

  Args:
    members: [(workdir, step, expert of a DEMix LM that is taken out, or None)].
  """
  import jax.numpy as jnp
  import numpy as np

  from demix.checkpoints import catalogue
  from demix.model import tree
  out = {}
  for i, (workdir, step, expert) in enumerate(members):
    catalogue.require(workdir / 'checkpoints', step)
    for name, leaf in tree.flatten(load_at(workdir, step, expert).params).items():
      if not i:
        out[name] = np.empty((len(members), *leaf.shape), leaf.dtype)
      out[name][i] = leaf
  return tree.unflatten({name: jnp.asarray(out.pop(name)) for name in list(out)})


def _clusterer(loaded, members: dict, folder: str):
  """See Loaded.clusterer; `members`: {workdir: the members that were trained there}."""
  from demix.data.clusters.clusterer import Clusterer
  from demix.data.tokens.store import read_card
  from demix.errors import Refused
  found = Clusterer.load(folder)
  cluster = {loaded.given(name): name for name in found.names}
  for workdir, names in members.items():
    made = read_card(workdir / 'data').get('clusterer', {}).get('fingerprint')
    for name in names:
      if made is None or name not in cluster:
        raise BadInput(f'expert {name} of {loaded.workdir} was not trained on one of the clusters '
                       f'{", ".join(found.names)}: mix by clusters what was trained on a store '
                       'that prepare --discover made')
    if made != found.fingerprint:
      raise Refused(f'{workdir} was trained on clusters of the clusterer {made}, {folder} has '
                    f'{found.fingerprint}: name its own with --mix.clusterer')
  return found.take([cluster[n] for names in members.values() for n in names])


def load_forest(folder: Path) -> LoadedForest:
  """The finished experts of a forest, checked against its manifest. No arrays are read, and files
  are verified when they are: of experts that are not asked for, only meta.json is opened.

  Raises:
    BadInput: no forest, no expert in it, or one whose checkpoint is not what the manifest says.
    Refused: experts that cannot be mixed; every difference is named.
  """
  from demix.checkpoints import catalogue
  from demix.errors import Refused
  from demix.forest import manifest
  forest = manifest.load(folder)
  found = []
  for name, entry in forest['experts'].items():
    if entry.get('kind', 'full') != 'full':
      continue
    where = folder / entry['workdir']
    step = entry['step']
    meta = catalogue.read_meta(where / 'checkpoints', step)
    if meta['content_digest'] != entry['content_digest']:
      raise BadInput(f'{where}@{step}: content digest {meta["content_digest"]}, but {folder} names '
                     f'{entry["content_digest"]} for expert {name}: restore it, or remove it')
    if meta['config']['data'].get('domain_token'):
      raise Refused(f'forest {folder}: {name} is a +DomainToken LM, which reads a <domain> symbol '
                    'that a mixture would not give: remove it, and evaluate it by itself')
    earned = not entry['parents'] or bool((entry.get('gate') or {}).get('passed'))
    experts = meta['config']['model'].get('experts', ())
    for expert in experts or (None,):
      found.append((f'{name}/{expert}' if expert else name, step, meta, where,
                    (expert,) if expert else tuple(entry['domains']), earned, expert))
  if not found:
    raise BadInput(f'{folder}: a forest without finished experts: train one first')
  differences, (first, _, base, *_) = [], found[0]
  for name, _, meta, *_ in found[1:]:
    pairs = [('tokenizer', meta['tokenizer'], base['tokenizer'])]
    model, wanted = ({k: v for k, v in m['config']['model'].items() if k not in (
        'ffn', 'experts', 'expert_every')} for m in (meta, base))  # an expert is a dense LM
    pairs += [(f'model.{k}', v, wanted.get(k)) for k, v in model.items()]
    differences += [f'{name} {k}={a!r}, {first} {b!r}' for k, a, b in pairs if a != b]
  if differences:
    raise Refused(f'forest {folder}: experts that cannot be mixed: {"; ".join(differences)}')
  return LoadedForest(folder, *map(tuple, zip(*found)), manifest.seed_meta(folder, forest))


def parse(text: 'str | Reference') -> Reference:
  """'W@20000#legal' → Reference.

  It is read from the right, and a folder that exists is taken for one, whatever is in its name; a /
  ends a path: `W/@20000` is a step of W even beside a folder W@20000.

  Raises:
    BadInput: not of that form, or a kind of reference that is not built.
  """
  if isinstance(text, Reference):
    return text
  if text.startswith('hf:'):
    raise BadInput(f'model reference {text!r}: hf: references are not built yet; '
                   'name a workdir: W, W@STEP or W#EXPERT')
  found = _read(text)
  if not found:
    form = 'forest:F or forest:F#EXPERT' if text.startswith('forest:') else \
        'W, W@STEP or W#EXPERT'
    raise BadInput(f'model reference {text!r} is not {form}, and no folder is called so')
  return found


def _read(text: str) -> Reference | None:
  """See `parse`; None for what is of no form."""
  forest = text.startswith('forest:')
  text = text.removeprefix('forest:') if forest else text
  step, expert = '@(?P<step>[0-9]+)', f'#(?P<expert>{_NAME})'
  member = f'#(?P<expert>{_NAME}(?:/{_NAME})?)'
  ends = ('', member) if forest else ('', expert, step, step + expert)
  readings = []  # the longest path first
  for end in ends:
    if found := re.fullmatch(f'(?P<path>.+?){end}', text, re.DOTALL):
      named = found.groupdict()
      at = int(named['step']) if 'step' in named else None
      reading = Reference(Path(found['path']), at, named.get('expert'), forest)
      readings.append((found['path'], reading))
  for inside in ('forest.json' if forest else 'checkpoints', '.'):  # a model before a mere folder
    for _, reading in readings:
      if os.path.exists(reading.workdir / inside):
        return reading
  for path, reading in reversed(readings):  # as much as can be is step and expert
    if not re.search('[@#]', path.rpartition('/')[2]):
      return reading
  return None


def named(text: str) -> tuple[str, str]:
  """NAME=REFERENCE → (name, reference); ('', reference) without a name, or where a folder is called
  like the whole."""
  found = re.fullmatch(r'([\w.+-]+)=(.+)', text, re.DOTALL)  # a / before the = is part of a path
  whole = _read(text)
  return found.groups() if found and not (whole and os.path.exists(whole.workdir)) else ('', text)


def locate(text: 'str | Reference') -> tuple[Reference, Path, int]:
  """What a reference names: (reference, W/checkpoints, a step that was verified).

  Raises:
    BadInput: no such workdir or step.
    NothingToLoad: there are checkpoints, but none that can be trusted.
  """
  from demix.checkpoints import catalogue
  ref, text = parse(text), str(text)
  if ref.forest:
    if not ref.expert:
      raise BadInput(f'model {text!r}: a forest is many models; name one expert, {text}#NAME')
    forest = load_forest(ref.workdir)
    whole = {n.partition('/')[0]: i for i, n in enumerate(forest.names)}  # a DEMix LM by its name
    if ref.expert not in (*forest.names, *whole):
      raise BadInput(f'model {text!r}: no expert {ref.expert!r}'
                     f'{nearest(ref.expert, (*forest.names, *whole))}')
    at = forest.names.index(ref.expert) if ref.expert in forest.names else whole[ref.expert]
    ref = Reference(forest.folders[at], forest.steps[at],
                    forest.experts[at] if ref.expert in forest.names else None)
  directory = ref.workdir / 'checkpoints'
  if not ref.workdir.is_dir():
    raise BadInput(f'model {text!r}: no such workdir {str(ref.workdir)!r}')
  step = catalogue.latest(directory) if ref.step is None else catalogue.require(
      directory, ref.step)
  if step is None:
    raise BadInput(f'model {text!r}: {directory} holds no finished checkpoint: train it first')
  return ref, directory, step


def load(text: 'str | Reference') -> 'Loaded | LoadedForest':
  """Loads the model that a reference names, verified.

  Raises:
    BadInput: no such workdir, step or expert.
    NothingToLoad: there are checkpoints, but none that can be trusted.
  """
  named, text = parse(text), str(text)
  if named.forest and not named.expert:
    return load_forest(named.workdir)
  ref, _, step = locate(named)
  loaded = load_at(ref.workdir, step, ref.expert, text)
  return loaded if ref.expert else dataclasses.replace(loaded, expert=named.expert)


def load_at(workdir: Path, step: int, expert: str | None = None, text: str = '') -> Loaded:
  """The model of a verified checkpoint, or one expert of it as a dense LM.

  Args:
    text: how it was named, for messages.

  Raises:
    BadInput: no such expert. NothingToLoad: the arrays are not those that were saved.
  """
  import jax

  from demix.checkpoints import checkpoint
  from demix.model.params import Model, expert_slice
  directory = workdir / 'checkpoints'
  meta = checkpoint.read_meta(directory, step)
  config = _config_of(meta)
  model = Model(config.model, config.execution, config.train.compute_dtype)
  like = {f'params/{n}': x for n, x in
          jax.eval_shape(model.canonical, model.abstract).items()}
  flat = checkpoint.restore(directory, step, like)
  params = model.stacked({n.removeprefix('params/'): x for n, x in flat.items()})
  if expert:
    if config.model.ffn != 'demix':
      raise BadInput(f'model {text or str(workdir)!r}: a dense LM has no experts; leave out '
                     f'#{expert}')
    model, params = expert_slice(model, params, expert)
  return Loaded(model, params, config, meta, step, expert, workdir)
