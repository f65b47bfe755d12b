"""results.json (docs/contracts.md) and the table people read: domains × runs, means, signs."""

import itertools
import math
import platform

import orjson

from demix.errors import BadInput
from demix.runtime.workdir import write_atomic

VERSION = 2  # 1 had no `protocol`, `n` and `notes`; nll, perplexity, bits_per_byte were never null
_WIDTH = 120  # characters of a table


def row(run: str, mix: str, domain: str, split: str, score, prior=None, posterior=None, *,
        protocol='') -> dict:
  """One row of results.json from a perplexity.Score; numbers are null where nothing was scored."""
  return {'run': run, 'mix': mix, 'prior': prior, 'posterior': posterior, 'domain': domain,
          'split': split, 'nll': score.mean_nll, 'perplexity': score.perplexity,
          'bits_per_byte': score.bits_per_byte, 'tokens': score.tokens, 'bytes': score.bytes,
          'n': len(score.each), 'protocol': str(protocol),
          'limit': getattr(protocol, 'limit', 0)}


def results(runs: dict, rows: list, *, seed: int, heldout, mixing: dict | None = None,
            leakage=(), groups: dict | None = None, notes=()) -> dict:
  """The whole of results.json; `mixing` ({run: options, priors, weights}) where runs were mixed,
  `leakage` ([{run, domain, train, runs, documents}]) where evaluation text stands in train text,
  `groups` ({group: leaves}) where domains have parents, `notes` (lines) where a choice hangs on
  little."""
  import flax
  import grain
  import jax
  import optax

  from demix import __version__
  versions = {'python': platform.python_version(), 'demix': __version__, 'jax': jax.__version__,
              'flax': flax.__version__, 'optax': optax.__version__,
              'grain': getattr(grain, '__version__', 'unknown')}
  return {'version': VERSION, 'runs': runs, 'rows': rows, 'seed': seed, 'heldout': list(heldout),
          'versions': versions} | ({'mixing': mixing} if mixing else {}) | (
              {'leakage': list(leakage)} if leakage else {}) | (
              {'notes': list(notes)} if notes else {}) | (
              {'groups': summed} if (summed := group_rows(rows, groups or {})) else {})


def group_rows(rows: list, groups: dict) -> list:
  """A row for each group, run and way of mixing whose leaves were all scored: tokens and bytes add
  up, and so do nats (`nll` is their sum over the tokens)."""
  columns, out = {}, []
  for row in rows:
    columns.setdefault((row['run'], column(row)), {})[row['domain']] = row
  for group, leaves in groups.items():
    for cells in columns.values():
      if not set(leaves) <= cells.keys():
        continue
      found = [cells[leaf] for leaf in leaves]
      tokens, size = (sum(r[k] for r in found) for k in ('tokens', 'bytes'))
      nats = math.fsum(r['nll'] * r['tokens'] for r in found if r['tokens'])
      out.append({k: found[0][k] for k in ('run', 'prior', 'posterior', 'split', 'protocol',
                                           'limit')} | {
          'mix': _joint_mix([r['mix'] for r in found]),
          'domain': group, 'leaves': list(leaves), 'nll': nats / tokens if tokens else None,
          'perplexity': math.exp(min(nats / tokens, 700.0)) if tokens else None,
          'bits_per_byte': nats / math.log(2) / size if size else None, 'tokens': tokens,
          'bytes': size, 'n': sum(r['n'] for r in found)})
  return out


def _joint_mix(mixes):
  """'expert:given' where each leaf has its own expert."""
  return mixes[0] if len(set(mixes)) == 1 else f'{mixes[0].partition(":")[0]}:given'


def write(path, content: dict):
  """Writes results.json atomically, indented. BadInput: it cannot be written there."""
  try:
    write_atomic(path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b'\n')
  except OSError as e:
    raise BadInput(f'{path}: cannot be written ({e.strerror}); name another file') from None


def column(row: dict) -> tuple[str, ...]:
  """The head of the column that a row stands in: run, way of mixing, posterior; '' where none."""
  prior, posterior = row.get('prior'), row.get('posterior')
  way = 'given' if row['mix'].startswith('expert:') else ''
  if prior:
    way = {'none': 'average', 'dev': 'best'}.get(prior, prior)
  return row['run'], way, posterior or ''


def table(content: dict, measure: str = 'perplexity') -> str:
  """Domains × runs (and ways of mixing) for one measure; then arithmetic and geometric means and
  the sign count. What a mark or a missing number means: `remarks`.

  Means are over the domains that are not held out; the first column is what signs are counted
  against (a win is a lower value). A held-out domain stands below, outside the means, and so do
  groups, the sums of their leaves.
  """
  rows, heldout = content['rows'], content['heldout']
  columns = list(dict.fromkeys(map(column, rows)))
  columns.sort(key=lambda c: list(content['runs']).index(c[0]))
  groups = content.get('groups', [])
  cell = {(r['domain'], column(r)): r for r in rows + groups}
  domains = list(dict.fromkeys(r['domain'] for r in rows))
  seen = [d for d in domains if d not in heldout]
  mixed, marks = is_mixed(rows), marked(content)
  heads = [(c[0] + marks.get(c[0], ''), *c[1:]) for c in columns]
  heads = heads if mixed else [h[:1] for h in heads]
  levels = 3 if mixed and any(c[2] for c in columns) else len(heads[0]) - mixed
  lines = [[measure.replace('_', ' ') if i == 0 else '', *(h[i] for h in heads)]
           for i in range(levels)]
  leaks = {e['domain'] for e in content.get('leakage', ())}

  def value(domain, col):
    found = cell.get((domain, col))
    return found and found[measure]

  def values(col, names):
    return [v for d in names if (v := value(d, col)) is not None]

  def show(domain):
    out = [domain + ('*' if domain in leaks else '') + (' (held out)' if domain in heldout else '')]
    for col in columns:
      number = value(domain, col)
      other = '' if mixed or number is None else given_to(cell[domain, col])
      out.append('-' if number is None else f'{number:.3f}{f" [{other}]" if other else ""}')
    return out

  def mean(name, of):
    return [name] + [f'{of(v):.3f}' if (v := values(c, seen)) else '-' for c in columns]

  lines += [show(d) for d in seen]
  lines.append(mean('arithmetic mean', lambda v: sum(v) / len(v)))
  lines.append(mean('geometric mean', lambda v: math.exp(sum(map(math.log, v)) / len(v))))
  base = columns[0]
  signs = [f'lower than {" ".join(filter(None, base if mixed else base[:1]))}', '']
  for col in columns[1:]:
    pairs = [(a, b) for d in seen
             if None not in (pair := (value(d, col), value(d, base))) for a, b in [pair]]
    signs.append(f'{sum(a < b for a, b in pairs)} of {len(pairs)}')
  if len(columns) > 1:
    lines.append(signs)
  lines += [show(d) for d in domains if d in heldout]
  lines += [[f'group {line[0]}', *line[1:]] for g in dict.fromkeys(r['domain'] for r in groups)
            if (line := show(g))]
  return '\n\n'.join(layout(part, levels) for part in panels(lines, columns))


def is_mixed(rows) -> bool:
  """Whether a table has columns for ways of mixing."""
  return any(r.get('prior') for r in rows)


def given_to(row: dict) -> str:
  """The expert or symbol that a row was scored with, where it is not the domain's own; ''."""
  given = row['mix'].partition(':')[2]  # expert:legal, token:legal
  return '' if given == row['domain'] or 'leaves' in row else given


def marked(content: dict) -> dict:
  """{run: mark} of the runs that were scored by another protocol than the first."""
  protocols = {r['run']: r.get('protocol', '') for r in content['rows']}
  kinds = list(dict.fromkeys(protocols.values()))
  return {run: '†' * kinds.index(p) for run, p in protocols.items() if kinds.index(p)}


def remarks(content: dict) -> str:
  """What must be known to read the tables, each once: marks, experts that were chosen, protocols,
  samples, what was not scored."""
  rows, mixed, out = content['rows'], is_mixed(content['rows']), []
  if mixed:  # else it stands in the table
    chosen = {}
    for r in rows:
      if given := given_to(r):
        chosen.setdefault((r['domain'], given), []).append(' '.join(filter(None, column(r))))
    out += [f'{domain}: {", ".join(who)} is {given}' for (domain, given), who in chosen.items()]
  marks, protocols = marked(content), {r['run']: r.get('protocol', '') for r in rows}
  if marks:
    first = next(iter(protocols.values()))
    out += [f'{mark} {", ".join(r for r in marks if marks[r] == mark)}: text cut as '
            f'{next(protocols[r] for r in marks if marks[r] == mark)}, the others as {first}: two '
            'protocols, not to be compared (--packing=… scores all in one way)'
            for mark in dict.fromkeys(marks.values())]
  limits = {r.get('limit', 0) for r in rows} - {0}
  if limits:
    sizes = sorted({r['n'] for r in rows})
    counts = f'{sizes[0]} to {sizes[-1]}' if len(sizes) > 1 else str(sizes[0])
    out.append(f'{counts} sequences a domain, a fixed sample of the {rows[0]["split"]} text '
               f'(--limit={", ".join(map(str, limits))})')
  empty = {}
  for r in rows:
    if not r['tokens']:
      empty.setdefault((r['domain'], r['n']), {})[r['run']] = True
  runs = set(content['runs'])
  for (domain, n), who in empty.items():
    some = who.keys() < runs  # means over different domains are not to be compared
    out.append(f'- {domain}: no token of its {n} sequences is scored (prompts only)' + (
        f' for {", ".join(who)}; its means are over fewer domains than those of others'
        if some else ''))
  leaks = {}
  for e in content.get('leakage', ()):
    leaks.setdefault(e['domain'], {})[e['train']] = e['runs']
  for domain, trains in leaks.items():
    most = ', '.join(f'{x:.1%} in {t}' for t, x in sorted(trains.items(), key=lambda i: -i[1])[:3])
    out.append(f'* {domain}: of its runs of 13 words stand in text trained on: {most}')
  for run, entry in content['runs'].items():
    out += [f'{run}: expert {e} did not beat its parent when it was added (or was not compared)'
            for e in entry.get('unearned', ())]
  for run, mixing in content.get('mixing', {}).items():
    if mixing['options']:
      out.append(f'{run} is mixed with ' + '; '.join(
          f'{k}={v} ({", ".join(mixing["read_by"][k])})' for k, v in mixing['options'].items()))
  return '\n'.join([*out, *content.get('notes', ())])


def panels(lines: list[list[str]], columns: list[tuple]) -> list[list[list[str]]]:
  """A table that is wider than _WIDTH as several, each with the first column of numbers again; the
  columns of a run stay together."""
  widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0]))]
  parts = [[]]
  for _, run in itertools.groupby(range(1, len(columns)), lambda i: columns[i][0]):
    run = [i + 1 for i in run]  # the first place of a line is its name
    if parts[-1] and sum(widths[i] for i in [0, 1, *parts[-1], *run]) - 2 > _WIDTH:
      parts.append([])
    parts[-1] += run
  return [[[line[0], line[1], *(line[i] for i in part)] for line in lines] for part in parts]


def priors(content: dict) -> str:
  """The cached priors, by expert name: one line a domain and posterior."""
  out = []
  for run, mixing in content.get('mixing', {}).items():
    if not mixing['priors']:
      continue
    names = list(mixing['priors'][0]['weights'])
    lines = [[f'cached priors of {run}', 'posterior', *names]]
    for p in mixing['priors']:
      lines.append([p['domain'], p['posterior'], *(f'{p["weights"].get(n, 0):.3f}' for n in names)])
    out.append(layout(lines))
  return '\n\n'.join(out)


def ledger(content: dict) -> str:
  """What each run cost: tokens, FLOPs, parameters, seconds."""
  from demix.runtime.progress import duration, quantity
  lines = [['ledger', 'train tokens', 'train FLOPs', 'params', 'active', 'time']]
  for name, run in content['runs'].items():
    lines.append([name, quantity(run['train_tokens']), quantity(run['train_flops']),
                  quantity(run['params_total']), quantity(run['params_active']),
                  duration(run['seconds'])])
  return layout(lines)


def layout(lines: list[list[str]], heads: int = 1) -> str:
  """Columns aligned: the first to the left, the others to the right; a rule under the heads."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ['  '.join(c.ljust(w) if i == 0 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
  return '\n'.join([*text[:heads], '-' * (sum(widths) + 2 * len(widths) - 2), *text[heads:]])
