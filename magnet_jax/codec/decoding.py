"""From tokens to audio, in JAX or in PyTorch."""

import functools

import jax
import numpy as np

from magnet_jax.codec import encodec, seanet
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.errors import UserError

# Frames whose samples are computed at once: all those of a clip would take most of the memory.
AUDIO_PIECE = 32
# Rows that the codec's LSTM is filled up to: with fewer than 8 a TPU multiplies in vector units.
LSTM_ROWS = {"cpu": 1, "gpu": 1, "tpu": 8}


def audio(
    params: dict,
    codes_BKT: jax.Array,
    length: jax.Array | None,
    *,
    config: SeanetConfig,
    platform: str,
) -> jax.Array:
    """`seanet.decode` as the platform likes it; [B, C, T * hop]."""
    run = functools.partial(
        seanet.decode, params, config=config, length=length, lstm_rows=LSTM_ROWS[platform],
        piece=AUDIO_PIECE,
    )  # fmt: skip
    if platform != "cpu":
        return run(codes_BKT)
    # A CPU gains nothing from batches, whose convolutions round otherwise than a clip's alone.
    return jax.lax.map(lambda codes_KT: run(codes_KT[None])[0], codes_BKT)


_decode = jax.jit(audio, static_argnames=("config", "platform"))


def decode_audio(decoder: encodec.Decoder | encodec.Codec, codes_BKT: np.ndarray) -> np.ndarray:
    """Audio [B, C, N] (float32) of tokens, a clip's the same whatever is decoded with it."""
    if isinstance(decoder, encodec.Decoder):
        encodec.check_codes(codes_BKT, decoder.spec)
        how = {"config": decoder.config, "platform": jax.default_backend()}
        return sound(np.asarray(_decode(decoder.params, codes_BKT, None, **how)))
    # One at a time: PyTorch's convolutions round differently in batches.
    return sound(np.concatenate([decoder.decode(codes_KT[None]) for codes_KT in codes_BKT]))


def sound(wav_BCN: np.ndarray) -> np.ndarray:
    """The audio; raises `UserError` where the codec's numbers overflowed."""
    if not np.isfinite(wav_BCN).all():
        raise UserError(
            "the codec computes NaN or infinity in place of audio, and no clip was made: its "
            "weights are damaged, or their training diverged"
        )
    return wav_BCN
