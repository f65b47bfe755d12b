import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_cases import flags, refused, small, verb, write

from demix.__main__ import main
from demix.data.corpus import building
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, Locked

BYTES = PrepareConfig(tokenizer='bytes')
QUIET = lambda line: None
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('there', [False, True])
def test_a_full_disk_changes_nothing(tmp_path, there):
  """A limit on the size of files stands in for the disk."""
  small(tmp_path / 'in')
  if there:
    old = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET).fingerprint
    write(tmp_path / 'in', {'law': {'train': ['new']}})
  before = sorted(p.name for p in tmp_path.iterdir())
  code = ('import resource, sys\nfrom demix.__main__ import main\n'
          'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n'
          'sys.exit(main(["prepare", *sys.argv[1:]]))')
  run = subprocess.run([sys.executable, '-c', code, *flags(tmp_path)], cwd=ROOT, text=True,
                       capture_output=True)
  assert run.returncode == 1 and run.stderr.count('\n') == 1, run.stderr
  assert run.stderr.startswith(f'error: {tmp_path / "out"}: no room to write it')
  assert sorted(p.name for p in tmp_path.iterdir()) == before
  if there:
    assert TokenStore.open(tmp_path / 'out').fingerprint == old


def _wait(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.002)


def test_killed_at_any_moment_it_leaves_a_whole_store_or_none(tmp_path):
  """Random moments: from before the first file to after the last."""
  small(tmp_path / 'in', train=2000)
  command = [sys.executable, '-m', 'demix', 'prepare',
             *flags(tmp_path, '--config.vocab_size=300', tokenizer='bpe')]
  building, card = tmp_path / '.out.building', tmp_path / 'out/card.json'
  started = time.monotonic()
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  seconds = time.monotonic() - started
  reference, rng, killed = TokenStore.open(tmp_path / 'out').fingerprint, random.Random(0), 0
  shutil.rmtree(tmp_path / 'out')
  for _ in range(4):
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _wait(lambda: building.exists() or card.exists())
    time.sleep(rng.random() * seconds * 0.8)
    process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
    if card.exists():
      store = TokenStore.open(tmp_path / 'out')
      store.verify()
      assert store.fingerprint == reference
      shutil.rmtree(tmp_path / 'out')
    else:
      with pytest.raises(BadInput, match='no such token store'):
        TokenStore.open(tmp_path / 'out')
  assert killed
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  assert TokenStore.open(tmp_path / 'out').fingerprint == reference
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


# Forks itself for every k, and kills the child before its k-th change of the file system: the names
# are those of the calls through which files come, get their content made sure, move and go.
KILLER = '''
import os, signal, sys
from pathlib import Path
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
folder, k = Path(sys.argv[1]), 0
config = PrepareConfig(tokenizer="bytes")
while True:
  k += 1
  if (child := os.fork()) == 0:
    left = k
    def counted(call):
      def count(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
          os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
      return count
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
      call = (lambda file: None) if name == "fsync" else getattr(os, name)  # no loss of power here
      setattr(os, name, counted(call))
    prepare(folder / "in", folder / "out", config, lambda line: None)
    os._exit(0)
  status = os.waitpid(child, 0)[1]
  try:
    store = TokenStore.open(folder / "out")
    store.verify()
    print(k, store.fingerprint)
  except BadInput as e:
    assert "no such token store" in str(e), e
    print(k, "none")
  if os.WIFEXITED(status):
    assert os.WEXITSTATUS(status) == 0
    break
'''


@pytest.mark.parametrize('replaced', [False, True])
def test_killed_before_every_change_of_the_file_system(tmp_path, replaced):
  write(tmp_path / 'in', {'law': {'train': ['one'], 'test': ['two']}})
  if replaced:
    old = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET).fingerprint
    write(tmp_path / 'in', {'law': {'train': ['three']}})
  new = prepare(tmp_path / 'in', tmp_path / 'new', BYTES, QUIET).fingerprint
  shutil.rmtree(tmp_path / 'new')
  run = subprocess.run([sys.executable, '-c', KILLER, tmp_path], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  states = [line.split()[1] for line in run.stdout.splitlines()]
  assert len(states) > 10 and states[-1] == new
  # Before the swap what was there, in its middle nothing, then the new one for good.
  before = [s for s in states if s != new]
  assert states == before + [new] * (len(states) - len(before))
  assert set(before) <= ({old, 'none'} if replaced else {'none'})
  assert before.count('none') <= 2 or not replaced
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


def test_a_store_that_was_being_replaced_is_put_back(tmp_path, capsys):
  small(tmp_path / 'in')
  old = prepare(tmp_path / 'in', tmp_path / 'out', BYTES, QUIET).fingerprint
  (tmp_path / 'out').rename(tmp_path / '.out.replaced')  # killed between the two renames
  (tmp_path / 'in/law/train.jsonl').write_text('not JSON')
  assert 'law/train.jsonl:1: not JSON' in refused(capsys, *flags(tmp_path))
  assert TokenStore.open(tmp_path / 'out').fingerprint == old
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path, capsys):
  small(tmp_path / 'in')
  with building.Building(tmp_path / 'out') as first:
    (first.path / 'half').write_text('x')
    assert main(['prepare', *flags(tmp_path)]) == Locked.code == 6
    err = capsys.readouterr().err
    assert 'another process is making this store' in err and err.count('\n') == 1
    assert (first.path / 'half').exists()
  assert verb(capsys, *flags(tmp_path))[0] == 0
