"""What the tests of demix/checkpoints/checkpoint.py share: states, saving them, and damage."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from demix.checkpoints import checkpoint
from demix.checkpoints.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]


def state_of(step: int) -> dict:
  """Leaves of many types, every bit of them drawn (so NaNs with payloads, -0.0, subnormals)."""
  bits = np.random.default_rng(step)
  def draw(dtype, *shape):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return jnp.asarray(np.frombuffer(bits.bytes(size), dtype).reshape(shape))
  return {
      'params/embed/tokens': draw(np.float32, 17, 3),
      'params/blocks/0/ffn/experts/legal/up': draw(jnp.bfloat16, 4, 5),
      'params/blocks/10/ffn/experts/a.b "é"/up': draw(np.float16, 6),
      'optimizer/mu/embed/tokens': draw(np.float32, 17, 3),
      'optimizer/count': jnp.int32(step),
      'optimizer/seen': draw(np.int32, 7),
      'optimizer/key': draw(np.uint32, 2),
      'optimizer/mask': jnp.array([True, False, True])}


def like(state, **more):
  return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, **more) for n, x in state.items()}


def same_bits(a, b):
  assert list(a) == list(b)
  for name in a:
    x, y = np.asarray(a[name]), np.asarray(b[name])
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def save(directory, *steps, state=state_of, **more):
  with Checkpoints(directory, **{'max_to_keep': 0, **more}) as c:
    for step in steps:
      c.save(step, state(step), {'note': f'step {step}'})


def latest(directory):
  """(step, warnings)."""
  warnings = []
  return checkpoint.latest(directory, warn=warnings.append), warnings


def files(directory, step):
  root = directory / str(step)
  return sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.is_file())


def flip(where):
  def damage(path):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1 << random.Random(str(path.name)).randrange(8)
    path.write_bytes(data)
  return damage
