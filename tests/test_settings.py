"""demix/settings.py: the strict way from a dict to a dataclass and back."""

import dataclasses

import pytest

from demix import settings
from demix.config import Config
from demix.data.corpus.prepare import PrepareConfig
from demix.errors import BadInput
from demix.settings import option


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = option(0.5, 'a rate')
  names: tuple = option((), 'names', operational=True)


@dataclasses.dataclass(frozen=True)
class Outer:
  count: int = option(3, 'a count')
  flag: bool = option(False, 'a flag', operational=True)
  text: str = option('x', 'a text')
  shares: dict = option({'a': 1}, 'shares')
  inner: Inner = option(Inner(), 'a group')


@pytest.mark.parametrize('cls', [Outer, Config, PrepareConfig])
def test_defaults_come_back(cls):
  assert settings.from_dict(cls, settings.to_dict(cls())) == cls()
  assert settings.from_dict(cls, {}) == cls()


def test_values_come_back():
  values = {'count': 7, 'flag': True, 'text': 'y', 'shares': {'b': 2.5, 'c': 0},
            'inner': {'rate': 0.25, 'names': ('p', 'q')}}
  made = settings.from_dict(Outer, values)
  assert made == Outer(7, True, 'y', {'b': 2.5, 'c': 0}, Inner(0.25, ('p', 'q')))
  assert settings.to_dict(made) == values


@pytest.mark.parametrize(('path', 'text'), [
    ('cuont', r"config\.cuont: no such key \(did you mean 'count'\?\)"),
    ('inner.rat', r"config\.inner\.rat: no such key \(did you mean 'rate'\?\)"),
    ('zzz', r'config\.zzz: no such key \(known: count, flag, inner, shares, text\)'),
])
def test_an_unknown_key_is_refused_with_the_nearest(path, text):
  *groups, last = path.split('.')
  mapping = {groups[0]: {last: 1}} if groups else {last: 1}
  with pytest.raises(BadInput, match=text):
    settings.from_dict(Outer, mapping)
  with pytest.raises(BadInput, match=text):
    settings.check_path(Outer, path)


@pytest.mark.parametrize(('path', 'text'), [
    ('inner', 'a group of keys'), ('count.x', 'has no keys'), ('inner.names.x', 'has no keys'),
    ('iner.rate', "config.iner: no such key .did you mean 'inner'")])
def test_a_path_that_leads_nowhere_is_refused(path, text):
  with pytest.raises(BadInput, match=text):
    settings.check_path(Outer, path)


def test_a_path_to_a_key_or_into_a_dict_is_accepted():
  for path in ('count', 'inner.rate', 'shares.anything'):
    settings.check_path(Outer, path)


@pytest.mark.parametrize(('key', 'value'), [
    ('count', 1.5), ('count', True), ('count', '3'), ('count', None), ('flag', 1), ('flag', 'true'),
    ('text', 3), ('text', None), ('shares', [1]), ('shares', 'a'), ('inner', 3)])
def test_a_value_of_another_type_is_refused_with_its_place_and_itself(key, value):
  with pytest.raises(BadInput) as e:
    settings.from_dict(Outer, {key: value})
  assert str(e.value).startswith(f'config.{key}: expected ') and repr(value) in str(e.value)


@pytest.mark.parametrize('value', [True, '0.5', None])
def test_a_float_takes_numbers_only(value):
  with pytest.raises(BadInput, match=r'config\.inner\.rate: expected float like 0\.5'):
    settings.from_dict(Outer, {'inner': {'rate': value}})


def test_an_int_is_a_float_where_a_float_is_wanted():
  rate = settings.from_dict(Outer, {'inner': {'rate': 2}}).inner.rate
  assert rate == 2.0 and isinstance(rate, float)


@pytest.mark.parametrize('value', ['a,b', ' a , b ', ('a', 'b'), ['a', 'b'], ('a,b',), ['a', 'b,']])
def test_a_tuple_of_names_may_be_written_with_commas(value):
  assert settings.from_dict(Inner, {'names': value}).names == ('a', 'b')


def test_no_names_is_an_empty_tuple():
  assert settings.from_dict(Inner, {'names': ''}).names == ()


def test_a_dict_default_is_not_shared():
  a, b = Outer(), Outer()
  a.shares['new'] = 1
  assert b.shares == {'a': 1} == Outer().shares
  flat = settings.to_dict(b)
  flat['shares']['new'] = 1
  assert b.shares == {'a': 1}


@pytest.mark.parametrize('cls', [Outer, Config])
def test_every_field_is_identity_or_operational(cls):
  everything = settings.flatten(cls())
  identity = settings.flatten(cls(), operational=False)
  operational = settings.flatten(cls(), operational=True)
  assert identity | operational == everything and not identity.keys() & operational.keys()
  assert identity and operational


def test_flatten_gives_dotted_names_and_lists():
  assert settings.flatten(Outer(inner=Inner(names=('p',)))) == {
      'count': 3, 'flag': False, 'text': 'x', 'shares': {'a': 1}, 'inner.rate': 0.5,
      'inner.names': ['p']}
  assert settings.flatten(Outer(), operational=True) == {'flag': False, 'inner.names': []}


@pytest.mark.parametrize('cls', [Outer, Config, PrepareConfig])
def test_help_has_every_key_with_its_default_and_a_text(cls):
  lines = settings.describe(cls)
  heads = {line.split('\n')[0].strip() for line in lines}
  for name, value in settings.flatten(cls()).items():
    value = tuple(value) if isinstance(value, list) else value
    assert f'--config.{name}={value!r}' in heads
  assert len(lines) == len(settings.flatten(cls()))
  assert all(len(line.split('\n')[1].strip()) > 3 for line in lines)


def test_nearest_names_the_closest_or_all():
  assert settings.nearest('legl', ('code', 'legal')) == " (did you mean 'legal'?)"
  assert settings.nearest('zzzz', ('legal', 'code')) == ' (known: code, legal)'
  assert settings.nearest('zzzz', ()) == ''
