"""Which tokens of a clip an edit makes anew: free_KT, True where a token may change.

A token of a codebook says what is left of the sound behind the codebooks below. Where one of these
changes, it means nothing any more. So whatever is free in a codebook is free in all above it.
"""

from collections.abc import Sequence

import numpy as np

from magnet_jax.errors import UserError


def upwards(free_KT: np.ndarray) -> np.ndarray:
    """What is free, and with it what lies above."""
    return np.logical_or.accumulate(free_KT, axis=-2)


def regions(
    ranges: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    codebooks: Sequence[int] | None = None,
) -> np.ndarray:
    """Ranges of frames [first, end) of some codebooks (None is all), of a clip [K, T]."""
    num_codebooks, num_frames = shape
    codebooks = range(num_codebooks) if codebooks is None else codebooks
    if not codebooks or not all(0 <= k < num_codebooks for k in codebooks):
        raise UserError(
            f"codebooks must be some of 0 to {num_codebooks - 1}, not {list(codebooks)}"
        )
    free_KT = np.zeros(shape, bool)
    for first, end in ranges:
        free_KT[list(codebooks), first:end] = True
    return upwards(free_KT)


def mask(given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask of one's own, [T] or [K, T], True where a token is to be made anew."""
    if given.dtype != bool or given.shape not in (shape, shape[1:]):
        raise UserError(
            f"mask must be bool [{shape[1]}] or [{shape[0]}, {shape[1]}], a value a frame of the "
            f"clip, not {given.dtype} {list(given.shape)}"
        )
    if not given.any():
        raise UserError("mask is True nowhere: there is nothing to make anew")
    return upwards(np.broadcast_to(given, shape))


# How a clip is sung anew: the strength from which on, codebooks of four that stay, and of the next
# one every which span stays; 0 is none.
_RESTYLINGS = ((0.0, 4, 0), (0.1, 3, 0), (0.3, 2, 0), (0.5, 1, 0), (0.7, 0, 2), (0.9, 0, 4))


def restyled(strength: float, shape: tuple[int, int], span: int, roll: int) -> np.ndarray:
    """What a strength from 0, nothing, to 1 frees of a clip for another style.

    Little strength keeps the lower codebooks, which have pitch and rhythm. More keeps every second
    or fourth span of the first alone, of which the others are found again.

    Args:
      strength: see above.
      shape: [K, T] of the clip.
      span: frames of a span, as the model was trained.
      roll: number of the first span that stays.
    """
    if strength >= 1:
        kept, period = 0, 8
    else:
        _, kept, period = [row for row in _RESTYLINGS if strength >= row[0]][-1]
        kept = -(-kept * shape[0] // 4)
    free_KT = np.zeros(shape, bool)
    free_KT[kept:] = True
    if period:
        free_KT[kept] = (np.arange(shape[1]) // span - roll) % period != 0
    return upwards(free_KT)


def worst(log_KT: np.ndarray, share: float, span: int, noise_KU: np.ndarray | float = 0.0):
    """The spans whose tokens are least likely, a share of them of each codebook.

    Args:
      log_KT: log-probabilities, in nats.
      share: from 0, none, to 1, all.
      span: frames of a span; the last one may be shorter.
      noise_KU: added to a span's mean before spans are ranked.
    """
    num_codebooks, num_frames = log_KT.shape
    starts = np.arange(0, num_frames, span)
    sums_KU = np.add.reduceat(log_KT, starts, axis=-1)
    mean_KU = sums_KU / np.diff([*starts, num_frames]) + noise_KU
    count = round(share * len(starts))
    rank_KU = mean_KU.argsort(-1).argsort(-1)
    return upwards(np.repeat(rank_KU < count, span, axis=-1)[:, :num_frames])
