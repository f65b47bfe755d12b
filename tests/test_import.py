"""Who may import whom (design §3), and that the light parts stay light."""

import ast
import importlib
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from demix import renamed

ROOT = Path(__file__).parents[1]

# Rooms of demix/ (and files of its root), in levels: a file imports from its own room and from
# levels above it in this list. docs/architecture.md has the drawing.
LEVELS = (
    'errors renamed', 'names settings', 'runtime merge', 'data', 'model', 'checkpoints', 'optim',
    'mix', 'forest', 'config', 'generation', 'loading', 'eval', 'training', 'lifecycle',
    'analysis', 'verbs', 'fleet', '__main__')
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names.split()}
# The same inside of data/.
DATA = ('sources', 'tokens', 'overlap', 'local', 'sampling', 'corpus', 'clusters')
HEAVY = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'ml_collections',
         'tokenizers'}
FILES = sorted((ROOT / 'demix').rglob('*.py'))


def imports(path: Path) -> list[str]:
  """Every module or name that a file imports, wherever in it: 'demix.data.tokens.store', 'jax' …"""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      found += [f'{node.module}.{a.name}' for a in node.names]
  return found


def unit(module: str) -> str:
  """'demix.data.tokens.store.TokenStore' → 'data': the file or folder right below demix/."""
  return module.split('.')[1]


def allowed(importer: Path, module: str) -> bool:
  parts = importer.relative_to(ROOT / 'demix').with_suffix('').parts
  own, other = parts[0], unit(module)
  if own == other == 'data':
    of = module.split('.')[2]
    return of not in DATA or parts[1] not in DATA or DATA.index(of) <= DATA.index(parts[1])
  return other in (own, '__version__') or LEVEL[other] < LEVEL[own]


def test_rooms_are_small_and_say_what_they_hold():
  """At most 8 files at the root, 12 in a room; each room has a docstring of at most 5 lines."""
  for room in [ROOT / 'demix', *(p for p in (ROOT / 'demix').rglob('*') if p.is_dir())]:
    files = [p for p in room.glob('*.py') if p.name != '__init__.py']
    if files:
      assert len(files) <= (8 if room.name == 'demix' else 12), room
      text = ast.get_docstring(ast.parse((room / '__init__.py').read_text()))
      assert text and len(text.splitlines()) <= 5, room


def test_every_file_has_a_level():
  units = {p.relative_to(ROOT / 'demix').parts[0].removesuffix('.py') for p in FILES}
  assert units - {'__init__'} == set(LEVEL)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_folder_and_levels_above(path):
  if path == ROOT / 'demix/__init__.py':
    # The second inside a function.
    assert imports(path) == ['demix.renamed', 'demix.loading.language_model']
    return
  wrong = [m for m in imports(path) if m.split('.')[0] == 'demix' and not allowed(path, m)]
  assert wrong == []


def test_levels_say_no():
  demix = ROOT / 'demix'
  for file, module in (
      ('data/tokens/store.py', 'demix.model.tree'), ('model/params.py', 'demix.training.run.Run'),
      ('eval/results.py', 'demix.training.train'), ('errors.py', 'demix.settings'),
      ('model/layers/norms.py', 'demix.checkpoints.leaves'),
      ('data/tokens/store.py', 'demix.data.corpus.card'), ('settings.py', 'demix.names')):
    assert not allowed(demix / file, module), (file, module)


@pytest.mark.parametrize('path', [p for p in FILES if 'data' in p.parts or p.name in (
    'errors.py', 'settings.py', 'workdir.py', 'catalogue.py', 'digests.py', 'progress.py',
    'metrics.py', '__main__.py', '__init__.py')], ids=lambda p: str(p.relative_to(ROOT)))
def test_data_and_the_ground_import_no_jax(path):
  assert not {m.split('.')[0] for m in imports(path)} & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}


def test_nothing_unpickles_and_only_main_exits():
  for path in FILES:
    names = {m.split('.')[0] for m in imports(path)}
    assert not names & {'pickle', 'dill', 'cloudpickle', 'shelve', 'joblib'}, path
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text()))
             if isinstance(n, ast.Call)}
    assert 'sys.exit' not in calls or path.name in ('__main__.py', 'sweep.py'), path


def loaded(*argv) -> tuple[set, float]:
  """The heavy packages that `python -m demix ARGV` has imported when it ends; its seconds."""
  code = ('import atexit, runpy, sys\n'
          f'atexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules)), '
          'file=sys.stderr))\n'
          f'sys.argv = ["demix", *{list(argv)!r}]\n'
          'runpy.run_module("demix", run_name="__main__", alter_sys=True)')
  start = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  return set(ast.literal_eval(done.stderr.splitlines()[-1])), time.monotonic() - start


@pytest.mark.parametrize('argv', [('--help',), (), ('help',)])
def test_help_imports_nothing_heavy_and_is_quick(argv):
  heavy, seconds = loaded(*argv)
  assert heavy == set()
  assert seconds < 1


CONFIG = '--config=configs/laptop.py:demix'
WRONG = [
    'trian', 'train', 'train --workdir={W} --confg', 'train --workdir={W} --config.seed=x',
    'train --workdir={W} --config.model.d_modle=3', 'train --workdir={W} --config=none.py',
    'train --workdir={W} --config.data.path=S --config.optimizer.clip=-1',
    f'train --workdir={{W}} --config.data.path=S {CONFIG} --config.model.d_modle=3',
    f'train --workdir={{W}} --config.data.path=S {CONFIG} --config.optimizer.b1=nan',
    f'train --workdir={{W}} --config.data.path=S {CONFIG} --config.model.rope_theta=5',
    f'train --workdir={{W}} --config.data.path=S {CONFIG} --config.init.model=W@',
    'prepare --out={W}', 'prepare --input=. --out={W} --config.vocab_size=3',
    'prepare --input=. --out={W} --config=configs/corpora/demix_eight.py --config.tokenzier=bpe',
    'prepare --input=. --out={W} --discover=x', 'prepare --input=. --out={W} --discover.sample=0',
    'evaluate --model=W --packing=x', 'evaluate --model=W --tables=x',
    'evaluate --model=W --options=q --split=valid',
    'evaluate --model=W --mix=cached --mix.alpha=0.5 --prior=p', 'merge --model=W --domain=d',
    'evaluate', 'evaluate --modle=W', 'evaluate --model=W@', 'evaluate --model=W --limit=-1',
    'evaluate --model=W --mix=configs/mix.py:top2 --mix.temprature=1',
    'evaluate --model=W --mix=all --mix.decay=2', 'evaluate --model=W --mix=all --mix.decay=x',
    'generate --model=W', 'generate --model=W --prompt=x --temperature=nan',
    'generate --model=hf:W --prompt=x', 'generate --model=W --prompt=x --mix=configs/mix.py:none',
    'merge', 'merge --model=W', 'merge --model=W@ --workdir={W}', 'merge --wrkdir={W}',
    'inspect --config.model.heads=0', f'inspect {CONFIG} --config.model.heads=3',
    'inspect --devices=-1', 'inspect --config=configs/papers/demix/demix.py:2b',
    'forest', 'forest paln', 'forest plan', 'forest run --limit=-1 --forest={W}', 'forest run',
    'forest plan --config=configs/forest_quickstart.py --forest={W} --dta=S',
    'forest list --model=W@', 'forest add --forest={W} --expert=x', 'forest show --forest={W}',
]


@pytest.mark.parametrize('verb', sorted({w.split()[0] for w in WRONG}))
def test_what_the_flags_show_to_be_wrong_is_said_without_jax(tmp_path, verb):
  """In one line, and by one process for all of a verb's: nothing is left loaded by any."""
  typed = [w.format(W=tmp_path / 'W').split() for w in WRONG if w.split()[0] == verb]
  code = ('import sys, time\n'
          'from demix.__main__ import main\n'
          f'for argv in {typed!r}:\n'
          '  code = main(argv)\n'
          '  print(code, time.process_time(), [m for m in ("jax", "flax", "optax", "grain", '
          '"orbax", "tokenizers", "sklearn") if m in sys.modules], flush=True)\n')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  out, err = done.stdout.splitlines(), done.stderr.splitlines()
  assert len(out) == len(err) == len(typed), (out, err)
  for argv, said, line in zip(typed, out, err):
    assert said.startswith('2 ') and said.endswith(' []'), (argv, said)
    assert line.startswith('error: '), (argv, line)
  seconds = [0, *(float(line.split()[1]) for line in out)]  # of CPU, since Python began
  assert max(b - a for a, b in itertools.pairwise(seconds)) < 0.5
  assert not (tmp_path / 'W').exists() or verb == 'train'  # train takes the lock first


def test_prepare_imports_no_jax(tmp_path):
  (tmp_path / 'in/law').mkdir(parents=True)
  (tmp_path / 'in/law/train.jsonl').write_text('{"text": "a"}\n')
  heavy, _ = loaded('prepare', f'--input={tmp_path / "in"}', f'--out={tmp_path / "out"}',
                    '--config.tokenizer=bytes')
  assert (tmp_path / 'out/card.json').exists()
  assert 'numpy' in heavy and not heavy & {'jax', 'jaxlib', 'flax', 'grain', 'orbax'}


@pytest.mark.parametrize('module', [
    'demix', 'demix.data.tokens.packing', 'demix.data.tokens.store', 'demix.checkpoints.catalogue',
    'demix.training.metrics', 'demix.runtime.workdir'])
def test_light_modules_import_no_jax(module):
  code = f'import sys, {module}; print({{"jax", "flax", "grain", "orbax"}} & set(sys.modules))'
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                       check=True).stdout
  assert out == 'set()\n'


OLD_CONFIG = """
from demix.config import Config, config_dict
from demix.data.batches import DataConfig
from demix.optimizer import OptimizerConfig
from demix.transformer import preset
def get_config():
  return config_dict(Config(model=preset('gpt-tiny'), data=DataConfig(batch_size=4),
                            optimizer=OptimizerConfig(clip=1.0)))
"""


def test_config_files_written_before_the_rooms_are_read(tmp_path):
  (tmp_path / 'old.py').write_text(OLD_CONFIG)
  ended = runs.demix('train', f'--config={tmp_path / "old.py"}', f'--workdir={tmp_path / "W"}',
                     f'--config.data.path={tmp_path / "none"}')
  assert ended.code == 2 and 'old.py' not in ended.err and 'none' in ended.err, ended


def test_old_names_are_todays_objects_and_say_so():
  for old, places in renamed.RENAMED.items():
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f'{old} is now {places[0]}'):
      module = importlib.import_module(old)
    today = importlib.import_module(places[-1])
    public = next(n for n, x in vars(today).items() if getattr(x, '__module__', '') == places[-1])
    assert getattr(module, public) is getattr(today, public)
    with pytest.raises(AttributeError, match='is now'):
      module.absent  # noqa: B018


def test_an_old_name_is_run_as_a_program(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'demix.sweep', str(tmp_path / 'none.py')],
                        capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 2 and 'none.py' in done.stderr, done


def test_no_pattern_has_what_python_before_3_11_5_matches_wrongly():
  """Possessive repeats and atomic groups: gh-100061, gh-106052. Debian 12 has 3.11.2."""
  found = [(path, x) for path in FILES if path.parent != ROOT / 'demix/data/sources'
           for x in vars(importlib.import_module(
               '.'.join(path.relative_to(ROOT).with_suffix('').parts))).values()
           if isinstance(x, re.Pattern) and path.name != '__main__.py']
  assert len(found) > 10
  for path, pattern in found:
    if isinstance(pattern.pattern, str):
      parsed = str(re._parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE))
      assert 'POSSESSIVE' not in parsed and 'ATOMIC' not in parsed, (path, pattern)
