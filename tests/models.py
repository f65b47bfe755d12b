"""Tiny models and batches that tests share: no two experts alike, no leaf at its start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from xla_flags import FAST

from demix.model import tree
from demix.model.params import Model
from demix.model.transformer import ExecutionConfig, ModelConfig
from demix.optim.optimizer import AdamW, OptimizerConfig
from demix.optim.step import make_step

EXPERTS = ('law', 'bio', 'web', 'art')  # not in alphabetical order
V, L, ROWS = 37, 6, 8

SIZES = dict(layers=2, d_model=16, heads=4, d_ff=24, vocab_size=V, vocab_multiple=8, max_length=8)
KINDS = {
    'gpt': {},  # as the papers trained
    'llama': dict(kv_heads=2, norm='rmsnorm', norm_placement='post', qk_norm=True,
                  positions='rotary', activation='swiglu', biases=False, tied=False,
                  embed_scale=False),
    'period 2': dict(layers=4, expert_every=2, kv_heads=1, activation='gelu_tanh'),
}

# Compiled for one run: a step takes 0.5 s to compile, not 3.7, and is slow where nobody looks.
jit = functools.partial(jax.jit, compiler_options={
    'xla_backend_optimization_level': 0,
    **({'xla_cpu_use_fusion_emitters': False} if 'emitters' in FAST else {})})


@functools.cache
def tiny(kind='gpt', dtype='float32', scan=True, remat='none', loss_block=0, **changes) -> Model:
  """A DEMix LM of one of KINDS; ffn='dense' for the dense one."""
  fields = SIZES | dict(ffn='demix') | KINDS[kind] | changes
  if fields['ffn'] == 'demix':
    fields = dict(experts=EXPERTS) | fields
  return Model(ModelConfig(**fields), ExecutionConfig(scan, remat, loss_block), dtype)


def drawn(model: Model, seed: int = 0) -> dict:
  """Parameters where every leaf of every layer and expert differs, biases and scales too."""
  random, out = np.random.default_rng(seed), {}
  for name, leaf in tree.flatten(model.abstract).items():
    noise = random.normal(size=leaf.shape)
    wide = leaf.ndim > 1 and not name.endswith(('bias', 'scale'))
    value = 1 + 0.3 * noise if name.endswith('scale') else noise * (0.3 if wide else 0.2)
    out[name] = jnp.asarray(value, jnp.float32)
  return tree.unflatten(out)


def batch_of(domains, length: int = L, seed: int = 0, segments: bool = False) -> dict:
  """A batch with a row for each of `domains` and unequal weights, a quarter of them 0."""
  random, B = np.random.default_rng(seed), len(domains)
  tokens = random.integers(0, V, (B, length + 1))
  batch = {
      'tokens_BL': tokens[:, :-1], 'targets_BL': tokens[:, 1:],
      'weights_BL': random.choice([0, 0.5, 1, 2], (B, length)),
      'domain_B': np.asarray(domains)}
  if segments:
    batch['segments_BL'] = 1 + (np.arange(length) >= random.integers(1, length, (B, 1)))
    batch['positions_BL'] = np.stack([
        np.concatenate([np.arange(n) for n in np.bincount(row)[1:]])
        for row in batch['segments_BL']])
  types = {'weights_BL': jnp.float32}
  return {n: jnp.asarray(x, types.get(n, jnp.int32)) for n, x in batch.items()}


BALANCED = np.repeat(np.arange(len(EXPERTS)), ROWS // len(EXPERTS))


def adamw(**changes) -> AdamW:
  """AdamW with steps and decay that show at this size and a clip that takes part.

  The large eps keeps rounding small: k_bias has no true gradient, and Adam's eps of 1e-7 would make
  whole steps of the rounding errors it has instead.
  """
  fields = dict(learning_rate=0.01, clip=0.5, weight_decay=0.5, eps=1e-3)
  return AdamW(OptimizerConfig(**fields | changes), 10)


def steps(model, params, batches, *, balanced=True, accumulation=1, domains=4, **more):
  """Training state after a step on each of `batches`, and their metrics."""
  optimizer = adamw(**more)
  state = {'params': params, 'optimizer': optimizer.init(params)}
  step = jit(make_step(model, optimizer, domains=domains, balanced=balanced,
                       accumulation=accumulation))
  out = []
  for batch in batches:
    state, metrics = step(state, batch)
    out.append(metrics)
  return jax.device_get(state), jax.device_get(out)


def gradient(model, params, batch, *, balanced=False):
  """Loss and flat canonical gradients of the token-mean, without make_step."""
  from demix.model import loss
  def mean(params):
    hidden, _, _ = model.apply(params, batch['tokens_BL'], batch['domain_B'], balanced=balanced)
    nll = loss.nll(hidden, model.output_table(params), batch['targets_BL'], V)
    return (nll * batch['weights_BL']).sum() / batch['weights_BL'].sum()
  value, grads = jit(jax.value_and_grad(mean))(params)
  return value, model.canonical(grads)


def assert_close(a, b, rtol=2e-5, atol=2e-6):
  """Two trees (or dicts) have the same names and nearly the same numbers; the leaf is named."""
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol, atol, err_msg=name)


def assert_same(a, b):
  """As `assert_close`, to the bit."""
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    x, y = np.asarray(a[name]), np.asarray(b[name])
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name
