import subprocess
import sys
from pathlib import Path

import pytest
from corpus_cases import flags, refused, small, snapshot, verb

ROOT = Path(__file__).parents[2]


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path, capsys):
  small(tmp_path / 'in')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/thesis.tex').write_text('x')
  for card in (None, '{}', '{"version": 1'):  # a card of something else is no token store either
    if card:
      (tmp_path / 'out/card.json').write_text(card)
    before = snapshot(tmp_path)
    err = refused(capsys, *flags(tmp_path))
    assert f'--out={tmp_path / "out"}: not empty and not a token store' in err
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_taken_and_a_file_is_refused(tmp_path, capsys):
  small(tmp_path / 'in')
  (tmp_path / 'out').mkdir()
  assert verb(capsys, *flags(tmp_path))[0] == 0
  (tmp_path / 'file').write_text('x')
  assert 'a file is there' in refused(capsys, *flags(tmp_path), f'--out={tmp_path / "file"}')
  assert (tmp_path / 'file').read_text() == 'x'


@pytest.mark.parametrize('inside', ['in', 'in/law', 'in/law/store'])
def test_a_place_inside_the_corpus_is_refused(tmp_path, capsys, inside):
  small(tmp_path / 'in')
  before = snapshot(tmp_path)
  assert '--out=' in refused(capsys, *flags(tmp_path), f'--out={tmp_path / inside}')
  assert snapshot(tmp_path) == before


def test_a_place_that_cannot_be_written_is_refused_before_the_corpus_is_read(tmp_path, capsys):
  small(tmp_path / 'in')
  (tmp_path / 'in/law/train.jsonl').write_bytes(b'not JSON')  # would be the error if it were read
  err = refused(capsys, *flags(tmp_path), '--out=/proc/demix/store')
  assert '--out=/proc/demix/store: cannot write beside it' in err
  (tmp_path / 'file').write_text('')
  assert 'cannot write beside it (File exists' in refused(
      capsys, *flags(tmp_path), f'--out={tmp_path / "file/store"}')


def test_a_read_only_folder_is_refused_before_the_corpus_is_read(tmp_path):
  """As a user who may read but not write: root may write anywhere."""
  small(tmp_path / 'in')
  (tmp_path / 'in/law/train.jsonl').write_bytes(b'not JSON')
  (tmp_path / 'closed').mkdir()
  (tmp_path / 'closed').chmod(0o555)  # whatever the umask takes away
  for file in (tmp_path / 'in').rglob('*'):
    file.chmod(0o755)
  for folder in (tmp_path / 'in', tmp_path, *tmp_path.parents):  # pytest's, one more with xdist
    folder.chmod(0o755)
    if folder.name.startswith('pytest-of-'):
      break
  code = ('import os, sys\nfrom demix.data.corpus.prepare import PrepareConfig, prepare\n'
          'from demix.errors import BadInput\n'
          'if os.getuid() == 0:\n  os.setuid(65534)\n'
          'try:\n  prepare(*sys.argv[1:], PrepareConfig(tokenizer="bytes"))\n'
          'except BadInput as e:\n  print(e)')
  run = subprocess.run([sys.executable, '-c', code, tmp_path / 'in', tmp_path / 'closed/store'],
                       capture_output=True, text=True, cwd=ROOT)
  assert 'closed/store: cannot write beside it (Permission denied' in run.stdout, run


def test_a_mount_point_is_refused(tmp_path, capsys, monkeypatch):
  small(tmp_path / 'in')
  (tmp_path / 'out').mkdir()
  monkeypatch.setattr('os.path.ismount', lambda path: path == tmp_path / 'out')
  assert 'a mount point cannot be replaced' in refused(capsys, *flags(tmp_path))


SETTINGS = {
    '--config.tokenizer=tiktoken': "config.tokenizer='tiktoken': no such choice",
    '--config.on_bad_record=ignore': "'ignore': no such choice (known: fail, skip)",
    '--config.vocab_size=256': 'config.vocab_size=256 is out of range',
    '--config.sample_bytes=67108865': 'integer, at least 1024 and at most 67108864',
    '--config.max_record_bytes=0': 'config.max_record_bytes=0 is out of range',
    '--config.tokenizer=json': "config.tokenizer_path: missing, but tokenizer 'json' is a file",
    '--config.tokenizer_path=x.json': "no effect with config.tokenizer='bytes'",
    '--config.domains=law,mde': "config.domains: no folder 'mde' in",
    '--config.domains=law,law': 'config.domains: a domain is named twice',
    '--config.novel=mde': "config.novel: no domain 'mde' (did you mean 'med'?)",
    '--config.vocabsize=9': 'config.vocabsize: no such key (did you mean',
    '--input=': '--input is missing', '--out=': '--out is missing',
}


@pytest.mark.parametrize('flag', SETTINGS)
def test_settings_that_cannot_be_used_are_refused(tmp_path, capsys, flag):
  small(tmp_path / 'in')
  assert SETTINGS[flag] in refused(capsys, *flags(tmp_path), flag)
  assert [p.name for p in tmp_path.iterdir()] == ['in']


def test_bpe_without_a_train_domain_is_refused(tmp_path, capsys):
  small(tmp_path / 'in')
  err = refused(capsys, *flags(tmp_path, '--config.novel=law,med', tokenizer='bpe'))
  assert 'all domains are novel' in err


@pytest.mark.parametrize('closed', ['in', 'in/law', 'in/law/train.jsonl', 'w/out'])
def test_what_may_not_be_read_is_refused(tmp_path, closed):
  small(tmp_path / 'in')
  (tmp_path / 'w/out').mkdir(parents=True)
  for file in tmp_path.rglob('*'):
    file.chmod(0o777)
  for folder in (tmp_path, *tmp_path.parents):
    folder.chmod(0o755)
    if folder.name.startswith('pytest-of-'):
      break
  (tmp_path / closed).chmod(0o000)
  code = ('import os, sys\nimport demix.data.corpus.prepare, demix.verbs.prepare\n'
          'from demix.__main__ import main\n'
          'if os.getuid() == 0:\n  os.setuid(65534)\n'
          'sys.exit(main(["prepare", "--config.tokenizer=bytes", *sys.argv[1:]]))')
  run = subprocess.run([sys.executable, '-c', code, f'--input={tmp_path / "in"}',
                        f'--out={tmp_path / "w/out"}'], capture_output=True, text=True, cwd=ROOT)
  (tmp_path / closed).chmod(0o755)
  assert run.returncode == 2 and f'{tmp_path / closed}: ' in run.stderr, run
  assert 'cannot be read (Permission denied)' in run.stderr
