"""Token files as nanoGPT and others write them: ids one after another, nothing else."""

import numpy as np

from demix.data.sources.files import FilePart
from demix.data.sources.part import Document
from demix.errors import BadInput

DTYPES = ('uint16', 'uint32')
_IDS = 1 << 17  # read at once


class TokenFile(FilePart):
  """A flat file of little-endian ids; a record is what stands before an end-of-document id.

  The ids go into the store as they are. Tokens after the last end-of-document are a document too.

  Args:
    tokenizer: the tokenizer that made the ids.
    dtype: 'uint16' or 'uint32'.
    eod_id: the id that ends a document in the file.
  """

  def __init__(self, path, key, tokenizer, dtype: str, eod_id: int):
    super().__init__(path, key)
    self.tokenizer, self.dtype, self.eod_id = tokenizer, np.dtype(dtype).newbyteorder('<'), eod_id
    top, most = tokenizer.vocab_size - 1, np.iinfo(self.dtype).max
    if tokenizer.eod_id == top and eod_id != top:
      top -= 1  # the file ends documents by another id than the store
    if max(top, eod_id) > most:
      raise BadInput(f'{path}: ids of this tokenizer go up to {top}, documents end with {eod_id}, '
                     f'and {dtype} holds {most} at most: set dtype (uint32) as the file was '
                     'written, and eod_id')
    if self.size % self.dtype.itemsize:
      raise BadInput(f'{path}: {self.size} bytes are no whole number of {dtype} ids: name another '
                     'dtype, or copy it again')

  def records(self, limit, on_bytes):
    """A record is (place of its first id in the file, ids)."""
    most = limit // self.dtype.itemsize
    pending, held, number, start, at, dropping = [], 0, 1, 0, 0, False
    with open(self.path, 'rb') as file:
      while len(ids := np.fromfile(file, self.dtype, _IDS)):
        on_bytes(ids.nbytes)
        begin = 0
        for end in [*np.flatnonzero(ids == self.eod_id), None]:
          piece = ids[begin:end]
          held += len(piece)
          if dropping or held > most:
            if not dropping:
              yield f'{self.path}:{number}', None
            pending, dropping = [], True
          else:
            pending.append(piece)
          if end is None:
            break
          if not dropping:
            yield f'{self.path}:{number}', (start, np.concatenate(pending))
          begin, number, start = end + 1, number + 1, at + int(end) + 1
          pending, held, dropping = [], 0, False
        at += len(ids)
    if held and not dropping:
      yield f'{self.path}:{number}', (start, np.concatenate(pending))

  def document(self, record):
    start, ids = record
    if len(ids) and ids.max() >= self.tokenizer.vocab_size:
      place = int(np.argmax(ids >= self.tokenizer.vocab_size))
      raise ValueError(f'id {ids[place]} (number {start + place} of the file), but the tokenizer '
                       f'has {self.tokenizer.vocab_size}: name the tokenizer and dtype that the '
                       'file was made with')
    if (ids == self.tokenizer.eod_id).any():
      raise ValueError(f"the tokenizer's end-of-document id {self.tokenizer.eod_id} inside a "
                       f'document, which eod_id={self.eod_id} ends: set eod_id')
    return Document(self.tokenizer.decode(ids), ids=(ids.astype(np.int64),))
