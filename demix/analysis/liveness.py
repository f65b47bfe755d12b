"""How much memory a traced program holds at once, without compiling it.

The program is the jaxpr of a whole training step, so that rematerialisation, blocks of the loss,
micro-batches and types are in it by themselves and need no formula of their own. It is walked in
order: a buffer lives from where it is made to its last use. What XLA does differently from the
text of a jaxpr, and is done here too:

* elementwise operations, broadcasts, slices and transposes are fused into what reads them; they
  get a buffer only where a product, a loop, a scatter or the caller reads them;
* reshapes and barriers are views;
* an elementwise result takes the place of an operand that dies there;
* a loop holds its stacked outputs from its start, its carry in place, and its body's own peak.

Why not `jax.ad_checkpoint.print_saved_residuals` or one formula per policy: both know activations
only, and at small sizes gradients and logits decide.
"""

import dataclasses
import math
from collections import Counter

from jax.extend import core

FUSED = frozenset("""abs add add_any and ceil clamp concatenate convert_element_type copy cos div
dynamic_slice eq erf erf_inv exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p
logistic lt max min mul ne neg not or pad pow reduce_precision rem rev round rsqrt select_n sign sin
slice sqrt square stop_gradient sub tan tanh transpose xor broadcast_in_dim""".split())
VIEWS = frozenset("""reshape squeeze expand_dims optimization_barrier sharding_constraint name
reshard""".split())


@dataclasses.dataclass
class Node:
  """One operation. `inside`: what runs in it (of a loop, its body), as bytes by kind."""
  op: str
  inputs: list
  outputs: list
  inside: Counter = dataclasses.field(default_factory=Counter)
  in_place: dict = dataclasses.field(default_factory=dict)  # output → input whose buffer it takes


class Program:
  """A jaxpr as nodes over numbered values: calls are written out, views have the number of what
  they look at."""

  def __init__(self, jaxpr, kind, given=(), slices: int = 0):
    """Args:
      jaxpr: a Jaxpr. kind: (aval, whether results come of it by elementwise operations alone) →
        (a name for what it is, its bytes on one device).
      given: positions of outputs that are written over arguments (donated).
      slices: how many of the last arguments are slices that a loop makes in each turn.
    """
    self.kind, self.nodes, self.avals, self.barred = kind, [], [], set()
    env = {v: self._value(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)}
    self.arguments = set(env.values())
    self.slices = [env[v] for v in jaxpr.invars[len(jaxpr.invars) - slices:]]
    self._walk(jaxpr, env)
    results = [None if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]
    self.results, self.given = set(results) - {None}, {results[i] for i in given}
    self.sums = set(self.results)
    for node in reversed(self.nodes):
      if node.op in FUSED and self.sums & set(node.outputs):
        self.sums.update(node.inputs)

  def what(self, v) -> tuple[str, int]:
    """A value's kind and bytes."""
    return self.kind(self.avals[v], v in self.sums)

  def _value(self, aval) -> int:
    self.avals.append(aval)
    return len(self.avals) - 1

  def _walk(self, jaxpr, env):
    for eqn in jaxpr.eqns:
      name, inner = eqn.primitive.name, _inner(eqn)
      operands = [None if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
      if inner and name not in ('scan', 'while', 'cond'):
        self._call(inner[0], operands, eqn.outvars, env)
        continue
      same = (name == 'convert_element_type'
              and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype)
      if (name in VIEWS or same) and None not in operands:
        env.update(zip(eqn.outvars, operands))
        if name == 'optimization_barrier':
          self.barred.update(operands)
        continue
      outputs = [self._value(v.aval) for v in eqn.outvars]
      env.update(zip(eqn.outvars, outputs))
      node = Node(name, [v for v in operands if v is not None], outputs)
      if name == 'scan':
        # By their shapes, since JAX 0.12 names the counts otherwise: what a scan walks, and what it
        # stacks, has one axis more outside.
        carried = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, inner[0].outvars))
        consts = sum(a.aval.ndim == b.aval.ndim
                     for a, b in zip(eqn.invars, inner[0].invars)) - carried
        first = operands[consts:consts + carried]
        node.in_place = {o: i for o, i in zip(outputs, first) if i is not None}
        slices = len(operands) - consts - carried
        node.inside = peak(Program(inner[0], self.kind, slices=slices))
      elif inner:
        node.inside = max((peak(Program(b, self.kind)) for b in inner), key=Counter.total)
      self.nodes.append(node)

  def _call(self, body, operands, outvars, env):
    """Writes a call out; residuals of custom rules come as leading operands that it lacks."""
    local = {v: self._value(v.aval) for v in body.constvars}
    for v, operand in zip(body.invars, operands[len(operands) - len(body.invars):]):
      local[v] = self._value(v.aval) if operand is None else operand
      if operand is None:
        self.arguments.add(local[v])
    self.arguments |= {local[v] for v in body.constvars}
    self._walk(body, local)
    for out, v in zip(outvars, body.outvars):
      if isinstance(v, core.Literal):
        env[out] = self._value(v.aval)
        self.arguments.add(env[out])
      else:
        env[out] = local[v]


def _inner(eqn) -> list:
  """The jaxprs that an equation runs."""
  found = []
  for value in eqn.params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, (core.ClosedJaxpr, core.Jaxpr)):
        found.append(getattr(x, 'jaxpr', x))
  return found


def peak(program: Program) -> Counter:
  """{kind: bytes} of the buffers that live at the worst moment; arguments are not counted."""
  nodes, readers = program.nodes, {}
  for i, node in enumerate(nodes):
    for v in node.inputs:
      readers.setdefault(v, []).append(nodes[i].op)
  def stored(v, op):
    """Whether a value made by `op` has a buffer of its own."""
    reads = lambda reader: reader not in FUSED and not reader.startswith(('reduce_', 'arg'))
    return (op not in FUSED or v in program.results or v in program.barred
            or any(map(reads, readers.get(v, ()))))
  end, last = len(nodes), {}
  for i in reversed(range(end)):  # a value is needed as long as what is fused with it
    node = nodes[i]
    for v in node.outputs:
      last[v] = end if v in program.results else max(last.get(v, i), i)
    until = max((last[v] for v in node.outputs if not stored(v, node.op)), default=i)
    for v in node.inputs:
      last[v] = max(last.get(v, 0), until, i)
  dies = {}
  for v, i in last.items():
    dies.setdefault(i, []).append(v)
  live, total = {}, Counter()
  for v in program.slices:
    if stored(v, 'add'):  # a product reads it: a copy
      name, size = program.what(v)
      total[name] += size
  worst, held = Counter(total), total.total()
  for i, node in enumerate(nodes):
    for v in node.outputs:
      if v in program.given or not stored(v, node.op):
        continue
      name, size = program.what(v)
      over = [node.in_place[v]] if v in node.in_place else node.inputs * (node.op in FUSED)
      for u in over:
        if u in live and last[u] == i and live[u][1] == size:
          live[v] = live.pop(u)
          break
      else:
        live[v] = name, size
        total[name] += size
    if total.total() + node.inside.total() > held:
      worst = total + node.inside
      held = worst.total()
    for v in dies.get(i, ()):
      if v in live:
        name, size = live.pop(v)
        total[name] -= size
  return +worst


def nbytes(aval) -> int:
  """Bytes of a value; 0 for what lies in host memory."""
  if 'host' in str(getattr(aval, 'memory_space', '')).lower():
    return 0
  return math.prod(aval.shape) * getattr(aval.dtype, 'itemsize', 0)
