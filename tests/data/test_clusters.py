"""fit.py, clusterer.py: planted clusters, balance, digests, beginnings of texts."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demix.data.clusters import clusterer as module
from demix.data.clusters.clusterer import Clusterer, Reading, words
from demix.data.clusters.fit import DiscoverConfig, agreement, balanced, embed, fit
from demix.data.tokens.tokenizer import BpeTokenizer, ByteTokenizer
from demix.errors import BadInput

TOPICS = ('court judge appeal statute verdict plaintiff tribunal clause',
          'protein enzyme tissue serum receptor plasma antibody genome',
          'striker goal league referee penalty stadium midfield fixture',
          'violin sonata chord melody cello overture tempo quartet')
TEXT = 'Ein Prélude für violin; 3 CHORDS, a fixture_2 — ΦΩΣ\n\n日本語 chord'


def planted(sizes, seed=0, words_each=12):
  """Shuffled documents of topics, `sizes` of each, with words that all share; and their topics."""
  draw = random.Random(seed)
  labels = [k for k, n in enumerate(sizes) for _ in range(n)]
  draw.shuffle(labels)
  return [' '.join(draw.choices(TOPICS[k].split(), k=words_each)
                   + draw.choices(['time', 'people', 'which', '1984'], k=6) + [f'{i}'])
          for i, k in enumerate(labels)], labels


def config(K=4, **changes):
  return DiscoverConfig(**dict(clusters=K, dimensions=8, block=128) | changes)


def counts(found, texts, labels):
  """Documents [clusters, topics] when each goes to its nearest centre."""
  out = np.zeros((len(found.names), max(labels) + 1), int)
  for text, label in zip(texts, labels):
    out[found.assign(text), label] += 1
  return out


@pytest.fixture(scope='module')
def four():
  texts, labels = planted((60,) * 4)
  return fit(texts, config()), texts, labels


# ---- finding them ------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['balanced', 'kmeans'])
def test_planted_clusters_are_found(four, kind):
  found, texts, labels = four
  if kind == 'kmeans':
    found = fit(texts, config(kind=kind))
  others, topics = planted((10, 5, 20, 40), seed=1)  # text that it was not fitted on
  for t, of in ((texts, labels), (others, topics)):
    assert agreement(counts(found, t, of)) == dict(
        purity=1, adjusted_rand=1, nmi=pytest.approx(1))
  for name, terms in found.about['terms'].items():
    assert {*terms[:5]} <= {*TOPICS[counts(found, texts, labels)[
        found.names.index(name)].argmax()].split()}


def test_unequal_topics_make_equal_clusters():
  sizes = (240, 80, 40, 24)
  texts, labels = planted(sizes)
  found = fit(texts, config())
  in_fit = list(found.about['sizes'].values())
  assert max(in_fit) - min(in_fit) <= 3  # one for each of three blocks
  near = counts(found, texts, labels).sum(1)
  plain = counts(fit(texts, config(kind='kmeans')), texts, labels).sum(1)
  assert sorted(plain) == sorted(sizes)  # the control finds what was planted
  assert near.max() <= 1.5 * sum(sizes) / 4 < plain.max() / 1.5 and near.min() >= sum(sizes) / 8


@pytest.mark.parametrize(('n', 'K'), [(6, 2), (7, 3), (5, 4), (4, 4), (8, 1), (3, 2)])
def test_balanced_assignment_is_the_best_of_all(n, K):
  cost = np.random.default_rng(n * K).random((n, K))
  labels = balanced(cost)
  sizes = np.bincount(labels, minlength=K)
  assert sizes.max() - sizes.min() <= 1 and len(labels) == n
  total = lambda way: sum(cost[i, k] for i, k in enumerate(way))
  best = min(total(way) for way in itertools.product(range(K), repeat=n)
             if np.ptp(np.bincount(way, minlength=K)) <= 1)
  assert total(labels) == pytest.approx(best)


def test_the_same_text_gives_the_same_bits(four):
  found, texts, _ = four
  again = fit(texts, config())
  assert again.fingerprint == found.fingerprint and again.about == found.about
  for name in ('idf', 'components', 'centres'):
    assert getattr(again, name).tobytes() == getattr(found, name).tobytes()
  assert fit(texts, config(seed=1)).fingerprint != found.fingerprint
  largest = np.abs(found.components).argmax(0)  # the sign of each axis
  assert (found.components[largest, np.arange(found.components.shape[1])] > 0).all()


def test_a_random_partition_is_a_hash_and_no_evidence():
  texts, labels = planted((200, 100, 50, 50))
  found = fit(texts, config(kind='random'))
  there = counts(found, texts, labels)
  assert there.sum(1).min() > 70 and agreement(there)['adjusted_rand'] < 0.02
  assert [found.assign(t) for t in texts] == [fit(texts[:9], config(kind='random')).assign(t)
                                              for t in texts]
  assert [found.assign(t) for t in texts] != [
      fit(texts, config(kind='random', seed=1)).assign(t) for t in texts]
  assert [found.assign(w) for w in TOPICS[0].split()] == [0, 3, 1, 2, 1, 1, 3, 1]  # for ever
  assert (found.before(ByteTokenizer(), list(texts[0].encode())) == 0).all()


def test_one_cluster(four):
  _, texts, _ = four
  found = fit(texts[:30], config(1))
  assert {found.assign(t) for t in texts} == {0} and found.about['sizes'] == {'cluster0': 30}


# ---- the embedding -----------------------------------------------------------------------------


def test_a_point_is_what_scikit_learn_makes_of_the_text(four):
  found, texts, _ = four
  points = embed(texts, config())[3]
  np.testing.assert_allclose([found.point(t) for t in texts], points, atol=1e-6)
  np.testing.assert_allclose((points ** 2).sum(1), 1)
  assert (found.point('unknown words only') == 0).all() and (found.point('') == 0).all()


def test_words():
  assert words('The CAT_s 3 cats 2nd x a1 don\'t ΦΩΣ') == [
      'the', 'cat_s', 'cats', 'a1', 'don', 'φως']


@pytest.fixture(scope='module')
def bpe(four):
  return BpeTokenizer.train([*four[1], TEXT], 300)


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
@pytest.mark.parametrize('limit', [0, 30])
def test_what_precedes_a_token_is_its_decoded_text(four, bpe, kind, limit):
  found, texts, _ = four
  made = ByteTokenizer() if kind == 'bytes' else bpe
  ids = [*made.encode([TEXT])[0], made.eod_id, *made.encode([texts[0]])[0]]
  seen = found.before(made, ids, limit)
  ends = lambda t: made.decode(ids[:t]) if made.eod_id not in ids[:t] else (
      TEXT + '\n' + made.decode(ids[ids.index(made.eod_id) + 1:t]))
  expected = [found.distances(found.point(ends(min(t, limit or t)))) for t in range(len(ids))]
  np.testing.assert_allclose(seen, expected, atol=1e-6)
  assert np.ptp(seen[:, 0]) > 0.1
  assert limit == 0 or (seen[limit:] == seen[limit]).all()


def test_what_precedes_a_token_does_not_depend_on_it_or_on_what_follows(four, bpe):
  found, texts, _ = four
  ids, others = (bpe.encode([t])[0][:40] for t in texts[:2])
  seen = found.before(bpe, ids)
  for t in (0, 1, 17, 39):
    changed = found.before(bpe, [*ids[:t], *others[t:]])
    np.testing.assert_array_equal(changed[:t + 1], seen[:t + 1])
  assert np.any(changed != found.before(bpe, others))
  rows = found.before_rows(bpe, [ids, others])
  np.testing.assert_array_equal(rows[:, 0], seen.T)


def test_a_word_that_goes_on_is_another_word(four):
  found = four[0]
  reading, seen = Reading(found, ByteTokenizer()), []
  for c in b'goals goal':
    reading.read(c)
    seen.append(reading.distances)
  origin = found.distances(np.zeros(found.centres.shape[1]))
  assert all((d == origin).all() for i, d in enumerate(seen) if i not in (3, 9))
  np.testing.assert_allclose(seen[3], found.distances(found.point('goal')))


# ---- files -------------------------------------------------------------------------------------


def test_files_are_arrays_and_json(four, tmp_path):
  found = four[0]
  found.save(tmp_path / 'c')
  assert {p.name for p in (tmp_path / 'c').iterdir()} == {
      'idf.npy', 'components.npy', 'centres.npy', 'terms.json', 'meta.json'}
  for file in (tmp_path / 'c').glob('*.npy'):
    assert np.load(file, allow_pickle=False).dtype == np.float32
  loaded = Clusterer.load(tmp_path / 'c')
  assert loaded.fingerprint == found.fingerprint and loaded.about == found.about
  meta = json.loads((tmp_path / 'c/meta.json').read_text())
  assert meta['fingerprint'] == found.fingerprint and meta['about']['documents'] == 240


@pytest.mark.parametrize(('file', 'change'), [
    ('centres.npy', lambda d: d[:-4] + b'\0\0\0\1'), ('idf.npy', lambda d: d[:-4]),
    ('terms.json', lambda d: d.replace(b'cello', b'hello')), ('meta.json', lambda d: b'[1]'),
    ('meta.json', lambda d: d.replace(b'"version": 1', b'"version": 9')), ('components.npy', None)])
def test_a_damaged_clusterer_is_refused(four, tmp_path, file, change):
  four[0].save(tmp_path / 'c')
  path = tmp_path / 'c' / file
  path.write_bytes(change(path.read_bytes())) if change else path.unlink()
  with pytest.raises(BadInput, match='discover') as caught:
    Clusterer.load(tmp_path / 'c')
  assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_clusters_in_another_order_are_the_same_centres(four):
  found = four[0]
  two = found.take(('cluster2', 'cluster0'))
  point = found.point(TOPICS[0])
  np.testing.assert_array_equal(two.distances(point), found.distances(point)[[2, 0]])
  assert two.names == ('cluster2', 'cluster0')


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(('texts', 'K', 'message'), [
    (['a text', 'some words'], 3, '2 documents of train text for 3 clusters'),
    (['', '!', '12'], 2, 'have no word in common'),
    (['one word', 'other thing'], 2, 'min_documents')])
def test_text_that_cannot_be_clustered(texts, K, message):
  with pytest.raises(BadInput, match=message):
    fit(texts, config(K))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(kind='balance'), "did you mean 'balanced'"), (dict(clusters=0), 'discover.clusters=0'),
    (dict(clusterer='W'), 'discover.clusters=4'), (dict(block=3), 'below 4 clusters'),
    (dict(clusters=0, clusterer='W', terms=9), 'other options')])
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(BadInput, match=message):
    config(**changes).check()


def test_it_imports_no_jax_and_scikit_learn_only_to_find_clusters():
  code = ('import sys, demix.data.clusters.fit, demix.data.clusters.discover; '
          'print({"jax", "sklearn", "scipy"} & set(sys.modules))')
  out = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=True,
                       cwd=Path(module.__file__).parents[3]).stdout
  assert out == 'set()\n'
