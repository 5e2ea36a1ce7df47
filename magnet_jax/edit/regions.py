"""Regions of clips: from what people write, in seconds, to frames whose tokens are made anew."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from magnet_jax.edit.splice import GUARD, Reach
from magnet_jax.errors import UserError

Edge = Literal["outside", "inside"]
Region = tuple[float, float | None]  # begin and end in seconds; None is the clip's end

LEAST_FRAMES = 3  # that an edit regenerates: a span


def of_each(regions: Any, count: int) -> list[list[Region]]:
    """Regions of each of some clips, from those of all, or from a list for each."""

    def seconds(one: Any) -> list[Region]:
        return [(float(a), None if b is None else float(b)) for a, b in one]

    try:
        each = [seconds(regions)] * count
    except (TypeError, ValueError):
        try:
            each = [seconds(one) for one in regions]
        except (TypeError, ValueError):
            raise UserError(
                "regions must be (begin, end) in seconds, such as [(2, 4.5), (7, None)], or a list "
                "of them for each clip"
            ) from None
    if len(each) != count:
        raise UserError(f"{count} clips need as many lists of regions, not {len(each)}")
    return each


def joined(regions: Sequence[Region], seconds: float) -> list[tuple[float, float]]:
    """Regions of a clip in order, those that overlap or touch as one.

    Raises `UserError` for a region that is not within the clip, which is so many seconds long.
    """
    found: list[tuple[float, float]] = []
    for begin, end in sorted((begin, seconds if end is None else end) for begin, end in regions):
        name = f"region {begin:g}:{end:g}"
        if not 0 <= begin <= seconds or not end <= seconds + 1e-6:
            raise UserError(
                f"{name}: the clip is {seconds:g} s long, and its region must lie within; to make "
                "it longer, use extend"
            )
        if not begin < end:
            raise UserError(f"{name}: must end after it begins")
        if found and begin <= found[-1][1] + 1e-6:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def frames_of(
    region: tuple[float, float],
    *,
    seconds: float,
    frame_rate: float,
    num_frames: int,
    edge: Edge,
    reach: Reach,
    guard: int = GUARD,
    least: int = LEAST_FRAMES,
) -> tuple[int, int]:
    """Frames [first, end) whose tokens are regenerated for a region of `joined`.

    Args:
      region: its begin and end in seconds.
      seconds: length of the clip, which may end within its last frame.
      frame_rate: of the codec.
      num_frames: of the clip.
      edge: 'outside' makes all of the region new, and a little around it changes as well; 'inside'
        changes no sample outside the region, and regenerates less than all of it.
      reach: of the codec, see `splice.reach_of`.
      guard: frames, as `splice.spliced` takes it.
      least: frames without which there is nothing to regenerate.

    Raises:
      UserError: a region that is too short.
    """
    begin, end = region
    first, last = _floor(begin * frame_rate), min(_ceil(end * frame_rate), num_frames)
    is_to_end = end >= seconds - 1e-6
    if is_to_end:
        last = num_frames
    if edge == "inside":
        if begin > 0:
            first = _ceil(begin * frame_rate) + reach.before
        if not is_to_end:
            last = _floor(end * frame_rate) - guard - reach.after
        if last - first < least:
            needed = (reach.before + guard + reach.after + least + 1) / frame_rate
            raise UserError(
                f"region {begin:g}:{end:g}: too short for edge='inside', which needs up to "
                f"{needed:.2g} s; use edge='outside'"
            )
    return first, last


def _floor(frames: float) -> int:
    return math.floor(frames + 1e-6)


def _ceil(frames: float) -> int:
    return math.ceil(frames - 1e-6)


def where(differs_T: np.ndarray) -> list[tuple[int, int]]:
    """Where neighbouring frames are True: [first, end)."""
    edges = np.flatnonzero(np.diff(np.r_[False, differs_T, False]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
