"""The quick start itself: killed on the way, run to its end, run again (long)."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'launch')]

import quickstart_table  # noqa: E402

from configs import quickstart, quickstart_corpus  # noqa: E402


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
  steps = quickstart.get_config('dense').train.checkpoint_every
  finished = workdir / 'dense' / 'checkpoints' / str(steps) / 'digests.json'
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
  domains = list(quickstart_corpus.DOMAINS)
  arms = ['dense', 'demix', 'forest', 'average']
  assert results['heldout'] == list(quickstart_corpus.NOVEL) and list(results['runs']) == arms
  ways = [(None, None), ('none', None), *((prior, posterior) for prior in (
      'uniform', 'updating', 'cached') for posterior in ('prefix', 'last_token'))]
  assert [(r['run'], r['prior'], r['posterior'], r['domain']) for r in results['rows']] == [
      (run, *way, d) for run in arms for way in (ways if run in ('demix', 'forest') else ways[:1])
      for d in domains]
  dense, demix, forest, average = (results['runs'][arm] for arm in arms)
  assert {run['train_tokens'] for run in results['runs'].values()} == {
      quickstart.SEQUENCES * quickstart.LENGTH}
  assert dense['params_active'] == demix['params_active'] < demix['params_total']
  assert dense['params_active'] == forest['params_active'] == average['params_total']
  assert forest['params_total'] == 4 * dense['params_total']
  for row in results['rows']:
    # Far below a uniform guess (1024), or not a model that learned; not below what so few
    # parameters could. A domain's expert is none for another domain.
    assert 4 < row['perplexity'] < 400
    assert math.isclose(row['perplexity'], math.exp(row['nll']))
    if row['domain'] not in quickstart_corpus.NOVEL:
      single = f'expert:{row["domain"]}' if row['run'] in ('demix', 'forest') else 'none'
      mixed = row['prior'] is not None
      assert row['mix'] == ('ensemble' if mixed else single)
  # The prior that is estimated on a domain's dev text knows the domain.
  for stored in json.loads((workdir / 'priors.json').read_text())['priors']:
    if stored['domain'] not in quickstart_corpus.NOVEL:
      assert stored['weights'][stored['domain']] > 0.5, stored
  assert 'while writing' in out  # a text, and who wrote it
  assert 'tokens per active' in (workdir / 'tables.txt').read_text()
  end = out[out.index('\nperplexity '):].strip().splitlines()  # one screen, and the last one
  assert len(end) <= 25 and 'over dense' in out and end[-1].startswith('took'), end
  third = start(workdir)
  again, _ = third.communicate(timeout=60)
  assert third.returncode == 0 and 'done already' in again and 'over dense' in again


@pytest.mark.long
def test_the_quick_start_says_what_it_cannot_take(tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  for arguments in (['--workdir', str(blocked)], ['--wrong']):
    done = subprocess.run(['bash', str(ROOT / 'launch' / 'quickstart.sh'), *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: '), done
    assert done.stderr.count('\n') == 1


def test_the_table_says_what_each_way_is_worth_over_dense():
  ways = [(None, None), ('none', None), ('cached', 'last_token'), ('cached', 'prefix')]
  worth = {('dense', None): 1, ('demix', None): 0.9, ('demix', 'cached'): 0.8,
           ('forest', None): 0.7, ('forest', 'cached'): 1.1, ('average', None): 2}
  rows = [{'run': run, 'prior': prior, 'posterior': posterior, 'domain': domain,
           'nll': math.log(base * worth.get((run, prior), 9) * (1 if posterior != 'prefix' else 3))}
          for run in ('dense', 'demix', 'forest', 'average') for prior, posterior in ways
          for domain, base in (('a', 10), ('b', 1000), ('new', 50))]
  results = {'rows': rows, 'heldout': ['new']}
  table = quickstart_table.table(results).splitlines()
  cells = {line.split('  ')[0] or line.split()[0]: line.split()[-6:] for line in table}
  assert cells['a'] == ['10.00', '9.00*', '8.00*', '7.00*', '11.00', '20.00']
  assert cells['geometric mean'] == ['100.00', '90.00*', '80.00*', '70.00*', '110.00', '200.00']
  over = [line.split()[-6:] for line in table if 'over dense' in line]
  assert over == [['1', '0.900', '0.800', '0.700', '1.100', '2.000']] * 2
  assert next(line for line in table if 'domains won' in line).split('  ')[-1].strip() == '0 of 2'
  assert cells['new (new)'][0] == '50.00'
  assert re.findall(r'[\d.]+ % \w+', quickstart_table.reading(results)) == [
      '20.0 % below', '10.0 % above', '100.0 % above', '20.0 % below', '10.0 % above']
