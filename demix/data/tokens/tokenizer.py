"""Text into ids and back, with one end-of-document id that no text produces.

Kinds: `bytes` (ids 0..255), `bpe` (byte-level BPE trained here), `json` (an existing Hugging Face
`tokenizer.json`) and `sentencepiece` (an existing model). Only the last three import a library,
and only when they are made.
"""

import abc
import functools
import re
from pathlib import Path

import numpy as np
import orjson
import xxhash

from demix.data.tokens import pieces
from demix.data.tokens.tokenizer_check import check_ids
from demix.errors import BadInput

VERSION = 1
KINDS = ('bytes', 'bpe', 'json', 'sentencepiece')
END = '<|endoftext|>'
ENDS = (END, '</s>', '<eos>', '<|end_of_text|>', '<|eos|>')  # ends of document others use

_FILES = {'bytes': None, 'bpe': 'tokenizer.json', 'json': 'tokenizer.json',
          'sentencepiece': 'sentencepiece.model'}
# The libraries take about 130 bytes of memory per byte of text that they work on at once.
_BATCH = 1 << 19


class Tokenizer(abc.ABC):
  """What every kind has; make one with `load`, `ByteTokenizer()`, `bpe.train` or `from_file`.

  Attributes:
    kind: one of KINDS.
    vocab_size: V: every id is below it.
    eod_id: the end-of-document id; no text produces it.
    unknown_id: the id of text that the vocabulary cannot spell, or None.
    token_bytes_V: int32 [V], bytes of text that an id stands for; end of document and other
      control ids 0. Exact for `bytes` and byte-level vocabularies.
    fingerprint: xxh3-128 over the content: kind, ids, token bytes, model file.
  """
  kind: str

  def __init__(self, vocab_size: int, eod_id: int, token_bytes_V, model: bytes = b''):
    self.vocab_size, self.eod_id, self.unknown_id = int(vocab_size), int(eod_id), None
    self.token_bytes_V = np.asarray(token_bytes_V, np.int32)
    self._model = model
    self.fingerprint = _fingerprint(self.kind, self.vocab_size, self.eod_id, self.token_bytes_V,
                                    model)

  @staticmethod
  def load(folder) -> 'Tokenizer':
    """The tokenizer saved in `folder`. BadInput: missing, another version, or not the content
    that its fingerprint names."""
    folder = Path(folder)
    meta, token_bytes_V = read_meta(folder)
    kind = _kind(meta['kind'])
    model = (folder / _FILES[meta['kind']]).read_bytes() if _FILES[meta['kind']] else b''
    return kind(meta['vocab_size'], meta['eod_id'], token_bytes_V, model)

  def __reduce__(self):  # the libraries' objects do not keep their settings in a pickle
    return type(self), (self.vocab_size, self.eod_id, self.token_bytes_V, self._model)

  def save(self, folder):
    """Writes the tokenizer's files into `folder` (made if need be); meta.json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self._model:
      (folder / _FILES[self.kind]).write_bytes(self._model)
    np.save(folder / 'token_bytes.npy', self.token_bytes_V.astype('<i4'))
    (folder / 'meta.json').write_bytes(orjson.dumps(self.meta(), option=orjson.OPT_INDENT_2))

  def meta(self) -> dict:
    """What tokenizer/meta.json and a data card say of it."""
    return {'version': VERSION, 'kind': self.kind, 'vocab_size': self.vocab_size,
            'eod_id': self.eod_id, 'fingerprint': self.fingerprint}

  @abc.abstractmethod
  def encode(self, texts: list) -> list:
    """int32 ids of each text, without an end-of-document id. Ordinary text only: the spelling of
    a special token in a text is text."""

  @abc.abstractmethod
  def spelling(self, i: int) -> bytes:
    """What an id adds to the UTF-8 of a text; blanks between words are part of it, and a character
    may be spread over ids. Nothing for ids of no text."""

  def decode(self, ids) -> str:
    """The text of `ids`; ids of no text (end of document) add nothing, invalid UTF-8 becomes
    U+FFFD. BadInput: an id that is not in the vocabulary."""
    ids = np.asarray(ids).reshape(-1)
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < self.vocab_size):
      bad = next(int(i) for i in ids if not 0 <= i < self.vocab_size)
      raise BadInput(f'id {bad}: the tokenizer has ids 0 to {self.vocab_size - 1}')
    return self._decode(ids[ids != self.eod_id].tolist())

  @abc.abstractmethod
  def _decode(self, ids):
    """The text of a list of ids that are all of text."""

  def spelling_V(self) -> list | None:
    """What each id adds to a text, as bytes (end of document and other control ids: b''); None
    where that depends on the ids around it, so that only `decode` knows."""
    return None


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes as ids 0..255; end of document is 256."""
  kind = 'bytes'

  def __init__(self, vocab_size=257, eod_id=256, token_bytes_V=None, model=b''):
    super().__init__(257, 256, np.arange(257) < 256)

  def encode(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

  def spelling(self, i):
    return bytes([i]) if i < 256 else b''

  def _decode(self, ids):
    return bytes(ids).decode('utf-8', 'replace')

  def spelling_V(self):
    return [bytes([i]) for i in range(256)] + [b'']


def read_meta(folder: Path):
  """(meta, token_bytes_V) of the tokenizer saved in `folder`, checked against its fingerprint.

  Raises:
    BadInput: a file is missing or broken, the version is another, or the content changed.
  """
  try:
    meta = orjson.loads((folder / 'meta.json').read_bytes())
    if not isinstance(meta, dict) or meta.get('version') != VERSION:
      version = meta.get('version') if isinstance(meta, dict) else None
      raise BadInput(f'{folder / "meta.json"}: version {version!r}, this demix reads {VERSION}: '
                     'prepare the token store again')
    token_bytes_V = np.load(folder / 'token_bytes.npy', allow_pickle=False)
    name = _FILES[meta['kind']]
    model = (folder / name).read_bytes() if name else b''
    found = _fingerprint(meta['kind'], meta['vocab_size'], meta['eod_id'], token_bytes_V, model)
  except FileNotFoundError as e:
    raise BadInput(f'{e.filename}: no such file of a tokenizer: prepare the token store '
                   'again') from None
  except (ValueError, KeyError, TypeError, EOFError) as e:
    raise BadInput(f'{folder}: broken tokenizer ({type(e).__name__}: {e}): prepare the token '
                   'store again') from None
  if found != meta['fingerprint']:
    raise BadInput(f'{folder}: its files have fingerprint {found}, but meta.json says '
                   f'{meta["fingerprint"]}: prepare the token store again')
  return meta, token_bytes_V


def _fingerprint(kind, vocab_size, eod_id, token_bytes_V, model):
  digest = xxhash.xxh3_128(orjson.dumps([kind, vocab_size, eod_id]))
  digest.update(np.ascontiguousarray(token_bytes_V, '<i4'))
  digest.update(model)
  return digest.hexdigest()


class JsonTokenizer(Tokenizer):
  """A pipeline of Hugging Face `tokenizers`. Special tokens are never read from text."""
  kind = 'json'

  def __init__(self, vocab_size, eod_id, token_bytes_V, model):
    super().__init__(vocab_size, eod_id, token_bytes_V, model)
    spec = orjson.loads(model)
    self._cut, self._cuts_runs = pieces.pattern(spec), pieces.cuts_runs(spec)
    self.unknown_id = _unknown_of(spec)
    self._engine = _engine(model)
    self._remembered = pieces.Remembered(self._library, self.token_bytes_V)

  @classmethod
  def from_file(cls, path) -> 'JsonTokenizer':
    """The pipeline in the file `path`, or in its `tokenizer.json` where `path` is a folder.

    Its own end-of-document token is used where it is one of ENDS, special, and shown to be out of
    reach of text; else one id is added.

    Raises:
      BadInput: no such file, not a pipeline of `tokenizers`, one that draws at random, or one
        whose ids are not what the file says, or that has no id for text it cannot spell.
    """
    path = Path(path) / 'tokenizer.json' if Path(path).is_dir() else Path(path)
    model = _read(path)
    try:
      engine = _engine(model)
    except Exception as e:  # the library raises nothing narrower
      raise BadInput(f'{path}: not a tokenizer.json of Hugging Face tokenizers ({e})') from None
    spec = orjson.loads(model)
    try:
      if spec['model'].get('dropout'):
        raise BadInput(f'{path}: BPE dropout {spec["model"]["dropout"]} draws ids at random: '
                       'remove "dropout" from its model')
      check_ids(spec, engine, path)
      size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
      end = _end_of(spec, engine.get_vocab(with_added_tokens=False))
      eod_id, size = (size, size + 1) if end is None else (end, size)
      return cls(size, eod_id, _token_bytes(spec, engine, size), model)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
      raise BadInput(f'{path}: not a tokenizer.json that can be read ({type(e).__name__}: {e}): '
                     'save it again with a recent version of tokenizers') from None

  def encode(self, texts):
    parts, batch, cost = [[] for _ in texts], [], 0

    encode = self._remembered if self._cuts_runs else self._library

    def flush():
      for (i, _), ids in zip(batch, encode([p for _, p in batch])):
        parts[i].append(ids)
      batch.clear()

    for i, text in enumerate(texts):
      for piece in pieces.split(text, self._cut):
        if self._cuts_runs and len(piece) > pieces.RUN:
          flush()
          parts[i].append(pieces.encode_run(piece, self._ids, self.token_bytes_V))
          cost = 0
          continue
        batch.append((i, piece))
        cost += len(piece) if piece.isascii() else 3 * len(piece)
        if cost > _BATCH:
          flush()
          cost = 0
    flush()
    return [p[0] if len(p) == 1 else np.concatenate(p) for p in parts]

  def _library(self, texts):
    try:
      encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as e:  # the library raises nothing narrower
      raise BadInput(f'the tokenizer cannot encode a text ({e}): use another one') from None
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def _ids(self, text):
    return self._library([text])[0]

  @functools.cached_property
  def _spellings(self):
    return _spellings(orjson.loads(self._model), self._engine)

  def spelling(self, i):
    return self._spellings.get(i, b'')

  def _decode(self, ids):
    return self._engine.decode(ids, skip_special_tokens=False)

  def spelling_V(self):
    if not _byte_level(orjson.loads(self._model)):
      return None
    out = [b''] * self.vocab_size
    byte_of = _byte_alphabet()
    for token, i in self._engine.get_vocab(with_added_tokens=False).items():
      out[i] = bytes(byte_of[c] for c in token if c in byte_of)
    for i, token in self._engine.get_added_tokens_decoder().items():
      out[i] = b'' if token.special else token.content.encode()
    return out


class BpeTokenizer(JsonTokenizer):
  """Byte-level BPE with GPT-2's pre-tokenizer, trained here; any text comes back unchanged."""
  kind = 'bpe'

  @classmethod
  def train(cls, texts, vocab_size: int) -> 'BpeTokenizer':
    """Learns up to `vocab_size` ids (256 bytes, end of document, merges) from `texts`.

    The same texts give the same ids, whatever their order.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # The library holds 256 items at once, so they are small.
    parts = (p for t in texts for p in pieces.split(_short_runs(t), pieces.BEFORE_WHITE, 1 << 13))
    engine.train_from_iterator(parts, trainer)
    model = engine.to_str().encode()
    size, eod_id = engine.get_vocab_size(), engine.token_to_id(END)
    return cls(size, eod_id, _token_bytes(orjson.loads(model), engine, size), model)


class SentencePieceTokenizer(Tokenizer):
  """An existing SentencePiece model; text comes back as its normaliser left it."""
  kind = 'sentencepiece'

  def __init__(self, vocab_size, eod_id, token_bytes_V, model):
    super().__init__(vocab_size, eod_id, token_bytes_V, model)
    self._engine = _processor(model)
    self.unknown_id = self._engine.unk_id()

  @classmethod
  def from_file(cls, path) -> 'SentencePieceTokenizer':
    """The model in the file `path`. Its `</s>` ends documents where it is a control piece, which no
    text produces; else one id is added. BadInput: no such file, or not a model."""
    path = Path(path)
    model = _read(path)
    try:
      engine = _processor(model)
      size = engine.piece_size()
    except Exception as e:
      raise BadInput(f'{path}: not a SentencePiece model ({e})') from None
    eod_id = engine.eos_id()  # -1 where it is no control piece
    if eod_id < 0:
      eod_id, size = size, size + 1
    token_bytes_V = np.zeros(size, np.int32)
    for i in range(engine.piece_size()):
      if engine.is_byte(i):
        token_bytes_V[i] = 1
      elif not (engine.is_control(i) or engine.is_unknown(i) or engine.is_unused(i)):
        token_bytes_V[i] = _text_bytes(engine.id_to_piece(i))
    return cls(size, eod_id, token_bytes_V, model)

  def encode(self, texts):
    return [np.array(ids, np.int32) for ids in self._engine.encode(texts, out_type=int)]

  def spelling(self, i):
    if i >= self._engine.piece_size() or self._engine.is_control(i):
      return b''
    if self._engine.is_byte(i):
      return bytes([int(self._engine.id_to_piece(i)[3:5], 16)])
    return self._engine.id_to_piece(i).replace('\u2581', ' ').encode()

  def _decode(self, ids):
    return self._engine.decode(ids)

  def spelling_V(self):
    engine, out = self._engine, [b''] * self.vocab_size
    for i in range(engine.piece_size()):
      if engine.is_byte(i):
        out[i] = bytes([int(engine.id_to_piece(i)[3:5], 16)])  # <0xE2>
      elif not (engine.is_control(i) or engine.is_unknown(i) or engine.is_unused(i)):
        out[i] = engine.id_to_piece(i).replace('\u2581', ' ').encode()
    return out


def _kind(name):
  return {c.kind: c for c in (ByteTokenizer, BpeTokenizer, JsonTokenizer,
                              SentencePieceTokenizer)}[name]


def _read(path):
  try:
    return path.read_bytes()
  except OSError as e:
    raise BadInput(f'{path}: cannot read the tokenizer ({e.strerror})') from None


def _engine(model: bytes):
  from tokenizers import Tokenizer as Engine
  engine = Engine.from_str(model.decode())
  engine.no_truncation()
  engine.no_padding()
  engine.encode_special_tokens = True  # special tokens spelled in text are text
  return engine


def _processor(model: bytes):
  from sentencepiece import SentencePieceProcessor
  return SentencePieceProcessor(model_proto=model)


def _short_runs(text):
  """`text` without runs that make training quadratic: a break every 256 characters of a word, and
  no more than 256 blanks in a row."""
  text = re.sub(r'(\S{256})(?=\S)', r'\1\n', text)
  return re.sub(r'(\s{256})\s+', r'\1', text)


def _end_of(spec, vocabulary):
  """The id of the pipeline's end-of-document token if text cannot reach it, else None."""
  ids = {t['content']: t['id'] for t in spec.get('added_tokens', ()) if t['special']}
  for end in ENDS:
    if end in ids and (end not in vocabulary or not _reachable(spec['model'], end)):
      return ids[end]
  return None


def _reachable(model, token):
  """Whether the model itself could give `token` for a text; False only where that is certain."""
  if model['type'] != 'BPE' or model.get('ignore_merges') or model.get('unk_token') == token:
    return True
  merged = {m.replace(' ', '') if isinstance(m, str) else ''.join(m) for m in model['merges']}
  return len(token) < 2 or token in merged


def _unknown_of(spec):
  model = spec['model']
  if model.get('unk_id') is not None:
    return model['unk_id']
  return model['vocab'].get(model.get('unk_token')) if isinstance(model['vocab'], dict) else None


def _byte_level(spec):
  decoder = spec.get('decoder') or {}
  return any(d.get('type') == 'ByteLevel' for d in decoder.get('decoders', [decoder]))


def _byte_alphabet():
  """{character: byte} of byte-level vocabularies: printable Latin-1 as it is, the rest from 256."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _token_bytes(spec, engine, size):
  """int32 [size]: see Tokenizer.token_bytes_V."""
  model, byte_level = spec['model'], _byte_level(spec)
  out = np.zeros(size, np.int32)
  for token, i in engine.get_vocab(with_added_tokens=False).items():
    if byte_level:  # one character of the alphabet per byte
      out[i] = len(token)
    elif model.get('byte_fallback') and re.fullmatch(r'<0x[0-9A-F]{2}>', token):
      out[i] = 1
    else:
      token = token.removeprefix(model.get('continuing_subword_prefix') or '')
      suffix = model.get('end_of_word_suffix')
      out[i] = _text_bytes(token.removesuffix(suffix) + ' ' if suffix and token.endswith(suffix)
                           else token)
  for token in spec.get('added_tokens', ()):
    out[token['id']] = 0 if token['special'] else len(token['content'].encode())
  if (unknown := _unknown_of(spec)) is not None:
    out[unknown] = 0
  return out


def _spellings(spec, engine):
  """{id: see Tokenizer.spelling} of the ids that are text."""
  model, decoder = spec['model'], spec.get('decoder') or {}
  byte_level = any(d.get('type') == 'ByteLevel' for d in decoder.get('decoders', [decoder]))
  inside, suffix = model.get('continuing_subword_prefix'), model.get('end_of_word_suffix')
  out = {}
  for token, i in engine.get_vocab(with_added_tokens=False).items():
    if byte_level:
      out[i] = bytes(_BYTES.get(c, 0x20) for c in token)
    elif model.get('byte_fallback') and re.fullmatch(r'<0x[0-9A-F]{2}>', token):
      out[i] = bytes([int(token[3:5], 16)])
    else:
      if model['type'] == 'WordPiece':
        token = token.removeprefix(inside) if inside and token.startswith(inside) else ' ' + token
      if suffix and token.endswith(suffix):
        token = token.removesuffix(suffix) + ' '
      out[i] = token.replace('\u2581', ' ').encode()
  for token in spec.get('added_tokens', ()):
    out[token['id']] = b'' if token['special'] else token['content'].encode()
  return out


# GPT-2's alphabet: the character that stands for each byte, the other way round.
_SHOWN = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
_BYTES = {chr(b): b for b in _SHOWN} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _SHOWN)}


def _text_bytes(piece):
  """UTF-8 bytes of a piece; its sign for a blank is one byte."""
  return len(piece.replace('\u2581', ' ').encode())
