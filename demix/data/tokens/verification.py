"""Digests of the text that is trained on, compared with the store's card while training begins."""

import threading

from demix.data.tokens.store import TokenStore
from demix.errors import DemixError


class Verification:
  """A thread that reads what runs will read, and compares it with their stores' cards.

  Args:
    parts: (store, domains, splits) of each run; what several share is read once.

  Attributes:
    failed: whether something was found; `wait` raises it.
  """

  def __init__(self, parts: list[tuple[TokenStore, tuple, tuple]]):
    self.failed, self._error = False, None
    self._todo = {(str(store.path), domain): (store, domain, splits)
                  for store, domains, splits in parts for domain in domains}
    self._thread = threading.Thread(target=self._run, name='verify data', daemon=True)
    self._thread.start()

  def _run(self):
    try:
      for store, domain, splits in self._todo.values():
        store.verify((domain,), splits)
    except DemixError as e:
      self._error = e
    except Exception as e:  # a disk that fails
      self._error = DemixError(f'{store.path}/{domain} cannot be read '
                               f'({type(e).__name__}: {" ".join(str(e).split())})')
    self.failed = self._error is not None

  def wait(self, say=None):
    """Waits for the end; `say` is called with a line if that takes a while.

    Raises:
      BadInput: a file has not the content that its card says; it is named.
      DemixError: it cannot be read.
    """
    self._thread.join(1)
    if self._thread.is_alive() and say:
      say('waiting     for the digests of the data, before anything is saved (--verify_data=false '
          'leaves them out)')
    self._thread.join()
    if self._error:
      raise self._error
