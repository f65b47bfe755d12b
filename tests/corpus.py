"""A tiny corpus that training and evaluation are tested on: four domains and a novel one.

The domains differ in alphabet, word list and size, their order is not the alphabet's, and documents
are shorter and longer than the sequences that are cut from them. The novel domain's valid text is
code and its test text is verse, so that an expert chosen by the wrong split shows.
"""

import dataclasses
import json
import random
from pathlib import Path

from demix.data.corpus.prepare import PrepareConfig, prepare

WORDS = {
    'legal': 'whereas the party shall hereby agree, pursuant to section 12; any lessee of record, '
             'his heirs and assigns covenant not to sublet; herein; save as in clause 7',
    'code': 'def f(x): return [y for y in x if y != 0] # ok \n else: pass',
    'verse': 'ω θάλασσα νύχτα φως — ψυχή · ἄστρα 夜 の 月',
    'kitchen': 'salt BUTTER Café Jalapeño Stir Heat 3/4 Cup! Flour',
}
DOMAINS = tuple(WORDS)
NOVEL = 'mixed'
TRAIN = {'legal': 60, 'code': 24, 'verse': 12, 'kitchen': 6}  # documents


def document(style: str, seed: str) -> str:
  """A text of 2 to 60 words in one domain's style, after the number that `seed` ends with."""
  draw = random.Random(f'{style} {seed}')
  words = WORDS[style].split(' ')
  return ' '.join([seed.split()[-1], *draw.choices(words, k=draw.choice((2, 9, 30, 60)))])


def texts(domain: str, split: str) -> list[str]:
  """The documents of a domain's split."""
  style = domain
  if domain == NOVEL:
    style = {'train': 'legal', 'valid': 'code', 'test': 'verse'}[split]
  count = TRAIN.get(domain, 6) if split == 'train' else 5
  return [document(style, f'{domain} {split} {i}') for i in range(count)]


def write(folder: Path, names: dict | None = None) -> Path:
  """Writes the corpus as JSON Lines; `names` gives domains other names."""
  for domain in (*DOMAINS, NOVEL):
    target = folder / (names or {}).get(domain, domain)
    target.mkdir(parents=True)
    for split in ('train', 'valid', 'test'):
      lines = [json.dumps({'text': t}, ensure_ascii=False) for t in texts(domain, split)]
      (target / f'{split}.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return folder


def store(text: Path, out: Path, names: dict | None = None, **config) -> Path:
  """A token store of the corpus in `text`, its domains in the order of DOMAINS, not sorted."""
  called = lambda domain: (names or {}).get(domain, domain)
  prepare(text, out, PrepareConfig(domains=tuple(map(called, (*DOMAINS, NOVEL))),
                                   novel=(called(NOVEL),), **config), lambda line: None)
  return out


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Paths: the text, a token store of its bytes, and one by a small BPE."""
  text: Path
  bytes: Path
  bpe: Path


def make(folder: Path) -> Corpus:
  """Writes the corpus and both stores below `folder`."""
  text = write(folder / 'text')
  return Corpus(text, store(text, folder / 'bytes', tokenizer='bytes'),
                store(text, folder / 'bpe', vocab_size=300))
