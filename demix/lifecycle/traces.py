"""What still holds an expert or its data once it is removed: checkpoints, runs that started from
it, runs on its domain, priors that were estimated with it, clusterers that were fitted on it.

What is found is what files below the searched folders say of themselves; copies elsewhere are not
known here.
"""

import fnmatch
import json
import os
from pathlib import Path

from demix.checkpoints import catalogue
from demix.errors import DemixError
from demix.names import shown

PRIORS = 'priors*.json'


def find(expert: str, history: list, left: tuple, new: Path, model: Path, folders) -> list[dict]:
  """All traces of an expert.

  Args:
    expert: its name. history: lifecycle records of the model it is removed from.
    left: experts that stay. new: the workdir that is about to be made. model: the one it is
      removed from; its `W` is always among the traces.
    folders: where to look, with all that is below them.

  Returns:
    [{'path', 'checkpoints' (names of folders below path/checkpoints), 'why'}], paths absolute.
  """
  domains = {expert} | {r['domain'] for r in history
                        if r['operation'] == 'add' and r['expert'] == expert}
  own = _started(expert, history, left)
  out = [_entry(new, [], [f'expert {e} was started from {expert}' for e in own])] if own else []
  runs, priors, stores = _walk(folders)
  if model.resolve() not in {r.resolve() for r in runs}:
    runs.insert(0, model)
  found = [(run, step, *_read(run, step)) for run in runs
           for step in catalogue.steps(run / 'checkpoints')]
  held: dict[str, set] = {}  # content digest → its experts that hold a trace; {''}: all of it
  why: dict[tuple, list] = {}
  while True:  # a run may start from a run that started from it: until nothing is new
    before = len(why), sum(map(len, held.values()))
    for run, step, meta, problem in found:
      reasons = [problem] if problem else _reasons(expert, domains, meta, held)
      if reasons:
        why[run, step] = reasons
    if before == (len(why), sum(map(len, held.values()))):
      break
  for run in runs:
    steps = [s for r, s in why if r == run]
    if steps:
      reasons = dict.fromkeys(reason for s in steps for reason in why[run, s])
      out.append(_entry(run, [*map(str, steps), *_bad(run)], reasons))
  return out + priors_of(expert, priors) + clusterers_of(domains, stores)


def find_whole(name: str, entry: dict, workdir: Path, folders) -> list[dict]:
  """All traces of an expert of a forest outside its own workdir, by content digest: copies of it,
  averages that it is part of, runs that started from any of these, runs on its domains, priors over
  it, clusterers fitted on its text.

  Args:
    name: of the expert. entry: of the manifest. workdir: the expert's, which is about to go.
    folders: where to look.

  Returns:
    As `find`.
  """
  own = {entry['content_digest']}
  for step in catalogue.steps(workdir / 'checkpoints'):
    meta, _ = _read(workdir, step)
    own |= {meta['content_digest']} if meta else set()
  held = set(own)
  runs, priors, stores = _walk(folders)
  runs = [r for r in runs if r.resolve() != workdir.resolve()]
  found = [(run, step, *_read(run, step)) for run in runs
           for step in catalogue.steps(run / 'checkpoints')]
  why: dict[tuple, list] = {}
  while True:  # averages of averages, runs from these: until nothing is new
    before = len(held)
    for run, step, meta, problem in found:
      reasons = [problem] if problem else _whole_reasons(meta, own, held)
      if reasons and not problem:
        held.add(meta['content_digest'])
      if not problem and (on := [d for d in meta['on'] if d in entry['domains']]):
        reasons.append(f'was trained on domain {", ".join(on)}')
      if reasons:
        why[run, step] = reasons
    if before == len(held):
      break
  out = []
  for run in runs:
    steps = [s for r, s in why if r == run]
    if steps:
      reasons = dict.fromkeys(reason for s in steps for reason in why[run, s])
      out.append(_entry(run, [*map(str, steps), *_bad(run)], reasons))
  return out + priors_of(name, priors, own) + clusterers_of(entry['domains'], stores)


def _whole_reasons(meta, own, held) -> list[str]:
  """Why a checkpoint is the expert (one of the digests `own`) or comes from one of `held`."""
  reasons = ['is a copy of it'] if meta['content_digest'] in own else []
  init = meta.get('init')
  if init and held & {init['content_digest'], *init.get('ancestors', ())}:
    reasons.append(f'started from {init["model"]}, which holds it')
  for record in meta.get('lifecycle', []):
    if record['operation'] == 'average':
      of = [p['name'] for p in record['parents'] if p['weight'] and p['content_digest'] in held]
      if of:
        reasons.append(f'is an average of {", ".join(of)} and others')
  if meta['content_digest'] in held and not reasons:
    reasons.append('is a copy of what comes from it')
  return reasons


def _entry(path, checkpoints, reasons) -> dict:
  return {'path': shown(os.path.abspath(path)), 'checkpoints': checkpoints,
          'why': ', '.join(reasons)}


def _started(expert, history, experts) -> list[str]:
  """Those of `experts` that were started from `expert`, or from one that was, and so on."""
  seen = {expert}
  for record in history:
    if record['operation'] == 'add' and record['parent'] in seen:
      seen.add(record['expert'])
  return [e for e in experts if e in seen and e != expert]


def _reasons(expert, domains, meta, held) -> list[str]:
  """Why a checkpoint holds the expert or its data; adds to `held` what holds it."""
  experts = meta['experts']
  mine = held.setdefault(meta['content_digest'], set())
  reasons = []
  if expert in experts:
    mine.add(expert)
    reasons.append(f'contains expert {expert}')
  for other in _started(expert, meta.get('lifecycle', []), experts):
    mine.add(other)
    reasons.append(f'expert {other} was started from {expert}')
  init = meta.get('init')
  if init and init['expert'] == expert:
    mine.add('')
    reasons.append(f'started from expert {expert}')
  elif init:
    parent = held.get(init['content_digest'], set())
    if init['expert'] in parent or '' in parent or (parent and not init['expert']):
      mine.add('')
      reasons.append(f'started from {init["model"]}, which holds it')
  if on := [d for d in meta['on'] if d in domains]:
    if not experts:  # of a DEMix LM's other experts the trunk saw it, which the residue speaks of
      mine.add('')
    reasons.append(f'was trained on domain {", ".join(on)}')
  return reasons


def _read(run, step):
  """(meta, None), or (None, what is wrong with it)."""
  try:
    meta = catalogue.read_meta(run / 'checkpoints', step)
    return meta | {'experts': meta['config']['model']['experts'], 'on': meta['domains']}, None
  except (DemixError, KeyError, TypeError):
    return None, 'a meta.json cannot be read: look for yourself'


def _bad(run) -> list[str]:
  """Damaged and unfinished checkpoints, which may hold arrays all the same."""
  return sorted(shown(e.name) for e in os.scandir(run / 'checkpoints')
                if e.is_dir() and ('.bad' in e.name or '.saving-' in e.name))


def _walk(folders) -> tuple[list[Path], list[Path], list[Path]]:
  """(workdirs, priors files, stores with a clusterer) below the folders, each once; links are not
  followed."""
  runs, priors, stores, seen = [], [], [], set()
  for folder in folders:
    for path, names, files in os.walk(folder):
      names.sort()
      if os.path.realpath(path) in seen:
        names.clear()
        continue
      seen.add(os.path.realpath(path))
      if 'checkpoints' in names:
        names.remove('checkpoints')
        runs.append(Path(path))
      if 'clusterer' in names and 'card.json' in files:
        stores.append(Path(path))
      priors += [Path(path) / f for f in sorted(fnmatch.filter(files, PRIORS))]
  return runs, priors, stores


def priors_of(expert: str, files, digests=()) -> list[dict]:
  """Entries for those of the priors files that name the expert, or cannot be read; with `digests`,
  content digests, of those that have digests only if one is among them."""
  out = []
  for file in files:
    try:
      for entry in json.loads(file.read_bytes())['priors']:
        there = dict(zip(entry['experts'], entry.get('digests') or ()))
        if expert in entry['experts'] and (not digests or there.get(expert) in {None, *digests}):
          out.append(_entry(file, [], [f'a prior over experts with {expert}']))
          break
    except (OSError, ValueError, KeyError, TypeError):
      out.append(_entry(file, [], ['priors that cannot be read: look for yourself']))
  return out


def clusterers_of(domains, stores) -> list[dict]:
  """Entries for the clusterers of stores that were fitted on text of one of the domains, whether
  the domain is a label that was pooled or one of the clusters."""
  out = []
  for store in stores:
    try:
      card = json.loads((store / 'card.json').read_bytes())
      saw = [d for d in (*card['clusterer']['labels'], *card['domains']) if d in domains]
    except (OSError, ValueError, KeyError, TypeError):
      out.append(_entry(store, [], ['a card that cannot be read: look for yourself']))
      continue
    if saw:
      out.append(_entry(store / 'clusterer', [],
                        [f'a clusterer that was fitted on text of {", ".join(saw)}']))
  return out
