"""Runs notebooks and writes them back with what came out, without times and machine names.

  python colabs/execute.py [NOTEBOOK.ipynb …]

All of this folder by default, on the run that DEMIX_WORKDIR names (runs/quickstart if it is not
set). Needs requirements-notebook.txt.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
  """The notebook with new outputs. Raises nbclient's CellExecutionError if a cell fails."""
  notebook = nbformat.read(path, 4)
  NotebookClient(notebook, timeout=600, kernel_name='python3', record_timing=False,
                 coalesce_streams=True,
                 resources={'metadata': {'path': str(path.parent)}}).execute()
  notebook.metadata = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3',
                                      'language': 'python'},
                       'language_info': {'name': 'python'}}
  return notebook


if __name__ == '__main__':
  for name in sys.argv[1:] or sorted(FOLDER.glob('*.ipynb')):
    nbformat.write(execute(Path(name).resolve()), name)
