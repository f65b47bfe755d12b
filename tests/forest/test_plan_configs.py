"""configs/forest_*.py and configs/papers/btm/: plans that can be carried out, of the tokens they
say."""

import json
import sys
from pathlib import Path

import pytest

from demix.forest import plan
from demix.lifecycle import forests

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from configs import (  # noqa: E402
  forest_clusters,
  forest_controls,
  forest_domains,
  forest_quickstart,
  forest_rounds,
  quickstart,
)
from configs.papers.btm import curriculum, recipe  # noqa: E402
from configs.papers.btm import forest as eight  # noqa: E402


def planned(content):
  found = plan.named(json.loads(json.dumps(content.to_dict())), 'p')
  plan.check(found, 'p')
  forests.check_configs(found, 'p')
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


def equal_parts(found, names, wanted):
  """The tokens of a plan over `names`: dense's at its own batch, in equal parts, to half an
  update."""
  base, length = found['base'], found['base']['data']['sequence_length']
  rows, steps = base['data']['batch_size'], base['train']['steps']
  assert list(found['experts']) == list(names) and rows % len(names) == 0
  assert total(found, ['seed', *names]) == rows * steps * length
  assert abs(rows * steps * length - wanted) <= rows * length / 2
  parts = {(plan.tokens_of(found, n), plan.config_of(found, n)['data']['batch_size'])
           for n in names}
  assert len(parts) == 1 and parts.pop()[1] * len(names) == rows
  assert plan.config_of(found, 'seed')['optimizer']['schedule_steps'] == steps


@pytest.mark.parametrize('count', [2, 3, 4, 5, 7, 8, 12, 64])
def test_any_number_of_domains_or_clusters_has_the_tokens_of_dense(count):
  names = [f'domain{i}' for i in range(count)]
  equal_parts(planned(forest_domains.get_config(','.join(names))), names, DENSE)
  clusters = [f'cluster{i}' for i in range(count)]
  length = quickstart.get_config('dense').data.sequence_length
  rows = quickstart.get_config('dense').data.batch_size
  equal_parts(planned(forest_clusters.get_config(f'{count},100')), clusters, 100 * rows * length)


def test_a_forest_of_the_quick_starts_domains_is_the_quick_starts():
  ours, theirs = (planned(c.get_config()) for c in (forest_domains, forest_quickstart))
  for name in ('seed', *forest_quickstart.TRAIN):
    assert plan.config_of(ours, name) == plan.config_of(theirs, name)


def test_the_dense_run_that_a_plan_names_has_its_tokens():
  said = forest_domains.summary('0.25,a,b,c')
  flags = dict(w.split('=', 1) for w in said.split() if w.startswith('--config.'))
  updates, rows = (int(flags[f'--config.{k}']) for k in ('train.steps', 'data.batch_size'))
  length = quickstart.get_config('dense').data.sequence_length
  assert f'together    {updates * rows * length:,} tokens' in said


@pytest.mark.parametrize('arg', ['', 'a', 'a,a', '0.5', '1.5,a,b', '0.0,a,b'])
def test_domains_that_make_no_forest_are_refused(arg):
  with pytest.raises(ValueError):
    forest_domains.get_config(arg)
