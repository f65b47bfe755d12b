"""Importance sampling of a general corpus by clusters (Grangier et al. 2024, "Need a small
specialized language model? Plan early!").

Each document of the general corpus has weight P(cluster | target) / P(cluster | general). Drawn by
these weights, clusters come up as often as in the target's text, and documents of one cluster
equally often. In a store whose domains are the clusters that is sampling domains by their share in
the target, which `data.sampling=weights` does exactly: after any number of rows every cluster has
had its share to within a few rows (`batches.Turns`).
"""

from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.settings import nearest


def shares(store: TokenStore, target: str, split: str = 'train') -> dict:
  """{cluster: share of the target's tokens} of the clusters that have any: `data.weights`.

  Args:
    store: made by `prepare --discover`, with `target` among its novel domains: a small text of the
      kind that a model is wanted for.
    split: of the target.

  Raises:
    BadInput: no clusters in the store, or no such target or split.
  """
  known = store.card.get('clusterer', {}).get('tokens')
  if known is None:
    raise BadInput(f'{store.path} has no clusters: make it by prepare --discover=K')
  if target not in known:
    raise BadInput(f'{store.path}: no target {target!r} among its novel domains'
                   f'{nearest(target, known)}')
  if split not in known[target]:
    raise BadInput(f'{store.path}/{target} has no {split} text')
  tokens = known[target][split]
  total = sum(tokens.values())
  return {cluster: n / total for cluster, n in tokens.items() if n}


def weight(store: TokenStore, target: str) -> dict:
  """{cluster: importance weight of its text, P(cluster | target) / P(cluster | general)}."""
  general = {d: store.card['domains'][d]['splits']['train']['tokens'] for d in store.domains
             if store.roles[d] == 'train'}
  total = sum(general.values())
  found = shares(store, target)
  return {cluster: found.get(cluster, 0.0) * total / n for cluster, n in general.items()}
