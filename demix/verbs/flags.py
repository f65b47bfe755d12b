"""The flags of a verb: absl flags and ml-collections config flags, with one-line errors."""

import ast
import dataclasses
import importlib.util
import os
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from demix import settings
from demix.errors import BadInput, DemixError


class Help(Exception):
  """Raised for --help: its text is printed on stdout and the verb exits 0."""


class Verb:
  """Declares and parses the flags of one verb (a private FlagValues, so imports add nothing)."""

  def __init__(self, name: str, summary: str):
    self.name, self.summary = name, summary
    self.flags, self._help, self._configs = flags.FlagValues(), [], {}
    flags.DEFINE_bool('help', False, 'show this help', short_name='h', flag_values=self.flags)

  def string(self, name: str, default: str, help: str):
    flags.DEFINE_string(name, default, help, flag_values=self.flags)
    self._help.append((f'--{name}={default or name.upper()}', help))

  def strings(self, name: str, help: str):
    flags.DEFINE_multi_string(name, [], help, flag_values=self.flags)
    self._help.append((f'--{name}={name.upper()} (may be repeated)', help))

  def integer(self, name: str, default: int, help: str, *, low: int):
    flags.DEFINE_integer(name, default, help, lower_bound=low, flag_values=self.flags)
    self._help.append((f'--{name}={default}', help))

  def numbers(self, cls) -> list[str]:
    """Adds a flag for each number of the dataclass `cls`, which checks them; their names."""
    names = []
    for f in dataclasses.fields(cls):
      default = settings.default_of(f)
      if settings.is_number(default):
        define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
        define(f.name, default, f.metadata['help'], flag_values=self.flags)
        self._help.append((f'--{f.name}={default}', f.metadata['help']))
        names.append(f.name)
    return names

  def boolean(self, name: str, help: str, default: bool = False):
    flags.DEFINE_bool(name, default, help, flag_values=self.flags)
    self._help.append((f'--{name}{"=true" if default else ""}', help))

  def config(self, cls, example: str, name: str = 'config', text: str = ''):
    """Adds --NAME=FILE[:ARG] and --NAME.path.to.key=value for the dataclass `cls`.

    With `text`, its help, --NAME also takes words that are no file; the flag `NAME_words` has them:
    'all' for --NAME alone, 'file' for a config file.
    """
    self._configs[name] = cls
    if text:
      flags.DEFINE_string(f'{name}_words', '', '', flag_values=self.flags)
    self._help.append((f'--{name}={example}',
                       text or 'a config file with get_config(arg); optional'))
    self._help.append((f'--{name}.KEY=VALUE', 'override a key (dotted path); keys are below'))

  def parse(self, argv: list[str]):
    """Returns (flags, config): `config` is an instance of the class that was first given to
    `config`, or None. `self.configs` has all, by name.

    Raises:
      Help: --help was given.
      BadInput: an unknown flag or key (with the nearest name), or a value of the wrong type.
    """
    if {'--help', '-help', '-h', '--h', '--help=true'} & set(argv):
      raise Help(self.help_text())
    argv = [self.name, *argv]
    try:
      for name, cls in self._configs.items():
        argv = self._define_config(argv, name, cls)
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
    self.configs = {name: settings.from_dict(cls, getattr(self.flags, name).to_dict(), name)
                    for name, cls in self._configs.items()}
    for name, config in self.configs.items():
      if f'{name}_words' in self.flags:  # the verb's words may change what it needs
        settings.check_values(config, f'{name}.')
      else:
        config.check()
    return self.flags, next(iter(self.configs.values()), None)

  def _define_config(self, argv, name, cls) -> list[str]:
    """Declares a config and its overrides; returns argv without --NAME=FILE."""
    file, rest, own, words = None, [], [], list(argv)
    takes_words = f'{name}_words' in self.flags
    while words:
      word = words.pop(0)
      flag, equals, value = word.partition('=')
      if flag not in (f'--{name}', f'-{name}'):
        found = re.match(rf'--?{name}\.(.*)', flag)
        default, path, key = settings.check_path(cls, found[1], name) if found else (0, '', '')
        if not key and not isinstance(default, tuple):
          rest.append(word)
          continue
        # Names of domains: taken as they are, not as ml_collections reads a path or a literal.
        if not equals and (not words or words[0].startswith('-')):
          raise BadInput(f'{flag}: no value given: {flag}=VALUE')
        own.append((path, key, value if equals else words.pop(0)))
        continue
      if not equals:
        value = words.pop(0) if words and not words[0].startswith('-') else ''
      known = not takes_words or '.py' in value
      if known:
        file = value
      if takes_words:
        rest.append(f'--{name}_words={"file" if known else value or "all"}')
    config = load_config(file) if file is not None else ConfigDict(settings.to_dict(cls()))
    with config.unlocked():
      for path, key, value in own:
        _override(config, path, key, value)
    # New attributes are let through here and refused in settings.from_dict, which lets a dict of
    # domains take any key.
    config_flags.DEFINE_config_dict(name, config, flag_values=self.flags, sys_argv=rest,
                                    lock_config=False, accept_new_attributes=True)
    return rest

  def help_text(self) -> str:
    lines = [f'python -m demix {self.name}: {self.summary}', '']
    lines += [f'  {flag}\n      {text}' for flag, text in self._help]
    for name, cls in self._configs.items():
      lines += ['', f'Keys of --{name} and their defaults:',
                *settings.describe(cls, f'--{name}.')]
    return '\n'.join(lines)


def _override(config: ConfigDict, path: str, key: str, text: str):
  """Sets a key of a dict, or a tuple of names, from the text of a flag."""
  *groups, last = path.split('.')
  for group in [*groups, last] if key else groups:
    if group not in config:  # a file may leave groups out
      config[group] = ConfigDict()
    config = config[group]
  if not key:
    config[last] = tuple(ast.literal_eval(text)) if text[:1] in ('(', '[') else (text,)
    return
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(config.get(key), float) and isinstance(value, int):
    value = float(value)
  config[key] = value


def load_config(reference: str) -> ConfigDict:
  """What get_config(ARG) of a config file returns; `reference` is FILE or FILE:ARG.

  Raises:
    BadInput: no such file, or it or its get_config fails; its error is given.
  """
  config = call(reference, 'get_config', *split_argument(reference)[1:])
  if not isinstance(config, ConfigDict):
    raise BadInput(f'--config={reference}: get_config() returned {type(config).__name__}: '
                   'expected a ConfigDict (demix.config.config_dict makes one)')
  return config


def split_argument(text: str) -> list[str]:
  """FILE[:ARG] → [FILE] or [FILE, ARG]: the longest FILE that exists, so either may have a ':'."""
  parts = text.split(':')
  for count in range(len(parts), 0, -1):
    file, rest = ':'.join(parts[:count]), parts[count:]
    if os.path.isfile(file):
      return [file, ':'.join(rest)] if rest else [file]
  return text.split(':', 1)


def call(reference: str, function: str, *args):
  """What a function of a config file returns.

  Raises:
    BadInput: no such file or function, or one of them fails; its error is given.
  """
  file = split_argument(reference)[0]
  if not os.path.isfile(file):
    raise BadInput(f'--config={reference}: no such file {file!r} (configs lie in configs/)')
  spec = importlib.util.spec_from_file_location('config_file', file)
  if spec is None:
    raise BadInput(f'--config={reference}: not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return getattr(module, function)(*args)
  except DemixError as e:
    raise BadInput(f'--config={reference}: {e}') from None
  except Exception as e:
    raise BadInput(f'--config={reference}: {type(e).__name__}: {e}') from e


def require(value: str, flag: str, what: str) -> str:
  """`value`, or BadInput when the flag was not given."""
  if not value:
    raise BadInput(f'--{flag} is missing: {what}')
  return value
