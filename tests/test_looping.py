"""Loops through the Python API: their length, their end, what they begin with, who makes them."""

import dataclasses

import av
import numpy as np
import pytest
import soundfile
import sounds
import tiny

from magnet_jax import HybridMAGNeT, MAGNeT, MusicGen, programs
from magnet_jax.codec import encodec
from magnet_jax.config import KernelConfig, SamplingMeshConfig
from magnet_jax.decode.placement import Execution
from magnet_jax.edit import closing
from magnet_jax.errors import UserError

RATE = 16_000
TEXTS = ["a waltz", "a jig"]
HOW = {"bpm": 200.0, "bars": 1, "seed": 1}  # 1.2 s, 60 frames


def make(kind="magnet", execution=Execution(), **decode):
    of_kind = {"magnet": MAGNeT, "hybrid": HybridMAGNeT, "musicgen": MusicGen}[kind]
    model = of_kind(tiny.loaded_model(kind, **decode), encodec.load_decoder("embedded"), execution)
    # To a fresh model hardly anything counts.
    model.loaded.params["lm"] = tiny.random_params(model.loaded.config.model)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def test_loops_are_as_long_as_their_bars_and_close(model):
    loops = model.generate_loop(TEXTS, **HOW)
    assert loops.wav_BCN.shape == (2, 1, 19_200) and loops.tokens_BKT.shape == (2, 4, 60)
    assert loops.wav_BCN.dtype == np.float32 and loops.sample_rate == RATE
    assert (loops.tokens_BKT[0] != loops.tokens_BKT[1]).any()
    np.testing.assert_array_equal(loops.wav_BCN, closing.audio(model.decoder, loops.tokens_BKT))
    count = programs.count()
    # A tempo of no whole frames: 54 of them, and 17,297 samples.
    other = model.generate_loop(TEXTS, bpm=222.0, bars=1, seed=1)
    assert other.tokens_BKT.shape[-1] == 54 and other.wav_BCN.shape[-1] == round(RATE * 240 / 222)
    again = model.generate_loop(TEXTS, **HOW)
    np.testing.assert_array_equal(again.tokens_BKT, loops.tokens_BKT)
    alone = model.generate_loop(TEXTS[:1], **HOW)
    np.testing.assert_array_equal(alone.tokens_BKT, loops.tokens_BKT[:1])
    np.testing.assert_array_equal(alone.wav_BCN, loops.wav_BCN[:1])
    assert programs.count() <= count + 2  # one for the other bucket, one for a clip by itself
    assert (model.generate_loop(TEXTS, **HOW | {"seed": 2}).tokens_BKT != loops.tokens_BKT).any()


def test_a_loop_begins_with_what_is_given(model):
    wav_CN = sounds.tone(1.0, 22_050).T
    codes_KT = model._encode(wav_CN.astype(np.float32), 22_050)
    loops = model.generate_loop(
        TEXTS, start=wav_CN, start_sample_rate=22_050, start_seconds=0.4, **HOW
    )
    np.testing.assert_array_equal(loops.tokens_BKT[..., :20], np.stack([codes_KT[:, :20]] * 2))
    assert (loops.tokens_BKT[0, :, 20:] != loops.tokens_BKT[1, :, 20:]).any()
    # By default half of the loop.
    half = model.generate_loop(start=wav_CN, start_sample_rate=22_050, **HOW)
    np.testing.assert_array_equal(half.tokens_BKT[0, :, :30], codes_KT[:, :30])
    # The end leads to that beginning: with another one it is another.
    other_BKT = model.loops(TEXTS, loops.length, seed=1, start_BKP=half.tokens_BKT[..., 20:40])
    assert (other_BKT.tokens_BKT[..., -3:] != loops.tokens_BKT[..., -3:]).any()


def test_files_say_that_they_are_loops(model, tmp_path):
    loops = model.generate_loop(TEXTS, **HOW)
    loops.write(tmp_path / "a.wav", 1)
    loops.write(tmp_path / "a.flac", 1, lufs=None)
    with soundfile.SoundFile(tmp_path / "a.wav") as file:
        log = " ".join(file.extra_info.split())
        assert file.frames == 19_200 and file.title == "a jig"
    assert "Beats : 4 Meter : 4/4 Tempo : 200.0" in log and "End : 19199" in log
    with av.open(str(tmp_path / "a.flac")) as file:
        assert {"BPM": "200", "TITLE": "a jig"}.items() <= file.metadata.items()
    wav_N, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    np.testing.assert_allclose(wav_N, loops.wav_BCN[1, 0].clip(-1, 1), atol=2 / 2**16)
    with pytest.raises(UserError, match="as .wav or .flac"):
        loops.write(tmp_path / "a.mp3")


def test_devices_make_the_same_loops(model):
    expected = model.generate_loop(TEXTS, **HOW)
    model = make(execution=Execution(mesh=SamplingMeshConfig(data=2, guidance=2)))
    found = model.generate_loop(TEXTS, **HOW)
    same = (found.tokens_BKT == expected.tokens_BKT).mean()
    assert same > 0.99  # (where two tokens are all but as likely, rounding decides)


def test_loops_are_made_in_segments_alike(model):
    heard = []
    expected = model.generate_loop(TEXTS, **HOW)
    execution = dataclasses.replace(model.execution, between=heard.append)
    found = MAGNeT(model.loaded, model.decoder, execution).generate_loop(TEXTS, **HOW)
    np.testing.assert_array_equal(found.tokens_BKT, expected.tokens_BKT)
    assert heard[-1].done == heard[-1].total == 6


def test_spans_at_any_frame(model):
    loops = make(span_arrangement="stride1").generate_loop(TEXTS, bpm=222.0, bars=1, seed=1)
    assert loops.tokens_BKT.shape[-1] == 54 and loops.wav_BCN.shape[-1] == 17_297


@pytest.mark.parametrize("kind", ["musicgen", "magnet"])
def test_a_rescorer_hears_the_ring(model, kind):
    expected = model.generate_loop(TEXTS[:1], **HOW)
    model.set_rescorer(make(kind), 1.0)
    found = model.generate_loop(TEXTS[:1], **HOW)
    model.set_rescorer(None)
    assert (found.tokens_BKT != expected.tokens_BKT).any()
    assert (found.tokens_BKT < 1024).all()


def test_a_hybrid_makes_loops_in_parallel(model):
    hybrid = make("hybrid")
    loops = hybrid.generate_loop(TEXTS[:1], **HOW)
    assert loops.tokens_BKT.shape == (1, 4, 60) and (loops.tokens_BKT < 1024).all()
    given = hybrid.loops(TEXTS[:1], loops.length, seed=2, start_BKP=loops.tokens_BKT[..., :20])
    np.testing.assert_array_equal(given.tokens_BKT[..., :20], loops.tokens_BKT[..., :20])


def test_what_cannot_be_is_said(model):
    wav_CN = sounds.tone(1.0, RATE).T
    for how, named in (
        ({"bpm": 60.0, "bars": 1}, "longer than the 2 s"),
        ({"bars": 1}, "bpm"),
        ({"bpm": 200.0, "seconds": 1.0}, "not both"),
        ({"bpm": 5.0}, "bpm must"),
        ({"seconds": 0.02}, "shorter than 3 frames"),
        (HOW | {"start_seconds": 0.5}, "need a start"),
        (
            HOW | {"start": wav_CN, "start_sample_rate": RATE, "start_seconds": 3.0},
            "the 1 s of the start",
        ),
        (HOW | {"start": wav_CN, "start_sample_rate": RATE, "start_seconds": 0.95}, "a quarter"),
        (HOW | {"start": np.stack([wav_CN] * 3), "start_sample_rate": RATE}, "one start or as"),
    ):
        with pytest.raises(UserError, match=named):
            model.generate_loop(TEXTS, **how)
    split = Execution(mesh=SamplingMeshConfig(frames=2))
    with pytest.raises(UserError, match=r"mesh\.frames"):
        make(execution=split).generate_loop(TEXTS, **HOW)
    splash = dataclasses.replace(model.execution, kernels=KernelConfig(local="splash"))
    with pytest.raises(UserError, match="splash"):
        MAGNeT(model.loaded, model.decoder, splash).generate_loop(TEXTS, **HOW)
    assert not hasattr(MusicGen, "generate_loop")
