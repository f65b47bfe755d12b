"""Sweeps: `get_hyper()` beside a config's `get_config()` returns a list of settings.

A setting is a dict of dotted path → value, given to `train` as overrides, so each run of a sweep is
an ordinary run that anyone can start alone. `python -m demix.sweep CONFIG` prints one line a
setting, a folder name and the flags; `launch/sweep.sh` runs them one after another.
"""

import importlib.util
import shlex
import sys

from demix.errors import BadInput


def runs(config: str) -> list[tuple[str, list[str]]]:
  """[(folder name, ['--config.seed=0', …])] of a config file (its :ARG is ignored).

  Raises:
    BadInput: no such file, or it has no get_hyper().
  """
  path = config.partition(':')[0]
  try:
    spec = importlib.util.spec_from_file_location('config_of_sweep', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except (OSError, AttributeError) as e:
    raise BadInput(f'{path}: cannot be read as a config file ({e})') from None
  if not hasattr(module, 'get_hyper'):
    raise BadInput(f'{path}: no get_hyper(): it returns a list of {{dotted path: value}}')
  out = []
  for setting in module.get_hyper():
    name = '_'.join(f'{key.rsplit(".", 1)[-1]}-{value}' for key, value in setting.items())
    out.append((name, [f'--config.{key}={value}' for key, value in setting.items()]))
  if len({name for name, _ in out}) != len(out):
    raise BadInput(f'{path}: get_hyper() returns two settings with the same values')
  return out


def main(argv: list[str]) -> int:
  """Prints the runs of a sweep: name, tab, flags quoted for a shell."""
  try:
    for name, overrides in runs(argv[0] if argv else ''):
      print(f'{name}\t{shlex.join(overrides)}')
  except BadInput as e:
    print(f'error: {e}', file=sys.stderr)
    return e.code
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
