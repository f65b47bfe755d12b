"""What mixing costs: above the members' forward passes, with fewer members, and in generation.

  python benchmarks/mixing.py [--of=demix|forest] [--size=1m|10m] [--repeats=9] [--json=FILE]

A DEMix LM with 8 experts, or a forest of 8 whole LMs; random parameters and ids. Scoring: the dense
forward pass, the members' passes alone, and with evidence, gate and combine on top, take turns.
Generation: greedy, from a prompt of a quarter of the context, by a fixed prior's k largest experts;
a text is timed without compilation.
"""

import argparse
import statistics

import measure


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--of', choices=('demix', 'forest'), default='demix')
  parser.add_argument('--size', choices=measure.SIZES, default='1m')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--json', default='', help='file for the figures')
  args = parser.parse_args()
  measure.restart()
  import jax
  import numpy as np

  from demix.eval.perplexity import token_nll
  from demix.generation.generate import Writer
  from demix.generation.sampling import SamplingConfig
  from demix.mix.members import ExpertMembers, WholeMembers
  from demix.mix.mixture import MixConfig, Mixture
  from demix.model.params import Model, expert_slice
  from demix.model.transformer import ExecutionConfig, preset
  size, E = measure.SIZES[args.size], len(measure.EXPERTS)
  print(f'{size.preset}: T {size.length}, batch {size.batch}, V {size.vocab}, {args.of} of {E}, '
        f'float32, {args.repeats} rounds\n{measure.machine()}', flush=True)
  shape, execution = {'vocab_size': size.vocab, 'max_length': size.length}, ExecutionConfig(
      scan=False)
  if args.of == 'demix':
    model = Model(preset(size.preset, ffn='demix', experts=measure.EXPERTS, **shape), execution)
    params, members = jax.jit(model.init)(0), ExpertMembers(model)
    dense, own = expert_slice(model, params, measure.EXPERTS[0])
  else:
    dense = Model(preset(size.preset, **shape), execution)
    params = jax.jit(jax.vmap(dense.init))(np.arange(E))
    own, members = jax.jit(dense.init)(0), WholeMembers(dense, measure.EXPERTS)
  ids = np.random.default_rng(0).integers(0, size.vocab, (size.batch, size.length + 1), np.int32)
  batch = {'tokens_BL': ids[:, :-1], 'targets_BL': ids[:, 1:]}
  one = batch | {'domain_B': np.zeros(size.batch, np.int32)}
  weights = {name: (i + 1) / 36 for i, name in enumerate(measure.EXPERTS)}

  def mixed(k=0, **changes):
    config = MixConfig(prior='fixed', weights=weights, experts_k=k, **changes)
    return Mixture(members, params, config)

  @jax.jit
  def passes(params, routes, batch):
    return members.score(params, batch, routes)[0]

  calls = {'dense': lambda: token_nll(dense, own, one).block_until_ready(),
           'members': lambda: passes(params, np.arange(E), batch).block_until_ready()}
  for name, mixture in {'prefix': mixed(), 'last_token': mixed(posterior='last_token'),
                        'window 32': mixed(window=32), 'weights_k 2': mixed(weights_k=2),
                        'experts_k 1': mixed(1), 'experts_k 2': mixed(2),
                        'experts_k 4': mixed(4)}.items():
    calls[name] = lambda m=mixture: m.score(batch).logp_BL.block_until_ready()
  times = measure.interleave(calls, args.repeats)
  figures = {'of': args.of, 'size': args.size, 'machine': measure.machine(), 'seconds': {},
             'ratios': {}}

  def ratio(a, b, times, scale=1.0):
    """Time of a over time of b, times `scale`."""
    for i, kind in ((0, 'wall'), (1, 'CPU')):
      values = [x[i] / y[i] * scale for x, y in zip(times[a], times[b])]
      figures['ratios'][f'{a} / {b}, {kind}'] = measure.summary(values)
      yield measure.spread(values) + ' ' + kind

  for name, taken in times.items():
    figures['seconds'][name] = measure.summary(t[0] for t in taken)
  milliseconds = measure.spread([t[0] * 1e3 for t in times['dense']], '.0f')
  print(f'dense forward pass and loss: {milliseconds} ms')
  print(f'{E} members over {E} dense passes:', *ratio('members', 'dense', times, 1 / E))
  for name in ('prefix', 'last_token', 'window 32', 'weights_k 2'):
    print(f'scoring by {name} over the members alone:', *ratio(name, 'members', times))
  for k in (1, 2, 4):
    print(f'scoring with experts_k {k} over {k} dense passes:',
          *ratio(f'experts_k {k}', 'dense', times, 1 / k))

  prompt = ids[0, :size.length // 4]
  greedy = SamplingConfig(max_tokens=size.length // 2, temperature=0)
  def write(mixture):
    writer = Writer(mixture, prompt, greedy)
    return sum(1 for _ in writer)
  mixtures = {k: mixed(k) for k in (1, 2, 4, E)}
  calls = {k: lambda m=m: write(m) for k, m in mixtures.items()}
  texts = measure.interleave(calls, args.repeats)
  for k in calls:
    rates = [greedy.max_tokens / t[0] for t in texts[k]]
    shares = [k * one[0] / t[0] for one, t in zip(texts[1], texts[k])]
    figures['ratios'][f'generation, {k} experts, times k'] = measure.summary(shares)
    print(f'generation, {k} experts: {measure.spread(rates, ".0f")} tokens/s; k × over one expert: '
          f'{measure.spread(shares, ".2f")}')
  figures['median_generation_share'] = statistics.median(shares)
  measure.write_json(args.json, figures)


if __name__ == '__main__':
  main()
