"""Growing a forest: what its plan says and its manifest lacks, trained by the ordinary loop.

Each expert is an ordinary workdir, F/experts/NAME, that needs its own data and its parent only: the
branches can be trained in any order, on different machines, and registered when they are there.
"""

import contextlib
from pathlib import Path

from demix import catalogue, settings, train
from demix.config import Config
from demix.errors import BadInput
from demix.forest import manifest, plan
from demix.forest.manifest import SEED
from demix.lifecycle.forests import names, state_of
from demix.workdir import hold


def config_of(folder: Path, forest: dict, name: str, data: str) -> Config:
  """The Config that the seed or an expert is trained with."""
  nested = plan.config_of(forest['plan'], name)
  nested['data']['path'] = data
  if name != SEED:
    parent, _, step = forest['plan']['experts'][name].get('parent', SEED).partition('@')
    if parent != plan.RANDOM:
      where = folder / plan.folder_of(parent)
      step = step or (forest['base'] if parent == SEED else forest['experts'][parent])['step']
      nested['init']['model'] = f'{where}@{step}'
  return settings.from_dict(Config, nested, f'plan of {name}')


def register(folder: Path, name: str):
  """Writes a finished workdir of the plan into the manifest.

  Raises:
    BadInput: it is not there, or not finished.
  """
  forest = manifest.load(folder)
  state, step, wanted = state_of(folder, forest, name)
  if state not in ('finished', 'registered'):
    raise BadInput(f'{folder / plan.folder_of(name)}: {state} at step {step} of {wanted}: train it '
                   f'first (forest run --forest={folder} --only={name})')
  directory = folder / plan.folder_of(name) / 'checkpoints'
  catalogue.require(directory, step)  # every byte is read
  meta = catalogue.read_meta(directory, step)
  entry = {'workdir': plan.folder_of(name), 'step': step, 'content_digest': meta['content_digest']}
  with manifest.edit(folder) as forest:
    if name == SEED:
      forest['base'] = entry
      return
    branch = forest['plan']['experts'][name]
    forest['experts'][name] = entry | {
        'kind': 'full', 'parents': plan.parents(branch), 'domains': list(branch['domains']),
        'steps': step, 'tokens': meta['ledger']['tokens'], 'gate': None, 'artefacts': {},
        'fingerprints': {'tokenizer': meta['tokenizer'], 'data': meta['data']}}


def grow(folder, *, only=(), data: str = '', together: bool = False, say=print) -> list[str]:
  """Trains and registers what the plan says and is not done yet; the same again goes on.

  Args:
    folder: the forest. only: names; () for all. data: token store; that of the plan by default.
    together: experts whose parents are there are trained in one process, side by side.

  Returns:
    Names that were trained or registered.

  Raises:
    BadInput: no plan, an unknown name, or a parent that is not registered yet.
  """
  folder = Path(folder)
  forest = manifest.load(folder)
  if not forest['plan']:
    raise BadInput(f'{folder} has no plan: forest plan --config=configs/forest_….py')
  known, done = names(forest), []
  for name in only:
    if name not in known:
      raise BadInput(f'{folder}: the plan has no {name!r}{settings.nearest(name, known)}')
  for name in known:
    if only and name not in only:
      continue
    forest = manifest.load(folder)
    state, step, _ = state_of(folder, forest, name)
    if state == 'registered':
      say(f'{name:<12} is there, step {step}')
      continue
    if state == 'differs':
      raise BadInput(f'{folder / plan.folder_of(name)} is not what {manifest.FILE} says of {name}: '
                     'restore it, or remove the expert')
    for parent in (plan.parents(forest['plan']['experts'][name]) if name != SEED else ()):
      if not (forest['base'] if parent == SEED else parent in forest['experts']):
        raise BadInput(f'{name} branches from {parent}, which is not trained yet: run it first '
                       f'(--only={parent})')
    if state != 'finished':
      group = [name]
      if together:
        asked = [n for n in known if not only or n in only]
        group = [n for n in asked if n == name or ready(folder, forest, n)]
      _train(folder, forest, group, data or forest['plan']['data'], say)
    register(folder, name)
    done.append(name)
  return done


def ready(folder: Path, forest: dict, name: str) -> bool:
  """Whether an expert is still to be trained and all that it comes from is registered."""
  parents = plan.parents(forest['plan']['experts'][name]) if name != SEED else ()
  there = all(forest['base'] if p == SEED else p in forest['experts'] for p in parents)
  return there and state_of(folder, forest, name)[0] in ('missing', 'training')


def _train(folder: Path, forest: dict, group: list[str], data: str, say):
  """Trains one of the plan, or several side by side, all of whose workdirs are held."""
  with contextlib.ExitStack() as stack:
    members = {}
    for name in group:
      _, step, wanted = state_of(folder, forest, name)
      say(f'{name:<12} to be trained: step {step} of {wanted}')
      held = stack.enter_context(hold(folder / plan.folder_of(name), 'forest'))
      members[name] = config_of(folder, forest, name, data), held
    if len(group) == 1:
      train.run(*members[group[0]])
    else:
      train.together(members, say)
