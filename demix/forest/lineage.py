"""Where a checkpoint comes from, by what its meta.json says: content digests, not paths."""

import contextlib
import os
from pathlib import Path

from demix.checkpoints import catalogue
from demix.errors import BadInput, DemixError


def ancestors(meta: dict) -> set:
  """Content digests that a checkpoint goes back to: its own, those of what its run started from,
  and for an average those that all its parents go back to.

  Args:
    meta: of a checkpoint.
  """
  out, init = {meta['content_digest']}, meta.get('init')
  if init:
    out |= {init['content_digest'], *init.get('ancestors', ())}
  for record in meta.get('lifecycle', ()):
    out |= set(record.get('ancestors', ()))
  return out


def parents(meta: dict) -> dict:
  """{content digest: weight} of what a checkpoint was made of directly: the parents of an average,
  or the one that its run started from; {} for a run from fresh parameters."""
  averages = [r for r in meta.get('lifecycle', ()) if r['operation'] == 'average']
  if averages:
    out = {}
    for parent in averages[-1]['parents']:
      if parent['weight']:
        digest = parent['content_digest']
        out[digest] = out.get(digest, 0.0) + parent['weight']
    return out
  init = meta.get('init')
  return {init['content_digest']: 1.0} if init else {}


def history(metas) -> list:
  """What checkpoints go back to: what their runs started from, the parents of averages, LMs that
  experts were added to or removed from, runs that they came from.

  Args:
    metas: meta.json of each checkpoint.

  Returns:
    [(workdir, token store, domains)] of those that are still where they were; at the end (None, '',
    domains) with the names that are known without them.
  """
  found, names, todo = {}, {}, list(metas)
  while todo:
    meta = todo.pop()
    init, records = meta.get('init'), meta.get('lifecycle', ())
    names |= dict.fromkeys((init or {}).get('trained_on', ()))
    names |= {r['expert']: None for r in records if r['operation'] == 'remove'}
    places = [init] if init else []
    for record in records:
      places += [record[k] for k in ('model', 'from') if k in record] + record.get('parents', [])
    for place in places:
      key = place['workdir'], place['step']
      with contextlib.suppress(DemixError):
        if key not in found:
          found[key] = catalogue.read_meta(Path(key[0]) / 'checkpoints', key[1])
          if found[key]['content_digest'] == place['content_digest']:
            todo.append(found[key])
          else:
            del found[key]
  out = [(Path(workdir), meta['config']['data']['path'], tuple(meta['domains']))
         for (workdir, _), meta in found.items()]
  return [*out, (None, '', tuple(names))]


def trained_on(meta: dict) -> list:
  """Domains that a checkpoint and what it goes back to were trained on, as far as it is known."""
  past = [d for _, _, domains in history([meta]) for d in domains]
  return list(dict.fromkeys([*meta['domains'], *past]))


def phases(workdir, meta: dict) -> dict:
  """What a checkpoint and all that it goes back to cost: {workdir: ledger}, each phase once.

  Args:
    workdir, meta: of the checkpoint. What its run started from is left out if it is not there any
      more; an average knows its own phases.
  """
  out = next((dict(r['phases']) for r in reversed(meta.get('lifecycle', ())) if 'phases' in r), {})
  own = {k: x - sum(p[k] for p in out.values()) for k, x in meta['ledger'].items()}
  if own['tokens'] > 0:
    out[os.path.realpath(workdir)] = own
  if init := meta.get('init'):
    try:
      before = catalogue.read_meta(Path(init['workdir']) / 'checkpoints', init['step'])
    except BadInput:
      return out
    out = together(out, phases(init['workdir'], before))
  return out


def together(*found: dict) -> dict:
  """Phases of several checkpoints; of one workdir the longest."""
  out = {}
  for phases in found:
    for workdir, ledger in phases.items():
      if workdir not in out or ledger['tokens'] > out[workdir]['tokens']:
        out[workdir] = ledger
  return out
