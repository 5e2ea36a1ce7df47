"""Windows of many tracks in one batch give the tokens of whole tracks."""

import numpy as np
import pytest
from random_codecs import RANDOM, SMALL, save_random
from tonal_codec import put_tonal

from magnet_jax.codec.encodec import load_codec
from magnet_jax.codec.tonal import Spectrum
from magnet_jax.errors import UserError
from tokenization.encode import Source, encode


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    for name, change in RANDOM.items():
        save_random(folder / name, SMALL | change)
    wide = Spectrum(window_seconds=0.3)  # which hears more than the convolutions
    tonal = {"tonal": put_tonal(folder / "tonal", spectrum=wide)}
    return tonal | {"embedded": "embedded", **{name: str(folder / name) for name in RANDOM}}


def music(codec, samples, seed):
    """Noise of changing loudness."""
    rng = np.random.default_rng(seed)
    wav_CN = rng.standard_normal((codec.spec.channels, samples))
    return (wav_CN * np.sin(np.arange(samples) / 3000 + seed) / 4).astype(np.float32)


def whole(codec, wav_CN):
    """The tokens of a track by itself, the last frame filled up."""
    more = -wav_CN.shape[1] % codec.hop
    return codec.encode(np.pad(wav_CN, ((0, 0), (0, more)))[None])[0]


def blocks(wav_CN, size=777):
    for start in range(0, wav_CN.shape[1], size):
        yield wav_CN[:, start : start + size]


@pytest.mark.parametrize("kind", ["embedded", "tonal", "causal", "constant", "replicate"])
def test_tokens_are_those_of_whole_tracks(sources, kind):
    """Whatever their lengths: some shorter than a window, some ending at the edge of one."""
    codec, hop = load_codec(sources[kind]), load_codec(sources[kind]).hop
    frames = [100, 3, 47, 38, 3, 60, 30, 61, 3, 90, 29, 31, 68, 1, 64]
    tracks = [music(codec, n * hop - (i % 2) * 5, i) for i, n in enumerate(frames)]
    found = list(
        encode(
            codec,
            (Source(i, blocks(wav_CN)) for i, wav_CN in enumerate(tracks)),
            window_frames=30,
            batch_size=3,
            rejected=Broken,
        )
    )
    assert [one.key for one in found] == list(range(len(tracks)))
    differing = total = 0
    for one, wav_CN, count in zip(found, tracks, frames, strict=True):
        expected = whole(codec, wav_CN)
        assert one.codes_KT.dtype == np.int16 and one.codes_KT.shape == expected.shape
        assert one.codes_KT.shape[1] == count and one.samples == wav_CN.shape[1]
        if kind == "tonal":  # whose sums are long enough to be the same in any order
            np.testing.assert_array_equal(one.codes_KT[0], expected[0])
        differing += (one.codes_KT != expected).sum()
        total += expected.size
    # Sums in another order can decide between two entries that are equally near.
    assert differing <= total // 500


def test_both_sides_of_a_track_are_encoded_by_themselves(sources):
    codec = load_codec("embedded")
    frames = [100, 3, 47, 3, 61, 30]
    tracks = [
        np.concatenate([music(codec, n * codec.hop - 7, seed) for seed in (i, i + 50)])
        for i, n in enumerate(frames)
    ]
    found = encode(
        codec,
        (Source(i, blocks(wav_CN)) for i, wav_CN in enumerate(tracks)),
        window_frames=30,
        batch_size=2,
        rejected=Broken,
        sides=2,
    )
    differing = total = 0
    for one, wav_CN, count in zip(found, tracks, frames, strict=True):
        assert one.codes_KT.shape == (2 * codec.spec.num_codebooks, count)
        for side in range(2):
            expected = whole(codec, wav_CN[[side]])
            differing += (one.codes_KT[side::2] != expected).sum()
            total += expected.size
    assert differing <= total // 500


def test_what_cannot_be_read_is_left_out_alone(sources):
    codec = load_codec("embedded")
    wav_CN = music(codec, 70 * codec.hop, 0)

    def breaking():
        yield wav_CN[:, : 50 * codec.hop]
        raise Broken("cut off")

    given = [blocks(wav_CN), breaking(), iter(()), blocks(wav_CN[:, : codec.hop]), blocks(wav_CN)]
    found = list(
        encode(
            codec, (Source(i, b) for i, b in enumerate(given)), window_frames=30, batch_size=2,
            rejected=Broken,
        )
    )  # fmt: skip
    assert [one.codes_KT is None for one in found] == [False, True, True, False, False]
    assert str(found[1].error) == "cut off" and found[2].error is None
    np.testing.assert_array_equal(found[0].codes_KT, found[4].codes_KT)
    with pytest.raises(RuntimeError, match="a bug"):

        def bug():
            raise RuntimeError("a bug")
            yield

        list(encode(codec, [Source(0, bug())], window_frames=30, batch_size=1, rejected=Broken))


def test_short_tracks_come_out_while_others_are_read():
    """And their samples go: of 30 clips only a few are held at a time."""
    codec = load_codec("embedded")
    wav_CN, begun, most = music(codec, 5 * codec.hop, 0), 0, 0

    def clips():
        nonlocal begun
        for i in range(30):
            begun += 1
            yield Source(i, [wav_CN])

    found = encode(codec, clips(), window_frames=30, batch_size=2, rejected=Broken)
    expected_KT = whole(codec, wav_CN)
    for out, one in enumerate(found, start=1):
        np.testing.assert_array_equal(one.codes_KT, expected_KT)
        most = max(most, begun - out)
    assert out == 30 and most < 10


def test_bfloat16_is_for_tracks_of_all_lengths():
    codec = load_codec("embedded")
    tracks = [music(codec, frames * codec.hop, 3) for frames in (20, 60)]
    codes = {
        precision: [
            one.codes_KT
            for one in encode(
                codec, (Source(i, [t]) for i, t in enumerate(tracks)), window_frames=50,
                batch_size=1, rejected=Broken, precision=precision,
            )
        ]
        for precision in ("float32", "bfloat16")
    }  # fmt: skip
    for exact, rounded in zip(*codes.values()):
        assert 0 < (exact != rounded).mean() < 0.3


def test_codecs_that_norm_over_the_clip_have_no_windows(sources):
    with pytest.raises(UserError, match="norms over the whole clip"):
        next(
            encode(
                load_codec(sources["like_48khz"]), [], window_frames=30, batch_size=1,
                rejected=Broken,
            )
        )  # fmt: skip
    with pytest.raises(UserError, match="overlap by 8"):
        next(
            encode(
                load_codec("embedded"), [], window_frames=8, batch_size=1, rejected=Broken
            )
        )  # fmt: skip
