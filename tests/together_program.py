"""Compiles and runs the step lifted over runs on meshes of 8 devices; prints what it found as JSON.

A program of its own, as tests/sharded_program.py (see tests/test_together.py):

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/together_program.py
"""

import json
import sys

import jax
import models
import numpy as np
from sharded_program import collectives

from demix import sharding, tree
from demix.state import begin
from demix.step import Program
from demix.together import Queue, Stack

SIZES = dict(ffn='dense', experts=(), d_model=20, heads=4, kv_heads=2, head_size=6, d_ff=28)
L, ROWS = 7, 4
# name: mesh, runs, micro-batches
CASES = {
    'expert 4 data 2': (dict(expert=4, data=2), 4, 1),
    'expert 4 data 2, 3 runs': (dict(expert=4, data=2), 3, 1),
    'expert 2 data 2 fsdp 2, 2 micro-batches': (dict(expert=2, data=2, fsdp=2), 4, 2),
    'expert 2 data 2 model 2': (dict(expert=2, data=2, model=2), 4, 1),
}


def program(mesh, accumulation: int) -> Program:
  return Program(model=models.tiny('gpt', **SIZES), adamw=models.adamw(), part='', domains=1,
                 balanced=True, accumulation=accumulation, mesh=mesh)


def states(program: Program, count: int) -> list:
  """Fresh states of runs, no two alike, where the program has them."""
  start = jax.jit(lambda p: begin(p, program.adamw, program.part),
                  out_shardings=program.shardings)
  return [start(models.drawn(program.model, seed=i)) for i in range(count)]


def train(lifted, batches) -> list[list[dict]]:
  """Metrics [step][run] after a step on each of `batches`."""
  out = []
  for rows in batches:
    out.append([{n: np.asarray(x).tolist() for n, x in read().items()}
                for read in lifted.step(rows)])
  return out


def run(case: str) -> dict:
  """What the lifted step communicates, and what it computes there and each run on one device."""
  axes, count, accumulation = CASES[case]
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
  here, alone = program(mesh, accumulation), program(
      sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), 1)
  batches = [[jax.device_get(models.batch_of([0] * ROWS, L, seed=10 * t + i))
              for i in range(count)] for t in range(2)]
  stack = Stack('vmap', [here] * count, states(here, count))
  queue = Queue([alone] * count, states(alone, count))
  state, frozen = stack.states
  filled = [*batches[0], *(batches[0][i] for i in stack.again)]
  rows = {n: np.stack([batch[n] for batch in filled]) for n in filled[0]}
  stack.update = stack.update.lower(state, rows, frozen).compile()
  found = {'mesh': dict(mesh.shape), 'step': collectives(stack.update.as_text(), mesh),
           'together': train(stack, batches), 'alone': train(queue, batches)}
  one, other = ([tree.flatten(jax.device_get(x.state(i)[0])) for i in range(count)]
                for x in (stack, queue))
  return found | {
      'difference': [{n: float(np.abs(a[n] - b[n]).max()) for n in a} for a, b in zip(one, other)],
      'spread': sorted({s.spec[0] or '' for s in jax.tree.leaves(
          jax.tree.map(lambda x: x.sharding, stack.states))})}


if __name__ == '__main__':
  json.dump({case: run(case) for case in CASES}, sys.stdout)
