"""demix/eval/mixing.py: every way of mixing, recomputed in NumPy from the arrays of --dump."""

import json
import math

import corpus
import numpy as np
import pytest
import runs

from demix.eval.sequences import shuffled
from demix.mix import prior

ALL = (*corpus.DOMAINS, corpus.NOVEL)
E, L = 4, 32
WAYS = '--mix=given,best,average,uniform,updating,cached'


@pytest.fixture(scope='module')
def done(models, tmp_path_factory):
  """One evaluation of every way; its rows {(domain, prior, posterior): row}, dump and priors."""
  folder = tmp_path_factory.mktemp('mixed')
  ended = runs.demix('evaluate', f'--model={models["demix"]}', WAYS, '--mix.blocks=9',
                     '--batch_size=8', f'--out={folder / "r.json"}', f'--dump={folder / "d.npz"}',
                     f'--save_priors={folder / "p.json"}', '--tables=all')
  assert ended.code == 0, ended
  content = json.loads((folder / 'r.json').read_text())
  rows = {(r['domain'], r['prior'], r['posterior']): r for r in content['rows']}
  return rows, dict(np.load(folder / 'd.npz')), content, prior.load(folder / 'p.json'), ended.out


def of_domain(dump, domain):
  """loglik [E, blocks, L], targets' weights [blocks, L] of a domain, float64."""
  mine = dump['domain_B'] == ALL.index(domain)
  return dump['loglik_EBL'][:, mine].astype(np.float64), dump['weights_BL'][mine]


def posterior(block_EL, log_prior, kind):
  """log weights [E, L] of one block, by the formulas."""
  out = np.empty_like(block_EL)
  for t in range(block_EL.shape[1]):
    seen = block_EL[:, :t].sum(1) if kind == 'prefix' else block_EL[:, t - 1] if t else 0
    scores = np.zeros(E) if kind == 'last_token' and t == 0 else log_prior + seen
    out[:, t] = scores - np.logaddexp.reduce(scores)
  return out


def moving(blocks_EBL, full_B, kind, alpha=0.3, group=2):
  """The prior each block is read with, and the last one."""
  log_prior, mean, used = np.full(E, -math.log(E)), None, []
  for at in range(0, blocks_EBL.shape[1], group):
    lasts = []
    for b in range(at, min(at + group, blocks_EBL.shape[1])):
      used.append(log_prior)
      if full_B[b]:
        lasts.append(np.exp(posterior(blocks_EBL[:, b], log_prior, kind)[:, -1]))
    if lasts:
      new = np.mean(lasts, 0)
      mean = new if mean is None else alpha * new + (1 - alpha) * mean
      with np.errstate(divide='ignore'):
        log_prior = np.log(mean)
  return used, log_prior


def nll(blocks_EBL, weights_BL, priors, kind):
  total = 0.0
  for b, log_prior in enumerate(priors):
    log_w = posterior(blocks_EBL[:, b], log_prior, kind)
    mixed = np.logaddexp.reduce(log_w + blocks_EBL[:, b])
    total -= (mixed * weights_BL[b]).sum()
  return total / weights_BL.sum()


@pytest.mark.parametrize('kind', ['prefix', 'last_token'])
@pytest.mark.parametrize('domain', ALL)
def test_mixtures_by_every_prior(done, domain, kind):
  rows, dump, _, stored, _ = done
  blocks, weights = of_domain(dump, domain)
  B = blocks.shape[1]
  [cached] = [p for p in stored if (p.domain, p.posterior) == (domain, kind)]
  priors = {'uniform': [np.full(E, -math.log(E))] * B,
            'updating': moving(blocks, weights.sum(1) == L, kind)[0],
            'cached': [np.asarray(cached.log_weights)] * B}
  for name, used in priors.items():
    row = rows[domain, name, kind]
    assert row['mix'] == 'ensemble' and row['tokens'] == weights.sum()
    assert row['nll'] == pytest.approx(nll(blocks, weights, used, kind), rel=2e-6), name


@pytest.mark.parametrize('domain', ALL)
def test_single_experts_and_the_simple_average(done, domain):
  rows, dump, _, stored, _ = done
  blocks, weights = of_domain(dump, domain)
  alone = -(blocks * weights).sum((1, 2)) / weights.sum()
  average = -((np.logaddexp.reduce(blocks) - math.log(E)) * weights).sum() / weights.sum()
  assert rows[domain, 'none', None]['nll'] == pytest.approx(average, rel=2e-6)
  [cached] = [p for p in stored if (p.domain, p.posterior) == (domain, 'prefix')]
  own = corpus.DOMAINS.index(domain) if domain != corpus.NOVEL else np.argmax(cached.log_weights)
  for way, expert in ((None, own), ('dev', np.argmin(cached.nll))):
    row = rows[domain, way, None]
    assert row['mix'] == f'expert:{corpus.DOMAINS[expert]}'
    assert row['nll'] == pytest.approx(alone[expert], rel=2e-6)


def test_on_the_novel_domain_the_experts_are_those_of_the_dev_text(done):
  """Its valid text is code, its test text is verse: what is given must come from valid."""
  rows, _, _, _, out = done
  assert rows[corpus.NOVEL, None, None]['mix'] == 'expert:code'
  assert rows[corpus.NOVEL, 'dev', None]['mix'] == 'expert:code'
  assert rows[corpus.NOVEL, 'updating', 'prefix']['nll'] < rows[corpus.NOVEL, None, None]['nll']
  assert f'{corpus.NOVEL}: demix given, demix best is code' in out


@pytest.mark.parametrize('kind', ['prefix', 'last_token'])
def test_the_cached_prior_is_the_moving_mean_over_full_blocks_of_dev_text(models, stores, tmp_path,
                                                                          done, kind):
  """The dump of the valid text has what it is made of; 9 blocks, the fifth group is one block."""
  file = tmp_path / 'd.npz'
  ended = runs.demix('evaluate', f'--model={models["demix"]}', '--mix=uniform', '--domains=legal',
                     '--split=valid', f'--dump={file}', '--posterior=prefix')
  assert ended.code == 0, ended
  dump = np.load(file)
  blocks, weights = dump['loglik_EBL'].astype(np.float64), dump['weights_BL']
  full = weights.sum(1) == L
  assert blocks.shape[1] > 10 and full.sum() > 9
  blocks = blocks[:, full][:, shuffled(full.sum())[:9]]  # a fixed sample of the whole split
  _, expected = moving(blocks, np.ones(9, bool), kind)
  [stored] = [p for p in done[3] if (p.domain, p.posterior) == ('legal', kind)]
  np.testing.assert_allclose(np.exp(stored.log_weights), np.exp(expected), atol=2e-6)
  assert (stored.blocks, stored.block_length, stored.alpha, stored.blocks_per_update,
          stored.split) == (9, L, 0.3, 2, 'valid')
  np.testing.assert_allclose(stored.nll, -blocks.mean((1, 2)), rtol=2e-6)


def test_the_dump_says_what_it_holds(done):
  _, dump, content, _, _ = done
  assert list(dump['expert_names']) == list(corpus.DOMAINS)
  assert list(dump['domain_names']) == list(ALL)
  B = len(dump['domain_B'])
  assert dump['loglik_EBL'].shape == dump['weights_EBL'].shape == (E, B, L)
  assert dump['targets_BL'].shape == dump['weights_BL'].shape == (B, L)
  assert dump['log_prior_EB'].shape == (E, B) and dump['log_prior_E'].shape == (E,)
  np.testing.assert_allclose(dump['weights_EBL'], 0.25)  # the first way that mixes: average
  assert (str(dump['way']), str(dump['protocol'])) == ('average', 'continuous 32')
  assert json.loads(str(dump['mix']))['prior'] == 'none'
  assert dump['weights_BL'].sum() == sum(
      r['tokens'] for r in content['rows'] if r['prior'] == 'none')


def test_the_json_has_options_priors_and_mean_weights(done):
  _, _, content, stored, out = done
  mixing = content['mixing']['demix']
  assert mixing['options'] == {'blocks': 9}
  assert mixing['read_by'] == {'blocks': ['given', 'best', 'cached prefix', 'cached last_token']}
  assert 'demix is mixed with blocks=9 (given, best, cached prefix, cached last_token)' in out
  assert [p['weights'] for p in mixing['priors']] == [p.weights for p in stored]
  assert set(mixing['mean_weights']) == {'none', *(f'{p} {k}' for p in (
      'uniform', 'updating', 'cached') for k in ('prefix', 'last_token'))}
  for by_domain in mixing['mean_weights'].values():
    for weights in by_domain.values():
      assert math.isclose(sum(weights.values()), 1, rel_tol=1e-5)
  assert mixing['mean_weights']['uniform prefix']['code']['code'] > 0.8
  line = next(x for x in out.splitlines() if x.startswith('legal ') and ' prefix ' in x)
  assert [float(x) for x in line.split()[2:]] == [
      round(w, 3) for w in stored[0].weights.values()]


def test_one_way_alone_and_another_batch_size_give_the_same(done, models, tmp_path):
  rows = done[0]
  for way, key in (('updating', ('updating', 'last_token')), ('given', (None, None))):
    evidence = [f'--posterior={key[1]}'] if key[1] else []
    ended = runs.demix('evaluate', f'--model={models["demix"]}', f'--mix={way}', '--batch_size=3',
                       *evidence, '--domains=code', f'--out={tmp_path / "r.json"}')
    assert ended.code == 0, ended
    [row] = json.loads((tmp_path / 'r.json').read_text())['rows']
    assert row['nll'] == pytest.approx(rows['code', *key]['nll'], rel=1e-6)


def test_experts_k_runs_the_largest_of_the_cached_prior(done, models, tmp_path):
  _, dump, _, stored, _ = done
  ended = runs.demix('evaluate', f'--model={models["demix"]}', '--mix=configs/mix.py:top2',
                     '--mix.blocks=9', f'--out={tmp_path / "r.json"}')
  assert ended.code == 0 and 'experts_k=2' in ended.out, ended
  for row in json.loads((tmp_path / 'r.json').read_text())['rows']:
    [cached] = [p for p in stored if (p.domain, p.posterior) == (row['domain'], 'prefix')]
    log_prior = np.asarray(cached.log_weights)
    log_prior[np.argsort(-log_prior)[2:]] = -np.inf
    log_prior -= np.logaddexp.reduce(log_prior)
    blocks, weights = of_domain(dump, row['domain'])
    assert row['nll'] == pytest.approx(
        nll(blocks, weights, [log_prior] * blocks.shape[1], 'prefix'), rel=2e-6)


def test_stored_priors_are_used_and_refused_for_other_experts(done, models, tmp_path):
  rows, _, _, stored, _ = done
  prior.save(tmp_path / 'p.json', stored)
  W = f'--model={models["demix"]}'
  ended = runs.demix('evaluate', W, '--mix=cached', '--posterior=prefix', '--domains=code,verse',
                     f'--prior={tmp_path / "p.json"}:verse', f'--out={tmp_path / "r.json"}')
  assert ended.code == 0, ended
  got = {r['domain']: r['nll'] for r in json.loads((tmp_path / 'r.json').read_text())['rows']}
  assert got['verse'] == pytest.approx(rows['verse', 'cached', 'prefix']['nll'], rel=1e-6)
  assert got['code'] > rows['code', 'cached', 'prefix']['nll']  # verse's prior on code
  import dataclasses
  other = [dataclasses.replace(p, digests=('x', *p.digests[1:])) for p in stored]
  prior.save(tmp_path / 'o.json', other)
  refused = runs.demix('evaluate', W, '--mix=cached', f'--prior={tmp_path / "o.json"}')
  assert 'had content digest x' in refused.error(3)
  fewer = runs.demix('evaluate', W, '--mix=cached', '--mix.members=code,verse',
                     f'--prior={tmp_path / "p.json"}')
  assert 'estimate it again' in fewer.error(3)


@pytest.mark.parametrize(('flags', 'said'), [
    (['--mix=unifrom'], "did you mean 'uniform'"), (['--mix.decay=0.5'], 'without --mix'),
    (['--mix=uniform', '--posterior=prefx'], "did you mean 'prefix'"),
    (['--mix=cached', '--mix.blocks_per_update=50'], 'a prior needs 50'),
    (['--mix=uniform', '--mix.weights_k=5'], 'weights_k=5 for 4 experts'),
    (['--mix=uniform', '--mix.members=cod'], "did you mean 'code'"),
    (['--mix=configs/mix.py:cached', '--mix.prior=fixed', '--mix.weights.code=0.5'], 'sums to 0.5'),
    (['--dump=d.npz'], '--dump needs --mix'), (['--save_priors=p'], 'needs --mix'),
    (['--mix', '--dump=/no/such/d.npz'], 'make it first'),
    (['--mix', '--prior=/no/such.json'], 'cannot be read')])
def test_what_cannot_be_mixed_is_one_line(models, flags, said):
  assert said in runs.demix('evaluate', f'--model={models["demix"]}', *flags).error(2)


def test_a_dense_lm_has_nothing_to_mix(models):
  assert 'nothing to mix' in runs.demix('evaluate', f'--model={models["dense"]}', '--mix').error(2)
