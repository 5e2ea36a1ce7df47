"""What every step of parallel decoding does, computed before the program runs (section 3.3)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from magnet_jax.config import DecodeConfig

GuidedSteps = Literal["all", "all_but_last", "none"]
MIN_TEMPERATURE = 1e-2
LEAST_STEPS = 4  # of a codebook of an edit


class Schedule(NamedTuple):
    """The steps of neighbouring codebooks that have as many of them; arrays [stages, steps]."""

    stage: np.ndarray  # codebook
    step: np.ndarray  # number of the step within its codebook
    rate: np.ndarray  # share of what is free that is hidden
    guidance: np.ndarray  # coefficient of equation 6
    temperature: np.ndarray
    number: np.ndarray  # of the step in the whole schedule, from 1


def hidden_rates(steps: int) -> np.ndarray:
    """The share of a codebook's units that each of its steps hides, float32 [steps].

    This is cos(t * pi * 0.5) over linspace(0, 1, steps) as PyTorch rounds it. Rates times units
    are cut to whole numbers, and at 60 degrees the last bit decides on which side of 1/2 they fall.
    Up to 100 steps and 1500 units the counts are PyTorch's, all of them; beyond, a few differ by 1.
    """
    if steps == 1:
        return np.ones(1, np.float32)
    step, gap = np.arange(steps), float(np.float32(1) / np.float32(steps - 1))
    # linspace counts its first half from 0, its second half back from 1, by fused multiply-add.
    fraction = np.where(step < steps // 2, gap * step, 1 - gap * (steps - 1 - step))
    angle = fraction.astype(np.float32) * np.float32(np.pi) * np.float32(0.5)
    # The polynomial by which PyTorch computes a cosine as a sine.
    x = np.pi / 2 - angle.astype(np.float64)
    odd = 0.0
    for factor in (
        2.6083159809786594e-6,
        -1.9810690719168633e-4,
        8.333078585565090e-3,
        -0.16666659712791443,
    ):
        odd = (odd + factor) * x * x
    return (x + x * odd).astype(np.float32)


def make_schedule(config: DecodeConfig, first: int = 0) -> tuple[Schedule, ...]:
    """The steps of the first codebook, then those of the others; from codebook `first` on.

    Other codebooks that follow each other and have as many steps are together. Nothing here depends
    on a clip's length or on what is given of it: how many units a rate hides is counted where the
    program runs.
    """
    groups: list[list[list[tuple]]] = []
    number = 0
    for stage, steps in enumerate(config.steps):
        if stage < first:
            continue
        rows = []
        for step, rate in enumerate(hidden_rates(steps)):
            share = float(rate)
            temperature = config.temperature
            if config.anneal_temperature:
                temperature *= (steps - 1 - step) / steps
            number += 1
            guidance = share * config.max_guidance + (1 - share) * config.min_guidance
            rows.append((stage, step, rate, guidance, max(temperature, MIN_TEMPERATURE), number))
        if stage > 1 and groups and len(groups[-1][0]) == steps:
            groups[-1].append(rows)
        else:
            groups.append([rows])
    types = (np.int32, np.int32, np.float32, np.float32, np.float32, np.int32)
    return tuple(
        Schedule(*(np.array(group)[..., i].astype(type_) for i, type_ in enumerate(types)))
        for group in groups
    )


def of_clips(schedules: Sequence[tuple[Schedule, ...]]) -> tuple[Schedule, ...]:
    """One schedule of clips that have their own guidance and temperature, [stages, steps, B, 1, 1].

    They have as many steps.
    """

    def stack(parts: Sequence[Schedule], name: str) -> np.ndarray:
        return np.stack([getattr(part, name) for part in parts], -1)[..., None, None]

    names = ("guidance", "temperature")
    return tuple(
        parts[0]._replace(**{name: stack(parts, name) for name in names})
        for parts in zip(*schedules, strict=True)
    )


def steps_for(steps: tuple[int, ...], free_K: Sequence[int], num_units: int) -> tuple[int, ...]:
    """Steps of each codebook where `free_K` of its `num_units` are to be decoded.

    They fall with the root of the share: an edit gets fewer steps than a whole clip, and fewer
    tokens a step as well. There are at least four, where the clip has as many.
    """
    shares = [math.sqrt(min(free / num_units, 1)) for free in free_K]
    return tuple(
        max(min(math.ceil(count * share), count), min(count, LEAST_STEPS))
        for count, share in zip(steps, shares, strict=True)
    )


def guided_steps(config: DecodeConfig, any_text: bool) -> GuidedSteps:
    """Which steps need the rows without text.

    Their logits do not count where the coefficient is 1, and are the same as those with text where
    no row has any.
    """
    if not any_text or config.min_guidance == config.max_guidance == 1:
        return "none"
    return "all_but_last" if config.min_guidance == 1 else "all"
