"""`prepare --discover`: a store of clusters holds every document once, whatever its label was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpus_cases import snapshot, verb, write
from test_clusters import planted

from demix.data.clusters.clusterer import Clusterer
from demix.data.clusters.discover import discover, documents, sample
from demix.data.clusters.fit import DiscoverConfig
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.overlap import leakage
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

ROOT = Path(__file__).parents[2]
BYTES = PrepareConfig(tokenizer='bytes', novel=('target',))
FOUR = DiscoverConfig(clusters=4, dimensions=8)
QUIET = lambda line: None


def splits(sizes, seed):
  """{split: documents} of planted topics; one document stands in train twice and in test."""
  out = {s: planted(tuple(n * m for n in sizes), seed + i)[0]
         for i, (s, m) in enumerate((('train', 5), ('valid', 1), ('test', 2)))}
  out['train'].append(out['train'][0])
  out['test'].append(out['train'][0])
  return out


def labelled(folder, **corpus):
  write(folder / 'in', corpus or {'a': splits((4, 4, 0, 1), 0), 'b': splits((0, 0, 4, 3), 10),
                                  'target': splits((0, 3, 1, 0), 20)})
  return prepare(folder / 'in', folder / 'labelled', BYTES, QUIET)


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('discover')
  source = labelled(folder)
  return source, discover(source.path, folder / 'out', FOUR, QUIET)


def texts(store, split, names):
  return [store.tokenizer().decode(ids) for d in names if split in store.splits(d)
          for ids in documents(store, d, split)]


def test_every_document_is_there_once_in_the_split_it_was_in(stores):
  source, store = stores
  store.verify()
  assert store.domains == (*(f'cluster{i}' for i in range(4)), 'target')
  assert store.roles == {**dict.fromkeys(store.domains[:4], 'train'), 'target': 'novel'}
  for split in ('train', 'valid', 'test'):
    assert sorted(texts(store, split, store.domains[:4])) == sorted(texts(source, split, 'ab'))
    assert texts(store, split, ['target']) == texts(source, split, ['target'])
    for domain in store.domains:
      rows = store.documents(domain, split)
      assert (np.diff(rows[:, 0], prepend=0) - 1 == rows[:, 1]).all()
  assert store.tokenizer_meta == source.tokenizer_meta


def test_each_document_is_in_the_cluster_that_its_text_alone_gives(stores):
  _, store = stores
  found = Clusterer.load(store.path)
  assert found.fingerprint == store.card['clusterer']['fingerprint']
  for k, name in enumerate(found.names):
    for split in store.splits(name):
      assert {found.assign(t) for t in texts(store, split, [name])} == {k}
  # A document that is in two splits is a duplicate in one cluster.
  pairs = store.card['duplicates']
  assert sum(p['documents'] for p in pairs) == 3  # one of each domain
  assert all(p['a'].split('/')[0] == p['b'].split('/')[0] for p in pairs)


def test_the_card_says_who_was_put_where(stores):
  _, store = stores
  facts = store.card['clusterer']
  assert facts['labels'] == ['a', 'b'] and set(facts['agreement']) == {'train', 'valid', 'test'}
  counts = np.asarray(facts['documents']['train'])
  assert counts.sum(0).tolist() == [46, 36] and (counts.sum(1) > 9).all()
  for name, row in zip(store.domains, counts):
    assert row.sum() == store.card['domains'][name]['splits']['train']['documents']
  assert facts['agreement']['train']['purity'] == counts.max(1).sum() / counts.sum()
  found = Clusterer.load(store.path)
  mass = dict.fromkeys(found.names, 0)
  for text in texts(store, 'train', ['target']):
    mass[found.names[found.assign(text)]] += len(text.encode()) + 1
  assert facts['tokens']['target']['train'] == mass


def test_the_card_says_what_clusters_share_in_text_and_words(stores):
  _, store = stores
  assert store.card['leakage'] == leakage.leakage(store)
  leaked = store.card['leakage']['overlap']
  for pair in store.card['duplicates']:  # planted: a train document that is a test document too
    train, test = sorted((pair['a'], pair['b']), key=lambda name: name.endswith('test'))
    [found] = [e for e in leaked if (e['train'], e['evaluation']) == (train, test)]
    assert found['documents'] > 0
  assert set(store.card['vocabulary']['overlap']) >= set(store.domains[:4])


def test_labels_and_order_do_not_matter_where_documents_go(stores, tmp_path):
  source, store = stores
  pooled = {s: texts(source, s, 'ab')[::-1] for s in ('train', 'valid', 'test')}
  other = labelled(tmp_path, all=pooled, target=splits((0, 3, 1, 0), 20))
  assert sample(other, 40) == sample(source, 40) and len(sample(other, 999)) == len(
      {*pooled['train']})
  again = discover(other.path, tmp_path / 'out', FOUR, QUIET)
  assert again.card['clusterer']['fingerprint'] == store.card['clusterer']['fingerprint']
  assert again.card['clusterer']['agreement'] == {}  # one label says nothing
  for name in store.domains:
    assert sorted(texts(again, 'train', [name])) == sorted(texts(store, 'train', [name]))


@pytest.mark.long
def test_other_processes_make_the_same_store(stores, tmp_path):
  """Other hash seeds, other numbers of threads: the same bytes."""
  source, store = stores
  code = ('import sys\nfrom demix.data.clusters.fit import DiscoverConfig\n'
          'from demix.data.clusters.discover import discover\n'
          'discover(sys.argv[1], sys.argv[2], DiscoverConfig(clusters=4, dimensions=8), print)')
  done = [subprocess.Popen([sys.executable, '-c', code, source.path, tmp_path / seed], cwd=ROOT,
                           stdout=subprocess.DEVNULL, env=os.environ | {
                               'PYTHONHASHSEED': seed, 'OMP_NUM_THREADS': seed,
                               'OPENBLAS_NUM_THREADS': seed}) for seed in ('1', '2')]
  assert [p.wait() for p in done] == [0, 0]
  contents = lambda folder: {p: data for p, (data, _, _) in snapshot(Path(folder)).items()}
  assert contents(tmp_path / '1') == contents(tmp_path / '2') == contents(store.path)


def test_more_text_goes_to_clusters_that_were_found_before(stores, tmp_path):
  _, store = stores
  more = labelled(tmp_path, new=splits((1, 2, 3, 1), 77), target=splits((1, 0, 0, 0), 7))
  out = discover(more.path, tmp_path / 'out', DiscoverConfig(clusterer=str(store.path)), QUIET)
  assert out.card['clusterer']['fingerprint'] == store.card['clusterer']['fingerprint']


def test_the_verb_takes_a_corpus_or_a_store_and_has_nothing_to_do_twice(tmp_path, capsys):
  labelled(tmp_path)
  there = (f'--out={tmp_path / "out"}', '--discover.dimensions=8', '--discover=4')
  code, out, err = verb(capsys, f'--input={tmp_path / "labelled"}', *there)
  assert code == 0, err
  assert 'a token store of 4 clusters' in out and 'purity' in out and 'violin' in out
  before = snapshot(tmp_path / 'out')
  code, out, _ = verb(capsys, f'--input={tmp_path / "labelled"}', *there)
  assert code == 0 and 'nothing to do' in out and snapshot(tmp_path / 'out') == before
  fresh = (f'--out={tmp_path / "fresh"}', *there[1:], f'--input={tmp_path / "in"}',
           '--config.tokenizer=bytes', '--config.novel=target')
  assert verb(capsys, *fresh)[0] == 0
  card, other = (json.loads((tmp_path / f / 'card.json').read_text()) for f in ('out', 'fresh'))
  assert card['fingerprint'] == other['fingerprint']
  assert TokenStore.open(tmp_path / 'fresh_domains').domains == ('a', 'b', 'target')


@pytest.mark.parametrize(('flags', 'message'), [
    (['--discover=many'], '--discover=many: neither'),
    (['--discover'], 'give a number of clusters'),
    (['--discover=4', '--discover.kinds=random'], "no such key (did you mean 'kind'?)"),
    (['--discover.kind=random'], 'give a number of clusters'),
    (['--discover=400'], 'documents of train text for 400 clusters'),
    (['--discover=4', '--config.vocab_size=300'], 'it is a token store'),
    (['--discover.clusterer=nowhere'], 'no such file of a clusterer')])
def test_what_cannot_be_discovered(stores, tmp_path, capsys, flags, message):
  code, _, err = verb(capsys, f'--input={stores[0].path}', f'--out={tmp_path / "out"}', *flags)
  assert code == 2 and message in err and err.startswith('error: ') and err.count('\n') == 1
  assert not any(tmp_path.iterdir())


def test_a_cluster_without_documents_and_a_name_that_is_taken(tmp_path):
  same = {s: ['violin chord melody'] * 9 for s in ('train', 'valid')}
  store = labelled(tmp_path, a=same | {'train': [f'violin {"chord " * i}' for i in range(1, 9)]},
                   target=same)
  with pytest.raises(BadInput, match=r'no train document falls into cluster\d of 7'):
    discover(store.path, tmp_path / 'out', DiscoverConfig(clusters=7, dimensions=1), QUIET)
  write(tmp_path / 'x', {'a': splits((2, 2), 0), 'cluster1': splits((2, 2), 1)})
  store = prepare(tmp_path / 'x', tmp_path / 'y', PrepareConfig(
      tokenizer='bytes', novel=('cluster1',)), QUIET)
  with pytest.raises(BadInput, match="a novel domain is called 'cluster1'"):
    discover(store.path, tmp_path / 'out', DiscoverConfig(clusters=2, dimensions=2), QUIET)
  with pytest.raises(BadInput, match='is the store that is read'):
    discover(store.path, store.path, DiscoverConfig(clusters=2), QUIET)
  assert {p.name for p in tmp_path.iterdir()} == {'in', 'labelled', 'x', 'y'}
