"""What the embedded corpus is made of: the domains, and how their text is collected and cut.

`local_text.py` writes the corpus. A collector yields sources: (text, function that cuts the text
into documents). It may yield them in any order and any number of times, and nothing where this
machine has none of them.
"""

import ast
import functools
import importlib.metadata
import inspect
import platform
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demix.data.local import source_code
from demix.data.local.source_code import C_CODE, CODE, PROSE, cut, split_python, split_sessions

Source = tuple[str, Callable[[str], list[str]]]

# What requirements.txt installs, directly or not (a test holds that), and has text worth reading.
DISTRIBUTIONS = (
  'absl-py', 'aiofiles', 'anyio', 'array-record', 'attrs', 'charset-normalizer', 'click',
  'cloudpickle', 'datasketch', 'dm-tree', 'docstring-parser', 'einops', 'etils', 'filelock',
  'flax', 'fsspec', 'googleapis-common-protos', 'grain', 'h11', 'hf-xet', 'httpcore2', 'httpx2',
  'huggingface-hub', 'humanize', 'immutabledict', 'importlib-resources', 'jax', 'jaxlib',
  'markdown-it-py', 'mdurl', 'ml-collections', 'ml-dtypes', 'msgpack', 'numpy', 'opt-einsum',
  'optax', 'orbax-checkpoint', 'orjson', 'packaging', 'portpicker', 'prometheus-client',
  'promise', 'protobuf', 'psutil', 'pyarrow', 'pyyaml', 'requests', 'rich', 'scipy',
  'sentencepiece', 'simple-parsing', 'simplejson', 'six', 'tensorboardx', 'tensorflow-datasets',
  'tensorflow-metadata', 'tensorstore', 'termcolor', 'tokenizers', 'toml', 'tqdm', 'treescope',
  'truststore', 'typing-extensions', 'urllib3', 'uvloop', 'wrapt', 'xxhash', 'zipp', 'zstandard')

_DOCUMENT = 4_000     # characters; most of a document
_LONG = 32_000        # characters of a source; more is cut into stretches
_LONG_IF_FEW = 8_000  # the same where a few files hold most of a domain, for even splits
_TEST = re.compile(
    r'(^|/)(tests?|testing|internal_test_util)/|(^|/)(test_|conftest)[^/]*$|_test\.\w+$')
_UNIT_TEST = re.compile(r'(^|/)test_[^/]*\.py$|_test\.py$')  # of these, no data and no helpers
_NOT_READ = re.compile(  # programs' output, licences, or no library
    r'(^|/)(site-packages|dist-packages|encodings|ensurepip|f2py|idlelib|lib2to3|licenses|'
    r'pydoc_data|turtledemo|_vendor)/|'
    r'(^|/)(LICEN[CS]E|COPYING|NOTICE|__config__|_sysconfigdata|topics)[^/]*$|'
    r'(_pb2\w*|_ops_gen|_unicode_data\w*)\.pyi?$|cython_(blas|lapack)\.|_ufuncs\w*\.|'
    r'_subroutines\.h$')
_GENERATED = re.compile(
    r'(?i)do not edit|auto-?\s?generated|automatically generated|generated (by|from|file|code)')
# Its data sets are the domain `science`; of its own code only the library is `code`.
_DATA_SETS = re.compile(r'^tensorflow_datasets/(?!core/|testing/|scripts/|proto/|[^/]*$)')


@dataclass(frozen=True)
class Domain:
  """One domain of the corpus.

  Attributes:
    what: one line: what text this is.
    role: 'train', or 'novel': for evaluation and adaptation only.
    collect: yields the sources.
  """
  what: str
  role: str
  collect: Callable[[], Iterable[Source]]


# ------------------------------------------------------------------ what is installed


def _installed() -> Iterator[tuple[str, importlib.metadata.Distribution]]:
  """(name, distribution) of those of `DISTRIBUTIONS` that are there, in that order."""
  for name in DISTRIBUTIONS:
    try:
      yield name, importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
      continue


def versions() -> dict[str, str]:
  """Versions of all that the corpus is read from, {'python': …, distribution: …}."""
  return {'python': platform.python_version(), **{name: d.version for name, d in _installed()}}


@functools.cache
def _records() -> tuple[tuple[str, Path], ...]:
  """(path in its installation, path) of every file of the distributions."""
  return tuple((file.as_posix(), Path(d.locate_file(file)))
               for _, d in _installed() for file in d.files or ())


def _files(*suffixes: str, tests: bool = False) -> Iterator[Path]:
  """Files of the distributions with one of these suffixes: their tests only, or all but tests."""
  for name, path in _records():
    if (name.endswith(suffixes) and not _NOT_READ.search(name) and not _DATA_SETS.search(name)
        and bool((_UNIT_TEST if tests else _TEST).search(name)) == tests):
      yield path


def _standard_library() -> Iterator[Path]:
  """Modules of the standard library that every installation has, so neither tests nor IDLE."""
  root = Path(sysconfig.get_path('stdlib'))
  for path in root.rglob('*.py'):
    name = path.relative_to(root).as_posix()
    if not _NOT_READ.search(name) and not _TEST.search(name):
      yield path


def _text(path: Path) -> str:
  """The text of a file; '' where it is gone, not UTF-8, or written by a program."""
  try:
    text = path.read_text('utf-8-sig').replace('\f', '\n')
  except (OSError, UnicodeDecodeError):
    return ''
  return '' if _GENERATED.search(text[:2000]) else text


@functools.cache
def _python(tests: bool) -> tuple[str, ...]:
  """Stretches of Python files. Cached: three domains read the same ones."""
  paths = [*_files('.py', tests=tests), *(() if tests else _standard_library())]
  return tuple(part for path in paths for part in source_code.stretches(_text(path), CODE, _LONG))


def forget():
  """Frees the texts that collectors share (about 150 MB)."""
  _python.cache_clear()
  _parts.cache_clear()
  _records.cache_clear()


# ------------------------------------------------------------------ cutting


@functools.cache
def _parts(text: str) -> list[tuple[str, str, str]]:
  """Of every doc string of a source: the interface, the notes and references, the sessions."""
  parts = []
  for doc in split_python(text)[1]:
    prose, sessions = split_sessions(doc)
    parts.append((*source_code.split_notes(prose), sessions))
  return parts


def _code(text: str) -> list[str]:
  return cut(split_python(text)[0], CODE, _DOCUMENT)


def _c_code(text: str) -> list[str]:
  return cut(source_code.tidy(source_code.without_licence(text)), C_CODE, _DOCUMENT)


def _prose(text: str) -> list[str]:
  return cut(source_code.tidy(text), PROSE, _DOCUMENT)


def _docs(text: str, part: int) -> list[str]:
  return [piece for parts in _parts(text) for piece in cut(parts[part], PROSE, _DOCUMENT)]


# ------------------------------------------------------------------ collecting


def _collect_python(documents, *, tests: bool = False, having: str = '') -> Iterator[Source]:
  return ((text, documents) for text in _python(tests) if having in text)


def _collect_files(documents, borders, long, *suffixes: str) -> Iterator[Source]:
  for path in _files(*suffixes):
    for text in source_code.stretches(_text(path), borders, long):
      yield text, documents


def _collect_manuals() -> Iterator[Source]:
  """The language reference that `help()` shows, descriptions of packages, their Markdown files."""
  topics = Path(sysconfig.get_path('stdlib'), 'pydoc_data', 'topics.py')
  texts = [d.metadata.get_payload() or '' for _, d in _installed()]
  texts += [_text(path) for path in _files('.md', '.rst')]
  try:
    # Its first lines say "autogenerated": from the manual, which people wrote.
    (topic,) = (node.value for node in ast.parse(topics.read_text('utf-8')).body
                if isinstance(node, ast.Assign))
    texts += ast.literal_eval(topic).values()
  except (OSError, ValueError, SyntaxError):
    pass  # the others may be enough
  for text in texts:
    # As many sources as documents: with fewer a split of so little text can come out too small.
    for part in source_code.stretches(text, PROSE, _DOCUMENT):
      yield part, _prose


def _collect_science() -> Iterator[Source]:
  """Descriptions and citations of data sets; notes and references of scientific functions."""
  groups = defaultdict(list)
  documented = {name.rpartition('/')[0] for name, _ in _records() if name.endswith('/README.md')}
  for name, path in sorted(_records()):
    if _DATA_SETS.search(name) and not _TEST.search(name) and name.endswith(('.md', '.bib', '.py')):
      folder = name.rpartition('/')[0]
      groups[folder if folder in documented else name].append(path)
  for paths in groups.values():
    # The description first, its citations after it, then what the definition says.
    paths.sort(key=lambda path: ('.md', '.bib', '.py').index(path.suffix))
    texts = [part for path in paths
             for part in (_long_strings(_text(path)) if path.suffix == '.py' else [_text(path)])]
    for part in source_code.stretches('\n\n'.join(texts), PROSE, _LONG_IF_FEW):
      yield part, _prose
  yield from _collect_python(partial(_docs, part=1), having='References\n')


def _long_strings(text: str) -> list[str]:
  """String constants that are no doc strings and long enough to be prose or a citation."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # `\d` in someone's string is not the user's concern
      tree = ast.parse(text)
  except SyntaxError:
    return []
  nodes = list(ast.walk(tree))
  docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
  return [inspect.cleandoc(node.value) for node in nodes
          if isinstance(node, ast.Constant) and isinstance(node.value, str)
          and id(node) not in docs and len(node.value) >= 120 and ' ' in node.value.strip()]


DOMAINS: dict[str, Domain] = {
  'code': Domain('Python modules without doc strings and comments', 'train',
                 partial(_collect_python, _code)),
  'cplusplus': Domain('C and C++ headers and sources', 'train',
                      partial(_collect_files, _c_code, C_CODE, _LONG, '.h', '.hpp', '.cc', '.cpp',
                              '.c')),
  'docstrings': Domain('doc strings: what functions take, return and raise', 'train',
                       partial(_collect_python, partial(_docs, part=0))),
  'science': Domain('data-set descriptions, BibTeX, notes and references of scientific functions',
                    'train', _collect_science),
  'sessions': Domain('interactive Python sessions, what is typed and what comes back', 'train',
                     partial(_collect_python, partial(_docs, part=2), having='>>> ')),
  'tests': Domain('Python unit tests', 'train', partial(_collect_python, _code, tests=True)),
  'stubs': Domain('Python type stubs', 'train',
                  partial(_collect_files, _code, CODE, _LONG_IF_FEW, '.pyi')),
  'manuals': Domain('package descriptions and the Python language reference', 'train',
                    _collect_manuals),
  'cython': Domain('Cython modules, between Python and C++', 'novel',
                   partial(_collect_files, _code, CODE, _LONG_IF_FEW, '.pyx', '.pxd', '.pxi')),
}
