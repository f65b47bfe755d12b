"""Compiles and runs the training step on meshes of 8 devices and prints what it found as JSON.

A program of its own (see test_sharding.py): virtual devices change how XLA splits work over
threads, so tests of exactness must not share a process with them.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_program.py CASE…
"""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import models
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from demix.analysis.collectives import collectives
from demix.eval import perplexity
from demix.model import sharding, tree
from demix.optim import together
from demix.optim.step import Program, make_step

# Every leaf has another shape than those of other kinds, whole or split in two.
SIZES = dict(d_model=20, heads=4, kv_heads=2, head_size=6, d_ff=28, vocab_size=41, max_length=7)
L, ROWS = 7, 16
# name: mesh, experts, micro-batches
CASES = {
    'expert 4 data 2': (dict(expert=4), 4, 1),  # data=-1: what is left
    'expert 4 data 2, 2 micro-batches': (dict(expert=4, data=2), 4, 2),
    'expert 8': (dict(expert=8), 8, 1),
    'expert 2 data 2 model 2': (dict(expert=2, data=2, model=2), 4, 1),
    'expert 2 data 2 fsdp 2': (dict(expert=2, data=2, fsdp=2), 4, 1),
}


# ---- the program

@functools.cache
def experiment(experts: int):
  """(model, optimizer, state, batches), in NumPy."""
  model = models.tiny('gpt', experts=tuple(f'domain{9 - e}' for e in range(experts)), **SIZES)
  optimizer, params = models.adamw(), models.drawn(model)
  batches = [models.batch_of(np.repeat(np.arange(experts), ROWS // experts), L, seed=s)
             for s in range(2)]
  state = {'params': params, 'optimizer': optimizer.init(params)}
  return model, optimizer, *jax.device_get((state, batches))


@functools.cache
def one_device(experts: int):
  """(step, state, batches) of a whole batch on one device."""
  model, optimizer, state, batches = experiment(experts)
  return models.jit(make_step(model, optimizer, domains=experts, balanced=True)), state, batches


def train(step, state, batches):
  """Flat state after a step on each batch, and {metric: [of each step]}."""
  rows = []
  for batch in batches:
    state, metrics = step(state, batch)
    rows.append({n: np.asarray(x).tolist() for n, x in metrics.items()})
  return tree.flatten(state), {n: [row[n] for row in rows] for n in rows[0]}


def plain(found) -> list[dict]:
  """Collectives as JSON has them."""
  return [dataclasses.asdict(c) | {'sent': c.sent} for c in found]


def run(case: str) -> dict:
  """What the step of a case communicates, and what it computes there and on one device."""
  axes, experts, accumulation = CASES[case]
  model, optimizer, state, batches = experiment(experts)
  params = state['params']
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
  where = sharding.state_shardings(mesh, model.abstract)
  rows = NamedSharding(mesh, sharding.BATCH)
  step = models.jit(
      make_step(model, optimizer, domains=experts, balanced=True, accumulation=accumulation,
                mesh=mesh), donate_argnums=0,
      in_shardings=(where, rows), out_shardings=(where, None)).lower(state, batches[0]).compile()
  forward = models.jit(
      lambda p, b: model.apply(p, b['tokens_BL'], b['domain_B'], balanced=True)[0],
      in_shardings=(where['params'], rows), out_shardings=rows)
  scored = models.jit(lambda p, b: perplexity.token_nll.__wrapped__(model, p, b, True),
                      in_shardings=(where['params'], rows), out_shardings=rows)
  used = {n: batches[0][n] for n in ('tokens_BL', 'targets_BL', 'domain_B')}
  one, alone = train(*one_device(experts))
  many, sharded = train(step, jax.device_put(state, where), jax.device_put(batches, rows))
  lies = tree.flatten(where)
  return {
      'mesh': dict(mesh.shape),
      'alone': alone,
      'sharded': sharded,
      'difference': {n: float(np.abs(np.asarray(one[n]) - np.asarray(many[n])).max())
                     for n in one},
      'strays': [n for n in many if not many[n].sharding.is_equivalent_to(lies[n], many[n].ndim)],
      'step': plain(collectives(step.as_text(), mesh)),
      'forward': plain(collectives(forward.lower(params, batches[0]).compile().as_text(), mesh)),
      'scored': plain(collectives(scored.lower(params, used).compile().as_text(), mesh)),
      'leaves': {n: {'shape': list(x.shape), 'local': list(s.shard_shape(x.shape)),
                     'without_fsdp': list(NamedSharding(mesh, PartitionSpec(
                         *(None if a == 'fsdp' else a for a in s.spec))).shard_shape(x.shape))}
                 for (n, x), s in zip(tree.flatten(params).items(),
                                      tree.flatten(where['params']).values())}}


# ---- several runs, each on its own group of devices

BESIDE = {  # name: mesh, runs, micro-batches
    '8 runs, expert 8': (dict(expert=8), 8, 1),
    '3 runs, expert 2 data 4': (dict(expert=2), 3, 1),
    '4 runs, expert 2 data 2 fsdp 2, 2 micro-batches': (dict(expert=2, data=2, fsdp=2), 4, 2),
}


def beside(case: str) -> dict:
  """What two steps of several dense runs communicate, and what each computes there and alone."""
  axes, count, accumulation = BESIDE[case]
  model, optimizer = models.tiny('gpt', ffn='dense', **SIZES), models.adamw()
  program = Program(model, optimizer, '', 1, True, accumulation,
                    sharding.make_mesh(sharding.MeshConfig(**axes)))
  def fresh(seed):
    params = models.drawn(model, seed)
    return {'params': params, 'optimizer': optimizer.init(params)}
  batches = [[jax.device_get(models.batch_of(np.zeros(8), L, seed=10 * run + step))
              for run in range(count)] for step in range(2)]
  together.jax = SimpleNamespace(**vars(jax) | {'jit': models.jit})
  lifted = together.lift(together.chosen('auto', program), [program] * count,
                         [(fresh(run), {}) for run in range(count)])
  rows = {n: np.stack([batches[0][i][n] for i in (*range(count), *lifted.again)])
          for n in batches[0][0]}
  text = lifted._step.lower(lifted.states[0], rows, {}).compile().as_text()
  numbers = [[out() for out in lifted.step(batch)] for batch in batches]
  alone = models.jit(make_step(model, optimizer, domains=1, balanced=True))
  out = {'mesh': dict(program.mesh.shape), 'step': plain(collectives(text, program.mesh)),
         'runs': []}
  for run in range(count):
    one, metrics = train(alone, fresh(run), [batch[run] for batch in batches])
    many = tree.flatten(lifted.state(run)[0])
    out['runs'].append({
        'alone': metrics,
        'beside': {n: [np.asarray(step[run][n]).tolist() for step in numbers] for n in metrics},
        'difference': max(float(np.abs(np.asarray(one[n]) - np.asarray(many[n])).max())
                          for n in one)})
  out['devices'] = [len(s.device_set) for s in
                    {x.sharding for x in jax.tree.leaves(lifted.states[0]['params'])}]
  out['local'] = sorted({x.sharding.shard_shape(x.shape)[0]
                         for x in jax.tree.leaves(lifted.states[0])})
  return out


if __name__ == '__main__':
  json.dump({case: run(case) if case in CASES else beside(case) for case in sys.argv[1:]},
            sys.stdout)
