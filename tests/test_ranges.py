"""What each field of the configuration dataclasses takes: one walk over all fields of all."""

import dataclasses
import importlib
import math
import pkgutil

import pytest

import demix
from demix import settings
from demix.config import Config
from demix.errors import BadInput
from demix.mix import combine, evidence, gate
from demix.mix.mix_config import MixConfig
from demix.model.ffn.feed_forward import ACTIVATIONS
from demix.model.layers.norms import KINDS
from demix.model.model_config import ExecutionConfig, ModelConfig
from demix.model.transformer import REMAT
from demix.settings import default_of


def classes() -> list:
  """Every dataclass of the package that has a field made with `option`."""
  found = {}
  for module in pkgutil.walk_packages(demix.__path__, 'demix.'):
    if not module.name.endswith('__main__'):
      for value in vars(importlib.import_module(module.name)).values():
        if isinstance(value, type) and dataclasses.is_dataclass(value) and any(
            'operational' in f.metadata for f in dataclasses.fields(value)):
          found[value.__qualname__] = value
  return [found[name] for name in sorted(found)]


FIELDS = [(cls, f) for cls in classes() for f in dataclasses.fields(cls)
          if not dataclasses.is_dataclass(default_of(f))]
each = lambda fields: pytest.mark.parametrize(
    ('cls', 'field'), fields, ids=[f'{c.__name__}.{f.name}' for c, f in fields])
numbers = [(c, f) for c, f in FIELDS if settings.is_number(default_of(f))]


def refused(cls, **values) -> str:
  with pytest.raises(BadInput) as e:
    settings.check(cls(**values), 'group.')
  return str(e.value)


def test_the_configs_are_found():
  names = {cls.__name__ for cls in classes()}
  assert names >= {'Config', 'ModelConfig', 'ExecutionConfig', 'DataConfig', 'OptimizerConfig',
                   'InitConfig', 'TrainConfig', 'MeshConfig', 'MixConfig', 'SamplingConfig',
                   'PrepareConfig', 'DiscoverConfig', 'Entry'}
  for cls in classes():
    settings.check(cls())  # the defaults can be


@each(numbers)
def test_a_number_has_a_range_and_what_lies_outside_is_refused(cls, field):
  ends, default = field.metadata, default_of(field)
  assert (ends['low'] is None) != (ends['above'] is None), 'no lower end: option(…, low=0)'
  assert ends['high'] is None or ends['below'] is None
  step = (lambda x, to: x + to) if isinstance(default, int) else (
      lambda x, to: math.nextafter(x, to * math.inf))
  outside = [math.nan, math.inf, -math.inf, True, 'x', None]
  inside = [default]
  for end, to in (('low', -1), ('high', 1)):
    if ends[end] is not None:
      outside.append(step(ends[end], to))
      inside.append(ends[end])
  for end, to in (('above', 1), ('below', -1)):
    if ends[end] is not None:
      outside.append(ends[end])
      inside.append(step(ends[end], to))
  if isinstance(default, int):
    outside.append(default + 0.5)
  for value in outside:
    said = refused(cls, **{field.name: value})
    assert said.startswith(f'group.{field.name}={value!r} is out of range: give ')
    assert '\n' not in said and field.metadata['help'] in said
  for value in inside:
    settings.check_values(cls(**{field.name: value}))


@each([(c, f) for c, f in FIELDS if f.metadata['choices']])
def test_a_choice_that_there_is_not_is_refused(cls, field):
  for value in ('nonsense', None, ''):
    assert refused(cls, **{field.name: value}).startswith(f'group.{field.name}={value!r}: no such')
  for value in field.metadata['choices']:
    settings.check_values(cls(**{field.name: value}))


def other_value(field):
  """A value that is allowed and not the default."""
  default, ends = default_of(field), field.metadata
  if ends['choices']:
    return next(c for c in ends['choices'] if c != default)
  if settings.is_number(default):
    ends = [e for e in (ends['low'], ends['high'], default + 1) if e not in (None, default)]
    return type(default)(ends[0])
  return {bool: not default, str: 'x', tuple: ('x',), dict: {'x': 1}}[type(default)]


@each([(c, f) for c, f in FIELDS if f.metadata['needs']])
def test_a_value_without_what_it_needs_is_refused_and_with_it_is_not(cls, field):
  key, *wanted = field.metadata['needs']
  other = next(f for f in dataclasses.fields(cls) if f.name == key)
  value = other_value(field)
  needed = wanted or [other_value(other)]
  unwanted = [c for c in (*other.metadata['choices'], default_of(other)) if c not in needed]
  for without in unwanted:
    said = refused(cls, **{field.name: value, key: without})
    assert said.startswith(f'group.{field.name}={value!r} has no effect with group.{key}=')
  assert unwanted, 'it is never without effect'
  for with_it in needed:
    changes = {field.name: value, key: with_it}
    more = other.metadata['needs']  # of what it needs itself
    settings.check_needs(cls(**changes | ({more[0]: [*more, 'x'][1]} if more else {})))


def test_a_text_is_utf8():
  with pytest.raises(BadInput, match=r"^data\.path='caf\\udce9' is not UTF-8"):
    settings.check(settings.from_dict(Config, {'data': {'path': 'caf\udce9'}}))
  settings.check(settings.from_dict(Config, {'data': {'path': 'café\n😀'}}))


def test_groups_are_walked_and_named():
  with pytest.raises(BadInput, match=r'^optimizer\.clip=-1\.0 is out of range: give a finite '
                                     r'number, at least 0 \(global L2 norm'):
    settings.check(settings.from_dict(Config, {'optimizer': {'clip': -1}}))
  with pytest.raises(BadInput, match=r'^model\.rope_theta=5\.0 has no effect with model\.positions='
                                     r"'learned': leave it out, or set model\.positions=rotary$"):
    settings.check(settings.from_dict(Config, {'model': {'rope_theta': 5}}))


def test_choices_are_what_is_built():
  def choices(cls, name):
    return set(next(f for f in dataclasses.fields(cls) if f.name == name).metadata['choices'])
  assert choices(ModelConfig, 'activation') == set(ACTIVATIONS)
  assert choices(ModelConfig, 'norm') == set(KINDS)
  assert choices(ExecutionConfig, 'remat') == set(REMAT)
  assert choices(MixConfig, 'order') == set(gate.ORDERS)
  assert choices(MixConfig, 'combine') == set(combine.KINDS)
  assert choices(MixConfig, 'kernel') == set(evidence.KERNELS)


def test_what_was_saved_is_read_without_these_checks():
  """A run of before may have what is refused today; it is read, and only a user is told."""
  old = {'model': {'rope_theta': 5e5}, 'optimizer': {'clip': -1.0}, 'init': {'limit': 7}}
  config = settings.from_dict(Config, old)
  assert (config.model.rope_theta, config.optimizer.clip, config.init.limit) == (5e5, -1.0, 7)
