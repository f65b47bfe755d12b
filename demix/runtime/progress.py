"""Progress of long work: a live bar with rate and ETA on a terminal, plain lines in a log."""

import io
import sys
import time


def duration(seconds: float) -> str:
  """'45s', '3m20s', '2h05m': a time that people read."""
  seconds = max(0, round(seconds))
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'


def quantity(x: float) -> str:
  """'950', '12.3k', '4.56M', '1.2G': a rate or a count that people read."""
  for factor, suffix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= factor:
      return f'{x / factor:.3g}{suffix}'
  return f'{x:.3g}'


class Progress:
  """Shows how far a piece of work is.

  Args:
    total: amount of work, in `unit` (0: unknown, no ETA).
    unit: what is counted: 'B', 'tokens', 'steps'.
    label: what is being done.
    done: where it starts (a resumed run); the rate counts from there.
    stream: where lines go; standard error by default, so that stdout stays for results.
    every: seconds between two plain lines when the stream is not a terminal.
    quiet: say nothing (a process of several that is not the first).
  """

  def __init__(self, total: float, unit: str, label: str, *, done: float = 0, stream=None,
               every: float = 10.0, quiet: bool = False):
    self.total, self.unit, self.label, self.every = total, unit, label, every
    self.stream = io.StringIO() if quiet else stream or sys.stderr
    self._start, self._first, self._done = time.monotonic(), done, done
    self._last, self._bar = self._start, None
    if self.stream.isatty():
      from rich.console import Console
      from rich.progress import BarColumn, TextColumn
      from rich.progress import Progress as Bar
      self._bar = Bar(TextColumn('{task.description}'), BarColumn(),
                      TextColumn('{task.fields[text]}'), transient=True,
                      console=Console(file=self.stream))
      self._task = self._bar.add_task(label, total=total or None, text='')
      self._bar.start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _text(self, now, note):
    elapsed = max(now - self._start, 1e-9)
    rate = (self._done - self._first) / elapsed
    text = f'{quantity(self._done)}{"/" + quantity(self.total) if self.total else ""} {self.unit}'
    text += f', {quantity(rate)} {self.unit}/s'
    if self.total and rate > 0 and self._done < self.total:
      text += f', {duration((self.total - self._done) / rate)} left'
    return f'{text}{", " + note if note else ""}'

  def update(self, done: float, note: str = ''):
    """Says that `done` (absolute, in `unit`) is finished; cheap enough for every item."""
    self._done = done
    now = time.monotonic()
    if self._bar:
      if now - self._last >= 0.1:
        self._last = now
        self._bar.update(self._task, completed=done, text=self._text(now, note))
    elif now - self._last >= self.every:
      self._last = now
      print(f'{self.label}: {self._text(now, note)}', file=self.stream, flush=True)

  def resize(self, total: float):
    """The amount of work is another one: less is to be read, say, or it came to an end early."""
    self.total = total
    if self._bar:
      self._bar.update(self._task, total=total or None)

  def close(self, note: str = ''):
    """Ends the display; prints one last plain line if `note` is given."""
    if self._bar:
      self._bar.stop()
      self._bar = None
    if note:
      print(f'{self.label}: {note}', file=self.stream, flush=True)
