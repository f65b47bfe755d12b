"""A tiny forest of three domains: its plan, the verb, its experts' digests."""

import json

import runs

from demix import settings
from demix.config import Config
from demix.forest import manifest

TRAIN = ('legal', 'code', 'verse')


def config_file(folder, **experts):
  """A config file that returns a plan: a seed of 4 steps, 4 of 2 sequences for each branch."""
  changes = {'train': {'steps': 4}, 'data': {'batch_size': 2}, 'init': {'optimizer': 'continue'}}
  experts = experts or {d: {'domains': [d], 'changes': changes} for d in TRAIN}
  base = settings.to_dict(Config())
  for path, value in runs.TINY.items():
    group, key = path.split('.')
    base[group][key] = value
  base['data'] |= {'domains': list(TRAIN), 'batch_size': 6}
  base['train'] |= {'checkpoint_every': 2, 'max_to_keep': 0}
  found = {'base': base, 'seed': {'train': {'steps': 4}},
           'experts': [{'name': name, **branch} for name, branch in experts.items()]}
  (folder / 'plan.json').write_text(json.dumps(found))
  (folder / 'plan.py').write_text(
      'import json\nfrom pathlib import Path\nfrom ml_collections import ConfigDict\n\n\n'
      'def get_config():\n'
      '  return ConfigDict(json.loads((Path(__file__).parent / "plan.json").read_text()))\n')
  return folder / 'plan.py'


def forest(*argv):
  return runs.demix('forest', *argv)


def digests(folder):
  return {n: e['content_digest'] for n, e in manifest.load(folder)['experts'].items()}
