"""demix/model/tree.py: names of leaves, both ways."""

import models
import numpy as np
import pytest

from demix.errors import BadInput
from demix.model import tree


def numbered(*shape):
  return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


# A running tree of two periods of two blocks; the second of each holds experts.
RUNNING = {
    'embed': {'tokens': numbered(5, 2)},
    'block_0': {'ffn': {'up': numbered(2, 3)}},
    'block_1': {'ffn': {'experts': {'up': numbered(2, 3, 4)}}, 'norm': {'scale': numbered(2, 2)}},
    'final_norm': {'scale': numbered(2)},
}


def test_canonical_names_layers_in_their_order_and_experts_by_name():
  flat = tree.canonical(RUNNING, ('web', 'art', 'law'))
  up = RUNNING['block_1']['ffn']['experts']['up']
  expected = {
      'embed/tokens': numbered(5, 2), 'final_norm/scale': numbered(2),
      'blocks/0/ffn/up': numbered(2, 3)[0], 'blocks/2/ffn/up': numbered(2, 3)[1],
      'blocks/1/norm/scale': numbered(2, 2)[0], 'blocks/3/norm/scale': numbered(2, 2)[1]}
  for layer, i in ((1, 0), (3, 1)):
    for e, name in enumerate(('web', 'art', 'law')):
      expected[f'blocks/{layer}/ffn/experts/{name}/up'] = up[i, e]
  assert flat.keys() == expected.keys()
  for name in flat:
    np.testing.assert_array_equal(flat[name], expected[name], err_msg=name)


def test_running_is_the_inverse_and_the_order_of_names_does_not_matter():
  experts = ('web', 'art', 'law')
  flat = tree.canonical(RUNNING, experts)
  for names in (list(flat), sorted(flat), sorted(flat, reverse=True)):
    models.assert_same(tree.running({n: flat[n] for n in names}, 2, experts), RUNNING)
  other = tree.running(flat, 2, ('law', 'web', 'art'))['block_1']['ffn']['experts']['up']
  np.testing.assert_array_equal(other, RUNNING['block_1']['ffn']['experts']['up'][:, [2, 0, 1]])


def test_layers_are_counted_not_spelled():
  flat = tree.canonical({'block_0': {'w': numbered(12, 1)}})
  np.testing.assert_array_equal(tree.running(flat, 1)['block_0']['w'], numbered(12, 1))
  assert tree.layers_of('block_1/w', 3, 2) == ['blocks/1', 'blocks/3', 'blocks/5']


@pytest.mark.parametrize('missing,named', [
    ('blocks/2/ffn/up', 'blocks/2/ffn/up is missing'),
    ('blocks/3/ffn/experts/art/up', 'blocks/3/ffn/experts/up is missing for expert art'),
    ('blocks/1/norm/scale', 'blocks/1/norm/scale is missing')])
def test_a_missing_layer_or_expert_is_named(missing, named):
  flat = tree.canonical(RUNNING, ('web', 'art', 'law'))
  del flat[missing]
  with pytest.raises(BadInput, match=named):
    tree.running(flat, 2, ('web', 'art', 'law'))


def test_flatten_and_unflatten():
  nested = {'b': {'y': 1, 'x': {'z': 2}}, 'a': 3}
  flat = tree.flatten(nested)
  assert list(flat.items()) == [('b/y', 1), ('b/x/z', 2), ('a', 3)]
  assert tree.unflatten(flat) == nested
  assert tree.size(RUNNING) == 10 + 6 + 24 + 4 + 2


def test_the_first_rule_wins_and_none_is_an_error():
  rules = [('norm', 'a'), ('^blocks/1/', 'b'), ('scale$', 'c')]
  names = ['blocks/1/norm/scale', 'blocks/1/ffn/up', 'blocks/2/scale']
  assert [tree.match(rules, n) for n in names] == ['a', 'b', 'c']
  with pytest.raises(BadInput, match="'blocks/10/ffn/up'"):
    tree.match(rules, 'blocks/10/ffn/up')


@pytest.mark.parametrize('name,parts', [
    ('blocks/3/ffn/experts/legal/up', ('blocks/3/ffn/experts', 'legal', 'up')),
    ('blocks/3/ffn/experts/a-b_2/down_bias', ('blocks/3/ffn/experts', 'a-b_2', 'down_bias')),
    ('blocks/3/ffn/experts/up', None), ('blocks/3/ffn/up', None), ('embed/tokens', None)])
def test_which_leaves_are_of_experts(name, parts):
  found = tree.EXPERT.fullmatch(name)
  assert (found and found.groups()) == parts
