"""A corpus into a tokenizer and a token store.

The store grows in a hidden folder beside its place and takes it when it is whole, so at any moment
the place holds a finished store or none. Nothing is done where the inputs, the settings and the
tokenizer are those of the store that is there.
"""

import contextlib
import dataclasses
import heapq
import shutil
from pathlib import Path

import numpy as np
import orjson
import xxhash

from demix import settings
from demix.data.corpus import anonymise, documents
from demix.data.corpus.building import Building, scratch_of, synced
from demix.data.corpus.card import compare
from demix.data.corpus.card import text as card_text
from demix.data.overlap import duplicates
from demix.data.sources import corpus
from demix.data.sources.part import Document
from demix.data.tokens import store, tokenizer
from demix.errors import BadInput
from demix.runtime.progress import Progress, quantity
from demix.runtime.workdir import write_atomic
from demix.settings import option

MAX_SAMPLE = 64 << 20
LOCAL_TEXT = 'local_text'

_BATCH = 1 << 19       # bytes of text that are encoded at once …
_BATCH_TEXTS = 1 << 12  # … and documents
_SAMPLE_DOCUMENT = 1 << 20  # no document gives the tokenizer's sample more than these bytes


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What defines a token store, besides its input."""
  tokenizer: str = option('bpe', 'bytes, bpe (trained here), json (an existing tokenizer.json) or '
                                 'sentencepiece (an existing model)', choices=tokenizer.KINDS)
  tokenizer_path: str = option('', 'file of the tokenizer; json, sentencepiece',
                              needs=('tokenizer', 'json', 'sentencepiece'))
  vocab_size: int = option(8192, 'ids to learn, 256 bytes and end of document included; bpe',
                          low=257, high=1 << 24, needs=('tokenizer', 'bpe'))
  sample_bytes: int = option(32 << 20, 'bytes of train text to learn from, in equal shares per '
                                       'domain, at most 64 MiB; bpe', low=1 << 10, high=MAX_SAMPLE,
                            needs=('tokenizer', 'bpe'))
  corpus: tuple = option((), 'domains of any format or place, one dict each: '
                             "{'name', 'source', 'path', …} (docs/corpora.md); --input is then "
                             'where relative paths start')
  domains: tuple = option((), 'domains and their order; empty: all folders, sorted; all of corpus')
  novel: tuple = option((), 'domains for evaluation and adaptation only (role novel)')
  max_record_bytes: int = option(16 << 20, 'bytes of one record (a line, a .txt file)', low=1,
                                high=1 << 30)
  on_bad_record: str = option('fail', 'fail, or skip: leave unreadable records out and count them',
                             choices=('fail', 'skip'))
  anonymise: tuple = option((), 'what to replace by placeholders: all, or some of '
                                f'{", ".join(anonymise.KINDS)}')
  max_bytes: int = option(0, "bytes of text to take of each domain's train split; 0: all", low=0,
                         high=1 << 62)

  def check(self):
    """Raises BadInput for values that cannot be."""
    settings.check(self, 'config.')
    anonymise.check(self.anonymise)
    if self.tokenizer in ('json', 'sentencepiece') and not self.tokenizer_path:
      raise BadInput(f'config.tokenizer_path: missing, but tokenizer {self.tokenizer!r} is a file: '
                     'name it')


def prepare(input, out, config: PrepareConfig = PrepareConfig(), say=print) -> store.TokenStore:
  """Makes the token store `out` from the corpus in `input`, unless it is there already.

  Args:
    input: a folder (see documents.LAYOUT), or 'local_text': text that lies on this machine, written
      beside the store. With config.corpus: the folder that its relative paths start from, or ''.
    out: folder of the store; a store that is there is replaced if anything it depends on changed.
    config: see PrepareConfig.
    say: told, in whole lines, what was made and what is odd about it.

  Raises:
    BadInput: settings or input that cannot be used, or a place that is not for a store. What was
      in `out` before stays as it was.
    Locked: another process is making the same store.
  """
  out = Path(out).resolve()
  config.check()
  made = _existing_tokenizer(config)
  Building.check_place(out)
  Building.recover(out)
  if str(input) == LOCAL_TEXT:
    input, config = _local_text(out, config)
  domains = _corpus(input, config) if config.corpus else _folders(Path(input), out, config)
  for name in config.novel:
    if name not in domains:
      raise BadInput(f'config.novel: no domain {name!r}{settings.nearest(name, domains)}')
  described = _described(config)
  present = _present(out)
  with contextlib.ExitStack() as stack:
    building = None
    if present is None or present.card.get('config') != described:
      building = stack.enter_context(Building(out))  # says now if nothing can be written there
    sources, inputs = _sources(domains, made, config, str(input))
    if building is None and present.card['inputs'] == inputs:
      if compare(present, present.card):
        with contextlib.suppress(OSError):  # a store that cannot be written stays as it is
          write_atomic(out / store.CARD, orjson.dumps(present.card, option=orjson.OPT_INDENT_2))
      say(f'{out}: nothing to do, it is the store of these inputs and settings '
          f'(fingerprint {present.fingerprint})')
      return present
    building = building or stack.enter_context(Building(out))
    notes = []
    made = made or _train(sources, config, notes.append)
    card = _fill(building.path, sources, made, config, notes.append)
    card |= {'inputs': inputs, 'config': described, 'fingerprint': store.card_fingerprint(card)}
    _unchanged(sources)
    compare(store.TokenStore(building.path, card, made.meta(), made.token_bytes_V), card)
    building.publish(store.CARD, orjson.dumps(card, option=orjson.OPT_INDENT_2))
  say('\n'.join([card_text(card), *notes]))
  say(f'\n{out}: a token store of {made.vocab_size} ids, fingerprint {card["fingerprint"]}')
  return store.TokenStore.open(out)


def _existing_tokenizer(config):
  """The tokenizer that needs no training, or None."""
  if config.tokenizer == 'json':
    return tokenizer.JsonTokenizer.from_file(config.tokenizer_path)
  if config.tokenizer == 'sentencepiece':
    return tokenizer.SentencePieceTokenizer.from_file(config.tokenizer_path)
  return tokenizer.ByteTokenizer() if config.tokenizer == 'bytes' else None


def _local_text(out, config):
  from demix.data.local import local_text
  folder = out.with_name(f'{out.name}_text')
  try:
    roles = local_text.write(folder, config.domains or None)
  except OSError as e:
    raise BadInput(f'--out={out}: cannot write its text to {folder} ({e.strerror}): name a folder '
                   'in a writable place') from None
  # A domain that this machine lacks was named and left out by `write`.
  domains = tuple(d for d in config.domains if d in roles) or tuple(roles)
  novel = tuple(n for n in config.novel if n in roles or n not in config.domains) or \
      tuple(n for n in domains if roles[n]['role'] == 'novel')
  return folder, dataclasses.replace(config, novel=novel, domains=domains)


def _described(config):
  """The settings as a card has them; of a path only the name, so that a card names no machine."""
  described = settings.to_dict(config) | {'tokenizer_path': Path(config.tokenizer_path).name}
  if not config.anonymise:  # as cards were before there was such a thing
    del described['anonymise']
  if not described.pop('corpus'):  # as cards were before there was anything but folders
    return orjson.loads(orjson.dumps(described))
  described['corpus'] = corpus.described(config.corpus)
  return orjson.loads(orjson.dumps(described))


def _present(out):
  """The usable store in `out`, or None."""
  try:
    return store.TokenStore.open(out)
  except BadInput:
    return None


def _folders(input, out, config):
  """{domain: its folder}, one that `out` is apart from."""
  folders = {f.name: f for f in documents.find(input, config.domains)}
  if input.resolve() == out or input.resolve() in out.parents or out in input.resolve().parents:
    raise BadInput(f'--out={out}: one of it and --input={input} lies in the other: keep the store '
                   'beside the corpus')
  return folders


def _corpus(input, config):
  """{domain: its entries}."""
  if input and not Path(input).is_dir():
    raise BadInput(f'--input={input}: no such folder: with config.corpus it is where relative '
                   'paths start')
  return corpus.entries(config.corpus, config.domains)


def _sources(domains, made, config, root=''):
  """([source of each domain], {relative path: digest}); the tokenizer's file is an input too."""
  if config.corpus:
    opened = {n: corpus.open_domain(n, several, root, made) for n, several in domains.items()}
    total = sum(map(corpus.size, opened.values()))
    read = lambda name, progress: corpus.read(name, domains[name], opened[name], progress)
  else:
    total = sum(map(documents.size, domains.values()))
    read = lambda name, progress: documents.source(domains[name], progress)
  with _Bytes(total, 'reading') as progress:
    sources = [read(name, progress) for name in domains]
  inputs = {k: v for s in sources for k, v in s.digests.items()}
  if config.tokenizer_path:  # no domain is called so
    inputs[f'tokenizer/{Path(config.tokenizer_path).name}'] = made.fingerprint
  return sources, inputs


class _Bytes(Progress):
  """Progress over bytes, told how many more were read."""

  def __init__(self, total, label):
    super().__init__(total, 'B', label)
    self.read = 0

  def __call__(self, count):
    self.read += count
    self.update(self.read)


def _train(sources, config, say):
  """Trains byte-level BPE on a sample of the train splits of the domains that models train on."""
  sources = [s for s in sources if s.name not in config.novel]
  if not sources:
    raise BadInput('config.novel: all domains are novel, so tokenizer bpe has no text to learn '
                   'from: leave one out, or use tokenizer bytes')
  share, sample = config.sample_bytes // len(sources), []
  with _Bytes(sum(s.sizes['train'] for s in sources), 'sampling for the tokenizer') as progress:
    for source in sources:
      sample += _sample(source, share, config, progress)
  total = sum(map(len, sample))
  with Progress(0, 'B', 'training the tokenizer') as progress:
    progress.update(total)
    texts = (sample.pop().decode('utf-8', 'ignore') for _ in range(len(sample)))
    made = tokenizer.BpeTokenizer.train(texts, config.vocab_size)
  say(f'tokenizer: byte-level BPE, {made.vocab_size} ids learnt from {quantity(total)}B of '
      f'{len(sources)} domains')
  if made.vocab_size < config.vocab_size:
    say(f'warning: config.vocab_size={config.vocab_size}, but so little text gave only '
        f'{made.vocab_size} ids')
  return made


def _sample(source, share, config, progress):
  """The UTF-8 of the documents of lowest hash that have `share` bytes together: the same whatever
  their order."""
  heap, total, bound = [], 0, 1 << 64
  cut = min(share, _SAMPLE_DOCUMENT)
  reader = _reader(config, progress)
  for _, data in _anonymised(reader.documents(source.splits['train']), config.anonymise, {}):
    key = xxhash.xxh3_64_intdigest(data)
    if key >= bound:
      continue
    data = data[:cut]
    heapq.heappush(heap, (-key, data))
    total += len(data)
    while total > share:
      key, data = heapq.heappop(heap)
      bound, total = -key, total - len(data)
  return [data for _, data in heap]


def _reader(config, progress):
  return documents.Reader(config.max_record_bytes, config.on_bad_record == 'skip', progress)


def _anonymised(read, kinds, counts):
  """Documents as they are without `kinds`; else with placeholders, counted in `counts`."""
  for document, data in read:
    if kinds:
      if document.ids:
        raise BadInput(f'config.anonymise={",".join(kinds)} with a source of tokens: it is done '
                       'before tokens are made; leave one of them out')
      prompt, *rest = (anonymise.replace(t, kinds, counts) for t in _spoken(document))
      document = Document(prompt + ''.join(rest), prompt if rest else '')
      data = document.text.encode()
    yield document, data


def _fill(folder, sources, made, config, say):
  """Writes tokens, documents and the tokenizer into `folder`; returns what the card says of it."""
  made.save(folder / 'tokenizer')
  domains, hashes, lacking = {}, {}, {}
  scratch = scratch_of(folder)
  with _Bytes(sum(sum(s.sizes.values()) for s in sources), 'tokenizing') as progress:
    for source in sources:
      entries = {}
      for split, files in source.splits.items():
        name = f'{source.name}/{split}'
        hashes[name] = scratch / f'{len(hashes)}'
        limit, before = config.max_bytes if split == 'train' else 0, progress.read
        entries[split] = _Split(folder / name, hashes[name], made, config.anonymise).write(
            name, files, _reader(config, progress), limit, say)
        # With max_bytes the rest of a split is not read.
        progress.resize(progress.total + progress.read - before - source.sizes[split])
      domains[source.name] = {'role': 'novel' if source.name in config.novel else 'train',
                              **{k: v for k in ('group', 'licence') if (v := getattr(source, k))},
                              'splits': entries}
      if missing := [s for s in documents.SPLITS if s not in entries]:
        lacking.setdefault(' and no '.join(missing), []).append(source.name)
      if source.unused:
        say(f'warning: {source.name}: not used: {", ".join(source.unused[:6])}'
            f'{" …" if source.unused[6:] else ""}')
  for splits, names in lacking.items():
    say(f'warning: {", ".join(names)} {"have" if names[1:] else "has"} no {splits} split')
  shared = duplicates.shared(hashes)
  shutil.rmtree(scratch)
  return {'version': store.VERSION, 'tokenizer': made.meta(), 'domains': domains,
          'duplicates': shared}


class _Split:
  """Writes tokens.bin, documents.npy and, where documents have prompts, prompts.npy of one split;
  and the digests of its documents."""

  def __init__(self, folder, hashes, made, anonymise=()):
    folder.mkdir(parents=True)
    self._kinds = anonymise
    self._folder, self._hashes, self._tokenizer = folder, hashes, made
    self._dtype = store.token_dtype(made.vocab_size)
    self._tokens = self._documents = self._bytes = self._spelt = self._unknown = 0
    self._prompted = 0

  def write(self, name, parts, reader, limit, say) -> dict:
    """Writes the documents of `parts` until `limit` bytes of text (0: all); returns the card's
    entry."""
    digests, counts = (xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128()), {}
    with open(self._folder / 'tokens.bin', 'wb') as tokens, \
        open(self._folder / 'documents.npy', 'wb') as table, \
        open(self._folder / 'prompts.npy', 'wb') as prompts, open(self._hashes, 'wb') as hashes:
      shapes = {table: ('<i8', (2,)), prompts: ('<i4', ())}
      for file, about in shapes.items():
        _header(file, 0, *about)
      starts = {file: file.tell() for file in shapes}
      found = _anonymised(reader.documents(parts), self._kinds, counts)
      for batch, data in _batches(found, limit):
        arrays = self._encode(batch, [len(d) for d in data])
        for file, array, digest in zip((tokens, table, prompts), arrays, digests):
          file.write(array)
          digest.update(array)
        hashes.write(b''.join(map(xxhash.xxh3_128_digest, data)))
      for file, about in shapes.items():
        file.seek(0)
        _header(file, self._documents, *about)  # numpy leaves room for the count to grow
        assert file.tell() == starts[file]
      synced(tokens), synced(table), synced(prompts)
    if not self._prompted:
      (self._folder / 'prompts.npy').unlink()
    if not self._documents:
      raise BadInput(f'{parts[0]}: no document with text in {name} ({reader.empty} empty, '
                     f'{reader.bad} unreadable): add some, or remove the split')
    self._remark(name, reader, say)
    entry = {'documents': self._documents, 'bytes': self._bytes, 'tokens': self._tokens,
             'tokens_per_byte': self._tokens / self._bytes, 'skipped': reader.bad + reader.empty,
             'tokens_digest': digests[0].hexdigest(), 'documents_digest': digests[1].hexdigest()}
    if self._kinds:
      entry['anonymised'] = counts
    if self._prompted:
      entry |= {'prompt_tokens': self._prompted, 'prompts_digest': digests[2].hexdigest()}
    return entry

  def _encode(self, batch, sizes):
    """(ids, rows of documents.npy, of prompts.npy) of documents."""
    made, parts, ends, prompts = self._tokenizer, [], [], []
    texts = [t for d in batch if not d.ids for t in _spoken(d)]
    encoded = iter(made.encode(texts))
    end = self._tokens
    for document in batch:
      ids = document.ids or [next(encoded) for _ in _spoken(document)]
      prompts.append(len(ids[0]) if len(ids) > 1 else 0)
      parts += [*ids, [made.eod_id]]
      end += sum(map(len, ids)) + 1
      ends.append(end)
    ids = np.concatenate(parts)
    if np.count_nonzero(ids == made.eod_id) != len(batch):
      raise BadInput(f'the tokenizer gives its end-of-document id {made.eod_id} for text: use '
                     'another tokenizer')
    rows = np.stack([ends, sizes], axis=1).astype('<i8')
    self._tokens += len(ids)
    self._documents += len(batch)
    self._bytes += sum(sizes)
    self._prompted += sum(prompts)
    self._spelt += int(made.token_bytes_V[ids].sum())
    if made.unknown_id is not None:
      self._unknown += int(np.count_nonzero(ids == made.unknown_id))
    return ids.astype(self._dtype), rows, np.array(prompts, '<i4')

  def _remark(self, name, reader, say):
    if reader.bad:
      say(f'warning: {name}: {reader.bad} unreadable records left out; first: {reader.first_bad}')
    if reader.empty:
      say(f'warning: {name}: {reader.empty} empty texts left out')
    if self._unknown:
      say(f'warning: {name}: {self._unknown} of {self._tokens} ids are "unknown": the vocabulary '
          'cannot spell that text')
    if abs(self._spelt - self._bytes) > 1e-3 * self._bytes:
      say(f'warning: {name}: its ids stand for {self._spelt} bytes, its text has {self._bytes}: '
          'bits per byte will be approximate')


def _spoken(document: Document):
  """The texts that a document is encoded in: its prompt by itself, so that the border is one of
  tokens and the prompt has the ids that it has when it stands alone."""
  prompt = document.prompt
  return (prompt, document.text[len(prompt):]) if prompt else (document.text,)


def _header(file, rows, descr, shape):
  np.lib.format.write_array_header_1_0(
      file, {'descr': descr, 'fortran_order': False, 'shape': (rows, *shape)})


def _batches(documents, limit):
  """Yields ([document], [its UTF-8]) of about _BATCH bytes, until `limit` bytes (0: no limit)."""
  batch, held, total = ([], []), 0, 0
  for document, data in documents:
    batch[0].append(document)
    batch[1].append(data)
    held, total = held + len(data), total + len(data)
    if held >= _BATCH or len(batch[0]) >= _BATCH_TEXTS:
      yield batch
      batch, held = ([], []), 0
    if limit and total >= limit:
      break
  if batch[0]:
    yield batch


def _unchanged(sources):
  for source in sources:
    for path, stamp in source.stamps.items():
      if documents.stamp(path) != stamp:
        raise BadInput(f'{path}: it changed while it was read: run prepare again')
