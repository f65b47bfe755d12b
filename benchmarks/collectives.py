"""Bytes that a device sends in one training step, out of the compiled program, against the formula.

  python benchmarks/collectives.py [--size=1m] [--devices=8] [--json=FILE]

Arms: dense (data parallel), DEMix with 8 experts at several meshes, and BTM, whose experts are
whole LMs that train in groups of devices which share nothing. The devices are virtual: the program
is compiled for them and not run. Sent is by rings: 2 (n - 1) / n of an all-reduce's bytes over n
devices. The formula, with W devices, G groups of experts, g = W / G devices in each and 4 bytes a
gradient:

  dense  2 (W - 1) / W · 4 · N
  DEMix  2 (W - 1) / W · 4 · N_shared + 2 (g - 1) / g · 4 · N_experts / G
  BTM    2 (g - 1) / g · 4 · N, of which nothing between groups
"""

import argparse
import os
import sys

import measure


def sent(n: int, scalars: float) -> float:
  """Bytes that a device sends to all-reduce float32 `scalars` over `n` devices by a ring."""
  return 2 * (n - 1) / n * 4 * scalars


def formula(kind: str, shared: float, experts: float, devices: int, groups: int) -> float:
  """Bytes that a device sends in a step. shared: parameters that all domains train; experts: all
  others, of all experts together; of BTM's experts, each a whole LM, `shared` has those of one."""
  each = devices // groups
  if kind == 'BTM':
    return sent(each, shared)
  return sent(devices, shared) + sent(each, experts / groups)


def program(size, arm: str, axes: dict, devices: int):
  """(mesh, collectives, parameters that are shared, parameters of experts) of a compiled step."""
  import jax
  from jax.sharding import NamedSharding

  from demix.analysis.collectives import collectives
  from demix.model import sharding, tree
  from demix.model.params import Model
  from demix.model.transformer import preset
  from demix.optim.optimizer import AdamW, OptimizerConfig
  from demix.optim.state import abstract
  from demix.optim.step import make_step
  ffn = dict(ffn='demix', experts=measure.EXPERTS) if arm == 'DEMix' else {}
  model = Model(preset(size.preset, vocab_size=size.vocab, max_length=size.length, **ffn))
  adamw = AdamW(OptimizerConfig(), 100)
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:devices])
  state, _ = abstract(model, adamw)
  rows, domains = max(size.batch, devices), len(measure.EXPERTS)
  batch = {name: jax.ShapeDtypeStruct((rows, size.length), kind) for name, kind in (
      ('tokens_BL', 'int32'), ('targets_BL', 'int32'), ('weights_BL', 'float32'))}
  batch['domain_B'] = jax.ShapeDtypeStruct((rows,), 'int32')
  where = sharding.state_shardings(mesh, state['params'])
  step = jax.jit(make_step(model, adamw, domains=domains, balanced=True, mesh=mesh),
                 in_shardings=(where, NamedSharding(mesh, sharding.BATCH)),
                 out_shardings=(where, None), donate_argnums=0)
  text = step.lower(state, batch).compile().as_text()
  flat = tree.flatten(state['params'])
  experts = sum(leaf.size for name, leaf in flat.items() if '/experts/' in name)
  return mesh, collectives(text, mesh), tree.size(flat) - experts, experts


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', default='1m', choices=measure.SIZES)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={args.devices}'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from demix.analysis.collectives import table
  size, W = measure.SIZES[args.size], args.devices
  arms = [('dense', dict(data=W), 1)]
  arms += [('DEMix', dict(expert=G, data=W // G), G) for G in (8, 4, 2) if W % G == 0]
  arms += [('BTM', dict(data=W // G), G) for G in (8, 4, 2) if W % G == 0]
  figures = {'command': sys.argv, 'size': args.size, 'devices': W, 'arms': []}
  print(f'{args.size}, {W} devices, MB that a device sends in a step\n\n'
        '| arm | mesh | parameters (shared, of experts) | compiled | formula | compiled / formula '
        f'| between groups of experts | by axes |\n|{" --- |" * 8}')
  for arm, axes, G in arms:
    _, found, shared, experts = program(size, arm, axes, W // G if arm == 'BTM' else W)
    total, wanted = sum(c.sent for c in found), formula(arm, shared, experts, W, G)
    crossing = sum(c.sent for c in found if 'expert' in c.axes)
    parts = {f'{op} over {"·".join(over)}': x for (op, over), x in table(found).items() if x > 1e3}
    name = ' '.join(f'{a}={n}' for a, n in axes.items() if n > 1) or 'one device'
    name = f'{G} × ({name})' if arm == 'BTM' else name
    ratio = f'{total / wanted:.3f}' if wanted else '–'
    print(f'| {arm} | {name} | {shared / 1e6:.2f}M, {experts / 1e6:.2f}M | {total / 1e6:.2f} '
          f'| {wanted / 1e6:.2f} | {ratio} | {crossing / 1e6:.2f} '
          f'| {", ".join(f"{n} {x / 1e6:.2f}" for n, x in parts.items()) or "none"} |', flush=True)
    figures['arms'].append({
        'arm': arm, 'mesh': axes, 'groups': G, 'shared': shared, 'experts': experts,
        'compiled': total, 'formula': wanted, 'between_groups': crossing, 'parts': parts})
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
