"""train: anything that moves weights. The same workdir again resumes."""

import contextlib
import re
from pathlib import Path

from absl import flags

from demix.errors import BadInput
from demix.loading import reference
from demix.verbs.flags import Verb, require

SUMMARY = 'train a model; the same workdir again resumes'


def run(argv: list[str]) -> int:
  """Parses flags, takes the workdir's lock before anything heavy is imported, trains."""
  from demix.runtime import workdir
  early = flags.FlagValues()
  flags.DEFINE_string('workdir', '', '', flag_values=early)
  flags.DEFINE_bool('help', False, '', short_name='h', flag_values=early)
  try:
    early(['train', *argv], known_only=True)
  except flags.Error:
    return _train(argv, None)  # says what is wrong
  if early.help or not early.workdir:
    return _train(argv, None)
  if early.workdir.startswith('--'):  # `--workdir --config.seed=1` would make that folder
    raise BadInput(f'--workdir={early.workdir}: a flag, not a folder: --workdir=W')
  if any(re.match('--?config.mesh.processes(=|$)', arg) for arg in argv):
    return _train(argv, None)
  with workdir.hold(early.workdir, 'train') as held:
    return _train(argv, held)


def _train(argv, held) -> int:
  from demix.config import Config
  verb = Verb('train', SUMMARY)
  verb.string('workdir', '', 'folder of the run: config, metrics, checkpoints')
  verb.boolean('verify_data', "compare the data with the digests in their store's card, in the "
               'background; the first checkpoint waits for it', default=True)
  verb.config(Config, 'configs/laptop.py:demix')
  given, config = verb.parse(argv)
  require(given.workdir, 'workdir', 'where the run keeps its config, metrics and checkpoints')
  require(config.data.path, 'config.data.path', 'the token store that `prepare` wrote')
  if config.init.model:
    reference.parse(config.init.model)
  named = re.findall(r'(?:^|\n)--?config\.([\w.]+)', '\n'.join(argv))
  if 'train.lift' in named and config.train.lift != 'auto':
    raise BadInput(f'train.lift={config.train.lift} has no effect: `train` makes one run; it '
                   'is for several, forest run --together; leave it out')
  from demix.training import train
  if held:
    if config.mesh.processes != 1:
      raise BadInput(f'mesh.processes={config.mesh.processes} in the config file: it says how the '
                     'run is started, before the file is read; give it as a flag, '
                     f'--config.mesh.processes={config.mesh.processes}')
    train.run(config, held, given.verify_data, named)
    return 0
  return _train_together(config, Path(given.workdir), given.verify_data, named)


def _train_together(config, path, *how) -> int:
  """In several processes; the first one holds the workdir."""
  from demix.runtime import processes, workdir
  from demix.training import train
  mesh = config.mesh
  with (processes.joined(mesh.processes, mesh.process, mesh.coordinator, mesh.patience),
        contextlib.ExitStack() as stack):
    take = lambda: processes.first() and stack.enter_context(workdir.hold(path, 'train'))
    processes.agreed(take)
    processes.agreed(lambda: workdir.check_shared(path))
    train.run(config, path, *how)
  return 0
