"""A loop as a network hears it: a ring of frames, of which the last leads to the first.

A network hears frames in a line. Where it attends to near frames alone, it may do so around the
ring (`kernels.attend`). Otherwise it hears a window, in which the ring is repeated on both sides of
itself (LoopGen, arXiv 2504.04466, copies frames; here they are gathered by index). Either way the
line begins at another frame of the ring at each step, so that no place is always the seam.
"""

import dataclasses

import jax
import jax.numpy as jnp

# The golden section in 2^16 parts: of its multiples, the next lies far from those before it.
_SECTION, _PARTS = 40_503, 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """How a ring is heard, as far as a program is made for it."""

    window: int
    """Frames that are heard where the ring is repeated; at least those of the ring."""
    around: tuple[bool, bool]
    """Whether attention goes around the ring itself, at the first codebook and at the others."""


def view(
    ring: Ring, num_frames: int, length: jax.Array | int, number: jax.Array | int, *, around: bool
) -> tuple[jax.Array, jax.Array]:
    """What is heard at a step: which frame of the ring at each place, and where each frame is.

    Args:
      ring: how the ring is heard.
      num_frames: T of the arrays that hold the ring.
      length: frames of the ring itself, at most T.
      number: of the step.
      around: whether attention goes around the ring, and nothing need be repeated.

    Returns:
      place_W, a frame for each of W places, and home_T, the place nearest to the window's middle
      of each frame.
    """
    size = num_frames if around else ring.window
    lead = 0 if around else (size - length) // 2
    begin = number * _SECTION % _PARTS * length // _PARTS
    place_W = (jnp.arange(size) - lead + begin) % length
    home_T = lead + (jnp.arange(num_frames) - begin) % length
    return place_W, home_T
