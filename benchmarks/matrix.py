"""Domains × experts as a picture: what each expert makes of each domain's text.

  python -m demix evaluate --model=dense=W/dense --data=W/corpus --out=W/matrix.json \\
    $(for e in A B; do echo --model=$e=W/demix#$e; done)
  python benchmarks/matrix.py W/matrix.json W/matrix.png

A cell is the perplexity over that of the first model of the file (the dense LM) on the same domain:
below 1 the expert is better than it. Needs matplotlib (requirements-notebook.txt).
"""

import argparse
import json

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt


def ratios(content: dict):
  """results.json → (domains, models, perplexity over the first model's [domains, models]).

  Domains that no model was trained on stand last.
  """
  rows = {(r['domain'], r['run']): r['perplexity'] for r in content['rows']}
  models = list(content['runs'])
  domains = list(dict.fromkeys(r['domain'] for r in content['rows']))
  domains.sort(key=lambda d: d in content['heldout'])
  values = np.array([[rows[d, m] for m in models] for d in domains], float)
  return domains, models[1:], values[:, 1:] / values[:, :1]


def draw(content: dict, file: str):
  """Writes the picture."""
  domains, models, cells = ratios(content)
  base = next(iter(content['runs']))
  new = [f'{d} (new)' if d in content['heldout'] else d for d in domains]
  fig, ax = plt.subplots(figsize=(1.3 * len(models) + 2.2, 0.6 * len(domains) + 1.4))
  limit = np.log(3)  # of the colours; what is worse than three times is no redder
  ax.imshow(np.log(cells), cmap='RdBu_r', vmin=-limit, vmax=limit, aspect='auto')
  for i, j in np.ndindex(cells.shape):
    strong = abs(np.log(cells[i, j])) > 0.6 * limit
    ax.text(j, i, f'{cells[i, j]:.2f}', ha='center', va='center',
            color='white' if strong and cells[i, j] > 1 else 'black',
            fontweight='bold' if cells[i, j] < 1 else None)
  ax.set_xticks(range(len(models)), models)
  ax.set_yticks(range(len(domains)), new)
  ax.set_xlabel('expert')
  ax.set_ylabel('text')
  ax.set_title(f'perplexity over that of the {base} LM (bold: better)', fontsize=11)
  ax.tick_params(length=0)
  fig.tight_layout()
  fig.savefig(file, dpi=110)
  plt.close(fig)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('results')
  parser.add_argument('picture')
  given = parser.parse_args()
  with open(given.results) as f:
    draw(json.load(f), given.picture)
