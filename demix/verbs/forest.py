"""forest: the experts of a DEMix LM; list them, add one, remove one."""

from demix.errors import BadInput
from demix.settings import nearest
from demix.verbs.flags import Help, Verb, require

SUMMARY = 'the experts of a DEMix LM: list, add, remove'
ACTIONS = {
    'list': 'experts, their parameters, where each comes from',
    'add': 'the FFNs of a run that started from one expert, as a new expert of a new workdir',
    'remove': 'a new workdir without one expert, and what still holds it or its data',
}
NEW = 'folder of the new model; must not exist'


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
  verb.string('model', '', 'the DEMix LM: W or W@STEP')
  {'list': _list, 'add': _add, 'remove': _remove}[action](verb, rest)
  return 0


def _model(given) -> str:
  return require(given.model, 'model', 'the DEMix LM: W or W@STEP')


def _list(verb, argv):
  given, _ = verb.parse(argv)
  model = _model(given)
  from demix.lifecycle import listing
  print('\n'.join(listing.experts(model)))


def _add(verb, argv):
  verb.string('expert', '', 'name of the new expert, that of its domain')
  verb.string('from', '', 'the run with its FFNs: started from an expert, init.trainable=ffn')
  verb.string('workdir', '', NEW)
  verb.string('data', '', 'token store for the gate; the one the run trained on by default')
  verb.integer('limit', 0, "sequences of the domain's valid text for the gate; 0: all")
  verb.boolean('require_gain', 'exit 3 and write nothing if it is no better than its parent')
  given, _ = verb.parse(argv)
  model, expert = _model(given), require(given.expert, 'expert', 'the name of the new expert')
  source = require(given['from'].value, 'from', 'the run that trained its FFNs')
  workdir = require(given.workdir, 'workdir', NEW)
  if given.limit < 0:
    raise BadInput(f'--limit={given.limit} is below 0: 0 takes all valid text')
  from demix.lifecycle.add import add
  add(model, expert, source, workdir, require_gain=given.require_gain, data=given.data,
      limit=given.limit)


def _remove(verb, argv):
  verb.string('expert', '', 'the expert to remove')
  verb.string('workdir', '', NEW)
  verb.strings('search', "a folder to look for traces below, besides that of the model's workdir")
  given, _ = verb.parse(argv)
  model, expert = _model(given), require(given.expert, 'expert', 'the expert to remove')
  workdir = require(given.workdir, 'workdir', NEW)
  from demix.lifecycle.remove import remove
  remove(model, expert, workdir, search=given.search)
