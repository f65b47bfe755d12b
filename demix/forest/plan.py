"""A forest plan: what shall be trained, from what, on what. Made by configs/forest_*.py, kept in
forest.json; `forest run` does what is not done yet.

  {"base": a whole Config, "seed": what of it is different for the seed, or null,
   "experts": {name: {"domains": […], "parent", "of", "changes": what of the base is different}}}

`parent` is what an expert's parameters start from (BTM §3.2):
  "seed" or an expert     its last checkpoint; "seed@300" a step, "seed@50%" the step at that share
                          of the base's updates, to the nearest checkpoint. The parent keeps it.
  {"law": 0.6, "bio": 0.4}  Σ w θ of these, moments too
  "posterior"             the same with the cached prior of its domain's valid text as weights, over
                          the experts in `of`, by default all that branch otherwise
  "random"                fresh parameters (the control)
Moments and schedule start anew, or go on from the parent's with changes.init.optimizer=continue.

In a config file `experts` is a list and each has its `name`: a ConfigDict would sort them.
"""

import copy
import dataclasses
import math
import re

from demix.errors import BadInput
from demix.forest.manifest import order
from demix.names import POSTERIOR, RANDOM, SEED, why_no_expert
from demix.settings import nearest

_KEYS = ('domains', 'parent', 'of', 'changes')
_PARENT = re.compile(r'([A-Za-z0-9_-]+)(?:@(\d+%?|\d+\.\d+%))?')


@dataclasses.dataclass(frozen=True)
class Parent:
  """What an expert starts from.

  Attributes:
    how: random, copy, given or posterior. names: whose parameters; one for copy, none for random.
    weights: of `names`, where they are given. at: a step ('300') or share ('50%') of the one; ''.
  """
  how: str
  names: tuple = ()
  weights: tuple = ()
  at: str = ''

  @property
  def averaged(self) -> bool:
    return self.how in ('given', POSTERIOR)

  def __str__(self):
    if self.how == 'copy':
      return self.names[0] + (f'@{self.at}' if self.at else '')
    if self.how == 'given':
      return ' + '.join(f'{w:g} {n}' for n, w in zip(self.names, self.weights))
    return self.how if self.how == RANDOM else f'{POSTERIOR} of {", ".join(self.names)}'


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


def parent_of(plan: dict, name: str) -> Parent:
  """What an expert of a plan starts from. BadInput: it is of no known form."""
  branch = plan['experts'][name]
  parent = branch.get('parent', SEED)
  if isinstance(parent, dict):
    return Parent('given', tuple(parent), tuple(parent.values()))
  if parent == RANDOM:
    return Parent(RANDOM)
  if parent == POSTERIOR:
    others = [n for n, b in plan['experts'].items() if n != name and b.get('parent') != POSTERIOR]
    return Parent(POSTERIOR, tuple(branch.get('of') or others))
  found = _PARENT.fullmatch(parent) if isinstance(parent, str) else None
  if not found:
    raise BadInput(f'expert {name} has parent {parent!r}: seed, seed@STEP, seed@SHARE%, an expert, '
                   f'{{expert: weight}}, {POSTERIOR} or {RANDOM}')
  return Parent('copy', (found[1],), (1.0,), found[2] or '')


def check(plan: dict, where: str, there=()):
  """Raises BadInput, naming the first thing that is amiss, for what cannot be carried out.

  Args:
    there: names of experts that the forest has beside those of the plan.
  """
  for key in ('base', 'seed', 'experts'):
    if key not in plan:
      raise BadInput(f'{where}: a plan has base, seed and experts; {key} is missing')
  experts = plan['experts']
  known = [SEED, *dict.fromkeys([*experts, *there])]
  for name, branch in experts.items():
    if why := why_no_expert(name):
      raise BadInput(f'{where}: {name!r} cannot be the name of an expert ({why})')
    unknown = sorted(branch.keys() - set(_KEYS))
    if unknown:
      raise BadInput(f'{where}: expert {name}: no such key {unknown[0]!r}'
                     f'{nearest(unknown[0], _KEYS)}')
    if not branch.get('domains'):
      raise BadInput(f'{where}: expert {name} has no domains')
    _check_parent(plan, name, where, known)
  order({'experts': {n: {'parents': parents(plan, n)} for n in experts}}, where)
  for name in experts:
    step_of(plan, name, where)
  for name in [SEED] * (plan['seed'] is not None) + list(experts):
    check_schedule(plan, name, where)


def _check_parent(plan, name, where, known):
  try:
    parent = parent_of(plan, name)
  except BadInput as e:
    raise BadInput(f'{where}: {e}') from None
  for other in parent.names:
    if other not in known:
      raise BadInput(f'{where}: expert {name} has parent {other!r}, which is not there'
                     f'{nearest(other, [*known, RANDOM, POSTERIOR])}')
  if SEED in parent.names and plan['seed'] is None:
    raise BadInput(f'{where}: expert {name} branches from the seed, and the plan has none: give '
                   'seed, or parent=random')
  if plan['experts'][name].get('of') and parent.how != POSTERIOR:
    raise BadInput(f'{where}: expert {name} has `of` and parent {parent}: that goes with '
                   f'parent={POSTERIOR}')
  if parent.averaged and not parent.names:
    raise BadInput(f'{where}: expert {name} has no parents to average')
  numbers = all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in parent.weights)
  if parent.weights and (not numbers or abs(sum(parent.weights) - 1) > 1e-4):
    total = f', they sum to {sum(parent.weights):g}' if numbers else ''
    raise BadInput(f'{where}: expert {name} has parents of weight {list(parent.weights)}: at least '
                   f'0 each, and 1 together{total}')
  domains = plan['experts'][name]['domains']
  if parent.how == POSTERIOR and len(domains) != 1:
    raise BadInput(f'{where}: expert {name} has parent={POSTERIOR} and domains '
                   f'{", ".join(domains)}: the posterior is estimated on the text of one')


def reach(plan: dict, name: str) -> tuple[int, int, int] | None:
  """(updates at the end of training, first update and steps of the schedule); a run that goes on
  with its parent's optimizer counts the parent's. None: it goes on from one that is not planned."""
  config, branch = config_of(plan, name), plan['experts'].get(name)
  steps, optimizer = config['train']['steps'], config.get('optimizer', {})
  before, start, length = 0, 0, steps
  if branch and config.get('init', {}).get('optimizer') == 'continue':
    parent = parent_of(plan, name)
    planned = [*plan['experts'], *([SEED] if plan['seed'] is not None else ())]
    known = [n for n in parent.names if n in planned]
    found = [reach(plan, n) for n in known]
    if not found or len(known) < len(parent.names) or None in found:
      return None
    before, (_, start, length) = max(f[0] for f in found), found[0]
    if parent.at:
      before -= config_of(plan, known[0])['train']['steps'] - step_of(plan, name)
  length = optimizer.get('schedule_steps') or length
  if restart := optimizer.get('restart', 0):
    start, length = restart, optimizer.get('schedule_steps') or before + steps - restart
  return before + steps, start, length


def check_schedule(plan: dict, name: str, where: str = 'plan'):
  """Raises BadInput when the seed or an expert would train past the end of its schedule."""
  found, config = reach(plan, name), config_of(plan, name)
  if not found or config.get('optimizer', {}).get('schedule') == 'constant':
    return
  last, start, length = found
  if last > start + length:
    before = last - config['train']['steps']
    count = f'{config["train"]["steps"]}' + (f' + {before} of its parents' if before else '')
    fresh = ', or init.optimizer=fresh' if before else ''
    raise BadInput(f'{where}: {name} trains for {count} updates, past the end of its schedule at '
                   f'{start + length}: give optimizer.schedule_steps={last - start}{fresh}')


def parents(plan: dict, name: str) -> tuple:
  """Names of what an expert starts from; () for random parameters."""
  return parent_of(plan, name).names


def step_of(plan: dict, name: str, where: str = 'plan') -> int | None:
  """The step of the parent's checkpoint that an expert starts from; None: its last.

  Raises:
    BadInput: the parent's plan never has that checkpoint.
  """
  parent = parent_of(plan, name)
  if not parent.at:
    return None
  [source] = parent.names
  share = float(parent.at[:-1]) if parent.at.endswith('%') else None
  if source != SEED and source not in plan['experts']:  # it was trained elsewhere
    if share is not None:
      raise BadInput(f'{where}: expert {name} has parent {parent}, but {source} is not of this '
                     'plan and has no budget in it: name a step')
    return int(parent.at)
  train = config_of(plan, source)['train']
  every, last = train['checkpoint_every'] or train['steps'], train['steps']
  if share is None:
    step = int(parent.at)
  else:
    step = round(share / 100 * plan['base']['train']['steps'])
    if step != last:
      step = max(1, round(step / every)) * every
  if not 0 < step <= last or (step % every and step != last):
    raise BadInput(f'{where}: expert {name} has parent {parent}: {source} is trained for {last} '
                   f'steps with a checkpoint every {every}: name one of those')
  return step


def keep_every(plan: dict, name: str) -> int:
  """The steps that others of the plan branch from are multiples of this; 0: none does."""
  steps = [step_of(plan, n) for n in plan['experts'] if name in parents(plan, n)]
  return math.gcd(*(s for s in steps if s))


def folder_of(name: str) -> str:
  """Where the seed or an expert lies, relative to the forest."""
  return SEED if name == SEED else f'experts/{name}'


def parent_folder(name: str) -> str:
  """Where the average lies that an expert starts from, relative to the forest."""
  return f'parents/{name}'


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


def without(plan: dict, name: str) -> tuple[dict, list]:
  """A plan without an expert, and without those that would branch from it: (plan, their names). It
  is left out of the candidates of a posterior, as long as there are others."""
  experts, gone = dict(plan['experts']), [name]
  experts.pop(name, None)
  while True:
    before = len(gone)
    for other, branch in list(experts.items()):
      if kept := [n for n in branch.get('of') or () if n not in gone]:
        experts[other] = branch = branch | {'of': kept}
      names = parents(plan | {'experts': experts}, other)
      averaged = branch.get('parent') == POSTERIOR
      if set(names) & set(gone) or (averaged and not names):
        gone.append(other)
        del experts[other]
    if len(gone) == before:
      return plan | {'experts': experts}, gone[1:]
