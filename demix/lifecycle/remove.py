"""Removing an expert from a DEMix LM: a new workdir without its leaves, moments and digests.

That is access restriction, not unlearning (papers: perplexity on the domain stays below that of a
model that never saw it): what still holds the expert or its data is listed.
"""

from pathlib import Path

from demix.errors import BadInput, Refused
from demix.lifecycle import traces
from demix.lifecycle.workdirs import check_free, open_demix, with_domains, write
from demix.model import tree
from demix.optim.state import COUNTS
from demix.settings import nearest

RESIDUE = ('the trunk was trained on the domain too and keeps a residue of it: this is access '
           'restriction, not unlearning')


def remove(model: str, expert: str, workdir: str, *, search=(), say=print):
  """Writes `workdir`: the DEMix LM without one of its experts.

  Args:
    model: reference of the DEMix LM. expert: name of the expert. workdir: must not exist.
    search: folders below which traces are looked for, besides that of the model's workdir.
    say: called with each line for people.

  Raises:
    BadInput: no such model, expert or folder; the workdir is taken.
    Refused: it is the last expert.
  """
  before, workdir = open_demix(model), Path(workdir)
  check_free(workdir)
  if expert not in before.experts:
    raise BadInput(f'--expert={expert}: {before.workdir} has no such expert'
                   f'{nearest(expert, before.experts)}')
  if len(before.experts) == 1:
    raise Refused(f'{expert} is the last expert of {before.workdir}: a DEMix LM has at least one')
  for folder in search:
    if not Path(folder).is_dir():
      raise BadInput(f'--search={folder}: no such folder')
  card, state = before.card(), before.arrays()
  state = {n: x for n, x in state.items()
           if not ((found := tree.EXPERT.fullmatch(n)) and found[2] == expert)
           and n != f'{COUNTS}{expert}'}
  config = with_domains(before.config, tuple(e for e in before.experts if e != expert))
  history = before.meta.get('lifecycle', [])
  folders = [before.workdir.absolute().parent, *map(Path, search)]
  tainted = traces.find(expert, history, config.model.experts, workdir, before.workdir, folders)
  epochs = {d: n for d, n in before.meta['epochs'].items() if d != expert}
  record = {'operation': 'remove', 'expert': expert, 'model': before.lineage(),
            'tainted': tainted, 'residue': RESIDUE}
  write(workdir, before, state, config, card, record, epochs=epochs)
  say(f'removed     {expert}; {", ".join(config.model.experts)} stay: {workdir}, '
      f'step {before.step}')
  for entry in tainted:
    steps = f', checkpoints {", ".join(entry["checkpoints"])}' if entry['checkpoints'] else ''
    say(f'tainted     {entry["path"]}{steps}: {entry["why"]}')
  say(f'residue     {RESIDUE}')
