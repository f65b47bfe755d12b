"""configs/forest_*.py and configs/papers/btm/: plans that can be carried out, of the tokens they
say."""

import json
import sys
from pathlib import Path

import pytest

from demix.forest import plan

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from configs import forest_controls, forest_rounds, quickstart  # noqa: E402
from configs.papers.btm import curriculum, recipe  # noqa: E402
from configs.papers.btm import forest as eight  # noqa: E402


def planned(content):
  found = plan.named(json.loads(json.dumps(content.to_dict())), 'p')
  plan.check(found, 'p')
  return found


def total(found, names):
  return sum(plan.tokens_of(found, n) for n in names)


DENSE = (lambda c: c.train.steps * c.data.batch_size * c.data.sequence_length)(
    quickstart.get_config('dense'))


@pytest.mark.parametrize('arm', ['no_seed', 'random_split'])
def test_a_control_has_the_tokens_of_dense(arm):
  found = planned(forest_controls.get_config(arm))
  seed = ['seed'] * (arm != 'no_seed')
  assert total(found, [*seed, *found['experts']]) == DENSE
  assert len(found['experts']) == 4


def test_each_share_of_the_seed_has_the_tokens_of_dense():
  found = planned(forest_controls.get_config('seed_shares'))
  per_step = DENSE // found['base']['train']['steps']
  for share in forest_controls.SHARES:
    names = [n for n in found['experts'] if n.endswith(f'-{share}')]
    [step] = {plan.step_of(found, n) for n in names}
    assert len(names) == 4 and total(found, names) + step * per_step == DENSE
  assert plan.keep_every(found, 'seed') == found['seed']['train']['checkpoint_every'] == round(
      found['base']['train']['steps'] / 6)


def test_the_second_round_branches_from_the_first_alone():
  first, both = (planned(forest_rounds.get_config(r)) for r in '12')
  assert list(first['experts']) == list(forest_rounds.FIRST)
  for name, branch in first['experts'].items():
    assert both['experts'][name] == branch
  for name in forest_rounds.SECOND:
    assert plan.parents(both, name) == forest_rounds.FIRST


@pytest.mark.parametrize('size', recipe.BUDGETS)
def test_the_papers_forest_has_the_tokens_of_its_dense_run(size):
  found = planned(eight.get_config(size))
  sequences, updates = recipe.BUDGETS[size]
  assert total(found, ['seed', *found['experts']]) == sequences * updates * 1024


def test_the_curriculum_has_64_domains_in_rounds():
  found = planned(curriculum.get_config())
  assert len(found['experts']) == 64
  of = [len(plan.parents(found, n)) for n in found['experts']]
  assert of == [1] * 8 + [8] * 8 + [16] * 16 + [32] * 32


def test_a_plan_without_an_expert_has_none_of_its_branches():
  found = planned(forest_rounds.get_config('2'))
  first, second = forest_rounds.FIRST
  left, gone = plan.without(found, first)
  assert gone == [] and plan.parents(left, forest_rounds.SECOND[0]) == (second,)
  left, gone = plan.without(left, second)
  assert list(left['experts']) == [] and set(gone) == set(forest_rounds.SECOND)
