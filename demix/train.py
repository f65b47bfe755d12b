"""The one training loop. A dense LM, a DEMix LM, a branch and every baseline differ in config only.

Resuming is exact: batch t is a function of (seed, t), so the state of a run is its parameters,
moments and step; a run that was killed and started again goes through the same losses bit for bit.
"""

import contextlib
import dataclasses
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from demix import checkpoint, loss, processes, settings, sharding, tree
from demix.config import (
  TRAINABLE,
  Config,
  complete,
  data_fingerprint,
  digest,
  domain_symbols,
  identity,
)
from demix.data.batches import Batches
from demix.data.store import TokenStore
from demix.errors import NonFinite, Preempted
from demix.eval import perplexity
from demix.metrics import Metrics
from demix.optimizer import AdamW
from demix.params import Model
from demix.progress import Progress, duration, quantity
from demix.start import find
from demix.state import abstract, begin, canonical_state, running_state
from demix.workdir import check_identity, load_config, load_identity, save_config


def micro_batches(batch: dict, count: int) -> dict:
  """[B, …] → [count, B / count, …]: micro-batch m has rows m, m + count, …

  So those of an expert-major batch are expert-major, with equally many rows per expert where these
  are a multiple of `count`, and on a mesh rows stay on their devices.
  """
  return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
          for name, x in batch.items()}


def make_step(model: Model, adamw: AdamW, *, domains: int, balanced: bool, accumulation: int = 1,
              mesh=None):
  """(state, batch, frozen) → (state, metrics): one update with the gradient of one scalar.

  That scalar is the token-mean NLL of the whole batch (docs/method.md): Σ weight · nll /
  Σ weight, whatever the number of micro-batches and devices. `frozen` is the rest of the parameters
  of a run that trains a part of them (demix/state.py): read, and no more.

  Args:
    domains: how many domains `domain_B` counts. balanced: rows are expert-major (static).
    mesh: the mesh it runs on; None: one device. Left to itself, XLA splits the width of
      activations over `fsdp`, and gathers an expert's parameters and moments, not its gradient.
  """
  config = model.config
  keep_rows, keep_gradients = sharding.constraints(mesh)

  def weighted_nll(trained, frozen, batch, total):
    params = tree.join(trained, frozen)
    hidden, aux, _ = model.apply(
        params, batch['tokens_BL'], batch['domain_B'], balanced=balanced,
        segments_BL=batch.get('segments_BL'), positions_BL=batch.get('positions_BL'),
        constrain=keep_rows)
    nll_BL = loss.nll(hidden, model.output_table(params), batch['targets_BL'], config.vocab_size,
                      model.execution.loss_block)
    nll_B = (nll_BL * batch['weights_BL']).sum(1)
    by_domain = jax.ops.segment_sum(nll_B, batch['domain_B'], domains)
    return nll_B.sum() / total + sum(aux.values()), by_domain

  def step(state, batch, frozen=None):
    frozen = frozen or {}
    tokens_D = jax.ops.segment_sum(batch['weights_BL'].sum(1), batch['domain_B'], domains)
    total = batch['weights_BL'].sum()
    gradient = jax.value_and_grad(weighted_nll, has_aux=True)
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
    present = None if balanced or config.ffn != 'demix' else tokens_D > 0
    params, optimizer, metrics = adamw.update(
        grads, state['optimizer'], state['params'], finite=jnp.isfinite(value), present_E=present)
    metrics |= {'loss': value, 'nll_D': nll_D, 'tokens_D': tokens_D}
    return {'params': params, 'optimizer': optimizer}, metrics

  return step


def header(config: Config, model: Model, mesh, workdir, more=()) -> str:
  """What is about to run, in a few lines."""
  total, active = model.counts()
  tokens = config.data.batch_size * config.data.sequence_length
  flops = tokens * model.flops_per_token(config.data.sequence_length)
  default, now = settings.flatten(Config()), settings.flatten(config)
  changed = ' '.join(f'{k}={v}' for k, v in now.items() if v != default[k] and k != 'data.path')
  kinds = ', '.join(sorted({d.device_kind for d in mesh.devices.flat}))
  axes = ' '.join(f'{a}={n}' for a, n in mesh.shape.items() if n > 1)
  return '\n'.join([
      f'run         {workdir}',
      f'devices     {mesh.size} × {kinds}{f" ({axes})" if axes else ""}',
      f'parameters  {quantity(total)} total, {quantity(active)} active per token',
      f'per step    {quantity(tokens)} tokens, {quantity(flops)} FLOPs',
      *more,
      f'config      {changed}'])


class Run:
  """One training run in a workdir whose lock is held."""

  def __init__(self, config: Config, workdir: Path):
    self.workdir = workdir
    self.store = TokenStore.open(config.data.path)
    there = (workdir / 'config.json').exists()
    saved = load_identity(workdir) if there else None
    self.init = find(config, self.store, load_config(workdir) if there else None, workdir)
    if self.init and config.init.optimizer == 'continue' and not config.optimizer.schedule_steps:
      config = dataclasses.replace(config, optimizer=dataclasses.replace(
          config.optimizer, schedule_steps=self.init.record['schedule_steps']))
    config = complete(config, self.store, saved, self.init and self.init.model)
    self.lineage = {}
    if self.init:
      config = self.init.settle(config, self.store)
      self.lineage['init'] = self.init.record
    self.config = config
    self.identity = identity(config, self.store, self.init and self.init.identity)
    if saved is not None:
      check_identity(saved, self.identity, workdir)
    self.domains = config.data.domains
    self.balanced = config.data.sampling == 'balanced'
    self.model = Model(config.model, config.execution, config.train.compute_dtype)
    self.mesh = sharding.make_mesh(config.mesh, experts=len(config.model.experts))
    sharding.check_replicated(self.mesh, self.model.abstract, config.mesh.max_replicated)
    sharding.check_rows(self.mesh, config.data.batch_size // config.train.accumulation)
    self.part = TRAINABLE[config.init.trainable]
    self.symbols = domain_symbols(config)
    self.rows = sharding.process_rows(self.mesh, config.data.batch_size)
    self.batches = Batches(self.store, config.data, config.seed, symbols=self.symbols,
                           rows=self.rows)
    self.adamw = AdamW(config.optimizer, config.optimizer.schedule_steps)
    self.abstract = abstract(self.model, self.adamw, self.part)
    self.shardings = sharding.state_shardings(self.mesh, self.abstract[0]['params'])
    self.frozen_shardings = sharding.shardings(self.mesh, self.abstract[1])
    self.flops = (config.data.batch_size * config.data.sequence_length
                  * self.model.flops_per_token(config.data.sequence_length))
    self.ledger = {'tokens': 0, 'flops': 0, 'seconds': 0.0}
    self.request = processes.Request()

  # ---- state: fresh or restored --------------------------------------------------------------

  def start(self, directory) -> tuple[int, dict, dict]:
    """(steps done, state, frozen): the newest trusted checkpoint, or a first start."""
    step = processes.decided(lambda: checkpoint.latest(directory))
    where = self.shardings, self.frozen_shardings
    like = jax.eval_shape(lambda *s: canonical_state(self.model, *s), *self.abstract)
    self.spread = sharding.spread(self.mesh, like)
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.spread[n])
            for n, x in like.items()}
    here = NamedSharding(self.mesh, PartitionSpec())
    if step is None:
      if self.init and self.config.init.optimizer == 'continue':
        flat = self.init.moments(like)  # first: the model is let go of with its parameters
        params = sharding.put(self.init.parameters(), here)
        def go_on(params, flat):
          flat = flat | {f'params/{n}': x for n, x in self.model.canonical(params).items()}
          return running_state(self.model, flat, self.part)
        return 0, *jax.jit(go_on, out_shardings=where)(params, flat)
      if self.init:
        first = jax.jit(lambda p: begin(p, self.adamw, self.part), out_shardings=where)
        return 0, *first(sharding.put(self.init.parameters(), here))
      fresh = jax.jit(lambda seed: begin(self.model.init(seed), self.adamw), out_shardings=where)
      return 0, *fresh(self.config.seed)
    meta = checkpoint.read_meta(directory, step)
    check_identity(meta['identity'], self.identity, self.workdir)
    self.ledger = meta['ledger']
    self.lineage = {name: meta[name] for name in ('init', 'lifecycle') if name in meta}
    flat = checkpoint.restore(directory, step, like)
    stack = jax.jit(lambda flat: running_state(self.model, flat, self.part), out_shardings=where)
    return step, *stack(flat)

  def meta(self, step: int) -> dict:
    """What made this checkpoint; the data index is step + skipped."""
    return {'step': step, 'skipped': 0, 'data_index': step,
            'config': settings.to_dict(self.config), 'identity': self.identity,
            'config_digest': digest(self.identity), 'domains': list(self.domains),
            'tokenizer': self.store.tokenizer_meta['fingerprint'],
            'data': data_fingerprint(self.store, self.domains), 'ledger': dict(self.ledger),
            'epochs': self.batches.epochs(step), **self.lineage}

  def save_config(self):
    """Writes W/config.json, W/data/card.json and W/data/tokenizer/."""
    save_config(self.workdir, {'version': 1, 'config': settings.to_dict(self.config),
                               'identity': self.identity, **self.lineage})
    (self.workdir / 'data').mkdir(exist_ok=True)
    shutil.copyfile(self.store.path / 'card.json', self.workdir / 'data' / 'card.json')
    # With it the workdir is enough to read and write text.
    shutil.copytree(self.store.path / 'tokenizer', self.workdir / 'data' / 'tokenizer',
                    dirs_exist_ok=True)

  def _origin(self) -> list[str]:
    if not self.init:
      return []
    trained = tree.size(self.abstract[0]['params'])
    return [f'starts from {self.init.describe()}', f'trains      {quantity(trained)} parameters']

  # ---- the loop -------------------------------------------------------------------------------

  def loop(self) -> int:
    """Trains to train.steps; returns the steps done. See `run` for what it raises."""
    with self._signals():
      return self._loop()

  def _loop(self):
    config, train = self.config, self.config.train
    directory = self.workdir / 'checkpoints'
    done, state, frozen = self.start(directory)
    if done >= train.steps:
      print(f'done already: step {done} of {train.steps} in {self.workdir}')
      return done
    processes.decided(self.save_config)  # not before: what cannot be gone on with stays as it is
    print(header(config, self.model, self.mesh, self.workdir, self._origin()), flush=True)
    if done:
      print(f'resumed     at step {done}', flush=True)
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    step_fn = jax.jit(
        make_step(self.model, self.adamw, domains=len(self.domains), balanced=self.balanced,
                  accumulation=train.accumulation, mesh=self.mesh),
        in_shardings=(self.shardings, NamedSharding(self.mesh, sharding.BATCH),
                      self.frozen_shardings),
        out_shardings=(self.shardings, everywhere), donate_argnums=0)
    # A copy, so that what is saved in the background is not the buffer the next step reuses.
    export = jax.jit(lambda *s: jax.tree.map(jnp.copy, canonical_state(self.model, *s)),
                     out_shardings=self.spread)
    saver = checkpoint.Checkpoints(directory, max_to_keep=train.max_to_keep,
                                   keep_every=train.keep_every, clean=True)
    quiet = not processes.first()
    metrics = Metrics(self.workdir, step=done or -1, tensorboard=train.tensorboard, quiet=quiet)
    progress = Progress(train.steps, 'steps', 'train', done=done, quiet=quiet)
    names = ['tokens_BL', 'targets_BL', 'weights_BL', 'domain_B']
    if config.data.packing == 'document':
      names += ['segments_BL', 'positions_BL']
    clock = Clock(config.data.batch_size * config.data.sequence_length, self.flops)

    def log(step, row):
      if row:
        metrics.write(step, row)

    # Whatever ends the run, the saver is closed first: a save under way ends well.
    with metrics, progress, saver:
      batches, pending = self.batches.iterate(done), None
      place = lambda batch: sharding.place(self.mesh, {n: batch[n] for n in names},
                                           config.data.batch_size, self.rows)
      batch = place(next(batches))
      for step in range(done + 1, train.steps + 1):
        state, out = step_fn(state, batch, frozen)
        # While this step runs, the next batch is copied and the numbers of step - 1 are read.
        batch = place(next(batches))
        if pending:
          log(*self._record(*pending, progress, clock))
        pending = step, out
        # Read once: one that comes from here on waits for the next step.
        stop = (number := self.request.seen()) and signal.Signals(number).name
        if stop == 'SIGINT':
          raise KeyboardInterrupt
        evaluate = (train.eval_every and step % train.eval_every == 0) or step == train.steps
        save = ((train.checkpoint_every and step % train.checkpoint_every == 0)
                or step == train.steps or stop)
        if evaluate or save:
          _, row = self._record(*pending, progress, clock)
          pending = None
          if evaluate:
            row |= self._evaluate(step, tree.join(state['params'], frozen))
            clock.restart()
          log(step, row)
        if save:
          self.ledger['seconds'] += clock.lap()
          saver.save(step, export(state, frozen), self.meta(step))
        if stop and step < train.steps:
          saver.close()
          raise Preempted(f'{stop}: saved step {step} of {train.steps} in {self.workdir}; '
                          'run the same command again to go on')
    epochs = ', '.join(f'{d} {e:.2f}' for d, e in self.batches.epochs(train.steps).items())
    print(f'epochs      {epochs}\ndone        step {train.steps} in '
          f'{duration(self.ledger["seconds"])}; checkpoints in {directory}', flush=True)
    return train.steps

  def _record(self, step, out, progress, clock) -> tuple[int, dict]:
    """Reads one step's numbers: stops on a non-finite one, shows; the row to log, {} for none."""
    config = self.config
    out = jax.device_get(out)
    with np.errstate(invalid='ignore', over='ignore'):
      nll_D = out['nll_D'] / np.maximum(out['tokens_D'], 1)
    if not out['applied']:
      bad = ~np.isfinite(nll_D)
      worst = int(np.argmax(bad) if bad.any() else np.argmax(nll_D))
      raise NonFinite(
          f'step {step}: loss {out["loss"]}, gradient norm {out["grad_norm"]}; worst domain '
          f'{self.domains[worst]} at {nll_D[worst]} nats; no parameter was changed by that step; '
          'lower optimizer.learning_rate or look at that domain')
    self.ledger['tokens'] += int(out['tokens_D'].sum())
    self.ledger['flops'] += self.flops
    clock.step()
    progress.update(step, f'loss {out["loss"]:.3f}, {clock.text()}')
    if step % config.train.log_every and step != config.train.steps:
      return step, {}
    row = {'train/loss': float(out['loss']), 'train/grad_norm': float(out['grad_norm']),
           'train/learning_rate': float(out['learning_rate'])}
    for name, value, tokens in zip(self.domains, nll_D, out['tokens_D']):
      if tokens:
        row[f'train/{name}/nll'] = float(value)
    for name, value in self.batches.epochs(step).items():
      row[f'data/{name}/epochs'] = value
    return step, row | clock.rates()

  def _evaluate(self, step, params) -> dict:
    """NLL on the start of each training domain's valid text, as a row to log."""
    config = self.config
    parts = [perplexity.Part(d, 'valid', i) for i, d in enumerate(self.domains)
             if 'valid' in self.store.splits(d)]
    if not parts:
      return {}
    ways = sharding.row_ways(self.mesh)
    scores = perplexity.evaluate(
        self.model, params, self.store, parts, length=config.data.sequence_length,
        batch_size=-(-min(config.data.batch_size, 64) // ways) * ways,
        limit=config.train.eval_sequences, symbols=self.symbols,
        place=lambda batch: sharding.put(batch, NamedSharding(self.mesh, sharding.BATCH)))
    row = {f'eval/{part.domain}/nll': score.mean_nll for part, score in zip(parts, scores)}
    row['eval/mean/nll'] = sum(row.values()) / len(row)
    text = ', '.join(f'{p.domain} {s.perplexity:.2f}' for p, s in zip(parts, scores))
    print(f'step {step}: valid perplexity {text}', flush=True)
    return row

  @contextlib.contextmanager
  def _signals(self):
    """SIGTERM and SIGUSR1 ask for a checkpoint and the end of the run, SIGINT for its end: raised
    inside a save, KeyboardInterrupt can get lost. A second SIGINT is raised where it comes."""
    def ask(number, _):
      self.request.number = number
      if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)


class Clock:
  """Rates between lines of the log; the first step of a run, which compiles, is left out."""

  def __init__(self, tokens: int, flops: int):
    self.tokens, self.flops = tokens, flops
    self.steps, self.since, self.total = 0, None, time.monotonic()

  def step(self):
    """One more step is done."""
    if self.since is None:
      self.since = time.monotonic()
    else:
      self.steps += 1

  def restart(self):
    """Time since the last step was spent on something else."""
    self.since, self.steps = None, 0

  def lap(self) -> float:
    """Wall seconds since the last lap (all of them: compiling and evaluating too)."""
    now = time.monotonic()
    lap, self.total = now - self.total, now
    return lap

  def rates(self) -> dict:
    """throughput/… since the last restart, by name; empty before the second step."""
    seconds = time.monotonic() - self.since if self.since else 0
    if not self.steps or not seconds:
      return {}
    return {'throughput/tokens_per_second': self.steps * self.tokens / seconds,
            'throughput/flops_per_second': self.steps * self.flops / seconds}

  def text(self) -> str:
    rates = self.rates()
    if not rates:
      return 'compiled'
    return (f'{quantity(rates["throughput/tokens_per_second"])} tokens/s, '
            f'{quantity(rates["throughput/flops_per_second"])}FLOP/s')


def run(config: Config, workdir: Path) -> int:
  """Trains `config` in `workdir`, whose lock the caller holds; the same again resumes.

  Returns:
    The steps done.

  Raises:
    BadInput: the data or config is wrong, or the workdir belongs to another experiment.
    NothingToLoad: there are checkpoints and none can be trusted.
    NonFinite: a loss or gradient was not finite; step and worst domain are named.
    Preempted: SIGTERM or SIGUSR1 came; everything is saved.
  """
  made = processes.agreed(lambda: Run(config, workdir))
  processes.same(digest(made.identity), 'config, data or tokenizer')
  return made.loop()
