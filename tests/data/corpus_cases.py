"""Small corpora that the tests of the data write, and what a verb says."""

import gzip
import json
from pathlib import Path

from demix.__main__ import main

WORDS = 'the cat sat on a mat and saw 42 birds; naïve café 東京 😀 don\'t we\'ll'.split()


def document(seed: int, words: int = 12) -> str:
  """A text of `words` words that differs from seed to seed."""
  return ' '.join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(words)) + \
      f'\n{seed}'


def jsonl(texts) -> bytes:
  return b''.join(json.dumps({'text': t}).encode() + b'\n' for t in texts)


def write(folder: Path, domains: dict) -> Path:
  """Writes {domain: {split: [text]}} as JSON Lines (gzip for names that end in .gz)."""
  for domain, splits in domains.items():
    (folder / domain).mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
      name = split if '.jsonl' in split else f'{split}.jsonl'
      data = jsonl(texts)
      (folder / domain / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  return folder


def small(folder: Path, domains=('law', 'med'), train: int = 20, salt: int = 0) -> Path:
  """Domains of three splits, `train` train documents each."""
  return write(folder, {
      d: {s: [document(100_000 * i + 10_000 * j + k + 7 * salt) for k in range(n)]
          for j, (s, n) in enumerate((('train', train), ('valid', 3), ('test', 4)))}
      for i, d in enumerate(domains)})


def flags(folder: Path, *more, tokenizer: str = 'bytes') -> tuple:
  """The flags that prepare FOLDER/in into FOLDER/out."""
  return (f'--input={folder / "in"}', f'--out={folder / "out"}', f'--config.tokenizer={tokenizer}',
          *more)


def snapshot(folder: Path) -> dict:
  """{path: (content, time of change, inode)} of everything below `folder`."""
  return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino)
          for p in folder.rglob('*') if p.is_file()}


def verb(capsys, *flags) -> tuple[int, str, str]:
  """(exit code, stdout, stderr) of `python -m demix prepare *flags`."""
  capsys.readouterr()
  code = main(['prepare', *map(str, flags)])
  out, err = capsys.readouterr()
  return code, out, err


def refused(capsys, *flags) -> str:
  """The one error line of a prepare that must end with exit code 2."""
  code, out, err = verb(capsys, *flags)
  assert code == 2, (code, out, err)
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert out == ''
  return err
