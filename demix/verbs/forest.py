"""forest: sets of experts: whole LMs that branched from a seed (--forest=F), or the experts of a
DEMix LM (--model=W)."""

from demix.errors import BadInput
from demix.loading import reference
from demix.settings import nearest
from demix.verbs.flags import Help, Verb, require

SUMMARY = 'whole LMs branched from a seed (--forest), or the experts of a DEMix LM (--model)'
ACTIONS = {
    'plan': 'writes the plan of a forest: seed, experts, their data, parents, budgets',
    'run': 'trains and registers what the plan of a forest says and is not done yet',
    'status': 'plan against manifest and folders of a forest',
    'tree': 'who branched from whom in a forest',
    'verify': 'reads every byte of every expert of a forest again',
    'list': 'experts, where each comes from; of a forest or of a DEMix LM',
    'show': 'all that is known of one expert of a forest',
    'add': 'a finished workdir as a new expert of a forest; or the FFNs of a run that started from '
           'one expert of a DEMix LM, in a new workdir',
    'remove': 'an expert out of a forest; or a new workdir of a DEMix LM without one expert; and '
              'what still holds it or its data',
}
NEW = 'folder of the new model; must not exist'
LIMIT = "gate: sequences of valid text of the expert's domains; 0: all"


def run(argv: list[str]) -> int:
  """`forest ACTION …`."""
  if not argv or argv[0] in ('--help', '-h', 'help'):
    lines = [f'python -m demix forest ACTION: {SUMMARY}', '', 'actions:']
    lines += [f'  {name:<8} {text}' for name, text in ACTIONS.items()]
    text = '\n'.join([*lines, '', 'python -m demix forest ACTION --help shows its flags.'])
    if argv:
      raise Help(text)
    raise BadInput(f'forest: no action given (known: {", ".join(ACTIONS)})')
  action, *rest = argv
  if action not in ACTIONS:
    raise BadInput(f'forest: no such action {action!r}{nearest(action, ACTIONS)}')
  verb = Verb(f'forest {action}', ACTIONS[action])
  if action in ('list', 'add', 'remove'):
    verb.string('model', '', 'the DEMix LM: W or W@STEP')
  verb.string('forest', '', 'folder of the forest')
  code = {'list': _list, 'show': _show, 'add': _add, 'remove': _remove, 'plan': _plan, 'run': _run,
          'status': _status, 'tree': _tree, 'verify': _verify}[action](verb, rest)
  return code or 0


def _one_kind(given, of_models, of_forests=()):
  """Raises BadInput for a flag that goes with --model where --forest is given, or with --forest
  where it is not."""
  for flag in of_models if given.forest else of_forests:
    if getattr(given, flag):
      kinds = ('--forest', '--model') if given.forest else ('--model', '--forest')
      raise BadInput(f'--{flag}={getattr(given, flag)} has no effect with {kinds[0]}, it goes with '
                     f'{kinds[1]}: leave one of them out')


def _model(given) -> str:
  reference.parse(require(given.model, 'model', 'the DEMix LM: W or W@STEP'))
  return given.model


def _forest(given) -> str:
  return require(given.forest, 'forest', 'the folder of the forest')


def _plan(verb, argv):
  verb.string('config', '', 'a config file with get_config(arg) that returns a plan: FILE[:ARG]')
  verb.string('data', '', 'token store that everything in it is trained on')
  given, _ = verb.parse(argv)
  from demix.lifecycle import forests
  from demix.verbs.flags import load_config
  file = require(given.config, 'config', 'for example configs/forest_quickstart.py')
  data = require(given.data, 'data', 'the token store that `prepare` wrote')
  print('\n'.join(forests.write_plan(_forest(given), load_config(file).to_dict(), data, file)))


def _run(verb, argv):
  verb.string('only', '', 'comma-separated names: seed, or experts; all by default')
  verb.string('data', '', "token store; the plan's by default")
  verb.integer('limit', 0, LIMIT, low=0)
  verb.boolean('together', 'experts whose parents are there are trained side by side in this '
               'process (train.lift says how)')
  verb.boolean('verify_data', "compare the data with the digests in their store's card, in the "
               'background; first checkpoints wait for it', default=True)
  verb.boolean('require_gain', 'exit 3 and do not register an expert that is no better than its '
               'parent')
  given, _ = verb.parse(argv)
  names = tuple(n.strip() for n in given.only.split(',') if n.strip())
  folder, limit = _forest(given), given.limit
  from demix.lifecycle.grow import grow
  grow(folder, only=names, data=given.data, together=given.together,
       require_gain=given.require_gain, limit=limit, verify_data=given.verify_data)


def _status(verb, argv):
  given, _ = verb.parse(argv)
  from demix.lifecycle import forests
  print('\n'.join(forests.status(_forest(given))))


def _tree(verb, argv):
  given, _ = verb.parse(argv)
  from demix.lifecycle import forests
  print('\n'.join(forests.tree(_forest(given))))


def _verify(verb, argv):
  given, _ = verb.parse(argv)
  from demix.lifecycle import forests
  lines = forests.verify(_forest(given))
  print('\n'.join(lines))


def _list(verb, argv):
  given, _ = verb.parse(argv)
  if given.forest:
    from demix.lifecycle import forests
    print('\n'.join(forests.listed(given.forest)))
    return
  model = _model(given)
  from demix.lifecycle import listing
  print('\n'.join(listing.experts(model)))


def _show(verb, argv):
  verb.string('expert', '', 'the expert, or seed')
  given, _ = verb.parse(argv)
  folder, expert = _forest(given), require(given.expert, 'expert', 'which one')
  from demix.lifecycle import forests
  print('\n'.join(forests.show(folder, expert)))


def _add(verb, argv):
  verb.string('expert', '', 'name of the new expert, that of its domain')
  verb.string('from', '', 'with --forest a finished workdir, W or W@STEP, which is copied; with '
              '--model the run with its FFNs: started from an expert, init.trainable=ffn')
  verb.string('workdir', '', f'with --model: {NEW}')
  verb.string('parent', '', 'with --forest: seed or an expert, or none, where the checkpoint does '
              'not say where it comes from')
  verb.string('data', '', 'token store for the gate; the one the run trained on by default')
  verb.integer('limit', 0, LIMIT, low=0)
  verb.boolean('verify_data', "compare the gate's text with the digests in its store's card first",
               default=True)
  verb.boolean('require_gain', 'exit 3 and write nothing if it is no better than its parent')
  given, _ = verb.parse(argv)
  if not given.forest:
    _model(given)
  expert = require(given.expert, 'expert', 'the name of the new expert')
  source = require(given['from'].value, 'from', 'the run that trained it')
  reference.parse(source)
  _one_kind(given, ('model', 'workdir'), ('parent',))
  gate = {'require_gain': given.require_gain, 'data': given.data, 'limit': given.limit,
          'verify_data': given.verify_data}
  if given.forest:
    from demix.lifecycle import register
    register.add(given.forest, expert, source, parent=given.parent, **gate)
    return
  workdir = require(given.workdir, 'workdir', NEW)
  from demix.lifecycle.add import add
  add(given.model, expert, source, workdir, **gate)


def _remove(verb, argv):
  verb.string('expert', '', 'the expert to remove')
  verb.string('workdir', '', NEW)
  verb.strings('search', 'a folder to look for traces below, besides the one that the forest or '
               "the model's workdir lies in")
  given, _ = verb.parse(argv)
  expert = require(given.expert, 'expert', 'the expert to remove')
  _one_kind(given, ('model', 'workdir'))
  if given.forest:
    from demix.lifecycle import forests
    print('\n'.join(forests.remove(given.forest, expert, given.search)))
    return
  model, workdir = _model(given), require(given.workdir, 'workdir', NEW)
  from demix.lifecycle.remove import remove
  remove(model, expert, workdir, search=given.search)
