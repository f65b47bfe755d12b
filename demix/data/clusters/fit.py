"""Finding clusters: TF-IDF, truncated SVD and balanced k-means on a sample of documents (c-BTM).

Balanced k-means as in c-BTM §2.2: Lloyd's algorithm whose assignment gives every cluster equally
many points. The papers solve that by auction, on chunks of 50,000 points of which the last decides;
here each block of the sample is an exact assignment problem, and centres are means over all blocks.
Balancing is for finding the centres only: documents then go to the nearest one.
"""

import dataclasses

import numpy as np

from demix.data.clusters.clusterer import RANDOM, Clusterer, unit, words
from demix.errors import BadInput
from demix.runtime.progress import Progress
from demix.settings import check, option

KINDS = ('balanced', 'kmeans', RANDOM)
FOUND = ('kind', 'balanced', 'kmeans')  # what is read where clusters are found
TOP_TERMS = 10

_STILL = 1e-3  # squared shifts of all centres together below which they have come to rest (c-BTM)


@dataclasses.dataclass(frozen=True)
class DiscoverConfig:
  """How clusters are found."""
  clusters: int = option(0, 'K; --discover=K says the same', low=0)
  kind: str = option('balanced', 'balanced (c-BTM), or a control: kmeans (without balancing) or '
                     'random (a partition by the hash of the text)', choices=KINDS)
  sample: int = option(20_000, 'documents of train text that the clusters are found on, those of '
                       'lowest hash', low=1)
  dimensions: int = option(100, 'of the truncated SVD', low=1, needs=FOUND)
  terms: int = option(50_000, 'words that are kept, the most frequent ones', low=1, needs=FOUND)
  min_documents: int = option(2, 'documents of the sample that a word must be in', low=1,
                             needs=FOUND)
  iterations: int = option(20, 'of k-means at most', low=1, needs=FOUND)
  restarts: int = option(4, 'first centres that are tried, on one block of the sample', low=1,
                        needs=FOUND)
  block: int = option(512, 'balanced: points of one assignment problem (its time grows with the '
                      'cube)', low=1, high=8192, needs=('kind', 'balanced'))
  seed: int = option(0, 'of the SVD and the first centres, or of the hash', low=0,
                    high=(1 << 31) - 1)
  clusterer: str = option('', 'assign by this clusterer (of a token store, or a folder), find none')

  def check(self):
    """Raises BadInput for values that cannot be."""
    check(self, 'discover.')
    if bool(self.clusters) == bool(self.clusterer):
      raise BadInput(f'discover.clusters={self.clusters} with discover.clusterer='
                     f'{self.clusterer!r}: give a number of clusters, --discover=8, or a clusterer '
                     'that has them')
    if self.clusterer and self != DiscoverConfig(clusterer=self.clusterer):
      raise BadInput(f'discover.clusterer={self.clusterer!r} with other options of discover: none '
                     'are looked for, it has its clusters; leave them out')
    if self.kind == 'balanced' and self.clusters > self.block:
      raise BadInput(f'discover.block={self.block} is below {self.clusters} clusters: give at '
                     'least as many')


def names_of(clusters: int) -> tuple:
  """What so many clusters that are found here are called."""
  return tuple(f'cluster{i}' for i in range(clusters))


def fit(texts: list[str], config: DiscoverConfig) -> Clusterer:
  """Finds clusters of documents; the same texts in the same order give the same bits.

  Args:
    texts: N documents. Balanced blocks are cut from them as they come, so they should be shuffled.
    config: checked; config.clusters is K.

  Raises:
    BadInput: fewer documents than clusters, or no word in enough of them.
  """
  K, names = config.clusters, names_of(config.clusters)
  if len(texts) < K:
    raise BadInput(f'{len(texts)} documents of train text for {K} clusters: give more text, or '
                   'fewer clusters')
  about = {'options': {k: v for k, v in vars(config).items() if k != 'clusterer'},
           'documents': len(texts)}
  if config.kind == RANDOM:
    nothing = np.zeros((0, 1), np.float32)
    return Clusterer(RANDOM, names, (), np.zeros(0, np.float32), nothing,
                     np.zeros((K, 1), np.float32), config.seed, about)
  from threadpoolctl import threadpool_limits  # scikit-learn's own
  with threadpool_limits(1):  # sums in one order, whatever the machine
    terms, idf, components, points = embed(texts, config)
    if config.kind == 'balanced':
      centres, labels = balanced_kmeans(points, K, config)
    else:
      centres, labels = kmeans(points, K, config)
  centres = centres.astype(np.float32)
  apart = (components * idf[:, None]) @ (centres - centres.mean(0)).T
  best = np.argsort(-apart, axis=0, kind='stable')[:TOP_TERMS]
  about |= {'sizes': dict(zip(names, np.bincount(labels, minlength=K).tolist())),
            'terms': {name: [terms[i] for i in best[:, k]] for k, name in enumerate(names)}}
  return Clusterer(config.kind, names, terms, idf, components, centres, 0, about)


def embed(texts, config: DiscoverConfig):
  """TF-IDF and truncated SVD of documents.

  Returns:
    V terms; idf float32 [V]; components float32 [V, d]; the documents as points, float64 [N, d] of
    unit length (zeros for one without a known word).
  """
  from sklearn.decomposition import TruncatedSVD
  from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
  analyzer = lambda text: [w for w in words(text) if w not in ENGLISH_STOP_WORDS]
  tfidf = TfidfVectorizer(analyzer=analyzer, min_df=min(config.min_documents, len(texts)),
                          max_features=config.terms)
  with Progress(len(texts), 'documents', 'words of the sample') as progress:
    def counted():
      for i, text in enumerate(texts):
        yield text
        progress.update(i + 1)
    try:
      weights = tfidf.fit_transform(counted())
    except ValueError:  # its ways of saying that no term is left
      raise BadInput(f'{len(texts)} documents of train text have no word in common that tells '
                     f'clusters apart (discover.min_documents={config.min_documents}): give text '
                     'with words, or more of it') from None
  d = max(1, min(config.dimensions, min(weights.shape) - 1))
  svd = TruncatedSVD(d, n_iter=5, random_state=config.seed).fit(weights)
  components = np.ascontiguousarray(svd.components_.T)
  # Of each axis the entry that is largest without its sign is positive.
  largest = np.abs(components).argmax(0)
  components *= np.sign(components[largest, np.arange(d)])
  components = components.astype(np.float32)
  terms = tuple(tfidf.get_feature_names_out().tolist())
  return terms, tfidf.idf_.astype(np.float32), components, unit(weights @ np.float64(components))


def balanced_kmeans(points_Nd, count: int, config: DiscoverConfig):
  """Centres float64 [K, d] and labels int [N]; in every block of the sample the sizes of any two
  clusters differ by at most 1."""
  from sklearn.cluster import kmeans_plusplus
  blocks = np.array_split(points_Nd, -(-len(points_Nd) // config.block))
  steps = config.restarts + config.iterations * len(blocks)
  with Progress(steps, 'blocks', 'balanced k-means') as progress:
    best, lowest = None, np.inf
    for attempt in range(config.restarts):
      centres, _ = kmeans_plusplus(blocks[0], count, random_state=config.seed + attempt)
      centres, labels = lloyd(blocks[:1], centres, config.iterations)
      cost = ((blocks[0] - centres[labels]) ** 2).sum()
      if cost < lowest:
        best, lowest = (centres, labels), cost
      progress.update(attempt + 1)
    done = config.restarts
    def count(blocks):
      nonlocal done
      progress.update(done := config.restarts + blocks)
    if len(blocks) > 1:
      best = lloyd(blocks, best[0], config.iterations, count)
    progress.resize(done)  # it comes to rest before the last iteration
    return best


def lloyd(blocks, centres, iterations: int, progress=lambda done: None):
  """Lloyd's algorithm with balanced assignment, until the centres rest or for `iterations`."""
  points, done = np.concatenate(blocks), 0
  for _ in range(iterations):
    parts = []
    for block in blocks:
      parts.append(balanced(square_distances(block, centres)))
      progress(done := done + 1)
    labels, before = np.concatenate(parts), centres
    centres = means(points, labels, before)
    if ((centres - before) ** 2).sum() < _STILL:
      break
  return centres, labels


def square_distances(points_nd, centres_Kd) -> np.ndarray:
  """Squared Euclidean distances, [n, K]."""
  return ((points_nd ** 2).sum(1)[:, None] - 2 * points_nd @ centres_Kd.T
          + (centres_Kd ** 2).sum(1))


def means(points_nd, labels_n, centres_Kd) -> np.ndarray:
  """The mean of each cluster's points, [K, d]; a cluster without points keeps its centre."""
  return np.stack([points_nd[labels_n == k].mean(0) if (labels_n == k).any() else centre
                   for k, centre in enumerate(centres_Kd)])


def balanced(cost_nK) -> np.ndarray:
  """The assignment of least total cost in which each cluster has ⌊n/K⌋ or ⌈n/K⌉ points: int [n].

  An assignment problem: every cluster has ⌊n/K⌋ places that must be taken and, where K does not
  divide n, one more that may be; what is left empty of those is taken by points of no cost.
  """
  from scipy.optimize import linear_sum_assignment
  n, K = cost_nK.shape
  each, rest = divmod(n, K)
  places = np.repeat(np.arange(K), each)
  cost = cost_nK[:, places]
  if rest:
    nobody = np.full((K - rest, n + K - rest), 0.0)
    nobody[:, :len(places)] = np.inf
    cost = np.concatenate([np.concatenate([cost, cost_nK], 1), nobody])
    places = np.concatenate([places, np.arange(K)])
  _, chosen = linear_sum_assignment(cost)
  return places[chosen[:n]]


def kmeans(points_Nd, count: int, config: DiscoverConfig):
  """Ordinary k-means (scikit-learn's): centres float64 [K, d], labels int [N]."""
  from sklearn.cluster import KMeans
  found = KMeans(count, n_init=config.restarts, max_iter=config.iterations, algorithm='lloyd',
                 random_state=config.seed).fit(points_Nd)
  return found.cluster_centers_, found.labels_


def agreement(counts_KD) -> dict:
  """How well clusters agree with known domains, from the number of documents in both.

  Returns:
    {"purity": share of documents of their cluster's largest domain, "adjusted_rand", "nmi":
    normalised mutual information}.
  """
  from sklearn import metrics
  counts = np.asarray(counts_KD, np.int64)
  index = np.indices(counts.shape).reshape(2, -1)
  clusters, domains = (np.repeat(i, counts.reshape(-1)) for i in index)
  return {'purity': float(counts.max(1).sum() / counts.sum()),
          'adjusted_rand': float(metrics.adjusted_rand_score(domains, clusters)),
          'nmi': float(metrics.normalized_mutual_info_score(domains, clusters))}
