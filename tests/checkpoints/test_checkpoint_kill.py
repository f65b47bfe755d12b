"""checkpoint.py: kill -9 at any moment, a full disk, another mesh. All in child processes."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import runs
from cases import some
from checkpoint_cases import ROOT, latest, like, same_bits, save, state_of

from demix.checkpoints import checkpoint
from demix.checkpoints.checkpoint import Checkpoints

ENV = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu'}

# Imports JAX once; then every line it reads makes it fork a child that resumes and saves in a loop
# until it is killed: by the moment the line names, or a while after its first save, at random.
NURSERY = '''
import os, random, signal, sys, time, warnings
warnings.simplefilter('ignore')
import jax, orbax.checkpoint
from demix.checkpoints import checkpoint
from demix.runtime import digests
from checkpoint_cases import state_of

def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)

def run(directory, moment, tell):
  armed = []
  def at(module, name, before):
    real = getattr(module, name)
    def call(*args, **more):
      if before and armed:
        die()
      out = real(*args, **more)
      if armed:
        die()
      return out
    setattr(module, name, call)
  if moment == 'before meta': at(checkpoint, 'write_atomic', True)
  if moment == 'before seal': at(digests, 'seal', True)
  if moment == 'during seal': at(digests, 'of_file', True)
  if moment == 'after seal': at(digests, 'seal', False)
  if moment == 'after rename': at(checkpoint.Path, 'rename', False)
  if moment == 'while deleting': at(checkpoint.shutil, 'rmtree', True)
  if moment == 'amid deleting': at(os, 'unlink', False)
  if moment == 'while renaming': at(os, 'replace', True)
  saver = checkpoint.Checkpoints(directory, max_to_keep=2, clean=True)
  first = 1 + (checkpoint.latest(directory) or 0)
  for step in range(first, first + 50):
    saver.save(step, state_of(step), {})
    if not armed:
      saver.wait()
      armed.append(True)
      os.write(tell, b'!')

for line in sys.stdin:
  directory, moment, delay = line.rstrip().split('|')
  ready, tell = os.pipe()
  child = os.fork()
  if not child:
    run(directory, moment, tell)
    os._exit(0)  # the moment never came
  os.close(tell)
  assert os.read(ready, 1) == b'!', 'the child died by itself'
  if moment == 'random':
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  os.close(ready)
  print(os.waitstatus_to_exitcode(status), flush=True)
'''


@pytest.fixture(scope='module')
def nursery():
  with subprocess.Popen([sys.executable, '-c', NURSERY], env=ENV, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    def kill(directory, moment, delay=0.0):
      process.stdin.write(f'{directory}|{moment}|{delay}\n')
      process.stdin.flush()
      assert process.stdout.readline() == '-9\n'
    yield kill
    process.stdin.close()


def check(directory, before):
  """After a kill: the newest finished checkpoint is whole, and is no older than the one before."""
  finished = checkpoint.steps(directory)
  step, warnings = latest(directory)
  assert warnings == [] and step == finished[-1] > before
  assert all(checkpoint.verify(directory, s) == [] for s in finished)
  same_bits(checkpoint.restore(directory, step, like(state_of(step))), state_of(step))
  left = set(os.listdir(directory)) - {str(s) for s in finished}
  Checkpoints(directory, clean=True).close()
  assert set(os.listdir(directory)) == {str(s) for s in finished}
  return step, left


@pytest.mark.parametrize('kills', some([16, 40], [16]))
def test_kills_at_random_moments_lose_no_finished_checkpoint(tmp_path, nursery, kills):
  delays, step, interrupted = random.Random(0), 0, 0
  for _ in range(kills):
    nursery(tmp_path, 'random', delays.uniform(0, 0.3))
    step, left = check(tmp_path, step)
    interrupted += bool(left)
  assert interrupted >= kills // 4, 'the kills did not hit saves'


@pytest.mark.parametrize(('moment', 'leaves_something'), [
    ('before meta', True), ('before seal', True), ('during seal', True), ('while renaming', True),
    ('after seal', True),
    ('after rename', False), ('while deleting', True),
    ('amid deleting', True)])
def test_a_kill_at_each_critical_moment(tmp_path, nursery, moment, leaves_something):
  step = 0
  for _ in range(2):
    nursery(tmp_path, moment)
    step, left = check(tmp_path, step)
    assert bool(left) == leaves_something


FULL = '''
import resource, sys
import numpy as np
from checkpoint_cases import state_of
from demix.checkpoints.checkpoint import Checkpoints
from demix.errors import DemixError

states = [{'a': np.random.default_rng(0).standard_normal(100000).astype(np.float32)}, state_of(12)]
with Checkpoints(sys.argv[1], max_to_keep=1) as c:
  for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    for state in states:
      try:
        c.save(11, state, {})
        c.wait()
      except DemixError as e:
        print(e)
      else:
        raise SystemExit('it was saved')
  resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
  if len(sys.argv) > 4:
    c.save(12, state_of(12), {})
'''


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path):
  save(tmp_path, 9, 10)
  def everything():
    return {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob('*')}
  before = everything()
  # 500 bytes stop Orbax; 1500 let the small arrays pass and stop meta.json.
  def run(*limits):
    done = subprocess.run([sys.executable, '-c', FULL, str(tmp_path), *limits], text=True, env=ENV,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout.splitlines()
  lines = run('500', '1500')
  assert latest(tmp_path) == (10, [])
  Checkpoints(tmp_path, clean=True).close()
  assert everything() == before
  assert len(lines) == 4
  for line in lines:
    assert f'{tmp_path / "11"} was not saved (disk full' in line and 'untouched' in line
    assert len(line) < 300
  run('500', '1500', '400')
  assert latest(tmp_path) == (12, []) and checkpoint.steps(tmp_path) == [12]


MESH = '''
import sys
import jax, numpy as np
from checkpoint_cases import same_bits, save
from demix.checkpoints import checkpoint
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 2), ('expert', 'data'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = {'params/a': np.arange(64, dtype=np.float32).reshape(8, 8)}
put = lambda spec: {n: jax.device_put(v, NamedSharding(mesh, spec)) for n, v in x.items()}
save(sys.argv[1], 1, state=lambda _: x)
save(sys.argv[1], 2, state=lambda _: put(P('data', 'expert')))
want = NamedSharding(mesh, P(('expert', 'data')))
for step in (1, 2):
  back = checkpoint.restore(sys.argv[1], step, {'params/a': jax.ShapeDtypeStruct(
      (8, 8), np.float32, sharding=want)})
  same_bits(back, x)
  assert back['params/a'].sharding == want
a, b = (checkpoint.read_meta(sys.argv[1], s)['content_digest'] for s in (1, 2))
assert a == b
'''


def test_the_mesh_changes_neither_values_nor_digest(tmp_path):
  env = ENV | runs.devices(4)
  subprocess.run([sys.executable, '-c', MESH, str(tmp_path)], env=env, check=True)
  same = [checkpoint.restore(tmp_path, s, like({'params/a': np.zeros((8, 8), np.float32)}))
          for s in (1, 2)]  # on one device
  same_bits(*same)
