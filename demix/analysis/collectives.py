"""What a compiled program sends between devices: its collectives, their bytes, the mesh axes that
they span. Read from the text of the optimised module (`jitted.lower(…).compile().as_text()`).
"""

import dataclasses
import re

import numpy as np

OPS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
       'collective-broadcast')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    op: one of OPS. axes: mesh axes that it spans, sorted. group: devices that take part together.
    shapes: of its results; dimensions of 1 stay, so that an expert's bias [1, D] is no shared [D].
    bytes: of its results on a device. times: how often a call of the program runs it.
  """
  op: str
  axes: tuple[str, ...]
  group: int
  shapes: tuple[tuple[int, ...], ...]
  bytes: int
  times: int = 1

  @property
  def sent(self) -> float:
    """Bytes that a device sends for it in one call of the program, by a ring."""
    others = (self.group - 1) / self.group
    once = {'all-reduce': 2 * others, 'all-gather': others, 'all-to-all': others,
            'reduce-scatter': self.group - 1}.get(self.op, 1)
    return self.times * once * self.bytes


def replica_groups(line: str, devices: int) -> set[frozenset]:
  """Groups of devices of a collective. HLO text spells them in three ways: lists `{{0,1},{2,3}}`,
  iota `[4,2]<=[8]T(1,0)` and, from jax 0.11, `mesh['axis_0'=4,…] {'axis_1'}`."""
  ints = lambda text: [int(i) for i in text.split(',')]
  def grid(shape, order, size):
    ids = np.arange(devices).reshape(ints(shape)) if shape else np.arange(devices)
    return (ids.transpose(ints(order)) if order else ids).reshape(size)
  if found := re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', line):
    return {frozenset(ints(g)) for g in re.findall(r'\{([\d,]+)\}', found[1])}
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    return {frozenset(g.tolist()) for g in grid(found[2], found[3], ints(found[1]))}
  if found := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]'
                        r'(?:T\(([\d,]+)\))?\))? ?\{(.*?)\}', line):
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", found[1]))
    ids = grid(found[2], found[3], [int(s) for s in sizes])
    axes = [names.index(n) for n in re.findall(r"'([^']+)'", found[4])]
    ids = np.moveaxis(ids, axes, range(-len(axes), 0))
    return {frozenset(g.tolist()) for g in ids.reshape(-1, np.prod(ids.shape[-len(axes):]))}
  return {frozenset(range(devices))}


def _repeats(lines: list[str]) -> list[int]:
  """How often each line runs in a call of the program: what is in a loop as often as it turns.

  A loop whose number of turns the compiler does not know counts once.
  """
  inside, entry, calls, here = [], None, {}, None
  for line in lines:
    if head := re.match(r'\s*(ENTRY )?%?([\w.-]+) \(.*\{\s*$', line):
      here = head[2]
      entry = here if head[1] else entry
    elif line.strip() == '}':
      here = None
    inside.append(here)
    turns = re.search(r'"?known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', line)
    for kind, name in re.findall(r'\b(body|condition|to_apply|calls)=%?([\w.-]+)', line):
      times = int(turns[1]) if turns and kind == 'body' else 1
      calls.setdefault(here, []).append((name, times))
    for names in re.findall(r'branch_computations=\{(.*?)\}', line):
      calls.setdefault(here, []).extend((n.strip(' %'), 1) for n in names.split(','))
  count = {None: 1}
  def walk(name, times):
    count[name] = count.get(name, 0) + times
    for other, more in calls.get(name, ()):
      walk(other, times * more)
  if entry:
    walk(entry, 1)
  return [count.get(name, 0) for name in inside]


def collectives(text: str, mesh) -> list[Collective]:
  """The collectives of a compiled module's text, in its order. mesh: what it was compiled for."""
  place = {d.id: at for at, d in np.ndenumerate(mesh.devices)}
  lines, out = text.splitlines(), []
  for line, times in zip(lines, _repeats(lines)):
    found = re.search(rf'= (.*?) ({"|".join(OPS)})(-start)?\(', line)
    if not found or not times:
      continue
    if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}?', line):
      groups = {frozenset(map(int, p.split(','))) for p in re.findall(r'\d+,\d+', pairs[1])}
    else:
      groups = replica_groups(line, mesh.size)
    axes = set()
    for group in groups:
      at = np.array([place[d] for d in group])
      axes |= {a for i, a in enumerate(mesh.axis_names) if len(set(at[:, i])) > 1}
    results = [(kind, tuple(int(n) for n in shape.split(',') if n))
               for kind, shape in re.findall(r'([a-z]+\d*)\[([\d,]*)\]', found[1])]
    if found[3] and found[2] in ('all-gather', 'collective-permute') and len(results) > 1:
      results = results[len(results) // 2:]  # a start also returns what it was given
    out.append(Collective(
        found[2], tuple(sorted(axes)), max(map(len, groups)), tuple(s for _, s in results),
        sum(_BYTES.get(kind, 4) * int(np.prod(s)) for kind, s in results), times))
  return out


def table(found: list[Collective]) -> dict:
  """{(op, axes): bytes that a device sends}, the largest first; scalars are in it too."""
  out = {}
  for c in found:
    out[c.op, c.axes] = out.get((c.op, c.axes), 0) + c.sent
  return dict(sorted(out.items(), key=lambda item: -item[1]))
