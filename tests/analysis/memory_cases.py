"""Configs whose memory is predicted and compiled; a program of its own for more than one device.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/analysis/memory_cases.py NAME…

prints {name: [predicted, compiled] bytes} as JSON.
"""

import json
import sys

import jax

from demix.analysis import memory, needs
from demix.config import Config, TrainConfig
from demix.data.sampling.batches import DataConfig
from demix.model.sharding import MeshConfig
from demix.model.transformer import ExecutionConfig, preset


def case(size='10m', kind='gpt', B=8, L=128, packing='continuous', model=None, train=None,
         mesh=None, **execution) -> Config:
  return Config(
      model=preset(f'{kind}-{size}', **model or {}), train=TrainConfig(**train or {}),
      data=DataConfig(batch_size=B, sequence_length=L, packing=packing),
      execution=ExecutionConfig(**execution), mesh=MeshConfig(**mesh or {}))


DEMIX = dict(ffn='demix')
# {name: (ids, config)}
QUICK = {
    '1m': (2048, case('1m', B=32)),
    '1m all at once': (2048, case('1m', B=32, model=DEMIX, remat='full', loss_block=512,
                                  train=dict(accumulation=2, compute_dtype='bfloat16'))),
}
ONE = {
    'dense': (2048, case()),
    'demix': (2048, case(model=DEMIX)),
    'wide': (8192, case()),
    'full': (2048, case(remat='full')),
    'dots': (2048, case(model=DEMIX, remat='dots')),
    'offload': (2048, case(model=DEMIX, remat='offload')),
    'blocks': (8192, case(loss_block=256)),
    'bfloat16': (2048, case(train=dict(compute_dtype='bfloat16'))),
    'accumulation': (2048, case(B=32, train=dict(accumulation=4))),
    'documents': (2048, case(packing='document')),
    'llama': (2048, case(kind='llama')),
    'every second': (2048, case(model=dict(ffn='demix', expert_every=2))),
    'long': (2048, case('1m', B=32, L=256)),
}
EIGHT = {
    'data 8': (2048, case(B=32, mesh=dict(data=8))),
    'fsdp 8': (2048, case(B=32, mesh=dict(data=1, fsdp=8))),
    'expert 8': (2048, case(B=32, model=DEMIX, mesh=dict(data=1, expert=8))),
    'expert 4 fsdp 2': (2048, case(B=32, model=DEMIX, mesh=dict(data=1, expert=4, fsdp=2))),
    'data 2 model 4': (2048, case(B=16, mesh=dict(data=2, model=4))),
    'expert 2 data 2 model 2': (2048, case(B=32, model=DEMIX,
                                           mesh=dict(data=2, expert=2, model=2))),
}


def measure(name: str) -> tuple[int, int]:
  """Bytes a device needs: predicted, and by the compiled step."""
  vocab_size, config = (QUICK | ONE | EIGHT)[name]
  plan = memory.plan(needs.completed(config, vocab_size, 8), jax.device_count())
  return sum(memory.predict(plan).values()), memory.compiled(plan, jax.devices())


if __name__ == '__main__':
  print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
