"""Growing a forest: what its plan says and its manifest lacks, trained by the ordinary loop.

Each expert is an ordinary workdir, F/experts/NAME, that needs its own data and its parent only: the
branches can be trained in any order, on different machines, and registered when they are there.
"""

import contextlib
from pathlib import Path

from demix import settings
from demix.checkpoints import catalogue
from demix.config import Config
from demix.errors import BadInput, Preempted
from demix.forest import manifest, plan
from demix.forest.manifest import SEED
from demix.lifecycle import average
from demix.lifecycle.forests import names, state_of
from demix.lifecycle.register import register
from demix.loading.reference import Reference
from demix.runtime.workdir import hold
from demix.training import train


def config_of(folder: Path, forest: dict, name: str, data: str) -> Config:
  """The Config that the seed or an expert is trained with; what it starts from is there."""
  content = forest['plan']
  nested = plan.config_of(content, name)
  nested['data']['path'] = data
  if every := plan.keep_every(content, name):
    nested['train']['keep_every'] = every
  if name != SEED:
    parent = plan.parent_of(content, name)
    if parent.averaged:
      where = folder / plan.parent_folder(name)
      nested['init']['model'] = str(Reference(where, catalogue.steps(where / 'checkpoints')[-1]))
    elif parent.names:
      entry = _entry(forest, parent.names[0])
      step = plan.step_of(content, name) or entry['step']
      nested['init']['model'] = str(Reference(folder / entry['workdir'], step))
  return settings.from_dict(Config, nested, f'plan of {name}')


def _entry(forest: dict, name: str) -> dict | None:
  return forest['base'] if name == SEED else forest['experts'].get(name)


def make_parent(folder: Path, forest: dict, name: str, data: str, verify_data: bool = True,
                say=print):
  """Writes the average that an expert starts from, an ordinary workdir, F/parents/NAME.

  Raises:
    BadInput: a parent is not registered yet.
    Refused: the parents do not go together.
  """
  parent, content = plan.parent_of(forest['plan'], name), forest['plan']
  models = {}
  for other in parent.names:
    entry = _require(forest, name, other)
    models[other] = Reference(folder / entry['workdir'], entry['step'])
  target = folder / plan.parent_folder(name)
  say(f'{name:<12} starts from an average: {parent}')
  [domain, *_] = content['experts'][name]['domains']
  weights = list(parent.weights) or 'posterior'
  if len(models) == 1:
    weights = [1.0]
  average.merge(models, target, weights=weights, domain=domain, data=data, say=say, single=True,
                verify_data=verify_data)


def _require(forest: dict, name: str, parent: str) -> dict:
  entry = _entry(forest, parent)
  if not entry:
    raise BadInput(f'{name} branches from {parent}, which is not trained yet: run it first '
                   f'(--only={parent})')
  return entry


def grow(folder, *, only=(), data: str = '', together: bool = False, require_gain: bool = False,
         limit: int = 0, verify_data: bool = True, say=print) -> list[str]:
  """Trains and registers what the plan says and is not done yet; the same again goes on.

  Args:
    folder: the forest. only: names; () for all. data: token store; that of the plan by default.
    together: experts whose parents are there are trained in one process, side by side.
    require_gain, limit: see lifecycle.register.add. verify_data: see train.Loop.

  Returns:
    Names that were trained or registered.

  Raises:
    BadInput: no plan, an unknown name, or a parent that is not registered yet.
    Refused: an expert that the gate refuses; it stays trained and unregistered.
    Preempted: SIGTERM or SIGUSR1 came while one was trained.
  """
  folder = Path(folder)
  forest = manifest.load(folder)
  if not forest['plan']:
    raise BadInput(f'{folder} has no plan: forest plan --config=configs/forest_….py')
  known, done = names(forest), []
  for name in only:
    if name not in known:
      raise BadInput(f'{folder}: the plan has no {name!r}{settings.nearest(name, known)}')
  for name in only or known:
    if state_of(folder, forest, name)[0] in ('missing', 'training'):
      plan.check_schedule(forest['plan'], name, str(folder / manifest.FILE))
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
    store, group = data or forest['plan']['data'], [name]
    if together and state != 'finished':
      group += [n for n in only or known if n != name and ready(folder, forest, n)]
    for other in group:
      if other != SEED:
        prepare(folder, forest, other, store, verify_data, say)
    stop = _train(folder, forest, group, store, verify_data, say) if state != 'finished' else None
    register(folder, name, data=store, require_gain=require_gain, limit=limit,
             verify_data=verify_data, say=say)
    done.append(name)
    if stop and (rest := [n for n in only or known if not _entry(manifest.load(folder), n)]):
      raise Preempted(f'{stop}: {name} is there; to be trained or registered: {", ".join(rest)}; '
                      'run the same command again to go on')
  return done


def prepare(folder: Path, forest: dict, name: str, data: str, verify_data: bool = True, say=print):
  """Sees to it that what an expert starts from is there: averages are made.

  Raises:
    BadInput: a parent is not registered yet.
  """
  parent = plan.parent_of(forest['plan'], name)
  if not parent.averaged:
    for other in parent.names:
      _require(forest, name, other)
  elif not catalogue.steps(folder / plan.parent_folder(name) / 'checkpoints'):
    make_parent(folder, forest, name, data, verify_data, say)


def ready(folder: Path, forest: dict, name: str) -> bool:
  """Whether an expert is still to be trained and all that it comes from is registered."""
  parents = plan.parent_of(forest['plan'], name).names if name != SEED else ()
  return (all(_entry(forest, parent) for parent in parents)
          and state_of(folder, forest, name)[0] in ('missing', 'training'))


def _train(folder: Path, forest: dict, group: list[str], data: str, verify_data: bool,
           say) -> str | None:
  """Trains one of the plan, or several side by side, all of whose workdirs are held. Returns as
  train.run."""
  with contextlib.ExitStack() as stack:
    members = {}
    for name in group:
      _, step, wanted = state_of(folder, forest, name)
      say(f'{name:<12} to be trained: step {step} of {wanted}')
      held = stack.enter_context(hold(folder / plan.folder_of(name), 'forest'))
      members[name] = config_of(folder, forest, name, data), held
    if len(group) == 1:
      return train.run(*members[group[0]], verify_data)
    return train.together(members, say, verify_data)
