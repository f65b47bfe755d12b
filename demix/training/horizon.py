"""How far a run's learning-rate schedule reaches, and what is refused beyond its end.

A schedule counts updates (`optimizer/count`, those of the model that a run goes on from included).
It is laid out once, at the first start, for optimizer.schedule_steps. optimizer.restart=N lays it
out anew from update N on, warm-up included; what was before stays as it was, so that a run that
falls back to a checkpoint from before N goes through the same updates again.
"""

import dataclasses

import jax
import numpy as np

from demix.checkpoints import catalogue, checkpoint
from demix.config import Config
from demix.errors import BadInput, NothingToLoad

KEYS = ('optimizer.restart', 'optimizer.schedule_steps')  # of the identity


@dataclasses.dataclass(frozen=True)
class Standing:
  """Where a run stands.

  Attributes:
    step: of its newest checkpoint; 0: there is none. updates: done by then.
    schedule: (first update, number) of the schedule that it is on; None: it has none yet.
    earlier: the same of those before it.
  """
  step: int = 0
  updates: int = 0
  schedule: tuple | None = None
  earlier: tuple = ()


def updates_of(directory, step: int, meta: dict) -> int:
  """Updates that a checkpoint's optimizer counts; read from its leaf where meta.json is older."""
  if 'updates' in meta:
    return meta['updates']
  name = 'optimizer/count'
  like = {name: jax.ShapeDtypeStruct((), np.int32)}
  return int(checkpoint.restore(directory, step, like, host=True)[name])


def pieces(meta: dict) -> dict:
  """{'restart', 'schedules'} of a checkpoint whose schedule was laid out anew, else {}."""
  restart = meta['config']['optimizer'].get('restart', 0)
  return {'restart': restart, 'schedules': meta.get('schedules', [])} if restart else {}


def standing(directory, saved: dict | None, init: dict | None) -> Standing:
  """Where the run of a workdir stands.

  Args:
    directory: its checkpoints. saved: content of its config.json; None: there is none.
    init: record of the model whose optimizer the run goes on with (start.Start); None: fresh.
  """
  step = updates = 0
  schedule, earlier = None, ()
  if init:
    updates = init.get('updates', init['step'])
    schedule = init.get('restart', 0), init['schedule_steps']
    earlier = init.get('schedules', ())
  for there in reversed(catalogue.steps(directory)):
    try:
      meta = catalogue.read_meta(directory, there)
      step, updates = there, updates_of(directory, there, meta)
    except (BadInput, NothingToLoad):
      continue  # it is named when the run is restored
    saved = meta if saved is None else saved
    break
  if saved is not None:
    schedule = tuple(saved['identity'].get(key, 0) for key in KEYS)
    earlier = saved.get('schedules', ())
  return Standing(step, updates, schedule, tuple(tuple(piece) for piece in earlier))


def settle(given: Config, config: Config, now: Standing, workdir) -> tuple[Config, tuple]:
  """The completed config with the schedule that holds, and those before it.

  Args:
    given: as the user gave it. config: the same completed. now: where the run stands.
    workdir: for messages.

  Raises:
    BadInput: the run would train past the end of its schedule, or a restart that cannot be.
  """
  asked, steps = given.optimizer, config.train.steps
  last = now.updates + steps - now.step  # updates at the end of the run
  start, length = now.schedule or (0, 0)
  earlier = now.earlier
  if asked.restart > start:
    _check_restart(config, now, last, workdir)
    earlier = (*earlier, now.schedule)
    start, length = asked.restart, asked.schedule_steps or last - asked.restart
  else:
    start = asked.restart or start
    length = asked.schedule_steps or length or steps
  optimizer = dataclasses.replace(config.optimizer, restart=start, schedule_steps=length)
  if optimizer.ends and steps > now.step and last > start + length:
    raise BadInput(_past(optimizer, now, steps, last, start + length, workdir))
  return dataclasses.replace(config, optimizer=optimizer), earlier


def _check_restart(config: Config, now: Standing, last: int, workdir):
  restart = config.optimizer.restart
  if now.schedule is None:
    raise BadInput(f'optimizer.restart={restart}, but {workdir} has not trained yet: leave it out; '
                   'optimizer.schedule_steps says how long its schedule is')
  end = sum(now.schedule)
  if restart < now.updates:
    raise BadInput(f'optimizer.restart={restart} lies before the {now.updates} updates that were '
                   f'done (step {now.step} in {workdir}): give optimizer.restart={now.updates}')
  if config.optimizer.ends and restart > max(end, now.updates):
    raise BadInput(f'optimizer.restart={restart} lies behind the end of the schedule, {end} '
                   f'updates: give optimizer.restart={max(end, now.updates)}')
  if last <= restart:
    raise BadInput(f'train.steps={config.train.steps} ends at {last} updates, '
                   f'optimizer.restart={restart} begins there or later: give more train.steps')


def _past(optimizer, now, steps, last, end, workdir) -> str:
  before = now.updates - now.step
  count = f'{steps} + {before} of the model it goes on from' if before else f'{steps}'
  said = (f'train.steps={count} is past the end of the schedule, optimizer.schedule_steps='
          f'{optimizer.schedule_steps}')
  if optimizer.restart:
    said += f' from optimizer.restart={optimizer.restart} on'
  longer = f'optimizer.schedule_steps={last - optimizer.restart}'
  if now.schedule is None or not now.step:  # nothing is trained that could not be laid out anew
    if not before:
      return f'{said}: the learning rate is at its end there; give {longer}, or leave it out'
    return (f'{said}: the learning rate is at its end there; give {longer}, a new schedule with '
            f'--config.init.optimizer=fresh, or with the moments as they are '
            f'--config.optimizer.restart={now.updates}')
  return (f'{said}, and {now.updates} updates are done: lay out a longer schedule from the start '
          f'({longer} in another workdir), or a new one from here: in another workdir '
          f'--config.init.model={workdir}, in this one --config.optimizer.restart={now.updates}')


def comparable(saved: dict, now: dict) -> dict:
  """Saved identity fields as far as they must be those of a run whose schedule was laid out anew
  since: without the schedule's own."""
  if now.get(KEYS[0], 0) <= saved.get(KEYS[0], 0):
    return saved
  return saved | {key: now[key] for key in KEYS}
