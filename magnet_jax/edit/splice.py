"""What a codec's decoder makes of edited tokens, so that all other samples stay as they were.

The LSTM of an EnCodec goes forwards in time and does not forget: tokens that change alter every
sample after them, by less and less. So its output is spliced. Up to a few frames after the region
it is what the edited tokens give, beyond it is what the original ones give. What follows the LSTM
sees few frames to each side, and so do the samples that change.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.codec import decoding, encodec, seanet
from magnet_jax.convert.codec_rules import SeanetConfig

GUARD = 5  # frames after a region in which the LSTM is still that of the edited tokens
SETTLING = 5  # frames between two regions in which the original is heard, or they are one
# Clips and the windows in which samples change are filled up to multiples of so many frames, which
# keeps the number of compiled programs small.
_CLIP, _WINDOW = 128, 32


class Piece(NamedTuple):
    """Samples that take the place of others."""

    first_sample: int
    wav_CN: np.ndarray  # float32, at the codec's rate


class Reach(NamedTuple):
    """How far samples change around tokens that do, in frames."""

    before: int
    after: int  # of what follows the LSTM alone, to be added to the guard


def reach_of(config: SeanetConfig) -> Reach:
    """How far before a token that changes, and how far after the guard, samples may change.

    Raises `ValueError` for codecs that norm over the whole clip, of which no edit is exact.
    """
    if config.norm_type == "time_group_norm":
        raise ValueError("the codec norms over the whole clip: no exact edits")
    around = seanet.reach(config)
    # A transposed convolution that is trimmed on its right alone does not look ahead either.
    cut = [math.ceil(r * config.trim_right_ratio) == r for r in config.upsampling_ratios]
    if config.use_causal_conv and all(cut):
        return Reach(0, around)
    ahead = 0 if config.use_causal_conv else (config.kernel_size - 1) // 2
    return Reach(around + ahead, around)


def spliced(
    decoder: encodec.Decoder,
    original_KT: np.ndarray,
    edited_KT: np.ndarray,
    regions: Sequence[tuple[int, int]],
    guard: int = GUARD,
) -> list[Piece]:
    """The samples to be pasted over what the original tokens sound like; sorted, none overlap.

    Regions that lie near each other become one. Where no token of a region differs there is no
    piece.

    Args:
      decoder: of the codec.
      original_KT: tokens of the clip.
      edited_KT: the tokens wanted. There may be more of them, where a clip is drawn out: then the
        one region begins with the clip, or ends with it, and holds all frames that are new. Places
        of samples are those in the longer clip.
      regions: frames [first, end) of the edited clip, outside which no token differs.
      guard: frames after a region in which the LSTM follows the edited tokens; the more, the
        smaller the step between both.

    Raises:
      ValueError: tokens differ outside the regions, codes or regions that are none, or a codec
        that norms over the whole clip.
    """
    reach = reach_of(decoder.config)
    for codes_KT in (original_KT, edited_KT):
        encodec.check_codes(codes_KT[None], decoder.spec)
    frames, offset = edited_KT.shape[1], 0
    joined = _joined(regions, frames, guard + reach.after + reach.before + SETTLING)
    if original_KT.shape[1] != frames:
        offset = _offset(original_KT.shape[1], frames, joined)
    elif joined:
        outside_T = np.ones(frames, bool)
        for start, end in joined:
            outside_T[start:end] = False
        if np.any(original_KT[:, outside_T] != edited_KT[:, outside_T]):
            raise ValueError("tokens differ outside the regions")
    pieces = []
    for start, end in joined:
        row_KT = edited_KT
        if original_KT.shape[1] == frames:
            row_KT = original_KT.copy()
            row_KT[:, start:end] = edited_KT[:, start:end]
            if np.array_equal(row_KT, original_KT):
                continue
        first = max(0, start - reach.before)
        last = min(frames, end + guard + reach.after)
        wav_CN = _render(decoder, original_KT, row_KT, offset, end + guard, (first, last))
        pieces.append(Piece(first * decoder.config.hop, wav_CN))
    return pieces


def put(wav_CN: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
    """A copy of audio with pieces pasted over it."""
    wav_CN = wav_CN.copy()
    for first, piece_CN in pieces:
        wav_CN[:, first : first + piece_CN.shape[1]] = piece_CN
    return wav_CN


def _joined(regions: Sequence[tuple[int, int]], frames: int, nearest: int) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(regions):
        if not 0 <= start < end <= frames:
            raise ValueError(f"region [{start}, {end}): expected frames within [0, {frames})")
        if joined and start - joined[-1][1] < nearest:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _offset(before: int, after: int, regions: list[tuple[int, int]]) -> int:
    """Where the original begins in a longer clip."""
    if before < after and len(regions) == 1:
        start, end = regions[0]
        if end == after and start <= before:
            return 0
        if start == 0 and end >= after - before:
            return after - before
    raise ValueError(
        f"{before} frames became {after}: one region must hold those that are new, at one end"
    )


def _render(
    decoder: encodec.Decoder,
    original_KT: np.ndarray,
    edited_KT: np.ndarray,
    offset: int,
    until: int,
    changed: tuple[int, int],
) -> np.ndarray:
    """Samples of the frames that change; the edited tokens' LSTM holds until a frame."""
    around, hop = seanet.reach(decoder.config), decoder.config.hop
    frames = edited_KT.shape[1]
    total = -(-frames // _CLIP) * _CLIP
    first, last = changed
    window = min(total, -(-(last - first + 2 * around) // _WINDOW) * _WINDOW)
    begin = min(max(0, first - around), total - window)
    rows = [
        np.pad(codes, ((0, 0), (0, total - codes.shape[1]))) for codes in (original_KT, edited_KT)
    ]
    wav_CN = _program(
        decoder.params,
        *(row_KT.astype(np.int32) for row_KT in rows),
        np.array([original_KT.shape[1], frames, offset, until, begin], np.int32),
        config=decoder.config,
        window=window,
        platform=jax.default_backend(),
    )
    wav_CN = np.asarray(wav_CN)[:, (first - begin) * hop : (last - begin) * hop]
    return decoding.sound(wav_CN)


@functools.partial(jax.jit, static_argnames=("config", "window", "platform"))
def _program(
    params: dict[str, Any],
    original_KT: jax.Array,
    edited_KT: jax.Array,
    places: jax.Array,
    *,
    config: SeanetConfig,
    window: int,
    platform: str,
) -> jax.Array:
    """Audio [C, window * hop] from a frame on; the places are those that `_render` gives."""
    length, edited_length, offset, until, begin = places
    run = functools.partial(
        seanet.features, params, config=config, lstm_rows=decoding.LSTM_ROWS[platform]
    )
    original_BTC = jnp.roll(run(original_KT[None], length=length), offset, axis=1)
    edited_BTC = run(edited_KT[None], length=edited_length)
    is_edited_T = jnp.arange(edited_KT.shape[1]) < until
    x_BTC = jnp.where(is_edited_T[None, :, None], edited_BTC, original_BTC)
    x_BTC = jax.lax.dynamic_slice_in_dim(x_BTC, begin, window, axis=1)
    wav_BCN = seanet.samples(params, x_BTC, config=config, length=edited_length - begin)
    return wav_BCN.reshape(-1, wav_BCN.shape[-1])
