"""Attention kernels of accelerators, behind one word (execution.attention).

plain   demix/model/layers/attention.py: every score is stored; what CPUs run
cudnn   cuDNN's fused attention, NVIDIA GPUs from compute capability 8.0 on, bfloat16 or float16
splash  the Pallas kernel that JAX ships for TPUs; length a multiple of 128

`auto` takes the one that the backend has. Where a kernel cannot run, plain does, and one line on
stderr says why. Each honours causality and segments; documents that share a row are a mask of
[B, 1, L, L] for cuDNN, which has no segments of its own behind JAX's public function.

Checked without an accelerator: splash in the interpreter, cuDNN's call in JAX's own XLA version of
the same function, both against plain in value and gradient (tests/model/test_fused_attention.py).
"""

import functools
import sys

import jax
import jax.numpy as jnp

NATIVE = {'gpu': 'cudnn', 'cuda': 'cudnn', 'tpu': 'splash'}


def cudnn(q_BHLK, k_BGLK, v_BGLK, segments_BL=None, *, implementation='cudnn'):
  """Causal attention in jax.nn.dot_product_attention; q is scaled already → [B, H, L, K]."""
  mask = None
  if segments_BL is not None:
    mask = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
  rows = lambda x: x.transpose(0, 2, 1, 3)
  return rows(jax.nn.dot_product_attention(
      rows(q_BHLK), rows(k_BGLK), rows(v_BGLK), mask=mask, scale=1.0, is_causal=True,
      implementation=implementation))


def splash(q_BHLK, k_BGLK, v_BGLK, segments_BL=None, *, interpret=False):
  """Causal attention in JAX's Splash kernel for TPUs; q is scaled already → [B, H, L, K].

  Heads are padded to a multiple of 128, the lanes of a TPU: zeros change no score, and what they
  add to the output is cut off.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels
  _, H, L, K = q_BHLK.shape
  pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, -K % 128)])
  block = next(n for n in (512, 384, 256, 128) if L % n == 0)
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
           'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  kernel = kernels.make_splash_mha(
      kernels.MultiHeadMask([kernels.CausalMask((L, L))] * H), head_shards=1, q_seq_shards=1,
      block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)), interpret=interpret)
  inputs = [pad(x) for x in (q_BHLK, k_BGLK, v_BGLK)]
  if segments_BL is None:
    out = jax.vmap(kernel)(*inputs)
  else:
    segments = kernels.SegmentIds(q=segments_BL, kv=segments_BL)
    out = jax.vmap(kernel)(*inputs, segments)
  return out[..., :K].astype(v_BGLK.dtype)


KERNELS = {'cudnn': cudnn, 'splash': splash}
BACKENDS = {'cudnn': ('gpu', 'cuda'), 'splash': ('tpu',)}


def choose(word: str, config, shape_BL: tuple, dtype, segments_BL=None, spread=lambda f: f):
  """The fused kernel that `word` names, or None for plain attention.

  Args:
    word: one of WORDS. config: transformer.ModelConfig. shape_BL: of the tokens.
    segments_BL: attention stays inside equal numbers. dtype: of the computation.
    spread: a function (q, k, v, segments or None) → the same, run by the devices of a mesh on their
      rows and heads (sharding.by_rows_and_heads).

  Returns:
    (q_BHLK scaled, k_BGLK, v_BGLK) → [B, H, L, K], or None.
  """
  backend = jax.default_backend()
  name = NATIVE.get(backend, 'plain') if word == 'auto' else word
  if name == 'plain':
    return None
  kernel = KERNELS[name]
  # GSPMD cannot split a Pallas call; cuDNN's has rules of its own.
  kernel = spread(kernel) if name == 'splash' else kernel
  run = lambda q, k, v: kernel(q, k, v, segments_BL)
  if why := reason(name, backend, run, config, shape_BL, jnp.dtype(dtype)):
    say(f'attention: plain, not {name}: {why}')
    return None
  return run


def reason(name: str, backend: str, run, config, shape_BL, dtype) -> str:
  """Why a kernel cannot run these shapes here; '' when it can."""
  if backend not in BACKENDS[name]:
    return f'it runs on {BACKENDS[name][0]}, and this is {backend}'
  (B, L), c = shape_BL, config
  if name == 'splash' and L % 128:
    return f'{L} positions are not a multiple of 128'
  q, k = (jax.ShapeDtypeStruct((B, heads, L, c.head_width), dtype)
          for heads in (c.heads, c.kv_heads or c.heads))
  try:  # tracing asks JAX's own checks (device, library, types, head size), backward pass too
    jax.eval_shape(jax.grad(lambda *x: run(*x).sum().astype(jnp.float32), (0, 1, 2)), q, k, k)
  except Exception as e:
    return ' '.join(str(e).split())[:200] or type(e).__name__
  return ''


@functools.cache
def say(message: str):
  """One line on stderr, once a process."""
  print(message, file=sys.stderr, flush=True)
