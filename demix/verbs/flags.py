"""The flags of a verb: absl flags and ml-collections config flags, with one-line errors."""

import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from demix import settings
from demix.errors import BadInput


class Help(Exception):
  """Raised for --help: its text is printed on stdout and the verb exits 0."""


class Verb:
  """Declares and parses the flags of one verb (a private FlagValues, so imports add nothing)."""

  def __init__(self, name: str, summary: str):
    self.name, self.summary = name, summary
    self.flags, self._help, self._config = flags.FlagValues(), [], None
    flags.DEFINE_bool('help', False, 'show this help', short_name='h', flag_values=self.flags)

  def string(self, name: str, default: str, help: str):
    flags.DEFINE_string(name, default, help, flag_values=self.flags)
    self._help.append((f'--{name}={default or name.upper()}', help))

  def strings(self, name: str, help: str):
    flags.DEFINE_multi_string(name, [], help, flag_values=self.flags)
    self._help.append((f'--{name}={name.upper()} (may be repeated)', help))

  def integer(self, name: str, default: int, help: str):
    flags.DEFINE_integer(name, default, help, flag_values=self.flags)
    self._help.append((f'--{name}={default}', help))

  def boolean(self, name: str, help: str):
    flags.DEFINE_bool(name, False, help, flag_values=self.flags)
    self._help.append((f'--{name}', help))

  def config(self, cls, example: str):
    """Adds --config=FILE[:ARG] and --config.path.to.key=value for the dataclass `cls`."""
    self._config = cls
    self._help.append((f'--config={example}', 'a config file with get_config(arg); optional'))
    self._help.append(('--config.KEY=VALUE', 'override a key (dotted path); keys are below'))

  def parse(self, argv: list[str]):
    """Returns (flags, config): `config` is an instance of the class given to `config` or None.

    Raises:
      Help: --help was given.
      BadInput: an unknown flag or key (with the nearest name), or a value of the wrong type.
    """
    argv = [self.name, *argv]
    try:
      if self._config and not {'--help', '-h', '--help=true'} & set(argv):
        self._define_config(argv)
      rest = self.flags(argv)[1:]
    except flags.Error as e:
      raise BadInput(str(e).replace('\n', ' ')) from None
    except (AttributeError, TypeError, KeyError, ValueError, SyntaxError) as e:
      raise BadInput(f'config: {e}'.replace('\n', ' ')) from e
    if self.flags.help:
      raise Help(self.help_text())
    if rest:
      raise BadInput(f'unexpected argument {rest[0]!r}: {self.name} takes flags only '
                     f'(python -m demix {self.name} --help)')
    config = None
    if self._config:
      config = settings.from_dict(self._config, self.flags.config.to_dict())
    return self.flags, config

  def _define_config(self, argv):
    # New attributes are let through here and refused in settings.from_dict, which knows the
    # nearest name and lets a dict of domains take any key.
    kwargs = dict(flag_values=self.flags, sys_argv=argv, lock_config=False,
                  accept_new_attributes=True)
    given = [a for a in argv if a == '--config' or a.startswith('--config=')]
    if not given:
      config = ConfigDict(settings.to_dict(self._config()))
      config_flags.DEFINE_config_dict('config', config, **kwargs)
      return
    path = argv[argv.index('--config') + 1] if given[-1] == '--config' and \
        argv.index('--config') + 1 < len(argv) else given[-1].partition('=')[2]
    file = path.partition(':')[0]
    if not os.path.isfile(file):
      raise BadInput(f'--config={path}: no such file {file!r} (configs lie in configs/)')
    config_flags.DEFINE_config_file('config', **kwargs)

  def help_text(self) -> str:
    lines = [f'python -m demix {self.name}: {self.summary}', '']
    lines += [f'  {flag}\n      {text}' for flag, text in self._help]
    if self._config:
      lines += ['', 'Config keys and their defaults:', *settings.describe(self._config)]
    return '\n'.join(lines)


def require(value: str, flag: str, what: str) -> str:
  """`value`, or BadInput when the flag was not given."""
  if not value:
    raise BadInput(f'--{flag} is missing: {what}')
  return value
