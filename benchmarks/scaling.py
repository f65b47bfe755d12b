"""Expected efficiency of dense, DEMix and BTM training at 8 to 1,024 devices, on paper.

  python benchmarks/scaling.py [--png=docs/scaling.png] [--json=FILE]

Nothing is measured: bytes are the formulas of benchmarks/collectives.py (which compares them with
compiled programs), links and rates are the assumptions in CLUSTERS. Efficiency is the time of the
arithmetic over the time of a step. docs/scaling.md has the assumptions in words.
"""

import argparse
import dataclasses
import math
import sys

import measure

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
EXPERTS = 8


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Devices in nodes. Rates are bytes/s that a device sends; delays are seconds a message."""
  name: str
  flops: float  # that a device does in practice: data sheet times the share that is reached
  node: int     # devices with the fast links
  inside: float
  outside: float
  delay_inside: float
  delay_outside: float


CLUSTERS = (
    Cluster('H100, InfiniBand 400 Gb/s a GPU', 989e12 * 0.4, 8, 450e9, 50e9, 3e-6, 10e-6),
    Cluster('H100, Ethernet 100 Gb/s a node', 989e12 * 0.4, 8, 450e9, 12.5e9 / 8, 3e-6, 30e-6),
    Cluster('TPU v5e, 256 a slice, 100 Gb/s a host of 8 between', 197e12 * 0.5, 256, 100e9,
            12.5e9 / 8, 1e-6, 50e-6),
)
# What of the backward pass (two thirds of the arithmetic) can hide sending: none of it, or this.
OVERLAP = 0.8


def all_reduce(cluster: Cluster, devices: int, size: float) -> float:
  """Seconds to sum `size` bytes over `devices` neighbours: a ring inside a node; over several,
  reduce-scatter inside, a ring over nodes of each device's part, all-gather inside."""
  inner = min(devices, cluster.node)
  outer = math.ceil(devices / inner)
  seconds = 0.0
  if inner > 1:
    seconds += 2 * (inner - 1) / inner * size / cluster.inside
    seconds += 2 * (inner - 1) * cluster.delay_inside
  if outer > 1:
    part = size / inner
    seconds += 2 * (outer - 1) / outer * part / cluster.outside
    seconds += 2 * math.log2(outer) * cluster.delay_outside  # trees, for short messages
  return seconds


def sending(arm: str, cluster, devices: int, shared: int, experts: int) -> float:
  """Seconds of sums of gradients in a step, float32. experts: parameters of the FFNs of one."""
  each = devices // EXPERTS
  if arm == 'dense':
    return all_reduce(cluster, devices, 4 * (shared + experts))
  if arm == 'BTM':
    return all_reduce(cluster, each, 4 * (shared + experts))
  return all_reduce(cluster, devices, 4 * shared) + all_reduce(cluster, each, 4 * experts)


def efficiency(arm, cluster, devices, model, tokens: int, overlap: float) -> float:
  """Arithmetic over arithmetic and what of the sending it does not hide. tokens: a device."""
  shared, experts, flops = model
  work = tokens * flops / cluster.flops
  left = max(0.0, sending(arm, cluster, devices, shared, experts) - overlap * 2 / 3 * work)
  return work / (work + left)


def models() -> dict:
  """{name: (shared parameters, those of one expert's FFNs, FLOPs a token)} of the papers' sizes."""
  from demix.model import tree
  from demix.model.params import Model
  from demix.model.transformer import preset
  out = {}
  for name in ('125m', '1.3b'):
    model = Model(preset(f'gpt-{name}', vocab_size=50264, max_length=1024, ffn='demix',
                         experts=measure.EXPERTS))
    flat = tree.flatten(model.abstract)
    experts = sum(x.size for n, x in flat.items() if '/experts/' in n)
    out[name] = (tree.size(flat) - experts, experts // EXPERTS, model.flops_per_token(1024))
  return out


# (title, model, tokens of a device at so many devices)
SETTINGS = (
    ('125m, 16,384 tokens a device', '125m', lambda devices: 16384),
    ('125m, 524,288 tokens an update', '125m', lambda devices: 524288 // devices),
    ('1.3b, 16,384 tokens a device', '1.3b', lambda devices: 16384),
)


def figures() -> list[dict]:
  """One row for each setting, cluster, arm and number of devices."""
  sizes, out = models(), []
  for title, name, tokens in SETTINGS:
    for cluster in CLUSTERS:
      for arm in ('dense', 'DEMix', 'BTM'):
        for devices in DEVICES:
          each = [efficiency(arm, cluster, devices, sizes[name], tokens(devices), o)
                  for o in (0.0, OVERLAP)]
          out.append({'setting': title, 'cluster': cluster.name, 'arm': arm, 'devices': devices,
                      'efficiency': each[0], 'overlapped': each[1],
                      'seconds_sending': sending(arm, cluster, devices, *sizes[name][:2])})
  return out


def plot(rows, path):
  """Efficiency over devices: a row a setting, a column a cluster; dashed: sending is hidden."""
  try:
    import matplotlib
  except ImportError:
    raise SystemExit('error: no matplotlib: pip install -r requirements-notebook.txt') from None
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(len(SETTINGS), len(CLUSTERS), figsize=(13, 9), sharex=True,
                              sharey=True, layout='constrained')
  colours = {'dense': 'tab:gray', 'DEMix': 'tab:blue', 'BTM': 'tab:orange'}
  for i, (title, _, _) in enumerate(SETTINGS):
    for j, cluster in enumerate(CLUSTERS):
      ax = axes[i][j]
      for arm, colour in colours.items():
        mine = [r for r in rows if (r['setting'], r['cluster'], r['arm']) == (
            title, cluster.name, arm)]
        for key, style in (('efficiency', '-'), ('overlapped', '--')):
          label = arm + (f', {OVERLAP:.0%} of the backward pass hides it' if style == '--' else '')
          ax.plot([r['devices'] for r in mine], [r[key] for r in mine], style, color=colour,
                  marker='.', label=label)
      ax.set(xscale='log', xticks=DEVICES, ylim=(0, 1.03))
      ax.set_xticklabels(DEVICES, rotation=45)
      ax.minorticks_off()
      ax.set_title(f'{title}\n{cluster.name}', fontsize=9)
      ax.grid(alpha=0.3)
      if not j:
        ax.set_ylabel('efficiency')
      if i == len(SETTINGS) - 1:
        ax.set_xlabel('devices')
  figure.legend(*axes[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=3,
                fontsize=9)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--png', default='', help='file for the plot')
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  rows = figures()
  for name, (shared, experts, flops) in models().items():
    total = 4 * (shared + experts) / 1e6
    print(f'{name}: {shared / 1e6:.1f}M shared, {experts / 1e6:.1f}M in the FFNs of an expert '
          f'({experts / (shared + experts):.0%}), {flops / 1e9:.2f} GFLOP a token, gradients of '
          f'{total:.0f} MB')
  for title, _, _ in SETTINGS:
    print(f'\n{title}: efficiency, nothing hidden ({OVERLAP:.0%} of the backward pass hides it)\n\n'
          f'| cluster | arm | {" | ".join(map(str, DEVICES))} |\n'
          f'| --- | --- |{" --- |" * len(DEVICES)}')
    for cluster in CLUSTERS:
      for arm in ('dense', 'DEMix', 'BTM'):
        cells = [f'{r["efficiency"]:.2f} ({r["overlapped"]:.2f})' for r in rows if (
            r['setting'], r['cluster'], r['arm']) == (title, cluster.name, arm)]
        print(f'| {cluster.name} | {arm} | {" | ".join(cells)} |')
  if args.png:
    plot(rows, args.png)
  measure.write_json(args.json, {'command': sys.argv, 'rows': rows})


if __name__ == '__main__':
  main()
