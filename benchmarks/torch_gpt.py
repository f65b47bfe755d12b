"""The same train step in PyTorch: float32, torch.compile, fused AdamW; beside ours, in turns.

  python benchmarks/torch_gpt.py --torch-python=VENV/bin/python [--size=1m|10m] [--repeats=9]
                                 [--eager] [--arms=dense,…] [--json=FILE]

PyTorch lives in an environment of its own, which needs only it and NumPy. Its process gets our
initial parameters and batch, and takes turns with ours over a pipe, so both see the same machine.
Both losses are printed: they must agree, or two different models are compared. Model, loss, clip,
optimizer and their numbers are the same; attention is F.scaled_dot_product_attention.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def worker(path: str, compiled: bool, dtype: str):
  """The PyTorch side: one JSON line a step that is asked for on stdin. On a GPU where there is one;
  bfloat16 is torch.autocast."""
  import resource

  import numpy as np
  import torch
  from torch import nn
  from torch.nn import functional as F
  given = np.load(path)
  layers, heads, clip, rate, b1, b2, eps, decay = given['numbers'].tolist()
  weight = {n.removeprefix('params/'): torch.from_numpy(given[n])
            for n in given.files if n.startswith('params/')}
  tokens, targets = (torch.from_numpy(given[n]).long() for n in ('tokens', 'targets'))

  def linear(name):
    layer = nn.Linear(*weight[name].shape)
    layer.weight.data.copy_(weight[name].T)
    layer.bias.data.copy_(weight[f'{name}_bias'])
    return layer

  def norm(name):
    layer = nn.LayerNorm(len(weight[f'{name}/scale']), eps=1e-5)
    layer.weight.data.copy_(weight[f'{name}/scale'])
    layer.bias.data.copy_(weight[f'{name}/bias'])
    return layer

  class Block(nn.Module):
    def __init__(self, name):
      super().__init__()
      q, k, v = (linear(f'{name}/attention/{n}') for n in 'qkv')
      self.qkv = nn.Linear(q.in_features, 3 * q.out_features)
      self.qkv.weight.data.copy_(torch.cat([q.weight, k.weight, v.weight]))
      self.qkv.bias.data.copy_(torch.cat([q.bias, k.bias, v.bias]))
      self.out = linear(f'{name}/attention/out')
      self.up, self.down = linear(f'{name}/ffn/up'), linear(f'{name}/ffn/down')
      self.attention_norm = norm(f'{name}/attention_norm')
      self.ffn_norm = norm(f'{name}/ffn_norm')

    def forward(self, x):
      B, L, D = x.shape
      heads_of = lambda t: t.view(B, L, int(heads), -1).transpose(1, 2)
      q, k, v = map(heads_of, self.qkv(self.attention_norm(x)).chunk(3, -1))
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
      return x + self.down(F.gelu(self.up(self.ffn_norm(x))))

  class Gpt(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens = nn.Parameter(weight['embed/tokens'].clone())
      self.positions = nn.Parameter(weight['embed/positions'].clone())
      self.blocks = nn.ModuleList(Block(f'blocks/{i}') for i in range(int(layers)))
      self.final_norm = norm('final_norm')

    def forward(self, tokens, targets):
      x = F.embedding(tokens, self.tokens) * self.tokens.shape[1] ** 0.5
      x = x + self.positions[:tokens.shape[1]]
      for block in self.blocks:
        x = block(x)
      return F.cross_entropy(F.linear(self.final_norm(x), self.tokens).flatten(0, 1),
                             targets.flatten())

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model, tokens, targets = Gpt().to(device), tokens.to(device), targets.to(device)
  torch.set_float32_matmul_precision('highest' if dtype == 'float32' else 'high')
  forward = torch.compile(model) if compiled else model
  adamw = torch.optim.AdamW(model.parameters(), lr=rate, betas=(b1, b2), eps=eps,
                            weight_decay=decay, fused=True)

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
      loss = forward(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss.item()

  started = time.perf_counter()
  losses = [step()]
  held = (torch.cuda.max_memory_allocated() if device == 'cuda' else
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
  print(json.dumps({'loss': losses[0], 'compile_seconds': time.perf_counter() - started,
                    'device': device, 'bytes': held,
                    'version': torch.__version__, 'threads': torch.get_num_threads(),
                    'parameters': sum(p.numel() for p in model.parameters())}), flush=True)
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    count = int(line)
    for _ in range(count):
      loss = step()
    print(json.dumps({'wall': (time.perf_counter() - wall) / count, 'loss': loss,
                      'cpu': (time.process_time() - cpu) / count}), flush=True)


def hand_over(path: Path, model, optimizer, params, batch: dict):
  """Writes what the worker starts from: a dense model's running parameters, a batch, numbers."""
  import numpy as np
  c, o = model.config, optimizer
  numbers = [c.layers, c.heads, o.clip, o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay]
  leaves = {f'params/{n}': np.asarray(x) for n, x in model.canonical(params).items()}
  np.savez(path, numbers=np.array(numbers), tokens=batch['tokens_BL'], targets=batch['targets_BL'],
           **leaves)


class Torch:
  """The other process, as something that can be called."""

  def __init__(self, python: str, path: Path, compiled: bool, dtype: str = 'float32'):
    self.process = subprocess.Popen(
        [python, __file__, f'--worker={path}', f'--dtype={dtype}',
         *([] if compiled else ['--eager'])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # Its threads sleep while they wait: on shared cores, spinning would count as its CPU time.
        env={'OMP_WAIT_POLICY': 'passive', **os.environ})
    self.first = self._read()

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'the PyTorch process ended: exit {self.process.wait()}')
    return json.loads(line)

  def __call__(self, count: int) -> dict:
    self.process.stdin.write(f'{count}\n')
    self.process.stdin.flush()
    return self._read()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--torch-python', default=sys.executable, help='a Python that has torch')
  parser.add_argument('--size', choices=('1m', '10m'), default='1m')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--inner', type=int, default=0, help='steps timed as one; 0: 3 at 1m, else 1')
  parser.add_argument('--arms', default='dense', help='ours, as in throughput.py')
  parser.add_argument('--eager', action='store_true', help='PyTorch without torch.compile')
  parser.add_argument('--json', default='', help='file for the figures')
  parser.add_argument('--worker', default='', help=argparse.SUPPRESS)
  parser.add_argument('--dtype', default='float32', help=argparse.SUPPRESS)  # of the worker
  args = parser.parse_args()
  if args.worker:
    return worker(args.worker, not args.eager, args.dtype)
  import measure
  import throughput
  measure.restart()
  size, inner = measure.SIZES[args.size], args.inner or (3 if args.size == '1m' else 1)
  kind = 'eager' if args.eager else 'torch.compile'
  print(f'{size.preset}: T {size.length}, batch {size.batch}, V {size.vocab}, float32, '
        f'{args.repeats} rounds\n{measure.machine()}', flush=True)
  arms = {name: throughput.Arm(name, size) for name in args.arms.split(',')}
  dense = arms.get('dense') or throughput.Arm('dense', size)
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / 'start.npz'
    hand_over(file, dense.model, dense.optimizer, dense.state['params'], dense.batch)
    other = Torch(args.torch_python, file, not args.eager)
  for arm in arms.values():
    arm()
  first = ', '.join(f'{name} {arm.loss:.5f}' for name, arm in arms.items())
  print(f'torch {other.first["version"]}, {kind}, {other.first["threads"]} threads, '
        f'{other.first["parameters"] / 1e6:.2f}M parameters, first step '
        f'{other.first["compile_seconds"]:.1f} s\n'
        f'loss of the first step: torch {other.first["loss"]:.5f}, {first}', flush=True)
  taken = []
  times = measure.interleave(
      {'torch': lambda: taken.append(other(inner)), **arms}, args.repeats,
      dict.fromkeys(arms, inner))
  # The other process counts its own CPU time; the first round is not counted, as here.
  times['torch'] = [(t['wall'], t['cpu']) for t in taken[1:]]
  # Equally many steps were done on both sides: training differs if these do.
  last = ', '.join(f'{name} {arm.loss:.5f}' for name, arm in arms.items())
  steps = 1 + (args.repeats + 1) * inner
  print(f'loss of step {steps}: torch {taken[-1]["loss"]:.5f}, {last}')
  figures = {'size': args.size, 'torch': other.first | {'kind': kind}, 'command': sys.argv}
  for name, rounds in times.items():
    wall, cpu = ([t[i] for t in rounds] for i in (0, 1))
    ratio = [[a[i] / b[i] for a, b in zip(times['torch'], rounds)] for i in (0, 1)]
    figures[name + ' rounds'] = {
        'tokens_per_second': measure.summary(size.tokens / w for w in wall),
        'step_seconds': measure.summary(wall), 'step_cpu_seconds': measure.summary(cpu),
        'rate_over_torch': {'wall': measure.summary(ratio[0]), 'cpu': measure.summary(ratio[1])}}
    print(f'{name:16s} {measure.spread([size.tokens / w for w in wall], ".0f")} tokens/s, '
          f'{measure.spread([w * 1e3 for w in wall], ".0f")} ms wall, '
          f'{measure.spread([t * 1e3 for t in cpu], ".0f")} ms CPU a step')
    if name != 'torch':
      print(f'  {name} / torch, tokens/s: {measure.spread(ratio[0])} wall, '
            f'{measure.spread(ratio[1])} CPU')
  other.process.stdin.close()
  other.process.wait()
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
