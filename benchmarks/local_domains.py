"""Which text on this machine differs: the table that the quick start's domains were chosen by.

  python benchmarks/local_domains.py [--workdir=DIR] [--tokens=6553600] [--epochs=4]

For each domain of the embedded corpus (local_domains.py) and for kinds of text that it
does not hold: documents and MB; and of those that have enough for a perplexity:

* vocabulary overlap (demix/data/overlap/vocabulary.py), in percent of the k most frequent words;
* cross-perplexity, as bits per byte: valid text of one domain (column) under a model of another
  (row). The model is a trigram interpolated by Witten and Bell's rule over 1,024 BPE ids that all
  share, from as many train ids of each;
* distance: what two domains cost more under the other's model than under their own, the mean of
  both directions.

Then the sets of four, the most different first (mean of the six distances), of the domains that
give --tokens train tokens, a quarter each, in at most --epochs epochs; and how far the others are
from the nearest of the first set: the farthest is the novel one. Lists (names, labels, JSON) are
shown and not chosen: one token tells them apart, so experts would win on them whatever the method.
"""

import argparse
import itertools
import re
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout, without installing

from demix.data.local import local_domains, local_text, source_code  # noqa: E402
from demix.data.local.local_domains import DOMAINS, Domain  # noqa: E402

VOCABULARY = 1024
LISTS = ('characters', 'data')
V = np.uint64(VOCABULARY)
_RULER = re.compile(r'[-=*#~]{10}|(?i:licen[sc]e|copyright)')
# Names that a rule makes of the code point, thousands in a row.
_COUNTED = re.compile(r'-[0-9A-F]{2,}$|^HANGUL SYLLABLE ')


def _texts(pattern, cut=local_domains._prose):
  """Files of the required packages whose path matches, whatever `local_domains` does not read."""
  for name, path in local_domains._records():
    if re.search(pattern, name):
      yield local_domains._text(path), cut


def _programs():
  for name, path in local_domains._records():
    if name.startswith('jax/_src/internal_test_util/') and name.endswith('.py'):
      for text in local_domains._long_strings(local_domains._text(path)):
        if 'func.func' in text:
          yield text, local_domains._c_code


def _comments(text: str) -> list[str]:
  """Comments of Python that say something (60 characters), in documents."""
  found, end = [], -1
  for token in source_code._TOKEN.finditer(text):
    if token[0][0] != '#':
      continue
    line = token[0].lstrip('#!: ').rstrip()
    if found and not text[end:token.start()].strip() and text.count('\n', end, token.start()) == 1:
      found[-1] += '\n' + line
    else:
      found.append(line)
    end = token.end()
  return local_domains._prose('\n\n'.join(
      c for c in found if len(c) >= 60 and not _RULER.search(c)))


def _characters():
  """Code points and names of Unicode, 64 a source, as the standard library has them."""
  names = ((code, unicodedata.name(chr(code), '')) for code in range(sys.maxunicode + 1))
  named = [f'{code:04X} {name}' for code, name in names if name and not _COUNTED.search(name)]
  for start in range(0, len(named), 64):
    yield '\n'.join(named[start:start + 64]), local_domains._prose


# Kinds of text that are there and are no domain of the corpus; the table says why.
OTHERS = {
    'comments': Domain('comments of Python modules', 'train', lambda: (
        (text, _comments) for text in local_domains._python(False))),
    'characters': Domain('names of the characters of Unicode', 'train', _characters),
    'licences': Domain('licences and notices', 'train', lambda: _texts(
        r'(?i)(^|/)(licen[cs]es?|copying|notice)[^/]*(/|$)(?!.*\.(py|pyc|json)$)')),
    'protos': Domain('protocol buffers', 'train', lambda: _texts(
        r'\.proto$', local_domains._c_code)),
    'programs': Domain('StableHLO modules in JAX', 'train', _programs),
    'catalogues': Domain('messages in 36 languages', 'train', lambda: _texts(r'\.po$')),
    'web': Domain('JavaScript, CSS, HTML', 'train', lambda: _texts(
        r'\.(js|css|html)$', local_domains._c_code)),
    'fortran': Domain('Fortran', 'train', lambda: _texts(r'\.(f|f90|pyf)$', local_domains._c_code)),
    'data': Domain('JSON, YAML, lists of labels', 'train', lambda: _texts(
        r'\.(json|ya?ml)$|labels\.txt$|classes[^/]*\.txt$', local_domains._c_code)),
}


class Trigram:
  """Witten and Bell's interpolation: p(w | h) = (c(h w) + n(h) p(w | h')) / (c(h) + n(h)), with
  n(h) the kinds of ids seen after h; below the unigram all ids are equally likely."""

  def __init__(self, ids: np.ndarray):
    self.tables = [self._table(ids, order) for order in range(3)]

  @staticmethod
  def _keys(ids, order):
    """The last `order` + 1 ids up to each place, as one number."""
    keys = ids[order:].astype(np.uint64)
    for back in range(1, order + 1):
      keys = keys + ids[order - back:len(ids) - back].astype(np.uint64) * V ** np.uint64(back)
    return keys

  def _table(self, ids, order):
    seen, count = np.unique(self._keys(ids, order), return_counts=True)
    history, first = np.unique(seen // V, return_index=True)
    return (seen, count), (history, np.add.reduceat(count, first),
                           np.diff(np.append(first, len(seen))))

  def bits(self, ids: np.ndarray) -> float:
    """Bits of all but the first two ids."""
    def found(keys, asked, *values):
      at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
      return [np.where(keys[at] == asked, v[at], 0) for v in values]
    p = 1 / VOCABULARY
    for order, ((seen, count), (history, total, kinds)) in enumerate(self.tables):
      keys = self._keys(ids, order)[2 - order:]
      [c] = found(seen, keys, count)
      n, t = found(history, keys // V, total, kinds)
      p = np.where(n > 0, (c + t * p) / np.maximum(n + t, 1), p)
    return -np.log2(p).sum()


def distances(store, names):
  """(bits per byte of the column's valid text under the row's model, distances), both [D, D]."""
  train = {n: np.asarray(store.tokens(n, 'train')) for n in names}
  least = min(map(len, train.values()))
  models = [Trigram(train[n][:least]) for n in names]
  held = [np.asarray(store.tokens(n, 'valid')) for n in names]
  bits = np.array([[model.bits(ids) / store.token_bytes_V[ids].sum() for ids in held]
                   for model in models])
  more = bits - np.diag(bits)
  return least, bits, (more + more.T) / 2


def matrix(names, values, style):
  wide = max(map(len, names))
  print(' ' * wide, *(f'{n[:9]:>9}' for n in names))
  for name, row in zip(names, values):
    print(f'{name:{wide}}', *(f'{v:9{style}}' for v in row))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', default='')
  parser.add_argument('--tokens', type=int, default=6_553_600)
  parser.add_argument('--epochs', type=float, default=4)
  args = parser.parse_args()
  from demix.data.corpus.prepare import PrepareConfig, prepare
  DOMAINS.update(OTHERS)
  least_bytes, local_text.LEAST_BYTES = local_text.LEAST_BYTES, 1  # what is too little is shown too
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(args.workdir or folder)
    report = local_text.write(folder / 'text')
    print(f'{"domain":12} {"documents":>9} {"train MB":>8} {"test MB":>8}  what')
    names = []
    for name, r in report.items():
      few = min(r['bytes']['test'], r['bytes']['valid']) < least_bytes
      print(f'{name:12} {sum(r["documents"].values()):9,} {r["bytes"]["train"] / 1e6:8.2f} '
            f'{r["bytes"]["test"] / 1e6:8.2f}  {DOMAINS[name].what}' + ', too little' * few)
      names += [] if few else [name]
    store = prepare(folder / 'text', folder / 'store', PrepareConfig(
        domains=tuple(names), vocab_size=VOCABULARY), lambda line: None)
    table(store, names, args)


def table(store, names, args):
  """Prints what the domains have in common, and which four differ most."""
  overlap = store.card['vocabulary']
  print(f'\nvocabulary overlap, % of the {overlap["top"]:,} most frequent words')
  matrix(names, [[100 * overlap['overlap'][a][b] for b in names] for a in names], '.0f')
  least, bits, apart = distances(store, names)
  print(f'\nbits per byte of valid text (column) under a trigram of {least:,} train ids (row)')
  matrix(names, bits, '.2f')
  print('\ndistance: bits per byte more under the other model, mean of both directions')
  matrix(names, apart, '.2f')
  ids = [len(store.tokens(n, 'train')) for n in names]
  print(f'\nepochs of {args.tokens / 4:,.0f} tokens')
  print(', '.join(f'{n} {args.tokens / 4 / i:.1f}' for n, i in zip(names, ids)))
  text = [i for i, n in enumerate(names) if n not in LISTS]
  enough = [i for i in text if args.tokens / 4 <= args.epochs * ids[i]]
  print(f'\nsets of four of at most {args.epochs:g} epochs, by mean distance')
  pairs = lambda four: [apart[i, j] for i, j in itertools.combinations(four, 2)]
  ranked = sorted(itertools.combinations(enough, 4), key=lambda four: -np.mean(pairs(four)))
  for four in ranked[:8] + ranked[-1:]:
    print(f'{np.mean(pairs(four)):.2f} (least {min(pairs(four)):.2f})',
          ' '.join(names[i] for i in four))
  print('\nthe others, by distance from the nearest of the first set')
  nearest = {i: min(ranked[0], key=lambda j, i=i: apart[i, j])
             for i in text if i not in ranked[0]}
  for i, j in sorted(nearest.items(), key=lambda item: -apart[item]):
    print(f'{names[i]:12} {apart[i, j]:.2f} from {names[j]}')


if __name__ == '__main__':
  main()
