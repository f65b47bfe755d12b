"""Plain text: a file is a document."""

from demix.data.sources.files import FilePart
from demix.data.sources.part import Document, utf8


class PlainText(FilePart):
  """A text file, one document; its one record is its content."""

  def records(self, limit, on_bytes):
    if self.path.stat().st_size > limit:
      on_bytes(self.size)
      yield str(self.path), None
      return
    data = self.path.read_bytes()
    on_bytes(len(data))
    yield str(self.path), data

  def document(self, data):
    return Document(utf8(data).removeprefix('\ufeff'))
