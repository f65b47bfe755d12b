"""Names for the leaves of a parameter tree, and rules over names.

*Running* trees are what is jitted: nested dicts, layers of one kind stacked ('block_0', leading
axis N / period), experts stacked behind the layer axis ('ffn/experts/up' [N / period, E, D, F]).
*Canonical* leaves are what is stored, compared, merged and frozen: one leaf per layer and expert,
'blocks/3/ffn/experts/legal/up' [D, F]. Experts are named by domain; no name depends on order.
"""

import re

import jax
import jax.numpy as jnp

from demix.errors import BadInput

EXPERT = re.compile(r'(.*/experts)/([^/]+)/([^/]+)')


def flatten(tree: dict, prefix: str = '') -> dict:
  """Nested dict → {'a/b/c': leaf}, in the dict's own order."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f'{prefix}{key}/'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def unflatten(flat: dict) -> dict:
  """{'a/b/c': leaf} → nested dict."""
  tree = {}
  for name, leaf in flat.items():
    *groups, last = name.split('/')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = leaf
  return tree


def match(rules, name: str):
  """The value of the first (pattern, value) whose pattern is found in `name`.

  Raises:
    BadInput: no pattern matches; the leaf is named.
  """
  for pattern, value in rules:
    if re.search(pattern, name):
      return value
  raise BadInput(f'no rule matches the leaf {name!r}: add one to the table')


def layers_of(name: str, stacked: int, period: int) -> list[str]:
  """Canonical layer prefixes of a running name's layer axis: 'block_1', 2, 2 → 1 and 3."""
  place = int(name.split('/', 1)[0].removeprefix('block_'))
  return [f'blocks/{place + i * period}' for i in range(stacked)]


def canonical(running: dict, experts=()) -> dict:
  """A running tree as a flat dict of canonical leaves (works under jit and eval_shape).

  Args:
    running: nested dict as `params.Model.init` returns it.
    experts: names of the E experts, in the order of the expert axis.
  """
  period = sum(1 for name in running if name.startswith('block_'))
  flat = {}
  for name, leaf in flatten(running).items():
    if not name.startswith('block_'):
      flat[name] = leaf
      continue
    inside = name.split('/', 1)[1]
    for i, layer in enumerate(layers_of(name, leaf.shape[0], period)):
      if '/experts/' not in name:
        flat[f'{layer}/{inside}'] = leaf[i]
        continue
      group, last = inside.rsplit('/', 1)
      for e, expert in enumerate(experts):
        flat[f'{layer}/{group}/{expert}/{last}'] = leaf[i, e]
  return flat


def running(flat: dict, period: int, experts=()) -> dict:
  """The inverse of `canonical`.

  Raises:
    BadInput: a layer or an expert has no leaf; the first missing name is given.
  """
  grouped, out = {}, {}
  for name, leaf in flat.items():
    if not name.startswith('blocks/'):
      out[name] = leaf
      continue
    _, layer, inside = name.split('/', 2)
    expert = None
    if found := EXPERT.fullmatch(inside):
      inside, expert = f'{found[1]}/{found[3]}', found[2]
    key = f'block_{int(layer) % period}/{inside}'
    grouped.setdefault(key, {})[int(layer), expert] = leaf
  layers = 1 + max((layer for leaves in grouped.values() for layer, _ in leaves), default=-1)
  for key, leaves in grouped.items():
    place, names = int(key.split('/')[0].removeprefix('block_')), experts
    if (place, None) in leaves:
      names = None
    def pick(layer, expert, leaves=leaves, key=key):
      if (layer, expert) not in leaves:
        inside = key.split('/', 1)[1]
        raise BadInput(f'blocks/{layer}/{inside} is missing'
                       f'{f" for expert {expert}" if expert else ""}: not a leaf of this model')
      return leaves[layer, expert]
    out[key] = jnp.stack([
        pick(i, None) if names is None else jnp.stack([pick(i, e) for e in names])
        for i in range(place, layers, period)])
  order = sorted(out, key=lambda n: (not n.startswith('embed'), n.startswith('final'), n))
  return unflatten({name: out[name] for name in order})


def split(running: dict, part: str) -> tuple[dict, dict]:
  """(leaves whose running name contains `part`, all others), each a running tree. '': (all, {})."""
  flat = flatten(running)
  return (unflatten({n: x for n, x in flat.items() if part in n}),
          unflatten({n: x for n, x in flat.items() if part not in n}))


def join(a: dict, b: dict) -> dict:
  """The inverse of `split`."""
  return unflatten(flatten(a) | flatten(b)) if b else a


def expert_axis(running: dict) -> int:
  """E, the size of the expert axis; 0 where no leaf is an expert's."""
  return next((x.shape[1] for n, x in flatten(running).items() if '/experts/' in n), 0)


def size(tree) -> int:
  """Number of scalars in all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
