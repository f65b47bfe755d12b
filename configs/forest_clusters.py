"""c-BTM (Gururangan et al. 2023, 2303.14177): a seed, and a branch for each of K clusters.

  python -m demix prepare --input=W/corpus --out=W/clusters --discover=4
  python -m demix forest plan --config=configs/forest_clusters.py:4 --forest=F --data=W/clusters
  python -m demix forest run --forest=F
  python -m demix evaluate --model=forest:F --mix=clusters

The paper's claim (Figure 1): K experts on K clusters beat one dense LM trained on as many tokens.
Budgets as there: every branch makes equally many updates, with a batch K times smaller than dense,
so all K are tokens for tokens dense's second half (recipe of configs/quickstart.py, 600 updates).
Where K does not divide dense's sequences of an update, configs/forest_domains.py says what is done.
The paper's seed is OPT; here it is dense's first half, on all clusters in proportion to their size,
and moments and schedule go on as dense's do. `launch/cbtm.sh` runs it, its controls and dense.
"""

from ml_collections import ConfigDict

from configs.forest_domains import base_of, plan_of


def get_config(arg='4'):
  """arg: K[,STEPS]: K clusters, as many as the store has; updates of dense at its batch (600)."""
  clusters, _, steps = arg.partition(',')
  K = int(clusters)
  if K < 1:
    raise ValueError(f'{K} clusters: at least 1')
  base = base_of(tuple(f'cluster{i}' for i in range(K)), int(steps or 600))
  base['data']['sampling'] = 'proportional'
  base['train']['eval_every'] = 0
  return ConfigDict(plan_of(base, base['train']['steps'] // 2))
