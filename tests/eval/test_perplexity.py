"""demix/eval/perplexity.py: an independent recount in NumPy gives the numbers of results.json.

Tolerance: 1e-5 relative, float32 against float64.
"""

import json
import math

import corpus
import jax
import numpy as np
import pytest
import runs
from numpy_transformer import blocks, byte_stream, nll, windows

from demix.checkpoints import checkpoint
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval import perplexity
from demix.eval.sequences import Protocol, shuffled
from demix.loading.reference import load

ALL = (*corpus.DOMAINS, corpus.NOVEL)


def leaves_of(workdir, step=40):
  """Canonical parameters of a checkpoint, float64."""
  directory = workdir / 'checkpoints'
  like = {n: jax.ShapeDtypeStruct(shape, dtype)
          for n, (shape, dtype) in checkpoint.names(directory, step).items() if 'params/' in n}
  return {n.removeprefix('params/'): np.asarray(x, np.float64)
          for n, x in checkpoint.restore(directory, step, like).items()}


def evaluated(tmp_path, *flags):
  """({(run, domain): row}, whole content) of `evaluate`."""
  ended = runs.demix('evaluate', *flags, f'--out={tmp_path / "results.json"}')
  assert ended.code == 0, ended
  content = json.loads((tmp_path / 'results.json').read_text())
  return {(r['run'], r['domain']): r for r in content['rows']}, content


class Recount:
  """Scores of a byte model by tests/eval/numpy_transformer.py."""

  def __init__(self, workdir, text):
    self.leaves, self.text = leaves_of(workdir), text

  def row(self, domain, split='test', *, stride=0, symbol=None, limit=None, **more):
    ids, sizes = byte_stream(self.text / domain / f'{split}.jsonl')
    length = 32 - (symbol is not None)
    parts = [(i, t, len(t)) for i, t in blocks(ids, length)]
    if stride:
      parts = windows(ids, length, stride)
    losses = []
    for inputs, targets, scored in parts[:limit]:
      if symbol is not None:  # seen, and never predicted
        inputs, targets = np.append([symbol], inputs), np.append([0], targets)
      losses.append(nll(self.leaves, inputs, targets, layers=2, heads=2, **more)[-scored:])
    losses = np.concatenate(losses)
    size = int(sizes[:len(losses)].sum())
    return {'nll': losses.mean(), 'perplexity': math.exp(losses.mean()), 'tokens': len(losses),
            'bits_per_byte': losses.sum() / math.log(2) / size, 'bytes': size}


def agree(row, recount):
  assert (row['tokens'], row['bytes']) == (recount['tokens'], recount['bytes'])
  for name in ('nll', 'perplexity', 'bits_per_byte'):
    assert row[name] == pytest.approx(recount[name], rel=1e-5), name


def test_a_recount_of_dense_and_demix_in_numpy(stores, models, tmp_path):
  rows, content = evaluated(tmp_path, f'--model={models["dense"]}', f'--model={models["demix"]}')
  dense, demix = (Recount(models[n], stores.text) for n in ('dense', 'demix'))
  for domain in ALL:
    agree(rows['dense', domain], dense.row(domain))
    assert rows['dense', domain]['mix'] == 'none'
    assert rows['dense', domain]['bytes'] == sum(
        len(t.encode()) for t in corpus.texts(domain, 'test'))
  for domain in corpus.DOMAINS:
    agree(rows['demix', domain], demix.row(domain, expert=domain))
    assert rows['demix', domain]['mix'] == f'expert:{domain}'
  # The novel domain is given the expert that is best on its valid text, not on its test text.
  on = {split: {e: demix.row('mixed', split, expert=e)['nll'] for e in corpus.DOMAINS}
        for split in ('valid', 'test')}
  best = {split: min(nlls, key=nlls.get) for split, nlls in on.items()}
  assert best == {'valid': 'code', 'test': 'verse'}, 'the corpus is made so'
  assert rows['demix', 'mixed']['mix'] == 'expert:code'
  agree(rows['demix', 'mixed'], demix.row('mixed', expert='code'))
  assert content['heldout'] == ['mixed']
  # What the experts learned is not a rounding: another expert is worse by far.
  assert rows['demix', 'verse']['nll'] + 0.3 < demix.row('verse', expert='legal')['nll']


def test_a_recount_of_the_domain_token_arm(stores, models, tmp_path):
  rows, _ = evaluated(tmp_path, f'--model={models["token"]}')
  token = Recount(models['token'], stores.text)
  symbols = dict(zip(corpus.DOMAINS, range(257, 261)))
  for domain in corpus.DOMAINS:
    agree(rows['token', domain], token.row(domain, symbol=symbols[domain]))
    assert rows['token', domain]['mix'] == f'token:{domain}'
  on_valid = {d: token.row('mixed', 'valid', symbol=s)['nll'] for d, s in symbols.items()}
  best = min(on_valid, key=on_valid.get)
  assert rows['token', 'mixed']['mix'] == f'token:{best}'
  agree(rows['token', 'mixed'], token.row('mixed', symbol=symbols[best]))


@pytest.mark.parametrize('stride', [8, 31])
def test_a_recount_of_strided_windows(stores, models, tmp_path, stride):
  rows, _ = evaluated(tmp_path, f'--model={models["demix"]}', f'--stride={stride}',
                      '--domains=verse,kitchen')
  demix = Recount(models['demix'], stores.text)
  for domain in ('verse', 'kitchen'):
    agree(rows['demix', domain], demix.row(domain, stride=stride, expert=domain))
    assert rows['demix', domain]['tokens'] == len(
        byte_stream(stores.text / domain / 'test.jsonl')[0])


def test_a_stride_of_the_whole_length_is_blocks(models, tmp_path):
  rows, _ = evaluated(tmp_path, f'--model={models["demix"]}')
  strided, _ = evaluated(tmp_path, f'--model={models["demix"]}', '--stride=32')
  assert strided == rows


def test_limit_scores_a_fixed_sample_of_the_whole_split(stores, models, tmp_path):
  """The first documents may be of one source: with them alone a domain would be another."""
  rows, _ = evaluated(tmp_path, f'--model={models["dense"]}', '--limit=3', '--domains=legal')
  ids, _ = byte_stream(stores.text / 'legal/test.jsonl')
  parts, leaves = blocks(ids, 32), leaves_of(models['dense'])
  chosen = sorted(shuffled(len(parts))[:3])
  assert chosen != [0, 1, 2]
  losses = [nll(leaves, *parts[i], layers=2, heads=2) for i in chosen]
  row = rows['dense', 'legal']
  assert row['nll'] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
  assert (row['n'], row['limit'], row['protocol']) == (3, 3, 'continuous 32')


def test_samples_are_nested_spread_and_fixed():
  assert shuffled(10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]  # for ever, in any NumPy
  for count in (1000, 12345):
    order = shuffled(count)
    assert sorted(order) == list(range(count))
    tenths = np.bincount(order[:count // 4] * 10 // count, minlength=10)
    assert tenths.min() > 0.4 * count / 40 and tenths.max() < 1.8 * count / 40


def test_another_split_and_another_step(stores, models, tmp_path):
  rows, _ = evaluated(tmp_path, f'--model=a={models["dense"]}@20', '--split=valid',
                      '--domains=kitchen')
  recount = Recount(models['dense'], stores.text)
  recount.leaves = leaves_of(models['dense'], 20)
  agree(rows['a', 'kitchen'], recount.row('kitchen', 'valid'))
  assert rows['a', 'kitchen']['split'] == 'valid'


def test_bytes_are_those_of_the_text_under_any_tokenizer(stores, models, tmp_path):
  rows, content = evaluated(tmp_path, f'--model={models["bpe"]}')
  store = TokenStore.open(stores.bpe)
  for domain in ALL:
    row = rows['bpe', domain]
    texts = corpus.texts(domain, 'test')
    assert row['bytes'] == sum(len(t.encode()) for t in texts)
    assert row['tokens'] == len(store.tokens(domain, 'test'))  # end-of-document is scored
    assert row['bits_per_byte'] == pytest.approx(
        row['nll'] * row['tokens'] / math.log(2) / row['bytes'], rel=1e-12)
    assert row['perplexity'] == pytest.approx(math.exp(row['nll']), rel=1e-12)
  assert content['heldout'] == ['code', 'kitchen', 'mixed']  # it trained on verse and legal only


@pytest.mark.parametrize('size', [1, 3, 7, 100])
def test_rows_that_fill_a_batch_do_not_count(models, tmp_path, size):
  rows, _ = evaluated(tmp_path, f'--model={models["demix"]}')
  others, _ = evaluated(tmp_path, f'--model={models["demix"]}', f'--batch_size={size}')
  for key, row in rows.items():
    assert (others[key]['tokens'], others[key]['bytes']) == (row['tokens'], row['bytes'])
    assert others[key]['nll'] == pytest.approx(row['nll'], rel=1e-6)


def test_one_expert_by_reference_is_the_row_of_its_domain(models, tmp_path):
  flags = [f'--model={d}={models["demix"]}#{d}' for d in corpus.DOMAINS]
  rows, content = evaluated(tmp_path, f'--model={models["demix"]}', *flags)
  for domain in corpus.DOMAINS:
    assert rows[domain, domain]['nll'] == pytest.approx(rows['demix', domain]['nll'], rel=1e-6)
    assert {rows[domain, d]['mix'] for d in ALL} == {f'expert:{domain}'}
    assert rows[domain, 'mixed']['mix'] == f'expert:{domain}'
    run, whole = content['runs'][domain], content['runs']['demix']
    assert run['params_total'] == run['params_active'] == whole['params_active']
  assert len({rows[d, 'verse']['nll'] for d in corpus.DOMAINS}) == 4


def test_force_gives_its_expert_to_domains_that_were_not_trained_on(stores, models, tmp_path):
  free, _ = evaluated(tmp_path, f'--model={models["demix"]}')
  rows, _ = evaluated(tmp_path, f'--model={models["demix"]}', '--force=kitchen')
  demix = Recount(models['demix'], stores.text)
  agree(rows['demix', 'mixed'], demix.row('mixed', expert='kitchen'))
  assert rows['demix', 'mixed']['mix'] == 'expert:kitchen'
  assert {k: v for k, v in rows.items() if k[1] != 'mixed'} == {
      k: v for k, v in free.items() if k[1] != 'mixed'}


def test_parts_of_one_pass_do_not_mix(stores, models):
  """All domains and experts in one pass score as each does alone."""
  loaded, store = load(str(models['demix'])), TokenStore.open(stores.bytes)
  parts = [perplexity.Part(d, 'test', route) for d in ('kitchen', 'code') for route in (0, 2)]
  score = lambda parts: perplexity.evaluate(
      loaded.model, loaded.params, store, parts, protocol=Protocol(32), batch_size=8)
  together = score(parts)
  for part, one in zip(parts, together):
    [alone] = score([part])
    assert (alone.tokens, alone.bytes) == (one.tokens, one.bytes)
    assert alone.nll == pytest.approx(one.nll, rel=1e-6)
  assert len({round(s.nll, 3) for s in together}) == 4


def test_progress_counts_to_the_number_of_windows(stores, models):
  loaded, store = load(str(models['dense'])), TokenStore.open(stores.bytes)
  parts, seen = [perplexity.Part(d, 'test') for d in ('legal', 'verse')], []
  perplexity.evaluate(loaded.model, loaded.params, store, parts, protocol=Protocol(32),
                      batch_size=8, progress=seen.append)
  expected = sum(-(-len(store.tokens(d, 'test')) // 32) for d in ('legal', 'verse'))
  assert seen[-1] == expected == perplexity.count(store, parts, Protocol(32))
  assert perplexity.count(store, parts, Protocol(32, limit=2)) == 4


def test_a_domain_without_text_is_refused(stores, models, monkeypatch):
  loaded, store = load(str(models['dense'])), TokenStore.open(stores.bytes)
  monkeypatch.setattr(store, 'tokens', lambda *_: np.zeros(0, np.uint16))
  with pytest.raises(BadInput, match='verse/test is empty: nothing to score'):
    perplexity.evaluate(loaded.model, loaded.params, store, [perplexity.Part('verse', 'test')],
                        protocol=Protocol(32))
