"""Parquet: one row a document; only the columns of the text are read."""

from demix.data.sources.files import FilePart
from demix.data.sources.part import FIELDS, Fields, Meter, reason
from demix.errors import BadInput
from demix.settings import nearest

_ROWS = 256        # rows decoded at once
_BUFFER = 1 << 20  # bytes of a column read at once; else a whole row group is


class Parquet(FilePart):
  """A Parquet file; a record is a row."""

  def __init__(self, path, key='', fields: Fields = FIELDS):
    super().__init__(path, key)
    self.fields = fields

  def records(self, limit, on_bytes):
    import pyarrow
    from pyarrow import parquet
    number = 0
    try:
      with parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False) as file:
        columns, names = file.schema_arrow.names, self.fields.wanted(file.schema_arrow.names)
        if not names:
          raise BadInput(f'{self.path}: no column {self.fields.text!r}'
                         f'{nearest(self.fields.text, columns)}')
        meter = Meter(self.size, file.metadata.num_rows, on_bytes)
        for batch in file.iter_batches(_ROWS, columns=names, use_threads=False):
          for record in batch.to_pylist():
            number += 1
            yield f'{self.path}:{number}', record
          meter(number)
    except (pyarrow.ArrowException, OSError) as e:
      raise BadInput(f'{self.path}:{number + 1}: not Parquet, or damaged ({reason(e)}): copy it '
                     'again') from None
    if not number:
      raise BadInput(f'{self.path}: no row in it: remove it')

  def document(self, record):
    return self.fields.document(record)
