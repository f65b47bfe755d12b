"""The quick start itself: killed on the way, run to its end, run again (long)."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(workdir, **options):
  """launch/quickstart.sh as a newcomer calls it, in a process group of its own."""
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  return subprocess.Popen(
      ['bash', str(ROOT / 'launch' / 'quickstart.sh'), '--workdir', str(workdir)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
      start_new_session=True, **options)


@pytest.mark.long
def test_quickstart_continues_where_it_was_killed_and_ends_in_a_table(tmp_path):
  workdir = tmp_path / 'run'
  first = start(workdir)
  finished = workdir / 'dense' / 'checkpoints' / '70' / 'digests.json'
  deadline = time.monotonic() + 600
  while not finished.exists():
    assert first.poll() is None, first.stdout.read()
    assert time.monotonic() < deadline, 'no checkpoint after 10 minutes'
    time.sleep(0.2)
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  second = start(workdir)
  out, _ = second.communicate(timeout=1500)
  assert second.returncode == 0, out
  assert re.search(r'resumed +at step \d+', out), out
  results = json.loads((workdir / 'results.json').read_text())
  domains = ['code', 'cplusplus', 'docstrings', 'sessions', 'cython']
  arms = ['dense', 'demix', 'forest', 'average']
  assert results['heldout'] == ['cython'] and list(results['runs']) == arms
  ways = [(None, None), ('none', None), *((prior, posterior) for prior in (
      'uniform', 'updating', 'cached') for posterior in ('prefix', 'last_token'))]
  assert [(r['run'], r['prior'], r['posterior'], r['domain']) for r in results['rows']] == [
      (run, *way, d) for run in arms for way in (ways if run in ('demix', 'forest') else ways[:1])
      for d in domains]
  dense, demix, forest, average = (results['runs'][arm] for arm in arms)
  assert {run['train_tokens'] for run in results['runs'].values()} == {280 * 8 * 128}
  assert dense['params_active'] == demix['params_active'] < demix['params_total']
  assert dense['params_active'] == forest['params_active'] == average['params_total']
  assert forest['params_total'] == 4 * dense['params_total']
  for row in results['rows']:
    # Far below a uniform guess (2048): it learned; and not below what a 1M model could.
    assert 20 < row['perplexity'] < 400
    assert math.isclose(row['perplexity'], math.exp(row['nll']))
    if row['domain'] != 'cython':
      single = f'expert:{row["domain"]}' if row['run'] in ('demix', 'forest') else 'none'
      mixed = row['prior'] is not None
      assert row['mix'] == ('ensemble' if mixed else single)
  # The prior that is estimated on a domain's dev text knows the domain.
  for stored in json.loads((workdir / 'priors.json').read_text())['priors']:
    if stored['domain'] != 'cython':
      assert stored['weights'][stored['domain']] > 0.5, stored
  assert 'while writing' in out  # a text, and who wrote it
  assert 'arithmetic mean' in out and 'ledger' in out and 'took' in out
  third = start(workdir)
  again, _ = third.communicate(timeout=60)
  assert third.returncode == 0 and 'done already' in again and 'arithmetic mean' in again


@pytest.mark.long
def test_the_quick_start_says_what_it_cannot_take(tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  for arguments in (['--workdir', str(blocked)], ['--wrong']):
    done = subprocess.run(['bash', str(ROOT / 'launch' / 'quickstart.sh'), *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: '), done
    assert done.stderr.count('\n') == 1
