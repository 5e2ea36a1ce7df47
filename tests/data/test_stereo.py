"""Interleaved stereo, both sides by a mono codec: audio to tokens, training, and to audio again."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import tiny
from random_codecs import RANDOM, SMALL, save_random
from sounds import RATE, put, tone

from launch import sample
from magnet_jax.checkpoints import export, pretrained
from magnet_jax.codec import decoding
from magnet_jax.codec import encodec as codecs
from magnet_jax.data import pipeline, records
from magnet_jax.errors import UserError
from magnet_jax.train import loop
from tokenization import browse
from tokenization.job import Job, run


@pytest.fixture(scope="module")
def mono():
    return codecs.load_codec("embedded", num_codebooks=2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A data set of two codebooks a side; one track is stereo, one mono, one of three channels."""
    folder = tmp_path_factory.mktemp("stereo")
    sides = [tone(2.3, frequency=300), tone(2.3, frequency=550)[::-1] / 2, tone(2.3)]
    put(folder / "audio" / "two.wav", np.concatenate(sides[:2], axis=1))
    put(folder / "audio" / "one.wav", tone(1.2))
    put(folder / "audio" / "three.wav", np.concatenate(sides[::-1], axis=1))
    job = Job(
        audio=folder / "audio", out=folder / "tokens", stereo="interleave", num_codebooks=2,
        validation_percent=0, window_seconds=1, mix_ratio=0.4,
    )  # fmt: skip
    run(job)
    return job


@pytest.fixture(scope="module")
def found(tokens):
    source = records.open_split(tokens.out, "train")
    return {r["track_id"]: r for r in map(records.decode_example, source)}


def filled(wav_CN, hop):
    return np.pad(wav_CN, ((0, 0), (0, -wav_CN.shape[1] % hop)))


def test_sides_are_encoded_by_themselves_and_alternate(tokens, found, mono):
    assert len(found) == 4 and sum("mixed" in r["info"] for r in found.values()) == 1
    for name in ("one", "two", "three"):
        wav = soundfile.read(tokens.audio / f"{name}.wav", dtype="float32", always_2d=True)[0]
        codes_KT = found[name]["codes_KT"]
        assert codes_KT.shape == (4, -(-len(wav) // mono.hop))
        for side in range(2):
            wav_CN = filled(wav[:, [min(side, wav.shape[1] - 1)]].T, mono.hop)
            own_KT = mono.encode(wav_CN[None])[0]
            assert (codes_KT[side::2] != own_KT).mean() < 0.01
    np.testing.assert_array_equal(found["one"]["codes_KT"][::2], found["one"]["codes_KT"][1::2])
    assert (found["two"]["codes_KT"][::2] != found["two"]["codes_KT"][1::2]).mean() > 0.3


def test_the_data_set_says_that_it_is_interleaved(tokens, mono, tmp_path):
    spec = records.read_codec_spec(tokens.out)
    assert (spec.channels, spec.num_codebooks, spec.interleaved) == (2, 4, True)
    assert dataclasses.replace(spec, channels=1, num_codebooks=2, interleaved=False) == mono.spec
    one_stream = codecs.read_spec("embedded", 4)
    with pytest.raises(UserError, match="its codec has interleaved True, but False is wanted"):
        codecs.check_same_codec(spec, one_stream, "here")
    run(tokens)  # what is complete stays so
    with pytest.raises(UserError, match=r"begun with other settings: .*--stereo .was "):
        run(dataclasses.replace(tokens, stereo="none"))
    # data sets from before there was stereo
    out = tmp_path / "old"
    tiny.write_noise(out, {"train": 1})
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["codec"].pop("interleaved") is False
    (out / "metadata.json").write_text(json.dumps(metadata))
    assert records.read_codec_spec(out).interleaved is False


def test_both_backends_decode_each_side_as_the_mono_codec_does(mono):
    stereo = codecs.load_codec("embedded", num_codebooks=4, interleaved=True)
    codes_BKT = np.random.default_rng(0).integers(0, 1024, (3, 4, 9)).astype(np.int16)
    wav_BCN = stereo.decode(codes_BKT)
    assert wav_BCN.shape == (3, 2, 9 * mono.hop)
    for side in range(2):
        own_BCN = mono.decode(codes_BKT[:, side::2])
        np.testing.assert_allclose(wav_BCN[:, [side]], own_BCN, atol=1e-5)
    in_jax = codecs.load_decoder("embedded", num_codebooks=4, interleaved=True)
    assert in_jax.spec == stereo.spec
    np.testing.assert_allclose(decoding.decode_audio(in_jax, codes_BKT), wav_BCN, atol=1e-4)
    again_BKT = stereo.encode(wav_BCN)
    for side in range(2):
        own_BKT = mono.encode(wav_BCN[:, [side]])
        assert (again_BKT[:, side::2] != own_BKT).mean() < 0.01
    joined = codecs.join_sides(np.arange(24).reshape(4, 3, 2), 2)
    assert joined[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    np.testing.assert_array_equal(codecs.split_sides(joined, 2).ravel(), np.arange(24))


def test_browse_decodes_to_stereo(tokens, found, tmp_path, capsys, mono):
    args = browse.Args(dataset=tokens.out, record=2, out=tmp_path)
    browse.run(args)
    (path,) = tmp_path.glob("*.wav")
    wav, rate = soundfile.read(path, always_2d=True)
    assert rate == RATE and wav.shape[1] == 2
    name = list(found)[2]
    for side in range(2):
        own_N = mono.decode(found[name]["codes_KT"][None, side::2])[0, 0, : len(wav)]
        np.testing.assert_allclose(wav[:, side], own_N.clip(-1, 1), atol=2e-4)
    browse.run(browse.Args(dataset=tokens.out))
    assert "2 channels, 4 codebooks (left and right interleaved) of 1024" in capsys.readouterr().out


def test_training_takes_all_codebooks_and_samples_stereo(tokens, tmp_path):
    config = tiny.run_config(
        tokens.out, tmp_path / "run", steps=1, sample_every=1, sample_prompts=("a tune",)
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        two = dataclasses.replace(config.model, num_codebooks=2)
        fewer = dataclasses.replace(
            config, model=two, decode=dataclasses.replace(config.decode, steps=(2, 1))
        )
        match = "interleaved stereo of 4 codebooks, 2 of each side, and the model has 2: set"
        with pytest.raises(UserError, match=match):
            loop.train(fewer)
        with pytest.raises(UserError, match=match):
            pipeline.make_train_iterator(
                fewer.data, frames=30, num_codebooks=2, tokenizer=None, max_tokens=4, seed=0
            )
        loop.train(config)
        one_stream = tmp_path / "mono"
        tiny.write_noise(one_stream, {"train": 8})
        other = tiny.run_config(one_stream, tmp_path / "other", steps=1)
        with pytest.raises(UserError, match="one stream of codebooks, but .* learnt interleaved"):
            loop.train(dataclasses.replace(other, init_from=str(tmp_path / "run")))
        with pytest.raises(UserError, match="one stream of codebooks, but the run .* learns inter"):
            loop.train(dataclasses.replace(config, data=other.data, steps=2))
    (path,) = (tmp_path / "run" / "samples").rglob("*.wav")
    assert soundfile.info(path).channels == 2
    args = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "sampled")]
    (path,) = sample.sample(sample.parse([*args, "--prompt", "a tune"]))
    wav, _ = soundfile.read(path, always_2d=True)
    assert wav.shape == (round(0.6 * RATE), 2) and np.abs(wav[:, 0] - wav[:, 1]).max() > 1e-3
    loaded = pretrained.load(tmp_path / "run")
    with pytest.raises(UserError, match="interleaved stereo has no AudioCraft files"):
        export.export_model(loaded, tmp_path / "exported", export.Options(), "the run")
    export.export_model(loaded, tmp_path / "exported", export.Options(audiocraft=False), "the run")
    assert pretrained.load(tmp_path / "exported").codec.interleaved


def test_only_mono_codecs_are_interleaved(tmp_path):
    save_random(tmp_path / "like_48khz", SMALL | RANDOM["like_48khz"])
    with pytest.raises(UserError, match="has 2 channels: interleaved stereo takes a mono one"):
        codecs.load_codec(str(tmp_path / "like_48khz"), interleaved=True)
    with pytest.raises(UserError, match="num_codebooks must be even, not 3"):
        codecs.load_decoder("embedded", 3, interleaved=True)
    put(tmp_path / "audio" / "a.wav", tone(1.1))
    job = Job(
        audio=tmp_path / "audio", out=tmp_path / "out", stereo="interleave",
        codec=str(tmp_path / "like_48khz"),
    )  # fmt: skip
    with pytest.raises(UserError, match="interleaved stereo takes a mono one"):
        run(job)
    assert not (tmp_path / "out").exists()
