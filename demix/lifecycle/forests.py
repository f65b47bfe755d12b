"""What the verb `forest` does with a forest's records: plan, status, list, tree, verify, remove."""

import os
import shutil
from pathlib import Path

from demix import catalogue
from demix.data.store import TokenStore
from demix.errors import BadInput, NothingToLoad
from demix.forest import manifest, plan
from demix.forest.manifest import SEED
from demix.progress import quantity
from demix.settings import nearest


def layout(lines: list[list[str]]) -> list[str]:
  """Columns aligned to the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]


def names(forest: dict) -> list[str]:
  """The seed and the planned experts, each behind its parent."""
  planned = forest['plan']['experts'] if forest['plan'] else {}
  seed = [SEED] if forest['plan'] and forest['plan']['seed'] is not None else []
  parents = {'experts': {n: {'parents': plan.parents(b)} for n, b in planned.items()}}
  return seed + manifest.order(parents)


def write_plan(folder, content: dict, data: str, where: str) -> list[str]:
  """Writes a plan into the manifest (made if need be); lines for people.

  Raises:
    BadInput: the plan cannot be carried out, the store has not its domains, or experts that are
      registered have another plan.
  """
  content = plan.named(_plain(content), where) | {'data': os.path.abspath(data)}
  plan.check(content, where)
  store = TokenStore.open(data)
  for name, branch in content['experts'].items():
    for domain in store.leaves(branch['domains']):
      if domain not in store.domains:
        raise BadInput(f'{where}: expert {name} wants domain {domain!r}, {data} has no such domain'
                       f'{nearest(domain, store.domains)}')
  for name in [SEED] * (content['seed'] is not None) + list(content['experts']):
    plan.config_of(content, name)
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
  known = name == SEED or name in content['experts']
  return plan.config_of(content, name) if known else None


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
    lines.append([name, ','.join(branch.get('domains', ())) or 'all', branch.get(
        'parent', '' if name == SEED else SEED), quantity(plan.tokens_of(forest['plan'], name)),
                  f'{state}, step {step} of {wanted}' if state != 'missing' else 'missing'])
  for name, entry in forest['experts'].items():
    if name not in forest['plan']['experts']:
      lines.append([name, ','.join(entry['domains']), ','.join(entry['parents']), quantity(
          entry.get('tokens', 0)), 'registered, not planned'])
  return layout(lines)


def listed(folder) -> list[str]:
  """The experts that are there."""
  forest = manifest.load(folder)
  lines = [['expert', 'domains', 'parents', 'step', 'tokens', 'workdir']]
  for name, entry in forest['experts'].items():
    parents = ', '.join(f'{p} {w:g}' if len(entry['parents']) > 1 else p
                        for p, w in entry['parents'].items())
    lines.append([name, ','.join(entry['domains']), parents or 'random', str(entry['step']),
                  quantity(entry.get('tokens', 0)), entry['workdir']])
  return layout(lines)


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


def remove(folder, name: str) -> list[str]:
  """Takes an expert out of the manifest and deletes its folder; lists what came from it.

  Raises:
    BadInput: there is no such expert.
  """
  folder = Path(folder)
  forest = manifest.load(folder)
  entry = manifest.require(forest, name, folder)
  below = manifest.descendants(forest, name)
  with manifest.edit(folder) as forest:
    manifest.require(forest, name, folder)
    forest.setdefault('removed', {})[name] = {
        'content_digest': entry['content_digest'], 'domains': entry['domains'],
        'descendants': below}
    del forest['experts'][name]
    for other in forest['experts'].values():  # they stay; where they came from is written down
      if name in other['parents']:
        other.setdefault('removed_parents', {})[name] = other['parents'].pop(name)
        left = sum(other['parents'].values())
        other['parents'] = {p: w / left for p, w in other['parents'].items()} if left else {}
  shutil.rmtree(folder / entry['workdir'], ignore_errors=True)
  lines = [f'removed     {name} (content digest {entry["content_digest"]})']
  lines += [f'tainted     {other}: branched from {name}' for other in below]
  seed = manifest.seed_meta(folder, forest)
  if seed and set(entry['domains']) & set(seed['domains']):
    lines.append('residue     the seed was trained on its domain too: this is access restriction, '
                 'not unlearning')
  return lines
