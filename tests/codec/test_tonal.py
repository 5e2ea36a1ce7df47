"""The tonal stream: what its tokens tell, and a codec that has one."""

import json
from pathlib import Path

import numpy as np
import pytest
from random_codecs import RANDOM, SMALL, save_random
from safetensors.numpy import load_file, save_file
from tonal_codec import PITCHES_HZ, put_tonal, sine

from magnet_jax.codec import decoding, encodec, tonal
from magnet_jax.codec.receptive_field import token_frames
from magnet_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_tonal(tmp_path_factory.mktemp("tonal") / "codec")


@pytest.fixture(scope="module")
def codec(folder):
    return encodec.load_codec(folder)


def music(samples=20000):
    """Three clips that have other notes, levels and lengths of silence."""
    wav_BN = np.stack([sine(200 + 90 * i, samples) for i in (1, 2, 4)])
    wav_BN += 0.02 * np.random.default_rng(0).standard_normal((3, samples)).astype(np.float32)
    for i, wav_N in enumerate(wav_BN):
        wav_N[: 1500 * i] = 0
    return wav_BN[:, None]


def test_a_note_is_one_token_wherever_its_wave_begins_and_another_note_another(codec):
    base, heard = encodec.load_codec("embedded"), []
    for n, hertz in enumerate(PITCHES_HZ[::6]):
        wav_BCN = np.stack([sine(hertz, phase=phase)[None] for phase in (0.0, 1.0, 2.5)])
        tokens_BT = codec.encode(wav_BCN)[:, 0, 5:-5]
        assert (tokens_BT == 6 * n + 1).all()
        heard.append(len(np.unique(base.encode(wav_BCN)[:, 0, 5:-5])))
    assert min(heard) > 3  # EnCodec's own first codebook spells the wave


def test_silence_has_a_token_of_its_own(codec):
    assert (codec.encode(np.zeros((1, 1, 3200), np.float32))[0, 0] == 0).all()
    for amplitude in (0.01, 0.5):  # a note is not silence because it is soft
        quiet = codec.encode(sine(PITCHES_HZ[5], amplitude=amplitude)[None, None])
        assert (quiet[0, 0, 5:-5] != 0).all()


def test_codes_hang_on_the_window_around_a_frame_alone(codec):
    wav_BCN = music()
    alone = np.concatenate([codec.encode(wav_CN[None]) for wav_CN in wav_BCN])
    codes_BKT = codec.encode(wav_BCN)
    np.testing.assert_array_equal(codes_BKT, alone)
    assert codes_BKT.shape == (3, 5, 63) and codes_BKT.dtype == np.int16
    before, after = tonal.reach(codec.tonal.spectrum, 16000, 320)
    assert tuple(token_frames(codec)) == (max(4, before), max(4, after))
    cut = codec.encode(wav_BCN[..., 20 * 320 : 45 * 320])[:, 0]
    inner = slice(before, 25 - after)
    np.testing.assert_array_equal(cut[:, inner], codes_BKT[:, 0, 20:45][:, inner])
    changed = wav_BCN.copy()
    changed[..., 30 * 320] += 0.9
    found = np.flatnonzero((codec.encode(changed)[:, 0] != codes_BKT[:, 0]).any(0))
    assert len(found) and found.min() >= 30 - after and found.max() <= 30 + before


def test_other_codebooks_and_their_sound_are_the_base_codecs(folder, codec):
    base, wav_BCN = encodec.load_codec("embedded"), music()
    codes_BKT = codec.encode(wav_BCN)
    np.testing.assert_array_equal(codes_BKT[:, 1:], base.encode(wav_BCN))
    np.testing.assert_array_equal(codec.decode(codes_BKT), base.decode(codes_BKT[:, 1:]))
    np.testing.assert_array_equal(
        decoding.decode_audio(encodec.load_decoder(folder), codes_BKT),
        decoding.decode_audio(encodec.load_decoder("embedded"), codes_BKT[:, 1:]),
    )
    assert len(np.unique(codes_BKT[:, 0])) > 3
    with pytest.raises(UserError, match="tonal and makes no sound alone"):
        encodec.read_spec(folder, 1)


def test_stereo_has_a_tonal_stream_for_each_side(folder, codec):
    stereo = encodec.load_codec(folder, num_codebooks=4, interleaved=True)
    left_CN, right_CN, _ = music()
    codes_BKT = stereo.encode(np.concatenate([left_CN, right_CN])[None])
    for side, wav_CN in enumerate((left_CN, right_CN)):
        np.testing.assert_array_equal(codes_BKT[:, side::2], codec.encode(wav_CN[None])[:, :2])
    _, vectors_KVE = encodec.codebook_vectors(folder, 4, interleaved=True)
    assert vectors_KVE.shape == (4, 1024, 128 // 2)
    np.testing.assert_array_equal(vectors_KVE[0], vectors_KVE[1])


def test_vectors_of_the_stream_are_as_near_as_its_spectra(folder, codec):
    spec, vectors_KVE = encodec.codebook_vectors(folder)
    assert spec == codec.spec and not vectors_KVE[0, len(PITCHES_HZ) + 1 :].any()
    centroids_CM = codec.tonal.centroids_CM.astype(np.float64)
    centroids_CM = (centroids_CM - centroids_CM.mean(0)) / centroids_CM.std(0)
    for found, width in ((vectors_KVE[0], 64), (tonal.vectors(codec.tonal, 1024, 100), 100)):
        assert found.shape == (1024, width)
        used = found[: len(PITCHES_HZ) + 1]
        np.testing.assert_allclose(used @ used.T, centroids_CM @ centroids_CM.T, atol=1e-3)
    few = tonal.vectors(codec.tonal, 1024, 3)  # the axes along which they differ most
    assert np.square(few).sum() > 0.4 * np.square(vectors_KVE[0]).sum()


@pytest.mark.parametrize("kind", ["causal", "replicate"])
def test_any_rate_and_hop_will_do(tmp_path, kind):
    save_random(tmp_path / "base", SMALL | RANDOM[kind])
    spectrum = tonal.Spectrum(bands=12, highest_hz=700.0)
    (tmp_path / "codec").mkdir()
    wav_BCN = np.random.default_rng(0).normal(0, 0.1, (1, 1, 500)).astype(np.float32)
    heard_BTM = tonal.levels(wav_BCN[:, 0].astype(np.float64), spectrum, 1500, 30)
    stream = tonal.Tonal(spectrum, heard_BTM[0, :9].astype(np.float32))
    encodec.write_tonal(encodec.read_base(str(tmp_path / "base")), stream, tmp_path / "codec")
    base, codec = (encodec.load_codec(str(tmp_path / name)) for name in ("base", "codec"))
    assert codec.spec.num_codebooks == base.spec.num_codebooks + 1
    codes_BKT = codec.encode(wav_BCN)
    np.testing.assert_array_equal(codes_BKT[0, 0, :9], range(9))
    np.testing.assert_array_equal(codes_BKT[:, 1:], base.encode(wav_BCN))
    fast = tonal.Spectrum(highest_hz=750.0)
    with pytest.raises(UserError, match="highest_hz 750, and that below half of 1500 Hz"):
        tonal.check_rate(fast, 1500, "codec")


def test_as_many_codebooks_by_default_as_of_the_base(tmp_path):
    """Of several bandwidths the largest up to 6 kbit/s, and the stream besides."""
    settings = SMALL | {"sampling_rate": 24000, "target_bandwidths": [4.0, 6.0, 12.0, 24.0]}
    save_random(tmp_path / "base", settings)
    put = tmp_path / "codec"
    put.mkdir()
    stream = tonal.Tonal(tonal.Spectrum(), np.zeros((2, 84), np.float32))
    encodec.write_tonal(encodec.read_base(str(tmp_path / "base")), stream, put)
    base, found = (encodec.read_spec(str(tmp_path / name)) for name in ("base", "codec"))
    assert found.num_codebooks == base.num_codebooks + 1


def test_the_hash_is_of_the_stream_too(folder, codec, tmp_path):
    settings = json.loads(Path(folder, "config.json").read_text())
    tensors = load_file(f"{folder}/model.safetensors")

    def put(settings, tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return str(tmp_path)

    assert encodec.read_spec(put(settings, tensors)).sha256 == codec.spec.sha256
    moved = tensors | {"tonal.centroids": tensors["tonal.centroids"] + np.float32(1e-3)}
    assert encodec.read_spec(put(settings, moved)).sha256 != codec.spec.sha256
    softer = settings | {"tonal": settings["tonal"] | {"floor_db": -60.0}}
    assert encodec.read_spec(put(softer, tensors)).sha256 != codec.spec.sha256
    without = {name: value for name, value in tensors.items() if name != "tonal.centroids"}
    embed = "quantizer.layers.0.codebook.embed"
    for config, arrays, message in (
        (settings, without, "tonal.centroids is missing"),
        (settings, tensors | {embed: tensors[embed] + 1}, f"{embed}, of its tonal stream, must be"),
        (settings | {"tonal": {"bands": 83}}, tensors, r"\[25, 84\], not 2 to 1024 rows of 83"),
        (settings | {"tonal": {"window": 1}}, tensors, "unknown settings: window"),
        (settings | {"tonal": {"highest_hz": 9e3}}, tensors, "below half of 16000 Hz"),
        ({**settings, "tonal": 3}, tensors, "expected the fields of Spectrum"),
    ):
        with pytest.raises(UserError, match=message):
            encodec.load_codec(put(config, arrays))


def test_a_stream_that_was_lost_on_the_way_is_missed_in_encoding(folder, tmp_path):
    settings = json.loads(Path(folder, "config.json").read_text())
    tensors = load_file(f"{folder}/model.safetensors")
    del settings["tonal"], tensors["tonal.centroids"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lost = encodec.load_codec(str(tmp_path))
    assert lost.spec.num_codebooks == 5
    lost.decode(np.zeros((1, 5, 2), int))
    with pytest.raises(UserError, match="its first codebook is zeros"):
        lost.encode(music()[:1])
