"""The embedded corpus: what a split, a domain and a duplicate are, on planted and on real text."""

import ast
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from demix.data.local import local_domains, local_text
from demix.data.local.local_domains import DISTRIBUTIONS, DOMAINS, Domain
from demix.data.local.local_text import SPLITS
from demix.data.local.source_code import CODE, PROSE, cut, split_notes, split_python, split_sessions
from demix.data.overlap.near_duplicates import NearDuplicates, similarity, windows
from demix.errors import BadInput

ROOT = Path(__file__).parents[2]


def texts(folder, name, split):
  with open(Path(folder, name, f'{split}.jsonl'), encoding='utf-8', newline='\n') as lines:
    return [json.loads(line)['text'] for line in lines]


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in sorted(Path(folder).rglob('*')) if path.is_file()}


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """(folder, report) of the whole corpus at its full size."""
  folder = tmp_path_factory.mktemp('local_text') / 'corpus'
  return folder, local_text.write(folder)


def prose(seed, words=120):
  """Text that shares hardly a window with that of another seed."""
  rng = random.Random(str(seed))
  return ' '.join(''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randint(3, 9)))
                  for _ in range(words))


def whole(text):
  return [text]


def plant(monkeypatch, **planted):
  """Replaces the domains: name=(sources) is a training domain, novel… one for evaluation."""
  for name in list(DOMAINS):
    monkeypatch.delitem(DOMAINS, name)
  for name, sources in planted.items():
    sources = [s if isinstance(s, tuple) else (s, whole) for s in sources]
    monkeypatch.setitem(DOMAINS, name, Domain(
        name, 'novel' if name.startswith('novel') else 'train', lambda sources=sources: sources))


def ample(name, n=150):
  return [prose(f'{name}{i}') for i in range(n)]


# ------------------------------------------------------------------ the real text


def test_domains_have_enough_text_for_a_perplexity(corpus):
  folder, report = corpus
  large = [name for name, r in report.items() if r['role'] == 'train'
           and min(r['bytes']['test'], r['bytes']['valid']) >= 60_000]
  assert len(large) >= 6
  assert [n for n, r in report.items() if r['role'] == 'novel' and r['bytes']['test'] >= 60_000]
  # What packages bring changes with their versions: one of the smaller domains may lack.
  assert list(report) == [n for n in DOMAINS if n in report] and len(report) >= len(DOMAINS) - 1
  for name, r in report.items():
    assert re.fullmatch('[a-z0-9_]+', name)
    for split in SPLITS:
      found = texts(folder, name, split)
      assert len(found) == r['documents'][split]
      assert sum(len(text.encode()) for text in found) == r['bytes'][split]
    assert sum(r['bytes'].values()) <= local_text.MAX_BYTES


def test_the_quick_starts_domains_have_text_for_its_tokens(corpus):
  """In at most about five epochs, at the 2.7 bytes that an id stands for at the most."""
  sys.path.insert(0, str(ROOT))
  from configs import quickstart, quickstart_corpus
  _, report = corpus
  tokens = quickstart.SEQUENCES * quickstart.LENGTH / len(quickstart_corpus.TRAIN)
  for name, role in dict.fromkeys(quickstart_corpus.TRAIN, 'train').items() | dict.fromkeys(
      quickstart_corpus.NOVEL, 'novel').items():
    assert report[name]['role'] == role
    assert tokens <= 5 * report[name]['bytes']['train'] / 2.7, name


def test_splits_are_about_80_10_10(corpus):
  _, report = corpus
  for name, r in report.items():
    total = sum(r['bytes'].values())
    assert 0.7 <= r['bytes']['train'] / total <= 0.9, name
    assert 0.04 <= r['bytes']['valid'] / total <= 0.2, name
    assert 0.04 <= r['bytes']['test'] / total <= 0.2, name


def test_no_document_is_there_twice(corpus):
  folder, report = corpus
  everything = [text.strip() for name in report for split in SPLITS
                for text in texts(folder, name, split)]
  assert len(everything) > 10_000
  assert len(set(everything)) == len(everything)


def test_domains_are_clearly_different(corpus):
  """A table of 5-grams per domain, from train, finds the domain of test documents."""
  folder, report = corpus
  names = list(report)

  def grams(text):
    b = np.frombuffer(text.encode(), np.uint8).astype(np.uint64)
    h = np.zeros(b.size - 4, np.uint64)
    for i in range(5):
      h = h * np.uint64(1000003) + b[i:b.size - 4 + i]
    return ((h ^ (h >> np.uint64(29))) % np.uint64(1 << 18)).astype(np.int64)

  counts = np.stack([np.bincount(np.concatenate([grams(t) for t in texts(folder, n, 'train')]),
                                 minlength=1 << 18) for n in names]) + 0.05
  log_p = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)
  right = {name: np.mean([log_p[:, grams(t)].sum(1).argmax() == i
                          for t in texts(folder, name, 'test')]) for i, name in enumerate(names)}
  assert min(right.values()) >= 0.85, right
  assert np.mean(list(right.values())) >= 0.93, right


def test_text_is_clean_and_names_no_path_of_this_machine(corpus):
  folder, report = corpus
  unclean = re.compile('[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029\ufffd]|/site-packages/demix')
  for name in report:
    for split in SPLITS:
      data = Path(folder, name, f'{split}.jsonl').read_bytes()
      assert data.count(b'\n') == report[name]['documents'][split]
      for text in texts(folder, name, split):
        assert not unclean.search(text), text
        assert sys.prefix not in text
        assert 160 <= len(text) <= 4_100


@pytest.mark.long
def test_another_process_writes_the_same_bytes(corpus, tmp_path):
  """With another hash seed, locale and working directory."""
  code = 'import sys; from demix.data.local import local_text; local_text.write(sys.argv[1])'
  env = {**os.environ, 'PYTHONHASHSEED': '7', 'LC_ALL': 'C', 'PYTHONUTF8': '0',
         'PYTHONPATH': str(ROOT)}
  subprocess.run([sys.executable, '-c', code, 'there'], env=env, check=True, cwd=tmp_path)
  assert contents(tmp_path / 'there') == contents(corpus[0])
  assert len(contents(corpus[0])) == 3 * len(corpus[1]) + 1


def test_reads_only_what_the_requirements_install():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  queue = [Requirement(line.split('#')[0]) for line in lines if line.split('#')[0].strip()]
  closure = set()
  while queue:
    requirement = queue.pop()
    name = re.sub('[-_.]+', '-', requirement.name).lower()
    if (name, *sorted(requirement.extras)) in closure:
      continue
    closure.add((name, *sorted(requirement.extras)))
    try:
      wanted = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
      continue
    queue += [r for r in map(Requirement, wanted) if r.marker is None or any(
        r.marker.evaluate({'extra': extra}) for extra in ('', *requirement.extras))]
  assert set(DISTRIBUTIONS) <= {name for name, *_ in closure}


def test_a_standard_library_without_its_optional_parts(monkeypatch, tmp_path):
  """Debian splits tests, IDLE and headers off; here nothing at all is left of it."""
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  for name in ('code', 'manuals'):
    local_domains.forget()
    assert sum(len(text) for text, _ in DOMAINS[name].collect()) > 300_000
  local_domains.forget()


# ------------------------------------------------------------------ splits and order


def test_a_cap_keeps_the_shares_of_the_splits(monkeypatch, tmp_path):
  """With one hash for both, the sources that a cap leaves would all be of one split."""
  sources = [prose(f'share {i}', 40) for i in range(4000)]
  plant(monkeypatch, a=sources)
  r = local_text.write(tmp_path / 'c', max_bytes=400_000)['a']
  assert sum(r['documents'].values()) < 1900  # the cap cuts
  share = {split: r['documents'][split] / sum(r['documents'].values()) for split in SPLITS}
  assert abs(share['train'] - 0.8) < 0.03
  assert abs(share['valid'] - 0.1) < 0.025 and abs(share['test'] - 0.1) < 0.025


def test_a_source_is_in_one_split_in_every_domain(monkeypatch, tmp_path):
  sources = [f'SOURCE{i} ' + '\n\n'.join(prose(f'{i} {j}', 60) for j in range(6))
             for i in range(120)]
  marked = lambda part: lambda text: [f'{text.split()[0]} {piece}'
                                      for piece in text.split('\n\n')[part::2]]
  plant(monkeypatch, a=[(s, marked(0)) for s in sources], b=[(s, marked(1)) for s in sources])
  report = local_text.write(tmp_path / 'c', max_bytes=400_000)
  splits = {}
  for name in report:
    for split in SPLITS:
      for text in texts(tmp_path / 'c', name, split):
        splits.setdefault(text.split()[0], set()).add(split)
  assert len(splits) == 120
  assert all(len(found) == 1 for found in splits.values())
  assert {split for found in splits.values() for split in found} == set(SPLITS)


def test_order_and_repetition_of_sources_change_nothing(monkeypatch, tmp_path):
  sources = [(text, whole) for text in ample('order')]
  plant(monkeypatch, a=sources)
  local_text.write(tmp_path / 'c', max_bytes=60_000)
  plant(monkeypatch, a=sources[::-1] + sources[:20])
  local_text.write(tmp_path / 'd', max_bytes=60_000)
  assert contents(tmp_path / 'c') == contents(tmp_path / 'd')


# ------------------------------------------------------------------ duplicates


def test_of_two_licences_with_another_name_and_year_one_stays(monkeypatch, tmp_path):
  licence = prose('licence', 300)
  mine = f'Copyright 2019 Ada Byron. {licence}'
  yours = f'Copyright (c) 2024 Charles Babbage\n\n{licence}'
  other = f'Copyright 2019 Ada Byron. {prose("another licence", 300)}'
  plant(monkeypatch, a=[mine, yours, other, *ample('a')], b=[yours, *ample('b')],
        c=[mine + ' ', *ample('c')])
  report = local_text.write(tmp_path / 'c', max_bytes=200_000)
  found = [text for name in report for split in SPLITS
           for text in texts(tmp_path / 'c', name, split)]
  assert sum(licence in text for text in found) == 1
  assert other in found
  assert report['a']['duplicates'] == {'exact': 0, 'near': 1}
  dropped = [report[name]['duplicates'] for name in 'bc']
  assert sum(d['exact'] + d['near'] for d in dropped) == 2
  assert sum(d['exact'] for d in dropped) == 1  # the copy of the one that stayed


def test_similarity_is_that_of_the_sets_of_windows():
  a, b = prose('a', 400), prose('b', 400)
  mixed = a[:1500] + ' ' + b

  def jaccard(x, y):
    x, y = (' '.join(t.split()) for t in (x, y))
    x, y = ({t[i:i + 32] for i in range(len(t) - 31)} for t in (x, y))
    return len(x & y) / len(x | y)

  assert similarity(windows(a, 1), windows(mixed, 1)) == pytest.approx(jaccard(a, mixed), abs=1e-9)
  assert similarity(windows(a), windows(mixed)) == pytest.approx(jaccard(a, mixed), abs=0.05)
  assert 0.2 < jaccard(a, mixed) < 0.5
  known = NearDuplicates(threshold=0.6)
  assert known.add(a) and known.add(mixed) and not known.add(a.upper().replace(' ', '\n'))


def test_a_window_is_known_by_the_order_of_its_characters():
  letters = 'abcdefghijklmnopqrstuvwxyz.,;:-+'
  swapped = [letters] + [letters[:i] + letters[i + 1] + letters[i] + letters[i + 2:]
                         for i in range(31)]
  assert len(set(np.concatenate([windows(text) for text in swapped]).tolist())) == 32
  assert windows('in 1999') == windows('In  2024\n') != windows('of 1999')


# ------------------------------------------------------------------ what is missing, what is there


def test_a_domain_without_text_is_named_and_left_out(monkeypatch, tmp_path, capfd):
  full = {name: ample(name) for name in ('a', 'b', 'c', 'd')}
  # `few` has too little, and `z` has all of it and must not lose it to what is not there.
  plant(monkeypatch, few=ample('z')[:3], none=[], **full, z=ample('z'), novel=ample('n'))
  report = local_text.write(tmp_path / 'c', max_bytes=200_000)
  lines = capfd.readouterr().err.splitlines()
  assert list(report) == ['a', 'b', 'c', 'd', 'z', 'novel']
  assert report['z']['duplicates'] == {'exact': 0, 'near': 0}
  assert len(lines) == 2 and all(line.startswith('warning: ') for line in lines)
  assert 'domain few ' in lines[0] and 'domain none ' in lines[1]
  assert sorted(p.name for p in (tmp_path / 'c').iterdir() if p.is_dir()) == sorted(report)


def test_fewer_than_four_training_domains_are_refused(monkeypatch, tmp_path):
  plant(monkeypatch, a=ample('a'), b=ample('b'), c=ample('c'), d=[], novel=ample('n'))
  with pytest.raises(BadInput, match=r'has 3 training domains here and needs 4 .*\bd\b') as error:
    local_text.write(tmp_path / 'c', max_bytes=200_000)
  assert '\n' not in str(error.value)
  assert list(tmp_path.iterdir()) == []
  assert list(local_text.write(tmp_path / 'c', ['b', 'a'], max_bytes=200_000)) == ['a', 'b']
  with pytest.raises(BadInput, match=r"no domain 'e'.*: there are a, b, c, d, novel"):
    local_text.write(tmp_path / 'e', ['a', 'e'])
  assert local_text.roles() == {**dict.fromkeys('abcd', 'train'), 'novel': 'novel'}


def test_a_finished_folder_is_left_alone_until_a_version_changes(monkeypatch, tmp_path):
  plant(monkeypatch, a=ample('a'))
  first = local_text.write(tmp_path / 'c', max_bytes=200_000)
  before = contents(tmp_path / 'c')
  plant(monkeypatch, a=ample('other'))
  assert local_text.write(tmp_path / 'c', max_bytes=200_000) == first
  assert contents(tmp_path / 'c') == before
  monkeypatch.setattr(local_domains, 'versions', lambda: {'python': '4.0'})
  local_text.write(tmp_path / 'c', max_bytes=200_000)
  assert contents(tmp_path / 'c')['a/train.jsonl'] != before['a/train.jsonl']
  assert json.loads((tmp_path / 'c/local_text.json').read_text())['versions'] == {'python': '4.0'}
  assert [p.name for p in tmp_path.iterdir()] == ['c']


def test_a_failure_leaves_what_was_there(monkeypatch, tmp_path):
  plant(monkeypatch, a=ample('a'))
  local_text.write(tmp_path / 'c', max_bytes=200_000)
  before = contents(tmp_path / 'c')
  monkeypatch.setattr(local_text, '_replace', lambda *_: 1 / 0)
  for folder in ('c', 'new'):
    with pytest.raises(ZeroDivisionError):
      local_text.write(tmp_path / folder, max_bytes=100_000)
  assert contents(tmp_path / 'c') == before
  assert [p.name for p in tmp_path.iterdir()] == ['c']


def test_a_folder_with_something_else_is_refused(monkeypatch, tmp_path):
  plant(monkeypatch, a=ample('a'))
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(BadInput, match=r'holds no finished local_text\.json'):
    local_text.write(tmp_path, max_bytes=200_000)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_tables_short_texts_and_paths_of_this_machine_are_dropped(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'prefix', '/opt/somewhere')
  junk = [' '.join(map(str, range(300))), 'x' * 2000, prose('short', 10),
          prose('path') + ' /opt/somewhere/lib', prose('control') + '\x01',
          prose('separator') + '\u2028', prose('surrogate') + '\ud800']
  plant(monkeypatch, a=[*junk, *ample('a')])
  report = local_text.write(tmp_path / 'c', max_bytes=200_000)
  assert sum(report['a']['documents'].values()) == 150
  assert report['a']['duplicates'] == {'exact': 0, 'near': 0}


# ------------------------------------------------------------------ source code


def without_docs(tree):
  """The tree as `split_python` should leave it, and its doc strings."""
  docs = []
  for node in ast.walk(tree):
    if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node, clean=False) is not None):
      docs.append(ast.get_docstring(node))
      node.body[0:1] = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [ast.Pass()]
  return ast.dump(tree), docs


@pytest.mark.parametrize('name', ['argparse', 'ast', 'dataclasses', 'difflib', 'inspect', 'locale',
                                  'shlex', 'statistics', 'tarfile', 'textwrap', 'typing'])
def test_code_and_doc_strings_are_those_that_python_sees(name):
  text = Path(sysconfig.get_path('stdlib'), f'{name}.py').read_text('utf-8')
  code, docs = split_python(text)
  tree, expected = without_docs(ast.parse(text))
  assert ast.dump(ast.parse(code)) == tree
  assert len(expected) > 5
  assert len(docs) == len(expected)
  plain = [doc for doc in expected if '\\' not in doc and doc in text]  # escapes stay as written
  assert set(plain) <= set(docs)
  assert not re.search(r'^\s*#', re.sub(r'(?s)("""|\'\'\').*?\1', '', code), re.MULTILINE)


def test_sessions_notes_and_interface_of_a_doc_string_are_parted():
  doc = ('Adds.\n\nParameters\n----------\nx : int\n\nNotes\n-----\nBy [1]_.\n\nReferences\n'
         '----------\n.. [1] A. Byron, 1843.\n\nExamples\n--------\n>>> add(1,\n...     2)\n3\n\n'
         'Prose.\n\n    >>> add(2)\n    2\n')
  interface, sessions = split_sessions(doc)
  assert sessions == '>>> add(1,\n...     2)\n3\n\n    >>> add(2)\n    2'
  assert '>>>' not in interface and 'Prose.' in interface
  assert split_notes(interface) == (
      'Adds.\n\nParameters\n----------\nx : int\n\nExamples\n--------\n\nProse.',
      'By [1]_.\n\n.. [1] A. Byron, 1843.')
  assert split_notes('Adds.\n\nNotes\n-----\nSlow.')[1] == ''


def test_pieces_are_the_text_and_begin_at_the_most_natural_border():
  rng = random.Random(0)
  code = '\n'.join(f'def f{i}(x):\n' + '\n'.join(f'  y = {j}' for j in range(rng.randint(1, 60)))
                   for i in range(80))
  pieces = cut(code, CODE, 500)
  assert ''.join(pieces) == code
  assert max(map(len, pieces)) <= 500
  assert all(p.startswith('def ') for p in cut(code, CODE, 900))  # no function is longer than that
  text = '\n\n'.join(prose(i, 30) for i in range(40))
  assert ''.join(cut(text, PROSE, 700)) == text
  assert {p.endswith('\n\n') for p in cut(text, PROSE, 700)[:-1]} == {True}
  assert cut('x' * 50, CODE, 10) == ['x' * 50]
