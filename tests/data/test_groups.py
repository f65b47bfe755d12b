"""Groups of domains: training and evaluation on their leaves, results that add up."""

import json
import math

import corpus
import pytest
import runs

from demix.config import Config, complete
from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.sampling.batches import DataConfig
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval import results
from demix.eval.perplexity import Score

GROUPS = {'legal': 'prose', 'code': '', 'verse': 'prose', 'kitchen': ''}


@pytest.fixture(scope='module')
def grouped(tmp_path_factory, stores):
  """A store of the tiny corpus in which legal and verse are the leaves of prose."""
  entries = tuple({'name': n, 'group': g, 'path': f'{n}/{{split}}.jsonl'}
                  for n, g in GROUPS.items())
  out = tmp_path_factory.mktemp('groups') / 'store'
  prepare(stores.text, out, PrepareConfig(tokenizer='bytes', corpus=entries), lambda line: None)
  return out


def test_a_group_stands_for_its_leaves(grouped, stores):
  store = TokenStore.open(grouped)
  plain = TokenStore.open(stores.bytes)
  config = lambda *domains: complete(Config(data=DataConfig(domains=domains, batch_size=12)), store)
  assert config('code', 'prose').data.domains == ('code', 'legal', 'verse')
  assert config('prose') == config('legal', 'verse')
  assert all(store.domain_fingerprint(d) == plain.domain_fingerprint(d) for d in GROUPS)
  with pytest.raises(BadInput, match=r"no domain 'pros' \(did you mean 'prose'\?\)"):
    config('pros')


def test_evaluation_of_a_group_is_the_sum_of_its_leaves(grouped, models, tmp_path):
  """NLL of the leaves adds up to the group's, token by token; tables show it outside the means."""
  out = tmp_path / 'results.json'
  ended = runs.demix('evaluate', f'--model={models["dense"]}', f'--model={models["demix"]}',
                     f'--data={grouped}', '--domains=prose,code', f'--out={out}')
  assert ended.code == 0, ended
  content = json.loads(out.read_text())
  rows = {(r['run'], r['domain']): r for r in content['rows']}
  assert [r['run'] for r in content['groups']] == ['dense', 'demix']
  for group in content['groups']:
    leaves = [rows[group['run'], d] for d in ('legal', 'verse')]
    assert group['domain'] == 'prose' and group['leaves'] == ['legal', 'verse']
    assert group['tokens'] == sum(r['tokens'] for r in leaves)
    assert group['nll'] * group['tokens'] == pytest.approx(
        sum(r['nll'] * r['tokens'] for r in leaves), rel=1e-12)
    assert group['bits_per_byte'] == pytest.approx(
        group['nll'] * group['tokens'] / math.log(2) / sum(r['bytes'] for r in leaves))
  [line] = [x for x in ended.out.splitlines() if x.startswith('group prose')][:1]
  assert [float(x) for x in line.split()[2:]] == pytest.approx(
      [g['perplexity'] for g in content['groups']], abs=6e-4)


def test_a_group_whose_leaves_were_not_all_scored_has_no_row():
  score = Score(2.0, 4, 8)
  rows = [results.row('a', 'expert:x', 'x', 'test', score),
          results.row('a', 'expert:y', 'y', 'test', score),
          results.row('b', 'none', 'x', 'test', score)]
  found = results.group_rows(rows, {'g': ('x', 'y'), 'h': ('x', 'z')})
  assert [(r['run'], r['domain'], r['mix'], r['nll'], r['tokens']) for r in found] == [
      ('a', 'g', 'expert:given', 0.5, 8)]


def test_training_on_prompts_counts_completions_only(tmp_path, stores):
  """The ledger has the tokens that were predicted, and a completion alone moves the loss."""
  (tmp_path / 'in/law').mkdir(parents=True)
  for split in ('train', 'valid', 'test'):
    (tmp_path / f'in/law/{split}.jsonl').write_text(''.join(
        json.dumps({'prompt': t[:-5], 'completion': t[-5:]}) + '\n'
        for t in corpus.texts('legal', split)))
  store = prepare(tmp_path / 'in', tmp_path / 'store', PrepareConfig(tokenizer='bytes'),
                  lambda line: None)
  ended = runs.train(tmp_path / 'store', tmp_path / 'run', data__domains='law', train__steps=3,
                     data__packing='document')
  assert ended.code == 0, ended
  out = tmp_path / 'results.json'
  ended = runs.demix('evaluate', f'--model={tmp_path / "run"}', f'--out={out}')
  [row] = json.loads(out.read_text())['rows']
  assert row['tokens'] == 6 * len(corpus.texts('legal', 'test'))  # five bytes and the end
  assert row['bytes'] == 5 * len(corpus.texts('legal', 'test'))
  ledger = json.loads((tmp_path / 'run/checkpoints/3/meta.json').read_text())['ledger']
  assert 0 < ledger['tokens'] < store.card['domains']['law']['splits']['train']['tokens'] / 2
