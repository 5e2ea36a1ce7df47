"""Windows of one long canvas that are decoded together, each frame from all windows over it.

A network that hears so many frames at once is made one of a longer canvas: it is computed for
windows that overlap, as rows of a batch, and a frame's states are the weighted mean of those in the
windows over it. As heads are linear, that is the mean of their logits. (MultiDiffusion, arXiv
2302.08113, for models that mask.)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """N windows that cover a canvas; in frames."""

    size: int
    stride: int
    """By which they lie apart."""
    count: int

    @property
    def num_frames(self) -> int:
        """Of the canvas."""
        return self.size + (self.count - 1) * self.stride

    @property
    def starts_N(self) -> np.ndarray:
        return np.arange(self.count) * self.stride

    def over(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For the first window over each frame, the second, ...: its number, the frame's place in
        it and its weight, [T] each. The weights of a frame sum to 1: where it has fewer windows
        than others, the last of them counts once."""
        frame_T = np.arange(self.num_frames)
        last_T = np.minimum(frame_T // self.stride, self.count - 1)
        found, most = [], min(-(-self.size // self.stride), self.count)
        for back in range(most):
            number_T = np.maximum(last_T - back, 0)
            place_T = frame_T - number_T * self.stride
            there_T = (last_T >= back) & (place_T < self.size)
            weight_T = np.sin(np.pi * (place_T + 0.5) / self.size) ** 2
            found.append((number_T, np.minimum(place_T, self.size - 1), weight_T * there_T))
        total_T = sum(weight_T for *_, weight_T in found)
        return [(number_T, place_T, weight_T / total_T) for number_T, place_T, weight_T in found]


def joined(network: Any, windows: Windows) -> Any:
    """The `parallel.Network` of a whole canvas, whose rows are clips, from one of their windows."""
    frame_NW = windows.starts_N[:, None] + np.arange(windows.size)

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        codes_BNKW = jnp.moveaxis(codes_BKT[..., frame_NW], 2, 1)
        rows_RKW = codes_BNKW.reshape(-1, *codes_BNKW.shape[2:])
        states_RWD = network.trunk(rows_RKW, stage=stage, local=local, guided=guided, first_B=None)
        states_BSD = states_RWD.reshape(-1, windows.count * windows.size, states_RWD.shape[-1])
        mean_BTD = 0.0
        for number_T, place_T, weight_T in windows.over():
            there_BTD = jnp.take(states_BSD, number_T * windows.size + place_T, axis=1)
            weight_1T1 = jnp.asarray(weight_T, jnp.float32)[None, :, None]
            mean_BTD += there_BTD.astype(jnp.float32) * weight_1T1
        return mean_BTD.astype(states_RWD.dtype)

    return network._replace(trunk=trunk)
