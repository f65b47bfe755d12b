"""merge: parameters of several LMs averaged into one LM."""

import re

from demix.errors import BadInput
from demix.loading import reference
from demix.verbs.flags import Verb, require

SUMMARY = 'parameters of several LMs averaged into one LM'


def run(argv: list[str]) -> int:
  """Parses flags and averages."""
  verb = Verb('merge', SUMMARY)
  verb.strings('model', 'whole LM: W or W@STEP, with an optional NAME= before it; or forest:F')
  verb.string('workdir', '', 'folder of the result; must not exist')
  verb.string('weights', 'uniform', 'uniform; numbers, one for each model; posterior: the cached '
              'prior on the valid text of --domain; argmax: the model with the largest')
  verb.string('domain', '', 'whose valid text the posterior is estimated on')
  verb.string('data', '', "token store; the first model's own by default")
  verb.string('guard', '', 'comma-separated domains: exit 3 and write nothing if the result is '
              'worse there than its best parent, on valid text')
  verb.boolean('verify_data', "compare the valid text with the digests in its store's card first",
               default=True)
  verb.boolean('unrelated', 'average even models without a common ancestor')
  given, _ = verb.parse(argv)
  if not given.model:
    raise BadInput('--model is missing: name two or more, or forest:F')
  workdir = require(given.workdir, 'workdir', 'where the result goes')
  models = {}
  for text in given.model:
    name, ref = reference.named(text)
    parsed = reference.parse(ref)
    name = name or parsed.workdir.resolve().name + (
        '' if parsed.step is None else f'@{parsed.step}')
    if name in models:
      raise BadInput(f'two models are named {name!r}: write --model=OTHER={ref}')
    models[name] = ref
  weights = given.weights
  if re.fullmatch(r'[-+.,\d\seE]+', weights):
    try:
      weights = [float(w) for w in weights.split(',')]
    except ValueError:
      raise BadInput(f'--weights={given.weights}: numbers with commas between them') from None
  estimated = weights in ('posterior', 'argmax')
  for flag, used in (('domain', estimated), ('data', estimated or given.guard)):
    if getattr(given, flag) and not used:
      raise BadInput(f'--{flag}={getattr(given, flag)} has no effect: no valid text is read with '
                     f'--weights={given.weights}{" and no --guard" if flag == "data" else ""}; '
                     'leave it out')
  from demix.lifecycle import average
  guard = tuple(d.strip() for d in given.guard.split(',') if d.strip())
  average.merge(models, workdir, weights=weights, domain=given.domain, data=given.data, guard=guard,
                unrelated=given.unrelated, verify_data=given.verify_data)
  return 0
