"""A model is scored the way it was trained, and no DEMix LM is routed by default."""

import json

import corpus
import mixtures
import numpy as np
import pytest
import runs
from numpy_transformer import byte_stream, nll
from test_perplexity import leaves_of

from demix.checkpoints import checkpoint
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval import perplexity, seen
from demix.eval.sequences import Protocol
from demix.forest import lineage
from demix.loading import reference
from demix.mix import prior
from demix.mix.members import WholeMembers
from demix.training import metrics

E = corpus.DOMAINS
WAYS = '--mix=given,average,uniform,updating,cached'


@pytest.fixture(scope='module')
def packed(stores, tmp_path_factory):
  """A DEMix LM that was trained on documents by themselves."""
  folder = tmp_path_factory.mktemp('packed') / 'packed'
  ended = runs.train(stores.bytes, folder, seed=5, train__steps=30, model__ffn='demix',
                     data__packing='document', optimizer__schedule_steps=30,
                     train__eval_sequences=3, train__log_every=30)
  assert ended.code == 0, ended
  return folder


def evaluated(tmp_path, *flags):
  """({(run, domain, prior, posterior): row}, content, printed) of `evaluate`."""
  ended = runs.demix('evaluate', *flags, f'--out={tmp_path / "r.json"}')
  assert ended.code == 0, ended
  content = json.loads((tmp_path / 'r.json').read_text())
  rows = {(r['run'], r['domain'], r['prior'], r['posterior']): r for r in content['rows']}
  return rows, content, ended.out


def pieces(text, domain, split='test', length=32):
  """(inputs, targets) of every document of a domain by itself, long ones cut."""
  ids, _ = byte_stream(text / domain / f'{split}.jsonl')
  ends = np.flatnonzero(ids == 256) + 1
  out = []
  for begin, end in zip([0, *ends[:-1]], ends):
    for at in range(begin, end, length):
      targets = ids[at:min(end, at + length)]
      out.append((np.append([ids[at - 1] if at else 256], targets[:-1]), targets))
  return out


def test_a_recount_of_documents_by_themselves(stores, packed, models, tmp_path):
  """In NumPy, a document at a time; mixed too, and what training says of itself on valid text."""
  rows, content, _ = evaluated(tmp_path, f'--model=p={packed}', WAYS,
                               f'--dump={tmp_path / "d.npz"}')
  leaves = leaves_of(packed, 30)
  dump = np.load(tmp_path / 'd.npz')
  assert str(dump['protocol']) == 'document 32' == content['rows'][0]['protocol']
  for d, domain in enumerate(dump['domain_names']):
    texts = pieces(stores.text, domain)
    def alone(expert, texts=texts):
      return np.concatenate([nll(leaves, *t, layers=2, heads=2, expert=expert) for t in texts])
    given = rows['p', domain, None, None]
    losses = alone(given['mix'].partition(':')[2])
    assert given['tokens'] == len(losses) == len(TokenStore.open(stores.bytes).tokens(
        domain, 'test'))
    assert given['nll'] == pytest.approx(losses.mean(), rel=1e-5)
    # The mixture, from the dump: evidence starts anew with each document of a row.
    nats, mine = 0.0, np.flatnonzero(dump['domain_B'] == d)
    for b in mine:
      loglik, used = dump['loglik_EBL'][:, b], dump['weights_BL'][b] > 0
      weights = mixtures.weights(loglik, np.full(len(E), 1 / len(E)),
                                 segments_L=dump['segments_BL'][b])
      nats -= mixtures.mixed(weights, loglik)[used].sum()
    assert rows['p', domain, 'uniform', 'prefix']['nll'] == pytest.approx(
        nats / given['tokens'], rel=1e-5)
  own = Protocol(32, 'document', limit=3)
  source, places = own.sequences(TokenStore.open(stores.bytes), 'legal', 'valid')
  one = reference.load(f'{packed}#legal')
  [score] = perplexity.evaluate(one.model, one.params, TokenStore.open(stores.bytes),
                                [perplexity.Part('legal', 'valid')], protocol=own)
  assert metrics.read(packed)[-1]['eval/legal/nll'] == pytest.approx(score.mean_nll, rel=1e-6)
  assert len(places) == 3 < len(source)


def test_another_way_is_asked_for_and_two_ways_are_marked(packed, models, tmp_path):
  flags = [f'--model={models["demix"]}', f'--model={packed}']
  rows, content, out = evaluated(tmp_path, *flags)
  assert {r['run']: r['protocol'] for r in content['rows']} == {
      'demix': 'continuous 32', 'packed': 'document 32'}
  assert 'packed†' in out.splitlines()[0] and '† packed: text cut as document 32' in out
  as_stream, content, out = evaluated(tmp_path, *flags, '--packing=continuous')
  assert '†' not in out and {r['protocol'] for r in content['rows']} == {'continuous 32'}
  for domain in E:
    key = 'packed', domain, None, None
    assert as_stream[key]['nll'] != pytest.approx(rows[key]['nll'], rel=1e-5)
    key = 'demix', domain, None, None
    assert as_stream[key]['nll'] == rows[key]['nll']
  refused = runs.demix('evaluate', *flags[1:], '--stride=8')
  assert 'documents by themselves' in refused.error(2)


# ---- experts are given, never taken by default ------------------------------------------------


@pytest.fixture(scope='module')
def grove(models, tmp_path_factory):
  """A forest of a DEMix LM and a dense LM."""
  folder = tmp_path_factory.mktemp('grove') / 'F'
  for name, model in (('all', 'demix'), ('flat', 'dense')):
    ended = runs.demix('forest', 'add', f'--forest={folder}', f'--expert={name}',
                       f'--from={models[model]}', '--parent=none')
    assert ended.code == 0, ended
  return folder


def test_a_demix_lm_of_a_forest_is_its_experts(models, grove, tmp_path):
  rows, _, _ = evaluated(tmp_path, f'--model=f=forest:{grove}', '--mix=given,average,uniform',
                         '--posterior=prefix', f'--dump={tmp_path / "d.npz"}')
  names = [*(f'all/{e}' for e in E), 'flat']
  dump = np.load(tmp_path / 'd.npz')
  assert dump['expert_names'].tolist() == names
  alone, _, _ = evaluated(tmp_path, f'--model={models["demix"]}', f'--model={models["dense"]}')
  for d, domain in enumerate(dump['domain_names']):
    mine, weights = dump['domain_B'] == d, dump['weights_BL'][dump['domain_B'] == d]
    each = dict(zip(names, -(dump['loglik_EBL'][:, mine] * weights).sum((1, 2)) / weights.sum()))
    assert each['flat'] == pytest.approx(alone['dense', domain, None, None]['nll'], rel=1e-5)
    row = rows['f', domain, None, None]
    if domain in E:
      assert row['mix'] == f'expert:all/{domain}'
      own = alone['demix', domain, None, None]['nll']
      assert row['nll'] == pytest.approx(own, rel=1e-5)
      assert each[f'all/{domain}'] == pytest.approx(own, rel=1e-5)
  whole = reference.load(f'forest:{grove}')
  total, active = whole.counts()
  demix, dense = (reference.load(str(models[n])).counts() for n in ('demix', 'dense'))
  assert (total, active) == (demix[0] + dense[0], dense[0])
  slice_ = reference.load(f'forest:{grove}#all/verse')
  theirs = reference.load(f'{models["demix"]}#verse')
  assert slice_.member_digests == theirs.member_digests == whole.member_digests[2:3]
  assert reference.load(f'forest:{grove}#all').model.config.ffn == 'demix'
  assert "no expert 'all/vers' (did you mean 'all/verse'?)" in runs.demix(
      'evaluate', f'--model=forest:{grove}#all/vers').error(2)
  written = runs.demix('generate', f'--model=forest:{grove}', '--prompt=def', '--max_tokens=2')
  assert written.code == 0 and 'all/code' in written.err
  # A gate compares each domain by its own expert, not by the first.
  again = runs.demix('forest', 'add', f'--forest={grove}', '--expert=later', '--parent=flat',
                     f'--from={models["demix"]}')
  gate = json.loads((grove / 'forest.json').read_text())['experts']['later']['gate']
  store = TokenStore.open(reference.load(str(models['demix'])).config.data.path)
  loaded, total, tokens = reference.load(str(models['demix'])), 0.0, 0
  for route, domain in enumerate(E):
    [score] = perplexity.evaluate(loaded.model, loaded.params, store,
                                  [perplexity.Part(domain, 'valid', route)], protocol=Protocol(32))
    total, tokens = total + score.nll, tokens + score.tokens
  assert again.code == 0 and gate['nll'] == pytest.approx(total / tokens, rel=1e-6)


def test_demix_lms_merge_expert_by_expert_and_their_guard_gives_each_domain_its_own(models,
                                                                                    tmp_path):
  parents = [f'--model=a={models["demix"]}', f'--model=b={models["demix"]}@20']
  ended = runs.demix('merge', *parents, f'--workdir={tmp_path / "M"}', '--weights=0.75,0.25',
                     '--unrelated')
  assert ended.code == 0, ended
  made, a, b = (leaves_of(w, s) for w, s in ((tmp_path / 'M', 40), (models['demix'], 40),
                                             (models['demix'], 20)))
  for name, leaf in made.items():
    np.testing.assert_allclose(leaf, 0.75 * a[name] + 0.25 * b[name], atol=1e-6, err_msg=name)
  guarded = runs.demix('merge', *parents, f'--workdir={tmp_path / "G"}', '--weights=1,0',
                       '--unrelated', '--guard=verse,code')
  assert guarded.code == 0, guarded
  meta = checkpoint.read_meta(tmp_path / 'G/checkpoints', 40)
  loaded = reference.load(str(models['demix']))
  store = TokenStore.open(loaded.config.data.path)
  for domain, found in meta['lifecycle'][-1]['guard'].items():
    [score] = perplexity.evaluate(loaded.model, loaded.params, store, [
        perplexity.Part(domain, 'valid', E.index(domain))], protocol=Protocol(32))
    assert found[''] == found['a'] == score.mean_nll < found['b']
  for flag, said in (('--guard=mixed', 'mixed: not one of the domains'),
                     ('--guard=verse', 'worse than its best parent')):
    refused = runs.demix('merge', *parents, f'--workdir={tmp_path / "N"}', '--weights=0.1,0.9',
                         '--unrelated', flag)
    assert said in refused.error(2 if 'mixed' in flag else 3)
  fits = runs.demix('merge', *parents, f'--workdir={tmp_path / "P"}', '--weights=posterior',
                    '--domain=verse', '--unrelated')
  assert fits.code == 0 and float(fits.out.split()[0]) > 0.9  # the longer trained verse expert
  assert "no such expert (did you mean 'verse'?)" in runs.demix(
      'merge', *parents, f'--workdir={tmp_path / "N"}', '--weights=posterior', '--domain=vers',
      '--unrelated').error(2)


def test_nothing_routes_a_demix_lm_by_default(models):
  loaded = reference.load(str(models['demix']))
  store = TokenStore.open(loaded.config.data.path)
  with pytest.raises(BadInput, match='no expert is given for it'):
    perplexity.evaluate(loaded.model, loaded.params, store,
                        [perplexity.Part('legal', 'test')], protocol=Protocol(32))
  with pytest.raises(BadInput, match='their experts are'):
    WholeMembers(loaded.model, ('a', 'b'))


def test_expert_by_expert_is_the_general_path(models):
  """What evaluation on a mesh with an expert axis does; how little it sends: test_sharding.py."""
  loaded = reference.load(str(models['demix']))
  store = TokenStore.open(loaded.config.data.path)
  parts = [perplexity.Part(d, 'test', r) for r, d in enumerate(E)]
  score = lambda **more: perplexity.evaluate(loaded.model, loaded.params, store, parts,
                                             protocol=Protocol(32), batch_size=8, **more)
  for one, other in zip(score(), score(balanced=True)):
    assert (one.tokens, one.bytes, len(one.each)) == (other.tokens, other.bytes, len(other.each))
    assert one.nll == pytest.approx(other.nll, rel=1e-6)


# ---- nothing scored ---------------------------------------------------------------------------


def test_what_was_not_scored_is_no_number(tmp_path):
  """Blocks that hold prompts only: '-' and null, in evaluation, gates and training."""
  from demix.data.corpus.prepare import PrepareConfig, prepare
  for domain, prompt in (('plain', ''), ('asked', 'why ' * 90)):
    (tmp_path / 'text' / domain).mkdir(parents=True)
    for split in ('train', 'valid', 'test'):
      lines = [json.dumps({'prompt': f'{i} {prompt}', 'completion': 'yes'} if prompt else
                          {'text': f'{i} once upon a time there was a text'}) for i in range(4)]
      (tmp_path / 'text' / domain / f'{split}.jsonl').write_text('\n'.join(lines))
  prepare(tmp_path / 'text', tmp_path / 'store', PrepareConfig(tokenizer='bytes'), lambda _: None)
  # As training cuts it, a block that is sampled for --limit=1 holds a prompt only.
  ended = runs.train(tmp_path / 'store', tmp_path / 'W', train__steps=4, model__ffn='demix',
                     train__eval_sequences=1)
  assert ended.code == 0, ended
  rows, _, out = evaluated(tmp_path, f'--model={tmp_path / "W"}', '--limit=1',
                                 '--tables=all')
  row = rows['W', 'asked', None, None]
  assert (row['tokens'], row['nll'], row['perplexity'], row['bits_per_byte']) == (
      0, None, None, None)
  assert rows['W', 'plain', None, None]['tokens'] == 32
  assert [x.split() for x in out.splitlines() if x.startswith('asked')] == 2 * [
      ['asked*', '-']]
  assert '- asked: no token of its 1 sequences is scored' in out
  mixed, _, out = evaluated(tmp_path, f'--model={tmp_path / "W"}', '--limit=1', '--mix=uniform')
  assert mixed['W', 'asked', 'uniform', 'prefix']['nll'] is None
  for name in ('W', 'W2'):
    added = runs.demix('forest', 'add', f'--forest={tmp_path / "F"}', f'--expert={name}',
                       f'--from={tmp_path / "W"}', '--limit=1',
                       f'--parent={"none" if name == "W" else "W"}')
    assert added.code == 0, added
  gates = [e['gate'] for e in json.loads((tmp_path / 'F/forest.json').read_text())[
      'experts'].values()]
  assert gates[0] is None and gates[1]['tokens'] == 32  # of plain alone
  with pytest.raises(BadInput, match='no token of its'):
    from demix.eval.nearest import compare
    compare(('a', 'b'), [[0.0], [0.0]], [0], 'asked')


def test_members_of_other_lengths_are_scored_alike_and_said(models, stores, tmp_path):
  """The longest that one was trained with, whichever stands first; merge says what it takes."""
  short = tmp_path / 'short'
  assert runs.train(stores.bytes, short, train__steps=1, data__sequence_length=16, seed=5,
                    init__model=models['dense']).code == 0
  found = []
  for order in (('short', short), ('long', models['dense'])), (('long', models['dense']),
                                                              ('short', short)):
    F = tmp_path / order[0][0]
    F = F.with_name(f'F{F.name}')
    for name, source in order:
      ended = runs.demix('forest', 'add', f'--forest={F}', f'--expert={name}', f'--from={source}',
                         '--limit=1', '--parent=none')
      assert ended.code == 0, ended
    rows, _, out = evaluated(tmp_path, f'--model=F=forest:{F}', '--mix=average',
                                   '--domains=code')
    assert 'sequences of 16, 32 tokens; all are scored with 32' in out
    found.append([(r['nll'], r['protocol']) for r in rows.values()])
  assert found[0][0] == (pytest.approx(found[1][0][0], rel=1e-6), 'continuous 32')
  merged = runs.demix('merge', f'--model={short}', f'--model={models["dense"]}',
                      f'--workdir={tmp_path / "M"}')
  assert 'continuous 16 by short, continuous 32 by dense: the result' in merged.out


# ---- what was seen ----------------------------------------------------------------------------


def test_what_was_seen_is_known_by_documents(models, stores, tmp_path):
  """The same documents under other names, cut into other domains, are not held out."""
  from demix.data.corpus.prepare import PrepareConfig, prepare
  texts = {'first': corpus.texts('legal', 'train')[:3], 'other': ['never seen before', 'nor this']}
  for domain, lines in texts.items():
    (tmp_path / 'text' / domain).mkdir(parents=True)
    for split in ('train', 'test'):
      (tmp_path / 'text' / domain / f'{split}.jsonl').write_text(
          '\n'.join(json.dumps({'text': t}) for t in lines))
  prepare(tmp_path / 'text', tmp_path / 'store', PrepareConfig(tokenizer='bytes'), lambda _: None)
  found = TokenStore.open(tmp_path / 'store')
  assert seen.domains_of(reference.load(str(models['dense'])), found, ('first', 'other')) == {
      'first'}
  renamed = TokenStore.open(corpus.store(
      corpus.write(tmp_path / 'again', {'legal': 'law'}), tmp_path / 'law', {'legal': 'law'},
      tokenizer='bytes'))
  assert seen.domains_of(reference.load(str(models['dense'])), renamed, ('law', 'mixed')) == {
      'law'}


def test_what_it_goes_back_to_was_seen_too(models, adapted, stores, tmp_path):
  """A run that started from a model, and one without an expert, have seen what that was trained
  on: by what lies there, and by name where it is gone."""
  store, known = TokenStore.open(stores.bytes), set(corpus.TRAIN)
  removed = tmp_path / 'removed'
  ended = runs.demix('forest', 'remove', f'--model={models["demix"]}', '--expert=code',
                     f'--workdir={removed}')
  assert ended.code == 0, ended
  for workdir, own in ((adapted['better'], {corpus.NOVEL}), (removed, set())):
    loaded = reference.load(str(workdir))
    assert seen.domains_of(loaded, store, store.domains) == known | own
    assert not known <= set(loaded.domains)
  meta = dict(reference.load(str(adapted['better'])).meta)
  meta['init'] = meta['init'] | {'workdir': '/gone'}
  assert lineage.history([meta]) == [(None, '', tuple(meta['init']['trained_on']))]
  assert set(meta['init']['trained_on']) == known


# ---- best, and priors of several models -------------------------------------------------------


def test_best_is_by_the_domains_own_text_whoevers_prior_is_used(models, packed, tmp_path):
  """A file of two models' priors, as --save_priors writes it, serves both afterwards."""
  both = [f'--model={models["demix"]}', f'--model={packed}']
  file = tmp_path / 'p.json'
  first, _, _ = evaluated(tmp_path, *both, '--mix=best,cached', '--posterior=prefix',
                          f'--save_priors={file}')
  again, _, _ = evaluated(tmp_path, *both, '--mix=best,cached', '--posterior=prefix',
                          f'--prior={file}')
  assert again.keys() == first.keys()
  for key, row in first.items():
    assert again[key]['nll'] == pytest.approx(row['nll'], rel=1e-6), key
  shared, _, _ = evaluated(tmp_path, *both, '--mix=best,cached', '--posterior=prefix',
                           f'--prior={file}:verse')
  for key, row in first.items():
    same = shared[key]['nll'] == pytest.approx(row['nll'], rel=1e-6)
    assert same == (key[2] == 'dev' or key[1] == 'verse'), key
  other = runs.demix('evaluate', f'--model={models["demix"]}@20', '--mix=cached',
                     f'--prior={file}')
  assert 'content digest' in other.error(3)
  for flags, said in ((['--packing=document'], 'cut as continuous 32, the text is scored as docu'),
                      (['--mix.decay=0.5'], 'estimated with mix.decay=1.0 (now 0.5)')):
    ended = runs.demix('evaluate', *both[:1], '--mix=cached,best', '--posterior=prefix',
                       '--domains=code', f'--prior={file}', *flags)
    assert ended.code == 0 and said in ended.out, ended
  missing = runs.demix('evaluate', *both[:1], '--mix=cached', '--posterior=last_token',
                       f'--prior={file}')
  assert 'no prior of legal by last_token' in missing.error(2)
  assert prior.load(file)[-1].packing == 'document'


@pytest.mark.parametrize(('flags', 'said'), [
    (['--mix=uniform', '--mix.experts_k=1'], 'mix.experts_k=1 has no effect on --mix=uniform'),
    (['--mix=average', '--mix.temperature=2.0'], 'mix.temperature=2.0 has no effect'),
    (['--mix=given,best', '--mix.weights_k=2'], 'has no effect on --mix=given,best'),
    (['--mix=uniform', '--mix.alpha=0.5'], 'mix.alpha=0.5 has no effect'),
    (['--mix=updating', '--mix.blocks=7'], 'mix.blocks=7 has no effect'),
    (['--mix=uniform', '--posterior=last_token', '--mix.decay=0.9'], 'mix.decay=0.9 has no effect'),
    (['--mix=uniform', '--mix.prior=cached'], 'leave it out'),
    (['--mix=uniform', '--mix.order=softmax_topk'], 'mix.order=softmax_topk has no effect'),
    (['--mix=updating', '--stride=8'], 'would be counted many times over'),
    (['--mix=uniform', '--prior=p.json'], '--prior has no effect on --mix=uniform'),
    (['--mix=cached', '--mix.alpha=0.5', '--prior=p.json'], 'mix.alpha=0.5 has no effect with'),
    (['--mix=cached', '--mix.blocks=9', '--prior=p.json'], 'mix.blocks=9 has no effect with'),
    (['--mix=cached', '--mix.blocks=1'], 'below mix.blocks_per_update=2'),
    (['--options=q', '--split=test'], '--split goes with perplexity'),
    (['--options=q', '--domains=code'], '--domains goes with perplexity'),
    (['--options=q', '--mix=average', '--prior=p.json'], '--prior has no effect'),
    (['--mix=given', '--save_priors=p.json'], '--save_priors has no effect on --mix=given'),
    (['--mix=given', '--posterior=prefix'], '--posterior=prefix has no effect'),
    (['--posterior=prefix'], '--posterior needs --mix'),
    (['--force=legal', '--domains=legal'], '--force=legal has no effect'),
    (['--mix=uniform', '--force=legal'], '--force=legal has no effect'),
    (['--tables=perplexty'], "did you mean 'perplexity'"),
    (['--packing=documents'], "did you mean 'document'")])
def test_what_would_change_nothing_is_refused(models, flags, said):
  assert said in runs.demix('evaluate', f'--model={models["demix"]}', *flags).error(2)


def test_text_that_changed_is_not_scored(stores, models, tmp_path):
  """Of the same size, one byte another: named before anything is scored."""
  import shutil
  copy = shutil.copytree(stores.bytes, tmp_path / 'store')
  file = copy / 'code/test/tokens.bin'
  data = bytearray(file.read_bytes())
  data[10] ^= 1
  file.write_bytes(bytes(data))
  flags = [f'--model={models["demix"]}', f'--data={copy}', '--domains=legal,code']
  assert 'code/test/tokens.bin: digest' in runs.demix('evaluate', *flags).error(2)
  assert runs.demix('evaluate', *flags, '--verify_data=false').code == 0
