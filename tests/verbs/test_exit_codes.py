"""demix/errors.py, demix/__main__.py: every failure is one line and the code of its kind.

docs/contracts.md §exit codes. What ends a run (5, 75) is in test_train.py, what is wrong
with a corpus in tests/data/.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import runs
from checkpoint_cases import flip

from demix import __main__ as entry
from demix import errors
from demix.errors import DemixError
from demix.runtime import workdir

CODES = {'DemixError': 1, 'BadInput': 2, 'Refused': 3, 'NothingToLoad': 4, 'NonFinite': 5,
         'Locked': 6, 'Preempted': 75}


def test_the_codes_are_the_contract():
  found = {n: c.code for n, c in vars(errors).items()
           if isinstance(c, type) and issubclass(c, DemixError)}
  assert found == CODES
  text = (runs.ROOT / 'docs/contracts.md').read_text()
  section = text[text.index('## Exit codes'):]
  for code in (*CODES.values(), 0):
    assert f'{code} ' in section


def ended(monkeypatch, error) -> runs.Ended:
  """How `python -m demix train` ends when the verb raises `error`."""
  def run(argv):
    raise error
  monkeypatch.setattr(importlib, 'import_module', lambda name: types.SimpleNamespace(run=run))
  return runs.demix('train')


@pytest.mark.parametrize('name', CODES)
def test_an_error_of_each_kind_is_one_line_and_its_code(monkeypatch, name):
  result = ended(monkeypatch, getattr(errors, name)('what was wrong:\n  1 → 2;\n\nthe remedy'))
  assert result == runs.Ended(CODES[name], '', 'error: what was wrong: 1 → 2; the remedy\n')


def test_an_error_that_nobody_foresaw_is_one_line_and_1(monkeypatch):
  result = ended(monkeypatch, ZeroDivisionError('division\nby zero'))
  assert result.code == 1 and result.out == ''
  assert result.err == ('error: ZeroDivisionError: division by zero '
                        '(DEMIX_TRACEBACK=1 shows where)\n')
  monkeypatch.setenv('DEMIX_TRACEBACK', '1')
  with pytest.raises(ZeroDivisionError):
    ended(monkeypatch, ZeroDivisionError('x'))


def test_interrupted_by_hand(monkeypatch):
  assert ended(monkeypatch, KeyboardInterrupt()) == runs.Ended(130, '', 'error: interrupted\n')


def test_success_is_0_and_so_is_help():
  for argv in (['--help'], ['-h'], ['help'], ['train', '--help'], ['evaluate', '-h'],
               ['prepare', '--help'], ['train', '--config.model.layers=3', '--help']):
    result = runs.demix(*argv)
    assert (result.code, result.err) == (0, '') and 'python -m demix' in result.out
  assert all(verb in runs.demix('--help').out for verb in entry.VERBS)


def test_no_verb_is_2_with_the_usage_and_an_unknown_one_is_named():
  assert runs.demix().code == 2 and 'usage: ' in runs.demix().out
  assert runs.demix('trian').error(2) == "no such verb 'trian' (did you mean 'train'?)"


def test_each_verb_has_a_summary_and_runs():
  for verb in entry.VERBS:
    module = importlib.import_module(f'demix.verbs.{verb}')
    assert callable(module.run) and module.SUMMARY


# ---- what is typed; in this process, further below in one of its own ---------------------------


@pytest.fixture(scope='module')
def places(stores, tmp_path_factory):
  """Paths that the cases below speak of by name."""
  folder = tmp_path_factory.mktemp('places')
  (folder / 'file').write_text('x')
  (folder / 'empty').mkdir()
  done = runs.train(stores.bytes, folder / 'W', model__ffn='demix', train__steps=2,
                    train__checkpoint_every=1)
  assert done.code == 0
  for name in ('bad', 'one_bad', 'config'):
    shutil.copytree(folder / 'W', folder / name)
  for step in (1, 2):
    flip(0.5)(folder / f'bad/checkpoints/{step}/meta.json')
  flip(0.5)(folder / 'one_bad/checkpoints/2/meta.json')
  (folder / 'config/config.json').write_text('{')
  (folder / 'metrics/metrics.jsonl').mkdir(parents=True)
  half = shutil.copytree(stores.bytes, folder / 'half')
  (half / 'card.json').unlink()
  cut = shutil.copytree(stores.bytes, folder / 'cut')
  os.truncate(cut / 'verse/train/tokens.bin', 10)
  return {'P': folder, 'S': stores.bytes, 'B': stores.bpe, 'T': stores.text}


TRAIN = ('train --config.data.path={S} --config.model.layers=2 --config.model.d_model=16 '
         '--config.model.heads=2 --config.data.sequence_length=32 --config.data.batch_size=8 '
         '--config.train.log_every=1 --config.train.tensorboard=false '
         '--config.optimizer.learning_rate=0.01 --config.optimizer.clip=1 '
         '--config.optimizer.schedule_steps=8 --config.train.checkpoint_every=1 '
         '--config.model.ffn=demix --config.train.steps=2 --workdir={P}/')

# What is typed → code, what the line says.
CASES = [
    ('nonsense', 2, "no such verb 'nonsense'"),
    ('train', 2, '--workdir is missing: '),
    ('train --workdir', 2, 'workdir'),
    ('train --workdir={P}/new', 2, '--config.data.path is missing: '),
    ('train --wrkdir={P}/new', 2, "'wrkdir'. Did you mean: workdir"),
    (TRAIN + 'new extra', 2, "unexpected argument 'extra'"),
    (TRAIN + 'new --config.model.d_modle=3', 2, "d_modle: no such key (did you mean 'd_model'?)"),
    (TRAIN + 'new --config.seed=x', 2, "'x'"),
    (TRAIN + 'new --config=none.py', 2, "no such file 'none.py'"),
    (TRAIN + 'new --config.data.path={P}/none', 2, 'none: no such token store: prepare it again'),
    (TRAIN + 'new --config.data.path={P}/half', 2, 'half: not a finished token store'),
    (TRAIN + 'new --config.data.path={P}/cut', 2, 'verse/train/tokens.bin: 10 bytes, but'),
    (TRAIN + 'new --config.data.path={P}/file', 2, 'file: a file, not the folder'),
    (TRAIN + 'new --config.data.domains=legal,vers', 2, "'vers' (did you mean 'verse'?)"),
    (TRAIN + 'new --config.data.batch_size=6', 2, 'not a multiple of 4 domains'),
    (TRAIN + 'new --config.data.batch_size=4000', 2, 'of 32 tokens, one batch needs 1000'),
    (TRAIN + 'new --config.model.heads=3', 2, 'd_model=16 is not a multiple of heads=3'),
    (TRAIN + 'new --config.mesh.expert=3', 2, 'mesh axis expert=3 on 1 devices: not a multiple'),
    (TRAIN + 'file', 2, 'file: not a directory'),
    (TRAIN + 'file/W', 2, 'file/W: not a directory'),
    (TRAIN + 'W --config.seed=1 --config.model.d_model=8', 2, 'model.d_model: 16 → 8'),
    (TRAIN + 'W --config.data.path={B}', 2, 'tokenizer.fingerprint: '),
    (TRAIN + 'config', 2, 'config.json: not JSON'),
    (TRAIN + 'metrics', 1, 'metrics.jsonl: cannot be written (Is a directory)'),
    (TRAIN + 'bad', 4, 'no checkpoint can be trusted (bad: 2, 1)'),
    ('evaluate', 2, '--model is missing'),
    ('evaluate --model={P}/none', 2, "no such workdir '{P}/none'"),
    ('evaluate --model={P}/empty', 2, 'no finished checkpoint'),
    ('evaluate --model={P}/W@7', 2, 'no checkpoint of step 7 (there: 1, 2)'),
    ('evaluate --model={P}/W#mixed', 2, "no expert 'mixed'"),
    ('evaluate --model={P}/W@', 2, 'is not W, W@STEP or W#EXPERT'),
    ('evaluate --model=hf:DIR', 2, 'not built yet'),
    ('evaluate --model={P}/bad', 4, 'no checkpoint can be trusted'),
    ('evaluate --model={P}/one_bad@2', 4, '2 is bad: meta.json'),
    ('evaluate --model={P}/W --data={B}', 2, 'was trained with tokenizer '),
    ('evaluate --model={P}/W --data={P}/half', 2, 'not a finished token store'),
    ('evaluate --model={P}/W --domains=legl', 2, "did you mean 'legal'"),
    ('evaluate --model={P}/W --split=dev', 2, 'has no dev text'),
    ('evaluate --model={P}/W --limit=x', 2, "--limit=x"),
    ('evaluate --model={P}/W --out={P}/none/results.json', 2, '--out={P}/none/results.json'),
    ('evaluate --modle={P}/W', 2, "'modle'. Did you mean: model"),
    (TRAIN + 'new --config.init.model={P}/none', 2, "no such workdir '{P}/none'"),
    (TRAIN + 'new --config.init.model={P}/bad', 4, 'no checkpoint can be trusted'),
    (TRAIN + 'new --config.init.expert=legal', 2, "init.expert='legal' has no effect with"),
    (TRAIN + 'new --config.train.lift=map', 2, 'train.lift=map has no effect: `train`'),
    (TRAIN + 'W --config.init.model={P}/W', 2, 'it started from fresh parameters'),
    ('forest', 2, 'forest: no action given'),
    ('forest list --model={P}/none', 2, "no such workdir '{P}/none'"),
    ('forest list --model={P}/bad', 4, 'no checkpoint can be trusted'),
    ('forest add --model={P}/W --expert=x --from={P}/W --workdir={P}/new', 2,
     'did not start from an expert'),
    ('forest remove --model={P}/W --expert=legl --workdir={P}/new', 2, "did you mean 'legal'"),
    ('forest remove --model={P}/W --expert=legal --workdir={P}/W', 2, 'nothing is overwritten'),
    ('prepare --input={P}/none --out={P}/new', 2, '--input={P}/none: no such folder'),
    ('prepare --input={T}', 2, '--out is missing'),
    ('prepare --input={T} --out={P}/empty/../W', 2, 'not empty and not a token store'),
    ('prepare --input={T} --out={P}/new --config.tokenzier=bytes', 2, "did you mean 'tokenizer'"),
]


@pytest.mark.parametrize(('typed', 'code', 'text'), CASES, ids=[c[0][-40:] for c in CASES])
def test_an_error_is_one_line_and_leaves_things_as_they_were(places, typed, code, text):
  before = runs.files(places['P'])
  result = runs.demix(*(word.format(**places) for word in typed.split()))
  message = result.error(code)
  assert text.format(**places) in message and 'Traceback' not in result.err
  assert result.out == '' or code == 1  # what fails later has said what it does
  assert {p: c for p, c in runs.files(places['P']).items() if p in before} == before
  made = {p for p in runs.files(places['P']) if p not in before}
  assert not {p for p in made if 'config.json' not in p and '/data/' not in p}, made
  shutil.rmtree(places['P'] / 'new', ignore_errors=True)


def test_a_bad_checkpoint_is_warned_of_and_does_not_end_an_evaluation(nursery, places):
  result = nursery.run('evaluate', f'--model={places["P"] / "one_bad"}', '--domains=kitchen')
  assert result.code == 0 and 'kitchen' in result.out
  [warning] = result.said()
  assert warning.startswith('warning: checkpoint ') and 'meta.json' in warning


def test_a_held_workdir_is_6(nursery, places):
  with workdir.hold(places['P'] / 'W', 'train'):
    message = nursery.run(*TRAIN.format(**places).split()[:-1],
                          f'--workdir={places["P"] / "W"}').error(6)
  assert f'pid {os.getpid()} on ' in message and 'wait until it ends' in message


def test_a_read_only_workdir_is_2():
  with tempfile.TemporaryDirectory() as outer:
    os.chmod(outer, 0o755)
    for name in ('existing', 'to be made/W'):
      folder = Path(outer) / name
      (folder if name == 'existing' else folder.parent).mkdir()
      os.chmod(folder if name == 'existing' else folder.parent, 0o555)
      old = os.geteuid()
      try:
        if old == 0:  # root may write everywhere: be nobody for a moment
          os.seteuid(65534)
        message = runs.demix('train', f'--workdir={folder}', '--config.data.path=S').error(2)
      finally:
        os.seteuid(old)
        os.chmod(folder if name == 'existing' else folder.parent, 0o755)
      assert 'Permission denied' in message and 'name' in message
      assert not list(folder.glob('*')), 'something was written'


def test_the_same_errors_by_an_interpreter_of_its_own(places):
  """What forked children show holds for `python -m demix` as people type it."""
  result = runs.fresh('train', '--workdir', '--config.seed=1')
  assert result.code == 2 and result.error(2)
  message = runs.fresh(*TRAIN.format(**places).split()[:-1], f'--workdir={places["P"] / "bad"}')
  assert 'no checkpoint can be trusted' in message.error(4)
  assert runs.fresh('--help').code == 0


@pytest.mark.parametrize('argv', ['--help', 'train --help'])
def test_a_closed_pipe_is_no_traceback(argv):
  done = subprocess.run(f'{sys.executable} -m demix {argv} | true', shell=True, cwd=runs.ROOT,
                        capture_output=True, text=True)
  assert (done.stdout, done.stderr) == ('', '')


def test_an_interrupt_by_the_keyboard_ends_training_with_one_line(nursery, stores, tmp_path):
  child = nursery.start('train', *runs.overrides(stores.bytes, tmp_path / 'W', train__steps=4000,
                                                 model__ffn='demix'))
  runs.until(lambda: (tmp_path / 'W/checkpoints').is_dir())
  child.send(signal.SIGINT)
  assert child.wait().error(130) == 'interrupted'
