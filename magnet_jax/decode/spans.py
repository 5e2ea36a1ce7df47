"""The units that are hidden and judged together: spans on a grid, or frames whose spans overlap.

On a grid ('nonoverlap') a unit is a span of neighbouring frames. In 'stride1' it is a frame, and
spans start at every frame. Scores say how unsure a unit is; the worst are hidden again.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

Order = Literal["confidence", "random", "halton"]
KEPT = -1e4  # score of a unit that must not be hidden again
ORDER_KEY = 2**31 - 1  # no step has this number, by which its random numbers are made
ABSENT = -1e9  # the same past the end of the clip: behind whatever is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """How frames are hidden and scored together; see `DecodeConfig`."""

    length: int
    """Frames of a span."""
    arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    score: Literal["max", "prod"] = "max"
    stretch: int | None = None
    """Frames of a stretch of the clip; in each the worst units are hidden, as large a share of it.
    None is the whole clip."""

    @property
    def on_grid(self) -> bool:
        return self.arrangement == "nonoverlap"

    @property
    def by_surest(self) -> bool:
        """Whether the surest frame of a unit decides; single frames are scored alike by both."""
        return self.on_grid and self.score == "max" and self.length > 1

    @property
    def no_say(self) -> float:
        """The probability of a frame that does not count in the score of its unit."""
        return 0.0 if self.by_surest else 1.0


def units(spans: Spans, frames_BT: jax.Array) -> jax.Array:
    """The frames of each unit, [B, T] -> [B, U, frames of a unit]."""
    return frames_BT.reshape(len(frames_BT), -1, spans.length if spans.on_grid else 1)


def stretches(spans: Spans, unit_BU: jax.Array, fill: float) -> jax.Array:
    """The units of each stretch, [B, U] -> [B, G, units of a stretch], the last filled up."""
    size = unit_BU.shape[-1]
    if spans.stretch is not None:
        size = spans.stretch // (spans.length if spans.on_grid else 1)
    more = -unit_BU.shape[-1] % size
    filled_BU = jnp.pad(unit_BU, ((0, 0), (0, more)), constant_values=fill)
    return filled_BU.reshape(len(unit_BU), -1, size)


def start(
    spans: Spans, free_BT: jax.Array, exists_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores [B, U] before a codebook's first step, how many units of each stretch are free [B, G],
    and how many exist.

    A unit is free if one of its frames is. One that is given as a whole stays as it is.
    """
    free_BU = units(spans, free_BT & exists_T[None]).any(-1)
    exists_1U = units(spans, exists_T[None]).all(-1)
    score_BU = jnp.where(exists_1U, jnp.where(free_BU, 0.0, KEPT), ABSENT)
    return score_BU, stretches(spans, free_BU, False).sum(-1), exists_1U.sum()


def count(spans: Spans, rate: jax.Array, free_BG: jax.Array) -> jax.Array:
    """How many units [B, G] to hide on a grid, or how many frames: the reference's rounding."""
    least = 1 if spans.on_grid else spans.length
    return jnp.maximum((rate * free_BG.astype(jnp.float32)).astype(jnp.int32), least)


def hide(spans: Spans, score_BU: jax.Array, count_BG: jax.Array) -> jax.Array:
    """True at the units that are hidden: the worst of each stretch, `count_BG` of them. [B, U]."""
    score_BGU = stretches(spans, score_BU, ABSENT)
    score_RU, count_R = score_BGU.reshape(-1, score_BGU.shape[-1]), count_BG.reshape(-1)
    if spans.on_grid:
        rank_RU = jnp.argsort(jnp.argsort(-score_RU, axis=-1), axis=-1)
        hidden_RU = rank_RU < count_R[:, None]
    else:
        hidden_RU = hide_overlapping(score_RU, count_R, spans.length)
    return hidden_RU.reshape(len(score_BU), -1)[:, : score_BU.shape[-1]]


def hide_overlapping(score_BT: jax.Array, count_B: jax.Array, span_length: int) -> jax.Array:
    """True at about `count_B` frames: those under the worst spans of any neighbouring frames.

    The `stride1` arrangement of the reference. Spans start at every frame and overlap; how many
    of them hide the wanted number of frames depends on how they lie, and is searched by the
    reference's bisection, here a fixed number of rounds for all rows at once. Which bound is
    taken where, and that the last count tried is used, decides single frames: it is the
    reference's law.
    """
    num_frames = score_BT.shape[-1]
    num_starts = num_frames - span_length + 1
    span_BS = sum(score_BT[:, i : i + num_starts] for i in range(span_length))
    rank_BS = jnp.argsort(jnp.argsort(-span_BS, axis=-1), axis=-1)
    # A frame is hidden by u spans if the worst span over it is among the first u.
    padded = jnp.pad(
        rank_BS, ((0, 0), (span_length - 1, span_length - 1)), constant_values=num_frames
    )
    worst_BT = functools.reduce(
        jnp.minimum, (padded[:, i : i + num_frames] for i in range(span_length))
    )

    def middle(low, high):  # halves are rounded to even
        half = (low + high) // 2
        return half + ((low + high) % 2) * (half % 2)

    def halve(_, bounds):
        low, high, used = bounds
        tried = middle(low, high)
        active = (low < tried) & (tried < high)
        too_many = (worst_BT < tried[:, None]).sum(-1) > count_B
        return (
            jnp.where(active & ~too_many, tried, low),
            jnp.where(active & too_many, tried, high),
            jnp.where(active, tried, used),
        )

    low, high = count_B // span_length, count_B - span_length + 1
    rounds = num_frames.bit_length() + 1
    *_, used = jax.lax.fori_loop(0, rounds, halve, (low, high, middle(low, high)))
    return worst_BT < used[:, None]


def frames(spans: Spans, unit_BU: jax.Array) -> jax.Array:
    """What is said of units, said of their frames: [B, U] -> [B, T]."""
    return jnp.repeat(unit_BU, spans.length, axis=-1) if spans.on_grid else unit_BU


def measure(spans: Spans, prob_BT: jax.Array) -> jax.Array:
    """How unsure each unit is [B, U], from the probabilities of its tokens."""
    if spans.by_surest:
        return 1 - units(spans, prob_BT).max(-1)
    return units(spans, -jnp.log(jnp.maximum(prob_BT, 1e-30))).sum(-1)


def priority(order: Order, keys_B: jax.Array, stage: jax.Array, num_units: int) -> jax.Array:
    """Scores in [0, 1) that decide by themselves which units are kept first, [B, U] or [1, U].

    'random' is another order for each sample and codebook. 'halton' is van der Corput's sequence:
    each unit that is kept next lies far from those that are kept already.
    """
    if order == "random":
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, stage)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, ORDER_KEY)
        return jax.vmap(lambda key: jax.random.uniform(key, (num_units,)))(keys_B)
    unit_U, bits = jnp.arange(num_units), max(num_units - 1, 1).bit_length()
    return sum((unit_U >> i & 1) * 2.0 ** -(i + 1) for i in range(bits))[None]
