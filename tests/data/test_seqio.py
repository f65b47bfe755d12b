"""SeqIO needs TensorFlow: `prepare` runs in an environment of its own (launch/test.sh --long)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_cases import document, refused

from demix.data.corpus.prepare import PrepareConfig, prepare
from demix.data.tokens.store import TokenStore

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / '.venv-seqio/bin/python'

TASKS = '''
import functools, json, os
import seqio, tensorflow as tf

FOLDER = os.environ['TASKS_FOLDER']
VOCABULARY = seqio.SentencePieceVocabulary(f'{FOLDER}/sp.model', extra_ids=0)

def examples(split, shuffle_files, seed=None, *, name):
  rows = [json.loads(line) for line in open(f'{FOLDER}/{name}.{split}.jsonl')]
  return tf.data.Dataset.from_tensor_slices({k: [r[k] for r in rows] for k in rows[0]})

def task(name, source, vocabulary, features, steps, **about):
  seqio.TaskRegistry.add(
      name, metric_fns=[], preprocessors=steps,
      source=seqio.FunctionDataSource(functools.partial(examples, name=source),
                                      splits=['train', 'validation']),
      output_features={f: seqio.Feature(vocabulary, **{'add_eos': True, **about})
                       for f in features})

plain = functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'})
tokenized = [plain, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
task('law', 'law', VOCABULARY, ['targets'], tokenized)
task('med', 'med', VOCABULARY, ['targets'], tokenized)
task('law_text', 'law', seqio.PassThroughVocabulary(size=1), ['targets'], [plain],
     add_eos=False, dtype=tf.string, rank=0)
task('law_bytes', 'law', seqio.ByteVocabulary(), ['targets'], tokenized)
task('answers', 'answers', VOCABULARY, ['inputs', 'targets'],
     [functools.partial(seqio.preprocessors.rekey, key_map={'inputs': 'q', 'targets': 'a'}),
      seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
seqio.MixtureRegistry.add('both', [('law', 1), ('med', 3)])
'''

CONFIG = '''
from ml_collections import ConfigDict
from demix.data.corpus.prepare import PrepareConfig
from demix.settings import to_dict

def get_config(arg=''):
  return ConfigDict(to_dict(PrepareConfig(
      tokenizer='sentencepiece', tokenizer_path=arg,
      corpus=tuple({'name': n, 'source': 'seqio', 'path': n, 'module': 'tasks'}
                   for n in ('law', 'law_text', 'law_bytes', 'answers', 'both')))))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Text, a SentencePiece model, tasks over them and the config that prepares them."""
  import sentencepiece
  folder = tmp_path_factory.mktemp('seqio')
  texts = {n: {s: [document(i * 7 + salt) for i in range(c)]
               for s, c in (('train', 30), ('validation', 5))}
           for salt, n in enumerate(('law', 'med'))}
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(t for s in texts.values() for t in s['train']), vocab_size=400,
      model_prefix=str(folder / 'sp'), byte_fallback=True, normalization_rule_name='identity',
      minloglevel=2, remove_extra_whitespaces=False, model_type='bpe', add_dummy_prefix=False,
      pad_id=3)
  for name, splits in texts.items():
    for split, rows in splits.items():
      (folder / f'{name}.{split}.jsonl').write_text(
          ''.join(json.dumps({'text': t}) + '\n' for t in rows))
  for split in ('train', 'validation'):
    (folder / f'answers.{split}.jsonl').write_text(
        ''.join(json.dumps({'q': f'the cat {i}?', 'a': f' sat {i}'}) + '\n' for i in range(9)))
  (folder / 'tasks.py').write_text(TASKS)
  (folder / 'config.py').write_text(CONFIG)
  return folder, texts


def run(folder, *flags):
  if not PYTHON.exists():
    pytest.skip('no .venv-seqio: launch/test.sh --long makes it')
  environment = {**os.environ, 'PYTHONPATH': f'{ROOT}:{folder}', 'TASKS_FOLDER': str(folder),
                 'TF_CPP_MIN_LOG_LEVEL': '3'}
  return subprocess.run(
      [PYTHON, '-m', 'demix', 'prepare', f'--out={folder / "store"}',
       f'--config={folder / "config.py"}:{folder / "sp.model"}', *flags], cwd=ROOT,
      env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_tasks_and_a_mixture_become_the_store_that_their_text_is(folder):
  """Ids of the store's own vocabulary, text, and ids of another vocabulary give one store; a
  mixture draws from its tasks; inputs are a prompt; again there is nothing to do."""
  folder, texts = folder
  done = run(folder)
  assert done.returncode == 0, done.stderr[-2000:]
  store = TokenStore.open(folder / 'store')
  store.verify()
  for split, called in (('train', 'train'), ('valid', 'validation')):
    (folder / 'in/law').mkdir(parents=True, exist_ok=True)
    (folder / f'in/law/{split}.jsonl').write_bytes(
        (folder / f'law.{called}.jsonl').read_bytes())
  plain = prepare(folder / 'in', folder / 'plain', PrepareConfig(
      tokenizer='sentencepiece', tokenizer_path=str(folder / 'sp.model')), lambda line: None)
  made = store.tokenizer()
  for name in ('law', 'law_text', 'law_bytes'):
    assert store.domain_fingerprint(name) == plain.domain_fingerprint('law'), name
  tokens, starts = store.tokens('answers', 'train'), 0
  for i, ((end, _), prompt) in enumerate(zip(store.documents('answers', 'train'),
                                             store.prompts('answers', 'train'), strict=True)):
    assert made.decode(tokens[starts:starts + prompt]) == f'the cat {i}?'
    assert made.decode(tokens[starts + prompt:end - 1]) == f' sat {i}'
    starts = end
  tokens, starts, drawn = store.tokens('both', 'train'), 0, []
  for end, _ in store.documents('both', 'train'):
    drawn.append(made.decode(tokens[starts:end - 1]))
    starts = end
  assert set(drawn) <= set(texts['law']['train'] + texts['med']['train']) and len(drawn) >= 30
  med = sum(t in texts['med']['train'] for t in drawn)
  assert med > len(drawn) / 2
  again = run(folder)
  assert 'nothing to do' in again.stdout, (again.stdout, again.stderr[-2000:])
  wrong = run(folder, '--config.domains=law', '--config.tokenizer=bytes',
              '--config.tokenizer_path=')
  assert wrong.returncode == 0, wrong.stderr[-2000:]  # ids go through text to another tokenizer


@pytest.mark.long
def test_a_task_that_is_not_there_and_one_that_fails_are_refused_in_a_line(folder, tmp_path):
  folder, _ = folder
  for change, why in ((("'path': n", "'path': 'lwa'"), "no SeqIO task or mixture of this name (did "
                                                        "you mean 'law'?)"),
                      (("'module': 'tasks'", "'module': 'taks'"), "module 'taks', which registers"),
                      (("'path': n", "'path': n, 'text': 'answer'"), "no feature 'answer'")):
    (folder / 'config.py').write_text(CONFIG.replace(*change))
    done = run(folder)
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and len(lines) == 1 and why in lines[0], done.stderr[-2000:]
  (folder / 'config.py').write_text(CONFIG)


def test_without_seqio_the_error_names_what_to_install(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'seqio', None)  # it may be installed here
  (tmp_path / 'config.py').write_text(CONFIG.replace("'sentencepiece'", "'bytes'"))
  err = refused(capsys, f'--out={tmp_path / "out"}', f'--config={tmp_path / "config.py"}')
  assert 'source seqio needs seqio, which is not installed: pip install -r requirements-seqio.txt' \
      in err
