"""Writing a trained model into a forest: an expert of its plan, or a workdir from elsewhere.

What is registered was read to the last byte, its parents are in the forest, and it was compared
with them on valid text of its own domains (the gate); a refusal changes nothing on disk.
"""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np

from demix import settings
from demix.checkpoints import catalogue, checkpoint
from demix.config import Config
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, DemixError, Refused
from demix.eval.given import score_given
from demix.eval.sequences import Protocol
from demix.forest import lineage, manifest, plan
from demix.forest.manifest import SEED
from demix.lifecycle.average import groups
from demix.lifecycle.forests import state_of
from demix.lifecycle.workdirs import Saved
from demix.loading import reference
from demix.settings import nearest


def register(folder: Path, name: str, *, data: str = '', require_gain: bool = False,
             limit: int = 0, verify_data: bool = True, say=print):
  """Writes what the plan said, once it is trained, into the manifest.

  Args:
    folder: the forest. name: seed, or an expert of the plan.
    data, require_gain, limit, verify_data: see `add`.

  Raises:
    BadInput: it is not there, or not finished. Refused: see `add`.
  """
  forest = manifest.load(folder)
  state, step, wanted = state_of(folder, forest, name)
  if state not in ('finished', 'registered'):
    raise BadInput(f'{folder / plan.folder_of(name)}: {state} at step {step} of {wanted}: train it '
                   f'first (forest run --forest={folder} --only={name})')
  saved = _open(folder / plan.folder_of(name), step)
  if name == SEED:
    with manifest.edit(folder) as forest:
      forest['base'] = _base(folder, saved)
    return
  entry = entry_of(folder, forest, name, saved, data=data, require_gain=require_gain, limit=limit,
                   verify_data=verify_data, say=say)
  with manifest.edit(folder) as forest:
    forest['experts'][name] = forest['experts'].get(name, {}) | entry


def add(folder, name: str, source: str, *, parent: str = '', data: str = '',
        require_gain: bool = False, limit: int = 0, verify_data: bool = True, say=print):
  """Registers a finished workdir under a new name; it is copied into the forest unless it lies
  there.

  Args:
    folder: the forest (made if need be). name: of the expert. source: its reference, W or W@STEP.
    parent: where it comes from, if its checkpoint does not say: the name of the seed or an expert,
      or `none`.
    data: token store for the gate; '': the one it trained on.
    require_gain: register nothing if the gate finds no gain.
    limit: sequences of valid text for the gate; 0: all.
    verify_data: compare that text with the digests in its store's card first.
    say: called with each line for people.

  Raises:
    BadInput: a name that is taken, no such workdir, an unfinished one, an unknown parent, numbers
      that are not finite.
    Refused: no gain, and `require_gain`.
  """
  folder = Path(folder)
  forest = manifest.load(folder) if (folder / manifest.FILE).exists() else manifest.empty()
  manifest.free(forest, name, folder)
  ref, _, step = reference.locate(source)
  if ref.expert:
    raise BadInput(f'--from={source}: one expert of a DEMix LM has no checkpoint of its own: name '
                   'a whole LM')
  saved = _open(ref.workdir, step)
  if ref.step is None and step < saved.config.train.steps:
    raise BadInput(f'--from={source}: half-written: step {step} of {saved.config.train.steps}: '
                   f'train it on, or name that step, {ref.workdir}@{step}')
  check_finite(saved)
  target = folder / plan.folder_of(name)
  here = os.path.realpath(target) == os.path.realpath(saved.workdir)
  if not here and os.path.lexists(target):
    raise BadInput(f'{target} is there already and is not registered: take another name, register '
                   f'it with --from={target}, or delete it')
  entry = entry_of(folder, forest, name, saved, parent=parent, data=data,
                   require_gain=require_gain, limit=limit, verify_data=verify_data, say=say)
  with contextlib.nullcontext(target) if here else _copy(saved, target):
    entry['files'] = manifest.files_of(target)
    with manifest.edit(folder) as forest:
      manifest.free(forest, name, folder)
      forest['experts'][name] = entry
  say(f'added       {name}: {target}, step {step}')


def _open(workdir: Path, step: int) -> Saved:
  directory = workdir / 'checkpoints'
  catalogue.require(directory, step)  # every byte is read
  meta = catalogue.read_meta(directory, step)
  return Saved(workdir, step, meta, settings.from_dict(Config, meta['config']))


def check_finite(saved: Saved):
  """Raises BadInput for a checkpoint with a parameter that is not finite; the leaf is named."""
  leaves = {n: x for n, x in checkpoint.names(saved.directory, saved.step).items()
            if n.startswith('params/')}
  for group in groups(leaves):
    for name, leaf in checkpoint.restore(saved.directory, saved.step, group).items():
      if not np.isfinite(np.asarray(leaf).astype(np.float32, copy=False)).all():
        raise BadInput(f'{saved.workdir}@{saved.step}: {name} is not finite: name an earlier step')


@contextlib.contextmanager
def _copy(saved: Saved, target: Path):
  """A copy of the workdir with that one checkpoint, which stays if the block ends well."""
  making = target.parent / f'.{target.name}.making-{os.getpid()}'
  try:
    making.mkdir(parents=True)
    step = Path('checkpoints') / str(saved.step)
    shutil.copytree(saved.workdir / step, making / step)
    for file in ('config.json', 'metrics.jsonl'):
      if (saved.workdir / file).exists():
        shutil.copyfile(saved.workdir / file, making / file)
    shutil.copytree(saved.workdir / 'data', making / 'data')
    catalogue.require(making / 'checkpoints', saved.step)
    os.rename(making, target)
  except OSError as e:
    raise BadInput(f'{target}: cannot be made ({e.strerror or e})') from None
  finally:
    shutil.rmtree(making, ignore_errors=True)
  try:
    yield target
  except BaseException:
    shutil.rmtree(target, ignore_errors=True)
    raise


def _base(folder: Path, saved: Saved) -> dict:
  return {'workdir': os.path.relpath(saved.workdir, folder), 'step': saved.step,
          'content_digest': saved.meta['content_digest'],
          'files': manifest.files_of(saved.workdir)}


def entry_of(folder: Path, forest: dict, name: str, saved: Saved, *, parent: str = '',
             data: str = '', require_gain: bool = False, limit: int = 0, verify_data: bool = True,
             say=print) -> dict:
  """The manifest's entry of an expert. Raises as `add`."""
  parents, origin = origin_of(folder, forest, saved, parent)
  gate = measure(saved, origin, data, limit, verify_data)
  say(gate_line(name, gate))
  if require_gain and not (gate and gate['passed']):
    why = 'has no gain over its parent' if gate else 'was not compared with a parent'
    raise Refused(f'expert {name} {why} on valid text of {", ".join(saved.meta["domains"])}: it is '
                  'not registered; train it longer or leave out --require_gain')
  meta = saved.meta
  init = None
  if len(origin) == 1:
    init = {'workdir': os.path.relpath(origin[0].workdir, folder), 'step': origin[0].step,
            'content_digest': origin[0].meta['content_digest']}
  return {'kind': 'full', 'parents': parents, 'domains': list(meta['domains']),
          'steps': saved.step, 'tokens': meta['ledger']['tokens'],
          'workdir': plan.folder_of(name), 'step': saved.step,
          'content_digest': meta['content_digest'], 'init': init, 'gate': gate,
          'fingerprints': {'tokenizer': meta['tokenizer'], 'data': meta['data']},
          'files': manifest.files_of(saved.workdir), 'artefacts': {}}


# ---- where it comes from ----------------------------------------------------------------------


def origin_of(folder: Path, forest: dict, saved: Saved, parent: str = '') -> tuple[dict, list]:
  """What of the forest a model was made from.

  Args:
    parent: see `add`.

  Returns:
    ({name: weight}, what it is compared with: the one checkpoint it started from, or, for an
    average, its parents; [] for none).

  Raises:
    BadInput: it comes from something that the forest does not have.
  """
  if parent == 'none':
    return {}, []
  if parent:
    known = {SEED: forest['base']} if forest['base'] else {}
    known |= forest['experts']
    if parent not in known:
      raise BadInput(f'--parent={parent}: {folder} has no such expert{nearest(parent, known)}')
    return {parent: 1.0}, [_open(folder / known[parent]['workdir'], known[parent]['step'])]
  made_of = lineage.parents(saved.meta)
  if not made_of:
    return {}, []
  there = _checkpoints(folder, forest)
  if all(digest in there for digest in made_of):
    return _named(made_of, there), [_open(*there[d][1:]) for d in made_of]
  init = saved.meta.get('init')
  between = init and _started_from(folder, init)
  if between:  # an average of experts that is no expert itself
    made_of = lineage.parents(between.meta)
    if made_of and all(digest in there for digest in made_of):
      return _named(made_of, there), [between]
  missing = ', '.join(d for d in made_of if d not in there)
  raise BadInput(f'{saved.workdir} comes from a model with content digest {missing}, which '
                 f'{folder} does not have: add that one first, or say --parent=NAME or none')


def _named(made_of: dict, there: dict) -> dict:
  out = {}
  for digest, weight in made_of.items():
    name = there[digest][0]
    out[name] = out.get(name, 0.0) + weight
  return out


def _checkpoints(folder: Path, forest: dict) -> dict:
  """{content digest: (name, workdir, step)} of all that the seed and the experts keep."""
  entries = {SEED: forest['base']} if forest['base'] else {}
  out = {}
  for name, entry in (entries | forest['experts']).items():
    workdir = folder / entry['workdir']
    for step in catalogue.steps(workdir / 'checkpoints'):
      with contextlib.suppress(DemixError):
        digest = catalogue.read_meta(workdir / 'checkpoints', step)['content_digest']
        out.setdefault(digest, (name, workdir, step))
  return out


def _started_from(folder: Path, init: dict) -> Saved | None:
  """The checkpoint that a run says it started from, if it is still there: in the forest, or where
  it was."""
  for workdir in (folder / 'parents' / Path(init['workdir']).name, Path(init['workdir'])):
    with contextlib.suppress(DemixError):
      found = _open(workdir, init['step'])
      if found.meta['content_digest'] == init['content_digest']:
        return found
  return None


# ---- the gate ---------------------------------------------------------------------------------


def measure(saved: Saved, origin: list, data: str, limit: int,
            verify_data: bool = True) -> dict | None:
  """The gate: NLL of the valid text of an expert's own domains, under it and under what it comes
  from; of several parents the best counts.

  Returns:
    {'split', 'limit', 'tokens', 'protocol', 'parent_nll', 'nll', 'gain' (nats per token),
    'passed'}; None where there is nothing to compare with: no parent, no text of which a token is
    scored, or no store at that place.
  """
  path = data or saved.config.data.path
  if not origin or (not data and not Path(path).is_dir()):
    return None
  store = TokenStore.open(path, saved.meta['domains'])
  domains = [d for d in saved.meta['domains']
             if d in store.domains and 'valid' in store.splits(d)]
  if store.tokenizer_meta['fingerprint'] != saved.meta['tokenizer']:
    raise BadInput(f'{path}: another tokenizer than that of {saved.workdir}: give its store with '
                   '--data')
  if not domains:
    return None
  if verify_data:
    store.verify(domains, ('valid',))
  protocol = Protocol.of(saved.config.data, limit=limit)  # of both: how the expert was trained
  def nats(one: Saved) -> tuple[float, int]:
    loaded = reference.load_at(one.workdir, one.step)
    scores = score_given(one.config, loaded.model, loaded.params, store, domains, 'valid', protocol,
                         at_best=True)
    return sum(s.nll for s in scores), sum(s.tokens for s in scores)
  lost, tokens = nats(saved)
  if not tokens:  # prompts only, in as much of it as was read
    return None
  was, now = min(nats(one)[0] for one in origin) / tokens, lost / tokens
  return {'split': 'valid', 'limit': limit, 'tokens': tokens, 'protocol': str(protocol),
          'parent_nll': was, 'nll': now, 'gain': was - now, 'passed': now < was}


def gate_line(name: str, gate: dict | None) -> str:
  """The result of a gate, for people."""
  if not gate:
    return (f'gate        {name}: not compared: no parent, or no valid text of which a token is '
            'scored (more of it with --limit, another store with --data)')
  flag = '' if gate['passed'] else '; FLAGGED'
  return (f'gate        {name}: {gate["parent_nll"]:.4f} nats by its parent, {gate["nll"]:.4f} by '
          f'itself (gain {gate["gain"]:.4f}, {gate["tokens"]} tokens){flag}')
