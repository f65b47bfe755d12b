"""train: anything that moves weights. The same workdir again resumes."""

from absl import flags

from demix.errors import BadInput
from demix.verbs.flags import Verb, require

SUMMARY = 'train a model; the same workdir again resumes'


def run(argv: list[str]) -> int:
  """Parses flags, takes the workdir's lock before anything heavy is imported, trains."""
  from demix import workdir
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
  with workdir.hold(early.workdir, 'train') as held:
    return _train(argv, held)


def _train(argv, held) -> int:
  from demix.config import Config
  verb = Verb('train', SUMMARY)
  verb.string('workdir', '', 'folder of the run: config, metrics, checkpoints')
  verb.config(Config, 'configs/laptop.py:demix')
  given, config = verb.parse(argv)
  require(given.workdir, 'workdir', 'where the run keeps its config, metrics and checkpoints')
  require(config.data.path, 'config.data.path', 'the token store that `prepare` wrote')
  from demix import train
  train.run(config, held)
  return 0
