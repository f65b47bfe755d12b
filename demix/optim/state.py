"""The state of a training run, and its canonical leaves.

`state` is {'params': trained parameters, 'optimizer': {'count', 'mu', 'nu', and where experts are
trained 'counts'}}; `frozen` is a tree of all other parameters. Freezing is by structure: gradient,
moments and decay know the trained subtree only, so what is frozen cannot move, whatever the
optimizer does.
"""

import jax
import jax.numpy as jnp

from demix.model import tree
from demix.model.params import Model
from demix.optim.optimizer import AdamW

COUNTS = 'optimizer/counts/'  # … NAME: updates that expert took part in


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
  """Flat canonical leaves: params/… (all), optimizer/mu/… (of what is trained), optimizer/count and
  optimizer/counts/<expert>."""
  params = tree.join(state['params'], frozen or {})
  flat = {f'params/{n}': x for n, x in model.canonical(params).items()}
  for kind in ('mu', 'nu'):
    moments = model.canonical(state['optimizer'][kind])
    flat |= {f'optimizer/{kind}/{n}': x for n, x in moments.items()}
  if 'counts' in state['optimizer']:
    for expert, count in zip(model.config.experts, state['optimizer']['counts']):
      flat[f'{COUNTS}{expert}'] = count
  return flat | {'optimizer/count': state['optimizer']['count']}


def running_state(model: Model, flat: dict, part: str = '') -> tuple[dict, dict]:
  """The inverse of `canonical_state`: (state, frozen).

  An expert without a count of its own (of a checkpoint from before there were any) has taken part
  in all updates.
  """
  below = lambda prefix: {
      n.removeprefix(prefix): x for n, x in flat.items() if n.startswith(prefix)}
  trained, frozen = tree.split(model.running(below('params/')), part)
  moments = {kind: tree.running(below(f'optimizer/{kind}/'), model.config.period,
                                model.config.experts) for kind in ('mu', 'nu')}
  count = flat['optimizer/count']
  if tree.expert_axis(trained):
    moments['counts'] = jnp.stack([flat.get(f'{COUNTS}{e}', count) for e in model.config.experts])
  return {'params': trained, 'optimizer': {'count': count, **moments}}, frozen


def saved_part(like: dict, saved) -> dict:
  """`like` without counts of experts that a checkpoint, whose leaves are `saved`, does not have."""
  return {n: x for n, x in like.items() if n in saved or not n.startswith(COUNTS)}
