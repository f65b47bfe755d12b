"""generate: text from a model, one expert, or a mixture whose posterior moves with every token."""

import sys
import time
from pathlib import Path

from demix.errors import BadInput
from demix.verbs.flags import Verb, require

SUMMARY = 'text from a model, one expert or a mixture of experts'


def run(argv: list[str]) -> int:
  """Parses flags, streams the text to the terminal, ends with the weight of each expert."""
  from demix import settings
  from demix.generation.sampling_config import SamplingConfig
  from demix.loading import reference
  from demix.mix.mix_config import MixConfig
  verb = Verb('generate', SUMMARY)
  verb.string('model', '', 'model reference: W, W@STEP, or W#EXPERT for one expert')
  verb.string('prompt', '', 'text to go on from')
  verb.string('prompt_file', '', 'a file with that text')
  numbers = verb.numbers(SamplingConfig)
  verb.strings('stop', 'a string that ends the text')
  verb.config(MixConfig, 'PRIOR', 'mix', 'how experts are mixed: none, uniform, cached (with '
              '--prior), or a config file, configs/mix.py:ARG; uniform by default')
  verb.string('prior', '', 'FILE:DOMAIN, a stored prior (evaluate --save_priors)')
  verb.string('given', '', '+DomainToken LMs: whose <domain> symbol starts the text')
  verb.string('data', '', "token store to take the tokenizer from; the run's own by default")
  given, mix = verb.parse(argv)
  model = require(given.model, 'model', 'a model reference, for example W or W#legal')
  reference.parse(model)
  if given.mix_words not in ('', 'file'):
    mix = settings.from_dict(MixConfig, settings.to_dict(mix) | {'prior': given.mix_words}, 'mix')
  if bool(given.prompt) == bool(given.prompt_file):
    raise BadInput('give either --prompt=TEXT or --prompt_file=FILE')
  prompt = given.prompt or read(given.prompt_file)
  sampling = {name: getattr(given, name) for name in numbers}
  SamplingConfig(**sampling, stop=tuple(given.stop)).check()
  mix.check()
  if given.prior and given.mix_words and mix.prior != 'cached':
    raise BadInput(f'--prior={given.prior} with --mix={given["mix_words"].value}, whose prior is '
                   f'{mix.prior}: a stored prior is a cached one; give --mix=cached')

  from demix.loading import language_model
  loaded = reference.load(model)
  if len(loaded.members.names) == 1 and (given.mix_words or mix != MixConfig()):
    raise BadInput(f'--mix: {model} is one LM: there is nothing to mix; leave it out')
  lm = language_model.of(loaded, mix, prior=given.prior or None, data=given.data,
                         given=given.given)
  start = time.monotonic()
  def show(text):
    sys.stdout.write(text)
    sys.stdout.flush()
  out = lm.generate(prompt, on_text=show, echo=True, stop=tuple(given.stop), **sampling)
  seconds = time.monotonic() - start
  print(f'\n\n{len(out.ids)} tokens in {seconds:.1f} s with compilation; ended by {out.ended}',
        file=sys.stderr)
  if len(lm.experts) > 1:
    print(weights(out), file=sys.stderr)
  return 0


def weights(out) -> str:
  """Each expert's weight: after the prompt, and over the written tokens."""
  from demix.eval.results import layout
  lines = [['expert', 'after the prompt', 'while writing']]
  for name, weight in sorted(out.after_prompt.items(), key=lambda item: -item[1]):
    wrote = f'{out.weights[name]:.3f}' if name in out.weights else 'not run'
    lines.append([name, f'{weight:.3f}', wrote])
  return layout(lines)


def read(path: str) -> str:
  """The text of a file. BadInput: it cannot be read, is empty, or is not UTF-8."""
  try:
    text = Path(path).read_text(encoding='utf-8')
  except OSError as e:
    raise BadInput(f'--prompt_file={path}: cannot be read ({e.strerror})') from None
  except UnicodeDecodeError as e:
    raise BadInput(f'--prompt_file={path}: not UTF-8 ({e.reason} at byte {e.start})') from None
  if not text:
    raise BadInput(f'--prompt_file={path}: an empty prompt: nothing to go on from')
  return text
