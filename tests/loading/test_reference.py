"""demix/loading/reference.py: one syntax for a model wherever it is named."""

import os
import shutil
from pathlib import Path

import corpus
import jax
import numpy as np
import pytest
from checkpoint_cases import flip

from demix.checkpoints import checkpoint
from demix.errors import BadInput, NothingToLoad
from demix.loading.reference import Reference, load, named, parse
from demix.model.params import expert_slice


@pytest.mark.parametrize(('text', 'expected'), [
    ('W', Reference(Path('W'))), ('a/b.c-d/W_1', Reference(Path('a/b.c-d/W_1'))),
    ('/runs/W/', Reference(Path('/runs/W'))), ('W@0', Reference(Path('W'), 0)),
    ('W@20000', Reference(Path('W'), 20000)), ('W#legal', Reference(Path('W'), None, 'legal')),
    ('W@7#le-gal_2', Reference(Path('W'), 7, 'le-gal_2')), ('..', Reference(Path('..'))),
    ('my runs/W', Reference(Path('my runs/W')))])
def test_references(text, expected):
  assert parse(text) == expected


@pytest.mark.parametrize('text', ['', '@3', '#legal', 'W@', 'W#', 'W@x', 'W@-1', 'W#legal@3',
                                  'W@1@2', 'W#a#b', 'W#a b', 'W@1#'])
def test_what_is_no_reference_is_refused(text):
  with pytest.raises(BadInput, match=r'is not W, W@STEP or W#EXPERT'):
    parse(text)


@pytest.mark.parametrize(('text', 'expected'), [
    ('forest:runs/F', Reference(Path('runs/F'), forest=True)),
    ('forest:F#legal', Reference(Path('F'), None, 'legal', True)),
    ('forest:a/F#law/civil-2', Reference(Path('a/F'), None, 'law/civil-2', True))])
def test_references_to_a_forest(text, expected):
  assert parse(text) == expected


@pytest.mark.parametrize('text', ['forest:', 'forest:F@3', 'forest:F#'])
def test_what_is_no_reference_to_a_forest_is_refused(text):
  with pytest.raises(BadInput, match='is not forest:F or forest:F#EXPERT'):
    parse(text)


NAMES = ['W', 'W@7', 'W#legal', 'W@7#legal', 'W#', '@', '#', '@7', '#legal', 'a=b', 'a:b',
         'forest:W', 'hf:W', 'W@7@8', 'W#a#b', 'W 1', 'W\n1', '…', 'W.py:1']


@pytest.mark.parametrize('there', [False, True])
def test_a_reference_is_read_as_it_was_made_whatever_folders_are_called(tmp_path, monkeypatch,
                                                                        there):
  """Above the workdir and as its name, absolute and relative, with folders of all these names
  beside it or without any."""
  monkeypatch.chdir(tmp_path)
  for above in NAMES if there else ():
    for name in NAMES:
      (tmp_path / above / name / 'checkpoints').mkdir(parents=True)
      (tmp_path / above / name / 'forest.json').write_text('')
  ends = [{}, {'step': 0}, {'step': 7}, {'expert': 'legal'}, {'step': 7, 'expert': 'le-gal_2'},
          {'forest': True}, {'forest': True, 'expert': 'b'}, {'forest': True, 'expert': 'W/b'}]
  for above in ('', '.', tmp_path, *NAMES, *(tmp_path / n for n in NAMES)):
    for name in NAMES:
      for end in ends:
        made = Reference(Path(above, name), **end)
        assert parse(str(made)) == made == parse(made), str(made)


def test_what_exists_is_preferred_and_a_slash_ends_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('W', 'W@7', 'me@host/W', 'run#1', 'a=b'):
    Path(name, 'checkpoints').mkdir(parents=True)
  Path('W#legal').mkdir()  # no model
  assert parse('W@7') == Reference(Path('W@7')) and parse('W/@7') == Reference(Path('W'), 7)
  assert parse('W@7@3') == Reference(Path('W@7'), 3)
  assert parse('W#legal') == Reference(Path('W'), None, 'legal')
  assert parse('me@host/W@20#law') == Reference(Path('me@host/W'), 20, 'law')
  assert parse('me@host/X') == Reference(Path('me@host/X'))  # not there: still no step
  assert parse('run#1') == Reference(Path('run#1'))
  assert named('a=b') == ('', 'a=b') and named('a=./b') == ('a', './b')
  assert named('c=W@7') == ('c', 'W@7') and named('./c=W') == ('', './c=W')
  assert named('c=a=b') == ('c', 'a=b') and named('x@1=W') == ('', 'x@1=W')


@pytest.mark.parametrize('text', ['hf:DIR'])
def test_kinds_that_are_not_built_are_refused(text):
  with pytest.raises(BadInput, match='not built yet'):
    parse(text)


@pytest.fixture
def copy(models, tmp_path):
  return shutil.copytree(models['demix'], tmp_path / 'W')


def canonical(loaded):
  return {n: np.asarray(x) for n, x in loaded.model.canonical(loaded.params).items()}


def saved(workdir, step):
  directory = workdir / 'checkpoints'
  like = {n: jax.ShapeDtypeStruct(shape, dtype)
          for n, (shape, dtype) in checkpoint.names(directory, step).items() if 'params/' in n}
  return {n.removeprefix('params/'): np.asarray(x)
          for n, x in checkpoint.restore(directory, step, like).items()}


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_workdir_is_its_newest_checkpoint_and_a_step_that_one(models):
  newest, early = load(str(models['demix'])), load(f'{models["demix"]}@20')
  assert (newest.step, early.step) == (40, 20) and newest.expert is None
  assert newest.meta == checkpoint.read_meta(models['demix'] / 'checkpoints', 40)
  assert newest.domains == newest.model.config.experts == corpus.DOMAINS
  assert newest.config.model.d_model == 16
  same(canonical(newest), saved(models['demix'], 40))
  same(canonical(early), saved(models['demix'], 20))
  assert np.any(canonical(newest)['embed/tokens'] != canonical(early)['embed/tokens'])


@pytest.mark.parametrize('domain', corpus.DOMAINS)
def test_an_expert_is_a_dense_model_with_its_leaves_and_the_trunk(models, domain):
  taken = load(f'{models["demix"]}@20#{domain}')
  assert (taken.expert, taken.model.config.ffn, taken.model.config.experts) == (domain, 'dense', ())
  everything = saved(models['demix'], 20)
  own = {n.replace(f'/experts/{domain}', ''): x for n, x in everything.items()
         if '/experts/' not in n or f'/experts/{domain}/' in n}
  same(canonical(taken), own)
  assert sum(x.size for x in own.values()) == load(str(models['dense'])).model.counts()[0]


def test_an_expert_computes_what_the_whole_model_computes_for_its_domain(models):
  whole = load(str(models['demix']))
  tokens = np.random.default_rng(0).integers(0, 257, (8, 32))
  routes = np.arange(8) % 4
  hidden, _, _ = whole.model.apply(whole.params, tokens, routes)
  for e, domain in enumerate(corpus.DOMAINS):
    model, params = expert_slice(whole.model, whole.params, domain)
    alone, _, _ = model.apply(params, tokens, 0)
    np.testing.assert_allclose(alone[routes == e], hidden[routes == e], rtol=1e-5, atol=1e-5)
    assert np.abs(alone[routes != e] - hidden[routes != e]).max() > 1e-2


@pytest.mark.parametrize(('suffix', 'text'), [
    ('@30', r'no checkpoint of step 30 \(there: 20, 40\)'),
    ('#lega', r"no expert 'lega' \(did you mean 'legal'\?\)"),
    ('#mixed', r"no expert 'mixed'"), ('@30#legal', 'no checkpoint of step 30')])
def test_a_step_or_expert_that_is_not_there(models, suffix, text):
  with pytest.raises(BadInput, match=text):
    load(f'{models["demix"]}{suffix}')


def test_a_dense_model_has_no_experts(models):
  with pytest.raises(BadInput, match='a dense LM has no experts; leave out #legal'):
    load(f'{models["dense"]}#legal')


def test_a_place_without_a_model(models, tmp_path):
  with pytest.raises(BadInput, match='no such workdir'):
    load(str(tmp_path / 'none'))
  with pytest.raises(BadInput, match='no finished checkpoint: train it first'):
    load(str(tmp_path))


def test_a_bad_newest_checkpoint_is_named_and_the_one_before_loaded(copy, capsys):
  flip(0.5)(copy / 'checkpoints/40/meta.json')
  loaded = load(str(copy))
  assert loaded.step == 20
  same(canonical(loaded), saved(copy, 20))
  err = capsys.readouterr().err
  assert err.startswith(f'warning: checkpoint {copy / "checkpoints/40"} is not used: meta.json')
  assert err.count('\n') == 1
  with pytest.raises(NothingToLoad, match=r'40 is bad: meta\.json'):  # named, so no other will do
    load(f'{copy}@40')
  os.truncate(copy / 'checkpoints/20/digests.json', 3)
  with pytest.raises(NothingToLoad, match='bad: 40, 20'):
    load(str(copy))


def test_a_model_is_loaded_without_its_store(models, copy, stores, monkeypatch):
  """A checkpoint says all that is needed: the store may be gone, or elsewhere."""
  from demix.data.tokens.store import TokenStore
  monkeypatch.setattr(TokenStore, 'open', None)
  same(canonical(load(str(copy))), saved(models['demix'], 40))
