"""Trains on meshes of 1 to 8 devices and prints losses and digests as JSON (test_meshes.py).

A program of its own: tests of exactness must not share a process with virtual devices.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/mesh_program.py STORE FOLDER CASE…
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import jax

from demix import settings
from demix.config import Config
from demix.model import sharding
from demix.runtime import digests
from demix.training.run import Run
from demix.training.train import Loop

ON = {'1': {}, '2': dict(data=2), '4': dict(expert=4), '8': dict(expert=4, data=2),
      'fsdp 8': dict(fsdp=8), 'model 2': dict(model=2), 'data 8': dict(data=8),
      'expert 2 fsdp 2 model 2': dict(expert=2, fsdp=2, model=2),
      'data 2 fsdp 2 model 2': dict(data=2, fsdp=2, model=2)}


def config(store, axes, steps) -> Config:
  """The tiny DEMix LM, 16 rows an update."""
  made = settings.from_dict(Config, {})
  replace = dataclasses.replace
  return replace(
      made, seed=3,
      model=replace(made.model, layers=2, d_model=16, heads=2, ffn='demix', vocab_multiple=8),
      data=replace(made.data, path=store, sequence_length=32, batch_size=16),
      optimizer=replace(made.optimizer, learning_rate=0.01, clip=1.0, schedule_steps=20, eps=1e-3),
      train=replace(made.train, steps=steps, log_every=1, checkpoint_every=0, tensorboard=False),
      mesh=sharding.MeshConfig(**{'data': 1} | axes))


def go(store, folder, axes, steps) -> list:
  """Trains to `steps`; the losses, from metrics.jsonl."""
  count = 1
  for size in axes.values():
    count *= size
  devices, make = jax.devices()[:count], sharding.make_mesh
  sharding.make_mesh = lambda config, experts=0: make(config, devices, experts)
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    Loop([Run(config(store, axes, steps), folder)])()
  sharding.make_mesh = make
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [row['train/loss'] for row in rows]


def restored(store, folder, axes) -> str:
  """Digest of everything after a checkpoint was restored on a mesh and laid out there."""
  devices, make = jax.devices(), sharding.make_mesh
  count = 1
  for size in axes.values():
    count *= size
  sharding.make_mesh = lambda config, experts=0: make(config, devices[:count], experts)
  run = Run(config(store, axes, 10), folder)
  leaves = run.program.export(*run.start())
  sharding.make_mesh = make
  return digests.of_tree({n: digests.of_leaf(n, x) for n, x in leaves.items()})


def main(store, folder, cases):
  """{case: losses over 20 steps}; 'A > B': 10 steps on A, then to 20 on B, and digests."""
  out = {}
  for case in cases:
    place = Path(folder) / case.replace(' ', '_').replace('>', 'to')
    place.mkdir(parents=True)
    before, _, after = case.partition(' > ')
    if not after:
      out[case] = go(store, place, ON[before], 20)
      continue
    go(store, place, ON[before], 10)
    saved = json.loads((place / 'checkpoints/10/meta.json').read_text())['state_digest']
    out[case] = {'saved': saved, 'restored': restored(store, place, ON[after]),
                 'losses': go(store, place, ON[after], 20)}
  json.dump(out, sys.stdout)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
