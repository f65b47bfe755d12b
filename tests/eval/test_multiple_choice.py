"""multiple_choice.py: accuracy by the log-likelihood of options; the prompt is evidence."""

import json

import corpus
import numpy as np
import pytest
import runs

import demix
from demix.errors import BadInput
from demix.eval import multiple_choice
from demix.eval.multiple_choice import Question


@pytest.fixture(scope='module')
def lm(models):
  return demix.load(str(models['demix']))


def questions():
  """Which of four domains does a text go on in? Prompts are longer and shorter than the context."""
  out = []
  for i, domain in enumerate(corpus.DOMAINS):
    words = [w for w in corpus.WORDS[domain].split() if len(w.encode()) < 12]
    options = [' '.join(corpus.WORDS[d].split()[2:4])[:9] for d in corpus.DOMAINS]
    for count in (3, 12):
      out.append(Question(' '.join(words[:count]) + ' ', tuple(options), i))
  return out


def test_continuations_are_scored_after_the_prompt_and_only_they(lm):
  prompt, options = 'def f(x): ', ('return', ' # ok', 'ω')
  nats = lm.continuations(prompt, options)
  for option, value in zip(options, nats):
    whole = lm.score(prompt + option)
    np.testing.assert_allclose(value, whole.logp[len(prompt):].sum(), rtol=1e-5)


def test_a_long_prompt_loses_its_beginning(lm):
  prompt = 'salt BUTTER ' * 5
  [value] = lm.continuations(prompt, ['Café'])
  kept = prompt[-(32 - len('Café'.encode())):]
  np.testing.assert_allclose(value, lm.score(kept + 'Café').logp[len(kept):].sum(), rtol=1e-5)
  assert np.isfinite(lm.continuations('', ['x' * 32]))
  with pytest.raises(BadInput, match='option of 33 tokens: a context of 32'):
    lm.continuations('a', ['x' * 33])


def test_a_model_that_knows_the_domains_is_right_and_counts_are_exact(lm, models):
  asked = questions()
  found = multiple_choice.accuracy(lm, asked)
  nats = [lm.continuations(q.prompt, q.options) for q in asked]
  assert found.accuracy == np.mean([n.argmax() == q.answer for n, q in zip(nats, asked)])
  assert found.questions == 8 and found.accuracy > 0.6
  wrong = [Question(q.prompt, q.options, (q.answer + 1) % 4) for q in asked]
  assert multiple_choice.accuracy(lm, wrong).accuracy <= 1 - found.accuracy


def test_the_verb_prints_a_line_for_every_model_and_way(models, tmp_path):
  file = tmp_path / 'q.jsonl'
  file.write_text('\n'.join(json.dumps(
      {'prompt': q.prompt, 'options': q.options, 'answer': q.options[q.answer]})
      for q in questions()) + '\n\n')
  ended = runs.demix('evaluate', f'--model=dense={models["dense"]}', '--mix=average,uniform',
                     f'--model=demix={models["demix"]}', f'--model=one={models["demix"]}#code',
                     f'--options={file}')
  assert ended.code == 0, ended
  lines = [line.split() for line in ended.out.splitlines()[2:]]
  assert [line[0] for line in lines] == ['dense', 'demix', 'demix', 'demix', 'one']
  assert [line[1:-4] for line in lines] == [[], ['none', 'none'], ['uniform', 'prefix'],
                                            ['uniform', 'last_token'], ['code']]
  expected = multiple_choice.accuracy(demix.load(str(models['demix'])), questions())
  assert lines[2][-4:-1] == [f'{expected.accuracy:.3f}', f'{expected.error:.3f}',
                             f'{expected.per_byte:.3f}']


@pytest.mark.parametrize(('line', 'said'), [
    ('{"prompt": "a", "options": ["b", "c"]', 'JSONDecodeError'), ('{"prompt": "a"}', 'KeyError'),
    ('[1]', 'TypeError'), ('{"prompt": "a", "options": ["b"], "answer": 0}', 'at least two'),
    ('{"prompt": "a", "options": ["b", ""], "answer": 0}', 'none empty'),
    ('{"prompt": "a", "options": ["b", "c"], "answer": 2}', 'answer 2 is none of 2'),
    ('{"prompt": "a", "options": ["b", "c"], "answer": "d"}', "answer 'd' is none"),
    ('{"prompt": "a", "options": ["b", "b"], "answer": "b"}', "answer 'b' is none"),
    ('{"prompt": "a", "options": ["b", "c"], "answer": true}', 'answer True')])
def test_a_line_that_is_no_question_is_named(tmp_path, line, said):
  file = tmp_path / 'q.jsonl'
  file.write_text('{"prompt": "a", "options": ["b", "c"], "answer": "c"}\n' + line)
  with pytest.raises(BadInput, match=r'q\.jsonl:2: .*' + said.replace('(', r'\(')):
    multiple_choice.read(str(file))


def test_what_does_not_go_with_options_is_refused(models, tmp_path):
  W = f'--model={models["demix"]}'
  (tmp_path / 'empty').write_text('\n')
  for flags, said in (([f'--options={tmp_path / "none"}'], 'cannot be read'),
                      ([f'--options={tmp_path / "empty"}'], 'no questions'),
                      (['--options=q', '--mix=updating'], 'no stream of a domain'),
                      (['--options=q', '--mix=given'], 'no stream of a domain'),
                      (['--options=q', f'--out={tmp_path / "r.json"}'], 'goes with perplexity')):
    assert said in runs.demix('evaluate', W, *flags).error(2)
