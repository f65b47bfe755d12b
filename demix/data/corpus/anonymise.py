"""Names of persons in texts made placeholders: e-mail addresses, cards, social security and phone
numbers, @handles (the kinds of the DEMix corpus; our own patterns, so counts are ours).

Every pattern is bounded and starts only where a run starts, so a text of any size and content takes
time in proportion to its size. What they leave: names, addresses, numbers written as words.
"""

import re

from demix.errors import BadInput
from demix.settings import nearest

_LOCAL = r"[\w.+'-]"
# In this order: what one has replaced the next does not see.
PATTERNS = {
    'email': re.compile(rf'(?<!{_LOCAL}){_LOCAL}{{1,64}}@(?:[\w-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}}'
                        r'(?![\w-])'),
    'card': re.compile(r'(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\w-])'
                       r'|(?<![\w.-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\w-])'),
    'ssn': re.compile(r'(?<![\w.-])(?!000|666|9\d\d)\d{3}([ -])(?!00)\d\d\1(?!0000)\d{4}(?![\w-])'),
    'phone': re.compile(r'(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\) ?|\d{3}[ .-])\d{3}[ .-]'
                        r'\d{4}(?![\w-])|(?<![\w.+-])\+\d{1,3}(?:[ .-]?\d{2,4}){2,4}(?![\w-])'),
    'handle': re.compile(r'(?<![\w@./])@\w{2,30}(?![\w@])'),
}
KINDS = tuple(PATTERNS)


def check(kinds: tuple):
  """BadInput for a kind that there is not."""
  for kind in kinds:
    if kind not in (*KINDS, 'all'):
      raise BadInput(f'config.anonymise: no kind {kind!r}{nearest(kind, (*KINDS, "all"))}')


def replace(text: str, kinds: tuple, counts: dict) -> str:
  """`text` with `<EMAIL>`, `<CARD>`, … in place of what the kinds find ('all': every kind).

  Args:
    counts: {kind: number}, added to. A card number is one only with its check digit right (Luhn).
  """
  for kind in KINDS:
    if kind not in kinds and 'all' not in kinds:
      continue
    if kind in ('email', 'handle') and '@' not in text:
      continue
    text, found = _replaced(kind, text)
    if found:
      counts[kind] = counts.get(kind, 0) + found
  return text


def _replaced(kind, text):
  if kind != 'card':
    return PATTERNS[kind].subn(f'<{kind.upper()}>', text)
  found = 0

  def card(match):
    nonlocal found
    if not _luhn([int(c) for c in match[0] if c.isdecimal()]):
      return match[0]
    found += 1
    return '<CARD>'
  return PATTERNS[kind].sub(card, text), found


def _luhn(digits):
  doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
  return not (sum(doubled) + sum(digits[-1::-2])) % 10
