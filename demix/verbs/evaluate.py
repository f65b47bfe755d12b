"""evaluate: perplexity and bits per byte per domain, for one or more models, in one table."""

from pathlib import Path

from demix.errors import BadInput
from demix.verbs.flags import Verb

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
  verb.integer('stride', 0, 'tokens scored per window; 0: blocks that do not overlap (the papers)',
               low=0)
  verb.integer('limit', 0, 'windows per domain, the first ones; 0: all', low=0)
  verb.integer('batch_size', 32, 'windows per forward pass', low=1)
  verb.string('force', '', "the expert or <domain> symbol given on domains that were not trained "
              "on; by default the one that is best on the domain's valid text")
  verb.config(MixConfig, 'WAYS', 'mix', 'mix the experts of DEMix LMs: all, or a comma-separated '
              f'list of {", ".join(WAYS)}, or a config file, configs/mix.py:ARG')
  verb.string('posterior', 'prefix,last_token', 'evidence of the ways that look at the text')
  verb.string('prior', '', 'FILE[:DOMAIN] of stored priors: cached priors are taken from there and '
              'not estimated; with :DOMAIN its prior is used on every domain')
  verb.string('save_priors', '', 'write the cached priors that are estimated here')
  verb.string('dump', '', 'write log-likelihoods, weights and prior of the first way that mixes '
              'here (.npz)')
  verb.string('options', '', 'instead of perplexity, accuracy on this file of multiple choice: '
              '{"prompt", "options", "answer"} a line; --mix: average, uniform, cached, a file')
  verb.string('out', '', 'also write results.json here')
  given, mix = verb.parse(argv)
  if not given.model:
    raise BadInput('--model is missing: name one or more, for example --model=dense=W')

  from demix import reference
  models = {}
  for text in given.model:
    name, ref = reference.named(text)
    name = name or reference.parse(ref).workdir.resolve().name
    if name in models:
      raise BadInput(f'two models are named {name!r}: write --model=OTHER={ref}')
    reference.parse(ref)
    models[name] = ref
  for flag in ('out', 'dump', 'save_priors'):
    file = Path(getattr(given, flag)) if getattr(given, flag) else None
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
      raise BadInput(f'--{flag}={file}: not a file in a folder that exists; make the folder first')
  mixes = [w.strip() for w in given.mix_words.split(',') if w.strip()]
  if mix != MixConfig() and not mixes:
    raise BadInput('--mix.KEY=VALUE without --mix: say which ways of mixing, --mix=all')
  posteriors = [w.strip() for w in given.posterior.split(',') if w.strip()]
  for flag in ('dump', 'prior', 'save_priors'):
    if getattr(given, flag) and not mixes:
      raise BadInput(f'--{flag} needs --mix: without it the experts are not mixed')
  from demix.eval import mixing, protocol, results
  from demix.mix import prior
  if mixes == ['file']:
    mix.check()
    modes = (mixing.Mode('mix', mix),)
  else:
    modes = mixing.modes(mixing.NAMES if mixes == ['all'] else mixes, posteriors, mix)
  if given.options:
    return choose(models, given, modes)
  stored, estimated = {}, []
  if given.prior:
    file, _, domain = given.prior.partition(':')
    stored = {('' if domain else p.domain, p.posterior): p for p in prior.load(file)
              if domain in ('', p.domain)}
    if not stored:
      prior.find(file, domain)
  domains = tuple(dict.fromkeys(d.strip() for d in given.domains.split(',') if d.strip()))
  content = protocol.evaluate(
      models, data=given.data, domains=domains, split=given.split, stride=given.stride,
      limit=given.limit, batch_size=given.batch_size, force=given.force, modes=modes,
      stored=stored, dump=given.dump, estimated=estimated)
  print(protocol.report(content))
  if given.save_priors:
    prior.save(given.save_priors, estimated)
  if given.out:
    results.write(given.out, content)
  files = [f'{what:<11} {file}' for what, file in (
      ('results', given.out), ('priors', given.save_priors), ('dump', given.dump)) if file]
  print(''.join(f'\n{line}' for line in files))
  return 0


def choose(models: dict, given, modes) -> int:
  """Prints, for every model and way of mixing, the accuracy on a file of multiple choice."""
  from demix import language_model, multiple_choice, reference
  from demix.eval.results import layout
  from demix.mix.mix_config import MixConfig
  from demix.progress import Progress
  for flag in ('out', 'dump', 'save_priors'):
    if getattr(given, flag):
      raise BadInput(f'--{flag} goes with perplexity, not with --options')
  for mode in modes:
    if mode.single or mode.config.prior == 'updating':
      raise BadInput(f'--options with --mix={mode.name}: a question is no stream of a domain; '
                     'average, uniform or cached (with --prior), or a model reference W#EXPERT')
  questions = multiple_choice.read(given.options)
  lines = [['run', 'mix', 'accuracy', 'error', 'per byte', 'questions']]
  for name, ref in models.items():
    loaded = reference.load(ref)
    many = len(loaded.members.names) > 1
    for config in [m.config for m in modes if many] or [MixConfig()]:
      cached = given.prior if config.prior == 'cached' else None
      lm = language_model.of(loaded, config, data=given.data, given=given.force, prior=cached)
      way = f'{config.prior} {config.posterior}' if many else loaded.expert or ''
      with Progress(len(questions), 'questions', f'evaluate {name}') as progress:
        found = multiple_choice.accuracy(lm, questions, progress.update)
      lines.append([name, way, f'{found.accuracy:.3f}', f'{found.error:.3f}',
                    f'{found.per_byte:.3f}', str(found.questions)])
  print(layout(lines))
  return 0
