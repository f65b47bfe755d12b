"""Checkpoints: state and what made it, saved in the background and trusted only when verified.

W/checkpoints/<step>/
  state/         the arrays, written by Orbax (its v0 API; this file is the only one that calls it)
  meta.json      what the caller gives (config, fingerprints, ledger …) and, added here: "version",
                 "step", "leaves": {name: {"dtype", "shape", "digest"}}, "content_digest" (of the
                 leaves under params/) and "state_digest" (of all leaves)
  digests.json   {"version", "files": {path: {"size", "xxh3_128"}}, "self"}; written last: without
                 it the checkpoint does not exist
Beside them, and no checkpoints: `<step>.saving-…`, being written or left by a kill; `<step>.bad`,
damaged and made way for the same step.

State is a flat dict of canonical names (`params/embed/tokens`, `optimizer/count` …) to arrays.
Content digests depend on name, dtype, shape and bytes of the leaves only; two runs are the same by
content digest, since the files differ from save to save. File digests find damage, not forgery.

With several processes all call `save` and `restore` at the same points. Each writes its own shards
to the one file system they share; process 0 does the rest.

The readers (`steps`, `verify`, `latest`, `require`, `read_meta`, `names`) are in catalogue.py
and need no JAX. `directory` is always W/checkpoints.
"""

import contextlib
import itertools
import json
import logging
import operator
import os
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np

from demix.checkpoints import leaves
from demix.checkpoints.catalogue import (
  META,
  STEP,
  VERSION,
  latest,
  names,
  one_line,
  problems_of,
  read_meta,
  require,
  steps,
  summary,
  verify,
)
from demix.errors import BadInput, DemixError, NothingToLoad, Refused
from demix.runtime import digests, processes
from demix.runtime.workdir import fsync_directory, write_atomic

__all__ = ['Checkpoints', 'latest', 'names', 'read_meta', 'require', 'restore', 'steps', 'verify']

STATE = 'state'
_ADDED = ('version', 'leaves', 'content_digest', 'state_digest')
# Orbax gives up on a commit after 20 minutes by default; a big state on a slow disk may need more.
_TIMEOUT = 4 * 3600
_CHUNK = 1 << 26  # bytes of a leaf that are compressed at once
_WORK = '.saving-'  # <step>.saving-<process>-<attempt>: a checkpoint that is being written
_attempts = itertools.count()


def _quiet(record) -> bool:
  ours = 'orbax' in record.pathname or 'orbax' in record.getMessage()
  return not ours or 'DEMIX_TRACEBACK' in os.environ


def _import_orbax():
  """orbax.checkpoint, kept from printing what it also raises: hundreds of lines for a full disk."""
  import orbax.checkpoint as ocp
  # What a failed write leaves behind is said when the interpreter ends, by no one in particular.
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  log = logging.getLogger('absl')
  if _quiet not in log.filters:
    log.addFilter(_quiet)
    logging.getLogger('asyncio').addFilter(_quiet)
    others = sys.unraisablehook
    def hook(what):
      # TensorStore's other writes report to the event loop that ended with the first that failed.
      if 'DEMIX_TRACEBACK' in os.environ or str(what.exc_value) != 'Event loop is closed':
        others(what)
    sys.unraisablehook = hook
  leaves.register(ocp)
  return ocp


def _nested(leaves: dict) -> dict:
  """{'a/b': x} as {'a': {'b': x}}, which is what Orbax takes; refuses names it would confuse."""
  tree, dotted = {}, {}
  for name, leaf in leaves.items():
    parts = name.split('/')
    if not name.isprintable() or any(p in ('', '.', '..') for p in parts):
      raise BadInput(f'leaf {name!r}: not a name; expected parts joined by single slashes, '
                     'none of them "." or ".."')
    # Orbax joins the parts with dots, so that a/b.c and a.b/c would be one array.
    other = dotted.setdefault('.'.join(parts), name)
    if other != name:
      raise BadInput(f'leaves {other!r} and {name!r}: cannot be told apart; rename one')
    *parents, last = parts
    at = tree
    for i, part in enumerate(parents):
      if '/'.join(parts[:i + 1]) in leaves:
        raise BadInput(f'leaf {"/".join(parts[:i + 1])!r}: also a folder, of {name!r}; rename one')
      at = at.setdefault(part, {})
    at[last] = leaf
  return tree


def restore(directory, step: int, like: dict, *, check: bool = True, host: bool = False) -> dict:
  """Restores the leaves asked for, and only those. Does not verify files: see `latest`, `require`.

  Args:
    directory: W/checkpoints.
    step: of a finished checkpoint.
    like: {name: jax.ShapeDtypeStruct}; its sharding says where the leaf goes (None: the first
      device of this process), whatever mesh it was saved from.
    check: compare the content digest of every restored leaf with meta.json.
    host: as NumPy arrays, on no device.

  Returns:
    {name: jax.Array, or np.ndarray} with the names of `like`.

  Raises:
    BadInput: no such checkpoint; or leaves that it lacks or has in another shape or dtype (all
      are named).
    NothingToLoad: the arrays cannot be read, or are not those that were saved.
  """
  saved = read_meta(directory, step)['leaves']
  root = Path(directory) / str(step)
  different = []
  for name, leaf in like.items():
    want = f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
    has = f'{saved[name]["dtype"]}{saved[name]["shape"]}' if name in saved else 'missing'
    if has != want:
      different.append(f'{name}: {has}, expected {want}')
  if different:
    raise BadInput(f'checkpoint {root} does not fit the model: {"; ".join(different)}; '
                   'use the config that made it')
  if not like:
    return {}
  import jax
  ocp = _import_orbax()
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  item = _nested({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                             sharding=getattr(leaf, 'sharding', None) or first)
                  for name, leaf in like.items()})
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      tree = orbax.restore((root / STATE).absolute(), args=ocp.args.PyTreeRestore(
          item=item, restore_args=jax.tree.map(
              lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item) if host else
          ocp.checkpoint_utils.construct_restore_args(item),
          partial_restore=True))
  except Exception as e:  # Orbax and TensorStore raise many kinds, ValueError to XlaRuntimeError
    raise NothingToLoad(f'checkpoint {root}: the arrays cannot be read ({one_line(e)}); '
                        'name another step') from e
  out = {}
  for name in like:
    leaf = tree
    for part in name.split('/'):
      leaf = leaf[part]
    out[name] = leaf
  if check:
    # In all processes, so that what fails in one fails in all.
    bad = [name for name, leaf in out.items()
           if digests.of_leaf(name, processes.whole(leaf)) != saved[name]['digest']]
    if bad:
      raise NothingToLoad(f'checkpoint {root}: not the arrays that were saved, by content digest: '
                          f'{", ".join(bad)}; name another step')
  return out


def _leaf(name, leaf):
  import jax
  if isinstance(leaf, np.ndarray):
    leaf = leaf.copy()  # the caller may go on writing into it
  elif isinstance(leaf, leaves.Later):
    pass
  elif not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
    raise BadInput(f'leaf {name!r}: expected an array, got {type(leaf).__name__} '
                   f'{getattr(leaf, "dtype", "")}; save typed keys as jax.random.key_data')
  number = any(jax.dtypes.issubdtype(leaf.dtype, kind) for kind in (np.number, np.bool_))
  if not leaf.size or not number or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
    raise BadInput(f'leaf {name!r}: {leaf.dtype}{list(leaf.shape)} cannot be saved; '
                   'expected numbers of a type that JAX has enabled, at least one')
  return leaf


def _digest(name, leaf, wanted: bool = True) -> str:
  """Content digest of a leaf whose parts may be in several processes, all of which call this."""
  leaf = processes.whole(leaf)
  return digests.of_leaf(name, leaf) if wanted else ''


def _checked(meta: dict, step: int) -> dict:
  if taken := [k for k in _ADDED if k in meta] or meta.get('step', step) != step:
    raise BadInput(f'checkpoint {step}: meta sets {taken if taken is not True else meta["step"]}, '
                   'which is added on saving; leave it out')
  try:
    return json.loads(digests.canonical(meta)) | {'step': step}
  except (TypeError, ValueError) as e:
    raise BadInput(f'checkpoint {step}: meta is not JSON ({e})') from None


class Checkpoints:
  """Writes the checkpoints of one run; whoever makes one holds the lock of the workdir.

  Use it in a `with` block, or call `close`: Orbax cannot commit once the interpreter is ending, so
  a save that is then still under way is lost.

  Args:
    directory: W/checkpoints.
    max_to_keep: how many of the newest trusted checkpoints stay (0: all).
    keep_every: steps that are multiples of it stay as well (0: none).
    clean: remove what a killed save left (unfinished steps, temporary files).
  """

  def __init__(self, directory, *, max_to_keep: int = 2, keep_every: int = 0, clean: bool = False):
    self.directory = Path(directory).absolute()  # Orbax wants it absolute
    self.max_to_keep, self.keep_every = max_to_keep, keep_every
    self._trusted: set[int] = set()
    self._orbax = self._thread = self._error = None
    if clean:
      processes.decided(self._clean)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    # While another error is on its way out, that one matters more than a failed save.
    if not kind:
      self.close()
    elif processes.count() == 1 or getattr(error, 'everywhere', False):
      with contextlib.suppress(DemixError):
        self.close()
    # Else the others are not here to finish it with, and learn of the error by our end.

  def save(self, step: int, state: dict, meta: dict):
    """Starts saving; waits only for the save before and for Orbax to take the arrays.

    Nothing is done if the checkpoint is there, good, and of the same state. A bad one in its
    place is renamed `<step>.bad` (an older one of that name goes).

    Args:
      step: >= 0.
      state: {name: jax.Array, np.ndarray or leaves.Later}; must stay valid (not donated) until the
        save ends.
      meta: what JSON can hold; copied. See the module for the keys that are added.

    Raises:
      BadInput: a step, name, leaf or meta that cannot be saved; nothing was written.
      Refused: a good checkpoint of this step holds another state.
      DemixError: this save could not start, or the one before failed (disk full …).
    """
    step = operator.index(step)
    if step < 0:
      raise BadInput(f'checkpoint step {step}: expected 0 or more')
    state = {name: _leaf(name, leaf) for name, leaf in state.items()}
    tree, meta = _nested(state), _checked(meta, step)
    self.wait()
    # Under a name of its own until it is finished: when a write fails, others go on for a while,
    # and must not end up in the next attempt.
    pid, attempt = processes.decided(os.getpid), next(_attempts)
    work = self.directory / f'{step}{_WORK}{pid}-{attempt}'
    try:
      if processes.decided(lambda: self._finished(self.directory / str(step), step)):
        self._check_same(step, state)
        return
      import jax
      ocp = _import_orbax()
      processes.decided(lambda: work.mkdir(parents=True))
      # What no process has all of is read leaf by leaf, here: the thread below must not send
      # anything between devices beside the steps.
      known = None
      if processes.count() > 1:
        known = {name: _digest(name, leaf, processes.first()) for name, leaf in state.items()}
      if self._orbax is None:
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(), async_options=ocp.options.AsyncOptions(
                timeout_secs=_TIMEOUT,
                # Else, if they cannot be made, Orbax waits 5 minutes for them.
                create_directories_asynchronously=False))
      chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree,
                            is_leaf=lambda x: not isinstance(x, dict))
      self._orbax.save(work / STATE, args=ocp.args.PyTreeSave(tree, save_args=chunks))
    except Refused:
      raise
    except Exception as e:
      raise self._failed(work, step, e) from e
    self._thread = threading.Thread(target=self._finish, args=(work, step, state, known, meta),
                                    name=f'checkpoint {step}')
    self._thread.start()

  def wait(self):
    """Waits until the save under way is finished.

    Raises:
      DemixError: it failed; older checkpoints are untouched. Raised once.
    """
    if self._thread:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error:
      raise error

  def close(self):
    """Waits as `wait` does, and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      if self._orbax:
        self._orbax.close()
        self._orbax = None

  def _finished(self, root, step) -> bool:
    """Whether `root` is a good checkpoint; anything else is put out of the way."""
    if not os.path.lexists(root):
      return False
    if root.is_dir() and not root.is_symlink() and step not in steps(self.directory):
      shutil.rmtree(root)  # never finished, so it does not exist
      return False
    if verify(self.directory, step):
      bad = root.with_name(f'{step}.bad')
      if bad.is_dir() and not bad.is_symlink():
        shutil.rmtree(bad)
      root.rename(bad)
      self._trusted.discard(step)
      return False
    return True

  def _check_same(self, step, state):
    """Refuses a good checkpoint of this step that holds another state."""
    seen = digests.of_tree({name: _digest(name, leaf) for name, leaf in state.items()})
    if seen != read_meta(self.directory, step)['state_digest']:
      raise Refused(f'checkpoint {self.directory / str(step)} is good and holds another state; '
                    'delete it or use another workdir')

  def _finish(self, work, step, state, known, meta):
    """In the background: from Orbax's commit to a checkpoint that exists. `known`: content digests
    where there are several processes."""
    try:
      about, later = {}, []
      while state:  # one by one, so that their memory is free as early as the caller allows
        name, leaf = state.popitem()
        about[name] = {'dtype': np.dtype(leaf.dtype).name, 'shape': list(leaf.shape)}
        if isinstance(leaf, leaves.Later):
          later.append(leaf)
        else:
          about[name]['digest'] = known[name] if known else digests.of_leaf(name, leaf)
        del leaf
      self._orbax.wait_until_finished()  # of all processes
      if known and not processes.first():
        return
      for leaf in later:
        about[leaf.name]['digest'] = leaf.digest
      of = {name: leaf['digest'] for name, leaf in about.items()}
      meta |= {'version': VERSION, 'leaves': about, 'state_digest': digests.of_tree(of),
               'content_digest': digests.of_tree(of, 'params/')}
      # Orbax writes the absolute path in here; nothing reads it.
      (work / STATE / 'commit_success.txt').write_text('committed\n')
      write_atomic(work / META, digests.canonical(meta))
      digests.seal(work)
      if problems := problems_of(work, step):
        raise OSError(f'bad right after it was written: {summary(problems)}')
      work.rename(self.directory / str(step))
      fsync_directory(self.directory)
      self._trusted.add(step)
      self._prune(step)
    except BaseException as e:
      failed = self._failed(work, step, e)
      self._error = e if isinstance(e, DemixError) else failed

  def _failed(self, work, step, e) -> DemixError:
    """The error of a save that ended early; what it left is removed, as far as that goes now."""
    if self._orbax:
      with contextlib.suppress(Exception):
        self._orbax.close()  # it may hold the failed save
      self._orbax = None
    for _ in range(20):  # Orbax's other writes may go on for a moment; the next run cleans again
      shutil.rmtree(work, ignore_errors=True)
      if not work.exists():
        break
      time.sleep(0.05)
    full = re.search('no space left|file too large|quota exceeded', str(e), re.IGNORECASE)
    why = f'disk full: {full[0]}' if full else one_line(e)
    remedy = 'free space and run' if full else 'run'
    return DemixError(f'checkpoint {self.directory / str(step)} was not saved ({why}); older ones '
                      f'are untouched; {remedy} the same command again')

  def _prune(self, newest):
    """Deletes what `max_to_keep` and `keep_every` no longer want.

    Only trusted checkpoints count as kept, so a bad one never costs a good one its place; bad
    ones among those kept stay where they are.
    """
    if not self.max_to_keep:
      return
    kept = 0
    for step in reversed(steps(self.directory)):
      if kept < self.max_to_keep:
        if step not in self._trusted and not verify(self.directory, step):
          self._trusted.add(step)
        kept += step in self._trusted
      elif step != newest and not (self.keep_every and step % self.keep_every == 0):
        root = self.directory / str(step)
        try:
          (root / digests.FILE).unlink()  # from here on it does not exist, whatever happens
        except OSError as e:
          raise DemixError(f'old checkpoint {root} cannot be deleted ({e.strerror}); step {newest} '
                           'is saved; make the directory writable') from None
        shutil.rmtree(root, ignore_errors=True)
        self._trusted.discard(step)

  def _clean(self):
    with contextlib.suppress(FileNotFoundError):
      for entry in os.scandir(self.directory):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
          unfinished = STEP.fullmatch(entry.name) and not os.path.lexists(path / digests.FILE)
          if unfinished or _WORK in entry.name:
            shutil.rmtree(path)
