"""One training run: what it is, where it starts, what it writes down. The loop is train.py.

Resuming is exact: batch t is a function of (seed, t), so the state of a run is its parameters,
moments and step; a run that was killed and started again goes through the same losses bit for bit.
"""

import contextlib
import math
import re
import shutil
from pathlib import Path

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from demix import settings
from demix.checkpoints import checkpoint
from demix.config import (
  TRAINABLE,
  Config,
  complete,
  data_fingerprint,
  digest,
  domain_symbols,
  identity,
)
from demix.data.sampling.batches import Batches
from demix.data.tokens.store import TokenStore
from demix.errors import NonFinite
from demix.eval import perplexity
from demix.eval.sequences import Protocol
from demix.model import sharding, tree
from demix.model.params import Model
from demix.optim.optimizer import AdamW
from demix.optim.state import saved_part
from demix.optim.step import Program, shared
from demix.runtime import processes
from demix.runtime.clock import Clock
from demix.runtime.progress import quantity
from demix.runtime.workdir import check_identity, load_config, load_identity, save_config
from demix.training import horizon
from demix.training.metrics import Metrics
from demix.training.start import find


def header(runs: list['Run']) -> str:
  """What is about to run, in a few lines."""
  first = runs[0]
  config, model, mesh = first.config, first.model, first.program.mesh
  total, active = model.counts()
  tokens = config.data.batch_size * config.data.sequence_length
  default, now = settings.flatten(Config()), settings.flatten(config)
  changed = ' '.join(f'{k}={v}' for k, v in now.items() if v != default[k] and k != 'data.path')
  kinds = ', '.join(sorted({d.device_kind for d in mesh.devices.flat}))
  axes = ' '.join(f'{a}={n}' for a, n in mesh.shape.items() if n > 1)
  each = f', for each of {len(runs)} runs' if len(runs) > 1 else ''
  return '\n'.join([
      *(f'run         {run.workdir}' for run in runs),
      f'devices     {mesh.size} × {kinds}{f" ({axes})" if axes else ""}',
      f'parameters  {quantity(total)} total, {quantity(active)} active per token{each}',
      f'per step    {quantity(tokens)} tokens, {quantity(first.flops)} FLOPs{each}',
      *dict.fromkeys(line for run in runs for line in run.origin()),
      f'config      {changed}'])


# What several runs must have in common to take their steps in one program.
_ALIKE = re.compile(
    r'(model|optimizer|execution|mesh)\.|init\.trainable|train\.(steps|lift|accumulation|'
    r'compute_dtype)|data\.(sampling|sequence_length|batch_size|packing|domain_token)')


def differences(a: 'Run', b: 'Run') -> list[str]:
  """Why two runs cannot take their steps in one program; [] if they can."""
  ours, theirs = settings.flatten(a.config), settings.flatten(b.config)
  out = [f'{n} {ours[n]} and {theirs[n]}' for n in ours
         if _ALIKE.match(n) and ours[n] != theirs[n]]
  if a.earlier != b.earlier:
    out.append(f'schedules before {a.earlier} and {b.earlier}')
  if len(a.domains) != len(b.domains):
    out.append(f'{len(a.domains)} and {len(b.domains)} domains')
  return out


class Run:
  """One training run in a workdir whose lock is held.

  Attributes:
    step: updates begun. updates: that changed something, as the optimizer counts, those of a model
      that it goes on from included. read: whose numbers were read. loss: of the last of these.
  """

  def __init__(self, config: Config, workdir: Path, name: str = '', named=()):
    """name: of the run among others that train beside it; '' where it trains by itself. named: see
    config.complete."""
    self.workdir, self.name = workdir, name
    self.directory = workdir / 'checkpoints'
    self.store = TokenStore.open(config.data.path, config.data.domains)
    there = (workdir / 'config.json').exists()
    saved = load_identity(workdir) if there else None
    known = load_config(workdir) if there else None
    self.init = find(config, self.store, known, workdir)
    going_on = self.init and config.init.optimizer == 'continue'
    config, self.earlier = horizon.settle(
        config, complete(config, self.store, saved, self.init and self.init.model, named),
        horizon.standing(self.directory, known, self.init.record if going_on else None), workdir)
    self.lineage = {'schedules': self.earlier} if self.earlier else {}
    if self.init:
      config = self.init.settle(config, self.store)
      self.lineage['init'] = self.init.record
    self.config = config
    self.identity = identity(config, self.store, self.init and self.init.identity)
    if saved is not None:
      check_identity(horizon.comparable(saved, self.identity), self.identity, workdir)
    self.domains = config.data.domains
    self.symbols = domain_symbols(config)
    mesh = sharding.make_mesh(config.mesh, experts=len(config.model.experts))
    config.execution.check_devices(mesh.devices.flat)
    sharding.check_rows(mesh, config.data.batch_size // config.train.accumulation,
                        ('data', 'fsdp') if name else sharding.BATCH[0])
    # Runs side by side each read all of their rows; their step lays them out.
    self.mine = None if name else sharding.process_rows(mesh, config.data.batch_size)
    self.batches = Batches(self.store, config.data, config.seed, symbols=self.symbols,
                           rows=self.mine)
    self.program = shared(Program(
        model=Model(config.model, config.execution, config.train.compute_dtype),
        adamw=AdamW(config.optimizer, config.optimizer.schedule_steps, self.earlier),
        part=TRAINABLE[config.init.trainable], domains=len(self.domains),
        balanced=config.data.sampling == 'balanced', accumulation=config.train.accumulation,
        mesh=mesh))
    self.model = self.program.model
    sharding.check_replicated(mesh, self.model.abstract, config.mesh.max_replicated)
    self.flops = (config.data.batch_size * config.data.sequence_length
                  * self.model.flops_per_token(config.data.sequence_length))
    self.ledger = {'tokens': 0, 'flops': 0, 'seconds': 0.0}
    self.step, self.updates, self.read, self.loss, self._pending = 0, 0, 0, None, None

  @property
  def steps(self) -> int:
    """What it trains to."""
    return self.config.train.steps

  # ---- state: fresh or restored --------------------------------------------------------------

  def start(self) -> tuple[dict, dict]:
    """(state, frozen) of the newest trusted checkpoint, or of a first start; sets `step`."""
    program = self.program
    step = processes.decided(lambda: checkpoint.latest(self.directory))
    like, here = program.canonical, NamedSharding(program.mesh, PartitionSpec())
    if step is None:
      if self.init and self.config.init.optimizer == 'continue':
        flat = self.init.moments(like)  # first: the model is let go of with its parameters
        self.updates = int(processes.whole(flat['optimizer/count']))
        return program.go_on(sharding.put(self.init.parameters(), here), flat)
      if self.init:
        return program.begin(sharding.put(self.init.parameters(), here))
      return program.fresh(self.config.seed)
    meta = checkpoint.read_meta(self.directory, step)
    check_identity(horizon.comparable(meta['identity'], self.identity), self.identity,
                   self.workdir)
    self.ledger, self.updates = meta['ledger'], horizon.updates_of(self.directory, step, meta)
    self.lineage |= {name: meta[name] for name in ('init', 'lifecycle') if name in meta}
    flat = checkpoint.restore(self.directory, step, saved_part(like, meta['leaves']))
    self.step = step
    return program.restored(flat)

  def meta(self) -> dict:
    """What made the checkpoint of `step`; the data index is step + skipped."""
    step = self.step
    return {'step': step, 'skipped': 0, 'data_index': step, 'updates': self.updates,
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

  def origin(self) -> list[str]:
    """Lines that say where it starts from; none for fresh parameters and their first schedule."""
    lines, optimizer = [], self.config.optimizer
    if self.init:
      trained = tree.size(self.program.abstract[0]['params'])
      lines = [f'starts from {self.init.describe()}',
               f'trains      {quantity(trained)} parameters']
    if optimizer.restart:
      lines.append(f'schedule    anew from update {optimizer.restart} on, for '
                   f'{optimizer.schedule_steps}')
    return lines

  def say(self, text: str):
    """Prints a line, with the name of the run where there are several."""
    print(f'{self.name}: {text}' if self.name else text, flush=True)

  # ---- in the loop ----------------------------------------------------------------------------

  @contextlib.contextmanager
  def opened(self):
    """Opens what it writes to. Whatever ends the run, a save under way ends well."""
    train, data = self.config.train, self.config.data
    names = ['tokens_BL', 'targets_BL', 'weights_BL', 'domain_B']
    if data.packing == 'document':
      names += ['segments_BL', 'positions_BL']
    rows = ({n: batch[n] for n in names} for batch in self.batches.iterate(self.step))
    if not self.name:
      # Copied to the devices while the step before runs: the loop waits for that one's numbers
      # when this batch and its step are under way.
      rows = (sharding.place(self.program.mesh, batch, data.batch_size, self.mine)
              for batch in rows)
    self.clock = Clock(data.batch_size * data.sequence_length, self.flops)
    with (Metrics(self.workdir, step=self.step or -1, tensorboard=train.tensorboard,
                  quiet=not processes.first()) as metrics,
          checkpoint.Checkpoints(self.directory, max_to_keep=train.max_to_keep,
                                 keep_every=train.keep_every, clean=True) as saver):
      self.rows, self.metrics, self.saver = rows, metrics, saver
      yield self

  def take(self, out):
    """One more update was begun, and out() waits for its numbers; reads those of the one before."""
    before, self._pending = self._pending, out
    if before is not None:
      self._log(self._record(before))
    self.step += 1

  @property
  def due(self) -> tuple[bool, bool]:
    """Whether to evaluate, and to save, after `step`."""
    train, last = self.config.train, self.step == self.steps
    return tuple(last or bool(every and self.step % every == 0)
                 for every in (train.eval_every, train.checkpoint_every))

  def settle(self, params=None):
    """Reads the numbers of `step`, which waits for it, and evaluates parameters if given some."""
    out, self._pending = self._pending, None
    row = self._record(out)
    if params is not None:
      row |= self._evaluate(params)
    self._log(row)

  def save(self, state: dict, frozen: dict, share: float = 1.0):
    """Starts a checkpoint of `step`. share: of the wall time since the last that was this run's."""
    self.ledger['seconds'] += share * self.clock.lap()
    self.saver.save(self.step, self.program.export(state, frozen), self.meta())

  def _log(self, row):
    if row:
      self.metrics.write(self.step, row)

  def _record(self, out) -> dict:
    """Reads the numbers of `step`: stops on a non-finite one; the row to log, {} for none."""
    config, step, out = self.config, self.step, out()
    with np.errstate(invalid='ignore', over='ignore'):
      nll_D = out['nll_D'] / np.maximum(out['tokens_D'], 1)
    if not out['applied'] and out['tokens_D'].any():  # else it held prompts only
      bad = ~np.isfinite(nll_D)
      worst = int(np.argmax(bad) if bad.any() else np.argmax(nll_D))
      whose = f'{self.name}: ' if self.name else ''
      raise NonFinite(
          f'{whose}step {step}: loss {out["loss"]}, gradient norm {out["grad_norm"]}; worst domain '
          f'{self.domains[worst]} at {nll_D[worst]} nats; no parameter was changed by that step; '
          'lower optimizer.learning_rate or look at that domain')
    self.updates += int(out['applied'])
    self.ledger['tokens'] += int(out['tokens_D'].sum())
    self.ledger['flops'] += self.flops
    self.clock.step()
    scored = out['tokens_D'].any()
    self.read, self.loss = step, float(out['loss']) if scored else None
    if step % config.train.log_every and step != self.steps:
      return {}
    row = {'train/loss': self.loss,
           'train/grad_norm': float(out['grad_norm']) if scored else None,
           'train/learning_rate': float(out['learning_rate'])}
    for name, value, tokens in zip(self.domains, nll_D, out['tokens_D']):
      if tokens:
        row[f'train/{name}/nll'] = float(value)
    for name, value in self.batches.epochs(step).items():
      row[f'data/{name}/epochs'] = value
    return row | self.clock.rates()

  def _evaluate(self, params) -> dict:
    """NLL on the start of each training domain's valid text, as a row to log."""
    config = self.config
    parts = [perplexity.Part(d, 'valid', i) for i, d in enumerate(self.domains)
             if 'valid' in self.store.splits(d)]
    if not parts:
      return {}
    rows = NamedSharding(self.program.mesh, sharding.BATCH)
    ways = 1 if self.name else sharding.row_ways(self.program.mesh)
    # Expert by expert, so that over an expert axis no expert leaves its devices.
    experts = self.config.model.experts
    balanced = bool(experts) and not self.name and self.program.mesh.shape['expert'] > 1
    ways = math.lcm(ways, len(experts)) if balanced else ways
    scores = perplexity.evaluate(
        self.model, params, self.store, parts, symbols=self.symbols,
        protocol=Protocol.of(config.data, limit=config.train.eval_sequences),
        batch_size=-(-min(config.data.batch_size, 64) // ways) * ways, balanced=balanced,
        place=lambda batch: batch if self.name else sharding.put(batch, rows))
    row = {f'eval/{part.domain}/nll': score.mean_nll
           for part, score in zip(parts, scores) if score.tokens}
    if row:
      row['eval/mean/nll'] = sum(row.values()) / len(row)
    text = ', '.join(f'{p.domain} {s.perplexity:.2f}' if s.tokens else f'{p.domain} -'
                     for p, s in zip(parts, scores))
    self.say(f'step {self.step}: valid perplexity {text}')
    return row
