"""Branch-Train-Merge's promise: experts are trained apart, and share nothing but their parent."""

import ctypes
import json
import os
import shutil
import struct

import corpus
import pytest
import runs
from forests import TRAIN, digests, forest
from test_forest import grown  # noqa: F401 (a fixture)

from demix.checkpoints import checkpoint
from demix.forest import manifest

pytestmark = pytest.mark.exact

OPENED = 0x20  # IN_OPEN


class Watch:
  """Which files below folders are opened, by whatever library (the kernel's inotify)."""

  def __init__(self, *folders):
    libc = ctypes.CDLL(None, use_errno=True)
    self.fd, self.names = libc.inotify_init1(os.O_NONBLOCK), {}
    for folder in folders:
      for path, _, _ in os.walk(folder):
        number = libc.inotify_add_watch(self.fd, os.fsencode(path), OPENED)
        assert number > 0, os.strerror(ctypes.get_errno())
        self.names[number] = path

  def seen(self) -> set[str]:
    """Files that were opened since; folders that were listed are left out."""
    out = set()
    while True:
      try:
        data = os.read(self.fd, 1 << 16)
      except BlockingIOError:
        return out
      while data:
        number, mask, _, length = struct.unpack_from('iIII', data)
        assert number in self.names  # or the queue ran over
        name = data[16:16 + length].rstrip(b'\0').decode()
        if name and not mask & 0x40000000:
          out.add(os.path.join(self.names[number], name))
        data = data[16 + length:]


@pytest.fixture
def seeded(grown, tmp_path):  # noqa: F811
  """A forest whose seed is trained and no expert, as it is copied to another machine."""
  return bare(grown, tmp_path / 'F')


def bare(grown, F):  # noqa: F811
  F.mkdir()
  shutil.copyfile(grown / manifest.FILE, F / manifest.FILE)
  with manifest.edit(F) as found:
    found['experts'] = {}
  shutil.copytree(grown / 'seed', F / 'seed')
  return F


@pytest.mark.parametrize('how', ['--only=code', '--together'])
def test_an_expert_opens_no_file_of_another_and_no_other_data(grown, stores, tmp_path, how):  # noqa: F811
  F, store = shutil.copytree(grown, tmp_path / 'F'), shutil.copytree(stores.bytes, tmp_path / 's')
  with manifest.edit(F) as found:
    del found['experts']['code']  # the others are there
  shutil.rmtree(F / 'experts/code')
  others = Watch(F / 'experts/legal', F / 'experts/verse',
                 *(store / d for d in (*corpus.DOMAINS, corpus.NOVEL) if d != 'code'))
  own = Watch(F / 'seed', store / 'code')
  ended = forest('run', f'--forest={F}', how, f'--data={store}')
  assert ended.code == 0, ended
  read = own.seen()
  assert any('seed/checkpoints/4/state' in p for p in read)  # the watch sees what C++ opens too
  assert str(store / 'code/train/tokens.bin') in read
  # whether they are registered is asked of the records of experts, never of their arrays
  assert {p for p in others.seen() if os.path.basename(p) != 'meta.json'} == set()
  assert digests(F) == digests(grown)


def test_branches_in_any_order_on_any_machine_are_the_same(grown, seeded, stores, tmp_path):  # noqa: F811
  """`code` is trained in another folder and copied here; the others in the opposite order."""
  away = bare(grown, tmp_path / 'away')
  assert forest('run', f'--forest={away}', '--only=code').code == 0
  for name in ('verse', 'legal'):
    assert forest('run', f'--forest={seeded}', f'--only={name}').code == 0
  shutil.copytree(away / 'experts/code', seeded / 'experts/code')
  ended = forest('run', f'--forest={seeded}')
  assert ended.code == 0 and 'to be trained' not in ended.out
  assert digests(seeded) == digests(grown)
  for name in TRAIN:
    assert runs.digests(seeded / f'experts/{name}') == runs.digests(grown / f'experts/{name}')


@pytest.mark.long
def test_other_text_of_one_domain_changes_its_expert_only(grown, seeded, tmp_path):  # noqa: F811
  text = corpus.write(tmp_path / 'text')
  file = text / 'verse/train.jsonl'
  file.write_text('\n'.join(json.dumps({'text': corpus.document('code', f'else {i}')})
                            for i in range(corpus.TRAIN['verse'])) + '\n')
  store = corpus.store(text, tmp_path / 'store', tokenizer='bytes')
  ended = forest('run', f'--forest={seeded}', f'--data={store}')
  assert ended.code == 0, ended
  ours, theirs = digests(seeded), digests(grown)
  assert [name for name in TRAIN if ours[name] != theirs[name]] == ['verse']


def test_a_forest_and_a_dense_lm_train_on_the_same_number_of_tokens(grown, stores, tmp_path):  # noqa: F811
  ended = runs.train(stores.bytes, tmp_path / 'dense', data__domains=','.join(TRAIN),
                     data__batch_size=6)
  assert ended.code == 0, ended
  meta = checkpoint.read_meta(tmp_path / 'dense/checkpoints', 8)
  found = manifest.load(grown)
  seed = checkpoint.read_meta(grown / 'seed/checkpoints', 4)
  tokens = seed['ledger']['tokens'] + sum(e['tokens'] for e in found['experts'].values())
  assert tokens == meta['ledger']['tokens'] == 8 * 6 * 32
  assert sum(checkpoint.read_meta(grown / f'experts/{n}/checkpoints', 4)['ledger']['flops']
             for n in TRAIN) + seed['ledger']['flops'] == meta['ledger']['flops']
