"""Where a long text may be cut so that the ids of its pieces are the ids of the whole.

The tokenizer libraries need over a hundred bytes of memory per byte of the text that they hold, so
a document of megabytes goes through them in pieces. Two cuts are exact, and nothing else is done:

* Before white space that follows something else (`pattern`, `split`). The pre-tokenizers known here
  never put both into one pre-token, look ahead past white space only, and never look back; a model
  sees one pre-token at a time.
* Inside an unbroken run (megabytes of letters, of blanks, of emoji), where the pre-tokenizer is
  GPT-2's and the model plain byte-level BPE (`encode_run`). A sequence of tokens is the BPE of its
  text if and only if every two neighbours are the BPE of theirs (shown in the write-up of GitHub's
  crate `bpe`, "So many tokens, so little time"), so two encodings may be joined where the second
  starts with the token that also followed in the first.
"""

import itertools
import re
import threading

import numpy as np

SIZE = 1 << 16  # characters after which a piece ends at the next cut
LONGEST = 64     # characters of a piece whose ids are remembered
_HELD = 24 << 20  # bytes that what is remembered may take, about
_ENTRY = 160      # of them for each piece, beside its text and ids
RUN = 1 << 18   # characters without a cut from which encode_run is worth its second look

# Python's \s holds all white space of Unicode; U+180E was white space before Unicode 6.3.
BEFORE_WHITE = re.compile(r'(?<=[^\s\u180e])[ \t\n\r]')
_BEFORE_BLANK = re.compile(r'(?<=[^\s\u180e]) ')
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Their punctuation may take the line ends that follow it, so only blanks are safe.
_BLANK_ONLY = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers +
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r'\p{N}{1,3}', r'\p{N}'))  # Llama 3 and cl100k; Qwen 2

# Characters that are no white space and whose class (letter, number, other) no version of Unicode
# since 6.0 changed. Between two of them the pre-tokenizer is inside a run or at the end of one, and
# goes on the same if the text starts there; so it does between blanks and between equal characters.
# An apostrophe starts a contraction or not by what is before it, unless another one follows.
_KNOWN = (r'!-&(-~\u00a1-\u02af\u0300-\u036f\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u05d0-\u05ea'
          r'\u0621-\u063a\u0641-\u064a\u0905-\u0939\u0e01-\u0e3a\u0e40-\u0e4e\u3001-\u3020'
          r'\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3\U0001f300-\U0001f64f')
_JOINT = re.compile(rf"[{_KNOWN}]{{2}}|[ \t\n\r]{{2}}|([^'])\1|''(?=')", re.DOTALL)
_TRIES = 16  # joints to try before the rest is encoded whole


def pattern(spec: dict):
  """The pattern that matches where text may be cut, for a pipeline given as the dict of its
  tokenizer.json; None where no cut is known to be exact."""
  if spec.get('normalizer') or any(not t['special'] for t in spec.get('added_tokens', ())):
    return None  # either may look across a cut
  return {'gpt2': BEFORE_WHITE, 'blank': _BEFORE_BLANK}.get(_pre_tokenizer(spec))


def cuts_runs(spec: dict) -> bool:
  """Whether encode_run is exact for the pipeline: GPT-2's pre-tokenizer, plain byte-level BPE."""
  model = spec['model']
  return (pattern(spec) is not None and _pre_tokenizer(spec) == 'gpt2' and model['type'] == 'BPE'
          and not any(model.get(k) for k in ('ignore_merges', 'dropout', 'unk_token',
                                             'continuing_subword_prefix', 'end_of_word_suffix')))


def _pre_tokenizer(spec):
  pre = spec.get('pre_tokenizer') or {}
  steps = pre['pretokenizers'] if pre.get('type') == 'Sequence' else [pre]
  last = steps[-1]
  if last.get('type') != 'ByteLevel' or last.get('add_prefix_space'):
    return None
  if len(steps) == 1:
    return 'gpt2' if last.get('use_regex', True) else None
  first = steps[0]
  if len(steps) != 2 or first['type'] != 'Split' or last.get('use_regex', True) or \
      (first['behavior'], first['invert']) not in (('Isolated', False), ('Removed', True)):
    return None
  regex = first['pattern'].get('Regex')
  return 'gpt2' if regex == _GPT2 else 'blank' if regex in _BLANK_ONLY else None


def split(text: str, cut, size: int = SIZE) -> list:
  """`text` in pieces of at least `size` >= 1 characters, cut where the pattern `cut` matches."""
  if cut is None or len(text) <= size:
    return [text]
  out, start = [], 0
  while len(text) - start > size and (at := cut.search(text, start + size)):
    out.append(text[start:at.start()])
    start = at.start()
  return [*out, text[start:]]


# The pieces between all cuts of BEFORE_WHITE (as `re.split` gives them, at twice its speed).
_PIECES = re.compile(r'[\s\u180e]*[^\s\u180e]+(?:(?![ \t\n\r])[\s\u180e]+[^\s\u180e]*)*'
                     r'|[\s\u180e]+')


class Remembered:
  """Encodes texts piece by piece, and each piece once: most words of a text were there before.

  For pipelines that `cuts_runs` says are plain byte-level BPE. The library spends its time in the
  pre-tokenizer's regular expression, so what is new goes to it as one text.

  Args:
    encode: [str] -> [ids], the exact encoding of each.
    token_bytes_V: int32 [V], bytes of text that each id stands for.
    held: bytes to remember, about; above them it starts anew.
  """

  def __init__(self, encode, token_bytes_V: np.ndarray, held: int = _HELD):
    self._encode, self._token_bytes_V, self._most = encode, token_bytes_V, held
    self._ids, self._held = {}, 0  # {piece: its ids as bytes}
    self._lock = threading.Lock()

  def __call__(self, texts: list) -> list:
    """int32 ids of each text, equal to `encode` of it."""
    found = [_PIECES.findall(text) for text in texts]
    with self._lock:
      new = self._learn(found)
      read = self._ids.__getitem__
      out = [np.frombuffer(bytearray(b''.join(map(read, pieces))), np.int32) for pieces in found]
      for piece in new:
        if len(piece) > LONGEST:
          self._held -= _ENTRY + len(piece) + len(self._ids.pop(piece))
    return out

  def _learn(self, found):
    """Encodes the pieces that are not known, and returns them."""
    if self._held > self._most:
      self._ids, self._held = {}, 0
    known = self._ids.__contains__
    new = set(itertools.chain.from_iterable(itertools.filterfalse(known, p) for p in found))
    joint = [p for p in new if p[0] in ' \t\n\r' and not p[-1].isspace() and p[-1] != '\u180e']
    alone = [p for p in new if p[0] not in ' \t\n\r' or p[-1].isspace() or p[-1] == '\u180e']
    whole, *others = self._encode([''.join(joint), *alone])
    ends = np.cumsum(self._token_bytes_V[whole])
    sizes = np.cumsum([len(p.encode()) for p in joint])
    places = np.searchsorted(ends, sizes) + 1
    if joint and (places[-1] != len(whole) or (ends[places - 1] != sizes).any()):
      parts = [ids.tobytes() for ids in self._encode(joint)]  # bytes that the vocabulary lacks
    else:
      data, places = whole.tobytes(), [0, *(4 * places).tolist()]
      parts = [data[a:b] for a, b in itertools.pairwise(places)]
    parts += [ids.tobytes() for ids in others]
    for piece, ids in zip([*joint, *alone], parts):
      self._ids[piece] = ids
      self._held += _ENTRY + len(piece) + len(ids)
    return new


def encode_run(text: str, encode, token_bytes_V, window: int = 1 << 17) -> np.ndarray:
  """The ids of `text`, `window` characters at a time.

  Args:
    text: what no pattern cuts.
    encode: str -> ids; the exact encoding of what it is given.
    token_bytes_V: int32 [V], bytes of text that each id stands for.
    window: characters to encode at once.

  Returns:
    int32 ids, equal to encode(text). Where no joint is found the rest is encoded whole.
  """
  out, start, ids = [], 0, encode(text[:window])
  while start + window < len(text):
    for tries, (count, at) in enumerate(_joints(text, start, window, ids, token_bytes_V)):
      following = encode(text[at:at + window])
      if following[0] == ids[count]:
        break
      if tries == _TRIES:
        return np.concatenate([*out, encode(text[start:])])
    else:
      return np.concatenate([*out, encode(text[start:])])
    out.append(ids[:count])
    start, ids = at, following
  return np.concatenate([*out, ids])


def _joints(text, start, window, ids, token_bytes_V):
  """Yields (tokens before it, index in text) of ends of tokens where the text may be taken up
  again, backwards from 7/8 of the window: what the window cuts off at its end is behind them."""
  data = np.frombuffer(text[start:start + window].encode(), np.uint8)
  starts_char = (data & 0xC0) != 0x80
  chars = np.cumsum(starts_char)
  ends = np.cumsum(token_bytes_V[ids])
  for count in range(int(np.searchsorted(ends, len(data) * 7 // 8)), 1, -1):
    end = ends[count - 1]
    at = start + int(chars[end]) - 1
    if starts_char[end] and _JOINT.match(text, at - 1):
      yield count, at
