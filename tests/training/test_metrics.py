"""demix/training/metrics.py: floats come back to the bit; a resumed run has every step once."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from demix.errors import BadInput, DemixError
from demix.training import metrics
from demix.training.metrics import Metrics

ROOT = Path(__file__).parents[2]


def write(workdir, steps, **more):
  with Metrics(workdir, tensorboard=False, **more) as m:
    for step in steps:
      m.write(step, {'train/loss': 1 / (step + 3)})


def test_floats_come_back_to_the_bit(tmp_path):
  random = np.random.default_rng(0)
  values = [x for x in np.frombuffer(random.bytes(8 * 500), np.float64) if not math.isnan(x)]
  values += [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan]
  with Metrics(tmp_path, tensorboard=False) as m:
    for i, x in enumerate(values):
      m.write(i, {'x': float(x)})
  back = [row['x'] for row in metrics.read(tmp_path)]
  assert [struct.pack('d', x) for x in back] == [struct.pack('d', x) for x in values]


def test_every_line_is_strict_json(tmp_path):
  def no_constant(text):
    raise AssertionError(f'{text} is not JSON')
  with Metrics(tmp_path, tensorboard=False) as m:
    m.write(1, {'a': math.nan, 'b': -math.inf, 'c': np.float32(0.1), 'd': jnp.bfloat16(2), 'e': 7})
  text = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(text, parse_constant=no_constant)
  assert row == {'step': 1, 'a': 'nan', 'b': '-inf', 'c': float(np.float32(0.1)), 'd': 2.0, 'e': 7}
  assert isinstance(row['e'], int) and list(row) == ['step', 'a', 'b', 'c', 'd', 'e']


def test_a_line_is_there_when_write_returns(tmp_path):
  code = ('import os, signal, sys; from demix.training.metrics import Metrics\n'
          'm = Metrics(sys.argv[1], tensorboard=False); m.write(3, {"a": 0.5})\n'
          'os.kill(os.getpid(), signal.SIGKILL)')
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env={'PYTHONPATH': str(ROOT)})
  assert done.returncode == -9
  assert metrics.read(tmp_path) == [{'step': 3, 'a': 0.5}]


def test_resuming_cuts_back_to_the_restored_step(tmp_path):
  write(tmp_path, range(10), step=-1)
  whole = (tmp_path / 'metrics.jsonl').read_bytes()
  with open(tmp_path / 'metrics.jsonl', 'ab') as f:
    f.write(b'{"step": 3, "train/lo')
  write(tmp_path, range(6, 10), step=5)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == whole
  assert sorted(os.listdir(tmp_path)) == ['metrics.jsonl']


def test_a_run_that_restored_nothing_starts_over(tmp_path):
  write(tmp_path, [0, 1])
  write(tmp_path, [0, 1], step=-1)
  assert [row['step'] for row in metrics.read(tmp_path)] == [0, 1]


def test_a_torn_last_line_goes_even_where_it_parses(tmp_path):
  write(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes().removesuffix(b'\n'))
  assert [row['step'] for row in metrics.read(tmp_path)] == [1]
  write(tmp_path, [3], step=2)
  assert [row['step'] for row in metrics.read(tmp_path)] == [1, 3]


def test_cutting_back_is_atomic(tmp_path, monkeypatch):
  write(tmp_path, range(5))
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  def full(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(DemixError, match='No space'):
    Metrics(tmp_path, step=2, tensorboard=False)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  Metrics(tmp_path, step=4, tensorboard=False).close()  # nothing to cut: nothing is rewritten


@pytest.mark.parametrize('tensorboard', [False, True])
def test_a_line_that_does_not_fit_leaves_nothing(tmp_path, tensorboard):
  code = '''
import resource, sys
from demix.errors import DemixError
from demix.training.metrics import Metrics
m = Metrics(sys.argv[1], tensorboard=sys.argv[2] == 'True')
m.write(1, {'a': 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (30, -1))
for value in (0.1 + 0.2, 0.1 + 0.7):
  try:
    m.write(2, {'a': value})
  except DemixError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
m.write(2, {'a': 0.25})
m.close()
'''
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path), str(tensorboard)], text=True,
                        capture_output=True, env={'PYTHONPATH': str(ROOT)}, timeout=300)
  assert (done.returncode, done.stderr, done.stdout.count('cannot be written')) == (0, '', 2)
  assert metrics.read(tmp_path) == [{'step': 1, 'a': 0.5}, {'step': 2, 'a': 0.25}]


def test_reading_names_a_damaged_line(tmp_path):
  assert metrics.read(tmp_path) == []
  write(tmp_path, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + b'{"step"\n' + lines[2])
  with pytest.raises(BadInput, match=r'metrics\.jsonl:2'):
    metrics.read(tmp_path)


@pytest.mark.parametrize('scalars', [{'step': 1}, {'a': 'x'}, {'a': np.zeros(2)}])
def test_what_is_no_scalar_is_refused_and_not_written(tmp_path, scalars):
  with Metrics(tmp_path, tensorboard=False) as m, pytest.raises(BadInput):
    m.write(1, {'b': 1.0} | scalars)
  assert metrics.read(tmp_path) == []


def board(workdir):
  """What TensorBoard would show: {(tag, step): value}, later files purging earlier ones."""
  from tensorboardX.proto import event_pb2
  shown = {}
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = struct.unpack_from('<Q', data, at)[0]
      event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
      at += size + 16
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = {k: v for k, v in shown.items() if k[1] < event.step}
      for value in event.summary.value:
        assert (value.tag, event.step) not in shown, 'a curve doubles'
        shown[value.tag, event.step] = value.simple_value
  return shown


def test_the_same_scalars_go_to_tensorboard_and_curves_do_not_double(tmp_path):
  for first, restored in ((0, -1), (3, 2)):
    with Metrics(tmp_path, step=restored) as m:
      for step in range(first, 5):
        m.write(step, {'train/loss': step / 4, 'eval/legal/nll': math.inf})
  shown = board(tmp_path)
  assert shown == {(name, row['step']): row[name] for row in metrics.read(tmp_path)
                   for name in row if name != 'step'}
  assert len(shown) == 10
