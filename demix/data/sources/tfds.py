"""TensorFlow Datasets in ArrayRecord files, read without TensorFlow."""

import os
from pathlib import Path

from demix.data.sources.array_record import reader_of
from demix.data.sources.files import FilesPart
from demix.data.sources.part import Fields, Meter, reason
from demix.errors import BadInput

_ROWS = 64  # decoded at once


class Tfds(FilesPart):
  """One split, or a slice of one ('train[:90%]'); a record is an example.

  Args:
    name: what errors and the card call it.
    builder: a DatasetBuilder whose data are there.
    split: as TFDS writes it.
  """

  def __init__(self, name, builder, split: str, fields: Fields):
    about, folder = builder.info.splits[split], Path(str(builder.data_path))
    super().__init__(name, [*map(str, about.filepaths), folder / 'features.json'])
    self.builder, self.split, self.fields = builder, split, fields
    self.rows, self._shards = about.num_examples, list(map(str, about.filepaths))

  def records(self, limit, on_bytes):
    meter, number = Meter(self.size, self.rows, on_bytes), 0
    try:
      source = self.builder.as_data_source(split=self.split)
      for path in self._shards:  # the library reads a file that was cut off as empty examples
        reader_of(path).close()
      for start in range(0, len(source), _ROWS):
        for record in source.__getitems__(range(start, min(len(source), start + _ROWS))):
          number += 1
          yield f'{self}:{number}', record
        meter(number)
    except (RuntimeError, ValueError, OSError, IndexError, NotImplementedError) as e:
      raise BadInput(f'{self}:{number + 1}: cannot be read without TensorFlow, or is damaged '
                     f'({reason(e)}): make it anew with '
                     "file_format='array_record'") from None
    if not number:
      raise BadInput(f'{self}: no example in it: leave it out')

  def document(self, record):
    return self.fields.document(record)


def load(reference: str, data_dir: str = ''):
  """The DatasetBuilder of a folder (…/name/config/1.0.0) or a name, which is downloaded and
  prepared where it is not yet. BadInput: there is none."""
  import tensorflow_datasets
  try:
    if os.path.isdir(reference):
      return tensorflow_datasets.builder_from_directory(reference)
    builder = tensorflow_datasets.builder(reference, data_dir=data_dir or None,
                                          file_format='array_record')
    builder.download_and_prepare()
    return builder
  except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as e:
    raise BadInput(f'{reference}: not a folder of TFDS (with dataset_info.json), and no data set '
                   f'of this name can be had ({reason(e)[:80]})') from None
