"""Sweeps: `get_hyper()` beside a config's `get_config()` returns a list of settings.

A setting is a dict of dotted path → value, given to `train` as overrides, so each run of a sweep is
an ordinary run that anyone can start alone. `python -m demix.fleet.sweep CONFIG` prints one line a
setting, a folder name and the flags; `launch/sweep.sh` runs them one after another.
"""

import shlex
import sys
import urllib.parse

import xxhash

from demix import settings
from demix.config import Config
from demix.errors import BadInput
from demix.verbs.flags import call

_PLAIN = " ,+()[]'"  # stay as they are in a folder's name, as do letters, digits and _.-~
_LONGEST = 200  # bytes of a name; file systems take 255


def runs(config: str) -> list[tuple[str, list[str]]]:
  """[(folder name, ['--config.seed=0', …])] of a config file (its :ARG is ignored).

  Raises:
    BadInput: no such file, it fails, or its get_hyper() returns no list of settings, an empty one,
      or one twice.
  """
  found = call(config, 'get_hyper')
  if not isinstance(found, list) or not all(isinstance(setting, dict) for setting in found):
    raise BadInput(f'{config}: get_hyper() returned {type(found).__name__} {str(found)[:60]!r}: '
                   "expected a list like [{'seed': 0}, {'seed': 1}]")
  if not found:
    raise BadInput(f'{config}: get_hyper() returned no settings: there is nothing to run')
  seen, out = {}, []
  for i, setting in enumerate(found):
    for key, value in setting.items():
      settings.check_path(Config, str(key), f'{config}: get_hyper()[{i}]')
      if not str(value).isprintable():
        raise BadInput(f'{config}: get_hyper()[{i}].{key}={value!r}: a value is one line of text')
    flags = [f'--config.{key}={value}' for key, value in setting.items()]
    if (same := seen.setdefault(tuple(sorted(flags)), i)) != i:
      raise BadInput(f'{config}: get_hyper()[{same}] and [{i}] are the same values '
                     f'({", ".join(flags)}): leave one out')
    out.append((setting, flags))
  names = [_name({key.rsplit('.', 1)[-1]: value for key, value in setting.items()})
           for setting, _ in out]
  return [(name if names.count(name) == 1 else _name(setting, exact=True), flags)
          for name, (setting, flags) in zip(names, out)]


def _name(setting: dict, exact: bool = False) -> str:
  """The name of a setting's folder: what no folder or model reference could have is %XX. With
  `exact`, or where it is too long, a digest of the setting tells it from all others."""
  name = '_'.join(f'{key}-{urllib.parse.quote(str(value), safe=_PLAIN)}'
                  for key, value in setting.items()) or 'base'
  if exact or len(name) > _LONGEST:
    digest = xxhash.xxh3_64_hexdigest(repr(sorted(setting.items())).encode())
    name = f'{name[:_LONGEST]}_{digest}'
  return name


def main(argv: list[str]) -> int:
  """Prints the runs of a sweep: name, tab, flags quoted for a shell."""
  try:
    for name, overrides in runs(argv[0] if argv else ''):
      print(f'{name}\t{shlex.join(overrides)}')
  except BadInput as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    return e.code
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
