"""A forest plan: what shall be trained, from what, on what. Made by configs/forest_*.py, kept in
forest.json; `forest run` does what is not done yet.

  {"base": a whole Config, "seed": what of it is different for the seed, or null,
   "experts": {name: {"domains": […], "parent": "seed", "seed@STEP", an expert or "random",
                      "changes": what of the base is different}}}

In a config file `experts` is a list and each has its `name`: a ConfigDict would sort them.
"""

import copy
import re

from demix.errors import BadInput
from demix.forest.manifest import SEED, order
from demix.settings import nearest

RANDOM = 'random'
_PARENT = re.compile(r'([A-Za-z0-9_-]+)(@\d+)?')


def named(plan: dict, where: str) -> dict:
  """A config file's plan with its experts by name, in the order they are listed.

  Raises:
    BadInput: they are no list, or one has no name or another's.
  """
  experts = {}
  branches = plan.get('experts')
  if not isinstance(branches, list):
    raise BadInput(f'{where}: experts are a list of {{"name", "domains", "parent", "changes"}}, '
                   f'not {type(branches).__name__}')
  for branch in branches:
    name = branch.get('name') if isinstance(branch, dict) else None
    if not isinstance(name, str) or name in experts:
      raise BadInput(f'{where}: an expert has no name of its own: {branch}')
    experts[name] = {k: v for k, v in branch.items() if k != 'name'}
  return plan | {'experts': experts}


def check(plan: dict, where: str):
  """Raises BadInput, naming the first thing that is amiss, for what cannot be carried out."""
  for key in ('base', 'seed', 'experts'):
    if key not in plan:
      raise BadInput(f'{where}: a plan has base, seed and experts; {key} is missing')
  experts = plan['experts']
  for name, branch in experts.items():
    if not re.fullmatch(r'[A-Za-z0-9_-]+', name) or name in (SEED, RANDOM):
      raise BadInput(f'{where}: {name!r} cannot be the name of an expert')
    unknown = sorted(branch.keys() - {'domains', 'parent', 'changes'})
    if unknown:
      raise BadInput(f'{where}: expert {name}: no such key {unknown[0]!r}'
                     f'{nearest(unknown[0], ("domains", "parent", "changes"))}')
    if not branch.get('domains'):
      raise BadInput(f'{where}: expert {name} has no domains')
    parent = branch.get('parent', SEED)
    found = _PARENT.fullmatch(parent)
    known = [SEED, RANDOM, *experts]
    if not found or found[1] not in known:
      raise BadInput(f'{where}: expert {name} has parent {parent!r}, which is not there'
                     f'{nearest(parent, known)}')
    if found[1] == SEED and plan['seed'] is None:
      raise BadInput(f'{where}: expert {name} branches from the seed, and the plan has none: give '
                     'seed, or parent=random')
  order({'experts': {n: {'parents': parents(b)} for n, b in experts.items()}}, where)


def parents(branch: dict) -> dict:
  """{parent: weight} as the manifest has them; {} for random parameters."""
  name = branch.get('parent', SEED).partition('@')[0]
  return {} if name == RANDOM else {name: 1.0}


def folder_of(name: str) -> str:
  """Where the seed or an expert lies, relative to the forest."""
  return SEED if name == SEED else f'experts/{name}'


def config_of(plan: dict, name: str) -> dict:
  """The nested Config of the seed or of an expert; data.path and init.model are left to the caller.

  Raises:
    BadInput: a change of a key that the config does not have.
  """
  branch = plan['experts'].get(name)
  changes = plan['seed'] if name == SEED else branch.get('changes') or {}
  config = _changed(plan['base'], changes, f'plan of {name}')
  if branch:
    config['data']['domains'] = list(branch['domains'])
  return config


def _changed(base: dict, changes: dict, where: str) -> dict:
  out = copy.deepcopy(base)
  for key, value in changes.items():
    if key not in out:
      raise BadInput(f'{where}: no key {key!r}{nearest(key, out)}')
    group = isinstance(out[key], dict) and isinstance(value, dict)
    out[key] = _changed(out[key], value, f'{where}.{key}') if group else value
  return out


def tokens_of(plan: dict, name: str) -> int:
  """Training tokens of the seed or of an expert."""
  config = config_of(plan, name)
  return (config['train']['steps'] * config['data']['batch_size']
          * config['data']['sequence_length'])
