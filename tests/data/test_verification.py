"""verification.py: data that changed under its card ends the run before it saves."""

import shutil

import corpus
import pytest
import runs

from demix.checkpoints import catalogue
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.lifecycle.grow import grow
from demix.training import metrics

pytestmark = pytest.mark.exact


@pytest.fixture
def store(stores, tmp_path):
  return shutil.copytree(stores.bytes, tmp_path / 'store')


def corrupt(store, domain: str, split: str):
  """Changes one id; the size stays."""
  file = store / domain / split / 'tokens.bin'
  data = bytearray(file.read_bytes())
  data[len(data) // 4 * 2] ^= 1
  file.write_bytes(data)
  return file


@pytest.mark.parametrize('split', ['train', 'valid'])
def test_a_changed_file_ends_the_run_before_its_first_checkpoint(store, tmp_path, split):
  before = (store / 'verse' / split / 'tokens.bin').read_bytes()
  file, W = corrupt(store, 'verse', split), tmp_path / 'W'
  said = runs.train(store, W, train__checkpoint_every=1).error(2)
  assert said.startswith(f'{file}: digest ') and 'card.json says' in said
  assert catalogue.steps(W / 'checkpoints') == []
  file.write_bytes(before)
  assert runs.train(store, W).code == 0  # nothing of it is left in the way
  corrupt(store, 'verse', split)
  said = runs.train(store, W, train__steps=9, optimizer__restart=8).error(2)  # resumed
  assert str(file) in said and catalogue.steps(W / 'checkpoints') == [4, 8]


def test_what_is_not_read_is_not_looked_at_and_who_must_may(store, tmp_path):
  for domain, split in (('mixed', 'train'), ('verse', 'test'), ('code', 'train')):
    corrupt(store, domain, split)
  assert runs.train(store, tmp_path / 'A', data__domains='verse', train__steps=2).code == 0
  assert 'code/train/tokens.bin' in runs.train(store, tmp_path / 'B', train__steps=2).error(2)
  argv = runs.overrides(store, tmp_path / 'B', train__steps=2)
  assert runs.demix('train', '--verify_data=false', *argv).code == 0


def test_gates_and_merges_verify_what_they_read(store, adapted, models, tmp_path):
  """The text that an expert is compared on, or weights are estimated on."""
  file = corrupt(store, corpus.NOVEL, 'valid')
  forest, data = f'--forest={tmp_path / "F"}', f'--data={store}'
  assert runs.demix('forest', 'add', forest, '--expert=a', f'--from={models["demix"]}').code == 0
  source = f'--from={adapted["better"]}'
  two = [f'--model={adapted[n]}' for n in ('better', 'worse')]
  for argv in (['forest', 'add', forest, '--expert=b', source, data],
               ['forest', 'add', f'--model={models["demix"]}', '--expert=b', source, data,
                f'--workdir={tmp_path / "W"}'],
               ['merge', *two, data, f'--guard={corpus.NOVEL}', f'--workdir={tmp_path / "M"}'],
               ['merge', *two, data, '--weights=posterior', f'--domain={corpus.NOVEL}',
                f'--workdir={tmp_path / "M"}']):
    assert str(file) in runs.demix(*argv).error(2)
  assert runs.demix(*argv, '--verify_data=false').code == 0


def test_only_the_domains_and_splits_asked_for_are_verified(store):
  file = corrupt(store, 'code', 'valid')
  opened = TokenStore.open(store)
  opened.verify(('verse', 'legal'))
  opened.verify(splits=('train', 'test'))
  for asked in ({}, {'domains': ('code',)}, {'splits': ('valid',)}):
    with pytest.raises(BadInput, match=str(file)):
      opened.verify(**asked)


@pytest.mark.parametrize('early', [True, False])
def test_the_first_checkpoint_waits_and_an_early_finding_ends_the_run_early(
    store, tmp_path, monkeypatch, early):
  W = tmp_path / 'W'
  def verify(self, domains, splits):
    assert splits == ('train', 'valid')
    runs.until(lambda: len(metrics.read(W)) >= (2 if early else 3))
    raise BadInput('another digest')
  monkeypatch.setattr(TokenStore, 'verify', verify)
  ended = runs.train(store, W, train__steps=5000, train__checkpoint_every=0 if early else 4)
  assert ended.error(2) == 'another digest' and catalogue.steps(W / 'checkpoints') == []
  assert len(metrics.read(W)) < 5000 if early else len(metrics.read(W)) == 4


def test_branches_of_a_forest_are_verified_too(store, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(TokenStore, 'verify', lambda self, domains, splits: asked.append(domains))
  (tmp_path / 'plan.py').write_text(
      'from demix.config import Config, config_dict\n'
      'from ml_collections import ConfigDict\n'
      'def get_config():\n'
      '  base = config_dict(Config()).to_dict()\n'
      '  base["train"] |= {"steps": 1, "tensorboard": False}\n'
      '  base["model"] |= {"layers": 2, "d_model": 16, "heads": 2}\n'
      '  base["data"] |= {"sequence_length": 32, "batch_size": 2}\n'
      '  return ConfigDict({"base": base, "seed": None, "experts": tuple(\n'
      '      {"name": n, "domains": (n,), "parent": "random"} for n in ("verse", "code"))})\n')
  F = tmp_path / 'F'
  assert runs.demix('forest', 'plan', f'--config={tmp_path / "plan.py"}', f'--forest={F}',
                    f'--data={store}').code == 0
  grow(F, verify_data=False, only=('verse',), limit=2, say=lambda line: None)
  assert asked == []
  grow(F, limit=2, say=lambda line: None)
  assert asked == [('code',)]
