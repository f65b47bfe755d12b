"""demix/mix/members.py: the experts of one DEMix LM as whole LMs, and what running them costs."""

import functools
import math

import jax
import jaxprs
import models
import numpy as np
import pytest
from cases import some

from demix.mix.members import ExpertMembers
from demix.model import tree
from demix.model.layers.attention import mask_bias
from demix.model.params import expert_slice

pytestmark = pytest.mark.exact

ALL = np.arange(4)
B, L = 3, 6


def tokens(seed=0):
  return np.random.default_rng(seed).integers(0, models.V, (B, L)).astype(np.int32)


@functools.cache
def programs(model, jit):
  """(members' hidden states, `apply` for a route) compiled by `jit`."""
  members = ExpertMembers(model)
  each = jit(lambda params, tokens, routes: members.each(params, tokens, routes, lambda h: h))
  return each, jit(lambda params, tokens, route: model.apply(params, tokens, route)[0])


@pytest.mark.parametrize('scan', some([True, False], [True]))
@pytest.mark.parametrize('kind', models.KINDS)
def test_a_member_is_the_expert_taken_out_to_the_bit(kind, scan):
  model = models.tiny(kind, scan=scan)
  jit = jax.jit if (kind, scan) == ('period 2', True) else models.jit
  params, (each, apply) = models.drawn(model), programs(model, jit)
  hidden = np.asarray(each(params, tokens(), ALL))
  assert hidden.shape == (4, B, L, 16)
  for e, name in enumerate(models.EXPERTS):
    dense, own = expert_slice(model, params, name)
    alone = programs(dense, jit)[1](own, tokens(), np.zeros(B, np.int32))
    np.testing.assert_array_equal(hidden[e], alone)
    np.testing.assert_array_equal(hidden[e], apply(params, tokens(), np.full(B, e, np.int32)))
    assert np.abs(hidden[e] - hidden[e - 1]).max() > 0.1


def test_chosen_members_are_those_of_all_to_the_bit():
  model = models.tiny()
  params, (each, _) = models.drawn(model), programs(model, models.jit)
  hidden = np.asarray(each(params, tokens(), ALL))
  np.testing.assert_array_equal(each(params, tokens(), np.array([3, 1])), hidden[[3, 1]])


def test_segments_and_positions_reach_every_member():
  model = models.tiny('llama')
  params, members = models.drawn(model), ExpertMembers(model)
  batch = models.batch_of([0, 0, 0], segments=True)
  more = {n: batch[n] for n in ('segments_BL', 'positions_BL')}
  read = batch['tokens_BL']
  hidden = models.jit(lambda p: members.each(p, read, ALL, lambda h: h, **more))(params)
  apply = models.jit(lambda p, route: model.apply(p, read, route, **more)[0])
  for e in ALL:
    there = apply(params, np.full(3, e))
    np.testing.assert_allclose(hidden[e], there, atol=1e-5)


def flops(f, *args) -> int:
  """Multiplications of the matrix products of f(*args), loops by how often they run."""
  def count(jaxpr, times):
    total = 0
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
      if eqn.primitive.name == 'dot_general':
        contract = eqn.params['dimension_numbers'][0][0]
        size = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        total += times * math.prod(eqn.outvars[0].aval.shape) * size
      inside = times * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
      assert eqn.primitive.name != 'while'
      total += sum(count(j, inside) for j in jax.tree.leaves(eqn.params, is_leaf=jaxprs.is_jaxpr)
                   if jaxprs.is_jaxpr(j))
    return total
  return count(jax.make_jaxpr(f)(*args), 1)


def stem(model):
  return lambda params: model.bind(params).stem(tokens(), np.arange(L)[None], mask_bias(L, None))


@pytest.mark.parametrize('kind', models.KINDS)
def test_what_experts_share_is_run_once_and_who_is_not_chosen_not_at_all(kind):
  model = models.tiny(kind)
  params, members = model.abstract, ExpertMembers(model)
  cost = {k: flops(lambda p, k=k: members.each(p, tokens(), ALL[:k], lambda h: h), params)
          for k in (1, 2, 4)}
  whole = flops(lambda p: model.apply(p, tokens(), np.zeros(B, np.int32))[0], params)
  shared = flops(stem(model), params)
  assert cost[1] == whole and 0 < shared < whole / 2
  assert all(cost[k] == shared + k * (whole - shared) for k in cost)


def test_the_stem_reads_no_expert():
  """Whatever the experts' leaves are, what is run once is the same: it holds none of them."""
  model = models.tiny('period 2')
  params, run = models.drawn(model), models.jit(stem(model))
  nan = tree.unflatten({n: x * np.nan if '/experts/' in n else x
                        for n, x in tree.flatten(params).items()})
  np.testing.assert_array_equal(run(nan), run(params))
  assert np.isfinite(run(params)).all()


def test_a_dense_model_is_its_only_member():
  model = models.tiny(ffn='dense')
  params, members = models.drawn(model), ExpertMembers(model, 'legal')
  assert members.names == ('legal',) and members.context == 8
  each, apply = programs(model, models.jit)
  np.testing.assert_array_equal(each(params, tokens(), ALL[:1])[0],
                                apply(params, tokens(), np.zeros(B, np.int32)))
  assert ExpertMembers(models.tiny()).names == models.EXPERTS


def test_losses_and_logits_are_the_models():
  model = models.tiny('llama')
  params, members = models.drawn(model), ExpertMembers(model)
  hidden = np.random.default_rng(0).normal(0, 1, (B, L, 16)).astype(np.float32)
  targets = tokens(1)
  logits = np.float64(members.logits(params, hidden))
  assert logits.shape == (B, L, models.V)  # without the rows that fill the table up
  np.testing.assert_allclose(logits, np.float64(hidden) @ np.float64(
      params['embed']['output'])[:models.V].T, atol=1e-5)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_allclose(members.nll(params, hidden, targets),
                             -np.take_along_axis(logp, targets[..., None], -1)[..., 0], atol=1e-5)


def test_members_taken_out_are_the_same_with_fewer_leaves():
  model = models.tiny('period 2')
  params, members = models.drawn(model), ExpertMembers(model)
  few, own = members.take(params, np.array([3, 1]))
  assert few.names == ('art', 'bio')
  hidden = programs(model, models.jit)[0](params, tokens(), ALL)
  np.testing.assert_array_equal(
      programs(few.model, models.jit)[0](own, tokens(), ALL[:2]), np.asarray(hidden)[[3, 1]])
  assert tree.size(own) < tree.size(params)
  assert members.take(params, ALL) == (members, params)


@pytest.mark.parametrize('kind', some(models.KINDS, ['llama']))
def test_text_read_in_pieces_is_text_read_at_once(kind):
  model = models.tiny(kind)
  params, members = models.drawn(model), ExpertMembers(model)
  text = tokens()[0]
  whole = np.asarray(programs(model, models.jit)[0](params, text[None], ALL))[:, 0]
  cache, advance = members.empty(), models.jit(members.advance)
  for start, end in ((0, 3), (3, 4), (4, 6)):
    hidden, cache = advance(params, cache, text[start:end], start)
    np.testing.assert_allclose(hidden, whole[:, start:end], atol=2e-5)
  few, own = members.take(params, np.array([0, 2]))
  last, _ = models.jit(few.advance)(own, members.keep(cache, np.array([0, 2])), text[-1:], L - 1)
  np.testing.assert_allclose(last[:, 0], whole[[0, 2], -1], atol=2e-5)
