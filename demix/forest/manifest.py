"""forest.json: which experts a forest has, where they came from and what was measured of them.

F/forest.json  {"version", "plan", "base", "experts": {name: entry}, "removed", "self"}
  base         {"workdir", "step", "content_digest", "files"} of the seed, or null
  entry        {"kind", "parents": {name or "seed": weight}, "domains", "steps", "tokens",
               "workdir", "step", "content_digest", "init": {"workdir", "step", "content_digest"} of
               what it started from, or null, "fingerprints": {"tokenizer", "data"}, "gate",
               "files": {path below the workdir: xxh3-128}, "artefacts": {}}; workdirs are relative
               to F
  self         xxh3-128 of the rest, for `verify`
Edits are read, change, write under the lock of F, with a rename at the end: two writers lose
nothing, and a kill leaves the old file or the new one. Fields that are not known here survive.
"""

import contextlib
import copy
import os
import time
from pathlib import Path

import orjson
import xxhash

from demix.checkpoints import catalogue
from demix.errors import BadInput, Locked
from demix.names import SEED, inside, is_name, shown, why_no_expert
from demix.runtime import digests
from demix.runtime.workdir import LOCK, hold, write_atomic
from demix.settings import nearest

VERSION = 1
FILE = 'forest.json'
_REQUIRED = ('kind', 'parents', 'domains', 'workdir', 'step', 'content_digest')


def empty(plan: dict | None = None) -> dict:
  """A forest without a seed or experts."""
  return {'version': VERSION, 'plan': plan, 'base': None, 'experts': {}}


def load(folder) -> dict:
  """The manifest of the forest in `folder`.

  Raises:
    BadInput: there is none, it is not JSON or of another version, or an entry is not complete.
  """
  path = Path(folder) / FILE
  try:
    forest = orjson.loads(path.read_bytes())
  except FileNotFoundError:
    raise BadInput(f'{folder}: no {FILE}, so no forest; `forest plan` makes one') from None
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  except orjson.JSONDecodeError as e:
    raise BadInput(f'{path}: not JSON ({e}); restore it from a copy') from None
  version = forest.get('version') if isinstance(forest, dict) else None
  if version != VERSION:
    raise BadInput(f'{path}: version {version!r}, this demix reads {VERSION}')
  check(forest, path)
  return forest


def check(forest: dict, path):
  """Raises BadInput for a manifest that cannot be: an incomplete entry, a parent that is not there,
  weights that are negative or do not sum to 1, a cycle."""
  if not isinstance(forest.get('experts'), dict) or not {'base', 'plan'} <= forest.keys():
    raise BadInput(f'{path}: no plan, base or experts in it: restore the file from a copy')
  experts, base = forest['experts'], forest['base']
  if base is not None:
    if not isinstance(base, dict) or not {'workdir', 'step', 'content_digest'} <= base.keys():
      raise BadInput(f'{path}: {SEED} {base!r} is no checkpoint: restore the file from a copy')
    _check_entry(SEED, base, path)
  for name in (forest['plan'] or {}).get('experts', ()):  # each becomes a folder
    if not is_name(name) or name == SEED:
      raise BadInput(f'{path}: {name!r} of the plan cannot be the name of an expert: restore the '
                     'file from a copy')
  for name, entry in experts.items():
    missing = [k for k in _REQUIRED if k not in entry] if isinstance(entry, dict) else _REQUIRED
    if missing or not is_name(name) or name == SEED:
      raise BadInput(f'{path}: expert {name!r} has no {", ".join(missing) or "name that can be"}: '
                     'restore the file from a copy')
    _check_entry(name, entry, path)
    parents = entry['parents']
    for parent in parents:
      if parent != SEED and parent not in experts:
        raise BadInput(f'{path}: expert {name} has parent {parent!r}, which is not there'
                       f'{nearest(parent, [SEED, *experts])}')
    weights = list(parents.values())
    if parents and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
      raise BadInput(f'{path}: expert {name} has parents of weight {weights}: at least 0 each, '
                     'and 1 together')
  order(forest, path)


def _check_entry(name, entry, path):
  """Raises BadInput where what becomes a path, or a part of one, is none below the forest."""
  inside(Path(path).parent, entry['workdir'], f'{path}: expert {name}: workdir')
  init = entry.get('init')
  if init is not None and not (isinstance(init, dict) and isinstance(init.get('workdir'), str)
                               and '\0' not in init['workdir'] and _is_step(init.get('step'))):
    raise BadInput(f'{path}: expert {name}: init {init!r} is no checkpoint: restore the file from '
                   'a copy')
  for key, fits in (('step', _is_step), ('content_digest', lambda x: isinstance(x, str)),
                    ('domains', lambda x: isinstance(x, list) and all(map(is_name, x))),
                    ('parents', lambda x: isinstance(x, dict))):
    if key in entry and not fits(entry[key]):
      raise BadInput(f'{path}: expert {name}: {key} {entry[key]!r} cannot be: restore the file '
                     'from a copy')


def _is_step(value):
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def order(forest: dict, path='the forest') -> list[str]:
  """Experts, each behind those of its parents that are there. BadInput: a cycle; its names are
  given."""
  experts, out, under_way = forest['experts'], [], []
  def visit(name):
    if name in out or name not in experts:
      return
    if name in under_way:
      cycle = ' → '.join([*under_way[under_way.index(name):], name])
      raise BadInput(f'{path}: parents go in a circle: {cycle}; mend one of them')
    under_way.append(name)
    for parent in experts[name]['parents']:
      visit(parent)
    under_way.pop()
    out.append(name)
  for name in experts:
    visit(name)
  return out


@contextlib.contextmanager
def edit(folder, wait: float = 30.0):
  """Yields the manifest to change; writes it if the block ends well. Another writer is waited for.

  Raises:
    Locked: another process held the forest for longer than `wait` seconds.
    BadInput: what came out cannot be; nothing is changed.
  """
  with _held(Path(folder), wait):
    path = Path(folder) / FILE
    forest = load(folder) if path.exists() else empty()
    before = copy.deepcopy(forest)
    yield forest
    check(forest, path)
    if forest != before or not path.exists():
      forest['self'] = _self(forest)
      try:
        write_atomic(path, orjson.dumps(forest, option=orjson.OPT_INDENT_2) + b'\n')
      except OSError as e:
        raise BadInput(f'{path}: cannot be written ({e.strerror})') from None


@contextlib.contextmanager
def _held(folder: Path, wait: float):
  end = time.monotonic() + wait
  with contextlib.ExitStack() as stack:
    while True:
      try:
        stack.enter_context(hold(folder, 'forest'))
        break
      except Locked:
        if time.monotonic() > end:
          raise
        time.sleep(0.02)
    yield


def require(forest: dict, name: str, folder) -> dict:
  """The entry of an expert. BadInput: there is none; the nearest name is given."""
  if name not in forest['experts']:
    raise BadInput(f'{folder}: no expert {name!r}{nearest(name, forest["experts"])}')
  return forest['experts'][name]


def free(forest: dict, name: str, folder):
  """Raises BadInput unless an expert can be called `name`."""
  if name in forest['experts']:
    raise BadInput(f'{folder} has an expert {name!r} already: take another name, or remove it')
  if why := why_no_expert(name):
    raise BadInput(f'{name!r} cannot be the name of an expert ({why}): give another')


def descendants(forest: dict, name: str) -> list[str]:
  """Experts that come from `name`, nearest first."""
  out = []
  for other in order(forest):
    if any(p == name or p in out for p in forest['experts'][other]['parents']):
      out.append(other)
  return out


def meta_of(folder, entry: dict) -> dict:
  """meta.json of an entry's checkpoint. BadInput: it is not there."""
  return catalogue.read_meta(Path(folder) / entry['workdir'] / 'checkpoints', entry['step'])


def seed_meta(folder, forest: dict) -> dict | None:
  """meta.json of the seed, or None: there is none, or it is not kept here."""
  try:
    return meta_of(folder, forest['base']) if forest['base'] else None
  except BadInput:
    return None


def _self(forest: dict) -> str:
  rest = {k: v for k, v in forest.items() if k != 'self'}
  return xxhash.xxh3_128_hexdigest(orjson.dumps(rest))


def files_of(workdir) -> dict:
  """{path: xxh3-128} of what lies in a workdir beside its checkpoints, which are sealed."""
  workdir, out = Path(workdir), {}
  for path, names, files in os.walk(workdir):
    names[:] = sorted(n for n in names if n != 'checkpoints')
    for file in sorted(files):
      if file != LOCK:
        full = Path(path) / file
        out[shown(full.relative_to(workdir))] = digests.of_file(full)
  return out


def problems(folder, forest: dict) -> list[str]:
  """Reads every byte of what the manifest names; a line for each file that is amiss: the expert,
  the file, what is wrong. Checkpoints of other steps and averages that experts started from too."""
  folder, out = Path(folder), []
  if forest.get('self') not in (None, _self(forest)):
    out.append(f'{folder / FILE}: changed, and not by demix: restore it from a copy')
  entries = {SEED: forest['base']} if forest['base'] else {}
  for name, entry in (entries | forest['experts']).items():
    workdir = folder / entry['workdir']
    out += [f'{name}: {problem}' for problem in _of_checkpoints(workdir, entry)]
    try:
      found = files_of(workdir) if 'files' in entry else {}
    except OSError as e:
      out.append(f'{name}: {e.filename}: cannot be read ({e.strerror})')
      continue
    for file, digest in entry.get('files', {}).items():
      if found.get(file) != digest:
        what = 'missing' if file not in found else f'digest {found[file]}, expected {digest}'
        out.append(f'{name}: {workdir / file}: {what}')
    init = entry.get('init')
    if init and (folder / init['workdir']).parent == folder / 'parents':
      out += [f'{name}: {problem}' for problem in _of_checkpoints(folder / init['workdir'], init)]
  return out


def _of_checkpoints(workdir: Path, entry: dict) -> list[str]:
  directory, out = workdir / 'checkpoints', []
  try:
    steps = catalogue.steps(directory)
  except BadInput as e:
    return [str(e)]
  for step in sorted({entry['step'], *steps}):
    found = catalogue.verify(directory, step)
    out += [f'{directory / str(step)}: {problem}' for problem in found]
    if not found and step == entry['step']:
      digest = catalogue.read_meta(directory, step)['content_digest']
      if digest != entry['content_digest']:
        out.append(f'{directory / str(step)}: content digest {digest}, but {FILE} says '
                   f'{entry["content_digest"]}')
  return out
