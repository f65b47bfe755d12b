"""demix.load: scores, weights and text from Python are those of the evaluation and the verbs."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import corpus
import numpy as np
import pytest
import runs

import demix
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, NothingToLoad, Refused
from demix.eval import perplexity
from demix.eval.sequences import Protocol
from demix.loading import reference
from demix.mix import prior

ROOT = Path(__file__).parents[2]
TEXT = corpus.document('code', 'a text of some length 7')


@pytest.fixture(scope='module')
def lm(models):
  return demix.load(str(models['demix']))


@pytest.fixture(scope='module')
def priors(models, tmp_path_factory):
  file = tmp_path_factory.mktemp('priors') / 'priors.json'
  ended = runs.demix('evaluate', f'--model={models["demix"]}', '--mix=cached', '--mix.blocks=8',
                     '--domains=code,verse', f'--save_priors={file}')
  assert ended.code == 0, ended
  return file


def test_a_score_has_every_token_and_the_weights_it_was_scored_with(lm):
  score = lm.score(TEXT)
  n = len(TEXT.encode())
  assert score.logp.shape == (n,) and score.weights.shape == (4, n) and score.bytes == n
  assert score.experts == corpus.DOMAINS
  np.testing.assert_allclose(score.weights.sum(0), 1, rtol=1e-5)
  np.testing.assert_allclose(score.weights[:, ::32], 0.25, rtol=1e-5)  # blocks start anew
  assert score.perplexity == math.exp(-score.logp.mean(dtype=np.float64))
  assert score.bits_per_byte == pytest.approx(score.nll / math.log(2))
  # The text's own expert is known within a few tokens.
  assert score.weights[corpus.DOMAINS.index('code'), 10:32].min() > 0.9


def test_many_texts_score_as_each_alone_and_ids_as_text(lm):
  texts = [TEXT, 'ω θάλασσα', TEXT[:31], TEXT[:33]]
  together, alone = lm.score(texts), [lm.score(t) for t in texts]
  for a, b in zip(together, alone):
    np.testing.assert_allclose(a.logp, b.logp, atol=2e-5)
  ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
  np.testing.assert_array_equal(lm.score(ids).logp, alone[0].logp)
  np.testing.assert_array_equal(lm.score(ids.tolist()).logp, alone[0].logp)


def test_one_expert_scores_a_stream_as_evaluate_does(models, stores):
  # evaluate's stream of a split begins with end-of-document, as a text does.
  one = demix.load(f'{models["demix"]}#legal')
  store = TokenStore.open(stores.bytes)
  ids = np.asarray(store.tokens('legal', 'test'))
  loaded = reference.load(f'{models["demix"]}#legal')
  [expected] = perplexity.evaluate(loaded.model, loaded.params, store,
                                   [perplexity.Part('legal', 'test', 0)], protocol=Protocol(32))
  score = one.score(ids)
  assert len(score.ids) == expected.tokens and score.bytes == expected.bytes
  assert score.nll == pytest.approx(expected.mean_nll, rel=1e-6)
  assert one.experts == ('legal',)


@pytest.mark.parametrize('posterior', ['prefix', 'last_token'])
def test_an_updating_prior_scores_a_stream_as_evaluate_does(models, tmp_path, posterior):
  ended = runs.demix('evaluate', f'--model={models["demix"]}', '--mix=updating',
                     f'--posterior={posterior}', '--domains=verse', f'--out={tmp_path / "r.json"}')
  assert ended.code == 0, ended
  import json
  [row] = json.loads((tmp_path / 'r.json').read_text())['rows']
  lm = demix.load(str(models['demix']), {'prior': 'updating', 'posterior': posterior})
  loaded = reference.load(str(models['demix']))
  ids = np.asarray(TokenStore.open(loaded.config.data.path).tokens('verse', 'test'))
  assert lm.score(ids).nll == pytest.approx(row['nll'], rel=1e-5)


def test_weights_are_those_of_the_token_after_the_text(lm):
  longer = lm.score(TEXT[:21])
  weights = lm.weights(TEXT[:20])
  np.testing.assert_allclose(list(weights.values()), longer.weights[:, -1], atol=2e-5)
  assert max(weights, key=weights.get) == 'code'


def test_text_is_streamed_and_comes_back_whole(lm):
  pieces = []
  out = lm.generate(TEXT[:6], max_tokens=12, seed=3, temperature=1.0, echo=True,
                    on_text=pieces.append)
  assert ''.join(pieces) == TEXT[:6] + out.text == str(out)
  assert len(out.ids) == 12 and out.ended == 'max_tokens'
  assert out == lm.generate(TEXT[:6], max_tokens=12, seed=3, temperature=1.0)
  assert out.ids != lm.generate(TEXT[:6], max_tokens=12, seed=4, temperature=1.0).ids
  assert sum(out.weights.values()) == pytest.approx(1, abs=1e-5)


def test_a_stop_string_ends_the_text_and_is_left_out(lm):
  options = dict(max_tokens=20, temperature=1.0, seed=1)
  whole = lm.generate('def f', **options).text
  stop, pieces = whole[5:8], []
  assert len(set(stop)) > 1
  out = lm.generate('def f', stop=(stop, 'never'), on_text=pieces.append, **options)
  assert out.text == whole[:whole.index(stop)] == ''.join(pieces) and out.ended == 'stop'


def test_the_end_of_a_document_and_of_the_context_end_a_text(lm):
  # 31 bytes and the end-of-document before them fill the context: one more token is predicted.
  out = lm.generate('x' * 31, max_tokens=9, temperature=0)
  assert (out.ended, len(out.ids)) in (('context', 1), ('end of document', 0))
  texts = [lm.generate('0 def', max_tokens=26, temperature=2.0, seed=s) for s in range(10)]
  assert {t.ended for t in texts} >= {'end of document', 'max_tokens'}
  assert all(256 not in t.ids for t in texts)


def test_characters_of_several_bytes_are_shown_whole(lm):
  pieces = []
  lm.generate('ω θάλ', max_tokens=20, temperature=0, on_text=pieces.append)
  assert pieces and all('\ufffd' not in p for p in pieces[:-1])


def test_priors_by_list_by_name_and_stored(models, lm, priors):
  W = str(models['demix'])
  by_list = demix.load(W, prior=[0, 1, 0, 0]).score(TEXT)
  by_name = demix.load(W, prior={'code': 1.0}).score(TEXT)
  np.testing.assert_array_equal(by_list.logp, by_name.logp)
  np.testing.assert_allclose(by_list.logp, demix.load(f'{W}#code').score(TEXT).logp, atol=4e-6)
  lm = demix.load(W)
  stored = prior.find(priors, lm.experts, reference.load(W).member_digests, 'code', 'prefix')
  lm = demix.load(W, prior=f'{priors}:code')
  np.testing.assert_allclose(lm.score(TEXT).weights[:, 0], list(stored.weights.values()), atol=1e-5)
  with pytest.raises(BadInput, match='0 priors of domain legal'):
    demix.load(W, prior=f'{priors}:legal')


def test_a_stored_prior_is_refused_for_other_experts(models, priors, tmp_path):
  ended = runs.train(reference.load(str(models['demix'])).config.data.path, tmp_path / 'other',
                     model__ffn='demix', train__steps=2)
  assert ended.code == 0, ended
  with pytest.raises(Refused, match='content digest'):
    demix.load(str(tmp_path / 'other'), prior=f'{priors}:code')
  with pytest.raises(Refused, match='estimate it again'):
    demix.load(str(models['demix']), {'members': ('code', 'legal')}, prior=f'{priors}:code')


def test_a_domain_token_model_needs_its_domain(models):
  with pytest.raises(BadInput, match='name one with given='):
    demix.load(str(models['token']))
  one, other = (demix.load(str(models['token']), given=d) for d in ('code', 'verse'))
  assert one.score(TEXT).nll < other.score(TEXT).nll
  assert one.score(TEXT).logp.shape == (len(TEXT.encode()),)
  with pytest.raises(BadInput, match='has no <domain> symbols'):
    demix.load(str(models['dense']), given='code')


def test_the_tokenizer_is_the_workdirs_own_and_another_is_refused(models, stores, tmp_path):
  moved = shutil.copytree(models['demix'], tmp_path / 'W')
  assert reference.load(str(moved)).tokenizer().meta() == reference.load(
      str(models['demix'])).tokenizer(str(stores.bytes)).meta()
  shutil.rmtree(moved / 'data/tokenizer')
  shutil.copytree(stores.bpe / 'tokenizer', moved / 'data/tokenizer')
  with pytest.raises(BadInput, match='was trained with'):
    demix.load(str(moved))
  assert demix.load(str(moved), data=str(stores.bytes)).ids('ab').tolist() == [97, 98]


@pytest.mark.parametrize(('what', 'said'), [
    (lambda lm: lm.score(''), 'text 0 is empty'), (lambda lm: lm.score(['a', '']), 'text 1 is'),
    (lambda lm: lm.score([300]), 'the tokenizer has 0 to 256'),
    (lambda lm: lm.score(np.ones((2, 2), int)), 'a text is a str or a sequence of ids'),
    (lambda lm: lm.generate(''), 'an empty prompt'),
    (lambda lm: lm.generate('x' * 32), 'the prompt has 33 tokens, the context 32'),
    (lambda lm: lm.generate('x', temprature=1.0), 'temprature'),
    (lambda lm: lm.generate('x', top_p=0.0), 'top_p=0.0')])
def test_what_cannot_be_read_is_refused(lm, what, said):
  with pytest.raises(BadInput, match=said):
    what(lm)


@pytest.mark.parametrize(('options', 'said'), [
    ({'mix': 'unifrm'}, "did you mean 'uniform'"), ({'mix': {'priors': 'x'}}, "'prior'"),
    ({'mix': 'cached'}, 'without a prior'), ({'prior': [0.5, 0.5]}, '2 weights for 4 experts'),
    ({'prior': {'cde': 1.0}}, "did you mean 'code'"), ({'prior': [1, 1, 0, 0]}, 'sums to 2'),
    ({'mix': {'experts_k': 5}}, 'experts_k=5 for 4'), ({'mix': {'members': ('x',)}}, "'x'")])
def test_what_cannot_be_mixed_is_refused(models, options, said):
  with pytest.raises(BadInput, match=said):
    demix.load(str(models['demix']), **options)


def test_a_reference_that_leads_nowhere_is_refused(models, tmp_path):
  with pytest.raises(BadInput, match='no such workdir'):
    demix.load(str(tmp_path / 'none'))
  with pytest.raises((BadInput, NothingToLoad)):
    demix.load(f'{models["demix"]}@7')


def test_importing_demix_takes_no_time():
  code = ('import time, sys; t = time.monotonic(); import demix; '
          'print(time.monotonic() - t < 1.5, "jax" in sys.modules, demix.load.__name__)')
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                       check=True).stdout
  assert out == 'True False load\n'


def test_generate_prints_the_text_and_ends_with_the_weights(models, priors, tmp_path):
  (tmp_path / 'prompt').write_text('def f')
  options = ['--max_tokens=12', '--seed=2', '--temperature=1.0']
  by_text = runs.demix('generate', f'--model={models["demix"]}', '--prompt=def f', *options)
  by_file = runs.demix('generate', f'--model={models["demix"]}',
                       f'--prompt_file={tmp_path / "prompt"}', *options)
  assert by_text.code == by_file.code == 0, (by_text, by_file)
  expected = demix.load(str(models['demix'])).generate('def f', max_tokens=12, seed=2,
                                                       temperature=1.0)
  assert by_text.out == by_file.out == f'def f{expected.text}'
  table = by_text.err.splitlines()[-4:]
  assert {line.split()[0] for line in table} == set(corpus.DOMAINS)
  assert [float(line.split()[1]) for line in table] == sorted(
      (round(w, 3) for w in expected.after_prompt.values()), reverse=True)
  two = runs.demix('generate', f'--model={models["demix"]}', '--prompt=def f', *options,
                   '--mix=cached', f'--prior={priors}:code', '--mix.experts_k=2')
  assert two.code == 0 and len([x for x in two.err.splitlines() if x.endswith('0')]) >= 1, two
  alone = runs.demix('generate', f'--model={models["dense"]}', '--prompt=def f', *options)
  assert alone.code == 0 and 'after the prompt' not in alone.err
  for flags in (['--mix=uniform'], ['--mix.temperature=2.0']):
    said = runs.demix('generate', f'--model={models["dense"]}', '--prompt=def f', *flags).error(2)
    assert 'there is nothing to mix' in said


def test_a_lone_surrogate_is_no_text(lm):
  for use in (lm.score, lambda t: lm.score([TEXT, t]), lm.generate, lm.weights,
              lambda t: lm.continuations(t, ['a']), lambda t: lm.continuations('a', [t])):
    with pytest.raises(BadInput, match=r"a lone surrogate \('\\udce9' at character 3\)"):
      use('caf\udce9')


@pytest.mark.parametrize(('flags', 'said'), [
    ([], '--model is missing'), (['--model=W'], 'either --prompt=TEXT or --prompt_file'),
    (['--model=W', '--prompt=x', '--prompt_file=y'], 'either'),
    (['--model=W', '--prompt_file=/no/such'], 'cannot be read'),
    (['--model=W', '--prompt=caf\udce9'], "'--prompt=caf\\udce9' is not UTF-8"),
    (['--model=W', '--prompt=x', '--stop=a', '--stop=\udce9'], "'--stop=\\udce9' is not UTF-8"),
    (['--model=W', '--prompt=x', '--mix=cahced'], "did you mean 'cached'"),
    (['--model=W', '--prompt=x', '--max_tokens=0'], 'max_tokens=0'),
    (['--model=W', '--prompt=x', '--mix=none', '--prior=p.json:law'], 'give --mix=cached'),
    (['--model=W', '--prompt=x', '--mix.decay=2.0'], 'mix.decay=2.0'),
    (['--model=/no/such', '--prompt=x'], 'no such workdir')])
def test_generate_says_what_is_wrong(flags, said):
  assert said in runs.demix('generate', *flags).error(2)


@pytest.mark.parametrize('mix', ['uniform', 'updating'])
def test_a_short_text_costs_what_it_is_long(models, monkeypatch, mix):
  """Five tokens are one row of 16, not 16 rows of the whole context; beside others, the same."""
  lm, shapes = demix.load(str(models['demix']), mix), []
  whole = lm.mixture.score
  monkeypatch.setattr(lm.mixture, 'score', lambda batch, **more: shapes.append(
      batch['tokens_BL'].shape) or whole(batch, **more))
  short = lm.score('salt.')
  assert shapes == [(1 if mix == 'uniform' else 2, 16)]  # an updating prior moves by two blocks
  long = ' '.join([TEXT] * 4)
  beside = lm.score([long, 'salt.'])[1]
  np.testing.assert_allclose(beside.logp, short.logp, atol=2e-6)
  np.testing.assert_allclose(beside.weights, short.weights, atol=1e-6)
  shapes.clear()
  lm.continuations('stir the ', ['salt', 'a longer way to go on'])
  assert shapes == [(2, 32)]
