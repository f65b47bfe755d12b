"""Which checkpoints there are, and which can be trusted. Called as `checkpoint.latest` …: a part of
demix/checkpoints/checkpoint.py, where the files are described.

Takes no lock, writes nothing and does not import JAX. `directory` is always W/checkpoints.
"""

import json
import os
import re
import sys
from pathlib import Path

from demix.errors import BadInput, NothingToLoad
from demix.runtime import digests

VERSION = 1
META = 'meta.json'
STEP = re.compile(r'(0|[1-9][0-9]*)', re.ASCII)


def one_line(text, limit: int = 300) -> str:
  """Any text (an Orbax error is many lines) as one line of bounded length."""
  text = ' '.join(str(text).split())
  return text if len(text) <= limit else text[:limit] + ' …'


def steps(directory) -> list[int]:
  """Steps of the finished checkpoints (those with a digests.json), ascending; unverified.

  Raises:
    BadInput: `directory` cannot be listed. (A missing one holds no checkpoints.)
  """
  try:
    found = [e.name for e in os.scandir(directory)
             if STEP.fullmatch(e.name) and os.path.lexists(os.path.join(e.path, digests.FILE))]
  except FileNotFoundError:
    return []
  except OSError as e:
    raise BadInput(f'{directory}: cannot be listed ({e.strerror})') from None
  return sorted(int(name) for name in found)


def verify(directory, step: int) -> list[str]:
  """What is wrong with a checkpoint, as `file: problem`; [] means that it can be trusted.

  Reads every byte: seconds per few gigabytes. Says nothing about who wrote the files.
  """
  return problems_of(Path(directory) / str(step), step)


def problems_of(root: Path, step: int) -> list[str]:
  """`verify` of a checkpoint that may have another name than its step yet."""
  problems = digests.problems(root)
  if not problems:
    try:
      _meta(root, step)
    except (OSError, ValueError) as e:
      problems = [f'{META}: {getattr(e, "strerror", None) or e}']
  return [one_line(p) for p in problems]


def summary(problems: list[str]) -> str:
  """The first three problems in one line, and how many more there are."""
  more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
  return '; '.join(problems[:3]) + more


def _warn(line: str):
  print(f'warning: {line}', file=sys.stderr, flush=True)


def latest(directory, *, warn=_warn) -> int | None:
  """The newest step that can be trusted; newest by number, never by file time.

  Args:
    directory: W/checkpoints.
    warn: called with one line for every newer checkpoint that is bad: which file, and why.

  Returns:
    The step, or None if there is no finished checkpoint at all.

  Raises:
    NothingToLoad: there are some, and every one is bad.
  """
  bad = []
  for step in reversed(steps(directory)):
    problems = verify(directory, step)
    if not problems:
      return step
    if step not in steps(directory):
      return latest(directory, warn=warn)  # deleted under our eyes by a run that has newer ones
    bad.append(step)
    warn(f'checkpoint {Path(directory) / str(step)} is not used: {summary(problems)}')
  if bad:
    raise NothingToLoad(f'{directory}: no checkpoint can be trusted (bad: '
                        f'{", ".join(map(str, bad))}); restore one from a copy, '
                        'or delete them to start over')
  return None


def require(directory, step: int) -> int:
  """`step`, verified: for whoever names a step instead of taking `latest`.

  Raises:
    BadInput: there is no such checkpoint (those that exist are named).
    NothingToLoad: it is bad.
  """
  _root(directory, step)
  if problems := verify(directory, step):
    raise NothingToLoad(f'checkpoint {Path(directory) / str(step)} is bad: {summary(problems)}; '
                        'name another step')
  return step


def _root(directory, step) -> Path:
  known = steps(directory)
  if step not in known:
    there = f'there: {", ".join(map(str, known))}' if known else 'there are none'
    raise BadInput(f'{directory}: no checkpoint of step {step} ({there})')
  return Path(directory) / str(step)


def _meta(root: Path, step: int) -> dict:
  """meta.json; ValueError says what is wrong with it."""
  try:
    meta = json.loads((root / META).read_bytes())
  except FileNotFoundError:
    raise ValueError('missing') from None
  except (ValueError, RecursionError):
    raise ValueError('not JSON') from None
  if not isinstance(meta, dict):
    raise ValueError('not a JSON object')
  if meta.get('version') != VERSION:
    raise ValueError(f'version {meta.get("version")!r}, this demix reads {VERSION}')
  if meta.get('step') != step:
    raise ValueError(f'says step {meta.get("step")!r}, expected {step}')
  leaves = meta.get('leaves')
  if not isinstance(leaves, dict) or any(
      not isinstance(leaf, dict) or leaf.keys() != {'dtype', 'shape', 'digest'}
      for leaf in leaves.values()):
    raise ValueError('"leaves" does not give dtype, shape and digest of each')
  return meta


def read_meta(directory, step: int) -> dict:
  """meta.json of a finished checkpoint.

  Raises:
    BadInput: there is no such checkpoint.
    NothingToLoad: its meta.json cannot be read.
  """
  root = _root(directory, step)
  try:
    return _meta(root, step)
  except (OSError, ValueError) as e:
    raise NothingToLoad(f'{root / META}: {getattr(e, "strerror", None) or one_line(e)}; '
                        'name another step') from None


def names(directory, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
  """{leaf name: (shape, dtype name)} of a checkpoint. Raises as `read_meta`."""
  return {name: (tuple(leaf['shape']), leaf['dtype'])
          for name, leaf in read_meta(directory, step)['leaves'].items()}
