"""What a clip begins with: tokens, of which some are given and come out as they went in."""

from typing import Any, NamedTuple

import numpy as np

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


def resized(canvas: Canvas, num_frames: int) -> Canvas:
    """The canvas cut to so many frames, or with frames behind it of which nothing is given."""
    more = max(num_frames - canvas.codes_BKT.shape[-1], 0)
    return Canvas(*(np.pad(x[..., :num_frames], ((0, 0), (0, 0), (0, more))) for x in canvas))
