"""SeqIO: a registered task or mixture, run offline. Needs TensorFlow, so it is an extra.

A feature of ids whose vocabulary is the store's tokenizer goes into the store as it is. Ids of any
other vocabulary are turned into text by it, and the store's tokenizer is asked.
"""

import importlib

import numpy as np
import xxhash

from demix.data.sources.part import Document, Fields, Part, missing, reason
from demix.errors import BadInput
from demix.settings import nearest

REQUIREMENTS = 'requirements-seqio.txt'
_SEED = 0  # of the draws of a mixture


class Seqio(Part):
  """One split of a task or mixture; a record is an example after the preprocessors.

  The content is known by running it, so it is run once to be digested and again to be written; a
  task that gives other examples the second time is refused.
  """

  def __init__(self, name, provider, split: str, fields: Fields, lengths: dict, tokenizer):
    self.key, self.provider, self.split, self.fields = name, provider, split, fields
    self.lengths, self.tokenizer, self._digest = lengths, tokenizer, None

  def __str__(self):
    return self.key

  def digest(self, on_bytes):
    whole = xxhash.xxh3_128()
    for record in self._examples():
      _update(whole, record)
    self._digest = whole.hexdigest()
    return self._digest

  def records(self, limit, on_bytes):
    whole, number = xxhash.xxh3_128(), 0
    for record in self._examples():
      number += 1
      _update(whole, record)
      yield f'{self}:{number}', record
    if not number:
      raise BadInput(f'{self}: no example in it: leave it out')
    if self._digest not in (None, whole.hexdigest()):
      raise BadInput(f'{self}: it gave other examples when it was run again: a task must not draw '
                     'at random to be prepared')

  def _examples(self):
    options = {'shuffle': False, 'num_epochs': 1, 'seed': _SEED}
    try:
      yield from self.provider.get_dataset(sequence_length=self.lengths or None, split=self.split,
                                           **options).as_numpy_iterator()
    except Exception as e:  # whatever a user's preprocessors and TensorFlow raise
      raise BadInput(f'{self}: it cannot be run ({type(e).__name__}: '
                     f'{reason(e)})') from e

  def document(self, record):
    if self.fields.text not in record:
      raise ValueError(f'no feature {self.fields.text!r}{nearest(self.fields.text, record)}')
    parts = [self._part(n, record[n]) for n in (self.fields.prompt, self.fields.text)
             if n in record]
    text = ''.join(text for text, _ in parts)
    prompt = parts[0][0] if len(parts) > 1 else ''
    if any(ids is None for _, ids in parts):
      return Document(text, prompt)
    return Document(text, prompt, tuple(ids for _, ids in parts))

  def _part(self, name, value):
    """(text, ids or None) of a feature."""
    if isinstance(value, bytes):
      return value.decode(), None
    if not np.issubdtype(np.asarray(value).dtype, np.integer) or np.ndim(value) != 1:
      raise ValueError(f'feature {name!r} is neither text nor a row of ids')
    vocabulary = self.provider.output_features[name].vocabulary
    ids = np.asarray(value, np.int64)
    while len(ids) and ids[-1] in (vocabulary.eos_id, vocabulary.pad_id):
      ids = ids[:-1]
    if not self._same(vocabulary):
      return vocabulary.decode(ids.tolist()), None
    return self.tokenizer.decode(ids), ids

  def _same(self, vocabulary):
    """Whether ids of the vocabulary are the store's."""
    return self.tokenizer is not None and self.tokenizer.kind == 'sentencepiece' and \
        getattr(vocabulary, 'sp_model', None) == self.tokenizer._model


def load(reference: str, module: str):
  """The registered task or mixture, after importing `module`, which registers it.

  Raises:
    BadInput: seqio is not installed, the module cannot be imported, or nothing has that name.
  """
  try:
    import seqio
    import tensorflow
  except ModuleNotFoundError:
    raise missing('seqio', 'source seqio', REQUIREMENTS) from None
  tensorflow.config.set_visible_devices([], 'GPU')
  try:
    if module:
      importlib.import_module(module)
  except Exception as e:
    raise BadInput(f'module {module!r}, which registers SeqIO tasks, cannot be imported '
                   f'({type(e).__name__}: {reason(e)})') from e
  names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if reference not in names:
    raise BadInput(f'{reference}: no SeqIO task or mixture of this name'
                   f'{nearest(reference, names)}; module=… names the Python module that '
                   'registers it')
  return seqio.get_mixture_or_task(reference)


def _update(digest, record):
  for name in sorted(record):
    value = np.asarray(record[name])
    data = record[name] if isinstance(record[name], bytes) else \
        repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
    digest.update(f'{name} {value.shape} {len(data)} '.encode())
    digest.update(data)
