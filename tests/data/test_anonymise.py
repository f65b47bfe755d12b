"""anonymise.py: what becomes a placeholder, what stays, and that no text takes long."""

import json
import signal

import pytest
from corpus_cases import flags, refused, verb, write

from demix.data.corpus import anonymise
from demix.data.tokens.store import TokenStore

FOUND = [
    ('write to Jane.Doe+x@mail.example.org, please', 'write to <EMAIL>, please', 'email'),
    ('<a@b.co>', '<<EMAIL>>', 'email'),
    ('card 4111 1111 1111 1111.', 'card <CARD>.', 'card'),
    ('4111-1111-1111-1111 5500005555555559', '<CARD> <CARD>', 'card'),
    ('amex 3782 822463 10005', 'amex <CARD>', 'card'),
    ('ssn 078-05-1120', 'ssn <SSN>', 'ssn'),
    ('call (212) 555-0123 or 212-555-0123', 'call <PHONE> or <PHONE>', 'phone'),
    ('+49 30 123 4567', '<PHONE>', 'phone'),
    ('+1 212.555.0123', '<PHONE>', 'phone'),
    ('thanks @some_body!', 'thanks <HANDLE>!', 'handle'),
]
KEPT = ['4111 1111 1111 1112', 'version 1.2.3.4 of 2021-05-17', 'a @ b', 'x@y', '000-12-3456',
        'id 123-45-67890', 'http://host/@name', '@a@b', 'f(212) 5550123', '12345678901234567890',
        '@', 'user@', 'a@b.', '1234-5678']


@pytest.mark.parametrize(('text', 'expected', 'kind'), FOUND)
def test_it_is_replaced_and_counted(text, expected, kind):
  counts = {}
  assert anonymise.replace(text, ('all',), counts) == expected
  assert counts == {kind: expected.count(f'<{kind.upper()}>')}
  others = tuple(k for k in anonymise.KINDS if k != kind)
  assert f'<{kind.upper()}>' not in anonymise.replace(text, others, {})


@pytest.mark.parametrize('text', KEPT)
def test_it_stays(text):
  counts = {}
  assert anonymise.replace(text, ('all',), counts) == text and counts == {}


@pytest.mark.parametrize('unit', [
    'a', '1', '@', 'a@', 'a.', 'a@b.', '1 ', '12-', '+1 ', '1234 ', '@a', '(12', 'a@' + 'b' * 63,
    '+12 34', '4111 1111 1111 ', '123-45-', '\n@x', 'é', '.@'])
def test_no_text_takes_more_than_its_size(unit):
  """A quadratic pattern would take hours on a megabyte; the alarm ends it."""
  def late(*_):
    raise AssertionError(f'{unit!r}: not proportional to its size')
  old = signal.signal(signal.SIGALRM, late)
  signal.alarm(60)
  try:
    anonymise.replace(unit * (1_000_000 // len(unit)), ('all',), {})
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def test_prepare_replaces_before_anything_learns_from_the_text(tmp_path, capsys):
  texts = [f'mail u{i}@example.org or @user{i}' for i in range(30)]
  write(tmp_path / 'in', {'law': {'train': texts, 'valid': ['no one', 'x@example.org']}})
  code, out, err = verb(capsys, *flags(tmp_path, '--config.anonymise=email,handle',
                                       '--config.vocab_size=300', tokenizer='bpe'))
  assert code == 0, err
  store = TokenStore.open(tmp_path / 'out')
  assert store.card['domains']['law']['splits']['train']['anonymised'] == {
      'email': 30, 'handle': 30}
  assert store.card['domains']['law']['splits']['valid']['anonymised'] == {'email': 1}
  assert 'anonymised: email 31, handle 30' in out
  assert store.tokenizer().decode(store.tokens('law', 'train')[:40]).startswith(
      'mail <EMAIL> or <HANDLE>')
  vocabulary = json.loads((tmp_path / 'out/tokenizer/tokenizer.json').read_text())['model']['vocab']
  assert not any('example' in token for token in vocabulary)


def test_an_unknown_kind_is_refused(tmp_path, capsys):
  write(tmp_path / 'in', {'law': {'train': ['a']}})
  assert "no kind 'emial' (did you mean 'email'?)" in refused(
      capsys, *flags(tmp_path, '--config.anonymise=emial'))
