"""What is decoded: tokens, of which some are given and come out as they went in."""

from typing import Any, NamedTuple

import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.errors import UserError


class Canvas(NamedTuple):
    """Everything that is decoded is a case of this.

    A blank canvas is generation, one whose first frames are given a continuation, one with a hole
    an edit, and one with given codebooks another version of a clip.
    """

    codes_BKT: Any  # token ids; anything where none is given
    given_BKT: Any  # True where the token comes out as it went in


def blank(batch: int, num_codebooks: int, num_frames: int) -> Canvas:
    """A canvas of which nothing is given."""
    shape = (batch, num_codebooks, num_frames)
    return Canvas(np.zeros(shape, np.int32), np.zeros(shape, bool))


def beginning_with(prompt_BKP: np.ndarray, num_frames: int) -> Canvas:
    """A canvas whose first P frames are given.

    Raises `UserError` where that leaves nothing.
    """
    batch, num_codebooks, given = prompt_BKP.shape
    if given >= num_frames:
        raise UserError(
            f"a prompt of {given} frames leaves nothing to generate of {num_frames}: ask for more "
            "seconds, or give a shorter prompt"
        )
    canvas = blank(batch, num_codebooks, num_frames)
    canvas.codes_BKT[..., :given] = prompt_BKP
    canvas.given_BKT[..., :given] = True
    return canvas


def check(canvas: Canvas, batch: int, num_frames: int, model: ModelConfig) -> None:
    """Raises `UserError` for a canvas that does not fit the clips or the model."""
    codes_BKT, given_BKT = canvas
    shape = codes_BKT.shape[:2]
    if codes_BKT.shape != given_BKT.shape or shape != (batch, model.num_codebooks):
        raise UserError(
            f"given tokens {list(codes_BKT.shape)} and which of them are given "
            f"{list(given_BKT.shape)} must be [{batch} clips, {model.num_codebooks} codebooks, "
            "frames]"
        )
    if given_BKT.dtype != bool or not np.issubdtype(codes_BKT.dtype, np.integer):
        raise UserError(
            f"given tokens must be whole numbers, not {codes_BKT.dtype}, and which of them are "
            f"given bool, not {given_BKT.dtype}"
        )
    ids = codes_BKT[given_BKT]
    if ids.size and not 0 <= ids.min() <= ids.max() < model.codebook_size:
        raise UserError(
            f"given tokens must lie between 0 and {model.codebook_size - 1}, not {ids.min()} to "
            f"{ids.max()}"
        )
    if given_BKT[..., num_frames:].any():
        raise UserError(f"tokens are given beyond the clip, which has {num_frames} frames")


def resized(canvas: Canvas, num_frames: int) -> Canvas:
    """The canvas cut to so many frames, or with frames behind it of which nothing is given."""
    more = max(num_frames - canvas.codes_BKT.shape[-1], 0)
    return Canvas(*(np.pad(x[..., :num_frames], ((0, 0), (0, 0), (0, more))) for x in canvas))


def completed(canvas: Canvas, num_frames: int, span: int, mask_id: int) -> Canvas:
    """The canvas with the rest of its last span, up to `num_frames`, which will be cut off.

    It is free where a frame of that span is, and decoded with it. Where the span is given nothing
    is decoded behind it, and the mask id stands there.
    """
    rest = num_frames - canvas.codes_BKT.shape[-1]
    if not rest:
        return canvas
    given_BKR = canvas.given_BKT[..., rest - span :].all(-1, keepdims=True).repeat(rest, axis=-1)
    more = np.where(given_BKR, mask_id, 0), given_BKR
    return Canvas(*(np.concatenate([x, y], axis=-1) for x, y in zip(canvas, more)))


def free_units(canvas: Canvas, span: int) -> tuple[np.ndarray, int]:
    """How many spans of `span` frames are free of each clip's codebooks [B, K], and how many there
    are."""
    free_BKT = ~canvas.given_BKT
    free_BKT = np.pad(free_BKT, ((0, 0), (0, 0), (0, -free_BKT.shape[-1] % span)))
    free_BKU = free_BKT.reshape(*free_BKT.shape[:2], -1, span).any(-1)
    return free_BKU.sum(-1), free_BKU.shape[-1]


def extent(canvas: Canvas) -> tuple[np.ndarray, int]:
    """Where the free frames of codebooks above the first begin [B], and how many hold them all."""
    first_B, size_B = extents(~canvas.given_BKT[:, 1:].all(1))
    return first_B, int(size_B.max())


def extents(free_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first frame that is free, and how many there are from it to the last one; int32 [B]."""
    first_B, behind_B = free_BT.argmax(-1), free_BT[:, ::-1].argmax(-1)
    size_B = np.where(free_BT.any(-1), free_BT.shape[-1] - behind_B - first_B, 0)
    return first_B.astype(np.int32), size_B.astype(np.int32)


def given_below(canvas: Canvas) -> int:
    """How many codebooks, from the first one on, are given as a whole; all but the last at most."""
    given_K = canvas.given_BKT.all((0, 2))[:-1]
    return int(np.logical_and.accumulate(given_K).sum())
