"""ArrayRecord, the file format of Grain and TFDS: a record is a JSON object, or text itself."""

from demix.data.sources.files import FilePart
from demix.data.sources.jsonl import parse
from demix.data.sources.part import FIELDS, Document, Fields, Meter, utf8
from demix.errors import BadInput

_RECORDS = 64  # read at once


class ArrayRecord(FilePart):
  """An ArrayRecord file; where `fields.text` is '' a record is UTF-8 text, else a JSON object."""

  def __init__(self, path, key='', fields: Fields = FIELDS):
    super().__init__(path, key)
    self.fields = fields

  def records(self, limit, on_bytes):
    from array_record.python.array_record_module import ArrayRecordReader
    number = 0
    try:
      reader = ArrayRecordReader(str(self.path))
      total = reader.num_records()
      meter = Meter(self.size, total, on_bytes)
      for start in range(0, total, _RECORDS):
        for record in reader.read(start, min(total, start + _RECORDS)):
          number += 1
          yield f'{self.path}:{number}', record
        meter(number)
      reader.close()
    except (RuntimeError, ValueError, OSError, IndexError) as e:
      raise BadInput(f'{self.path}:{number + 1}: not an ArrayRecord, or damaged '
                     f'({str(e).splitlines()[0]}): copy it again') from None
    if not number:
      raise BadInput(f'{self.path}: no record in it: remove it')

  def document(self, record):
    return self.fields.document(parse(record)) if self.fields.text else Document(utf8(record))
