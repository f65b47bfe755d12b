"""results.json (docs/contracts.md) and the table people read: domains × runs, means, signs."""

import math
import platform

import orjson

from demix.errors import BadInput
from demix.workdir import write_atomic

VERSION = 1


def row(run: str, mix: str, domain: str, split: str, score) -> dict:
  """One row of results.json from a perplexity.Score; no prior and no posterior."""
  return {'run': run, 'mix': mix, 'prior': None, 'posterior': None, 'domain': domain,
          'split': split, 'nll': score.mean_nll, 'perplexity': score.perplexity,
          'bits_per_byte': score.bits_per_byte, 'tokens': score.tokens, 'bytes': score.bytes}


def results(runs: dict, rows: list, *, seed: int, heldout) -> dict:
  """The whole of results.json."""
  import flax
  import grain
  import jax
  import optax

  from demix import __version__
  versions = {'python': platform.python_version(), 'demix': __version__, 'jax': jax.__version__,
              'flax': flax.__version__, 'optax': optax.__version__,
              'grain': getattr(grain, '__version__', 'unknown')}
  return {'version': VERSION, 'runs': runs, 'rows': rows, 'seed': seed, 'heldout': list(heldout),
          'versions': versions}


def write(path, content: dict):
  """Writes results.json atomically, indented. BadInput: it cannot be written there."""
  try:
    write_atomic(path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b'\n')
  except OSError as e:
    raise BadInput(f'{path}: cannot be written ({e.strerror}); name another file') from None


def table(content: dict, measure: str = 'perplexity') -> str:
  """Domains × runs for one measure: then arithmetic and geometric means and the sign count.

  Means are over the domains that are not held out; the first run is what signs are counted
  against (a win is a lower value). A held-out domain stands below, outside the means.
  """
  runs = list(content['runs'])
  cell = {(r['domain'], r['run']): r for r in content['rows']}
  domains = list(dict.fromkeys(r['domain'] for r in content['rows']))
  seen = [d for d in domains if d not in content['heldout']]
  heads = {run: run for run in runs}
  lines = [[measure.replace('_', ' '), *heads.values()]]

  def values(run, names):
    return [cell[d, run][measure] for d in names if (d, run) in cell]

  def show(domain):
    out = [domain + (' (held out)' if domain in content['heldout'] else '')]
    for run in runs:
      found = cell.get((domain, run))
      given = found and found['mix'].partition(':')[2]  # expert:legal, token:legal
      note = f' [{given}]' if given and given != domain else ''
      out.append(f'{found[measure]:.3f}{note}' if found else '-')
    return out

  lines += [show(d) for d in seen]
  lines.append(['arithmetic mean'] + [f'{sum(v) / len(v):.3f}' if (v := values(r, seen)) else '-'
                                      for r in runs])
  lines.append(['geometric mean'] + [
      f'{math.exp(sum(map(math.log, v)) / len(v)):.3f}' if (v := values(r, seen)) else '-'
      for r in runs])
  base, signs = runs[0], ['lower than ' + runs[0], '']
  for run in runs[1:]:
    pairs = [(cell[d, run][measure], cell[d, base][measure]) for d in seen
             if (d, run) in cell and (d, base) in cell]
    signs.append(f'{sum(a < b for a, b in pairs)} of {len(pairs)}')
  if len(runs) > 1:
    lines.append(signs)
  lines += [show(d) for d in domains if d in content['heldout']]
  return layout(lines)


def ledger(content: dict) -> str:
  """What each run cost: tokens, FLOPs, parameters, seconds."""
  from demix.progress import duration, quantity
  lines = [['ledger', 'train tokens', 'train FLOPs', 'params', 'active', 'time']]
  for name, run in content['runs'].items():
    lines.append([name, quantity(run['train_tokens']), quantity(run['train_flops']),
                  quantity(run['params_total']), quantity(run['params_active']),
                  duration(run['seconds'])])
  return layout(lines)


def layout(lines: list[list[str]]) -> str:
  """Columns aligned: the first to the left, the others to the right; a rule under the head."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ['  '.join(c.ljust(w) if i == 0 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
  return '\n'.join([text[0], '-' * (sum(widths) + 2 * len(widths) - 2), *text[1:]])
