"""The data card: what splits and domains have in common, and all of it as text that people read."""

from demix.data.overlap.leakage import FLAG, leakage
from demix.data.overlap.vocabulary import vocabulary
from demix.runtime.progress import quantity

_LINES = 12  # pairs, or domains of a matrix, that are shown
_HEAD = ('domain', 'split', 'documents', 'bytes', 'tokens', 'tokens/byte', 'skipped')


def compare(opened, card: dict) -> bool:
  """Adds to the card of a token store what its splits and domains have in common; False where it is
  there already."""
  if 'leakage' in card:
    return False
  card |= {'leakage': leakage(opened), 'vocabulary': vocabulary(opened)}
  return True


def text(card: dict) -> str:
  """A table of domains and splits, then what splits and domains have in common."""
  rows = [_HEAD]
  for name, domain in card['domains'].items():
    label = f'{name} (novel)' if domain['role'] == 'novel' else name
    for split, e in domain['splits'].items():
      rows.append((label, split, f'{e["documents"]:,}', quantity(e['bytes']),
                   quantity(e['tokens']), f'{e["tokens_per_byte"]:.4f}', f'{e["skipped"]:,}'))
      label = ''
  widths = [max(len(r[i]) for r in rows) for i in range(len(_HEAD))]
  lines = ['  '.join(c.ljust(w) if i < 2 else c.rjust(w)
                     for i, (c, w) in enumerate(zip(r, widths))).rstrip() for r in rows]
  lines.insert(1, '-' * max(map(len, lines)))
  pairs = card['duplicates']
  lines += ['', 'exact duplicates across splits: ' + ('' if pairs else 'none')]
  pairs = sorted(pairs, key=lambda p: -p['documents'])
  lines += [f'  {p["a"]} and {p["b"]}: {p["documents"]:,}' for p in pairs[:_LINES]]
  lines += [f'  and {len(pairs) - _LINES} pairs more'] if pairs[_LINES:] else []
  for part in (_leakage, _vocabulary, _anonymised):
    lines += part(card)
  return '\n'.join(line.rstrip() for line in lines)


def _leakage(card):
  if 'leakage' not in card or not card['leakage']['evaluation']:
    return []
  found = sorted(card['leakage']['overlap'], key=lambda e: -e['runs'])
  high = [e for e in found if e['runs'] >= FLAG]
  largest = f'none of {FLAG:.1%} or more (largest {found[0]["runs"]:.2%})' if found else 'none'
  lines = ['', f'evaluation text whose runs of {card["leakage"]["words"]} words stand in train '
           f'text: {"" if high else largest}']
  lines += [f'  {e["evaluation"]} in {e["train"]}: {e["runs"]:.1%} of its runs, '
            f'{e["documents"]:.1%} of its documents' for e in high[:_LINES]]
  return lines + ([f'  and {len(high) - _LINES} pairs more'] if high[_LINES:] else [])


def _vocabulary(card):
  overlap = card.get('vocabulary', {}).get('overlap', {})
  if len(overlap) < 2:
    return []
  head = f'vocabulary overlap, % of the {card["vocabulary"]["top"]:,} most frequent words: '
  if len(overlap) > _LINES:
    pairs = sorted(((x, a, b) for a, row in overlap.items() for b, x in row.items() if a < b),
                   reverse=True)
    near, far = ', '.join(f'{a} {b} {x:.0%}' for x, a, b in pairs[:6]), pairs[-1]
    return ['', f'{head}{near} … {far[1]} {far[2]} {far[0]:.0%}']
  names = list(overlap)
  width = [max(3, len(n)) for n in names]
  label = max(map(len, names))
  return ['', head, '  '.join([' ' * label, *(n.rjust(w) for n, w in zip(names, width))])] + [
      '  '.join([a.ljust(label), *(f'{100 * overlap[a][b]:.0f}'.rjust(w)
                                   for b, w in zip(names, width))]) for a in names]


def _anonymised(card):
  total = {}
  for domain in card['domains'].values():
    for entry in domain['splits'].values():
      for kind, count in entry.get('anonymised', {}).items():
        total[kind] = total.get(kind, 0) + count
  return ['', 'anonymised: ' + ', '.join(f'{k} {n:,}' for k, n in total.items())] if total else []
