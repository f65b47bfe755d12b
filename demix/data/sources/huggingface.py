"""Hugging Face `datasets`: a folder that save_to_disk wrote, or the id of a data set.

Its Arrow files are read as a stream, not through the library's memory map, whose pages would count
as this process's memory until all of the corpus is in it.
"""

import os

from demix.data.sources.files import FilesPart
from demix.data.sources.part import Fields, Meter, missing, reason
from demix.errors import BadInput
from demix.settings import nearest

REQUIREMENTS = 'requirements-hf.txt'
_ROWS = 256  # decoded at once


class HuggingFace(FilesPart):
  """One split of a data set; a record is a row.

  Args:
    name: what errors and the card call it.
    dataset: a datasets.Dataset whose rows lie in Arrow files.
  """

  def __init__(self, name, dataset, fields: Fields):
    paths = [f['filename'] for f in dataset.cache_files]
    super().__init__(name, paths)
    self.dataset, self.fields, self.paths = dataset, fields, paths
    self.columns = fields.wanted(dataset.column_names)
    if not self.columns:
      raise BadInput(f'{name}: no column {fields.text!r}'
                     f'{nearest(fields.text, dataset.column_names)}')

  def digest(self, on_bytes):
    return super().digest(on_bytes) if self.paths else self.dataset._fingerprint

  def records(self, limit, on_bytes):
    import pyarrow
    meter, number = Meter(self.size, len(self.dataset), on_bytes), 0
    try:
      for batch in self._batches(pyarrow):
        for record in batch.to_pylist():
          number += 1
          yield f'{self}:{number}', record
        meter(number)
    except (pyarrow.ArrowException, OSError) as e:
      raise BadInput(f'{self}:{number + 1}: its Arrow files are damaged ({reason(e)}): save it '
                     'again') from None
    if not number:
      raise BadInput(f'{self}: no row in it: leave it out')

  def document(self, record):
    return self.fields.document(record)

  def _batches(self, pyarrow):
    """Record batches of at most _ROWS rows; as they lie in the files where those hold the split
    and nothing else, through the library where it is a selection of their rows."""
    if self.paths and self._whole(pyarrow):
      for path in self.paths:
        with pyarrow.OSFile(path) as file, pyarrow.ipc.open_stream(file) as stream:
          for batch in stream:
            batch = batch.select(self.columns)
            for start in range(0, batch.num_rows, _ROWS):
              yield batch.slice(start, _ROWS)
      return
    rows = self.dataset.select_columns(self.columns).with_format('arrow')
    for table in rows.iter(_ROWS):
      yield from table.to_batches()

  def _whole(self, pyarrow):
    if self.dataset._indices is not None:
      return False
    rows = 0
    for path in self.paths:
      with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
        if not set(self.columns) <= set(stream.schema.names):
          return False
        rows += sum(batch.num_rows for batch in stream)
    return rows == len(self.dataset)


def load(reference: str, subset: str) -> dict:
  """{split: datasets.Dataset} of a folder or an id.

  Raises:
    BadInput: `datasets` is not installed, or there is no such data set (or no network).
  """
  try:
    import datasets
  except ModuleNotFoundError:
    raise missing('datasets', 'source huggingface', REQUIREMENTS) from None
  datasets.disable_progress_bars()
  try:
    found = datasets.load_from_disk(reference) if os.path.isdir(reference) else \
        datasets.load_dataset(reference, subset or None)
  except (OSError, ValueError, RuntimeError) as e:
    raise BadInput(f'{reference}: not a folder of save_to_disk, and no data set with this id can '
                   f'be had ({reason(e)})') from None
  return dict(found) if isinstance(found, dict) else {'train': found}
