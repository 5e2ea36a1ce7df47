"""The schedule's numbers, which are AudioCraft's."""

import functools
import math

import jax
import numpy as np
import pytest
import torch

from magnet_jax.config import DecodeConfig
from magnet_jax.decode import schedule, spans
from magnet_jax.decode.spans import Spans


def test_schedule_follows_equation_6_and_anneals():
    config = DecodeConfig(steps=(5, 1, 2), temperature=3.0, max_guidance=10, min_guidance=1)
    first, second, third = schedule.make_schedule(config)
    rates = np.cos(np.pi / 2 * np.arange(5) / 4)
    np.testing.assert_allclose(first.rate[0], rates, atol=1e-7)
    np.testing.assert_allclose(first.guidance[0], rates * 10 + (1 - rates), rtol=1e-6)
    np.testing.assert_allclose(first.temperature, [[2.4, 1.8, 1.2, 0.6, 0.01]], rtol=1e-6)
    np.testing.assert_array_equal(second.stage, [[1]])
    np.testing.assert_array_equal(third.stage, [[2, 2]])
    np.testing.assert_array_equal(third.step, [[0, 1]])
    np.testing.assert_array_equal(third.number, [[7, 8]])


def test_as_many_spans_are_hidden_as_in_audiocraft():
    """Its formula, in PyTorch, at every step of 1 to 100 and for 1 to 1500 units."""
    units = torch.arange(1, 1501)
    for steps in range(1, 101):
        rate = torch.cos(torch.linspace(0, 1, steps) * math.pi * 0.5)
        expected = (rate[:, None] * units).int()
        found = schedule.hidden_rates(steps)
        np.testing.assert_allclose(found, rate, rtol=0, atol=1e-7)
        found = (found[:, None] * units.numpy().astype(np.float32)).astype(np.int32)
        np.testing.assert_array_equal(found, expected, err_msg=f"{steps} steps")


@pytest.mark.parametrize(
    ("arrangement", "span"), [("nonoverlap", 3), ("stride1", 3), ("stride1", 1)]
)
def test_every_number_of_the_schedule_is_audiocrafts(arrangement, span):
    """A codebook each of 1 to 100 steps: counts, guidance and temperature, whatever is given."""
    config = DecodeConfig(
        steps=tuple(range(1, 101)), max_guidance=10, min_guidance=1.5, temperature=3.5,
        span_arrangement=arrangement,
    )  # fmt: skip
    parts = schedule.make_schedule(config)
    assert len(parts) == 100
    law = Spans(length=span, arrangement=arrangement)
    count_spans = jax.jit(functools.partial(spans.count, law))
    for num_frames, num_given in ((156, 0), (750, 31)):
        free_1T = np.arange(num_frames)[None] >= num_given
        _, free_1, _ = spans.start(law, free_1T, np.ones(num_frames, bool))
        units = num_frames - num_given
        if arrangement == "nonoverlap":
            units = num_frames // span - num_given // span
        assert free_1 == units
        for part in parts:
            steps = part.step.size
            for step, time in enumerate(torch.linspace(0, 1, steps)):
                rate = torch.cos(time * math.pi * 0.5)
                count = max(int((rate * units).item()), 1)
                if arrangement == "stride1":
                    count = max(count, span)
                guidance = float(rate) * 10 + (1 - float(rate)) * 1.5
                temperature = max(3.5 * ((steps - 1 - step) / steps), 1e-2)
                assert count_spans(part.rate[0, step], free_1) == count, (steps, step, units)
                assert part.guidance[0, step] == pytest.approx(guidance, rel=1e-6)
                assert part.temperature[0, step] == np.float32(temperature)


def test_neighbouring_stages_of_as_many_steps_go_together():
    for steps, shapes in (
        ((20, 10, 10, 10), [(1, 20), (3, 10)]),
        ((10, 10, 10), [(1, 10), (2, 10)]),  # the first attends to everything, so it is apart
        ((4, 3, 2, 2), [(1, 4), (1, 3), (2, 2)]),
        ((7,), [(1, 7)]),
    ):
        parts = schedule.make_schedule(DecodeConfig(steps=steps))
        assert [part.stage.shape for part in parts] == shapes


def test_rows_without_text_are_needed_where_guidance_is():
    config = DecodeConfig(max_guidance=10, min_guidance=1)
    assert schedule.guided_steps(config, any_text=True) == "all_but_last"
    assert schedule.guided_steps(config, any_text=False) == "none"
    constant = DecodeConfig(max_guidance=3, min_guidance=3)
    assert schedule.guided_steps(constant, any_text=True) == "all"
    none = DecodeConfig(max_guidance=1, min_guidance=1)
    assert schedule.guided_steps(none, any_text=True) == "none"


def test_edits_have_fewer_steps_and_fewer_tokens_in_each():
    steps = (20, 10, 10, 10)
    assert schedule.steps_for(steps, [167] * 4, 167) == steps
    assert schedule.steps_for(steps, [34] * 4, 167) == (10, 5, 5, 5)  # two seconds of ten
    assert schedule.steps_for(steps, [1] * 4, 167) == (4, 4, 4, 4)
    assert schedule.steps_for(steps, [0, 0, 34, 167], 167) == (4, 4, 5, 10)
    assert schedule.steps_for((20, 1, 2, 3), [34] * 4, 167) == (10, 1, 2, 3)
    before = (0, 0)
    for free in range(1, 168):
        now = schedule.steps_for((60, 10), [free] * 2, 167)
        assert now >= before and free / now[0] <= 167 / 60
        before = now


def test_a_schedule_may_begin_at_a_later_codebook():
    config = DecodeConfig(steps=(20, 10, 10, 8))
    whole, later = schedule.make_schedule(config), schedule.make_schedule(config, 1)
    assert [part.stage.shape for part in later] == [(2, 10), (1, 8)]
    for found, expected in zip(later, whole[1:], strict=True):
        np.testing.assert_array_equal(found.number, expected.number - 20)
        for one, other in zip(found[:-1], expected[:-1]):
            np.testing.assert_array_equal(one, other)
