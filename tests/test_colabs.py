"""The notebooks: what is committed, and that they run (long)."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
PUBLIC = {'demix', 'json', 'matplotlib', 'numpy', 'os', 'pathlib', 'sys'}
# A path of some machine: /home/…, /tmp/…, C:\…; not the / of a fraction, a URL or </tag>.
MACHINE_PATH = re.compile(r'''(?:^|[\s'"=(:])(?:/[A-Za-z_][\w.-]*/[\w./-]+|[A-Z]:\\\\?\w)''')

each = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def trees(notebook) -> list:
  """The parsed code cells; a %magic counts as `pass`."""
  code = (''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code')
  return [ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', text, flags=re.M)) for text in code]


def outputs(notebook) -> list:
  return [o for cell in notebook['cells'] for o in cell.get('outputs', ())]


def figures(notebook) -> int:
  return sum('image/png' in o.get('data', {}) for o in outputs(notebook))


def printed(notebook) -> str:
  """All that came out as text: streams, reprs, errors."""
  texts = []
  for o in outputs(notebook):
    texts += [o.get('text', ''), o.get('traceback', ''), *(
        text for kind, text in o.get('data', {}).items() if kind.startswith('text/'))]
  return '\n'.join(''.join(text) for text in texts)


def test_there_are_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ['mixture']


@pytest.mark.parametrize('text, found', [
    ("results     '/home/someone/runs", True), ('/tmp/q/0/results.json', True),
    ("PosixPath('/content/demix')", True), (r'C:\runs', True), ('1/2 a/b https://x.org/a', False),
    ('</b> w/o // comment', False)])
def test_what_counts_as_a_machine_path(text, found):
  assert bool(MACHINE_PATH.search(text)) == found


@each
def test_a_notebook_is_prose_calls_and_figures(path):
  notebook = json.loads(path.read_text(encoding='utf-8'))
  assert notebook['nbformat'] == 4 and path.stat().st_size < 500_000
  assert notebook['cells'][0]['cell_type'] == 'markdown'
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(set(ids)) == len(ids)
  imported = set()
  for node in (n for tree in trees(notebook) for n in ast.walk(tree)):
    assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
    if isinstance(node, ast.Import):
      imported |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add(node.module)
  assert {name.split('.')[0] for name in imported} <= PUBLIC
  assert not any(name.startswith('demix.') for name in imported)  # its public face


@each
def test_a_notebook_is_committed_as_it_ran_without_traces_of_the_machine(path):
  notebook = json.loads(path.read_text(encoding='utf-8'))
  assert 1 <= figures(notebook) <= 5
  assert {o['output_type'] for o in outputs(notebook)} <= {'stream', 'display_data',
                                                           'execute_result'}
  assert all(o.get('name') != 'stderr' for o in outputs(notebook))
  assert not MACHINE_PATH.search(printed(notebook))
  counts = [c['execution_count'] for c in notebook['cells'] if c['cell_type'] == 'code']
  assert counts == list(range(1, len(counts) + 1))  # from top to bottom, in one go
  assert set(notebook['metadata']) <= {'kernelspec', 'language_info'}
  assert notebook['metadata']['language_info'] == {'name': 'python'}
  assert not any(cell['metadata'] for cell in notebook['cells'])


@pytest.fixture(scope='module')
def workdir(models, stores, tmp_path_factory):
  """What launch/quickstart.sh leaves, of tiny models with other domains and a byte tokenizer."""
  import corpus
  import runs
  folder = tmp_path_factory.mktemp('colabs')
  for name in ('dense', 'demix'):
    shutil.copytree(models[name], folder / name)
  ended = runs.demix(
      'evaluate', f'--model={folder / "dense"}', f'--model={folder / "demix"}',
      f'--data={stores.bytes}', f'--domains={",".join((*corpus.DOMAINS, corpus.NOVEL))}',
      '--mix=given,average,uniform,updating,cached', f'--save_priors={folder / "priors.json"}',
      f'--out={folder / "results.json"}')
  assert ended.code == 0, ended
  return folder


def executed(path, workdir, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'colabs'))
  monkeypatch.setenv('DEMIX_WORKDIR', str(workdir))
  import execute
  return execute.execute(path)


@pytest.mark.long
@each
def test_a_notebook_runs_on_models_of_another_shape(path, workdir, monkeypatch):
  before = json.loads(path.read_text(encoding='utf-8'))
  after = executed(path, workdir, monkeypatch)
  assert not [o for o in outputs(after) if o['output_type'] == 'error']
  assert figures(after) == figures(before)
  said = printed(after)
  assert 'legal' in said and 'science' in said  # its own experts; the notebook's own texts
  assert str(workdir) not in said and not MACHINE_PATH.search(said), said


@pytest.mark.long
@each
def test_a_notebook_says_in_a_line_what_is_missing(path, tmp_path, monkeypatch):
  from nbclient.exceptions import CellExecutionError
  with pytest.raises(CellExecutionError) as caught:
    executed(path, tmp_path / 'nothing', monkeypatch)
  assert caught.value.ename == 'SystemExit'
  assert re.search(r'nothing has no demix/config\.json: run launch/quickstart\.sh',
                   caught.value.evalue)
  assert 'Traceback' not in str(caught.value)
