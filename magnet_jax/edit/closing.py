"""The sound of a loop, whose last sample leads to its first as any sample leads to the next.

The codec's LSTM has run around the ring when the round begins that is heard. What follows it sees
few frames to each side, and is given those of the ring. What comes after keeps the ring closed:
resampling by a Fourier transform, to which every signal is a period, and one gain for all samples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal

from magnet_jax.codec import decoding, encodec, seanet
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.edit import splice
from magnet_jax.io.audio import PEAK, measure_loudness

SETTLING = 1024  # frames of the ring that the LSTM has read before those that are heard
_RING = 128  # rings are filled up to multiples of so many frames: few shapes, few programs


def audio(decoder: encodec.Decoder, codes_BKT: np.ndarray) -> np.ndarray:
    """Audio [B, C, T * hop] (float32) of rings of tokens [B, K, T].

    A ring that begins elsewhere sounds the same, to the bit, and begins elsewhere. Each clip is
    decoded by itself, so that it is the same whatever is decoded with it.

    Raises:
      ValueError: codes that are not the codec's, or a codec that norms over the whole clip.
      UserError: the codec's numbers overflowed.
    """
    splice.reach_of(decoder.config)
    encodec.check_codes(codes_BKT, decoder.spec)
    return decoding.sound(np.stack([_of_ring(decoder, codes_KT) for codes_KT in codes_BKT]))


def _of_ring(decoder: encodec.Decoder, codes_KT: np.ndarray) -> np.ndarray:
    num_frames, hop = codes_KT.shape[1], decoder.config.hop
    first = _first(codes_KT)
    codes_KT = np.roll(codes_KT, -first, axis=1).astype(np.int32)
    wav_CN = _program(
        decoder.params,
        np.pad(codes_KT, ((0, 0), (0, -num_frames % _RING))),
        np.int32(num_frames),
        config=decoder.config,
        platform=jax.default_backend(),
    )
    return np.roll(np.asarray(wav_CN)[:, : num_frames * hop], first * hop, axis=1)


def _first(codes_KT: np.ndarray) -> int:
    """A frame of a ring that does not depend on where the ring is said to begin.

    The LSTM settles, but into which of several courses may depend on where it began.
    """
    content = np.ascontiguousarray(codes_KT.T).astype(">u4")
    size, count = content[0].nbytes, len(content)
    twice = content.tobytes() * 2
    return min(range(count), key=lambda frame: twice[frame * size : (frame + count) * size])


@functools.partial(jax.jit, static_argnames=("config", "platform"))
def _program(
    params: dict[str, Any],
    codes_KT: jax.Array,
    length: jax.Array,
    *,
    config: SeanetConfig,
    platform: str,
) -> jax.Array:
    """Audio [C, T * hop], of which that of the first `length` frames is the ring's."""
    num_frames, around = codes_KT.shape[-1], seanet.reach(config)
    # The convolution before the LSTM sees a few frames ahead, and is not to see an end.
    heard = jnp.arange(SETTLING + num_frames + config.kernel_size) - SETTLING
    x_BSC = seanet.features(
        params,
        codes_KT[None][..., heard % length],
        config=config,
        lstm_rows=decoding.LSTM_ROWS[platform],
    )
    place_S = (jnp.arange(num_frames + 2 * around) - around) % length
    wav_BCN = seanet.samples(
        params, x_BSC[:, SETTLING + place_S], config=config, piece=decoding.AUDIO_PIECE
    )
    first, count = around * config.hop, num_frames * config.hop
    return wav_BCN.reshape(-1, wav_BCN.shape[-1])[:, first : first + count]


def resampled(wav_CN: np.ndarray, count: int) -> np.ndarray:
    """A loop [C, N] as so many samples; float32. It is the same to the bit where they are as many.

    The Fourier transform takes a signal for a period, which of a loop is true.
    """
    if wav_CN.shape[-1] == count:
        return wav_CN
    resampled_CN = scipy.signal.resample(wav_CN.astype(np.float64), count, axis=-1)
    return resampled_CN.astype(np.float32)


def levelled(
    wav_CN: np.ndarray, sample_rate: int, target_lufs: float
) -> tuple[np.ndarray, float | None]:
    """A loop brought to a loudness by one gain, or as near to it as peaks of -1 dB let it come.

    Args:
      wav_CN: float32 [channels, samples].
      sample_rate: samples per second.
      target_lufs: wanted integrated loudness of the loop as it is played again and again.

    Returns:
      the audio and the loudness it has; None for silence, which stays as it is.
    """
    rounds = 1 + -(-sample_rate // wav_CN.shape[-1])  # at least a second, and over the seam
    before = measure_loudness(np.tile(wav_CN, rounds), sample_rate)
    if before is None:
        return wav_CN, None
    between_CN = scipy.signal.resample(wav_CN, 4 * wav_CN.shape[-1], axis=-1)
    peak = float(np.abs(between_CN).max())
    gain = min(10 ** ((target_lufs - before) / 20), float(PEAK) / peak)
    return wav_CN * np.float32(gain), before + 20 * float(np.log10(gain))
