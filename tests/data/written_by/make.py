"""Made the archives beside it, with the code of the day: python make.py FOLDER.

A store, a dense LM, a DEMix LM, a forest of a seed and two branches, priors and results.json, of
the corpus of the tests; then, without text/ and the locks, `tar cJf COMMIT.tar.xz .` there.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import corpus  # noqa: E402
import runs  # noqa: E402

from demix.data.corpus.prepare import PrepareConfig, prepare  # noqa: E402

SMALL = {'model__d_model': 4, 'model__heads': 2, 'seed': 3, 'train__steps': 10,
         'train__checkpoint_every': 10, 'train__max_to_keep': 1, 'optimizer__schedule_steps': 10,
         'data__batch_size': 4, 'train__eval_sequences': 4}
PLAN = '''
from ml_collections import ConfigDict
from demix import settings
from demix.config import Config
def get_config():
  base = settings.to_dict(settings.from_dict(Config, {
      'seed': 3, 'model': {'layers': 2, 'd_model': 4, 'heads': 2},
      'data': {'batch_size': 4, 'sequence_length': 32},
      'optimizer': {'learning_rate': 0.01, 'clip': 1.0, 'schedule_steps': 10},
      'train': {'steps': 10, 'log_every': 1, 'checkpoint_every': 10, 'max_to_keep': 1,
                'tensorboard': False, 'eval_sequences': 4}}))
  branch = {'train': {'steps': 5}, 'data': {'batch_size': 2}, 'init': {'optimizer': 'continue'}}
  return ConfigDict({'base': base, 'seed': {'train': {'steps': 5}}, 'experts': [
      {'name': n, 'domains': (n,), 'parent': 'seed', 'changes': branch}
      for n in ('code', 'kitchen')]})
'''


def main(folder: str):
  """Writes everything below `folder`."""
  os.chdir(folder)
  corpus.write(Path('text'))
  prepare(Path('text'), Path('store'), PrepareConfig(
      domains=('code', 'kitchen', 'mixed'), novel=('mixed',), tokenizer='bytes'), print)
  Path('plan.py').write_text(PLAN)
  for ended in (
      runs.train('store', 'dense', **SMALL),
      runs.train('store', 'demix', model__ffn='demix', **SMALL),
      runs.demix('forest', 'plan', '--forest=forest', '--data=store', '--config=plan.py'),
      runs.demix('forest', 'run', '--forest=forest'),
      runs.demix('evaluate', '--model=dense', '--model=demix', '--model=forest=forest:forest',
                 '--data=store', '--mix=given,average,uniform,cached', '--mix.blocks=4',
                 '--save_priors=priors.json', '--out=results.json')):
    assert ended.code == 0, ended


if __name__ == '__main__':
  main(sys.argv[1])
