"""Regions in seconds become frames, and those that are none are refused."""

import numpy as np
import pytest

from magnet_jax.edit import regions
from magnet_jax.edit.splice import Reach
from magnet_jax.errors import UserError


def frames_at(region, edge, seconds=4.0, **how):
    how = {"frame_rate": 50, "num_frames": 200, "reach": Reach(5, 2)} | how
    [region] = regions.joined([region], seconds)
    return regions.frames_of(region, seconds=seconds, edge=edge, **how)


def test_regions_as_frames():
    assert frames_at((1.0, 2.0), "outside") == (50, 100)
    assert frames_at((1.001, 1.999), "outside") == (50, 100)
    assert frames_at((0.58, 1.16), "outside") == (29, 58)  # 0.58 * 50 is a little less than 29
    assert frames_at((1.0, None), "outside") == (50, 200)
    assert frames_at((1.0, 2.0), "inside") == (55, 93)
    assert frames_at((1.001, 1.999), "inside") == (56, 92)
    assert frames_at((0.0, None), "inside") == (0, 200)  # a clip's ends border on nothing
    assert frames_at((0.0, 0.2), "inside") == (0, 3)
    assert frames_at((1.0, 2.0), "inside", guard=2) == (55, 96)
    # A clip that ends within its last frame.
    assert frames_at((1.0, 3.99), "inside", seconds=3.99) == (55, 200)
    assert frames_at((1.0, 3.988), "inside", seconds=3.99) == (55, 192)
    assert frames_at((1.0, 3.99), "inside") == (55, 192)


@pytest.mark.parametrize(
    ("region", "edge", "match"),
    [
        ((-1.0, 2.0), "outside", "region -1:2: the clip is 4 s long.* use extend"),
        ((3.0, 4.5), "outside", "region 3:4.5: .*extend"),
        ((5.0, None), "outside", "region 5:4: .*extend"),
        ((2.0, 2.0), "outside", "must end after"),
        ((4.0, None), "inside", "must end after"),
        ((1.0, 1.28), "inside", "use edge='outside'"),
        ((float("nan"), 2.0), "outside", "extend"),
        ((1.0, float("nan")), "outside", "extend"),
    ],
)
def test_regions_that_are_refused(region, edge, match):
    with pytest.raises(UserError, match=match):
        frames_at(region, edge)
    with pytest.raises(UserError, match=match):  # beside a good one too, which does not hide it
        regions.joined([(0.0, None), region], 4.0)
        frames_at(region, edge)


def test_regions_that_touch_are_one():
    joined = regions.joined([(3.0, None), (1.0, 2.0), (1.2, 1.5), (2.0, 2.5), (2.6, 2.8)], 4.0)
    assert joined == [(1.0, 2.5), (2.6, 2.8), (3.0, 4.0)]
    assert regions.joined([(0.3, 0.6), (0.1 + 0.2, 0.5)], 4.0) == [(0.3, 0.6)]
    assert regions.joined([], 4.0) == []


def test_regions_of_all_clips_or_of_each():
    one = [(2, 4.5), (7, None)]
    assert regions.of_each(one, 2) == [one, one]
    assert regions.of_each([one, []], 2) == [one, []]
    assert regions.of_each([], 2) == [[], []]
    assert regions.of_each(np.array(one[:1]), 1) == [[(2.0, 4.5)]]
    for wrong in (3, "0:1", [1, 2], [("a", "b")], [[(1, 2, 3)]]):
        with pytest.raises(UserError, match=r"regions must be \(begin, end\)"):
            regions.of_each(wrong, 1)
    with pytest.raises(UserError, match="2 clips need as many lists of regions, not 3"):
        regions.of_each([one, one, one], 2)


def test_where_frames_differ():
    assert regions.where(np.array([1, 1, 0, 0, 1, 0], bool)) == [(0, 2), (4, 5)]
    assert regions.where(np.zeros(3, bool)) == [] and regions.where(np.ones(3, bool)) == [(0, 3)]
