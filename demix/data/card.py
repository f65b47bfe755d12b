"""The data card as text that people read."""

from demix.progress import quantity

_HEAD = ('domain', 'split', 'documents', 'bytes', 'tokens', 'tokens/byte', 'skipped')


def text(card: dict) -> str:
  """A table of domains and splits, then what splits have in common."""
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
  lines += [f'  {p["a"]} and {p["b"]}: {p["documents"]:,}' for p in pairs]
  return '\n'.join(line.rstrip() for line in lines)
