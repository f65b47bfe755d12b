"""What the verb `forest` does with a forest's records: plan, status, list, show, tree, verify,
remove."""

import math
import os
import shutil
from pathlib import Path

from demix import settings
from demix.checkpoints import catalogue
from demix.config import Config
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, NothingToLoad
from demix.forest import manifest, plan
from demix.forest.manifest import SEED
from demix.lifecycle import traces
from demix.runtime.progress import quantity
from demix.settings import nearest


def layout(lines: list[list[str]]) -> list[str]:
  """Columns aligned to the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]


def names(forest: dict) -> list[str]:
  """The seed and the planned experts, each behind its parent."""
  planned = forest['plan']['experts'] if forest['plan'] else {}
  seed = [SEED] if forest['plan'] and forest['plan']['seed'] is not None else []
  parents = {'experts': {n: {'parents': plan.parents(forest['plan'], n)} for n in planned}}
  return seed + manifest.order(parents)


def check_configs(content: dict, where: str):
  """Raises BadInput for a plan whose seed or an expert could not be trained as it says."""
  for name in [SEED] * (content['seed'] is not None) + list(content['experts']):
    nested = plan.config_of(content, name)
    if name != SEED and plan.parents(content, name):
      nested['init']['model'] = 'its parent'
    try:
      settings.from_dict(Config, nested, 'config').check()
    except BadInput as e:
      raise BadInput(f'{where}: {name}: {e}') from None


def write_plan(folder, content: dict, data: str, where: str) -> list[str]:
  """Writes a plan into the manifest (made if need be); lines for people.

  Raises:
    BadInput: the plan cannot be carried out, the store has not its domains, or experts that are
      registered have another plan.
  """
  content = plan.named(_plain(content), where) | {'data': os.path.abspath(data)}
  there = manifest.load(folder)['experts'] if (Path(folder) / manifest.FILE).exists() else ()
  plan.check(content, where, there)
  store = TokenStore.open(data)
  for name, branch in content['experts'].items():
    for domain in store.leaves(branch['domains']):
      if domain not in store.domains:
        raise BadInput(f'{where}: expert {name} wants domain {domain!r}, {data} has no such domain'
                       f'{nearest(domain, store.domains)}')
    if plan.parent_of(content, name).how == plan.POSTERIOR:
      [domain] = branch['domains']
      if 'valid' not in store.splits(domain):
        raise BadInput(f'{where}: expert {name} has parent={plan.POSTERIOR}, and {data} has no '
                       f'valid text of {domain} to estimate it on')
  check_configs(content, where)
  with manifest.edit(folder) as forest:
    old = forest['plan']
    for name in [SEED] * bool(forest['base']) + list(forest['experts']):
      if old and _asked(old, name) != _asked(content, name):
        raise BadInput(f'{folder}: {name} is there already, by another plan: plan a new forest, or '
                       'remove it first')
    forest['plan'] = content
  total = sum(plan.tokens_of(content, n) for n in names({'plan': content}))
  return [*status(folder), f'tokens       {total:,} in all']


def _plain(value):
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _asked(content, name):
  if name == SEED:
    return _whole(content, name) if content['seed'] is not None else None
  if name not in content['experts']:
    return None
  return str(plan.parent_of(content, name)), _whole(content, name)


def _whole(content, name):
  """Its Config: a plan from before a key was there means the key's default."""
  from demix import settings
  from demix.config import Config  # of JAX; most actions need none
  return settings.from_dict(Config, plan.config_of(content, name), f'plan of {name}')


def state_of(folder: Path, forest: dict, name: str) -> tuple[str, int, int]:
  """(missing | training | finished | registered | differs, step, steps that are planned)."""
  wanted = plan.config_of(forest['plan'], name)['train']['steps']
  entry = forest['base'] if name == SEED else forest['experts'].get(name)
  directory = folder / plan.folder_of(name) / 'checkpoints'
  steps = catalogue.steps(directory)
  step = steps[-1] if steps else 0
  if entry:
    there = entry['step'] in steps and catalogue.read_meta(
        directory, entry['step'])['content_digest'] == entry['content_digest']
    return ('registered' if there else 'differs'), step, wanted
  state = 'finished' if step >= wanted else 'training' if step else 'missing'
  return state, step, wanted


def status(folder) -> list[str]:
  """Plan against manifest and folders: a line for the seed and each expert."""
  folder, forest = Path(folder), manifest.load(folder)
  if not forest['plan']:
    raise BadInput(f'{folder} has no plan: forest plan --config=configs/forest_….py')
  lines = [['name', 'domains', 'parent', 'tokens', 'state']]
  for name in names(forest):
    state, step, wanted = state_of(folder, forest, name)
    branch = forest['plan']['experts'].get(name, {})
    parent = '' if name == SEED else str(plan.parent_of(forest['plan'], name))
    tokens = quantity(plan.tokens_of(forest['plan'], name))
    lines.append([name, ','.join(branch.get('domains', ())) or 'all', parent, tokens,
                  f'{state}, step {step} of {wanted}' if state != 'missing' else 'missing'])
  for name, entry in forest['experts'].items():
    if name not in forest['plan']['experts']:
      lines.append([name, ','.join(entry['domains']), ','.join(entry['parents']), quantity(
          entry.get('tokens', 0)), 'registered, not planned'])
  return layout(lines)


def listed(folder) -> list[str]:
  """The experts that are there."""
  forest = manifest.load(folder)
  lines = [['expert', 'domains', 'parents', 'step', 'tokens', 'gate', 'workdir']]
  for name, entry in forest['experts'].items():
    lines.append([name, ','.join(entry['domains']), _parents(entry), str(entry['step']),
                  quantity(entry.get('tokens', 0)), _gate(entry), entry['workdir']])
  return layout(lines)


def _parents(entry: dict) -> str:
  """'seed', 'law 0.6, bio 0.4', 'random'."""
  several = len(entry['parents']) > 1
  return ', '.join(f'{p} {w:.3g}' if several else p
                   for p, w in entry['parents'].items()) or 'random'


def _gate(entry: dict) -> str:
  gate = entry.get('gate')
  if not gate:
    return 'no parent' if not entry['parents'] else 'FLAGGED: not compared'
  return f'{"" if gate["passed"] else "FLAGGED: "}gain {gate["gain"]:.4f} nats'


def show(folder, name: str) -> list[str]:
  """All that is known of one expert, or of the seed.

  Raises:
    BadInput: there is no such expert.
  """
  folder, forest = Path(folder), manifest.load(folder)
  if name == SEED and forest['base']:
    entry = forest['base'] | {'parents': {}}
  else:
    entry = manifest.require(forest, name, folder)
  meta = manifest.meta_of(folder, entry)
  shapes = [x['shape'] for n, x in meta['leaves'].items() if n.startswith('params/')]
  init, below = entry.get('init'), manifest.descendants(forest, name)
  gate = entry.get('gate')
  lines = [
      ['name', name], ['kind', entry.get('kind', 'full')],
      ['domains', ', '.join(entry.get('domains', meta['domains']))],
      ['parents', _parents(entry)],
      ['started from', '{workdir}@{step}, {content_digest}'.format(**init) if init else ''],
      ['descendants', ', '.join(below)],
      ['workdir', f'{folder / entry["workdir"]}, step {entry["step"]}'],
      ['parameters', quantity(sum(map(math.prod, shapes)))],
      ['trained', ', '.join(f'{quantity(meta["ledger"][k])} {text}' for k, text in (
          ('tokens', 'tokens'), ('flops', 'FLOPs'), ('seconds', 's')))],
      ['epochs', ', '.join(f'{d} {e:.2f}' for d, e in meta['epochs'].items())],
      ['gate', f'{_gate(entry)} ({gate["parent_nll"]:.4f} → {gate["nll"]:.4f} on {gate["tokens"]} '
               f'tokens of {gate["split"]})' if gate else _gate(entry)],
      ['content digest', entry['content_digest']], ['tokenizer', meta['tokenizer']],
      ['data', meta['data']]]
  lines += [[k, str(v)] for k, v in entry.get('artefacts', {}).items()]
  planned = forest['plan'] and plan.config_of(forest['plan'], name) if name == SEED or (
      forest['plan'] and name in forest['plan']['experts']) else None
  lines.append(['planned', f'{planned["train"]["steps"]} steps' if planned else 'no'])
  return layout([line for line in lines if line[1]])


def tree(folder) -> list[str]:
  """The lineage, an expert under its heaviest parent."""
  forest = manifest.load(folder)
  under = {}
  for name, entry in forest['experts'].items():
    parents = entry['parents']
    under.setdefault(max(parents, key=parents.get) if parents else None, []).append(name)
  out = []
  def show(name, lead, last, root):
    entry = forest['base'] if name == SEED else forest['experts'][name]
    more = '' if name == SEED else f' on {", ".join(entry["domains"])}'
    several = entry.get('parents') or {}
    if len(several) > 1:
      more += f', from {", ".join(f"{p} {w:.2f}" for p, w in several.items())}'
    out.append(f'{lead}{"" if root else "└─ " if last else "├─ "}{name}: step '
               f'{entry["step"]}{more}')
    below = under.get(name, [])
    for i, child in enumerate(below):
      show(child, lead + ('' if root else '   ' if last else '│  '), i == len(below) - 1, False)
  for root in [SEED] * bool(forest['base']) + under.get(None, []):
    show(root, '', True, True)
  return out


def verify(folder) -> list[str]:
  """Reads everything again.

  Raises:
    NothingToLoad: something is amiss; expert and file of each are named.
  """
  forest = manifest.load(folder)
  found = manifest.problems(folder, forest)
  if found:
    raise NothingToLoad('; '.join(found))
  count = len(forest['experts'])
  return [f'{count} experts and {"the" if forest["base"] else "no"} seed: every byte is as it was '
          'written']


def remove(folder, name: str, search=()) -> list[str]:
  """Takes an expert out of the manifest and the plan and deletes its folder; lists what came from
  it and what else saw its data.

  Args:
    search: folders below which traces are looked for, besides that of the forest.

  Raises:
    BadInput: there is no such expert or folder.
  """
  folder = Path(folder)
  forest = manifest.load(folder)
  entry = manifest.require(forest, name, folder)
  for other in search:
    if not Path(other).is_dir():
      raise BadInput(f'--search={other}: no such folder')
  below, workdir = manifest.descendants(forest, name), folder / entry['workdir']
  tainted = traces.find_whole(name, entry, workdir, [folder.absolute().parent, *map(Path, search)])
  unplanned = []
  with manifest.edit(folder) as forest:
    manifest.require(forest, name, folder)
    forest.setdefault('removed', {})[name] = {
        'content_digest': entry['content_digest'], 'domains': entry['domains'],
        'descendants': below, 'tainted': tainted}
    del forest['experts'][name]
    for other in forest['experts'].values():  # they stay; where they came from is written down
      if name in other['parents']:
        other.setdefault('removed_parents', {})[name] = other['parents'].pop(name)
        left = sum(other['parents'].values())
        other['parents'] = {p: w / left for p, w in other['parents'].items()} if left else {}
    if forest['plan'] and name in forest['plan']['experts']:  # else `run` would train it again
      forest['plan'], unplanned = plan.without(forest['plan'], name)
      unplanned = [n for n in unplanned if n not in forest['experts']]
  lines = [f'removed     {name} (content digest {entry["content_digest"]})']
  real = [Path(os.path.realpath(folder / e['workdir'])) for e in forest['experts'].values()]
  own = Path(os.path.realpath(workdir))
  if any(own == other or own in other.parents for other in real):
    lines.append(f'left        {workdir}: another expert lies there')
  elif own.parent == Path(os.path.realpath(folder / 'experts')):
    shutil.rmtree(workdir, ignore_errors=True)
  else:
    lines.append(f'left        {workdir}: it does not lie in the forest; delete it yourself')
  lines += [f'tainted     {other}: branched from {name}' for other in below]
  lines += [f'tainted     {e["path"]}{", checkpoints " * bool(e["checkpoints"])}'
            f'{", ".join(e["checkpoints"])}: {e["why"]}' for e in tainted]
  lines += [f'unplanned   {other}: it would have branched from {name}' for other in unplanned]
  seed = manifest.seed_meta(folder, forest)
  if seed and set(entry['domains']) & set(seed['domains']):
    lines.append('residue     the seed was trained on its domain too: this is access restriction, '
                 'not unlearning')
  return lines
