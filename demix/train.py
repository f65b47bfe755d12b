"""The one training loop. A dense LM, a DEMix LM, a branch and every baseline differ in their config
only."""

import contextlib
import signal
from pathlib import Path

from demix import processes, tree
from demix.config import Config, digest
from demix.errors import Preempted
from demix.progress import Progress, duration
from demix.run import Run, header


class Loop:
  """Takes a run from where it is to its last step."""

  def __init__(self, run: Run):
    self.run, self.request = run, processes.Request()

  def __call__(self) -> int:
    """Trains to train.steps; returns the steps done. See `run` for what it raises."""
    with self._signals():
      return self._loop()

  def _loop(self):
    run = self.run
    state, frozen = run.start()
    if run.step >= run.steps:
      print(f'done already: step {run.step} of {run.steps} in {run.workdir}')
      return run.step
    processes.decided(run.save_config)  # not before: what cannot be gone on with stays as it is
    print(header(run), flush=True)
    if run.step:
      print(f'resumed     at step {run.step}', flush=True)
    quiet = not processes.first()
    with (Progress(run.steps, 'steps', 'train', done=run.step, quiet=quiet) as progress,
          run.opened()):
      while run.step < run.steps:
        state, out = run.program.step(state, next(run.rows), frozen)
        run.take(out)  # the numbers of the step before are read while this one runs
        # Read once: one that comes from here on waits for the next step.
        stop = (number := self.request.seen()) and signal.Signals(number).name
        if stop == 'SIGINT':
          raise KeyboardInterrupt
        evaluate, save = run.due
        if evaluate or save or stop:
          run.settle(tree.join(state['params'], frozen) if evaluate else None)
          if evaluate:
            run.clock.restart()
        if run.read:
          progress.update(run.read, f'loss {run.loss:.3f}, {run.clock.text()}')
        if save or stop:
          run.save(state, frozen)
        if stop and run.step < run.steps:
          run.saver.close()
          raise Preempted(f'{stop}: saved step {run.step} of {run.steps} in {run.workdir}; '
                          'run the same command again to go on')
    epochs = ', '.join(f'{d} {e:.2f}' for d, e in run.batches.epochs(run.step).items())
    print(f'epochs      {epochs}\ndone        step {run.step} in '
          f'{duration(run.ledger["seconds"])}; checkpoints in {run.directory}', flush=True)
    return run.step

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
  return Loop(made)()
