"""Bars are as long as their tempo says, to the sample."""

from fractions import Fraction

import numpy as np
import pytest

from magnet_jax.edit import bars
from magnet_jax.errors import UserError


def test_bars_to_the_sample():
    assert bars.of(128, 4, None, most=10).samples(32_000) == 240_000
    assert bars.of(120, 3, None, beats_per_bar=3, most=10).samples(48_000) == 216_000
    for count in (1, 2, 4, 8):
        for bpm in np.arange(60, 200.5, 0.5):
            length = bars.of(float(bpm), count, None, most=1000)
            exact = Fraction(32_000 * 60 * 4 * count) / Fraction(float(bpm))
            assert abs(length.samples(32_000) - exact) <= Fraction(1, 2)
            assert abs(length.frames(50) - exact / 640) <= Fraction(1, 2)
            starts = length.starts(32_000)
            assert starts[0] == 0 and len(starts) == count == length.bars
            steps = np.diff([*starts, length.samples(32_000)])
            assert np.ptp(steps) <= 1 and length.beats == 4 * count


def test_what_is_not_said_follows_from_what_is_heard():
    assert bars.of(128, None, None, most=10).bars == 4
    assert bars.of(200, None, None, most=10).bars == 8
    assert bars.of(60, None, None, most=10).bars == 2
    seconds = bars.of(None, None, 3.21, most=10)
    assert seconds.samples(32_000) == 102_720 and seconds.starts(32_000) == [0]
    assert bars.of(None, None, None, most=10).seconds == 10
    assert bars.of(400.0, 1, None, most=0.6).seconds == Fraction(3, 5)  # to which 0.6 is less
    assert (seconds.bpm, seconds.beats, seconds.words) == (None, None, "3.21 s")


@pytest.mark.parametrize(
    ("asked", "named"),
    [((None, 4, None), "bpm"), ((120, 2, 4.0), "seconds"), ((60, 4, None), "16 s"),
     ((20, None, None), "12 s"), ((None, None, 11.0), "11 s")],
)  # fmt: skip
def test_lengths_that_are_none(asked, named):
    with pytest.raises(UserError, match=named):
        bars.of(*asked, most=10)
