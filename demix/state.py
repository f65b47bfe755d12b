"""The state of a training run, and its canonical leaves.

`state` is {'params': trained parameters, 'optimizer': {'count', 'mu', 'nu'}}; `frozen` is a tree of
all other parameters. Freezing is by structure: gradient, moments and decay know the trained subtree
only, so what is frozen cannot move, whatever the optimizer does.
"""

import jax

from demix import tree
from demix.optimizer import AdamW
from demix.params import Model


def begin(params: dict, adamw: AdamW, part: str = '') -> tuple[dict, dict]:
  """Parameters → (state with zero moments, frozen).

  Args:
    params: a whole running tree.
    part: the leaves whose running name contains it are trained (config.TRAINABLE); '': all.
  """
  trained, frozen = tree.split(params, part)
  return {'params': trained, 'optimizer': adamw.init(trained)}, frozen


def abstract(model: Model, adamw: AdamW, part: str = '') -> tuple[dict, dict]:
  """`begin` as jax.ShapeDtypeStruct: nothing is computed."""
  return jax.eval_shape(lambda params: begin(params, adamw, part), model.abstract)


def canonical_state(model: Model, state: dict, frozen: dict | None = None) -> dict:
  """Flat canonical leaves: params/… (all), optimizer/mu/… (of what is trained), optimizer/count."""
  params = tree.join(state['params'], frozen or {})
  flat = {f'params/{n}': x for n, x in model.canonical(params).items()}
  for kind in ('mu', 'nu'):
    moments = model.canonical(state['optimizer'][kind])
    flat |= {f'optimizer/{kind}/{n}': x for n, x in moments.items()}
  return flat | {'optimizer/count': state['optimizer']['count']}


def running_state(model: Model, flat: dict, part: str = '') -> tuple[dict, dict]:
  """The inverse of `canonical_state`: (state, frozen)."""
  below = lambda prefix: {
      n.removeprefix(prefix): x for n, x in flat.items() if n.startswith(prefix)}
  trained, frozen = tree.split(model.running(below('params/')), part)
  moments = {kind: tree.running(below(f'optimizer/{kind}/'), model.config.period,
                                model.config.experts) for kind in ('mu', 'nu')}
  return {'params': trained, 'optimizer': {'count': flat['optimizer/count'], **moments}}, frozen
