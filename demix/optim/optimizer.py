"""AdamW as the papers train with it: schedules, the true-norm clip, a decay mask by path, and no
movement at all for experts that a batch did not touch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from demix.model import tree
from demix.optim.optimizer_config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int):
  """step (0-based count of updates done) → learning rate of the next update.

  From `steps` on it stays at its end: rounding takes it to no less, and so never below 0.
  """
  warmup = max(1, round(config.warmup_share * steps))
  peak, final = config.learning_rate, config.learning_rate * config.final_ratio
  rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
  rest = max(1, steps - warmup)
  if config.schedule == 'linear':
    parts, borders = [rise, _not_below(final, optax.linear_schedule(peak, final, rest))], [warmup]
  elif config.schedule == 'cosine':
    fall = optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio)
    parts, borders = [rise, _not_below(final, fall)], [warmup]
  elif config.schedule == 'wsd':
    decay = max(1, round(config.decay_share * steps))
    parts = [rise, optax.constant_schedule(peak),
             _not_below(final, optax.linear_schedule(peak, final, decay))]
    borders = [warmup, max(warmup, steps - decay)]
  else:
    parts, borders = [rise, optax.constant_schedule(peak)], [warmup]
  return optax.join_schedules(parts, borders)


def _not_below(least, fall):
  return lambda step: jnp.maximum(fall(step), least)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """init(params) → state; update(…) → params and state.

  The state is {'count': updates done, 'mu': first moments, 'nu': second moments}, trees like the
  parameters, so that everything that speaks leaf names can speak about moments too; and, where
  there are experts, 'counts': the updates that each of them took part in.

  Attributes:
    steps: of the schedule, from config.restart on. earlier: (first update, steps) of those before.
  """
  config: OptimizerConfig
  steps: int
  earlier: tuple = ()

  def rate(self, count):
    """Learning rate of the update after `count` of them."""
    pieces = (*self.earlier, (self.config.restart, self.steps))
    parts = [schedule(self.config, steps) for _, steps in pieces]
    first, *borders = (start for start, _ in pieces)
    # The schedule before is not asked past its end, nor the one after before its start.
    return optax.join_schedules(parts, [b - first for b in borders])(
        count - first if first else count)

  def init(self, params) -> dict:
    """Zero moments, float32."""
    zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    state = {'count': jnp.zeros((), jnp.int32), 'mu': zeros(), 'nu': zeros()}
    experts = tree.expert_axis(params)
    return state | ({'counts': jnp.zeros((experts,), jnp.int32)} if experts else {})

  def update(self, grads, state, params, *, finite, present_E=None):
    """One clipped AdamW update.

    Args:
      grads, params: running trees. state: as from `init`.
      finite: bool scalar; if it is False, or a gradient is not finite, parameters and state stay
        exactly as they are.
      present_E: bool [E]; experts that are False are left exactly as they are: no decay, no
        moment change, no update counted (docs/method.md). None: all experts had data.

    Returns:
      params, state, {'learning_rate', 'grad_norm', 'applied'}. grad_norm is before clipping,
      over every expert once (the papers' code counted an expert once per GPU that held it).
    """
    c = self.config
    norm = optax.global_norm(grads)
    apply = finite & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, c.clip / jnp.maximum(norm, 1e-30)) if c.clip else 1.0
    count = optax.safe_increment(state['count'])
    rate = self.rate(state['count'])
    counts = {'counts': optax.safe_increment(state['counts'])} if 'counts' in state else {}

    def keep(name, leaf):
      if present_E is None or '/experts/' not in name:
        return apply
      return apply & present_E.reshape(1, -1, *[1] * (leaf.ndim - 2))

    def updates(name, leaf):
      """How many updates the leaf's moments are the mean of: an expert's are its own."""
      if '/experts/' not in name:
        return count
      return counts['counts'].reshape(1, -1, *[1] * (leaf.ndim - 2))

    flat = {'params': tree.flatten(params), 'grads': tree.flatten(grads),
            'mu': tree.flatten(state['mu']), 'nu': tree.flatten(state['nu'])}
    out = {'params': {}, 'mu': {}, 'nu': {}}
    for name, p in flat['params'].items():
      move, g = keep(name, p), flat['grads'][name] * scale
      mu, nu = flat['mu'][name], flat['nu'][name]
      mu = jnp.where(move, optax.tree.update_moment(g, mu, c.b1, 1), mu)
      nu = jnp.where(move, optax.tree.update_moment_per_elem_norm(g, nu, c.b2, 2), nu)
      # Without the barrier XLA computes the new moments again where it moves the parameter, reads
      # the old ones there, and so copies every moment at the start of the step (seen in the
      # compiled program; with that in the loss, 2 to 6% of the step's CPU time at 1M).
      mu, nu = jax.lax.optimization_barrier((mu, nu))
      n = updates(name, p)
      update = optax.tree.bias_correction(mu, c.b1, n) / (
          jnp.sqrt(optax.tree.bias_correction(nu, c.b2, n)) + c.eps)
      decay = 0.0 if c.no_decay and re.search(c.no_decay, name) else c.weight_decay
      out['params'][name] = jnp.where(move, p - rate * (update + decay * p), p)
      out['mu'][name], out['nu'][name] = mu, nu
    took_part = apply if present_E is None else apply & present_E
    counts = {n: jnp.where(took_part, x, state[n]) for n, x in counts.items()}
    state = {'count': jnp.where(apply, count, state['count']), **counts,
             'mu': tree.unflatten(out['mu']), 'nu': tree.unflatten(out['nu'])}
    return tree.unflatten(out['params']), state, {
        'learning_rate': rate, 'grad_norm': norm, 'applied': apply}
