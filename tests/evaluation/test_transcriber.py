"""The transcriber: the network that basic-pitch ships, and how clips are cut for it."""

import sys
import zipfile

import numpy as np
import pytest
import soundfile
import soxr
from constants import SHIPPED_GOLDEN

from launch.make import transcriber as convert_transcriber
from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.evaluation import transcriber

# Printed by onnxruntime, which ran the network as basic-pitch ships it: frames of one window.
GOLDEN = np.load(SHIPPED_GOLDEN / "basic_pitch.npz")
TRANSCRIBER = transcriber.load()


@pytest.mark.parametrize("name", ["08_oneills1850", "12_bach"])
def test_posteriors_are_basic_pitchs(name):
    wav_N, rate = soundfile.read(ASSETS / "clips" / f"{name}.flac", dtype="float32")
    wav_N = soxr.resample(wav_N, rate, transcriber.SAMPLE_RATE)[4 * transcriber.SAMPLE_RATE :]
    window_WN = wav_N[None, : transcriber.WINDOW_SAMPLES]
    found = transcriber.transcribe_windows(TRANSCRIBER.params, window_WN)
    for part, posteriors_WTP in zip(("notes", "onsets"), found, strict=True):
        np.testing.assert_allclose(
            posteriors_WTP[0, 40:100], GOLDEN[f"{name}/{part}"], rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("length", [1, 256, 142 * 256, 142 * 256 + 1, 100_000])
def test_windows_hold_all_of_a_clip(length):
    wav_N = np.arange(1, length + 1, dtype=np.float32)
    windows_WN, num_frames = transcriber.cut_windows(wav_N)
    assert num_frames == -(-length // transcriber.HOP)
    # Frame 15 of each window is the first that is kept, and lies where the last window's ended.
    middles = windows_WN[:, 15 * 256 : 157 * 256].reshape(-1)
    np.testing.assert_array_equal(middles[:length], wav_N)
    assert not middles[length:].any()
    with pytest.raises(ValueError, match="mono"):
        transcriber.cut_windows(wav_N[None])


def test_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        transcriber.load(tmp_path)
    with pytest.raises(UserError, match="tagger: holds another model than the transcriber"):
        transcriber.load(ASSETS / "tagger")


def test_conversion_says_what_it_needs(tmp_path, monkeypatch):
    args = convert_transcriber.Args(wheel=tmp_path / "basic_pitch.whl", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"--wheel .*basic_pitch.whl: not basic-pitch's wheel"):
        convert_transcriber.main(args)
    with zipfile.ZipFile(args.wheel, "w") as archive:
        archive.writestr(convert_transcriber._MODEL, b"none")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="onnx is not installed: pip install onnx"):
        convert_transcriber.main(args)
