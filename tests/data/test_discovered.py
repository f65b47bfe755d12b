"""c-BTM from end to end: discover, train, evaluate by clusters, write; and importance sampling."""

import json

import corpus
import mixtures
import numpy as np
import pytest
import runs

import demix
from demix.data.clusters.clusterer import Clusterer
from demix.data.sampling.batches import Batches, DataConfig
from demix.data.sampling.importance import shares, weight
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

NAMES = ('cluster0', 'cluster1', 'cluster2')
TEXT = corpus.document('code', 'a text 7') + ' ' + corpus.document('legal', 'a text 8')


@pytest.fixture(scope='module')
def clustered(stores, tmp_path_factory):
  """The tiny corpus in three clusters, whatever its labels."""
  out = tmp_path_factory.mktemp('clusters') / 'store'
  ended = runs.demix('prepare', f'--input={stores.bytes}', f'--out={out}', '--discover=3',
                     '--discover.dimensions=4')
  assert ended.code == 0, ended
  return out


@pytest.fixture(scope='module')
def lm(clustered, tmp_path_factory):
  """A DEMix LM on the clusters."""
  workdir = tmp_path_factory.mktemp('clusters_lm') / 'W'
  ended = runs.train(clustered, workdir, model__ffn='demix', data__batch_size=9, train__steps=30,
                     optimizer__schedule_steps=30)
  assert ended.code == 0, ended
  return workdir


def evaluate(model, *more):
  return runs.demix('evaluate', f'--model={model}', '--mix=clusters,average,uniform',
                    '--posterior=prefix', *more)


def test_evaluation_mixes_by_what_each_block_says_before_a_token(lm, clustered, stores, tmp_path):
  """On the store with the labels, which no member was trained on by name."""
  ended = evaluate(lm, f'--data={stores.bytes}', f'--out={tmp_path / "r.json"}',
                   f'--dump={tmp_path / "d.npz"}', '--mix.kernel=d4',
                   '--mix.kernel_temperature=0.3')
  assert ended.code == 0, ended
  content = json.loads((tmp_path / 'r.json').read_text())
  rows = {(r['domain'], r['posterior']): r for r in content['rows'] if r['prior'] != 'none'}
  dump, store = np.load(tmp_path / 'd.npz'), TokenStore.open(stores.bytes)
  found, made = Clusterer.load(clustered), store.tokenizer()
  assert dump['expert_names'].tolist() == list(NAMES)
  for d, domain in enumerate(dump['domain_names']):
    nats, tokens = 0.0, 0
    for b in np.flatnonzero(dump['domain_B'] == d):
      ids, L = dump['targets_BL'][b], int(dump['weights_BL'][b].sum())
      near = np.stack([found.distances(found.point(
          made.decode(ids[:t]) if store.eod_id not in ids[:t] else '\n'.join(
              made.decode(part) for part in np.split(ids[:t], np.flatnonzero(
                  ids[:t] == store.eod_id) + 1)))) for t in range(L)], 1)
      np.testing.assert_allclose(dump['distances_EBL'][:, b, :L], near, atol=1e-5)
      weights = np.stack([mixtures.gate(-near[:, t] ** 2 / 0.3) for t in range(L)], 1)
      np.testing.assert_allclose(dump['weights_EBL'][:, b, :L], weights, atol=1e-4)
      nats -= mixtures.mixed(weights, dump['loglik_EBL'][:, b, :L]).sum()
      tokens += L
    row = rows[domain, 'clusters']
    assert (row['mix'], row['prior'], row['tokens']) == ('ensemble', 'uniform', tokens)
    assert row['nll'] == pytest.approx(nats / tokens, rel=1e-5)
    assert rows[domain, 'prefix']['nll'] != row['nll']
  options = content['mixing']['W']
  assert options['options'] == {'kernel': 'd4', 'kernel_temperature': 0.3}
  assert set(map(tuple, options['read_by'].values())) == {('clusters',)}
  assert content['heldout'] == []  # all of its text was cut into clusters
  assert sum(options['mean_weights']['uniform clusters']['legal'].values()) == pytest.approx(1)


def test_a_first_part_that_is_not_scored_can_be_all_that_is_looked_at(lm, tmp_path):
  """Strided windows: the first 8 tokens of each are context, its weights come from them."""
  ended = runs.demix('evaluate', f'--model={lm}', '--mix=clusters', '--mix.kernel_tokens=8',
                     '--stride=24', '--domains=cluster0', f'--dump={tmp_path / "d.npz"}')
  assert ended.code == 0, ended
  dump = np.load(tmp_path / 'd.npz')
  context = (dump['weights_BL'][:, :8] == 0).all(1) & (dump['weights_BL'][:, 8] == 1)
  assert context.sum() >= len(context) - 2
  weights = dump['weights_EBL'][:, context]
  assert (weights[..., 8:] == weights[..., 8:9]).all() and np.ptp(weights[:, :, 8], 1).max() > 0.1


def test_python_scores_and_writes_by_clusters_and_looks_at_nothing_later(lm):
  near = demix.load(str(lm), {'posterior': 'clusters'})
  score, other = near.score(TEXT), near.score(TEXT[:40] + 'Z' + TEXT[41:])
  assert score.experts == NAMES
  # Blocks of 32: byte 40 is the ninth of the second.
  np.testing.assert_array_equal(score.weights[:, :41], other.weights[:, :41])
  np.testing.assert_array_equal(score.logp[:40], other.logp[:40])
  assert np.any(score.weights[:, 41:64] != other.weights[:, 41:64])
  assert np.ptp(score.weights, 1).max() > 0.3
  np.testing.assert_allclose(score.weights[:, ::32], score.weights[:, :1].repeat(
      score.weights[:, ::32].shape[1], 1))  # every block starts anew
  out = near.generate(TEXT[:20], max_tokens=8, temperature=0.0)
  whole = near.score(np.concatenate([near.ids(TEXT[:20]), out.ids]))
  for found in (near.weights(TEXT[:20]), out.after_prompt):
    assert found == pytest.approx(dict(zip(NAMES, whole.weights[:, 20])), abs=1e-5)
  assert list(out.weights.values()) == pytest.approx(whole.weights[:, 20:28].mean(1), abs=1e-5)
  ended = runs.demix('generate', f'--model={lm}', f'--prompt={TEXT[:20]}', '--max_tokens=8',
                     '--temperature=0', '--mix.posterior=clusters')
  assert ended.code == 0 and ended.out.strip() == str(out).strip()


def test_the_nearest_cluster_alone_is_its_expert(lm):
  top = demix.load(str(lm), {'posterior': 'clusters', 'weights_k': 1}).score(TEXT)
  alone = np.stack([demix.load(f'{lm}#{name}').score(TEXT).logp for name in NAMES])
  assert {*top.weights.ravel()} == {0, 1}
  chosen = top.weights.argmax(0)
  np.testing.assert_allclose(top.logp, alone[chosen, range(len(top.logp))], atol=1e-5)


def test_a_forest_is_mixed_by_the_clusters_that_its_experts_were_trained_on(clustered, tmp_path):
  """Experts have names of their own, in another order."""
  from test_forest import config_file, forest
  changes = {'train': {'steps': 2}, 'data': {'batch_size': 3}}
  file = config_file(tmp_path, **{
      name: {'domains': [cluster], 'parent': 'random', 'changes': changes}
      for name, cluster in zip('zyx', NAMES)})
  plan = json.loads((tmp_path / 'plan.json').read_text())
  plan['base']['data'] |= {'domains': list(NAMES), 'batch_size': 6}
  (tmp_path / 'plan.json').write_text(json.dumps(plan | {'seed': None}))
  assert forest('plan', f'--config={file}', f'--forest={tmp_path / "F"}',
                f'--data={clustered}').code == 0
  assert forest('run', f'--forest={tmp_path / "F"}').code == 0
  found = Clusterer.load(clustered)
  mixed = demix.load(f'forest:{tmp_path / "F"}', {'posterior': 'clusters', 'members': ('x', 'z')})
  score = mixed.score(TEXT)
  assert mixed.experts == ('z', 'x') and mixed.clusterer.names == ('cluster0', 'cluster2')
  near = found.distances(found.point(TEXT[:31]))[[0, 2]]
  np.testing.assert_allclose(score.weights[:, 31], mixtures.gate(-near / 0.1), atol=1e-5)


# ---- refusals ----------------------------------------------------------------------------------


def test_another_clusterer_and_models_without_clusters_are_refused(lm, clustered, models, stores,
                                                                  tmp_path):
  error = evaluate(models['demix'], f'--mix.clusterer={clustered}').error(2)
  assert 'was not trained on one of the clusters' in error
  assert 'no such file of a clusterer' in evaluate(models['demix']).error(2)
  assert 'no such file of a clusterer' in evaluate(lm, f'--mix.clusterer={stores.bytes}').error(2)
  assert runs.demix('prepare', f'--input={stores.bytes}', f'--out={tmp_path / "other"}',
                    '--discover=3', '--discover.kind=random').code == 0
  error = evaluate(lm, f'--mix.clusterer={tmp_path / "other"}').error(3)
  assert 'was trained on clusters of the clusterer' in error and '--mix.clusterer' in error
  assert "mean 'clusters'" in runs.demix('evaluate', f'--model={lm}', '--mix=cluster').error(2)


# ---- importance sampling -----------------------------------------------------------------------


def test_resampling_has_the_targets_histogram_and_draws_evenly_within_a_cluster(clustered):
  store = TokenStore.open(clustered)
  found = shares(store, corpus.NOVEL)
  assert sum(found.values()) == pytest.approx(1)
  general = {n: len(store.tokens(n, 'train')) for n in NAMES}
  for name, w in weight(store, corpus.NOVEL).items():
    assert w * general[name] / sum(general.values()) == pytest.approx(found.get(name, 0))
  config = DataConfig(domains=tuple(found), sampling='weights', weights=found, sequence_length=48,
                      batch_size=8)
  batches, drawn, seen = Batches(store, config, 0), np.zeros(len(found)), {}
  count = 40
  for t in range(count):
    batch = batches[t]
    for d, row in zip(batch['domain_B'], batch['targets_BL']):
      drawn[d] += 1
      key = (d, row.tobytes())
      seen[key] = seen.get(key, 0) + 1
  np.testing.assert_allclose(drawn, np.asarray(list(found.values())) * count * 8, atol=2)
  for d, name in enumerate(found):  # no sequence of a cluster twice before all were there
    times = [n for (of, _), n in seen.items() if of == d]
    assert sum(times) == drawn[d] and max(times) <= -(-drawn[d] // (general[name] // 48))


@pytest.mark.long
def test_a_config_resamples_for_a_target(clustered, stores, tmp_path):
  ended = runs.demix('train', f'--config={runs.ROOT / "configs/importance.py"}:{clustered},'
                     f'{corpus.NOVEL}', f'--workdir={tmp_path / "W"}', *(
                         f'--config.{k}={v}' for k, v in runs.TINY.items()))
  assert ended.code == 0, ended
  saved = json.loads((tmp_path / 'W/config.json').read_text())['config']['data']
  assert saved['weights'] == shares(TokenStore.open(clustered), corpus.NOVEL)
  assert saved['sampling'] == 'weights' and 0 < len(saved['domains']) <= 3
  store = TokenStore.open(clustered)
  for (of, target), message in {
      (stores.bytes, corpus.NOVEL): 'has no clusters', (clustered, 'mixt'): "did you mean 'mixed'",
      (clustered, 'cluster0'): 'no target'}.items():
    with pytest.raises(BadInput, match=message):
      shares(TokenStore.open(of), target)
  with pytest.raises(BadInput, match='has no dev text'):
    shares(store, corpus.NOVEL, 'dev')
