"""evaluate: perplexity and bits per byte per domain, for one or more models, in one table."""

from demix.errors import BadInput
from demix.settings import nearest as suggest
from demix.verbs.flags import Verb

TABLES = ('perplexity', 'bits_per_byte', 'priors', 'ledger')
WAYS = ('given', 'best', 'average', 'uniform', 'updating', 'cached', 'clusters')

SUMMARY = 'perplexity and bits per byte per domain, for one or more models'


def run(argv: list[str]) -> int:
  """Parses flags, evaluates every model on every domain, prints the table, writes JSON."""
  from demix.mix.mix_config import MixConfig
  verb = Verb('evaluate', SUMMARY)
  verb.strings('model', 'model reference W, W@STEP or W#EXPERT, with an optional NAME= before it')
  verb.string('data', '', "token store; the first model's own by default")
  verb.string('domains', '', 'comma-separated domains; all that the store has by default')
  verb.string('split', 'test', 'split to score')
  verb.string('packing', '', 'continuous or document: how text is cut; by default as each model '
              'was trained')
  verb.integer('stride', 0, 'tokens scored per window; 0: blocks that do not overlap (the papers)',
               low=0)
  verb.integer('limit', 0, 'sequences per domain, a fixed sample that is the same for all models; '
               '0: all', low=0)
  verb.integer('batch_size', 32, 'sequences per forward pass', low=1)
  verb.string('force', '', "the expert or <domain> symbol given on domains that were not trained "
              "on; by default the one that is best on the domain's valid text")
  verb.config(MixConfig, 'WAYS', 'mix', 'mix the experts of DEMix LMs: all, or a comma-separated '
              f'list of {", ".join(WAYS)}, or a config file, configs/mix.py:ARG')
  verb.string('posterior', '', 'evidence of the ways that look at the text; prefix,last_token by '
              'default')
  verb.string('prior', '', 'FILE[:DOMAIN] of stored priors: cached priors are taken from there and '
              'not estimated; with :DOMAIN its prior is used on every domain')
  verb.string('save_priors', '', 'write the cached priors that are estimated here')
  verb.string('dump', '', 'write log-likelihoods, weights and prior of the first way that mixes '
              'here (.npz)')
  verb.string('options', '', 'instead of perplexity, accuracy on this file of multiple choice: '
              '{"prompt", "options", "answer"} a line; --mix: average, uniform, cached, a file')
  verb.string('out', '', 'also write results.json here, with all that the tables leave out')
  verb.boolean('verify_data', "compare the text with the digests in its store's card first",
               default=True)
  verb.string('tables', 'perplexity', 'what is printed: perplexity, bits_per_byte, priors, ledger, '
              'or all')
  given, mix = verb.parse(argv)
  if not given.model:
    raise BadInput('--model is missing: name one or more, for example --model=dense=W')

  from demix.loading import reference
  from demix.runtime import workdir
  models = {}
  for text in given.model:
    name, ref = reference.named(text)
    name = name or reference.parse(ref).workdir.resolve().name
    if name in models:
      raise BadInput(f'two models are named {name!r}: write --model=OTHER={ref}')
    reference.parse(ref)
    models[name] = ref
  for flag in ('out', 'dump', 'save_priors'):
    if getattr(given, flag):
      workdir.check_writable(getattr(given, flag), f'--{flag}')
  mixes = words(given.mix_words)
  if mix != MixConfig() and not mixes:
    raise BadInput('--mix.KEY=VALUE without --mix: say which ways of mixing, --mix=all')
  for flag in ('dump', 'prior', 'save_priors', 'posterior'):
    if getattr(given, flag) and not mixes:
      raise BadInput(f'--{flag} needs --mix: without it the experts are not mixed')
  ways = _ways(given, mixes, mix)
  tables = TABLES if given.tables == 'all' else words(given.tables)
  for name in tables:
    if name not in TABLES:
      raise BadInput(f'--tables={name}: no such table{suggest(name, (*TABLES, "all"))}')
  from demix.data.tokens.packing import PACKINGS
  if given.packing and given.packing not in PACKINGS:
    raise BadInput(f'--packing={given.packing}: no such way{suggest(given.packing, PACKINGS)}')
  cached = ways and any(m.config.prior == 'cached' for m in ways.modes)
  for flag in ('prior', 'save_priors'):
    if getattr(given, flag) and not cached:
      raise BadInput(f'--{flag} has no effect on --mix={given.mix_words}: no way of mixing has a '
                     'cached prior; add cached, or leave it out')
  if given.prior and given.save_priors:
    raise BadInput('--save_priors with --prior: none are estimated; leave one of them out')
  for name in ('alpha', 'blocks', 'blocks_per_update') if given.prior else ():
    if name in ways.options and all(way.startswith('cached') for way in ways.read_by[name]):
      raise BadInput(f'mix.{name}={ways.options[name]} has no effect with --prior={given.prior}: '
                     'priors are taken from there and not estimated; leave one of them out')
  if given.options:
    return choose(models, given, ways.modes if ways else ())
  from demix.eval import protocol, results
  from demix.mix import prior
  estimated = []
  content = protocol.evaluate(models, protocol.Request(
      data=given.data, domains=tuple(dict.fromkeys(words(given.domains))), split=given.split,
      batch_size=given.batch_size, packing=given.packing, stride=given.stride, limit=given.limit,
      force=given.force, ways=ways, prior=given.prior, dump=given.dump,
      verify_data=given.verify_data), estimated)
  print(protocol.report(content, tables))
  if given.save_priors:
    prior.save(given.save_priors, estimated)
  if given.out:
    results.write(given.out, content)
  files = [f'{what:<11} {file}' for what, file in (
      ('results', given.out), ('priors', given.save_priors), ('dump', given.dump)) if file]
  print(''.join(f'\n{line}' for line in files))
  return 0


def words(text: str) -> list[str]:
  """'a, b' → ['a', 'b']."""
  return [w.strip() for w in text.split(',') if w.strip()]


def _ways(given, mixes: list, mix):
  """The eval.ways.Ways that are asked for, or None."""
  from demix.eval import ways
  if not mixes:
    return None
  posteriors = words(given.posterior)
  names = ways.NAMES if mixes == ['all'] else mixes
  if mixes == ['file'] or not {'uniform', 'updating', 'cached'} & set(names):
    if posteriors:
      why = 'the config file says it' if mixes == ['file'] else 'no way of mixing reads it'
      raise BadInput(f'--posterior={given.posterior} has no effect: {why}; leave it out')
  if mixes == ['file']:
    return ways.Ways.of((ways.Mode('mix', mix),), mix)
  return ways.ways(names, posteriors or ['prefix', 'last_token'], mix)


def choose(models: dict, given, modes) -> int:
  """Prints, for every model and way of mixing, the accuracy on a file of multiple choice."""
  for flag in ('out', 'dump', 'save_priors', 'packing', 'stride', 'limit', 'domains', 'split',
               'batch_size', 'tables', 'verify_data'):
    if given[flag].present:
      raise BadInput(f'--{flag} goes with perplexity, not with --options')
  for mode in modes:
    if mode.single or mode.config.prior == 'updating':
      raise BadInput(f'--options with --mix={mode.name}: a question is no stream of a domain; '
                     'average, uniform or cached (with --prior), or a model reference W#EXPERT')
  from demix.config import domain_symbols
  from demix.eval import multiple_choice
  from demix.eval.results import layout
  from demix.loading import language_model, reference
  from demix.mix.mix_config import MixConfig
  from demix.runtime.progress import Progress
  questions = multiple_choice.read(given.options)
  lines = [['run', 'mix', 'accuracy', 'error', 'per byte', 'questions']]
  found = {name: reference.load(ref) for name, ref in models.items()}
  if modes and all(len(one.members.names) == 1 for one in found.values()):
    raise BadInput(f'--mix: none of {", ".join(found)} is a DEMix LM or a forest: there is nothing '
                   'to mix')
  symbols = [name for name, one in found.items() if domain_symbols(one.config) is not None]
  if given.force and not symbols:
    raise BadInput(f'--force={given.force} has no effect: with --options it is for +DomainToken '
                   'LMs; name an expert as W#EXPERT')
  for name, loaded in found.items():
    many = len(loaded.members.names) > 1
    for config in [m.config for m in modes if many] or [MixConfig()]:
      cached = given.prior if config.prior == 'cached' else None
      lm = language_model.of(loaded, config, data=given.data, prior=cached,
                             given=given.force if name in symbols else '')
      way = f'{config.prior} {config.posterior}' if many else loaded.expert or ''
      with Progress(len(questions), 'questions', f'evaluate {name}') as progress:
        right = multiple_choice.accuracy(lm, questions, progress.update)
      lines.append([name, way, f'{right.accuracy:.3f}', f'{right.error:.3f}',
                    f'{right.per_byte:.3f}', str(right.questions)])
  print(layout(lines))
  return 0
