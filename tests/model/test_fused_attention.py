"""fused_attention.py: the kernels against plain attention, and the choice of one.

No accelerator is needed: Splash runs in Pallas' interpreter, cuDNN's call in JAX's XLA version of
the same function.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import runs
from models import BALANCED, batch_of, drawn, tiny

from demix.errors import BadInput
from demix.model.layers import fused_attention
from demix.model.layers.attention import attend, mask_bias
from demix.model.model_config import ExecutionConfig

ROOT = Path(__file__).parents[2]
XLA = {'implementation': 'xla'}


def drawn_inputs(L, K=8, seed=0):
  """q [1, 4, L, K], k, v [1, 2, L, K], a cotangent, and segments of unequal length."""
  random = np.random.default_rng(seed)
  q, dy = random.normal(size=(2, 1, 4, L, K)).astype(np.float32)
  k, v = random.normal(size=(2, 1, 2, L, K)).astype(np.float32)
  return q, k, v, dy, np.sort(random.integers(1, 4, (1, L)), 1).astype(np.int32)


def values(kernel, q, k, v, dy):
  """Output and gradients of a kernel of (q, k, v)."""
  def run(q, k, v, dy):
    y, pull = jax.vjp(kernel, q, k, v)
    return y, *pull(dy)
  return models.jit(run)(q, k, v, dy)


def plain(segments):
  def run(q, k, v):
    B, _, L, K = q.shape
    bias = mask_bias(L, None if segments is None else jnp.asarray(segments))
    return attend(q.reshape(B, k.shape[1], -1, K), k, v, bias).reshape(q.shape)
  return run


@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize('name,L,more', [
    ('cudnn', 12, XLA), pytest.param('splash', 256, {'interpret': True}, marks=pytest.mark.long)])
def test_a_fused_kernel_is_plain_attention_in_value_and_gradient(name, L, more, segmented):
  *inputs, segments = drawn_inputs(L)
  segments = segments if segmented else None
  kernel = lambda *x: fused_attention.KERNELS[name](*x, segments, **more)
  for what, got, expected in zip(('output', 'dq', 'dk', 'dv'), values(kernel, *inputs),
                                 values(plain(segments), *inputs)):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5, err_msg=what)


def test_splash_is_plain_attention():
  q, k, v, _, segments = drawn_inputs(128)
  kernel = lambda *x: fused_attention.splash(*x, segments, interpret=True)
  np.testing.assert_allclose(models.jit(kernel)(q, k, v), models.jit(plain(segments))(q, k, v),
                             rtol=1e-4, atol=2e-5)


# ---- the choice

@pytest.fixture
def said(monkeypatch):
  """What was said on stderr."""
  out = []
  monkeypatch.setattr(fused_attention, 'say', out.append)
  return out


def test_on_a_cpu_plain_runs_and_says_so_only_where_another_was_named(said):
  model = tiny('gpt')
  choose = lambda word: fused_attention.choose(word, model.config, (8, 6), 'float32')
  assert choose('auto') is None and choose('plain') is None and said == []
  assert choose('cudnn') is None and choose('splash') is None
  assert said == ['attention: plain, not cudnn: it runs on gpu, and this is cpu',
                  'attention: plain, not splash: it runs on tpu, and this is cpu']
  with pytest.raises(BadInput, match=r"execution.attention='splas'.*did you mean 'splash'"):
    ExecutionConfig(attention='splas').check()


def test_a_kernel_that_cannot_run_gives_its_reason(said, monkeypatch):
  config = tiny('gpt').config
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert fused_attention.choose('auto', config, (8, 6), 'float32') is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert fused_attention.choose('auto', config, (8, 6), 'bfloat16') is None
  assert said[0].startswith('attention: plain, not cudnn: ')  # in JAX's words: no cuDNN here
  assert said[1] == 'attention: plain, not splash: 6 positions are not a multiple of 128'
  assert fused_attention.choose('auto', config, (8, 128), 'bfloat16') is not None
  assert len(said) == 2


@pytest.mark.parametrize('kind', ['gpt', 'llama'])
def test_a_model_runs_the_kernel_that_was_chosen(kind, monkeypatch):
  calls = []
  def kernel(q, k, v, segments):
    calls.append(q.shape)
    return fused_attention.cudnn(q, k, v, segments, **XLA)
  model, batch = tiny(kind), batch_of(BALANCED, segments=True)
  params, where = drawn(model), {n: batch[n] for n in ('segments_BL', 'positions_BL')}
  run = lambda: models.jit(lambda p: model.apply(
      p, batch['tokens_BL'], batch['domain_B'], balanced=True, **where)[0])(params)
  expected = run()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(fused_attention, 'reason', lambda *_: '')
  monkeypatch.setitem(fused_attention.KERNELS, 'cudnn', kernel)
  np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-5)
  assert calls == [(8, 4, 6, 4)]  # once, in the scan
  members = models.jit(lambda p: model.bind(p).bias((8, 6))(*drawn_inputs(6)[:3]))
  assert members(params).shape == (1, 4, 6, 8) and len(calls) == 2  # members of a mixture too


SPREAD = """
import jax, numpy as np
from demix.model import sharding
from demix.model.layers import fused_attention
from demix.model.model_config import ExecutionConfig
mesh = sharding.make_mesh(sharding.MeshConfig(data=2, model=2), jax.devices())
random = np.random.default_rng(0)
q, k, v = random.normal(size=(3, 4, 4, 128, 8)).astype(np.float32)
segments = np.sort(random.integers(1, 4, (4, 128)), 1).astype(np.int32)
kernel = lambda *x: fused_attention.splash(*x, interpret=True)
for seg in (None, segments):
  alone = kernel(q, k, v, seg)
  spread = jax.jit(lambda *x: sharding.by_rows_and_heads(mesh)(kernel)(*x, seg))(q, k, v)
  assert len({str(s.index) for s in spread.addressable_shards}) == 4
  np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)
print('same')
"""


@pytest.mark.long
def test_devices_run_splash_on_their_own_rows_and_heads():
  done = subprocess.run(
      [sys.executable, '-c', SPREAD], capture_output=True, text=True, timeout=300,
      env=os.environ | runs.devices(4) | {'PYTHONPATH': str(ROOT)})
  assert done.stdout == 'same\n', done.stderr[-2000:]
