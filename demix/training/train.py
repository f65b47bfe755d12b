"""The one training loop. A dense LM, a DEMix LM, a branch and every baseline differ in their config
only; several runs go through it side by side as one does alone."""

import contextlib
import math
import signal
from pathlib import Path

from demix.config import Config, digest
from demix.data.tokens.verification import Verification
from demix.errors import BadInput, Preempted
from demix.model import tree
from demix.optim.together import chosen, lift
from demix.runtime import processes
from demix.runtime.progress import Progress, duration, quantity
from demix.training.run import Run, differences, header


class Loop:
  """Takes runs from where they are to their last steps.

  Args:
    runs: one, or several with equal programs.
    lift: how the step of several is made (demix/optim/together.py).
    verify_data: compare the data with the digests in the store's card; no checkpoint is written
      before that is done.

  Attributes:
    stop_signal: name of the signal that came, None for none.
  """

  def __init__(self, runs: list[Run], lift: str = 'threads', verify_data: bool = True):
    self.runs, self.lift, self.stop_signal = runs, lift, None
    self.request = processes.Request()
    self._verify, self._verification = verify_data, None

  def __call__(self):
    """Trains to train.steps. See `run` for what it raises."""
    with self._signals():
      self._loop()

  def _loop(self):
    going, states = [], []
    for run in self.runs:
      state = run.start()
      if run.step >= run.steps:
        run.say(f'done already: step {run.step} of {run.steps} in {run.workdir}')
      else:
        going.append(run)
        states.append(state)
    if not going:
      return
    if self._verify and processes.first():
      self._verification = Verification(
          [(run.store, run.domains, ('train', 'valid')) for run in going])
    for run in going:
      processes.decided(run.save_config)  # not before: what cannot be gone on with stays as it is
    print(header(going), flush=True)
    for run in going:
      if run.step:
        run.say(f'resumed     at step {run.step}')
    lifted = lift(self.lift, [run.program for run in going], states)
    del states, state
    with contextlib.ExitStack() as stack:
      progress = stack.enter_context(Progress(
          sum(run.steps for run in self.runs), 'steps', 'train',
          done=sum(run.step for run in self.runs), quiet=not processes.first()))
      for run in going:
        stack.enter_context(run.opened())
      while going:
        # The numbers of the step before are read while this one runs.
        for run, out in zip(going, lifted.step([next(run.rows) for run in going])):
          run.take(out)
        # Read once: one that comes from here on waits for the next step.
        if self._verification and self._verification.failed:
          self.request.number = processes.FAILED
        number = self.request.seen()
        if number == processes.FAILED:
          self._verified()
        stop = number and signal.Signals(number).name
        if stop == 'SIGINT':
          raise KeyboardInterrupt
        self._settle(going, lifted, stop)
        if going[0].read:
          progress.update(sum(run.read for run in self.runs), note(going))
        left = [i for i, run in enumerate(going) if run.step < run.steps]
        if stop and left:
          stack.close()
          raise Preempted(f'{stop}: saved {saved(going)}; run the same command again to go on')
        if len(left) < len(going):
          going = [going[i] for i in left]
          lifted = lifted.only(left) if left else None
    for run in self.runs:
      epochs = ', '.join(f'{d} {e:.2f}' for d, e in run.batches.epochs(run.step).items())
      run.say(f'epochs      {epochs}')
      run.say(f'done        step {run.step} in {duration(run.ledger["seconds"])}; checkpoints in '
              f'{run.directory}')

  def _settle(self, going, lifted, stop):
    """Evaluates and saves what is due after this step; everything, if the runs are to stop."""
    evaluated = False
    for i, run in enumerate(going):
      evaluate, save = run.due
      if not (evaluate or save or stop):
        continue
      state, frozen = lifted.state(i)
      run.settle(tree.join(state['params'], frozen) if evaluate else None)
      evaluated |= evaluate
      if save or stop:
        self._verified()
        run.save(state, frozen, 1 / len(going))
    if evaluated:
      for run in going:
        run.clock.restart()

  def _verified(self):
    """Waits for the digests of the data, once; in all processes. BadInput: they are others."""
    if self._verify:
      processes.agreed(lambda: self._verification and self._verification.wait(self.runs[0].say))
      self._verify = False

  @contextlib.contextmanager
  def _signals(self):
    """SIGTERM and SIGUSR1 ask for a checkpoint and the end of the run, SIGINT for its end: raised
    inside a save, KeyboardInterrupt can get lost. A second SIGINT is raised where it comes."""
    def ask(number, _):
      self.request.number, self.stop_signal = number, signal.Signals(number).name
      if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)


def note(going: list[Run]) -> str:
  """How runs are doing, in a few words."""
  if len(going) == 1:
    loss = '-' if going[0].loss is None else f'{going[0].loss:.3f}'
    return f'loss {loss}, {going[0].clock.text()}'
  losses = [run.loss for run in going if run.loss is not None] or [math.nan]
  rates = [run.clock.rates() for run in going]
  rate = sum(r.get('throughput/tokens_per_second', 0) for r in rates)
  return (f'{len(going)} runs, loss {min(losses):.3f} to {max(losses):.3f}, '
          f'{quantity(rate)} tokens/s together')


def saved(going: list[Run]) -> str:
  """Which step of which run, for people."""
  return ', '.join(f'step {run.step} of {run.steps} in {run.workdir}' for run in going)


def run(config: Config, workdir: Path, verify_data: bool = True, named=()) -> str | None:
  """Trains `config` in `workdir`, whose lock the caller holds; the same again resumes.

  Args:
    verify_data: see `Loop`. named: see config.complete.

  Returns:
    Name of a signal that came too late to stop this run: the caller should begin nothing more.

  Raises:
    BadInput: the data or config is wrong, the workdir belongs to another experiment, or the data
      are not those that the store's card describes (found while training; nothing was saved).
    NothingToLoad: there are checkpoints and none can be trusted.
    NonFinite: a loss or gradient was not finite; step and worst domain are named.
    Preempted: SIGTERM or SIGUSR1 came; everything is saved.
  """
  made = processes.agreed(lambda: Run(config, workdir, named=named))
  processes.same(digest(made.identity), 'config, data or tokenizer')
  loop = Loop([made], verify_data=verify_data)
  loop()
  return loop.stop_signal


def together(members: dict[str, tuple[Config, Path]], say=print,
             verify_data: bool = True) -> str | None:
  """Trains several runs in this process: those with equal programs side by side, the rest apart.

  Each is the run that `run` would make of it, in its own workdir, and can go on either way.

  Args:
    members: {name: (config, workdir)}; the caller holds the locks of the workdirs.
    say: called with a line for each that trains apart. verify_data: see `Loop`.

  Returns:
    As `run`.

  Raises:
    As `run`; NonFinite names the run too. What the others saved stays.
  """
  if processes.count() > 1:
    raise BadInput(f'{len(members)} runs together in {processes.count()} processes: each process '
                   'would hold all of them; train the branches apart (forest run --only=NAME)')
  groups = []
  for run in [Run(config, workdir, name) for name, (config, workdir) in members.items()]:
    for group in groups:
      if not differences(group[0], run):
        group.append(run)
        break
    else:
      if groups:
        others = [f'{g[0].name}: {"; ".join(differences(g[0], run))}' for g in groups]
        say(f'{run.name}: apart from {", from ".join(others)}')
      groups.append([run])
  # All of them now: what one cannot be is said before another trains.
  loops = [Loop(group, chosen(group[0].config.train.lift, group[0].program), verify_data)
           for group in groups]
  for loop, after in zip(loops, [*groups[1:], None]):
    loop()
    if loop.stop_signal and after:
      raise Preempted(f'{loop.stop_signal}: {after[0].name} is still to be trained; run the same '
                      'command again to go on')
  return loop.stop_signal
