"""A loop's sound goes on from its last sample to its first as it goes on everywhere."""

import numpy as np
import pytest

from magnet_jax.codec import decoding
from magnet_jax.edit import closing

FRAMES = 50


def random_codes(decoder, frames=FRAMES, batch=1):
    spec = decoder.spec
    shape = (batch, spec.num_codebooks, frames)
    return np.random.default_rng(0).integers(0, spec.codebook_size, shape).astype(np.int32)


@pytest.mark.parametrize("kind", ["embedded", "interleaved", "causal", "constant", "replicate"])
def test_a_loop_is_a_round_of_the_ring_played_for_ever(load, kind):
    decoder = load(kind)
    codes_BKT = random_codes(decoder)
    wav_BCN = closing.audio(decoder, codes_BKT)
    count, hop = wav_BCN.shape[-1], decoder.config.hop
    assert count == FRAMES * hop and wav_BCN.dtype == np.float32
    rounds = -(-(closing.SETTLING + 2 * FRAMES) // FRAMES)
    forever_BCN = decoding.decode_audio(decoder, np.tile(codes_BKT, rounds))
    last_BCN = forever_BCN[..., -2 * count : -count]
    scale = np.abs(last_BCN).max()
    # (into which of several courses the LSTM settles, may depend on where it begins)
    np.testing.assert_allclose(wav_BCN, last_BCN, atol=0.02 * scale)
    steps = np.abs(np.diff(np.tile(wav_BCN, 2), 2)[..., :])
    assert steps[..., count - 2 : count].max() <= 1.5 * np.quantile(steps[..., : count - 2], 0.999)


@pytest.mark.parametrize("kind", ["embedded", "causal"])
def test_a_ring_that_is_turned_sounds_the_same(load, kind):
    decoder = load(kind)
    codes_BKT, hop = random_codes(decoder, batch=2), decoder.config.hop
    codes_BKT[1, :, 25:] = codes_BKT[1, :, :25]  # twice the same, whose turns cannot be told apart
    wav_BCN = closing.audio(decoder, codes_BKT)
    for turned in (1, 17, 49):
        turned_BCN = closing.audio(decoder, np.roll(codes_BKT, turned, axis=-1))
        found_BCN = np.roll(turned_BCN, -turned * hop, axis=-1)
        np.testing.assert_allclose(found_BCN, wav_BCN, atol=1e-4)
    alone_BCN = closing.audio(decoder, codes_BKT[1:])
    np.testing.assert_array_equal(alone_BCN, wav_BCN[1:])


def test_codecs_that_norm_over_the_clip_are_refused(load):
    decoder = load("like_48khz")
    with pytest.raises(ValueError, match="norms over the whole clip"):
        closing.audio(decoder, random_codes(decoder))


@pytest.mark.parametrize("count", [3999, 4000, 4011])
def test_a_period_stays_one(count):
    """Resampled sines of whole periods are sines, to -80 dB, at the seam as well."""
    wave = lambda n: np.stack([np.sin(2 * np.pi * k * np.arange(n) / n) for k in (3, 400)])  # noqa: E731
    found_CN = closing.resampled(wave(4000).astype(np.float32), count)
    assert found_CN.shape == (2, count) and found_CN.dtype == np.float32
    assert np.abs(found_CN - wave(count)).max() < 1e-4


def test_one_gain_brings_a_loop_to_its_loudness():
    rate = 16_000
    wav_CN = 0.05 * np.random.default_rng(0).normal(size=(1, rate // 3)).astype(np.float32)
    for lufs, peak in ((-30.0, 1.0), (-3.0, 10 ** (-1 / 20))):
        found_CN, reached = closing.levelled(wav_CN, rate, lufs)
        gain = found_CN / wav_CN
        np.testing.assert_allclose(gain, gain[0, 0], rtol=1e-5)
        assert np.abs(found_CN).max() <= peak + 1e-6
        assert reached == pytest.approx(lufs, abs=0.01) or (lufs > -10 and reached < lufs)
    silence_CN = np.zeros((1, rate), np.float32)
    assert closing.levelled(silence_CN, rate, -14.0)[1] is None
