"""ArrayRecord, the file format of Grain and TFDS: a record is a JSON object, or text itself."""

from demix.data.sources.files import FilePart
from demix.data.sources.jsonl import parse
from demix.data.sources.part import FIELDS, Document, Fields, Meter, reason, utf8
from demix.errors import BadInput

_RECORDS = 64  # read at once


class ArrayRecord(FilePart):
  """An ArrayRecord file; where `fields.text` is '' a record is UTF-8 text, else a JSON object."""

  def __init__(self, path, key='', fields: Fields = FIELDS):
    super().__init__(path, key)
    self.fields = fields

  def records(self, limit, on_bytes):
    number = 0
    try:
      reader = reader_of(self.path)
      total = reader.num_records()
      meter = Meter(self.size, total, on_bytes)
      for start in range(0, total, _RECORDS):
        for record in reader.read(start, min(total, start + _RECORDS)):
          number += 1
          yield f'{self.path}:{number}', record
        meter(number)
      reader.close()
    except (RuntimeError, ValueError, OSError, IndexError) as e:
      raise BadInput(f'{self.path}:{number + 1}: damaged ({reason(e)}): copy it again') from None
    if not number:
      raise BadInput(f'{self.path}: no record in it: remove it')

  def document(self, record):
    return self.fields.document(parse(record)) if self.fields.text else Document(utf8(record))


def reader_of(path):
  """The library's reader of a file. BadInput: it is none, or was cut off; the library would give
  no record of it, or empty ones."""
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(str(path))
  if not reader.ok():
    raise BadInput(f'{path}: not an ArrayRecord, or damaged (it has no index at its end, as if it '
                   'were cut off): copy it again')
  return reader
