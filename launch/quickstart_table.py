"""The quick start in one table: python launch/quickstart_table.py W [cost], W the folder of a run.

Perplexity of test text, lower is better, from W/results.json: dense; the experts of the DEMix LM
and of the forest given by the domain's name, and mixed by the text itself (cached prior, one-token
evidence: what the DEMix paper's released code computes); the average of the forest's experts.
A star marks what is better than dense. With cost: tokens, parameters and time of each arm instead.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without installing

from demix.eval.results import layout

COLUMNS = (('dense', 'dense', None, None), ('DEMix given', 'demix', None, None),
           ('mixed', 'demix', 'cached', 'last_token'), ('forest given', 'forest', None, None),
           ('mixed', 'forest', 'cached', 'last_token'), ('averaged', 'average', None, None))


def table(results: dict) -> str:
  """The table of a results.json, and what it took."""
  nll = {(r['run'], r['prior'], r['posterior'], r['domain']): r['nll'] for r in results['rows']}
  domains = list(dict.fromkeys(r['domain'] for r in results['rows']))
  trained = [d for d in domains if d not in results['heldout']]
  cells = {i: {d: nll[*way, d] for d in domains} for i, (_, *way) in enumerate(COLUMNS)}
  mean = {i: sum(of[d] for d in trained) / len(trained) for i, of in cells.items()}
  over = lambda i, value, dense: f'{math.exp(value - dense):.3f} ' if i else '1 '
  star = lambda value, dense: f'{math.exp(value):.2f}' + ('*' if value < dense else ' ')
  lines = [['perplexity', *(f'{name} ' for name, *_ in COLUMNS)]]
  lines += [[d, *(star(of[d], cells[0][d]) for of in cells.values())] for d in trained]
  lines += [['geometric mean', *(star(m, mean[0]) for m in mean.values())],
            ['  over dense', *(over(i, m, mean[0]) for i, m in mean.items())],
            ['  domains won', '- ', *(
                f'{sum(cells[i][d] < cells[0][d] for d in trained)} of {len(trained)} '
                for i in cells if i)]]
  for d in results['heldout']:
    lines += [[f'{d} (new)', *(star(of[d], cells[0][d]) for of in cells.values())],
              ['  over dense', *(over(i, of[d], cells[0][d]) for i, of in cells.items())]]
  return layout(lines)


def reading(results: dict) -> str:
  """What the table says, in two sentences."""
  nll = {(r['run'], r['prior'], r['posterior'], r['domain']): r['nll'] for r in results['rows']}
  domains = list(dict.fromkeys(r['domain'] for r in results['rows']))
  trained = [d for d in domains if d not in results['heldout']]

  def gap(column, over):
    way = next(w for name, *w in COLUMNS if (name, w[0]) == column)
    value = sum(nll[*way, d] - nll['dense', None, None, d] for d in over) / len(over)
    return f'{abs(math.expm1(value)):.1%} {"below" if value < 0 else "above"}'.replace('%', ' %')

  demix, forest, averaged = ('mixed', 'demix'), ('mixed', 'forest'), ('averaged', 'average')
  said = (f'Experts mixed by the text itself are {gap(demix, trained)} dense (DEMix) and '
          f'{gap(forest, trained)} it (forest);\ntheir average as one LM is '
          f'{gap(averaged, trained)}.')
  if results['heldout']:
    said += (f' On {", ".join(results["heldout"])}, which nobody trained on: '
             f'{gap(demix, results["heldout"])}, {gap(forest, results["heldout"])}.')
  return said


def cost(results: dict) -> str:
  """Tokens, parameters and training time of the arms."""
  lines = [['', 'train tokens', 'parameters', 'active', 'tokens per active', 'training']]
  for name, run in results['runs'].items():
    if name == 'average':
      continue
    tokens, active = run['train_tokens'], run['params_active']
    lines.append([name, f'{tokens / 1e6:.2f}M', f'{run["params_total"] / 1e6:.3f}M',
                  f'{active / 1e6:.3f}M', f'{tokens / active:.0f}', f'{run["seconds"]:.0f}s'])
  return layout(lines)


def main(folder, what='table'):
  results = json.loads(Path(folder, 'results.json').read_text())
  print(cost(results) if what == 'cost' else f'{table(results)}\n\n{reading(results)}')


if __name__ == '__main__':
  main(*sys.argv[1:])
