"""launch/slurm.sh and launch/tpu_vm.sh: what they would run, on no cluster."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# Of a cluster this machine may have anything, or nothing: tests give what is to be there.
TOOLS = ('bash', 'cat', 'cksum', 'dirname', 'env', 'grep', 'python3', 'sed', 'sleep', 'tr', 'wc')


def launch(script, *argv, path) -> subprocess.CompletedProcess:
  """Runs a script on a machine that has the programs in `path` and TOOLS, and no others."""
  path.mkdir(exist_ok=True)
  for tool in TOOLS:
    if not os.path.lexists(path / tool):
      (path / tool).symlink_to(shutil.which(tool))
  env = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_'))}
  env['PATH'] = str(path)
  return subprocess.run([ROOT / 'launch' / script, *argv], capture_output=True, text=True, env=env)


def stub(folder, name, text):
  """A program of that name that does `text` in bash."""
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
  (folder / name).chmod(0o755)
  return folder


def command(job: str) -> list[str]:
  """What the job's srun runs."""
  (line,) = [line for line in job.splitlines() if line.startswith('srun')]
  return shlex.split(line.rstrip('& '))


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'bin'


def test_train_is_one_run_on_all_nodes_and_other_verbs_run_on_one(path):
  job = launch('slurm.sh', '--nodes=2', '--gpus=8', '--dry_run', 'train', '--workdir=/w/a b',
               '--config.data.path=/w/x', path=path).stdout
  for line in ('--nodes=2', '--ntasks-per-node=8', '--gpus-per-node=8', '--requeue',
               '--signal=B:USR1@120'):
    assert f'#SBATCH {line}' in job.splitlines()
  assert command(job)[-5:] == ['demix', 'train', '--workdir=/w/a b', '--config.data.path=/w/x',
                               '--config.mesh.processes=0']
  assert 'requirements-cuda12.txt' in job
  job = launch('slurm.sh', '--gpus=8', '--dry_run', 'evaluate', '--model=W#legal', path=path).stdout
  assert '#SBATCH --ntasks-per-node=1' in job and 'mesh.processes' not in job
  assert command(job)[-2:] == ['evaluate', '--model=W#legal']
  job = launch('slurm.sh', '--dry_run', 'train', '--workdir=/w', path=path).stdout
  # One process joins no one.
  assert 'mesh.processes' not in job and '--gpus-per-node' not in job
  assert 'requirements.txt' in job


@pytest.mark.parametrize('argv,text', [
    ([], 'which verb?'), (['--nodes=two', 'train'], '--nodes=two'),
    (['--nodes=0', 'train'], '--nodes=0'),
    (['--nodez=2', 'train'], 'unknown argument --nodez=2'),
    (['--nodes=2', 'evaluate'], 'evaluate runs on one node'),
    (['--requirements=x.txt', 'train'], 'no such file'), (['train'], 'no sbatch')])
def test_what_cannot_be_submitted_is_said_in_a_line(path, argv, text):
  done = launch('slurm.sh', *argv, path=path)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and text in done.stderr


def test_the_job_that_a_dry_run_shows_is_submitted(path, tmp_path):
  stub(path, 'sbatch', f'cat > {tmp_path}/job')
  flags = ('--nodes=2', '--gpus=8', 'train', '--workdir=/w')
  done = launch('slurm.sh', *flags, path=path)
  assert done.returncode == 0, done.stderr
  shown = launch('slurm.sh', '--dry_run', *flags, path=path).stdout
  assert (tmp_path / 'job').read_text().rstrip() == shown.rstrip()


@pytest.mark.parametrize('code,restarts,ends,again', [
    (0, 0, 0, False), (75, 5, 0, True), (2, 0, 2, False), (137, 0, 0, True), (137, 3, 137, False)])
def test_the_job_is_queued_again_when_the_run_is_to_go_on(tmp_path, code, restarts, ends, again):
  job = launch('slurm.sh', '--dry_run', 'train', '--workdir=/w', path=tmp_path / 'bin').stdout
  lines = [line for line in job.splitlines()
           if not line.startswith(('cd ', 'source ', 'install_requirements '))]
  stub(tmp_path / 'bin', 'srun', f'exit {code}')
  stub(tmp_path / 'bin', 'scontrol', f'echo "$@" > {tmp_path}/queued')
  env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17',
                      'SLURM_RESTART_COUNT': str(restarts)}
  done = subprocess.run(['bash', '-c', '\n'.join(lines)], env=env, capture_output=True, text=True)
  assert done.returncode == ends, done.stderr
  assert (tmp_path / 'queued').exists() == again
  if again:
    assert (tmp_path / 'queued').read_text() == 'requeue 17\n'


def test_the_warning_reaches_every_process_and_their_exit_code_counts(tmp_path):
  job = launch('slurm.sh', '--dry_run', 'train', '--workdir=/w', path=tmp_path / 'bin').stdout
  lines = [line for line in job.splitlines()
           if not line.startswith(('cd ', 'source ', 'install_requirements '))]
  stub(tmp_path / 'bin', 'srun', f"trap 'exit 75' USR1; touch {tmp_path}/up; "
                                 'while :; do sleep 0.05; done')
  stub(tmp_path / 'bin', 'scancel', 'exit 1')  # then the step itself is told
  stub(tmp_path / 'bin', 'scontrol', f'echo "$@" > {tmp_path}/queued')
  lines.insert(1, f'(until [ -f {tmp_path}/up ]; do sleep 0.05; done; kill -USR1 $$) &')
  env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17'}
  done = subprocess.run(['bash', '-c', '\n'.join(lines)], env=env, capture_output=True, text=True,
                        timeout=60)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'queued').read_text() == 'requeue 17\n'


def test_a_tpu_slice_runs_train_on_all_hosts_and_goes_on_after_a_preemption(tmp_path):
  argv = ['--tpu=pod', '--zone=z', '--project=p', '--env=A=x y']
  out = launch('tpu_vm.sh', *argv, '--dry_run', 'train', '--workdir=/w/a b',
               path=tmp_path / 'bin').stdout
  words = shlex.split(out)
  assert words[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  assert words[6:9] == ['--zone=z', '--project=p', '--worker=all']
  remote = words[9].removeprefix('--command=')
  assert remote.startswith('cd ~/demix && ')
  assert shlex.split(remote.split(' && ')[-1]) == [
      'env', 'A=x y', 'python', '-m', 'demix', 'train', '--workdir=/w/a b',
      '--config.mesh.processes=0']
  out = launch('tpu_vm.sh', *argv, '--dry_run', 'evaluate', '--model=W',
               path=tmp_path / 'bin').stdout
  assert '--worker=0' in out and 'mesh.processes' not in out
  done = launch('tpu_vm.sh', *argv, 'train', path=tmp_path / 'bin')
  assert done.returncode == 2 and 'no gcloud' in done.stderr
  # The first time it is preempted, the second time it is done.
  stub(tmp_path / 'bin', 'gcloud', f'echo x >> {tmp_path}/calls; '
                                   f'[ $(wc -l < {tmp_path}/calls) = 1 ] && exit 75; exit 0')
  (tmp_path / 'bin/sleep').unlink()  # not through the link
  stub(tmp_path / 'bin', 'sleep', 'exit 0')
  done = launch('tpu_vm.sh', *argv, 'train', path=tmp_path / 'bin')
  assert done.returncode == 0 and (tmp_path / 'calls').read_text() == 'x\nx\n'
  assert 'starting again' in done.stderr
  done = launch('tpu_vm.sh', '--tpu=pod', 'train', path=tmp_path / 'bin')
  assert done.returncode == 2 and '--zone=ZONE' in done.stderr
