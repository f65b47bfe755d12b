"""evaluate: perplexity and bits per byte per domain, for one or more models, in one table."""

import re
from pathlib import Path

from demix.errors import BadInput
from demix.verbs.flags import Verb

SUMMARY = 'perplexity and bits per byte per domain, for one or more models'


def run(argv: list[str]) -> int:
  """Parses flags, evaluates every model on every domain, prints the table, writes JSON."""
  verb = Verb('evaluate', SUMMARY)
  verb.strings('model', 'model reference W, W@STEP or W#EXPERT, with an optional NAME= before it')
  verb.string('data', '', "token store; the first model's own by default")
  verb.string('domains', '', 'comma-separated domains; all that the store has by default')
  verb.string('split', 'test', 'split to score')
  verb.integer('stride', 0, 'tokens scored per window; 0: blocks that do not overlap (the papers)')
  verb.integer('limit', 0, 'windows per domain, the first ones; 0: all')
  verb.integer('batch_size', 32, 'windows per forward pass')
  verb.string('force', '', "the expert or <domain> symbol given on domains that were not trained "
              "on; by default the one that is best on the domain's valid text")
  verb.string('out', '', 'also write results.json here')
  given, _ = verb.parse(argv)
  if not given.model:
    raise BadInput('--model is missing: name one or more, for example --model=dense=W')

  from demix import reference
  models = {}
  for text in given.model:
    named = re.fullmatch(r'([\w.+-]+)=(.+)', text)  # a / before the = is part of a path
    name, ref = named.groups() if named else (reference.parse(text).workdir.resolve().name, text)
    if name in models:
      raise BadInput(f'two models are named {name!r}: write --model=OTHER={ref}')
    reference.parse(ref)
    models[name] = ref
  out = Path(given.out) if given.out else None
  if out and (out.is_dir() or not out.absolute().parent.is_dir()):
    raise BadInput(f'--out={out}: not a file in a folder that exists; make the folder first')
  from demix.eval import protocol, results
  domains = tuple(dict.fromkeys(d.strip() for d in given.domains.split(',') if d.strip()))
  content = protocol.evaluate(
      models, data=given.data, domains=domains, split=given.split, stride=given.stride,
      limit=given.limit, batch_size=given.batch_size, force=given.force)
  print(protocol.report(content))
  if out:
    results.write(out, content)
    print(f'\nresults     {out}')
  return 0
