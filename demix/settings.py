"""Fields of the configuration dataclasses: their help, whether they define the experiment, and
the strict way from a dict (a config file, the command line, a saved config.json) to them.

A field is *identity* (it defines the experiment: a workdir refuses another value) unless it is
made with `operational=True` (it may change on resume). docs/contracts.md lists which is which.

A field also says which values it takes; `check` refuses all others. Every number has a range
(tests/test_ranges.py walks all fields).
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping

from demix.errors import BadInput


def option(default, help: str, *, operational: bool = False, low=None, high=None, above=None,
           below=None, choices: tuple = (), needs: tuple = ()):
  """A dataclass field with its one-line help; mutable defaults (dict) are copied per instance.

  Args:
    low, high: ends of a number's range, themselves in it; above, below: not in it. All numbers are
      finite.
    choices: the values that there are.
    needs: (name of another field, values of it …): this one has an effect only with one of those;
      without values, only where the other one is set.
  """
  metadata = {'help': help, 'operational': operational, 'low': low, 'high': high, 'above': above,
              'below': below, 'choices': choices, 'needs': needs}
  if isinstance(default, dict) or dataclasses.is_dataclass(default):
    make = (lambda: dict(default)) if isinstance(default, dict) else (lambda: default)
    # A dict has no hash; configs that differ in one only are told apart by ==.
    return dataclasses.field(default_factory=make, metadata=metadata,
                             hash=False if isinstance(default, dict) else None)
  return dataclasses.field(default=default, metadata=metadata)


def default_of(field):
  """The default value of a dataclass field."""
  if field.default is not dataclasses.MISSING:
    return field.default
  return field.default_factory()


def nearest(name: str, names) -> str:
  """' (did you mean X?)' for the closest of `names`, or a list of them when none is close."""
  names = sorted(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  if close:
    return f' (did you mean {close[0]!r}?)'
  return f' (known: {", ".join(names)})' if names else ''


def _coerce(value, default, path):
  """`value` as the type of `default`; BadInput names the field and both types."""
  def refuse():
    return BadInput(f'{path}: expected {type(default).__name__} like {default!r}, '
                    f'got {type(value).__name__} {value!r}')
  if isinstance(default, bool):
    if not isinstance(value, bool):
      raise refuse()
    return value
  if isinstance(default, float):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise refuse()
    return float(value)
  if isinstance(default, int):
    if isinstance(value, bool) or not isinstance(value, int):
      raise refuse()
    return value
  if isinstance(default, str):
    if not isinstance(value, str):
      raise refuse()
    return value
  if isinstance(default, tuple):
    if isinstance(value, str):  # --config.domains=a,b
      value = (value,)
    if not isinstance(value, (tuple, list)):
      raise refuse()
    parts = []
    for v in value:
      parts.extend(p.strip() for p in v.split(',') if p.strip()) if isinstance(v, str) \
          else parts.append(v)
    for v in parts:
      if not isinstance(v, (str, Mapping)):  # of config.corpus an entry
        raise BadInput(f'{path}: expected names, got {type(v).__name__} {v!r}')
    return tuple(parts)
  if isinstance(default, dict):
    if not isinstance(value, Mapping):
      raise refuse()
    return {str(k): v for k, v in value.items()}
  raise TypeError(f'{path}: no rule for a default of type {type(default)}')


def from_dict(cls, mapping, path: str = 'config'):
  """Builds the dataclass `cls` from a nested mapping.

  Args:
    cls: a dataclass made of `option` fields and nested dataclasses.
    mapping: names to values; missing names take their default.
    path: how errors call the mapping.

  Raises:
    BadInput: an unknown key (with the nearest known name) or a value of another type.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = {}
  for key, value in mapping.items():
    if key not in fields:
      raise BadInput(f'{path}.{key}: no such key{nearest(key, fields)}')
    default = default_of(fields[key])
    where = f'{path}.{key}'
    if dataclasses.is_dataclass(default):
      if not isinstance(value, Mapping):
        raise BadInput(f'{where}: expected a group of keys, got {value!r}')
      values[key] = from_dict(type(default), value, where)
    else:
      values[key] = _coerce(value, default, where)
  return cls(**values)


def check_values(config, where: str = ''):
  """Raises BadInput for a value that its field does not take, groups of fields included.

  Args:
    where: put before the names of fields: 'optimizer.' → 'optimizer.clip=-1.0 …'.
  """
  for f in dataclasses.fields(config):
    value, name = getattr(config, f.name), f'{where}{f.name}'
    if dataclasses.is_dataclass(value):
      check_values(value, f'{name}.')
    elif isinstance(value, str) and not value.isprintable() and not _is_utf8(value):
      raise BadInput(f'{name}={value!r} is not UTF-8: give another')
    elif f.metadata['choices']:
      if value not in f.metadata['choices']:
        raise BadInput(f'{name}={value!r}: no such choice'
                       f'{nearest(str(value), map(str, f.metadata["choices"]))}')
    elif is_number(default_of(f)) and not _inside(value, default_of(f), f.metadata):
      raise BadInput(f'{name}={value!r} is out of range: give {_range(f)} ({f.metadata["help"]})')


def check_needs(config, where: str = ''):
  """Raises BadInput for a value that is set where its field has no effect; `where`: see above."""
  for f in dataclasses.fields(config):
    value, name = getattr(config, f.name), f'{where}{f.name}'
    if dataclasses.is_dataclass(value):
      check_needs(value, f'{name}.')
    elif f.metadata['needs'] and value != default_of(f):
      key, *wanted = f.metadata['needs']
      other = getattr(config, key)
      usual = next(default_of(g) for g in dataclasses.fields(config) if g.name == key)
      if other in wanted or (not wanted and other != usual):
        continue
      how = f'={" or ".join(map(str, wanted))}' if wanted else ''
      raise BadInput(f'{name}={value!r} has no effect with {where}{key}={other!r}: leave it out, '
                     f'or set {where}{key}{how}')


def check(config, where: str = ''):
  """`check_values` and `check_needs`: for what a user gives, not for what was saved."""
  check_values(config, where)
  check_needs(config, where)


def is_number(value) -> bool:
  """Whether a default is that of a field of numbers; a bool is none."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _inside(value, default, ends) -> bool:
  kind = numbers.Integral if isinstance(default, int) else numbers.Real
  if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
    return False
  return ((ends['low'] is None or value >= ends['low'])
          and (ends['above'] is None or value > ends['above'])
          and (ends['high'] is None or value <= ends['high'])
          and (ends['below'] is None or value < ends['below']))


def _is_utf8(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:  # a lone surrogate: what bytes of a command line became
    return False
  return True


def _range(field) -> str:
  """'a finite number, at least 0 and below 1'."""
  words = (('low', 'at least'), ('above', 'above'), ('high', 'at most'), ('below', 'below'))
  ends = [f'{word} {field.metadata[end]}' for end, word in words
          if field.metadata[end] is not None]
  kind = 'an integer' if isinstance(default_of(field), int) else 'a finite number'
  return kind + (f', {" and ".join(ends)}' if ends else '')


def check_path(cls, path: str, start: str = 'config'):
  """The field that a dotted path names.

  Returns:
    its default, its path, and the key where the rest of the path is one of a dict ('' otherwise):
    'data.weights.web-text' → {}, 'data.weights', 'web-text'.

  Raises:
    BadInput: no such field (the nearest name is given), a group of them, or a path that goes on.
  """
  if path.endswith('.'):
    raise BadInput(f'{start}.{path}: no name after the last dot')
  name, _, rest = path.partition('.')
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if name not in fields:
    raise BadInput(f'{start}.{name}: no such key{nearest(name, fields)}')
  default, where = default_of(fields[name]), f'{start}.{name}'
  if dataclasses.is_dataclass(default):
    if not rest:
      raise BadInput(f'{where}: a group of keys: set one of them, '
                     f'{where}.{dataclasses.fields(default)[0].name} for example')
    found, inner, key = check_path(type(default), rest, where)
    return found, f'{name}.{inner}', key
  if rest and not isinstance(default, dict):
    raise BadInput(f'{where}: has no keys, {path!r} goes too deep')
  return default, name, rest


def to_dict(config) -> dict:
  """The nested plain dict of a configuration dataclass (tuples stay tuples)."""
  out = {}
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    out[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else (
        dict(value) if isinstance(value, dict) else value)
  return out


def flatten(config, *, operational: bool | None = None, prefix: str = '') -> dict:
  """{'model.d_model': 128, …}; `operational` True or False keeps only that kind of field."""
  out = {}
  for f in dataclasses.fields(config):
    value, name = getattr(config, f.name), f'{prefix}{f.name}'
    if dataclasses.is_dataclass(value):
      out.update(flatten(value, operational=operational, prefix=f'{name}.'))
    elif operational is None or f.metadata['operational'] == operational:
      out[name] = list(value) if isinstance(value, tuple) else value
  return out


def describe(cls, prefix: str = '--config.') -> list[str]:
  """One line of help per field: name, default, help."""
  lines = []
  for f in dataclasses.fields(cls):
    default = default_of(f)
    if dataclasses.is_dataclass(default):
      lines += describe(type(default), f'{prefix}{f.name}.')
    else:
      lines.append(f'  {prefix}{f.name}={default!r}\n      {f.metadata["help"]}')
  return lines
