"""demix/analysis/collectives.py: the reader of compiled programs."""

import numpy as np
import pytest

from demix.analysis.collectives import collectives, replica_groups, table


@pytest.mark.parametrize('spelling,groups', [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', '01 23 45 67'),
    ('replica_groups=[4,2]<=[8]', '01 23 45 67'),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', '0246 1357'),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", '01 23 45 67'),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", '0246 1357'),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", '0246 1357'),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", '0145 2367'),
    ('channel_id=1', '01234567'), ('replica_groups={}', '01234567')])
def test_the_reader_knows_every_spelling_of_groups(spelling, groups):
  line = f'%x = f32[4,20]{{1,0}} all-reduce(%y), channel_id=2, {spelling}, to_apply=%add'
  found = replica_groups(line, 8)
  assert found == {frozenset(map(int, g)) for g in groups.split()}


class Grid:
  """What `collectives` reads of a mesh: 4 groups of experts of 2 devices each."""
  axis_names, size = ('expert', 'data'), 8
  devices = np.array([type('Device', (), {'id': i})() for i in range(8)]).reshape(4, 2)


def test_the_reader_finds_shapes_and_axes():
  text = """
    %a = (f32[1,20]{1,0}, f32[]) all-reduce(%b, %c), replica_groups=[4,2]<=[8], to_apply=%add
    %d = f32[8,20]{1,0} all-gather-start(%e), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
    %f = s32[3]{0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
    %h = f32[3]{0} add(%a, %d)
  """
  found = collectives(text, Grid)
  assert [(c.op, c.shapes, c.axes, c.group, c.bytes) for c in found] == [
      ('all-reduce', ((1, 20), ()), ('data',), 2, 84),
      ('all-gather', ((8, 20),), ('expert',), 4, 640),
      ('collective-permute', ((3,),), ('data',), 2, 12)]
  assert [c.sent for c in found] == [84, 480, 12]  # by a ring: 2 (n - 1) / n, (n - 1) / n, once


def test_what_is_in_a_loop_counts_as_often_as_it_turns():
  text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}
%inner (x: f32[4]) -> f32[4] {
  ROOT %y = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%sum
}
%turns (x: f32[4]) -> pred[] {
  ROOT %z = pred[] compare(%x, %x)
}
%outer (x: f32[4]) -> f32[4] {
  ROOT %w = f32[4]{0} while(%x), condition=%turns, body=%inner, TURNS3"}}
}
%never (x: f32[4]) -> f32[4] {
  ROOT %v = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%sum
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %u = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %w = f32[4]{0} while(%x), condition=%turns, body=%outer, TURNS5"}}
}
""".replace('TURNS', 'backend_config={"known_trip_count":{"n":"')
  found = collectives(text, Grid)
  assert [(c.op, c.times, c.bytes) for c in found] == [
      ('all-reduce', 15, 16), ('all-gather', 1, 32)]
  assert table(found) == {('all-reduce', ('data',)): 240, ('all-gather', ('data',)): 16}
