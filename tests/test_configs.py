"""configs/: every file builds with every argument it documents; big models by eval_shape."""

import dataclasses
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import some

from demix import settings
from demix.config import Config, complete
from demix.data.corpus.prepare import PrepareConfig
from demix.data.sources import corpus
from demix.fleet import sweep
from demix.loading.reference import Reference, parse
from demix.mix.mixture import MixConfig
from demix.model.params import Model
from demix.optim.optimizer import AdamW
from demix.optim.step import make_step
from demix.verbs.flags import Verb, load_config

ROOT = Path(__file__).parents[1]
PAPER = ('1b', 'cs', 'legal', 'med', 'webtext', 'realnews', 'reddit', 'reviews')
SIZES = ('125m', '350m', '760m', '1.3b')

# Every config file with all the arguments that its get_config documents ('': without one). A file
# that is not here fails below.
ARGS = {
    'quickstart.py': ('', 'dense', 'demix', 'forest'),
    'mix.py': ('', 'average', 'uniform', 'updating', 'cached', 'released', 'top2', 'decayed',
               'window', 'logits', 'pick', 'clusters', 'clusters_released', 'clusters_top2'),
    'forest_quickstart.py': ('', '0.5'),
    'forest_controls.py': ('', 'no_seed', 'random_split', 'seed_shares'),
    'forest_rounds.py': ('', '1', '2'),
    **{f'papers/btm/{plan}.py': ('', *SIZES) for plan in ('forest', 'curriculum')},
    'forest_clusters.py': ('', '4', '4,600'),
    'forest_domains.py': ('', 'news,legal,code', '0.5,news,legal,code'),
    'importance.py': ('',),
    'adapt.py': ('', 'demix', 'dense', 'dense_ffn'),
    'quickstart_corpus.py': ('',),
    'upsample.py': ('', 'stubs', 'stubs,late', 'stubs,ramp', 'stubs,constant'),
    'corpora/demix_eight.py': ('', '600e6'),
    'laptop.py': ('', 'dense,1m', *(f'{arm}{size}' for size in ('', ',10m') for arm in (
        'dense', 'proportional', 'domain_token', 'demix', 'demix_every_second'))),
    **{f'papers/demix/{arm}.py': ('', *SIZES) for arm in (
        'demix', 'demix_every_second', 'dense', 'dense_proportional', 'domain_token')},
}
CASES = [(name, arg) for name, args in ARGS.items() for arg in args]


def module_of(name):
  spec = importlib.util.spec_from_file_location('one_config', ROOT / 'configs' / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


FILES = [str(p.relative_to(ROOT / 'configs')) for p in sorted((ROOT / 'configs').rglob('*.py'))
         if 'def get_config' in p.read_text()]


@pytest.fixture(autouse=True)
def repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def fake_store(config: Config):
  """What `complete` reads of a token store: the papers' domains under GPT-2's vocabulary."""
  names = config.data.domains or PAPER
  return types.SimpleNamespace(domains=names, roles=dict.fromkeys(names, 'train'), path='store',
                               groups={}, leaves=tuple,
                               vocab_size=50260)


def completed(name, arg='') -> Config:
  content = load_config(f'configs/{name}' + (f':{arg}' if arg else ''))
  config = settings.from_dict(Config, content.to_dict())
  return complete(config, fake_store(config))


def test_every_config_file_is_here():
  assert FILES == sorted(ARGS)


@pytest.mark.parametrize('name', FILES)
def test_a_config_says_how_it_is_run_and_documents_its_arguments(name):
  module = module_of(name)
  assert f'configs/{name}' in module.__doc__ or 'launch/' in module.__doc__
  text = module.__doc__ + module.get_config.__doc__ + (ROOT / 'configs' / name).read_text()
  for arg in ARGS[name]:
    assert all(part in text for part in arg.split(',')), f'{arg} is not documented'
  default = inspect.signature(module.get_config).parameters.values()
  assert all(p.default is not p.empty for p in default), 'the argument is optional'


@pytest.mark.parametrize('arg', ARGS['mix.py'])
def test_a_way_of_mixing_can_be(arg):
  content = load_config('configs/mix.py' + (f':{arg}' if arg else ''))
  config = settings.from_dict(MixConfig, content.to_dict(), 'mix')
  config.check()
  assert (config == MixConfig()) == (arg == 'uniform'), 'a way of its own'


BUILT = [c for c in CASES
         if c[0] not in ('quickstart_corpus.py', 'corpora/demix_eight.py', 'mix.py')
         and 'forest' not in c[0] and 'btm' not in c[0]]


@pytest.mark.parametrize('case', some(BUILT, [c for c in BUILT if c[1] not in ('350m', '760m')]))
def test_a_config_builds(case):
  """Its model, optimizer and one update with gradients, traced for the whole batch."""
  config = completed(*case)
  model = Model(config.model, config.execution, config.train.compute_dtype)
  adamw = AdamW(config.optimizer, config.optimizer.schedule_steps)
  step = make_step(model, adamw, domains=len(config.data.domains),
                   balanced=config.data.sampling == 'balanced',
                   accumulation=config.train.accumulation)
  state = {'params': model.abstract, 'optimizer': jax.eval_shape(adamw.init, model.abstract)}
  B, L = config.data.batch_size, config.data.sequence_length
  batch = {n: jax.ShapeDtypeStruct((B, L), t) for n, t in (
      ('tokens_BL', jnp.int32), ('targets_BL', jnp.int32), ('weights_BL', jnp.float32))}
  batch['domain_B'] = jax.ShapeDtypeStruct((B,), jnp.int32)
  after, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
      lambda x: (x.shape, x.dtype), state)
  assert metrics['nll_D'].shape == (len(config.data.domains),)


@pytest.mark.parametrize(('size', 'dense', 'demix'), [
    ('125m', 124e6, 0.52e9), ('350m', 355e6, 1.76e9), ('760m', 759e6, 3.93e9),
    ('1.3b', 1.31e9, 6.95e9)])
def test_the_papers_parameter_counts_come_out(size, dense, demix):
  for name, expected in (('dense', dense), ('dense_proportional', dense), ('demix', demix)):
    total, active = Model(completed(f'papers/demix/{name}.py', size).model).counts()
    assert total == pytest.approx(expected, rel=0.012)
    assert active == pytest.approx(dense, rel=0.012)


@pytest.mark.parametrize('size', SIZES)
def test_the_papers_recipe(size):
  arms = {arm: completed(f'papers/demix/{arm}.py', size)
          for arm in ('dense', 'dense_proportional', 'domain_token', 'demix', 'demix_every_second')}
  tokens, updates = {'125m': (0.52e6, 300_000), '350m': (1.05e6, 120_000),
                     '760m': (2.10e6, 65_000), '1.3b': (2.10e6, 50_000)}[size]
  for config in arms.values():
    o = config.optimizer
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.no_decay, o.learning_rate, o.schedule,
            o.warmup_share, o.clip, o.final_ratio) == (
                0.9, 0.95, 1e-7, 0.1, '', 5e-4, 'linear', 0.08, 0.1, 0.0)
    assert o.schedule_steps == config.train.steps == updates
    assert config.data.sequence_length == 1024 and config.data.domains == PAPER
    assert config.data.batch_size * 1024 == pytest.approx(tokens, rel=0.01)
    assert config.train.compute_dtype == 'bfloat16'
  # Arms differ in what they are named for, and in nothing else.
  def difference(arm):
    base, flat = (settings.flatten(arms[a]) for a in ('dense', arm))
    return {k for k in base if base[k] != flat[k]}
  assert difference('dense_proportional') == {'data.sampling'}
  assert difference('domain_token') == {'data.domain_token', 'model.vocab_size'}
  assert difference('demix') == {'model.ffn', 'model.experts'}
  assert difference('demix_every_second') == {'model.ffn', 'model.experts', 'model.expert_every'}


def test_the_eight_domains_are_the_papers_and_their_entries_can_be():
  content = load_config('configs/corpora/demix_eight.py:1e9').to_dict()
  config = settings.from_dict(PrepareConfig, content)
  config.check()
  entries = corpus.entries(config.corpus, config.domains)
  assert tuple(entries) == PAPER and config.max_bytes == 10**9
  assert all(e.licence for several in entries.values() for e in several)


def test_the_quick_start_arms_have_the_same_tokens_and_fit_their_corpus():
  """They differ in the FFN and in what each was tuned in; 80 tokens a parameter, as the papers."""
  arms = [completed('quickstart.py', arm) for arm in ('dense', 'demix', 'forest')]
  dense = arms[0]
  tuned = {'data.batch_size', 'optimizer.learning_rate', 'optimizer.schedule_steps', 'train.steps',
           'train.checkpoint_every'}
  flat, other, third = map(settings.flatten, arms)
  assert {k for k in flat if flat[k] != other[k]} - tuned == {'model.ffn', 'model.experts'}
  assert {k for k in flat if flat[k] != third[k]} <= tuned
  [tokens] = {c.train.steps * c.data.batch_size * c.data.sequence_length for c in arms}
  content = load_config('configs/quickstart_corpus.py').to_dict()
  prepared = settings.from_dict(PrepareConfig, content)
  prepared.check()
  model = dataclasses.replace(dense.model, vocab_size=prepared.vocab_size)
  assert tokens >= 80 * Model(model, dense.execution, 'float32').counts()[1]
  assert len(dense.data.domains) == 4 and len(prepared.domains) == 5  # four and one held out
  assert set(dense.data.domains) < set(prepared.domains)


def test_adapting_is_the_base_run_at_a_tenth_of_its_rate():
  for arm in ('demix', 'dense', 'dense_ffn'):
    base = settings.flatten(completed('quickstart.py', arm.partition('_')[0]).optimizer)
    config = completed('adapt.py', arm)
    own = settings.flatten(config.optimizer)
    assert own['learning_rate'] == pytest.approx(base['learning_rate'] / 10)
    assert {k for k in base if own[k] != base[k]} == {'learning_rate', 'schedule_steps'}
    assert config.train.steps == own['schedule_steps']
    trains_ffn = arm != 'dense'
    assert (config.init.trainable, config.init.expert) == (
        'ffn' if trains_ffn else 'all', 'nearest' if arm == 'demix' else '')


@pytest.mark.parametrize('name', [n for n in FILES if hasattr(module_of(n), 'get_hyper')])
def test_every_setting_of_a_sweep_builds(name):
  runs = sweep.runs(f'configs/{name}')
  assert len(runs) == len(module_of(name).get_hyper()) > 1
  assert len({folder for folder, _ in runs}) == len(runs)
  seen = set()
  for (folder, flags), setting in zip(runs, module_of(name).get_hyper()):
    verb = Verb('train', '')
    verb.config(Config, '')
    config = verb.parse([f'--config=configs/{name}', *flags])[1]
    flat = settings.flatten(config)
    assert {k: flat[k] for k in setting} == setting
    assert '/' not in folder
    seen.add(json.dumps(settings.flatten(complete(config, fake_store(config)))))
  assert len(seen) == len(runs), 'two settings are the same run'


def test_there_is_a_sweep():
  assert any(hasattr(module_of(n), 'get_hyper') for n in FILES)


def test_sweep_prints_a_folder_and_flags_a_shell_can_read(tmp_path):
  (tmp_path / 'a.py').write_text(
      'def get_hyper():\n  return [{"seed": 1, "data.domains": "a b"}, {"seed": 2}]')
  out = subprocess.run([sys.executable, '-m', 'demix.fleet.sweep', str(tmp_path / 'a.py')],
                       text=True, cwd=ROOT, capture_output=True, check=True).stdout
  first, second = out.splitlines()
  assert first.split('\t')[1] == "--config.seed=1 '--config.data.domains=a b'"
  assert second == 'seed-2\t--config.seed=2'


@pytest.mark.parametrize(('source', 'text'), [
    (None, 'a.py'), ('x = 1', "no attribute 'get_hyper'"), ('def get_hyper(:', 'SyntaxError'),
    ('def get_hyper(): raise ValueError("no")', 'ValueError: no'),
    ('def get_hyper(): return []', r'returned no settings'),
    ('def get_hyper(): return {"seed": 1}', "returned dict .* expected a list"),
    ('def get_hyper(): return [1]', "returned list .* expected a list"),
    ('def get_hyper(): return [{"sede": 1}]', r"get_hyper\(\)\[0\]\.sede: no such key .*'seed'"),
    ('def get_hyper(): return [{"seed": "1\\n2"}]', 'one line'),
    ('def get_hyper():\n  return [{"seed": 1}, {"seed": 1}]', 'same values')])
def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, capsys, source, text):
  if source:
    (tmp_path / 'a.py').write_text(source)
  assert sweep.main([str(tmp_path / 'a.py')]) == 2
  said = capsys.readouterr()
  assert said.out == '' and said.err.count('\n') == 1
  assert re.match(f'error: .*{text}', said.err), said.err


VALUES = ['/x/W@20', '../../../elsewhere', '', '.', '..', 'a#b', 'a:b', 'a=b', '100%', '%2F', '/',
          'é', 'a b', 'x' * 300, 'x' * 299 + 'y', ('a', 'b'), 1, 2.5, -1]


def test_folders_of_a_sweep_can_be_named_as_models_and_no_two_are_one(tmp_path):
  hyper = [{'init.model': v} for v in VALUES] + [{'data.path': v} for v in VALUES] + [
      {'init.model': '1', 'data.path': '2'}, {'init.model': '1_path-2'}, {'train.steps': 2},
      {'optimizer.schedule_steps': 2}, {}]
  (tmp_path / 'a.py').write_text(f'def get_hyper(): return {hyper!r}')
  found = sweep.runs(str(tmp_path / 'a.py'))
  names = [name for name, _ in found]
  assert len(set(names)) == len(hyper)
  for name in names:
    (tmp_path / 'all' / name).mkdir(parents=True)  # it can be a folder's name
    assert parse(f'{name}@7#legal') == Reference(Path(name), 7, 'legal')
  assert len(list((tmp_path / 'all').iterdir())) == len(hyper)
  assert names[-1] == 'base' and found[-1][1] == []
  assert sweep.runs(str(tmp_path / 'a.py')) == found
