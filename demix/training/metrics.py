"""W/metrics.jsonl: one JSON object per logged step, and the same curves for TensorBoard.

A line is `{"step": 20, "train/loss": 3.25, …}`. Floats are written so that reading gives back the
same bits. JSON has no NaN and no infinities: they are the strings "nan", "inf" and "-inf", which
`read` turns back into floats. null stands where nothing was measured. Names are
`train/loss`, `eval/<domain>/nll`, `throughput/tokens_per_second` …
"""

import contextlib
import errno
import json
import math
import os
import time
from pathlib import Path

from demix.errors import BadInput, DemixError
from demix.runtime.workdir import write_atomic

FILE = 'metrics.jsonl'
_NON_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}


def _parse(line: bytes):
  """The object of one line, or None for one that is torn or is no metrics line."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get('step'), int) else None


def _cut_back(path: Path, step: int):
  """Leaves only whole lines up to `step`; atomically, and only if there is something to cut."""
  data = path.read_bytes()
  # Without its newline a line may be torn even where it parses ("step": 12 of 120).
  lines = data.split(b'\n')[:-1]
  kept = [line for line in lines if (row := _parse(line)) is not None and row['step'] <= step]
  new = b''.join(line + b'\n' for line in kept)
  if new != data:
    write_atomic(path, new)


class _Board:
  """One TensorBoard event file. tensorboardX's SummaryWriter is not used: its thread dies of a full
  disk, and then the next scalar waits for it forever."""

  def __init__(self, folder: Path, purge_step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    self._event, self._summary, self._flushed = Event, Summary, time.monotonic()
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names, which begin with the second. The suffix
    # keeps two of the same second apart: the second would overwrite the first.
    self._writer = EventsWriter(str(folder / 'events'), f'.{purge_step:09}.{os.getpid()}')
    # What earlier files hold from this step on is no longer shown.
    self._writer.write_event(Event(step=purge_step, wall_time=time.time(),
                                   session_log=SessionLog(status=SessionLog.START)))
    self._writer.flush()

  def write(self, row):
    values = [self._summary.Value(tag=k, simple_value=v) for k, v in row.items()
              if k != 'step' and v is not None]
    self._writer.write_event(self._event(step=row['step'], wall_time=time.time(),
                                         summary=self._summary(value=values)))
    if time.monotonic() - self._flushed > 10:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self):
    with contextlib.suppress(OSError):
      self._writer.close()


class Metrics:
  """Appends scalars to W/metrics.jsonl and to TensorBoard event files in W/tensorboard.

  Opening cuts the file back to what the restored checkpoint knows of, so that no step is there
  twice. For that to be exact, write a step's metrics before its checkpoint is saved.

  Args:
    workdir: W; must exist.
    step: the restored step: lines up to and including it stay. A run that restored nothing
      passes -1, so that a line of an earlier attempt at step 0 goes too.
    tensorboard: also write event files (no TensorFlow needed).
    quiet: write nothing (a process of several that is not the first).

  Raises:
    DemixError: the file cannot be read or written.
  """

  def __init__(self, workdir, *, step: int = 0, tensorboard: bool = True, quiet: bool = False):
    self.path = Path(os.devnull) if quiet else Path(workdir) / FILE
    self._board = None
    try:
      if self.path.exists():
        _cut_back(self.path, step)
      # Unbuffered: a line is with the kernel when write() returns, and survives a kill.
      self._file = open(self.path, 'ab', buffering=0)
      if tensorboard and not quiet:
        self._board = _Board(Path(workdir) / 'tensorboard', step + 1)
    except OSError as e:
      raise self._failed(e) from None

  def _failed(self, e):
    return DemixError(f'{self.path}: cannot be written ({e.strerror}); '
                      'free space or name another workdir')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def write(self, step: int, scalars: dict):
    """Appends one line.

    Args:
      step: of the optimizer.
      scalars: {name: number}; Python numbers or scalar arrays (those wait for the device), None
        where there is none: null, and no point of a curve.
    Raises:
      BadInput: a name is "step", or a value is no number.
      DemixError: the line could not be written; no part of it stays in the file.
    """
    row = {'step': int(step)}
    for name, value in scalars.items():
      if name == 'step':
        raise BadInput('metrics: "step" is the name of the step itself; name the scalar otherwise')
      try:
        row[name] = value if value is None or type(value) is int else float(value)
      except (TypeError, ValueError):
        raise BadInput(f'metrics: {name} is no number but {value!r}') from None
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
             for k, v in row.items()}
    line = json.dumps(plain, allow_nan=False).encode() + b'\n'
    before = os.fstat(self._file.fileno()).st_size
    try:
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
      os.ftruncate(self._file.fileno(), before)
      raise self._failed(e) from None
    if self._board:
      try:
        self._board.write(row)
      except OSError as e:
        raise self._failed(e) from None

  def close(self):
    """Closes the files; what TensorBoard was still to get is lost if the disk is full."""
    self._file.close()
    if self._board:
      self._board.close()
      self._board = None


def read(workdir) -> list[dict]:
  """The lines of W/metrics.jsonl in order, non-finite values as floats; [] if there is no file.

  A last line without its newline is being written, or is torn, and is left out.

  Raises:
    BadInput: another line is damaged.
  """
  path = Path(workdir) / FILE
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
    row = _parse(line)
    if row is None:
      raise BadInput(f'{path}:{number}: not a metrics line; delete that line')
    rows.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
  return rows
