"""demix/names.py: what can be called so, and paths that files name."""

import json
import os

import numpy as np
import orjson
import pytest

from demix import names
from demix.data.clusters.clusterer import Clusterer
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens import store
from demix.errors import BadInput
from demix.forest import manifest, plan
from demix.lifecycle import forests


def write(file, text):
  file.parent.mkdir(parents=True)
  file.write_text(json.dumps({'text': text}) + '\n')

OUTSIDE = ('', '.', '..', '/', '/tmp', '../store', 'experts/..', 'experts/../..', 'a/../../b',
           './..', 'link', 'link/a', 'a\0b', 'a\nb', 'a/\0', None, 3, ['a'])


@pytest.mark.parametrize('path', OUTSIDE)
def test_a_path_of_a_file_stays_below_its_folder(tmp_path, path):
  folder = tmp_path / 'f'
  (folder / 'experts' / 'a').mkdir(parents=True)
  (folder / 'link').symlink_to(tmp_path)
  with pytest.raises(BadInput, match='is no path below'):
    names.inside(folder, path, 'file')
  entry = {'kind': 'full', 'parents': {}, 'domains': ['d'], 'workdir': path, 'step': 1,
           'content_digest': '0'}
  for forest in ({'experts': {'a': entry}}, {'base': entry}):
    content = {'version': 1, 'plan': None, 'base': None, 'experts': {}} | forest
    (folder / 'forest.json').write_text(json.dumps(content))
    with pytest.raises(BadInput, match='is no path below'):
      forests.remove(folder, 'a')
    assert (folder / 'experts' / 'a').is_dir()


def test_paths_below_a_folder_are_taken(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  for path in ('experts/a', 'seed', 'link/x', 'not there/yet', './a'):
    assert names.inside(tmp_path, path, 'file') == tmp_path / path


@pytest.mark.parametrize('change', [
    {'step': '../../x'}, {'step': True}, {'step': -1}, {'domains': ['../a']}, {'domains': 'a'},
    {'content_digest': None}, {'parents': []}, {'init': {'workdir': 'a\0', 'step': 1}},
    {'init': {'workdir': 3, 'step': 1}}, {'init': {'workdir': 'a', 'step': '..'}}])
def test_an_entry_of_a_forest_is_one(tmp_path, change):
  entry = {'kind': 'full', 'parents': {}, 'domains': ['d'], 'workdir': 'experts/a', 'step': 1,
           'content_digest': '0'}
  content = manifest.empty() | {'experts': {'a': entry}}
  manifest.check(content, tmp_path / 'forest.json')
  content['experts']['a'] = entry | change
  with pytest.raises(BadInput, match='expert a'):
    manifest.check(content, tmp_path / 'forest.json')


@pytest.mark.parametrize('name', ['../x', 'a/b', 'seed', '', '.', 'a\n'])
def test_a_plan_in_a_manifest_has_names_that_can_be_folders(tmp_path, name):
  content = manifest.empty({'base': {}, 'seed': None, 'experts': {name: {'domains': ['d']}}})
  with pytest.raises(BadInput, match='cannot be the name'):
    manifest.check(content, tmp_path / 'forest.json')


def test_an_expert_whose_folder_another_lies_in_is_left(tmp_path):
  entry = {'kind': 'full', 'parents': {}, 'domains': ['d'], 'workdir': 'experts/a', 'step': 1,
           'content_digest': '0'}
  (tmp_path / 'experts' / 'a').mkdir(parents=True)
  with manifest.edit(tmp_path) as forest:
    forest['experts'] = {'a': entry, 'b': entry}
  assert any('another expert lies there' in line for line in forests.remove(tmp_path, 'a'))
  assert (tmp_path / 'experts' / 'a').is_dir()
  forests.remove(tmp_path, 'b')
  assert not (tmp_path / 'experts' / 'a').exists()


# Names that demix keeps for itself, and what no file system or reference takes.
NO_DOMAIN = ('tokenizer', 'Tokenizer', 'clusterer', 'seed', 'nearest', 'random', 'posterior',
             'none', 'a.b', '.hashes', 'a b', 'ä', 'a' * 101, '-/', 'a\n')
DOMAINS = ('hashes', 'card', 'all', 'train', 'experts', 'items', 'model', '1', '-a', '_',
           'cluster0', 'a' * 100)


@pytest.mark.parametrize('name', NO_DOMAIN)
def test_a_name_that_is_taken_is_refused_before_reading(tmp_path, name):
  if '/' not in name:
    folder = tmp_path / 'in' / name
    folder.mkdir(parents=True)  # without a file: what would be read first
    if name[0] != '.':  # hidden folders are none of the domains
      with pytest.raises(BadInput, match='cannot be a domain'):
        prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(tokenizer='bytes'))
  with pytest.raises(BadInput, match='cannot be a domain'):
    prepare('', tmp_path / 's', PrepareConfig(tokenizer='bytes', corpus=(
        {'name': name, 'path': 'x.jsonl'},)))
  if name.lower() not in names.KEPT:
    with pytest.raises(BadInput, match='cannot be the name of an expert'):
      manifest.free(manifest.empty(), name, tmp_path)
    with pytest.raises(BadInput, match='cannot be the name of an expert'):
      plan.check({'base': {}, 'seed': None, 'experts': {name: {'domains': ['d']}}}, 'p')
  assert not (tmp_path / 's').exists()


def test_domains_of_all_other_names_make_a_store(tmp_path):
  for i, name in enumerate(DOMAINS):
    write(tmp_path / 'in' / name / 'train.jsonl', f'text {i}')
  made = prepare(tmp_path / 'in', tmp_path / 's', PrepareConfig(tokenizer='bytes'),
                 say=lambda line: None)
  made.verify()
  assert set(made.domains) == set(DOMAINS)
  assert {p.name for p in (tmp_path / 's').iterdir()} == {*DOMAINS, 'tokenizer', 'card.json'}


@pytest.mark.parametrize('name', ['../store/a', '..', '/tmp', 'a/b', '', 'a\0b', 'a.b'])
def test_a_card_opens_no_other_folder(tmp_path, name):
  write(tmp_path / 'in' / 'a' / 'train.jsonl', 'text')
  config = PrepareConfig(tokenizer='bytes')
  made = prepare(tmp_path / 'in', tmp_path / 's', config, say=lambda line: None)
  whole = made.card['domains']['a']
  for domains in ({name: whole}, {'a': whole | {'splits': {name: whole['splits']['train']}}}):
    (tmp_path / 's' / 'card.json').write_bytes(orjson.dumps(made.card | {'domains': domains}))
    with pytest.raises(BadInput, match='cannot be a'):
      store.TokenStore.open(tmp_path / 's')


def test_a_clusterer_names_domains(tmp_path):
  (tmp_path / 'c').mkdir()
  for given in (['../a'], ['a', 'a'], [3]):
    meta = {'version': 1, 'names': given, 'kind': 'random', 'seed': 0, 'about': {}}
    (tmp_path / 'c' / 'meta.json').write_text(json.dumps(meta))
    (tmp_path / 'c' / 'terms.json').write_text('[]')
    for array in ('idf', 'components', 'centres'):
      np.save(tmp_path / 'c' / f'{array}.npy', np.zeros((1, 1), np.float32))
    with pytest.raises(BadInput, match='broken clusterer'):
      Clusterer.load(tmp_path / 'c')


def test_names_of_files_are_shown_as_text():
  assert names.shown(os.fsdecode(b'caf\xe9.txt')) == 'caf\\xe9.txt'
  assert names.shown('café.txt') == 'café.txt'
