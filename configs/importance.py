"""The baseline for every expert method: a dense LM on a general corpus that is resampled to look
like a target domain (Grangier et al. 2024; docs/method.md).

  python -m demix prepare --input=local_text --out=W/clusters --discover=16 \\
      --config=configs/quickstart_corpus.py
  python -m demix train --config=configs/importance.py:W/clusters,cython --workdir=W/importance
  python -m demix evaluate --model=W/importance --domains=cython

The target (cython) is a novel domain of the store: of its text only the share of each cluster is
used. Claim: lower perplexity on the target than dense on the corpus as it is
(the same config without an argument), at the same cost; the cost is paid for each target anew.
"""

from configs.quickstart import get_config as dense
from demix.data.sampling.importance import shares
from demix.data.tokens.store import TokenStore


def get_config(arg=''):
  """arg: STORE,TARGET; without one, all clusters of --config.data.path in proportion to size."""
  config = dense('dense')
  config.data.domains, config.data.sampling = (), 'proportional'
  if not arg:
    return config
  path, comma, target = arg.rpartition(',')
  if not comma:
    raise ValueError(f'{arg!r}: STORE,TARGET, for example W/clusters,cython')
  found = shares(TokenStore.open(path), target)
  config.data.path, config.data.domains = path, tuple(found)
  config.data.sampling, config.data.weights = 'weights', found
  return config
