"""What can be the name of a domain, a group or an expert, and paths that files name.

Standard library only: names and paths are checked before anything is read or imported.
"""

import os
import re
from pathlib import Path

from demix.errors import BadInput

LONGEST = 100  # a name becomes a folder, and the name of a file with more in it
RULE = f'names are letters, digits, _ and -, at most {LONGEST} of them'
SEED, RANDOM, POSTERIOR, NEAREST, NONE = 'seed', 'random', 'posterior', 'nearest', 'none'
# What lies beside the domains in a token store, and where a domain becomes an expert, the words
# that stand in the place of an expert's name.
KEPT = {'tokenizer': 'the token store keeps its tokenizer there',
        'clusterer': 'a token store of clusters keeps its clusterer there'}
WORDS = {SEED: "a forest's first model is called so",
         RANDOM: 'a plan says so for fresh parameters',
         POSTERIOR: 'a plan says so for a weighted average',
         NEAREST: 'init.expert says so for the best expert there is',
         NONE: '--parent says so for no parent'}

_NAME = re.compile(rf'[A-Za-z0-9_-]{{1,{LONGEST}}}')


def is_name(text) -> bool:
  """Whether something is spelt like a name; it may still be taken by demix (see `reserved`)."""
  return isinstance(text, str) and bool(_NAME.fullmatch(text))


def why_no_domain(name) -> str:
  """Why a new domain cannot be called `name`; '' where it can."""
  if not is_name(name):
    return RULE
  return KEPT.get(name.lower()) or WORDS.get(name, '')  # some file systems fold case


def why_no_expert(name) -> str:
  """Why a new expert cannot be called `name`; '' where it can."""
  return WORDS.get(name, '') if is_name(name) else RULE


def inside(folder, path, where: str) -> Path:
  """The file or folder below `folder` that a file names by a relative path.

  Args:
    where: for the message: the file that names it, and for what.

  Raises:
    BadInput: the path is none, is absolute or leads out of the folder, by `..` or by a link.
  """
  usable = isinstance(path, str) and path.isprintable() and not os.path.isabs(path)
  if usable:
    root, found = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
    usable = '..' not in Path(path).parts and found.startswith(os.path.join(root, ''))
  if not usable:
    raise BadInput(f'{where}: {path!r} is no path below {folder}: restore the file from a copy')
  return Path(folder) / path


def shown(name) -> str:
  """A file's name as valid text: bytes that are not UTF-8 become \\xNN."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')
