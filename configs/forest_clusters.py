"""c-BTM (Gururangan et al. 2023, 2303.14177): a seed, and a branch for each of K clusters.

  python -m demix prepare --input=W/corpus --out=W/clusters --discover=4
  python -m demix forest plan --config=configs/forest_clusters.py:4 --forest=F --data=W/clusters
  python -m demix forest run --forest=F
  python -m demix evaluate --model=forest:F --mix=clusters

The paper's claim (Figure 1): K experts on K clusters beat one dense LM trained on as many tokens.
Budgets as there: every branch makes equally many updates, with a batch K times smaller than dense,
so all K are tokens for tokens dense's second half (recipe of configs/quickstart.py, 600 updates).
The paper's seed is OPT; here it is dense's first half, on all clusters in proportion to their size,
and moments and schedule go on as dense's do. `launch/cbtm.sh` runs it, its controls and dense.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as dense


def get_config(arg='4'):
  """arg: K[,STEPS]: K clusters, a power of 2 up to 8, as many as the store has; dense's updates
  (600)."""
  clusters, _, steps = arg.partition(',')
  K, steps = int(clusters), int(steps or 600)
  base = dense('dense').to_dict()
  rows = base['data']['batch_size']
  if K < 1 or rows % K:
    raise ValueError(f'{K} clusters do not divide {rows} sequences of an update')
  base['data'] |= {'domains': tuple(f'cluster{i}' for i in range(K)), 'sampling': 'proportional'}
  base['train']['eval_every'] = 0
  branch = {'train': {'steps': steps - steps // 2}, 'data': {'batch_size': rows // K},
            'init': {'optimizer': 'continue'}}
  return ConfigDict({
      'base': base,
      'seed': {'train': {'steps': steps // 2}, 'optimizer': {'schedule_steps': steps}},
      'experts': tuple({'name': f'cluster{i}', 'domains': (f'cluster{i}',), 'parent': 'seed',
                        'changes': branch} for i in range(K))})
