"""Several runs that take their steps side by side in one process: the ordinary step, lifted.

Nothing passes between them: each has its own state, batches, clip norm, metrics and checkpoints,
and can go on alone or beside others from any checkpoint. How the step is lifted is one word,
train.lift:

  threads  each run's own compiled step, begun from a thread for every core: where one run leaves
           cores idle another uses them. The very program of a run alone, so the same to the bit.
  map      one program, states stacked, `jax.lax.map` over them: one after another, in one call.
           Its body is the step of a run alone, and on CPU equal to it to the bit.
  vmap     one program, states stacked, batched over the runs; on a mesh with an `expert` axis each
           group of devices has its own runs, and nothing is sent between groups. Up to rounding.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from demix.errors import BadInput
from demix.optim.step import Program, make_step


def lift(word: str, programs: list[Program], states: list[tuple[dict, dict]]):
  """States of runs, and how they take a step: an Each or a Stack.

  Args:
    word: as `chosen` gives it. programs: of each run, all equal. states: (state, frozen) of each.
  """
  if word == 'threads' or len(programs) == 1 == programs[0].mesh.shape['expert']:
    return Each(programs, states)
  return Stack(word, programs, states)


def chosen(word: str, program: Program) -> str:
  """threads, map or vmap; auto is threads on CPU, vmap on accelerators and over an expert axis.

  Raises:
    BadInput: one that the mesh cannot serve, or DEMix LMs over the axis that their experts lie on.
  """
  groups = program.mesh.shape['expert']
  if groups > 1 and program.model.config.ffn == 'demix':
    raise BadInput(f'several DEMix LMs over mesh.expert={groups}: their own experts lie there; '
                   'train them one after another, or give mesh.expert=1')
  if word == 'auto':
    return 'vmap' if groups > 1 or jax.default_backend() != 'cpu' else 'threads'
  if word != 'vmap' and groups > 1:
    raise BadInput(f'train.lift={word} over mesh.expert={groups}: it has one run at a time on all '
                   'devices; give vmap, or mesh.expert=1')
  return word


class Each:
  """Runs that each take their own step, the ordinary one; a single run is an Each of one."""

  def __init__(self, programs: list[Program], states: list[tuple[dict, dict]]):
    self.programs, self.states = list(programs), list(states)
    self._compiled = False
    # XLA's CPU client runs what comes from one thread in turn, and that of several at once.
    count = min(len(self.programs), len(os.sched_getaffinity(0)))
    self._threads = [ThreadPoolExecutor(1) for _ in range(count)] if count > 1 else []

  def _begin(self, i: int, batch: dict):
    state, frozen = self.states[i]
    state, metrics = self.programs[i].step(state, batch, frozen)
    self.states[i] = state, frozen
    return functools.partial(jax.device_get, metrics)

  def step(self, batches: list[dict]) -> list:
    """One step of each run, begun. → for each a call that waits for its numbers."""
    if not self._threads:
      return [self._begin(i, batch) for i, batch in enumerate(batches)]
    out = []
    for i, batch in enumerate(batches):
      out.append(self._threads[i % len(self._threads)].submit(self._begin, i, batch))
      if not self._compiled:
        out[0].result()  # it may compile, for all
        self._compiled = True
    return [future.result() for future in out]

  def state(self, i: int) -> tuple[dict, dict]:
    """(state, frozen) of run i; not to be used after the next step."""
    return self.states[i]

  def only(self, left: list[int]):
    """The same without the runs that are not in `left`."""
    return Each([self.programs[i] for i in left], [self.states[i] for i in left])


ROWS = PartitionSpec('expert', ('data', 'fsdp'))  # of stacked batches


class Stack:
  """Runs whose states are stacked on a leading axis, split over `expert`; one program for all.

  On an axis that their number does not fill the first run is there again, and comes to nothing.
  """

  def __init__(self, word: str, programs: list[Program], states: list[tuple[dict, dict]]):
    self.word, self.programs = word, list(programs)
    program, mesh = programs[0], programs[0].mesh
    self.again = [0] * (-len(programs) % mesh.shape['expert'])
    where = stacked_shardings(program)
    self.states = jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees),
                          out_shardings=where)(*states, *(states[i] for i in self.again))
    self._step = jax.jit(
        lifted(word, program), donate_argnums=0, out_shardings=(where[0], None),
        in_shardings=(where[0], NamedSharding(mesh, ROWS), where[1]))
    self._pick = jax.jit(lambda tree, i: jax.tree.map(lambda x: x[i], tree),
                         out_shardings=program.shardings)

  def step(self, batches: list[dict]) -> list:
    """As Each.step."""
    state, frozen = self.states
    batches = [*batches, *(batches[i] for i in self.again)]
    rows = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    state, metrics = self._step(state, rows, frozen)
    self.states = state, frozen
    read = functools.cache(lambda: jax.device_get(metrics))
    return [lambda i=i: {n: x[i] for n, x in read().items()} for i in range(len(self.programs))]

  def state(self, i: int) -> tuple[dict, dict]:
    """(state, frozen) of run i, a copy."""
    return self._pick(self.states, i)

  def only(self, left: list[int]):
    """As Each.only."""
    return lift(self.word, [self.programs[i] for i in left], [self.state(i) for i in left])


def lifted(word: str, program: Program):
  """The step of `program` over a leading axis of state, batch and frozen."""
  mesh = program.mesh
  step = make_step(program.model, program.adamw, domains=program.domains,
                   balanced=program.balanced, accumulation=program.accumulation, mesh=mesh,
                   rows=PartitionSpec(ROWS[1]))
  if word == 'map':
    return lambda *trees: jax.lax.map(lambda one: step(*one), trees)
  return jax.vmap(step, spmd_axis_name='expert' if mesh.shape['expert'] > 1 else None)


def stacked_shardings(program: Program) -> tuple[dict, dict]:
  """Where stacked (state, frozen) lie: split over `expert` by run, else as those of one run."""
  def over(where: NamedSharding) -> NamedSharding:  # a run's own experts: mesh.expert is 1
    own = (None if axis == 'expert' else axis for axis in where.spec)
    return NamedSharding(program.mesh, PartitionSpec('expert', *own))
  return jax.tree.map(over, program.shardings)
