"""Autoregressive decoding: one step after another, as MusicGen does and a hybrid begins.

The network is MAGNeT's under causal attention, its codebooks in the delay pattern (patterns.py;
Copet et al. 2023, arXiv 2306.05284). Every step reads and predicts all codebooks at once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.config import ModelConfig
from magnet_jax.decode.choose import Choice, choose_token, guide
from magnet_jax.model import patterns, transformer

UNKNOWN = -1  # stands where a code is still to be generated


class Sampling(NamedTuple):
    """Numbers of the sampling that a program takes as they come."""

    temperature: jax.Array | float
    limit: jax.Array | float  # see `choose.choose_token`
    guidance: jax.Array | float  # coefficient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a clip begins one step after another, as far as a program is made for it."""

    num_given: int
    """Frames that are given."""
    num_frames: int
    """Frames made one step after another, the given ones included; 0 is none."""
    whole: bool
    """Whether that is the whole clip."""
    choice: Choice
    guided: bool
    """Whether the beginning itself needs rows without text."""
    apart: bool = False
    """Whether the layers are written out, see `Transformer.layers_apart`."""

    def num_steps(self, delays: tuple[int, ...]) -> int:
        """Steps of the beginning, the empty first one included, until all codebooks are so far."""
        return patterns.num_steps(self.num_frames, delays) if self.num_frames else 1

    @property
    def num_known_steps(self) -> int:
        """Steps of which nothing is unknown, the first one included."""
        return 1 + self.num_given if self.num_frames else 1

    def of_codebooks(self, delays: tuple[int, ...], most: int) -> tuple[int, ...]:
        """Frames of each codebook in the beginning, of which there are `most` at most."""
        steps = self.num_steps(delays)
        return tuple(min(max(steps - 1 - delay, 0), most) for delay in delays)


def advance(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    keys_B: jax.Array,
    steps_BKS: jax.Array,
    sampling: Sampling,
    *,
    beginning: Beginning,
    guided: bool,
    origin_B: jax.Array | None = None,
    on_step: Callable[[jax.Array], None] | None = None,
) -> tuple[jax.Array, transformer.Cache]:
    """Fills in what is `UNKNOWN` in steps [B, K, S], one step after another. To be traced.

    Args:
      text: of the B rows and, if `guided` and no text is something to the model, of as many
        without.
      steps_BKS: from `patterns.to_steps`.
      guided: whether rows without text are computed as well; without, guidance is 1.
      origin_B: see `parallel.Task`.
      on_step: called with the number of steps done while the program runs.

    Returns the steps, and a cache of all but the last of them, of B rows and, if guided, of as many
    without text. Unless the beginning is the whole clip, it has room for the last one.
    """
    batch, _, num_steps = steps_BKS.shape
    num_given, dtype = beginning.num_known_steps, text.key_LBSNH.dtype

    def rows(codes_BKC):  # with their text and, after them, the same without
        return jnp.concatenate([codes_BKC, codes_BKC]) if guided else codes_BKC

    model = transformer.bind(config, params)
    room = num_steps - 1 + (not beginning.whole)
    cache = model.empty_cache(rows(steps_BKS).shape[0], room, dtype)
    if num_given > 1:
        _, cache = model.extend(rows(steps_BKS[..., : num_given - 1]), text, cache, 0)

    layers = model.layers_apart(text) if beginning.apart else None

    def predict(carry, step):
        """Predicts step `step` from the one before it, which is complete by then."""
        steps_BKS, cache = carry
        before_BK1 = jax.lax.dynamic_slice_in_dim(steps_BKS, step - 1, 1, axis=-1)
        model = transformer.bind(config, params)
        states_R1D, cache = model.extend(rows(before_BK1), text, cache, step - 1, layers)
        logits_BKV = model.all_heads(states_R1D)[:, :, 0]
        if guided:
            logits_BKV = guide(*jnp.split(logits_BKV, 2), sampling.guidance)
        drawn_B = jnp.broadcast_to(step, keys_B.shape) if origin_B is None else step + origin_B
        keys = jax.vmap(jax.random.fold_in)(keys_B, drawn_B)
        probs_BKV = jax.nn.softmax(logits_BKV / sampling.temperature, axis=-1)
        token_BK = choose_token(keys, probs_BKV, beginning.choice, sampling.limit)
        given_BK = jax.lax.dynamic_index_in_dim(steps_BKS, step, axis=-1, keepdims=False)
        token_BK = jnp.where(given_BK == UNKNOWN, token_BK, given_BK)
        steps_BKS = jax.lax.dynamic_update_index_in_dim(steps_BKS, token_BK, step, axis=-1)
        if on_step is not None:
            on_step(step - num_given + 1)
        return (steps_BKS, cache), None

    carry, _ = jax.lax.scan(predict, (steps_BKS, cache), jnp.arange(num_given, num_steps))
    return carry
