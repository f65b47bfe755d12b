"""A clusterer: where a text lies among K clusters, and so does every beginning of it.

The embedding of c-BTM (Gururangan et al. 2023, §2.2): TF-IDF, truncated SVD, unit length. All but
the last step is linear, so a text's point is the sum of one vector a word, and the points of all
beginnings of a text cost one addition a word. Numbers are no words, as in the released code.

Plain arrays and JSON (docs/contracts.md); `clusters.py` makes them. NumPy is enough to read them.
"""

import codecs
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import xxhash

from demix.errors import BadInput
from demix.names import is_name
from demix.runtime import digests

VERSION = 1
FOLDER = 'clusterer'  # in a token store
RANDOM = 'random'

_WORD = re.compile(r'\w\w+')
_OPEN = re.compile(r'\w*\Z')  # the word that a text may end in the middle of
_ARRAYS = ('idf', 'components', 'centres')
_AGAIN = 'discover the clusters again (python -m demix prepare --discover=K)'


def words(text: str) -> list[str]:
  """Lower-case words of at least two letters, digits or _; none that begins with a digit."""
  return [w.lower() for w in _WORD.findall(text) if not w[0].isdigit()]


@dataclasses.dataclass(frozen=True)
class Clusterer:
  """K centres and what leads from a text to a point.

  Attributes:
    kind: balanced, kmeans, or random (a partition by hash: no text is nearer to one cluster).
    names: K names, those of the domains that the clusters are in a token store.
    terms: V words. idf: float32 [V]. components: float32 [V, d], what a word is in the space of the
      SVD. centres: float32 [K, d], means of points of unit length.
    seed: random: of the hash.
    about: what made it, for people: options, documents it was fitted on, terms and sizes.
  """
  kind: str
  names: tuple
  terms: tuple
  idf: np.ndarray
  components: np.ndarray
  centres: np.ndarray
  seed: int = 0
  about: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, '_vectors', self.components * self.idf[:, None])  # summed in float64
    object.__setattr__(self, '_row', {term: i for i, term in enumerate(self.terms)})

  @property
  def fingerprint(self) -> str:
    """xxh3-128 over all that decides where a text belongs; `about` does not."""
    leaves = {n: digests.of_leaf(n, getattr(self, n)) for n in _ARRAYS}
    facts = orjson.dumps([self.kind, self.names, self.seed, xxhash.xxh3_128_hexdigest(
        '\n'.join(self.terms).encode())])
    return digests.of_tree(leaves | {'facts': xxhash.xxh3_128_hexdigest(facts)})

  # ---- whole texts -----------------------------------------------------------------------------

  def point(self, text: str) -> np.ndarray:
    """float64 [d] of unit length; zeros where no word of the text is known."""
    counts = Counter(self._row[w] for w in words(text) if w in self._row)
    rows = np.fromiter(counts, np.int64, len(counts))
    times = np.fromiter(counts.values(), np.float64, len(counts))
    return unit((times[:, None] * self._vectors[rows]).sum(0))

  def distances(self, point: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance to each centre, float64 [K]. (No matrix product: its last bits
    would depend on how many texts are asked for at once.)"""
    return ((self.centres - point) ** 2).sum(1)

  def assign(self, text: str) -> int:
    """The cluster of a document, a function of its text alone: the nearest centre, of equally near
    ones the first; the hash where the partition is random."""
    if self.kind == RANDOM:
      return xxhash.xxh3_64_intdigest(text.encode(), seed=self.seed) % len(self.names)
    return int(self.distances(self.point(text)).argmin())

  # ---- beginnings of texts ---------------------------------------------------------------------

  def before(self, tokenizer, ids, limit: int = 0) -> np.ndarray:
    """What precedes each of n tokens, as squared distances to the centres.

    Args:
      tokenizer: of the ids.
      ids: n token ids; end-of-document ends a word.
      limit: only the first so many tokens are looked at; 0: all before the one in question.

    Returns:
      float32 [n, K]; row t depends on ids[:t] only, or on ids[:min(t, limit)].
    """
    reading = Reading(self, tokenizer, limit)
    out = np.empty((len(ids), len(self.names)), np.float32)
    for t, i in enumerate(ids):
      out[t] = reading.distances
      reading.read(int(i))
    return out

  def before_rows(self, tokenizer, targets_BL, limit: int = 0, segments_BL=None) -> np.ndarray:
    """`before` of each row, and of each segment of it: the evidence of a batch, float32 [K, B, L].

    Args:
      segments_BL: int [B, L], one number for each document; None: a row is one text.
    """
    rows = []
    for b, row in enumerate(np.asarray(targets_BL)):
      cuts = [] if segments_BL is None else np.flatnonzero(np.diff(segments_BL[b])) + 1
      rows.append(np.concatenate([self.before(tokenizer, part, limit)
                                  for part in np.split(row, cuts)]))
    return np.stack(rows).transpose(2, 0, 1)

  def take(self, names) -> 'Clusterer':
    """The clusters `names` only, in that order: for evidence, not for assigning."""
    rows = [self.names.index(n) for n in names]
    return dataclasses.replace(self, names=tuple(names), centres=self.centres[rows])

  # ---- files -----------------------------------------------------------------------------------

  def save(self, folder: Path):
    """Writes it into `folder`, which is made; meta.json last."""
    folder.mkdir(parents=True)
    for name in _ARRAYS:
      np.save(folder / f'{name}.npy', getattr(self, name), allow_pickle=False)
    (folder / 'terms.json').write_bytes(orjson.dumps(self.terms))
    meta = {'version': VERSION, 'kind': self.kind, 'names': self.names, 'seed': self.seed,
            'fingerprint': self.fingerprint, 'about': self.about}
    (folder / 'meta.json').write_bytes(orjson.dumps(meta, option=orjson.OPT_INDENT_2))

  @classmethod
  def load(cls, folder) -> 'Clusterer':
    """The clusterer in `folder`, or in the token store `folder`.

    Raises:
      BadInput: there is none, of another version, or not what its fingerprint says.
    """
    folder = Path(folder)
    if (folder / FOLDER).is_dir():
      folder = folder / FOLDER
    try:
      meta = orjson.loads((folder / 'meta.json').read_bytes())
      if not isinstance(meta, dict) or 'names' not in meta:
        raise BadInput(f'{folder}: not a clusterer: name a store that prepare --discover made')
      if meta['version'] != VERSION:
        raise BadInput(f'{folder}: a clusterer of version {meta["version"]}, this demix reads '
                       f'{VERSION}: {_AGAIN}')
      arrays = [np.load(folder / f'{n}.npy', allow_pickle=False) for n in _ARRAYS]
      terms = tuple(orjson.loads((folder / 'terms.json').read_bytes()))
      bad = [n for n in meta['names'] if not is_name(n)]
      if bad or len(set(meta['names'])) < len(meta['names']):
        raise ValueError(f'{bad[0]!r} cannot be a cluster' if bad else 'two clusters of one name')
      found = cls(meta['kind'], tuple(meta['names']), terms, *arrays, meta['seed'], meta['about'])
      sizes = len(found.idf), *found.components.shape, *found.centres.shape
    except OSError as e:
      raise BadInput(f'{e.filename}: no such file of a clusterer ({e.strerror}): name a store that '
                     'prepare --discover made, or its clusterer/ folder') from None
    except (ValueError, KeyError, TypeError, EOFError, AttributeError) as e:
      raise BadInput(f'{folder}: broken clusterer ({type(e).__name__}: {e}): {_AGAIN}') from None
    V, d = len(terms), sizes[2]
    if sizes != (V, V, d, len(found.names), d) or found.fingerprint != meta['fingerprint']:
      raise BadInput(f'{folder}: its files have fingerprint {found.fingerprint}, but meta.json '
                     f'says {meta["fingerprint"]}: {_AGAIN}')
    return found


def unit(point: np.ndarray) -> np.ndarray:
  """[…, d] scaled to unit length; zeros stay."""
  length = np.sqrt((point ** 2).sum(-1, keepdims=True))
  return np.divide(point, length, out=np.zeros_like(point), where=length > 0)


class Reading:
  """A text that is read token by token, and where it lies so far.

  Args:
    clusterer, tokenizer: see there.
    limit: tokens after which it stays where it is; 0: none.

  Attributes:
    distances: float64 [K], squared, of the text so far; of no text at all that of the origin.
  """

  def __init__(self, clusterer: Clusterer, tokenizer, limit: int = 0):
    self._clusterer, self._tokenizer, self._left = clusterer, tokenizer, limit or -1
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._settled = np.zeros(clusterer.components.shape[1])  # of words that are whole
    self._open = ''  # what the text ends with that more letters may belong to
    self._last = None  # the row of that, if it is a word as it stands
    self.distances = clusterer.distances(self._settled)

  def read(self, i: int):
    """One more token."""
    if not self._left:
      return
    self._left -= 1
    end = i == self._tokenizer.eod_id
    text = self._open + self._decoder.decode(b'\n' if end else self._tokenizer.spelling(i))
    at = _OPEN.search(text).start()
    self._open = text[at:]
    rows = list(self._rows(text[:at]))
    last = next(self._rows(self._open), None)
    if rows or last != self._last:
      self._last = last
      for row in rows:
        self._settled += self._clusterer._vectors[row]
      whole = self._settled if last is None else self._settled + self._clusterer._vectors[last]
      self.distances = self._clusterer.distances(unit(whole))

  def _rows(self, text) -> Iterator[int]:
    row = self._clusterer._row
    return (row[w] for w in words(text) if w in row)
