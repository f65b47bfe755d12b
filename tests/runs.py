"""`python -m demix` in tests: in this process, or in children that are quick to start.

A child is forked from one process that has imported everything and started nothing, so it costs a
second less than an interpreter of its own, and can be killed, signalled and waited for.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from demix.__main__ import main
from demix.checkpoints import checkpoint
from demix.training import metrics

ROOT = Path(__file__).parents[1]

# Two layers, four domains, 16 sequences of 32 tokens in two rows a domain: a step takes 2 ms.
TINY = {'model.layers': 2, 'model.d_model': 16, 'model.heads': 2, 'data.sequence_length': 32,
        'data.batch_size': 8, 'train.steps': 8, 'train.log_every': 1, 'train.checkpoint_every': 4,
        'train.tensorboard': False, 'optimizer.learning_rate': 0.01, 'optimizer.clip': 1.0,
        'optimizer.schedule_steps': 8}  # the same program however many steps it trains


PROGRESS = re.compile(r'(train|average|evaluate \S+( mixed)?): \S+ (steps|sequences|leaves), ')


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended."""
  code: int
  out: str
  err: str

  def error(self, code: int) -> str:
    """The one error line of a process that must have ended with `code`; only warnings before it."""
    assert self.code == code, self
    *others, last = self.said() or ['']
    assert last.startswith('error: ') and self.err.endswith('\n'), self.err
    assert all(line.startswith('warning: ') for line in others), self.err
    return last.removeprefix('error: ')

  def said(self) -> list[str]:
    """Lines of standard error but those of progress, which a slow machine prints."""
    return [line for line in self.err.splitlines() if not PROGRESS.match(line)]


def overrides(store, workdir, **changes) -> list[str]:
  """Flags of `train` for the tiny model; `changes` have __ for a dot: model__ffn='demix'."""
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  config = TINY | {'data.path': store} | changes
  if 'optimizer.schedule_steps' not in changes:
    config['optimizer.schedule_steps'] = max(config['optimizer.schedule_steps'],
                                             int(config['train.steps']))
  return [f'--workdir={workdir}', *(f'--config.{k}={v}' for k, v in config.items())]


def demix(*argv) -> Ended:
  """Runs a verb in this process."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main([str(a) for a in argv])
  return Ended(code, out.getvalue(), err.getvalue())


def train(store, workdir, **changes) -> Ended:
  """Trains in this process."""
  return demix('train', *overrides(store, workdir, **changes))


def fresh(*argv, env=None) -> Ended:
  """`python -m demix` in an interpreter of its own."""
  done = subprocess.run([sys.executable, '-m', 'demix', *map(str, argv)], cwd=ROOT, text=True,
                        env=os.environ | (env or {}), capture_output=True, timeout=900)
  return Ended(done.returncode, done.stdout, done.stderr)


def devices(count: int) -> dict:
  """Environment of a process with so many virtual devices, else compiled as this one compiles."""
  # Devices of a loaded machine wait for one another longer than the 40 s that XLA gives them; and
  # they need more threads than XLA makes (demix/runtime/processes.py: _make_room).
  more = (f'--xla_force_host_platform_device_count={count} '
          '--xla_cpu_collective_call_terminate_timeout_seconds=300')
  return {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {more}', 'JAX_PLATFORMS': 'cpu',
          'PJRT_NPROC': str(8 * count)}


NURSERY = '''
import json, os, runpy, sys, warnings
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  import demix.training.train, demix.eval.protocol, orbax.checkpoint, tensorboardX
for line in sys.stdin:
  ask = json.loads(line)
  if 'wait' in ask:
    print(os.waitstatus_to_exitcode(os.waitpid(ask['wait'], 0)[1]), flush=True)
    continue
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    child = os.fork()
  if child:
    print(child, flush=True)
    continue
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for fd in (1, 2):
    os.dup2(os.open(ask['files'][fd - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
  os.environ.update(ask['env'])
  sys.argv = ['demix', *ask['argv']]
  runpy.run_module('demix', run_name='__main__', alter_sys=True)
'''


class Child:
  """A process that the nursery has started."""

  def __init__(self, nursery, pid, files):
    self.nursery, self.pid, self.files, self._code = nursery, pid, files, None

  def send(self, number: int):
    """Sends it a signal, unless it was waited for."""
    if self._code is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, number)

  def wait(self) -> Ended:
    """Waits for its end."""
    if self._code is None:
      self._code = int(self.nursery.ask(wait=self.pid))
    return Ended(self._code, *(Path(f).read_text() for f in self.files))


class Nursery:
  """Starts `python -m demix` children; `folder` takes what they print."""

  def __init__(self, folder: Path):
    self.folder, self.children = folder, []
    self.process = subprocess.Popen([sys.executable, '-c', NURSERY], cwd=ROOT, text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(self, **what) -> str:
    self.process.stdin.write(json.dumps(what) + '\n')
    self.process.stdin.flush()
    return self.process.stdout.readline()

  def start(self, *argv, **env) -> Child:
    files = [str(self.folder / f'{len(self.children)}.{kind}') for kind in ('out', 'err')]
    pid = int(self.ask(argv=[str(a) for a in argv], files=files, env=env))
    self.children.append(Child(self, pid, files))
    return self.children[-1]

  def run(self, *argv, **env) -> Ended:
    return self.start(*argv, **env).wait()

  def close(self):
    for child in self.children:
      child.send(signal.SIGKILL)
    self.process.stdin.close()
    self.process.wait()


def until(condition, seconds: float = 60):
  """Waits until `condition()` is true; fails after `seconds`."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it did not happen in time'
    time.sleep(0.002)


def rows(workdir) -> list[dict]:
  """metrics.jsonl without what depends on the clock, floats as hexadecimal digits."""
  return [{k: v.hex() if isinstance(v, float) else v for k, v in row.items()
           if not k.startswith('throughput/')} for row in metrics.read(workdir)]


def digests(workdir) -> dict:
  """{step: content digest of parameters and optimizer} of the finished checkpoints."""
  directory = Path(workdir) / 'checkpoints'
  return {step: checkpoint.read_meta(directory, step)['state_digest']
          for step in checkpoint.steps(directory)}


def files(folder) -> dict:
  """{path: (bytes, time of change)} of every file below a folder, the lock left out."""
  return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
          for p in sorted(Path(folder).rglob('*')) if p.is_file() and p.name != '.lock'}
