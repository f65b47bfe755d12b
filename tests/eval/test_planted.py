"""A planted domain: experts of a text and of its cipher tell the two apart within a few tokens."""

import json

import corpus
import numpy as np
import pytest
import runs

import demix
from demix.data.corpus.prepare import PrepareConfig, prepare

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
CIPHER = str.maketrans(LETTERS, LETTERS[13:] + LETTERS[:13])
DOMAINS = ('plain', 'cipher')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Two experts, trained on legal text and on another part of it, ciphered: the same statistics,
  the same length, spaces and digits."""
  folder = tmp_path_factory.mktemp('planted')
  for domain in DOMAINS:
    for split in ('train', 'valid', 'test'):
      texts = [corpus.document('legal', f'{domain} {split} {i}') for i in range(60)]
      texts = [t.translate(CIPHER) if domain == 'cipher' else t for t in texts]
      (folder / 'text' / domain).mkdir(parents=True, exist_ok=True)
      lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts)
      (folder / 'text' / domain / f'{split}.jsonl').write_text(lines)
  prepare(folder / 'text', folder / 'store', PrepareConfig(domains=DOMAINS, tokenizer='bytes'),
          lambda line: None)
  ended = runs.train(folder / 'store', folder / 'W', model__ffn='demix', train__steps=60,
                     train__checkpoint_every=60, optimizer__schedule_steps=60)
  assert ended.code == 0, ended
  return folder / 'W'


@pytest.fixture(scope='module')
def lm(workdir):
  return demix.load(str(workdir))


def texts(domain):
  for i in range(12):
    text = corpus.document('legal', f'unseen {domain} {i}').split(' ', 1)[1]
    yield text.translate(CIPHER) if domain == 'cipher' else text


@pytest.mark.parametrize('domain', DOMAINS)
def test_the_prefix_posterior_knows_within_a_few_tokens(lm, domain):
  own = DOMAINS.index(domain)
  weights = np.asarray([lm.score(t).weights[own, :16] for t in texts(domain) if len(t) > 16])
  assert len(weights) >= 6
  assert (weights[:, 0] == 0.5).all()  # nothing is known yet
  assert (weights.mean(0)[8:] > 0.8).all()
  assert (weights.mean(0)[14:] > 0.9).all()


@pytest.mark.parametrize('domain', DOMAINS)
def test_mixing_costs_little_over_the_right_expert_and_gains_on_the_wrong_one(lm, workdir, domain):
  own, other = (demix.load(f'{workdir}#{d}') for d in (domain, DOMAINS[domain == 'plain']))
  nll = lambda model: np.mean([model.score(t).nll for t in texts(domain)])
  mixed = nll(lm)
  assert mixed < nll(own) + 0.1 < nll(other)


def test_the_cached_prior_of_each_names_it(workdir, tmp_path):
  ended = runs.demix('evaluate', f'--model={workdir}', '--mix=cached',
                     f'--save_priors={tmp_path / "p.json"}')
  assert ended.code == 0, ended
  for stored in json.loads((tmp_path / 'p.json').read_text())['priors']:
    assert stored['weights'][stored['domain']] > 0.9, stored
