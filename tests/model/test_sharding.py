"""demix/model/sharding.py: the tables, and what the compiled step sends between which devices."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from cases import some
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from models import BALANCED, adamw, batch_of, drawn, tiny
from sharded_program import BESIDE, CASES

from demix.errors import BadInput, Refused
from demix.model import sharding, tree
from demix.model.sharding import MeshConfig
from demix.optim.step import Program, make_step

pytestmark = pytest.mark.exact

ROOT = Path(__file__).parents[2]


def mesh_of(**axes):
  """A mesh without devices."""
  return AbstractMesh(tuple(axes.get(a, 1) for a in sharding.AXES), sharding.AXES)


# ---- a mesh of one device

@pytest.mark.parametrize('ffn', [pytest.param('dense', marks=pytest.mark.long), 'demix'])
def test_a_mesh_of_one_device_is_the_program_without_a_mesh(ffn):
  model, batch, optimizer = tiny(ffn=ffn), batch_of(BALANCED), adamw()
  program = Program(model, optimizer, '', 4, True, 1, sharding.make_mesh(
      MeshConfig(), jax.devices()[:1]))
  alone = jax.jit(make_step(model, optimizer, domains=4, balanced=True), donate_argnums=0)
  state, frozen = program.abstract
  def instructions(step):
    """Those of the compiled program, their names numbered in order."""
    text, names = step.lower(state, batch, frozen).compile().as_text(), {}
    text = re.sub(r'(parameter\(\d+\)).*', r'\1', text)  # what follows says where it lies
    text = re.sub(r', metadata={[^}]*}', '', text)
    text = re.sub(r'%[\w.-]+', lambda name: f'%{names.setdefault(name[0], len(names))}', text)
    return [line for line in text.split('\n')[1:] if ' = ' in line]
  meshed = instructions(program.step)
  assert len(meshed) > 500 and meshed == instructions(alone)


# ---- the tables

@pytest.mark.parametrize('kind,changes', [
    ('gpt', {}), ('llama', {}), ('period 2', dict(tied=False)), ('llama', dict(ffn='dense'))])
def test_every_leaf_has_a_rule_and_experts_alone_are_split_by_expert(kind, changes):
  model = tiny(kind, **changes)
  specs, flat = sharding.specs(model.abstract), tree.flatten(model.abstract)
  assert specs.keys() == flat.keys()
  for name, spec in specs.items():
    assert len(spec) == flat[name].ndim
    if name.startswith('block_'):
      assert spec[0] is None  # the layer axis, which scan walks
    assert [i for i, a in enumerate(spec) if a == 'expert'] == ([1] if '/experts/' in name else [])
    if flat[name].ndim - ('/experts/' in name) - name.startswith('block_') == 2:
      assert 'fsdp' in spec, name  # every matrix can be split over copies
  layer = f'block_{model.config.period - 1}'
  expected = {f'{layer}/attention/q': P(None, 'fsdp', 'model'),
              f'{layer}/attention/out': P(None, 'model', 'fsdp')}
  if model.config.ffn == 'demix':
    expected |= {f'{layer}/ffn/experts/up': P(None, 'expert', 'fsdp', 'model'),
                 f'{layer}/ffn/experts/down': P(None, 'expert', 'model', 'fsdp')}
  assert {n: specs[n] for n in expected} == expected


def test_moments_lie_with_their_parameters():
  model = tiny('llama')
  where = sharding.state_shardings(mesh_of(expert=4, model=2), model.abstract)
  assert where['optimizer']['mu'] == where['optimizer']['nu'] == where['params']
  assert where['optimizer']['count'].spec == P()
  for name, place in tree.flatten(where['params']).items():
    leaf = tree.flatten(model.abstract)[name]
    part = np.prod(place.shard_shape(leaf.shape)) / leaf.size
    assert part <= (1 / 4 if '/experts/' in name else 1)


def test_a_leaf_without_a_rule_is_named():
  params = tiny().abstract
  params = params | {'block_0': params['block_0'] | {'router': {'gate': jax.ShapeDtypeStruct(
      (2, 16, 4), np.float32)}}}
  with pytest.raises(BadInput, match='block_0/router/gate'):
    sharding.specs(params)
  params = {'embed': {'tokens': jax.ShapeDtypeStruct((2, 16, 4), np.float32)}}
  with pytest.raises(BadInput, match=r"'embed/tokens' has shape \(2, 16, 4\).* 2 dimensions"):
    sharding.specs(params)


@pytest.mark.parametrize('axes,named', [
    (dict(model=5), r'dimension of \S+ over mesh axis model=5'),
    (dict(fsdp=32), r'16 dimension of \S+ over mesh axis fsdp=32: .* \[1, 2, 4, 8, 16\]')])
def test_what_does_not_divide_is_refused_with_the_numbers(axes, named):
  with pytest.raises(BadInput, match=named):
    sharding.shardings(mesh_of(**axes), tiny().abstract)


@pytest.mark.parametrize('axes,devices,experts,named', [
    (dict(expert=4), 8, 6, '6 experts over mesh axis expert=4 on 8 devices.* mesh.expert=2$'),
    (dict(expert=8), 8, 4, '4 experts over mesh axis expert=8 on 8 devices.* mesh.expert=4$'),
    (dict(expert=3), 12, 4, '4 experts .*expert=3 on 12 .* mesh.expert=2 or mesh.expert=4$'),
    (dict(expert=3, model=2), 8, 4, '.* mesh.expert=2 or mesh.expert=4$'),
    (dict(expert=-1, data=1), 8, 4, '4 experts over mesh axis expert=8'),
    (dict(expert=3, model=3), 8, 4, 'none with the other axes')])
def test_experts_that_cannot_be_shared_out_are_refused_with_three_numbers_and_what_works(
    axes, devices, experts, named):
  with pytest.raises(BadInput, match=named):
    sharding.make_mesh(MeshConfig(**axes), jax.devices()[:1] * devices, experts)


def test_more_domains_than_devices_and_fewer():
  for axes, experts in ((dict(expert=2), 16), (dict(expert=2, data=4), 2), (dict(expert=8), 8)):
    model = tiny(experts=tuple(f'd{e}' for e in range(experts)))
    where = tree.flatten(sharding.shardings(mesh_of(**axes), model.abstract))
    leaf = tree.flatten(model.abstract)['block_0/ffn/experts/up']
    shape = where['block_0/ffn/experts/up'].shard_shape(leaf.shape)
    assert shape[1] == experts // axes['expert']


def replicated(monkeypatch, rule, share=0.05, **axes):
  monkeypatch.setattr(sharding, 'RULES', ((r'/router/gate$', rule), *sharding.RULES))
  like = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  params = {'block_0': {'attention': {'q': like(2, 512, 512), 'q_bias': like(2, 512)},
                        'router': {'gate': like(2, 512, 512)}}}
  sharding.check_replicated(mesh_of(**axes), params, share)


@pytest.mark.parametrize('axis', ['fsdp', 'model'])
def test_much_that_is_whole_on_every_device_by_accident_is_refused_by_name(monkeypatch, axis):
  rule = tuple(None if a == axis else a for a in ('fsdp', 'model'))
  named = rf'{axis}=2 leaves 50% .* 5% may be: block_0/router/gate \(2.1MB\)'
  with pytest.raises(Refused, match=named):
    replicated(monkeypatch, rule, **{axis: 2})
  replicated(monkeypatch, rule, share=0.6, **{axis: 2})  # allowed
  replicated(monkeypatch, rule, data=2)  # meant
  replicated(monkeypatch, ('fsdp', 'model'), **{axis: 2})


def test_experts_that_are_whole_on_every_device_are_refused(monkeypatch):
  monkeypatch.setattr(sharding, 'RULES', ((r'/experts/up$', (None, 'fsdp', 'model')),
                                          *sharding.RULES))
  like = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  params = {'block_0': {'ffn': {'experts': {'up': like(2, 4, 512, 512),
                                            'down': like(2, 4, 512, 512)}}}}
  with pytest.raises(Refused, match=r'expert=4 leaves 50% .*ffn/experts/up'):
    sharding.check_replicated(mesh_of(expert=4), params, 0.05)


@pytest.mark.parametrize('axes', [{}, dict(expert=4, data=2), dict(fsdp=2, model=2, expert=2)])
def test_on_the_way_to_a_checkpoint_no_device_has_a_whole_state(axes):
  model, mesh = tiny(), mesh_of(**axes)
  leaves = jax.eval_shape(model.canonical, model.abstract)
  where = sharding.spread(mesh, leaves)
  held = sum(np.prod(where[n].shard_shape(x.shape)) for n, x in leaves.items())
  whole = sum(np.prod(x.shape) for x in leaves.values())
  assert whole / mesh.size <= held <= 1.05 * whole / mesh.size


def test_rows_that_do_not_divide_are_refused_with_the_numbers():
  mesh = mesh_of(expert=4, data=2, model=3)
  sharding.check_rows(mesh, 16)
  with pytest.raises(BadInput, match=r'12 sequences .* 8 devices \(expert=4 · data=2\)'):
    sharding.check_rows(mesh, 12)


@pytest.mark.parametrize('axes', [
    dict(data=2), dict(data=1, expert=2), dict(data=0), dict(data=-1, expert=-1), dict(data=-2),
    dict(data=-1, expert=2)])
def test_a_mesh_that_does_not_fit_is_refused_with_all_sizes(axes):
  sizes = [getattr(MeshConfig(**axes), a) for a in sharding.AXES]
  text = ', '.join(f'{a}={s}' for a, s in zip(sharding.AXES, sizes))
  with pytest.raises(BadInput, match=re.escape(f'mesh {text} does not fit 1 devices')):
    sharding.make_mesh(MeshConfig(**axes), jax.devices()[:1])
  assert sharding.make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


# ---- the compiled step

DEFAULT = ('expert 4 data 2', 'expert 2 data 2 fsdp 2', '3 runs, expert 2 data 4')


@pytest.fixture(scope='module')
def printed(request):
  """{case: what tests/sharded_program.py found}."""
  every = request.config.getoption('--long')
  done = subprocess.run(
      [sys.executable, str(ROOT / 'tests/sharded_program.py'),
       *(case for case in (*CASES, *BESIDE) if every or case in DEFAULT)],
      capture_output=True, text=True,
      env=os.environ | runs.devices(8) | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def found(printed):
  """Of CASES only."""
  return {case: printed[case] for case in CASES if case in printed}


each_case = pytest.mark.parametrize('case', some(CASES, DEFAULT))


def slices(leaves, of) -> dict:
  """{leaf: shape of its part on a device, as it is inside the loop over layers}."""
  return {n: tuple(x[of][1:] if n.startswith('block_') else x[of]) for n, x in leaves.items()}


def with_axis(program, axis, *ops) -> Counter:
  """How often a shape is in a collective that spans `axis`; matrices may be transposed."""
  return Counter(tuple(sorted(s)) for c in program if axis in c['axes']
                 and (not ops or c['op'] in ops) for s in c['shapes'])


@each_case
def test_shared_gradients_are_summed_over_all_rows(found, case):
  it = found[case]
  local, whole = (slices(it['leaves'], of) for of in ('local', 'without_fsdp'))
  for axis in ('expert', 'data', 'fsdp'):
    if it['mesh'][axis] == 1:
      continue
    sums = with_axis(it['step'], axis, 'all-reduce', 'reduce-scatter')
    for name in local:
      if '/experts/' in name:
        continue
      part = tuple(sorted(whole[name] if axis == 'fsdp' else local[name]))
      if not sums[part]:  # all at once over every axis, before it is split over fsdp
        part = tuple(sorted(whole[name]))
      assert sums[part], (name, axis)
      sums[part] -= 1


@each_case
def test_nothing_of_an_expert_leaves_its_group(found, case):
  it = found[case]
  experts = {n for n in it['leaves'] if '/experts/' in n}
  shared = {tuple(sorted(s)) for of in ('local', 'without_fsdp')
            for n, s in slices(it['leaves'], of).items() if n not in experts}
  count = len(it['sharded']['tokens_D'][0])
  crossing = with_axis(it['step'], 'expert')
  # Shared gradients; scalars (clip norm, loss); and loss and tokens by domain.
  assert set(crossing) <= shared | {(), (count,)}
  assert crossing[(count,)] <= 2 * (2 if '2 micro' in case else 1)
  own = [tuple(sorted(s)) for of in ('local', 'without_fsdp', 'shape')
         for n, s in slices(it['leaves'], of).items() if n in experts]
  assert not set(crossing) & set(own)


@each_case
def test_expert_gradients_are_summed_or_gathered_once_inside_the_group(found, case):
  it = found[case]
  local = [x['local'] for n, x in it['leaves'].items() if '/experts/' in n]
  gathered = Counter()
  for c in it['step']:
    if c['op'] == 'all-gather' and c['axes'] != ['fsdp']:  # over fsdp weights are, to be used
      assert c['axes'] == ['data']
      gathered.update(tuple(s) for s in c['shapes'])
  layers = Counter(tuple(sorted((1, *s[2:]))) for s in local)  # of one expert, in the loop
  sums = with_axis(it['step'], 'data', 'all-reduce', 'reduce-scatter')
  summed = Counter({s: n for s, n in sums.items() if s in layers})
  if it['mesh']['data'] == 1:
    expected = Counter(), Counter()
  elif local[0][1] == 1:  # one expert in a group: its rows are on both devices
    expected = layers, Counter()
  else:  # two experts on two devices: each sees all rows of one, and they swap gradients
    expected = Counter(), Counter(map(tuple, local))
  assert (summed, gathered) == expected  # so nothing gathers weights or moments


@each_case
def test_activations_stay_with_their_rows(found, case):
  it = found[case]
  assert {c['op'] for c in it['step'] + it['forward']} <= {'all-reduce', 'all-gather'}
  for c in it['step']:  # heads and feed-forward columns stay apart on `model`
    assert c['op'] != 'all-gather' or c['axes'] in (['fsdp'], ['data'])
  for c in it['forward']:
    assert c['axes'] in (['fsdp'], ['model'])
  assert bool(it['forward']) == (it['mesh']['fsdp'] * it['mesh']['model'] > 1)
  if it['mesh']['fsdp'] > 1:  # over fsdp, parameters are gathered and gradients summed
    parameters = {tuple(sorted(s)) for of in ('without_fsdp', 'shape')
                  for s in slices(it['leaves'], of).values()}
    parameters |= {tuple(sorted((1, *x['shape'][2:]))) for n, x in it['leaves'].items()
                   if '/experts/' in n}  # one expert of the group, in the loop
    over = with_axis(it['step'], 'fsdp') + with_axis(it['forward'], 'fsdp')
    assert set(over) <= parameters | {(), (4,)}


@each_case
def test_scoring_expert_by_expert_leaves_experts_where_they_lie(found, case):
  """Evaluation in training: with rows of any expert it gathered all of them, batch after batch."""
  assert all('expert' not in c['axes'] for c in found[case]['scored'])


@each_case
def test_the_step_is_that_of_one_device(found, case):
  it = found[case]
  alone, sharded = it['alone'], it['sharded']
  assert alone.pop('applied') == sharded.pop('applied') == [True, True]
  for name in alone:  # sums in another order
    np.testing.assert_allclose(sharded[name], alone[name], rtol=2e-6, err_msg=name)
  assert max(it['difference'].values()) < 2e-6
  assert it['strays'] == []  # parameters and moments come out where they went in


def test_the_cases_are_what_their_names_say(found):
  for case, it in found.items():
    axes = {a: int(n) for a, n in re.findall(r'(\w+) (\d)(?! micro)', case)}
    assert it['mesh'] == dict.fromkeys(sharding.AXES, 1) | axes
    assert np.prod(list(it['mesh'].values())) == 8
  assert drawn(tiny()).keys() == {n.split('/')[0] for n in it['leaves']}


# ---- several runs side by side

@pytest.mark.parametrize('case', some(BESIDE, DEFAULT))
def test_runs_on_the_expert_axis_send_each_other_nothing_and_are_those_of_one_device(
    printed, case):
  it = printed[case]
  assert all('expert' not in c['axes'] for c in it['step']), it['step']
  assert bool(it['step']) == (it['mesh']['expert'] < 8)  # with data or fsdp there is something
  assert it['devices'] == [8] * len(it['devices'])
  assert it['local'] == [-(-len(it['runs']) // it['mesh']['expert'])]
  norms = set()
  for run in it['runs']:
    assert run['alone'].pop('applied') == run['beside'].pop('applied') == [True, True]
    for name, values in run['alone'].items():
      np.testing.assert_allclose(run['beside'][name], values, rtol=3e-6, err_msg=name)
    assert run['difference'] < 3e-6
    norms.add(run['alone']['grad_norm'][0])
  assert len(norms) == len(it['runs']) and min(norms) > 0.5  # each is clipped, by its own norm
