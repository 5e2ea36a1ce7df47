"""Only the samples near an edit change, and they go on into the others without a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.codec import decoding, seanet
from magnet_jax.edit import splice

KINDS = ("embedded", "interleaved", "causal", "causal_trimmed", "constant", "replicate")
FRAMES, GUARD = 60, splice.GUARD
FEATURES = jax.jit(seanet.features, static_argnames="config")
SAMPLES = jax.jit(seanet.samples, static_argnames="config")


@pytest.fixture(scope="module", params=KINDS)
def decoder(request, load):
    return load(request.param)


def random_codes(decoder, frames=FRAMES, seed=0):
    spec = decoder.spec
    return np.random.default_rng(seed).integers(
        0, spec.codebook_size, (spec.num_codebooks, frames), dtype=np.int32
    )


def edited(decoder, codes_KT, *regions):
    other_KT, codes_KT = random_codes(decoder, codes_KT.shape[1], seed=1), codes_KT.copy()
    for start, end in regions:
        codes_KT[:, start:end] = other_KT[:, start:end]
    return codes_KT


def features(decoder, codes_KT):
    return FEATURES(decoder.params, codes_KT[None], config=decoder.config)


def samples(decoder, x_BTC):
    wav_BCN = np.asarray(SAMPLES(decoder.params, x_BTC, config=decoder.config))
    return wav_BCN.reshape(-1, wav_BCN.shape[-1])


def decoded(decoder, codes_KT):
    return decoding.decode_audio(decoder, codes_KT[None])[0]


def assert_close(wav_CN, expected_CN):
    scale = max(1, np.abs(expected_CN).max())
    np.testing.assert_allclose(wav_CN, expected_CN, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("region", [(0, 4), (24, 33), (30, 31), (FRAMES - 3, FRAMES), (0, FRAMES)])
def test_a_piece_is_what_the_whole_spliced_clip_has_there(decoder, region):
    original_KT = random_codes(decoder)
    edited_KT = edited(decoder, original_KT, region)
    x_BTC, y_BTC = features(decoder, original_KT), features(decoder, edited_KT)
    is_edited = (jnp.arange(FRAMES) < region[1] + GUARD)[None, :, None]
    whole_CN = samples(decoder, jnp.where(is_edited, y_BTC, x_BTC))
    original_CN = samples(decoder, x_BTC)
    [piece] = splice.spliced(decoder, original_KT, edited_KT, [region])

    outside = np.ones(whole_CN.shape[1], bool)
    outside[piece.first_sample : piece.first_sample + piece.wav_CN.shape[1]] = False
    np.testing.assert_array_equal(whole_CN[:, outside], original_CN[:, outside])
    assert_close(splice.put(original_CN, [piece]), whole_CN)

    hop, reach = decoder.config.hop, splice.reach_of(decoder.config)
    inside = slice(region[0] * hop, region[1] * hop)
    assert np.abs(whole_CN - original_CN)[:, inside].max() > 1e-4
    assert piece.first_sample == max(0, region[0] - reach.before) * hop
    assert piece.wav_CN.shape[1] <= (np.diff(region)[0] + sum(reach) + GUARD) * hop


def test_without_a_splice_samples_change_up_to_the_end(load):
    decoder = load("embedded")
    original_KT = random_codes(decoder)
    whole_CN = decoded(decoder, edited(decoder, original_KT, (20, 24)))
    last = np.flatnonzero((whole_CN != decoded(decoder, original_KT)).any(0))[-1]
    assert last > (FRAMES - 2) * decoder.config.hop


@pytest.mark.parametrize("kind", ["embedded", "causal"])
def test_several_regions(load, kind):
    """Each has an LSTM of its own, and near ones are one."""
    decoder = load(kind)
    original_KT = random_codes(decoder)
    near, far = (14, 17), (45, 46)
    edited_KT = edited(decoder, original_KT, (10, 11), near, far)
    pieces = splice.spliced(decoder, original_KT, edited_KT, [far, near, (10, 11)])
    assert len(pieces) == 2
    alone = [
        *splice.spliced(
            decoder, original_KT, edited(decoder, original_KT, (10, 11), near), [(10, 17)]
        ),
        *splice.spliced(decoder, original_KT, edited(decoder, original_KT, far), [far]),
    ]
    for piece, expected in zip(pieces, alone, strict=True):
        assert piece.first_sample == expected.first_sample
        np.testing.assert_array_equal(piece.wav_CN, expected.wav_CN)


def test_tokens_that_stay_give_no_piece(load):
    decoder = load("embedded")
    codes_KT = random_codes(decoder)
    assert splice.spliced(decoder, codes_KT, codes_KT, [(3, 9)]) == []
    assert splice.spliced(decoder, codes_KT, codes_KT, []) == []


def test_one_program_serves_every_place(load):
    decoder = load("embedded")
    before = splice._program._cache_size()
    for frames in (FRAMES, FRAMES + 9):
        original_KT = random_codes(decoder, frames)
        for region in ((2, 5), (30, 36), (frames - 1, frames)):
            edited_KT = edited(decoder, original_KT, region)
            splice.spliced(decoder, original_KT, edited_KT, [region])
    assert splice._program._cache_size() <= before + 1


@pytest.mark.parametrize("more", [1, 20])
def test_a_clip_goes_on(decoder, more):
    """What comes before its end stays, but for the frames from which the end was in sight."""
    longer_KT = random_codes(decoder, FRAMES + more)
    original_KT = longer_KT[:, :FRAMES]
    region = (FRAMES, FRAMES + more)
    [piece] = splice.spliced(decoder, original_KT, longer_KT, [region])
    longer_CN, original_CN = decoded(decoder, longer_KT), decoded(decoder, original_KT)
    pasted_CN = np.zeros_like(longer_CN)
    pasted_CN[:, : original_CN.shape[1]] = original_CN
    assert_close(splice.put(pasted_CN, [piece]), longer_CN)


def test_a_clip_begins_earlier(decoder):
    """Its own samples stay from a few frames on, which the LSTM had begun with."""
    hop, more = decoder.config.hop, 20
    original_KT = random_codes(decoder)
    longer_KT = np.concatenate([random_codes(decoder, more, seed=2), original_KT], axis=1)
    [piece] = splice.spliced(decoder, original_KT, longer_KT, [(0, more)])
    reach = splice.reach_of(decoder.config)
    assert piece.first_sample == 0
    assert piece.wav_CN.shape[1] == (more + GUARD + reach.after) * hop
    longer_CN = decoded(decoder, longer_KT)
    until = (more + GUARD - reach.after) * hop
    assert_close(piece.wav_CN[:, :until], longer_CN[:, :until])
    # Its end is that of a clip in which the original's features come after the new ones.
    x_BTC = jnp.concatenate(
        [
            features(decoder, longer_KT)[:, : more + GUARD],
            features(decoder, original_KT)[:, GUARD:],
        ],
        axis=1,
    )
    whole_CN = samples(decoder, x_BTC)
    assert_close(piece.wav_CN, whole_CN[:, : piece.wav_CN.shape[1]])
    original_CN = decoded(decoder, original_KT)
    assert_close(
        whole_CN[:, piece.wav_CN.shape[1] :], original_CN[:, (GUARD + reach.after) * hop :]
    )


@pytest.mark.parametrize(
    ("frames", "regions", "match"),
    [
        (FRAMES, [(10, 12)], "outside the regions"),
        (FRAMES, [(9, 9)], r"region \[9, 9\)"),
        (FRAMES, [(FRAMES - 1, FRAMES + 1)], "within"),
        (FRAMES + 4, [(3, 9)], "one region must hold"),
        (FRAMES + 4, [(0, 2), (50, FRAMES + 4)], "one region must hold"),
    ],
)
def test_what_is_refused(load, frames, regions, match):
    decoder = load("causal")
    edited_KT = edited(decoder, random_codes(decoder, frames), (40, 42))
    with pytest.raises(ValueError, match=match):
        splice.spliced(decoder, random_codes(decoder), edited_KT, regions)


def test_codecs_that_norm_over_the_whole_clip_have_no_exact_edits(load):
    decoder = load("like_48khz")
    codes_KT = random_codes(decoder)
    with pytest.raises(ValueError, match="no exact edits"):
        splice.spliced(decoder, codes_KT, edited(decoder, codes_KT, (3, 5)), [(3, 5)])
