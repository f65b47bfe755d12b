"""demix/eval/results.py, protocol.py: the schema of results.json, the tables that people read."""

import json
import math

import corpus
import pytest
import runs

from demix.checkpoints import checkpoint
from demix.config import digest
from demix.errors import BadInput
from demix.eval import protocol, results
from demix.eval.perplexity import Score
from demix.loading.reference import load
from demix.verbs.evaluate import TABLES

RUN = {'train_tokens': int, 'train_flops': int, 'params_total': int, 'params_active': int,
       'seconds': float, 'config_digest': str, 'seed': int, 'step': int, 'content_digest': str}
ROW = {'run': str, 'mix': str, 'prior': type(None), 'posterior': type(None), 'domain': str,
       'split': str, 'nll': float, 'perplexity': float, 'bits_per_byte': float, 'tokens': int,
       'bytes': int, 'n': int, 'protocol': str, 'limit': int}


@pytest.fixture(scope='module')
def written(models, tmp_path_factory):
  """(results.json of three runs, what `evaluate` printed)."""
  out = tmp_path_factory.mktemp('results') / 'results.json'
  ended = runs.demix('evaluate', f'--model=plain={models["dense"]}', f'--model={models["demix"]}',
                     f'--model={models["token"]}', f'--out={out}', '--tables=all')
  assert ended.code == 0 and ended.said() == []
  return json.loads(out.read_text()), ended.out


def types(entry):
  return {k: type(v) for k, v in entry.items()}


def test_the_schema_is_the_contract(written):
  content, _ = written
  assert list(content) == ['version', 'runs', 'rows', 'seed', 'heldout', 'versions']
  assert (content['version'], content['seed'], content['heldout']) == (2, 5, ['mixed'])
  assert content['versions'].keys() == {'python', 'demix', 'jax', 'flax', 'optax', 'grain'}
  assert all(isinstance(v, str) and v != 'unknown' for v in content['versions'].values())
  assert list(content['runs']) == ['plain', 'demix', 'token']
  assert all(types(run) == RUN for run in content['runs'].values())
  assert all(types(row) == ROW for row in content['rows'])
  assert [(r['run'], r['domain']) for r in content['rows']] == [
      (run, d) for run in content['runs'] for d in (*corpus.DOMAINS, 'mixed')]
  assert {r['split'] for r in content['rows']} == {'test'}


def test_a_run_is_the_ledger_of_its_checkpoint(written, models):
  content, _ = written
  for name, folder in (('plain', 'dense'), ('demix', 'demix'), ('token', 'token')):
    meta = checkpoint.read_meta(models[folder] / 'checkpoints', 40)
    model = load(str(models[folder])).model
    length = 31 if name == 'token' else 32
    assert content['runs'][name] == {
        'train_tokens': 40 * 8 * length, 'train_flops': 40 * 256 * model.flops_per_token(32),
        'params_total': model.counts()[0], 'params_active': model.counts()[1],
        'seconds': meta['ledger']['seconds'], 'config_digest': digest(meta['identity']), 'seed': 5,
        'step': 40, 'content_digest': meta['content_digest']}
  # Active parameters and FLOPs of dense and DEMix agree: the comparison is compute-matched.
  plain, demix = content['runs']['plain'], content['runs']['demix']
  assert plain['params_active'] == demix['params_active'] < demix['params_total']
  assert (plain['train_flops'], plain['train_tokens']) == (
      demix['train_flops'], demix['train_tokens'])


def test_evaluating_again_gives_the_same_bytes(models, tmp_path):
  flags = [f'--model={models["demix"]}', '--domains=verse,mixed']
  for name in 'ab':
    assert runs.demix('evaluate', *flags, f'--out={tmp_path / name}').code == 0
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_what_is_printed_is_the_content(written):
  content, out = written
  assert protocol.report(content, TABLES) in out
  assert results.table(content, 'perplexity') in out and results.ledger(content) in out
  assert out.rstrip().split('\n')[-1].startswith('results     ')


def made(values: dict, heldout=(), mixes=None):
  """Content of results.json from {domain: [perplexity of each run]}."""
  names = ['dense', 'demix', 'token'][:len(next(iter(values.values())))]
  rows = [{'run': run, 'mix': (mixes or {}).get((d, run), 'none'), 'domain': d, 'split': 'test',
           'perplexity': value, 'bits_per_byte': value / 10}
          for i, run in enumerate(names) for d, vs in values.items()
          if (value := vs[i]) is not None]
  return {'runs': {n: {} for n in names}, 'rows': rows, 'heldout': list(heldout)}


GOLDEN = '''\
perplexity         dense        demix           token
-----------------------------------------------------
verse             10.000       20.000           5.000
law               40.000        5.000          40.000
code               2.000        1.000   2.500 [verse]
arithmetic mean   17.333        8.667          15.833
geometric mean     9.283        4.642           7.937
lower than dense               2 of 3          1 of 3
med (held out)     8.000  4.000 [law]  16.000 [verse]'''


def test_the_table():
  content = made({'verse': [10, 20, 5], 'med': [8, 4, 16], 'law': [40, 5, 40], 'code': [2, 1, 2.5]},
                 heldout=['med'], mixes={
                     ('verse', 'demix'): 'expert:verse', ('law', 'demix'): 'expert:law',
                     ('code', 'demix'): 'expert:code', ('med', 'demix'): 'expert:law',
                     ('verse', 'token'): 'token:verse', ('law', 'token'): 'token:law',
                     ('code', 'token'): 'token:verse', ('med', 'token'): 'token:verse'})
  assert results.table(content) == GOLDEN
  assert 'arithmetic mean   1.733        0.867          1.583' in results.table(
      content, 'bits_per_byte').splitlines()
  assert results.table(content, 'bits_per_byte').startswith('bits per byte ')


def test_the_table_of_one_run_has_no_signs_and_missing_rows_are_dashes():
  assert 'lower than' not in results.table(made({'law': [2.0], 'code': [8.0]}))
  text = results.table(made({'law': [2.0, None], 'code': [8.0, 4.0]}))
  squeezed = [line.split() for line in text.splitlines()]
  assert ['law', '2.000', '-'] in squeezed
  assert ['arithmetic', 'mean', '5.000', '4.000'] in squeezed
  assert ['lower', 'than', 'dense', '1', 'of', '1'] in squeezed  # pairs only


def test_means_over_fewer_domains_are_said():
  content = made({'law': [2.0, 3.0], 'code': [8.0, 4.0]})
  for r in content['rows']:
    r |= {'n': 3, 'tokens': 0 if (r['run'], r['domain']) == ('demix', 'law') else 9}
  said = '- law: no token of its 3 sequences is scored (prompts only)'
  assert results.remarks(content).splitlines() == [
      f'{said} for demix; its means are over fewer domains than those of others']
  content['rows'][0]['tokens'] = 0
  assert results.remarks(content).splitlines() == [said]


def test_a_wide_table_comes_in_parts_each_with_what_it_is_compared_with():
  ways = [(prior, posterior) for prior in ('uniform', 'updating', 'cached')
          for posterior in ('prefix', 'last_token')]
  columns = [('dense', None, None), *(('demix', *w) for w in ways), *(('forest', *w) for w in ways)]
  rows = [{'run': run, 'mix': 'ensemble' if prior else 'none', 'prior': prior,
           'posterior': posterior, 'domain': 'law', 'split': 'test', 'perplexity': 1000.0 + i}
          for i, (run, prior, posterior) in enumerate(columns)]
  content = {'runs': {'dense': {}, 'demix': {}, 'forest': {}}, 'rows': rows, 'heldout': []}
  parts = results.table(content).split('\n\n')
  assert [p.splitlines()[0].split() for p in parts] == [
      ['perplexity', 'dense', *[run] * 6] for run in ('demix', 'forest')]
  for part, first in zip(parts, (1, 7)):
    assert part.splitlines()[4].split() == [
        'law', '1000.000', *(f'{1000 + first + i}.000' for i in range(6))]
    assert max(map(len, part.splitlines())) <= 120


def test_equal_values_are_no_win_and_held_out_domains_no_part_of_means():
  text = results.table(made({'law': [4.0, 4.0], 'new': [1.0, 100.0]}, heldout=['new']))
  squeezed = [' '.join(line.split()) for line in text.splitlines()]
  assert 'lower than dense 0 of 1' in squeezed
  assert 'arithmetic mean 4.000 4.000' in squeezed and 'geometric mean 4.000 4.000' in squeezed
  only = results.table(made({'new': [1.0, 100.0]}, heldout=['new']))
  assert ['arithmetic', 'mean', '-', '-'] in [line.split() for line in only.splitlines()]


def test_the_ledger():
  run = {'train_tokens': 614_400, 'train_flops': 4.2e12, 'params_total': 3_400_000,
         'params_active': 1_060_000, 'seconds': 81.2}
  text = results.ledger({'runs': {'demix': run}})
  assert text.splitlines()[-1].split() == ['demix', '614k', '4.2T', '3.4M', '1.06M', '1m21s']


def test_a_score_divides_sums_once():
  score = Score(nll=30.0, tokens=12, bytes=40)
  assert score.mean_nll == 2.5 and score.perplexity == math.exp(2.5)
  assert score.bits_per_byte == 30 / math.log(2) / 40
  assert Score(1e9, 1, 1).perplexity == math.exp(700)  # not an OverflowError


def test_results_that_cannot_be_written_leave_what_is_there(tmp_path):
  (tmp_path / 'results.json').mkdir()
  with pytest.raises(BadInput, match=r'results\.json: cannot be written'):
    results.write(tmp_path / 'results.json', {'a': 1})
  with pytest.raises(BadInput, match='cannot be written'):
    results.write(tmp_path / 'none/results.json', {'a': 1})
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_a_place_for_results_that_cannot_be_is_refused_before_anything_is_scored(models, tmp_path):
  for out in (tmp_path / 'none/results.json', tmp_path):
    ended = runs.demix('evaluate', f'--model={models["dense"]}', f'--out={out}')
    assert f'--out={out}: ' in ended.error(2) and ended.out == ''


@pytest.mark.parametrize(('flags', 'text'), [
    (['--domains=legal,cod'], "no domain 'cod' (did you mean 'code'?)"),
    (['--split=tset'], "no tset text (did you mean 'test'?)"),
    (['--split=tset', '--domains=legal'], 'legal has no tset text'),
    (['--force=lega'], "--force=lega: run demix has no such domain (did you mean 'legal'?)"),
    (['--stride=-1'], '--stride=-1'), (['--batch_size=0'], '--batch_size=0'),
    (['--limit=-2'], '--limit=-2'), (['--stride=33'], 'stride 33 is not between 1 and'),
    (['--data=nowhere'], 'nowhere: no such token store'),
])
def test_what_cannot_be_evaluated_is_refused(models, flags, text):
  ended = runs.demix('evaluate', f'--model={models["demix"]}', *flags)
  assert text in ended.error(2) and ended.out == ''


def test_another_tokenizer_is_refused_with_both_fingerprints(models, stores):
  for model, data in (('dense', stores.bpe), ('bpe', stores.bytes)):
    message = runs.demix('evaluate', f'--model=x={models[model]}', f'--data={data}').error(2)
    had = checkpoint.read_meta(models[model] / 'checkpoints', 40)['tokenizer']
    has = json.loads((data / 'card.json').read_text())['tokenizer']['fingerprint']
    assert had != has and f'run x was trained with tokenizer {had}' in message and has in message


def test_names_of_runs(models):
  dense = models['dense']
  message = runs.demix('evaluate', f'--model={dense}', f'--model={dense}@20').error(2)
  assert "two models are named 'dense'" in message and f'--model=OTHER={dense}@20' in message
  ended = runs.demix('evaluate', f'--model={dense}', f'--model=early={dense}@20',
                     '--domains=kitchen, kitchen,', '--limit=2')
  assert ended.code == 0 and ended.out.splitlines()[0].split() == ['perplexity', 'dense', 'early']
  assert [line[:8] for line in ended.out.splitlines()].count('kitchen ') == 1
  assert '--model is missing' in runs.demix('evaluate').error(2)


def test_a_path_with_an_equals_sign_is_a_path(models, tmp_path):
  (tmp_path / 'lr=3').mkdir()
  (tmp_path / 'lr=3/W').symlink_to(models['dense'])
  ended = runs.demix('evaluate', f'--model={tmp_path / "lr=3/W"}', '--domains=kitchen')
  assert ended.code == 0 and ended.out.split()[1] == 'dense'
