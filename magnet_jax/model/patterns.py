"""The codebook delay pattern: how an autoregressive model reads K codebooks a step (MusicGen).

Codebook k lags delays[k] frames behind. Step 0 holds nothing; step s holds the code of frame
s - 1 - delays[k] of each codebook k, where there is such a frame (Copet et al. 2023, arXiv
2306.05284, section 2.2). All index arithmetic is static: it costs nothing at run time.
"""

import jax
import jax.numpy as jnp
import numpy as np


def num_steps(num_frames: int, delays: tuple[int, ...]) -> int:
    """Steps that hold all codes of all frames, the empty first one included."""
    return 1 + num_frames + max(delays)


def to_steps(
    codes_BKT: jax.Array, delays: tuple[int, ...], empty: int, steps: int | None = None
) -> jax.Array:
    """The steps [B, K, S] of codes [B, K, T], `empty` where a step lacks a codebook.

    `steps` is S; None is all of them.
    """
    num_frames = codes_BKT.shape[-1]
    steps = num_steps(num_frames, delays) if steps is None else steps
    frame_KS = np.arange(steps)[None, :] - 1 - np.asarray(delays)[:, None]
    exists_KS = (frame_KS >= 0) & (frame_KS < num_frames)
    codebook_K1 = np.arange(len(delays))[:, None]
    codes_BKS = codes_BKT[:, codebook_K1, frame_KS.clip(0, num_frames - 1)]
    return jnp.where(exists_KS[None], codes_BKS, empty)


def to_frames(
    array_BKS: jax.Array, delays: tuple[int, ...], num_frames: int, first: int
) -> tuple[jax.Array, np.ndarray]:
    """Brings what stands at steps, [B, K, S, ...], back to frames: the inverse of `to_steps`.

    Frame 0 of an undelayed codebook stands at step `first`: 1 for codes; 0 for what the network
    returns, which at each step predicts the next.

    Returns [B, K, T, ...], and the frames [K, T] that there was a step for; elsewhere the array
    holds some other frame's values.
    """
    step_KT = np.arange(num_frames)[None, :] + first + np.asarray(delays)[:, None]
    valid_KT = step_KT < array_BKS.shape[2]
    codebook_K1 = np.arange(len(delays))[:, None]
    return array_BKS[:, codebook_K1, step_KT.clip(max=array_BKS.shape[2] - 1)], valid_KT
