"""workdir.py: one holder at a time, whatever kills it; identity; files written whole."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from demix.errors import BadInput, Locked
from demix.runtime import workdir

ROOT = Path(__file__).parents[2]
HOLD = '''
import os, sys, time
from demix.errors import DemixError
from demix.runtime.workdir import hold
try:
  with hold(sys.argv[1], 'train'):
    if sys.argv[2] != 'worker' or os.fork() == 0:  # the worker says it, so that it is there
      print('held', flush=True)
    time.sleep(0 if sys.argv[2] == 'once' else 60)
except DemixError as e:
  print(f'error: {e}', file=sys.stderr)
  sys.exit(e.code)
'''


def child(path, how='once'):
  return subprocess.Popen(
      [sys.executable, '-c', HOLD, str(path), how], text=True, env={'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def holder(tmp_path, request):
  process = child(tmp_path / 'w', getattr(request, 'param', 'long'))
  assert process.stdout.readline() == 'held\n'
  yield process
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.communicate()


def test_a_path_that_checkpoints_could_not_name_is_refused(tmp_path):
  for path in (tmp_path / 'caf\udce9', tmp_path / 'caf\udce9/W'):
    with pytest.raises(BadInput, match='the path is not UTF-8'), workdir.hold(path):
      pass
  assert not list(tmp_path.iterdir())
  with workdir.hold(tmp_path / 'café'):
    pass


def test_a_second_process_is_refused_at_once_and_told_by_whom(tmp_path, holder):
  start = time.monotonic()
  second = child(tmp_path / 'w')
  out, err = second.communicate(timeout=60)
  assert time.monotonic() - start < 2
  assert (second.returncode, out) == (6, '')
  about = json.loads((tmp_path / 'w' / '.lock').read_text())
  assert about['pid'] == holder.pid and about['verb'] == 'train'
  assert f'pid {holder.pid} on {about["host"]} since {about["since"]}' in err
  assert err.count('\n') == 1


@pytest.mark.parametrize('holder', ['long', 'worker'], indirect=True)
def test_the_lock_dies_with_its_holder_and_not_with_its_workers(tmp_path, holder):
  os.kill(holder.pid, signal.SIGKILL)
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a worker's open pipe is not waited for
  with workdir.hold(tmp_path / 'w') as held:
    assert held == tmp_path / 'w'
    assert json.loads((held / '.lock').read_text())['pid'] == os.getpid()


def test_a_workdir_can_be_held_again_after_the_block_but_not_inside_it(tmp_path):
  for _ in range(2):
    with workdir.hold(tmp_path / 'a/b'):
      with pytest.raises(Locked, match=f'pid {os.getpid()} ') as e, workdir.hold(tmp_path / 'a/b'):
        pass
      assert e.value.code == 6
  with pytest.raises(ZeroDivisionError), workdir.hold(tmp_path / 'a/b'):
    raise ZeroDivisionError
  assert child(tmp_path / 'a/b').wait(timeout=60) == 0


def test_a_forked_child_does_not_end_the_lock(tmp_path):
  with workdir.hold(tmp_path):
    pid = os.fork()
    if not pid:
      os._exit(0)
    os.waitpid(pid, 0)
    assert child(tmp_path).wait(timeout=60) == 6


def test_a_lock_without_a_name_is_still_a_lock(tmp_path):
  with workdir.hold(tmp_path):
    (tmp_path / '.lock').write_text('{"pid": ')
    start = time.monotonic()
    with pytest.raises(Locked, match='did not leave its name'), workdir.hold(tmp_path):
      pass
    assert time.monotonic() - start < 2


def test_what_is_no_directory_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'w'):
    with pytest.raises(BadInput, match='not a directory') as e, workdir.hold(path):
      pass
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('inside', ['', 'w'], ids=['existing', 'to be made'])
def test_a_read_only_workdir_is_refused(inside):
  with tempfile.TemporaryDirectory() as outer:
    os.chmod(outer, 0o755)
    folder = Path(outer) / 'read only'
    folder.mkdir()
    os.chmod(folder, 0o555)
    root = os.geteuid() == 0  # root may write everywhere: be nobody for a moment
    try:
      if root:
        os.seteuid(65534)
      with pytest.raises(BadInput, match='Permission denied') as e, workdir.hold(folder / inside):
        pass
      assert '\n' not in str(e.value)
    finally:
      if root:
        os.seteuid(0)
      os.chmod(folder, 0o755)


def test_workdir_is_importable_without_the_heavy_packages():
  code = 'import sys, demix.runtime.workdir; print({"jax", "numpy", "orbax"} & set(sys.modules))'
  out = subprocess.run([sys.executable, '-c', code], env={'PYTHONPATH': str(ROOT)}, text=True,
                       capture_output=True, check=True).stdout
  assert out == 'set()\n'


def test_a_config_comes_back(tmp_path):
  config = {'model': {'d_model': 128, 'rate': 0.1 + 0.2}, 'domains': ('b', 'a'), 'name': 'é'}
  workdir.save_config(tmp_path, config)
  assert workdir.load_config(tmp_path) == config | {'domains': ['b', 'a']}
  assert os.listdir(tmp_path) == ['config.json']


def test_a_config_that_is_not_there_or_not_json_is_refused(tmp_path):
  with pytest.raises(BadInput, match=r'no config\.json'):
    workdir.load_config(tmp_path)
  for text in ('{"a": ', '[1]'):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(BadInput, match=r'config\.json'):
      workdir.load_config(tmp_path)
  with pytest.raises(BadInput, match='not JSON'):
    workdir.save_config(tmp_path, {'a': object()})
  assert (tmp_path / 'config.json').read_text() == '[1]'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  workdir.write_atomic(tmp_path / 'f', b'old')
  def full(fd):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    workdir.write_atomic(tmp_path / 'f', b'new')
  assert (tmp_path / 'f').read_bytes() == b'old' and os.listdir(tmp_path) == ['f']


def test_a_file_is_durable_before_it_takes_its_name(tmp_path, monkeypatch):
  calls, fsync, replace = [], os.fsync, os.replace
  monkeypatch.setattr(os, 'fsync', lambda fd: (
      calls.append(os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))), fsync(fd)))
  monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append('rename'), replace(a, b)))
  workdir.write_atomic(tmp_path / 'f', b'x')
  assert calls[0].startswith('.f.') and calls[1:] == ['rename', tmp_path.name]


def test_every_difference_of_identity_is_named_in_one_line():
  saved = {'model.d_model': 128, 'seed': 0, 'data.domains': ['a', 'b'], 'tie': 1, 'gone': 'x'}
  now = {'model.d_model': 256, 'seed': 0, 'data.domains': ('b', 'a'), 'tie': True, 'new': None}
  with pytest.raises(BadInput) as e:
    workdir.check_identity(saved, now, 'W')
  for text in ('model.d_model: 128 → 256', 'data.domains: ["a", "b"] → ["b", "a"]', 'tie: 1 → true',
               'gone: "x" → absent', 'new: absent → null', 'another workdir'):
    assert text in str(e.value)
  assert 'seed' not in str(e.value) and '\n' not in str(e.value)


def test_the_same_identity_is_accepted_after_a_round_trip():
  now = {'domains': ('a', 'b'), 'rate': 0.1, 'clip': float('nan'), 'whole': 1.0, 'map': {'x': (1,)}}
  workdir.check_identity(json.loads(json.dumps(now)) | {'whole': 1}, now, 'W')


def savez(f):
  np.savez(f, x=np.arange(3))


@pytest.mark.parametrize('there', [b'old', None])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, there):
  (tmp_path / 'far').mkdir()
  target, link = tmp_path / 'far' / 'real', tmp_path / 'link'
  if there:
    target.write_bytes(there)
    target.chmod(0o600)
  link.symlink_to('second')
  (tmp_path / 'second').symlink_to(target)
  workdir.check_writable(link, '--out')
  workdir.write_atomic(link, b'new')
  assert link.is_symlink() and (tmp_path / 'second').is_symlink()
  assert target.read_bytes() == b'new' and os.listdir(tmp_path / 'far') == ['real']
  assert not there or stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize('data', [b'whole', savez])
def test_a_pipe_is_written_to(tmp_path, data):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  read = []
  reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
  reader.start()
  workdir.check_writable(pipe, '--out')
  workdir.write_atomic(pipe, data)
  reader.join(10)
  assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ['pipe']
  if data is savez:
    assert np.load(io.BytesIO(read[0]))['x'].tolist() == [0, 1, 2]
  else:
    assert read == [data]


@pytest.mark.parametrize('data', [b'whole', savez])
def test_a_device_stays_what_it_is(tmp_path, data):
  node = tmp_path / 'null'
  try:
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    open(node, 'ab').close()
  except OSError:
    pytest.skip('no devices can be made here')
  workdir.check_writable(node, '--out')
  workdir.write_atomic(node, data)
  assert stat.S_ISCHR(node.stat().st_mode) and os.listdir(tmp_path) == ['null']


def test_standard_output_is_written_to_where_it_is_a_file(tmp_path):
  code = ('import sys; from demix.runtime.workdir import write_atomic; print("a", flush=True); '
          # Not /dev/stdout, which root can replace: a break of the code would break the machine.
          'write_atomic("/proc/self/fd/1", b"b\\n"); print("c")')
  with open(tmp_path / 'out', 'ab') as out:
    subprocess.run([sys.executable, '-c', code], stdout=out, check=True, cwd=ROOT)
  assert (tmp_path / 'out').read_bytes() == b'a\nb\nc\n'


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
  (tmp_path / 'loop').symlink_to('loop')
  (tmp_path / 'away').symlink_to('no folder/x')
  for path in (tmp_path, tmp_path / 'loop', tmp_path / 'away', tmp_path / 'no folder' / 'x',
               tmp_path / 'a\0b', tmp_path / ('a' * 300)):
    with pytest.raises(BadInput, match='--out='):
      workdir.check_writable(path, '--out')
    with pytest.raises((OSError, ValueError)):
      workdir.write_atomic(path, b'x')
  assert sorted(os.listdir(tmp_path)) == ['away', 'loop']


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
  def fails(f):
    f.write(b'half')
    raise RuntimeError
  (tmp_path / 'f').write_bytes(b'old')
  with pytest.raises(RuntimeError):
    workdir.write_atomic(tmp_path / 'f', fails)
  assert (tmp_path / 'f').read_bytes() == b'old' and os.listdir(tmp_path) == ['f']
