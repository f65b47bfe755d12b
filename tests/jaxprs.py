"""Reading jaxprs: what a traced function computes, at any depth."""

import jax
from jax.extend import core


def equations(jaxpr):
  """All equations of a (closed) jaxpr, those inside loops, checkpoints and calls too."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
      if is_jaxpr(inner):
        yield from equations(inner)


def is_jaxpr(x) -> bool:
  return isinstance(x, (core.ClosedJaxpr, core.Jaxpr))


def primitives(f, *args) -> set[str]:
  """Names of the primitives that f(*args) runs."""
  return {eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(*args))}


def shapes(f, *args) -> set[tuple]:
  """Shapes of the arrays that f(*args) computes."""
  return {v.aval.shape for eqn in equations(jax.make_jaxpr(f)(*args)) for v in eqn.outvars}
