"""Which files below a folder are opened, by whatever code: inotify(7), for tests."""

import contextlib
import ctypes
import os
import struct
from pathlib import Path

_OPEN, _OVERFLOW = 0x20, 0x4000
_EVENT = struct.Struct('iIII')


@contextlib.contextmanager
def opened(*folders):
  """Gives a set; at the end it holds the paths (str) of what was opened below `folders`, which are
  there at the start. Directories that were listed count too."""
  libc = ctypes.CDLL(None, use_errno=True)
  fd = libc.inotify_init1(os.O_NONBLOCK)
  assert fd >= 0, os.strerror(ctypes.get_errno())
  paths, found = {}, set()
  try:
    for folder in folders:
      assert Path(folder).is_dir(), folder
      for path, _, _ in list(os.walk(folder)):
        watch = libc.inotify_add_watch(fd, os.fsencode(path), _OPEN)
        assert watch > 0, (path, os.strerror(ctypes.get_errno()))
        paths[watch] = path
    yield found
    with contextlib.suppress(BlockingIOError):
      while events := os.read(fd, 1 << 16):
        at = 0
        while at < len(events):
          watch, mask, _, size = _EVENT.unpack_from(events, at)
          name = events[at + _EVENT.size:at + _EVENT.size + size].rstrip(b'\0')
          at += _EVENT.size + size
          assert not mask & _OVERFLOW, 'more was opened than the kernel remembers'
          found.add(os.path.join(paths[watch], os.fsdecode(name)).rstrip('/'))
  finally:
    os.close(fd)
