"""Multiple choice by log-likelihood: which option does a language model go on with?

The prompt is evidence for the mixture and is never scored; of an option every token is. An option
is chosen by its summed log-likelihood, or by that per byte (long options are not at a loss then).
"""

import dataclasses
import math

import numpy as np
import orjson

from demix.errors import BadInput
from demix.loading.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, its options as they continue it, and the index of the right one."""
  prompt: str
  options: tuple
  answer: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Shares of right answers: by summed log-likelihood and by that per byte; over n questions."""
  accuracy: float
  per_byte: float
  questions: int

  @property
  def error(self) -> float:
    """Standard error of `accuracy`."""
    return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


def read(path: str) -> list[Question]:
  """Questions of a JSON Lines file: {"prompt", "options": [two or more], "answer"}, the answer an
  index or the option itself.

  Raises:
    BadInput: the file cannot be read, or a line is not of that form; it is named.
  """
  try:
    with open(path, 'rb') as f:
      lines = f.read().splitlines()
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  out = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      out.append(_question(line, f'{path}:{number}'))
  if not out:
    raise BadInput(f'{path}: no questions in it')
  return out


def _question(line, where) -> Question:
  form = 'expected {"prompt": text, "options": [texts], "answer": index or option}'
  try:
    found = orjson.loads(line)
    prompt, options, answer = found['prompt'], found['options'], found['answer']
  except (orjson.JSONDecodeError, KeyError, TypeError) as e:
    raise BadInput(f'{where}: {form} ({type(e).__name__}: {e})') from None
  texts = isinstance(options, list) and all(isinstance(o, str) and o for o in options)
  if not isinstance(prompt, str) or not texts or len(options) < 2:
    raise BadInput(f'{where}: {form}, at least two options, none empty')
  if isinstance(answer, str) and options.count(answer) == 1:
    answer = options.index(answer)
  if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
    raise BadInput(f'{where}: answer {answer!r} is none of {len(options)} options')
  return Question(prompt, tuple(options), answer)


def accuracy(lm: LanguageModel, questions, progress=None) -> Accuracy:
  """How many questions a language model gets right; `progress` is called with how many are done.

  Raises:
    BadInput: an option longer than the context.
  """
  right = np.zeros(2)
  for done, question in enumerate(questions, 1):
    nats = lm.continuations(question.prompt, question.options)
    sizes = np.asarray([len(option.encode()) for option in question.options])
    right += [int(np.argmax(nats)) == question.answer,
              int(np.argmax(nats / sizes)) == question.answer]
    if progress:
      progress(done)
  return Accuracy(*(right / len(questions)).tolist(), len(questions))
