"""Shared by all tests: --long, in which a skip is a failure; a tiny corpus, its stores, models."""

import gc
import os
from pathlib import Path

import pytest

# As in launch/test.sh: tests compile the same small programs often. Read when JAX is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(Path(__file__).parents[1] / '.cache/jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# Tracing makes objects by the million, and nearly all stay: collecting often costs a tenth.
gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser):
  parser.addoption('--long', action='store_true', help='run the long tests; a skip is a failure')


def pytest_collection_modifyitems(config, items):
  if not config.getoption('--long'):
    items[:] = [i for i in items if 'long' not in i.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  if item.config.getoption('--long') and report.skipped:
    report.outcome, report.longrepr = 'failed', f'skipped in --long: {report.longrepr}'
  return report


@pytest.fixture(scope='session')
def stores(tmp_path_factory):
  """The tiny corpus and its token stores (tests/corpus.py)."""
  import corpus
  return corpus.make(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='session')
def nursery(tmp_path_factory):
  """Starts `python -m demix` processes quickly (tests/runs.py)."""
  import runs
  nursery = runs.Nursery(tmp_path_factory.mktemp('nursery'))
  yield nursery
  nursery.close()


@pytest.fixture(scope='session')
def adapted(models, stores, tmp_path_factory):
  """{name: workdir}: `better` and `worse` are experts verse and code of the DEMix LM, their FFNs
  trained on the novel domain; its valid text is code (tests/corpus.py), so code gets worse."""
  import corpus
  import runs
  folder = tmp_path_factory.mktemp('adapted')
  for name, expert in (('better', 'verse'), ('worse', 'code')):
    ended = runs.train(stores.bytes, folder / name, data__domains=corpus.NOVEL, train__steps=20,
                       init__model=models['demix'], init__expert=expert, init__trainable='ffn')
    assert ended.code == 0, ended
  return {name: folder / name for name in ('better', 'worse')}


@pytest.fixture(scope='session')
def models(stores, tmp_path_factory):
  """{name: workdir} of small models that have learned what tells the domains apart."""
  import runs
  folder = tmp_path_factory.mktemp('models')
  kinds = {'dense': {}, 'demix': {'model__ffn': 'demix'}, 'token': {'data__domain_token': True},
           'bpe': {'data__domains': 'verse,legal'}}
  for name, changes in kinds.items():
    ended = runs.train(stores.bpe if name == 'bpe' else stores.bytes, folder / name, seed=5,
                       train__steps=40, train__checkpoint_every=20, **changes,
                       optimizer__schedule_steps=40)
    assert ended.code == 0, ended
  return {name: folder / name for name in kinds}
