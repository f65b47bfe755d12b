"""demix/model/ffn/domain_expert_ffn.py: three ways through the layer and one meaning."""

import formulas
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx

from demix.model import tree
from demix.model.ffn import domain_expert_ffn
from demix.model.ffn.domain_expert_ffn import DomainExpertFFN
from demix.model.ffn.feed_forward import FeedForward

E, D, B, L = len(models.EXPERTS), 16, 8, 3
KINDS = [('gpt', {}), ('llama', {}), ('gpt', dict(activation='gelu_tanh', biases=False))]


def layer(kind, changes):
  """A function (leaves, x, route, balanced) of the layer, and drawn leaves."""
  config = models.tiny(kind, **changes).config
  graph, state = nnx.split(nnx.eval_shape(lambda: DomainExpertFFN(config, rngs=nnx.Rngs(0))))
  random = np.random.default_rng(3)
  leaves = {n: jnp.asarray(random.normal(size=x.shape) * 0.4, jnp.float32)
            for n, x in tree.flatten(nnx.to_pure_dict(state)).items()}
  run = lambda leaves, x, route, balanced=False: nnx.merge(graph, tree.unflatten(leaves))(
      x, route, balanced)
  return config, run, leaves


@pytest.mark.parametrize('kind,changes', KINDS)
def test_every_way_is_the_formula(kind, changes):
  config, run, leaves = layer(kind, changes)
  random = np.random.default_rng(0)
  x = random.normal(size=(B, L, D))
  expert = lambda e: {n.split('/')[-1]: np.float64(leaf[e]) for n, leaf in leaves.items()}
  every = np.stack([formulas.feed_forward(config.activation, expert(e), x) for e in range(E)])
  rows, mixed = np.repeat(np.arange(E), B // E), random.integers(0, E, B)
  weights_BE, weights_BLE = random.random((B, E)), random.random((B, L, E))
  expected = {
      'balanced': (rows, every[rows, range(B)]),
      'domain_B': (mixed, every[mixed, range(B)]),
      'weights_BE': (weights_BE, np.einsum('be,ebld->bld', weights_BE, every)),
      'weights_BLE': (weights_BLE, np.einsum('ble,ebld->bld', weights_BLE, every))}
  got = models.jit(lambda leaves, x, routes: {
      way: run(leaves, x, route, way == 'balanced') for way, route in routes.items()})(
          leaves, jnp.float32(x), {way: jnp.asarray(route, None if route.ndim == 1 else jnp.float32)
                                   for way, (route, _) in expected.items()})
  for way, (_, y) in expected.items():
    np.testing.assert_allclose(got[way], y, rtol=1e-4, atol=1e-5, err_msg=way)


@pytest.mark.parametrize('domains', [[2, 0, 2, 2, 0], [1, 1, 1], [3, 2, 1, 0], [2, 1]])
def test_grouped_rows_are_gathered_rows_in_value_and_gradient(domains):
  _, _, leaves = layer('gpt', {})
  leaves = {n.split('/')[-1]: leaf for n, leaf in leaves.items()}
  x = jnp.float32(np.random.default_rng(0).normal(size=(len(domains), L, D)))
  def run(form):
    each = jnp.cos(jnp.arange(x.size)).reshape(x.shape)  # which row is which shows
    value = lambda leaves, x: (form(leaves, x, jnp.asarray(domains), 'gelu') ** 2 * each).sum()
    return models.jit(jax.value_and_grad(value, (0, 1)))(leaves, x)
  (a, (da, dx)), (b, (db, dy)) = map(
      run, (domain_expert_ffn.grouped, domain_expert_ffn.gathered))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  models.assert_close({'x': dx} | da, {'x': dy} | db, 1e-4, 1e-4)
  for e in set(range(E)) - set(domains):
    assert not any(np.asarray(leaf[e]).any() for leaf in da.values())


def test_accelerators_group_and_cpus_gather(monkeypatch):
  assert domain_expert_ffn.any_rows() is domain_expert_ffn.gathered
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert domain_expert_ffn.any_rows() is domain_expert_ffn.grouped
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  assert domain_expert_ffn.any_rows() is domain_expert_ffn.gathered


def test_copies_of_weights_are_not_kept_for_the_backward_pass():
  _, _, leaves = layer('gpt', {})
  leaves = {n.split('/')[-1]: leaf for n, leaf in leaves.items()}
  domain = jnp.arange(B) % E
  _, pull = jax.vjp(lambda leaves, x: domain_expert_ffn.gathered(leaves, x, domain, 'gelu'),
                    leaves, jnp.ones((B, L, D)))
  kept = {x.shape for x in jax.tree.leaves(pull)}
  assert (B, L, leaves['up'].shape[-1]) in kept  # what the activation needs
  copies = {(B, *leaf.shape[1:]) for leaf in leaves.values()}
  assert not kept & copies


def test_one_hot_weights_are_that_expert():
  _, run, leaves = layer('gpt', {})
  random = np.random.default_rng(1)
  x, mixed = jnp.float32(random.normal(size=(B, L, D))), jnp.asarray(random.integers(0, E, B))
  chosen, as_weights, per_token = models.jit(lambda x: (
      run(leaves, x, mixed), run(leaves, x, jax.nn.one_hot(mixed, E)),
      run(leaves, x, jnp.broadcast_to(jax.nn.one_hot(mixed, E)[:, None], (B, L, E)))))(x)
  np.testing.assert_allclose(as_weights, chosen, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(as_weights, per_token)


@pytest.mark.parametrize('way', ['balanced', 'domain_B', 'weights_BE'])
def test_only_experts_of_the_rows_that_count_get_a_gradient(way):
  _, run, leaves = layer('gpt', {})
  x = jnp.float32(np.random.default_rng(2).normal(size=(B, L, D)))
  rows = np.repeat(np.arange(E), B // E)
  counts = jnp.asarray(np.isin(rows, [1, 3]), jnp.float32)  # rows of other experts do not count
  route = jax.nn.one_hot(rows, E) if way == 'weights_BE' else jnp.asarray(rows)
  def value(leaves):
    return ((run(leaves, x, route, way == 'balanced') ** 2).sum((1, 2)) * counts).sum()
  for name, grad in models.jit(jax.grad(value))(leaves).items():
    touched = np.abs(np.asarray(grad)).reshape(E, -1)
    assert not touched[[0, 2]].any(), name  # exactly zero
    assert (touched[[1, 3]].max(-1) > 1e-3).all(), name


def test_experts_start_as_copies_of_the_dense_layer():
  config = models.tiny('llama').config
  def start(make):
    return models.jit(lambda: nnx.to_pure_dict(nnx.state(make(config, rngs=nnx.Rngs(7)))))()
  dense, experts = start(FeedForward), start(DomainExpertFFN)['experts']
  assert dense.keys() == experts.keys() == {'up', 'down', 'gate'}
  for name in dense:
    assert experts[name].shape == (E, *dense[name].shape) and dense[name].std() > 0.01
    np.testing.assert_array_equal(experts[name], np.stack([dense[name]] * E))


def test_the_output_has_the_type_of_the_input():
  _, run, leaves = layer('gpt', {})
  x = jnp.ones((B, L, D), jnp.bfloat16)
  for route, balanced in ((jnp.zeros(B, int), True), (jnp.zeros(B, int), False),
                          (jnp.ones((B, E)), False)):
    y = jax.eval_shape(lambda x, r, balanced=balanced: run(leaves, x, r, balanced), x, route)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
