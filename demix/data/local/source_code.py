"""Source code taken apart: code without comments, doc strings, interactive sessions, notes; and
texts cut into pieces at natural borders.

One regular expression finds the strings and comments of Python, Cython and stubs. `ast` is not
used: it cannot read Cython, reads another syntax in every Python version, and is twenty times
slower. What is not valid code is no error; it is cut all the same.
"""

import inspect
import re

# Strings and comments. A prefix (r, f, b) does not change where a string ends, so it is left out
# and the search can skip to the next quote or hash sign. No possessive groups: up to Python 3.11.4
# they miss matches, and Debian 12 has 3.11.2.
_TOKEN = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
    r'|#[^\n]*', re.DOTALL)
_C_COMMENT = re.compile(r'\s*(?:/\*.*?\*/|(?://[^\n]*\n)+)\s*', re.DOTALL)
_NEXT_CODE = re.compile(r'(?:[ \t]*(?:#[^\n]*)?\n)*([ \t]*)[^\s#]')
_BLANK_LINES = re.compile(r'\n(?:[ \t]*\n){2,}')
_TRAILING = re.compile(r'[ \t]+$', re.MULTILINE)
_SECTION = re.compile(r'^([A-Z][A-Za-z ]+)\n[-=]{3,}(?:\n|\Z)', re.MULTILINE)
_PROMPT = re.compile(r'[ \t]*>>> ')
_FENCE = re.compile(r'[ \t]*```')
_EMPTY_FENCE = re.compile(r'^[ \t]*```\w*\n\s*```[ \t]*$', re.MULTILINE)
_PLACEHOLDER = re.compile(r'^[ \t]*%\(\w+\)s[ \t]*$', re.MULTILINE)

# Borders to cut at, the most natural first. What a pattern matches ends one part.
CODE = (r'\n(?=(?:@|def |class |async def |cdef |cpdef |ctypedef ))', r'\n(?=[^\s)\]}])',
        r'\n(?=[ \t]+(?:@|def |async def |cdef |cpdef ))', r'\n(?=[ \t]*\n)', r'\n')
C_CODE = (r'\n\n(?=\S)', r'\n\n', r'\n(?=\S)', r'\n')
PROSE = (r'\n\n(?=#|[^\n]+\n[=\-~*^"]{3})', r'\n\n', r'\n', r'(?<=\. )', r'(?<= )')


def tidy(text: str) -> str:
  """Without blanks at line ends, blank lines at both ends, and more than one in a row between."""
  return _BLANK_LINES.sub('\n\n', _TRAILING.sub('', text)).strip('\n')


def split_python(text: str) -> tuple[str, list[str]]:
  """Takes the doc strings and comments out of Python, stub or Cython code.

  Also a doc string that a call attaches counts (a triple-quoted string with an underlined heading);
  an empty string is left in its place. A body that was nothing but a doc string becomes `pass`.

  Returns:
    (the code without them, the doc strings: no quotes, dedented, escapes as they are written).
  """
  code, docs = [], []
  end, opens = 0, True  # `opens`: the last character of code, comments aside, began a body
  for token in _TOKEN.finditer(text):
    string = token[0]
    before, newline, lead = text[end:token.start()].rpartition('\n')
    first = bool(newline) or not end  # nothing but `lead` stands before it on its line
    solid = (before if first else before + newline + lead).rstrip()
    opens = solid[-1] == ':' if solid else opens
    end = token.end()
    if string[0] == '#':
      # A comment that has its line for itself takes the line with it.
      code.append(before if first and not lead.strip() else before + newline + lead)
      opens = lead.rstrip()[-1] == ':' if lead.strip() else opens
      continue
    triple = string[:3] in ('"""', "'''")
    after = text[end:text.find('\n', end) + 1 or len(text)].strip()
    if first and opens and lead.strip() in ('', 'r', 'R', 'u', 'U') and after[:1] in ('', '#'):
      docs.append(inspect.cleandoc(string[3:-3] if triple else string[1:-1]))
      indent = len(lead) - len(lead.lstrip())
      follows = _NEXT_CODE.match(text, end)
      alone = indent and (not follows or len(follows[1]) < indent)
      code.append(before + newline + lead[:indent] + 'pass' if alone else before)
    else:
      attached = triple and _SECTION.search(body := inspect.cleandoc(string[3:-3]))
      if attached:
        docs.append(body)
      code.append(before + newline + lead + (2 * string[:3] if attached else string))
    opens = False
  code.append(text[end:])
  return tidy(''.join(code)), docs


def split_sessions(doc: str) -> tuple[str, str]:
  """Takes the interactive sessions (`>>>`, what is typed and what comes back) out of a doc string.

  Returns:
    (prose, sessions); a session lasts to the next blank line or fence.
  """
  prose, sessions, inside = [], [], False
  for line in doc.split('\n'):
    if inside and (not line.strip() or _FENCE.match(line)):
      inside = False
      sessions.append('')
    inside = inside or _PROMPT.match(line) is not None
    (sessions if inside else prose).append(line)
  rest = _EMPTY_FENCE.sub('', _PLACEHOLDER.sub('', '\n'.join(prose)))
  return tidy(rest), tidy(inspect.cleandoc('\n'.join(sessions)))


def split_notes(prose: str) -> tuple[str, str]:
  """Takes `Notes` and `References` out of a doc string with underlined headings and references.

  Notes without references mostly say more about the interface, and stay.

  Returns:
    (the rest, without sections that are empty; the text of the two sections).
  """
  head, *sections = _SECTION.split(prose)
  if 'References' not in sections[::2]:
    return prose, ''
  rest, notes = [head], []
  for name, body in zip(sections[::2], sections[1::2]):
    if name in ('Notes', 'References'):
      notes.append(body)
    elif body.strip():
      rest.append(f'{name}\n{"-" * len(name)}\n{body}')
  return tidy(''.join(rest)), tidy('\n'.join(notes))


def without_licence(text: str) -> str:
  """C or C++ code without the comments at its start that carry a licence or a copyright."""
  while (m := _C_COMMENT.match(text)) and re.search('(?i)licen[sc]e|copyright|spdx', m[0]):
    text = text[m.end():]
  return text


def stretches(text: str, borders: tuple[str, ...], limit: int) -> list[str]:
  """Cuts a source of more than `limit` characters at top-level borders outside of strings."""
  if len(text) <= limit:
    return [text]
  strings = [token.span() for token in _TOKEN.finditer(text)] if borders is CODE else []
  return cut(text, borders[:1], limit, strings)


def cut(text: str, borders: tuple[str, ...], limit: int, inside=()) -> list[str]:
  """Cuts a text into pieces of at most `limit` characters, at the most natural borders that do it.

  Args:
    text: what to cut.
    borders: patterns, the most natural first; the next is tried on pieces that are still too long.
    limit: most characters of a piece. A piece in which no pattern matches stays longer.
    inside: ordered spans [start, end) of `text` in which there is no border.

  Returns:
    The pieces, in order; together they are the text.
  """
  if len(text) <= limit or not borders:
    return [text]
  ends, i = [], 0
  for border in re.finditer(borders[0], text):
    while i < len(inside) and inside[i][1] <= border.start():
      i += 1
    if i == len(inside) or border.end() <= inside[i][0]:
      ends.append(border.end())
  pieces, start, last = [], 0, 0
  for end in [*ends, len(text)]:
    if end - start > limit and last > start:
      pieces.append(text[start:last])
      start = last
    last = end
  pieces.append(text[start:])
  return [part for piece in pieces for part in cut(piece, borders[1:], limit)]
