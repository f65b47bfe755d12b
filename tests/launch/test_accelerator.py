"""benchmarks/accelerator.sh: rehearsed on CPU; its time budget, and what fails, without a model."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_many_hosts import TOOLS, stub

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import accelerator  # noqa: E402
import accelerator_jobs  # noqa: E402
import bench  # noqa: E402


def results(out) -> dict:
  return json.loads((out / 'results.json').read_text())


def rows_of(found: dict) -> dict:
  return {(r['size'], r['arm']): r for r in found['rows']}


def test_a_rehearsal_on_cpu_measures_each_size_and_goes_on_after_a_failure(tmp_path):
  """Real jobs; torch is a program that ends at once."""
  done = subprocess.run(
      [ROOT / 'benchmarks/accelerator.sh', f'--python={sys.executable}', '--tiny', '--out=out',
       '--sizes=125m', '--seconds=0.1', '--torch-python=false', '--set=scan=False'],
      capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1, done.stderr
  found = results(tmp_path / 'out')
  assert {r['check']: r['ok'] for r in found['sanity']} == {
      'device': True, 'losses dense': True, 'losses demix': True, 'attention': None,
      'generation': True}, found['sanity']
  rows = rows_of(found)
  assert list(rows) == [('125m', 'dense'), ('125m', 'demix'), ('125m', 'torch')]
  for key, row in rows.items():
    if key[1] == 'torch':
      assert row['status'] == 'failed' and 'the PyTorch process ended' in row['why']
      continue
    assert row['status'] == 'measured' and row['scan'] is False, row
    assert row['tokens_per_second']['median'] > 0 and row['mfu'] is None
    assert row['attention'] == 'plain' and row['batch'] == 32
    assert min(row[n] for n in ('bytes', 'compile_seconds', 'predicted_bytes')) > 0
  assert rows['125m', 'demix']['over_dense']['median'] > 0
  table = (tmp_path / 'out/table.txt').read_text()
  assert table in done.stdout and 'MFU left out' in table
  assert table.count('not measured') == 5  # a tiny model meets no goal


# ---- the process that counts the time, with jobs that need no JAX

JOB = '''
import json, sys, time
name, flags = sys.argv[1], dict(a[2:].split('=', 1) for a in sys.argv[2:])
def emit(**row):
  with open(flags['rows'], 'a') as file:
    file.write(json.dumps(row) + chr(10))
def dense(size, rate, arm='dense', **more):
  spread = {'median': rate, 'min': rate, 'max': rate}
  emit(size=size, arm=arm, status='measured', why='', tokens_per_second=spread, mfu=0.4, bytes=1,
       compile_seconds=1, batch=8, first_loss=11.0 + (arm == 'torch' and size == '1.3b'),
       remat='none', loss_block=0, attention='cudnn', **more)
if name == 'sanity':
  emit(check='device', ok=True, kind='NVIDIA H100 80GB HBM3', jax='1', text='',
       peak_flops_per_second=989e12)
  for arm, off in (('dense', 0), ('demix', 0.1)):
    emit(check='losses ' + arm, ok=True, losses=[5.0, 4 + off], text='')
elif name == 'cpu':
  for arm in ('dense', 'demix'):
    emit(check='cpu ' + arm, losses=[5.0, 4.0])
elif name == '125m' and flags['rung'] == '0':
  dense('125m', 470e3, rung=0)
  emit(size='125m', arm='demix', status='failed', why='ended while compiling', rung=0)
  sys.exit('OutOfMemoryError')
elif name == '125m':
  emit(size='125m', arm='dense', status='failed', why='ended while compiling', rung=1)
  sys.exit('ValueError: no such luck')
elif name == '350m':
  rung = int(flags['rung'])
  emit(size='350m', arm='dense', status='failed', why='ended while timing', rung=max(rung, 1))
  if rung < 3:
    sys.exit('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte')
  dense('350m', 10, rung=rung)
elif name == '760m':
  time.sleep(60)
elif name == '1.3b':
  dense('1.3b', 60e3)
elif name.split()[-1] in ('125m', '1.3b'):
  dense(name.split()[-1], 235e3, 'torch')
'''


@pytest.fixture
def jobs(monkeypatch):
  """The (name, flags) of the jobs that were begun; each is JOB."""
  begun = []
  def command(self, name, *more):
    begun.append((name, *more))
    if len(begun) > 3:  # all before are on disk, whatever comes
      assert results(self.out)['device']
    return [sys.executable, '-ISc', JOB, name, *more]
  monkeypatch.setattr(accelerator.Runner, 'command', command)
  monkeypatch.setitem(accelerator.LIMITS, '760m', 1)
  return begun


def test_what_fails_is_recorded_and_the_rest_goes_on(jobs, tmp_path, capsys):
  assert accelerator.main([f'--out={tmp_path}', '--torch-python=python']) == 1
  found = results(tmp_path)
  rows = rows_of(found)
  assert {k: r['status'] for k, r in rows.items() if k[1] != 'torch'} == {
      ('125m', 'dense'): 'measured', ('125m', 'demix'): 'failed', ('350m', 'dense'): 'measured',
      ('760m', 'dense'): 'failed', ('1.3b', 'dense'): 'measured'}
  assert rows['125m', 'demix']['why'] == 'ended while compiling: out of memory: OutOfMemoryError'
  assert rows['760m', 'dense']['why'] == 'its time was over'
  assert [f for n, *flags in jobs if n == '350m' for f in flags if 'rung' in f] == [
      '--rung=0', '--rung=2', '--rung=3']
  assert {k[0]: r['status'] for k, r in rows.items() if k[1] == 'torch'} == {
      '125m': 'measured', '350m': 'failed', '760m': 'skipped', '1.3b': 'failed'}
  assert rows['1.3b', 'torch']['why'] == 'first loss 12.0000, and 11.0000 here'
  # What CPU computes otherwise is a failure of the device.
  assert {r['check']: r['ok'] for r in found['sanity']} == {
      'device': True, 'losses dense': True, 'losses demix': False}
  assert [(g['wanted'], g['verdict']) for g in found['goals']] == [
      (460e3, 'met'), (175e3, 'missed'), (90e3, 'not measured'), (55e3, 'met'),
      (0.98, 'not measured')]
  said = capsys.readouterr().out
  assert 'sanity: FAILED: losses demix' in said
  assert '125m: dense over torch.compile 2.00' in said


def test_the_time_budget_is_kept_and_what_is_left_out_is_said(jobs, tmp_path, monkeypatch):
  monkeypatch.setattr(accelerator, 'LEAST', 0.1)
  monkeypatch.setitem(accelerator.LIMITS, '760m', 100)
  started = time.monotonic()
  # 3 s: enough for all but a size that does not end by itself, which takes what is left.
  assert accelerator.main([f'--out={tmp_path}', '--minutes=1', '--spent=57', '--sizes=125m,760m,'
                           '350m,1.3b', '--torch-python=python']) == 1
  assert time.monotonic() - started < 4.5
  rows = rows_of(results(tmp_path))
  assert rows['125m', 'dense']['status'] == 'measured'
  assert rows['760m', 'dense']['why'] == 'its time was over'
  rest = [r for key, r in rows.items() if key[0] in ('350m', '1.3b') or key[1] == 'torch']
  assert len(rest) == 6 and {r['status'] for r in rest} == {'skipped'}
  assert all('s left' in r['why'] or r['why'] == 'dense was not measured' for r in rest)


def test_the_rows_of_a_step_are_those_that_fit():
  """By predicted memory; without a prediction the usual ones, by trying."""
  size, chosen = accelerator_jobs.TINY, []
  needs = [accelerator_jobs.predicted(('dense',), *r) for r in accelerator_jobs.rungs(size)[:2]]
  for first, limit in ((0, None), (0, 2 * needs[0]), (0, 1.3 * needs[1]), (4, 1)):
    chosen.append(accelerator_jobs.choose(('dense',), size, first, limit)[0])
  assert needs[1] < needs[0] and chosen == [0, 0, 1, 5]
  both = accelerator_jobs.predicted(('dense', 'demix'), *accelerator_jobs.rungs(size)[0])
  assert both > needs[0]
  broken = accelerator_jobs.choose(('nosuch',), size, 0, 1)
  assert broken[0] == 1 and broken[-1] is None


@pytest.mark.parametrize(('kind', 'rate'), [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12),
    ('NVIDIA H200 NVL', 836e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12), ('NVIDIA A10G', None), ('cpu', None)])
def test_the_peak_of_a_device_is_that_of_its_name(kind, rate):
  assert bench.peak(kind) == rate


@pytest.mark.parametrize(('driver', 'said'), [
    ('580.159.04', '.venv-cuda13'), ('550.54', '.venv-cuda12'), ('470.1', 'driver 470: CUDA 12'),
    ('', 'no accelerator: ')])
def test_the_environment_is_that_of_the_driver(tmp_path, driver, said):
  """As far as making it, with a Python that cannot."""
  for file in ('benchmarks/accelerator.sh', 'launch/environment.sh', 'requirements.txt',
               'requirements-cuda12.txt', 'requirements-cuda13.txt'):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / file, tmp_path / file)
  path = stub(tmp_path / 'bin', 'nvidia-smi', f'echo {driver}')
  stub(path, 'python3', '[ "$1" = -c ] || { echo Python 3.11; [ "$1" = --version ]; }')
  for tool in (*TOOLS, 'head', 'rm'):
    if not os.path.lexists(path / tool):
      (path / tool).symlink_to(shutil.which(tool))
  done = subprocess.run([tmp_path / 'benchmarks/accelerator.sh'], capture_output=True, text=True,
                        env={'PATH': str(path)})
  assert done.returncode == 2 and said in done.stderr, done.stderr
