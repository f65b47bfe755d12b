"""What can go wrong, and the exit code each kind of failure ends a verb with.

Messages are one line: what was wrong, the two values, the likely remedy. `demix.__main__` prints
`error: <message>` on stderr and exits with `code`; nothing else in the package calls `sys.exit`.
The codes are a contract (docs/contracts.md): schedulers and launchers act on them.
"""


class DemixError(Exception):
  """Failed (exit 1). The base of every error this package raises on purpose.

  `everywhere`: with several processes, all of them raise it at the same point
  (demix/runtime/processes.py).
  """
  code = 1
  everywhere = False


class BadInput(DemixError):
  """Usage or bad input: flags, configs, corpora, stores, references (exit 2)."""
  code = 2


class Refused(DemixError):
  """A guard or a gate said no (exit 3)."""
  code = 3


class NothingToLoad(DemixError):
  """No trustworthy checkpoint is left (exit 4)."""
  code = 4


class NonFinite(DemixError):
  """A loss or gradient was not finite; no parameter was changed by that step (exit 5)."""
  code = 5
  everywhere = True  # all read the same numbers


class Locked(DemixError):
  """Another process holds the workdir (exit 6)."""
  code = 6


class Preempted(DemixError):
  """Asked to stop, saved, and ended: run the same command again to go on (exit 75)."""
  code = 75
  everywhere = True  # agreed on
