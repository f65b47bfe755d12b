"""What is known of the experts of a DEMix LM: their parameters, where they come from, what went."""

from demix.lifecycle.workdirs import leaves_of, open_demix
from demix.runtime.progress import quantity


def experts(model: str) -> list[str]:
  """Lines for people: a table of the experts of the DEMix LM that a reference names."""
  saved = open_demix(model)
  shapes = {n.removeprefix('params/'): leaf['shape'] for n, leaf in saved.meta['leaves'].items()
            if n.startswith('params/')}
  history = saved.meta.get('lifecycle', [])
  added = {r['expert']: r for r in history if r['operation'] == 'add'}
  rows = [('expert', 'parameters', 'lineage')]
  for expert in saved.experts:
    count = _size(shapes[n] for n in leaves_of(shapes, expert).values())
    record = added.get(expert)
    rows.append((expert, quantity(count), _lineage(record) if record else 'trained with the trunk'))
  trunk = _size(shape for n, shape in shapes.items() if '/experts/' not in n)
  rows.append(('(trunk)', quantity(trunk), f'{saved.workdir}, step {saved.step}'))
  width = max(len(row[0]) for row in rows)
  lines = [f'{a:<{width}}  {b:>10}  {c}' for a, b, c in rows]
  for record in history:
    if record['operation'] == 'remove':
      lines.append(f'removed {record["expert"]}: {len(record["tainted"])} places still hold it or '
                   f'its data; {record["residue"]}')
  return lines


def _size(shapes) -> int:
  total = 0
  for shape in shapes:
    size = 1
    for n in shape:
      size *= n
    total += size
  return total


def _lineage(record) -> str:
  gate = record['gate']
  if not gate:
    earned = 'FLAGGED: not compared with its parent'
  elif gate['passed']:
    earned = f'gain {gate["gain"]:.4f} nats'
  else:
    earned = f'FLAGGED: no gain over its parent ({gate["gain"]:.4f} nats)'
  return (f'added: from {record["parent"]}, on {record["domain"]}, '
          f'{quantity(record["ledger"]["tokens"])} tokens, {record["from"]["workdir"]} '
          f'step {record["from"]["step"]}; {earned}')
