"""Two processes of one run on this machine: they compute what one does, and end together."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from xla_flags import FAST

from demix.checkpoints import checkpoint
from demix.runtime import processes
from demix.training import metrics

ROOT = Path(__file__).parents[2]
CHANGES = dict(model__ffn='demix', model__layers=1, train__steps=6, train__checkpoint_every=3,
               optimizer__schedule_steps=6, train__eval_sequences=4)


class Pair:
  """`python -m demix train` in two processes, `devices` virtual ones in each; or in one."""

  def __init__(self, folder, store, workdir, count=2, devices=1, patience=100, **changes):
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      port = s.getsockname()[1]
    if count > 1:
      changes |= dict(mesh__processes=count, mesh__coordinator=f'127.0.0.1:{port}',
                      mesh__patience=patience)
    # Compiled for one run of a few steps; a cache of their own would be read by one of them only.
    flags = f'{runs.devices(devices)["XLA_FLAGS"]} {FAST}'
    env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    self.files = [Path(folder) / f'{workdir.name}.{i}.err' for i in range(count)]
    self.processes = []
    for i, file in enumerate(self.files):
      argv = runs.overrides(store, workdir, **CHANGES | changes | (
          {'mesh__process': i} if count > 1 else {}))
      with open(file, 'w') as err:
        self.processes.append(subprocess.Popen(
            [sys.executable, '-m', 'demix', 'train', *argv], cwd=ROOT, env=env, stderr=err,
            stdout=subprocess.PIPE, text=True))

  def wait(self, seconds=600) -> list[int]:
    """Exit codes; negative: of a signal."""
    self.out = [p.communicate(timeout=seconds)[0] for p in self.processes]
    return [p.returncode for p in self.processes]

  def errors(self) -> list[str]:
    """The error line of each process, '' where there is none."""
    lines = [re.findall(r'^error: (.*)', f.read_text(), re.MULTILINE) for f in self.files]
    return [found[-1] if found else '' for found in lines]

  def close(self):
    for p in self.processes:
      with contextlib.suppress(ProcessLookupError):
        p.kill()
      p.communicate()


@pytest.fixture
def pair(stores, tmp_path):
  """Starts processes of a run in the test's folder; those that are left at its end are killed."""
  started = []
  def start(workdir, count=2, devices=1, **more):
    started.append(Pair(tmp_path, stores.bytes, workdir, count, devices, **more))
    return started[-1]
  yield start
  for one in started:
    one.close()


def losses(workdir) -> list[float]:
  return [row['train/loss'] for row in metrics.read(workdir)]


def same(a, b):
  """Two runs went through the same losses, with what a sum in another order changes."""
  assert [r['step'] for r in metrics.read(a)] == [r['step'] for r in metrics.read(b)]
  np.testing.assert_allclose(losses(a), losses(b), rtol=2e-5)


def test_two_processes_are_one_run_and_one_process_goes_on_from_them(pair, tmp_path):
  two, one = tmp_path / 'two', tmp_path / 'one'
  both = pair(two, mesh__expert=2)
  assert both.wait() == [0, 0], both.errors()
  # Process 0 speaks; Gloo says in C++ that it has connected.
  assert both.out[0].count('done        step 6') == 1
  assert [line for line in both.out[1].splitlines() if 'Gloo' not in line] == []
  assert [row['step'] for row in metrics.read(two)] == [1, 2, 3, 4, 5, 6]
  # One process with the devices of both: the same losses.
  shutil.copytree(two, one)
  for step in (3, 6):
    assert checkpoint.verify(two / 'checkpoints', step) == []
  shutil.rmtree(one / 'checkpoints/6')
  alone = pair(one, 1, 2, mesh__expert=2)  # restores step 3 and checks every content digest
  assert alone.wait() == [0], alone.errors()
  same(one, two)
  ends = [checkpoint.read_meta(w / 'checkpoints', 6)['ledger']['tokens'] for w in (one, two)]
  assert ends[0] == ends[1]


@pytest.mark.long
def test_a_checkpoint_of_one_process_goes_on_in_two_with_more_devices(pair, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert pair(one, 1).wait() == [0]
  shutil.copytree(one, two)
  shutil.rmtree(two / 'checkpoints/6')
  both = pair(two, 2, 2, mesh__expert=2, mesh__fsdp=2)
  assert both.wait() == [0, 0], both.errors()
  same(two, one)


@pytest.mark.long
def test_killed_and_started_again_two_processes_end_as_if_nothing_had_happened(pair, tmp_path):
  calm, storm = tmp_path / 'calm', tmp_path / 'storm'
  changes = dict(mesh__expert=2, train__steps=60, optimizer__schedule_steps=60,
                 train__checkpoint_every=10, train__eval_sequences=1)
  assert pair(calm, **changes).wait() == [0, 0]
  for victim in (1, 0):
    both = pair(storm, patience=10, **changes)
    step = 20 + 20 * (victim == 0)
    runs.until(lambda step=step: any(r['step'] >= step for r in metrics.read(storm)), 300)
    both.processes[victim].send_signal(signal.SIGKILL)
    codes = both.wait(120)  # the other one ends by itself
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
  both = pair(storm, **changes)
  assert both.wait() == [0, 0], both.errors()
  assert runs.rows(storm) == runs.rows(calm)  # to the bit
  assert runs.digests(storm)[60] == runs.digests(calm)[60]


@pytest.mark.long
@pytest.mark.parametrize('asked', [0, 1])
def test_a_signal_to_one_process_ends_both_at_one_step(pair, tmp_path, asked):
  work = tmp_path / 'work'
  both = pair(work, mesh__expert=2, train__steps=2000, train__checkpoint_every=0,
              optimizer__schedule_steps=2000)
  runs.until(lambda: (work / 'metrics.jsonl').exists() and len(metrics.read(work)) > 3, 300)
  both.processes[asked].send_signal(signal.SIGTERM)
  assert both.wait() == [75, 75]
  (step,) = checkpoint.steps(work / 'checkpoints')
  assert both.errors() == [f'SIGTERM: saved step {step} of 2000 in {work}; run the same command '
                           'again to go on'] * 2
  assert metrics.read(work)[-1]['step'] == step


@pytest.mark.long
def test_what_fails_in_one_process_ends_both(pair, stores, tmp_path):
  held = tmp_path / 'held'
  from demix.runtime import workdir
  with workdir.hold(held, 'a test'):
    both = pair(held)
    assert both.wait(120) == [6, 6]
  assert 'is held by pid' in both.errors()[0]
  assert both.errors()[1].startswith('process 0 of 2 ended, with exit code 6')
  both = pair(tmp_path / 'nan', mesh__expert=2, optimizer__learning_rate=1e30,
              optimizer__clip=0)
  assert both.wait(120) == [5, 5]
  assert 'worst domain' in both.errors()[1]
  copy = shutil.copytree(stores.bytes, tmp_path / 'store')
  file = copy / 'verse/valid/tokens.bin'
  file.write_bytes(file.read_bytes()[::-1])  # of the same size; process 0 reads it again
  both = pair(tmp_path / 'changed', mesh__expert=2, data__path=copy)
  assert both.wait(120) == [2, 2]
  assert f'{file}: digest' in both.errors()[0]
  assert both.errors()[1].startswith('process 0 of 2 ended, with exit code 2')
  assert checkpoint.steps(tmp_path / 'changed/checkpoints') == []


def test_a_process_without_its_number_is_refused(stores, tmp_path):
  ended = runs.demix('train', *runs.overrides(stores.bytes, tmp_path / 'w', mesh__processes=2))
  assert 'mesh.process=0, mesh.coordinator=' in ended.error(2)
  ended = runs.demix('train', *runs.overrides(stores.bytes, tmp_path / 'w', mesh__processes=-1))
  assert 'mesh.processes=-1 is out of range: give an integer, at least 0' in ended.error(2)
  (tmp_path / 'c.py').write_text(
      'from demix.config import *\nimport dataclasses as d\ndef get_config():\n'
      '  return config_dict(d.replace(Config(), mesh=MeshConfig(processes=2)))\n')
  ended = runs.demix('train', f'--config={tmp_path / "c.py"}',
                     *runs.overrides(stores.bytes, tmp_path / 'w'))
  assert 'give it as a flag, --config.mesh.processes=2' in ended.error(2)
  assert not (tmp_path / 'w/config.json').exists()


def test_several_devices_on_cpu_have_threads_to_wait_in(monkeypatch):
  """XLA reads it when it starts them; eight devices with eight threads waited for ever."""
  monkeypatch.delenv('PJRT_NPROC', raising=False)
  for count, flags, enough in ((1, '', None), (2, '', 8), (1, runs.devices(8)['XLA_FLAGS'], 64)):
    monkeypatch.setenv('XLA_FLAGS', flags)
    processes._make_room(count)
    has = os.environ.get('PJRT_NPROC')
    assert has is None if enough is None else int(has) >= enough
    monkeypatch.delenv('PJRT_NPROC', raising=False)
  monkeypatch.setenv('PJRT_NPROC', '5')
  processes._make_room(2)
  assert os.environ['PJRT_NPROC'] == '5'
