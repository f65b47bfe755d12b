"""The training step: one update, compiled once for all runs that make the same one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from demix.model import loss, sharding, tree
from demix.model.params import Model
from demix.optim.optimizer import AdamW
from demix.optim.state import abstract, begin, canonical_state, running_state


def micro_batches(batch: dict, count: int) -> dict:
  """[B, …] → [count, B / count, …]: micro-batch m has rows m, m + count, …

  So those of an expert-major batch are expert-major, with equally many rows per expert where these
  are a multiple of `count`, and on a mesh rows stay on their devices.
  """
  return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
          for name, x in batch.items()}


def make_step(model: Model, adamw: AdamW, *, domains: int, balanced: bool, accumulation: int = 1,
              mesh=None, rows=sharding.BATCH):
  """(state, batch, frozen) → (state, metrics): one update with the gradient of one scalar.

  That scalar is the token-mean NLL of the whole batch (docs/method.md): Σ weight · nll /
  Σ weight, whatever the number of micro-batches and devices. `frozen` is the rest of the parameters
  of a run that trains a part of them (demix/optim/state.py): read, and no more.

  Args:
    domains: how many domains `domain_B` counts. balanced: rows are expert-major (static).
    mesh: the mesh it runs on; None: one device. Left to itself, XLA splits the width of
      activations over `fsdp`, and gathers an expert's parameters and moments, not its gradient.
    rows: how the rows of a batch lie on it.
  """
  config = model.config
  keep_rows, keep_gradients, keep_whole = sharding.constraints(mesh, rows)

  def weighted_nll(trained, frozen, batch, total):
    params = tree.join(trained, frozen)
    hidden, aux, _ = model.apply(
        params, batch['tokens_BL'], batch['domain_B'], balanced=balanced,
        segments_BL=batch.get('segments_BL'), positions_BL=batch.get('positions_BL'),
        constrain=keep_rows, spread=sharding.by_rows_and_heads(mesh))
    nll_BL = loss.nll(hidden, model.output_table(params), batch['targets_BL'], config.vocab_size,
                      model.execution.loss_block)
    nll_B = (nll_BL * batch['weights_BL']).sum(1)
    # Auxiliary losses are means over tokens: that of the batch is the mean of its micro-batches'.
    auxiliary = sum(aux.values()) / accumulation
    return nll_B.sum() / total + auxiliary, (nll_B, auxiliary)

  def gradient(trained, frozen, batch, total):
    """((loss, NLL by domain), gradient)"""
    (_, (nll_B, auxiliary)), grads = jax.value_and_grad(weighted_nll, has_aux=True)(
        trained, frozen, batch, total)
    # Numbers are sums over rows that are there: XLA, left to fuse them into the loss, adds in
    # another order where several runs share a program, and together is not apart to the bit.
    nll_B = jax.lax.optimization_barrier(nll_B)
    by_domain = jax.ops.segment_sum(nll_B, batch['domain_B'], domains)
    return (nll_B.sum() / total + auxiliary, by_domain), grads

  def step(state, batch, frozen=None):
    frozen = frozen or {}
    tokens_D = keep_whole(
        jax.ops.segment_sum(batch['weights_BL'].sum(1), batch['domain_B'], domains))
    scored = batch['weights_BL'].sum()
    # A batch may hold nothing but prompts, of which no token is predicted: it changes nothing.
    total = jnp.where(scored > 0, scored, 1)
    if accumulation == 1:
      (value, nll_D), grads = gradient(state['params'], frozen, batch, total)
    else:
      def add(sums, micro):
        more = gradient(state['params'], frozen, micro, total)
        return jax.tree.map(jnp.add, sums, more), None
      zero = jax.tree.map(jnp.zeros_like, ((total, tokens_D), state['params']))
      ((value, nll_D), grads), _ = jax.lax.scan(
          add, zero, micro_batches(batch, accumulation))
    grads = keep_gradients(grads)
    # Balanced batches have rows of every expert, and all of some may be prompts only.
    present = tokens_D > 0 if config.ffn == 'demix' else None
    params, optimizer, metrics = adamw.update(
        grads, state['optimizer'], state['params'],
        finite=jnp.isfinite(value) & (scored > 0), present_E=present)
    metrics |= {'loss': value, 'nll_D': nll_D, 'tokens_D': tokens_D}
    return {'params': params, 'optimizer': optimizer}, metrics

  return step


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled for a run: runs with equal programs can share one.

  Attributes:
    part: the leaves that are trained (config.TRAINABLE). domains, balanced, accumulation: as
      `make_step` takes them. mesh: what it runs on.
  """
  model: Model
  adamw: AdamW
  part: str
  domains: int
  balanced: bool
  accumulation: int
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def abstract(self) -> tuple[dict, dict]:
    """(state, frozen) as jax.ShapeDtypeStruct."""
    return abstract(self.model, self.adamw, self.part)

  @functools.cached_property
  def shardings(self) -> tuple[dict, dict]:
    """Where (state, frozen) lie."""
    state, frozen = self.abstract
    return (sharding.state_shardings(self.mesh, state['params']),
            sharding.shardings(self.mesh, frozen))

  @functools.cached_property
  def canonical(self) -> dict:
    """The canonical leaves as jax.ShapeDtypeStruct, with where they lie on their way to and from a
    checkpoint."""
    like = jax.eval_shape(lambda *s: canonical_state(self.model, *s), *self.abstract)
    where = sharding.spread(self.mesh, like)
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n]) for n, x in like.items()}

  @functools.cached_property
  def step(self):
    """(state, batch, frozen) → (state, metrics), compiled; state is donated."""
    state, frozen = self.shardings
    rows = jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
    whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    return jax.jit(
        make_step(self.model, self.adamw, domains=self.domains, balanced=self.balanced,
                  accumulation=self.accumulation, mesh=self.mesh),
        in_shardings=(state, rows, frozen), out_shardings=(state, whole), donate_argnums=0)

  @functools.cached_property
  def fresh(self):
    """seed → (state, frozen) of a first start."""
    return self._state(lambda seed: begin(self.model.init(seed), self.adamw, self.part))

  @functools.cached_property
  def begin(self):
    """A whole running tree of parameters → (state, frozen), with zero moments."""
    return self._state(lambda params: begin(params, self.adamw, self.part))

  @functools.cached_property
  def restored(self):
    """Canonical leaves → (state, frozen)."""
    return self._state(lambda flat: running_state(self.model, flat, self.part))

  @functools.cached_property
  def go_on(self):
    """(parameters, other canonical leaves) → (state, frozen), with the moments of the leaves."""
    def state(params, flat):
      flat = flat | {f'params/{n}': x for n, x in self.model.canonical(params).items()}
      return running_state(self.model, flat, self.part)
    return self._state(state)

  def _state(self, function):
    return jax.jit(function, out_shardings=self.shardings)

  @functools.cached_property
  def export(self):
    """(state, frozen) → canonical leaves, compiled. A copy, so that what is saved in the background
    is not the buffer the next step reuses."""
    where = {name: leaf.sharding for name, leaf in self.canonical.items()}
    return jax.jit(lambda *s: jax.tree.map(jnp.copy, canonical_state(self.model, *s)),
                   out_shardings=where)


@functools.lru_cache(16)
def shared(program: Program) -> Program:
  """The first of equal programs: what it has compiled serves all runs of this process."""
  return program
