"""Which domains of a store a model has seen in training: by name, and by the digests of the text.

Names are not enough: experts on clusters have seen text that the labelled store calls otherwise.
"""

import numpy as np
import xxhash

from demix.data.tokens.store import TokenStore, read_card
from demix.errors import BadInput
from demix.eval.sequences import shuffled

_LOOKED_AT = 1000  # train documents of a domain, a sample that is the same for all


def domains_of(loaded, store: TokenStore, domains) -> set:
  """Those of a store's domains that a model was trained on.

  A domain is seen if the model, or what it goes back to (what its run started from, an expert that
  was removed), has one of its name, or if some of its train text was read under another: the same
  split by the data cards, a split that was cut into clusters, or the same documents in the token
  store of the training, where that is at hand.
  """
  known = {*loaded.domains, *(d for _, trained in loaded.trained_in for d in trained)}
  found = {d for d in domains if d in known}
  digests = {d: store.card['domains'][d]['splits'].get('train', {}).get('tokens_digest')
             for d in domains}
  for folder, trained in loaded.trained_in:
    if folder is None:
      continue
    try:
      card = read_card(folder / 'data')
    except BadInput:
      continue  # of a run of before there was a copy
    read = {card['domains'][d]['splits'].get('train', {}).get('tokens_digest')
            for d in trained if d in card['domains']}
    if 'clusterer' in card:
      read |= {digest for name, digest in card['inputs'].items() if name.endswith('/train')}
    found |= {d for d, digest in digests.items() if digest and digest in read}
  left = [d for d in domains if d not in found and digests[d]]
  if not left:
    return found
  for folder, trained in loaded.trained_from:
    try:
      mine = TokenStore.open(folder, trained)
    except BadInput:
      continue
    if mine.tokenizer_meta['fingerprint'] == store.tokenizer_meta['fingerprint']:
      trained = [t for t in trained if t in mine.domains and 'train' in mine.splits(t)]
      found |= {d for d in left if share_documents(store, d, mine, trained)}
  return found


def share_documents(store: TokenStore, domain: str, mine: TokenStore, trained) -> bool:
  """Whether a document of a sample of a domain's train split is one of those trained on."""
  table = np.asarray(store.documents(domain, 'train'))
  sample = shuffled(len(table))[:_LOOKED_AT]
  wanted, sizes = {_digest(store, domain, table, i) for i in sample}, _sizes(table)[sample]
  for name in trained:
    other = np.asarray(mine.documents(name, 'train'))
    alike = np.flatnonzero(np.isin(_sizes(other), sizes))
    if any(_digest(mine, name, other, i) in wanted for i in alike):
      return True
  return False


def _sizes(table) -> np.ndarray:
  """Tokens and bytes of every document in one number, to look at few documents in full."""
  return np.diff(table[:, 0], prepend=0) * (1 << 32) + table[:, 1]


def _digest(store, domain, table, i) -> str:
  begin = table[i - 1, 0] if i else 0
  tokens = store.tokens(domain, 'train')[begin:table[i, 0]]
  return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens))
