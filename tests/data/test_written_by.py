"""Stores, checkpoints, priors and forests that earlier code wrote: read, with the same numbers."""

import json
import tarfile
from pathlib import Path

import pytest
import runs

from demix.data.tokens.store import TokenStore
from demix.mix import prior
from demix.training import metrics

ARCHIVES = sorted((Path(__file__).parent / 'written_by').glob('*.tar.xz'))


@pytest.fixture(scope='module', params=ARCHIVES, ids=lambda p: p.name.partition('.')[0])
def written(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('written')
  with tarfile.open(request.param) as archive:
    # Python before 3.11.4 has no filters, and the archive is our own.
    archive.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
  return folder


def rows_of(file):
  return {tuple(r[k] for k in ('run', 'prior', 'posterior', 'domain')): r
          for r in json.loads(file.read_text())['rows']}


def test_evaluation_gives_the_numbers_of_then(written, tmp_path):
  """Cached priors are those of the file: what estimates them may change, not what they give."""
  TokenStore.open(written / 'store').verify()
  ended = runs.demix(
      'evaluate', f'--model={written}/dense', f'--model={written}/demix',
      f'--model=forest=forest:{written}/forest', f'--data={written}/store',
      '--mix=given,average,uniform,cached', f'--prior={written}/priors.json',
      f'--out={tmp_path / "r.json"}')
  assert ended.code == 0, ended
  now, then = rows_of(tmp_path / 'r.json'), rows_of(written / 'results.json')
  assert now.keys() == then.keys() and len(now) == 39
  for key, row in then.items():
    for name in ('nll', 'perplexity', 'bits_per_byte'):
      assert now[key][name] == pytest.approx(row[name], rel=1e-6), key
    assert [now[key][n] for n in ('mix', 'tokens', 'bytes')] == [
        row[n] for n in ('mix', 'tokens', 'bytes')]
  assert len(prior.load(written / 'priors.json')) == 12  # of two models


def test_the_same_commands_train_to_the_losses_of_then(written, tmp_path):
  """Ten steps of a dense and a DEMix LM from the start, on the store of then."""
  from written_by import make
  for name, more in (('dense', {}), ('demix', {'model__ffn': 'demix'})):
    ended = runs.train(written / 'store', tmp_path / name, **make.SMALL, **more)
    assert ended.code == 0, ended
    now, then = metrics.read(tmp_path / name), metrics.read(written / name)
    assert [r['step'] for r in now] == [r['step'] for r in then] == list(range(1, 11))
    for a, b in zip(now, then):
      assert a['train/loss'] == pytest.approx(b['train/loss'], rel=1e-5)
      assert a['train/grad_norm'] == pytest.approx(b['train/grad_norm'], rel=1e-4)


def test_runs_of_then_go_on_and_their_experts_change(written, tmp_path):
  """Resumed, added to, averaged: what is asked of a workdir today works on those of then."""
  from written_by import make
  done = runs.train(written / 'store', written / 'demix', model__ffn='demix', **make.SMALL)
  assert done.code == 0 and 'done already: step 10 of 10' in done.out
  status = runs.demix('forest', 'status', f'--forest={written}/forest')
  assert status.code == 0 and status.out.count('registered, step 5 of 5') == 3
  assert runs.demix('forest', 'verify', f'--forest={written}/forest').code == 0
  merged = runs.demix('merge', f'--model=forest:{written}/forest', f'--workdir={tmp_path / "M"}')
  assert merged.code == 0, merged
  grown = runs.train(written / 'store', tmp_path / 'new', **make.SMALL | {
      'init__model': written / 'demix', 'init__expert': 'code', 'init__trainable': 'ffn',
      'data__domains': 'mixed', 'model__d_model': 4, 'model__heads': 2, 'train__steps': 2,
      'optimizer__schedule_steps': 2})
  assert grown.code == 0, grown
  added = runs.demix('forest', 'add', f'--model={written}/demix', '--expert=mixed',
                     f'--from={tmp_path / "new"}', f'--workdir={tmp_path / "W"}',
                     f'--data={written}/store')
  assert added.code == 0, added
  removed = runs.demix('forest', 'remove', f'--model={tmp_path / "W"}', '--expert=code',
                       f'--workdir={tmp_path / "V"}')
  assert removed.code == 0, removed
