"""Fitting a tonal stream: the codec that is written, and one line for what cannot be."""

import json
from dataclasses import replace

import numpy as np
import pytest
from random_codecs import RANDOM, SMALL, save_random
from sounds import put, tone
from tiny import assert_same_bits
from tonal_codec import put_tonal, sine

from launch.codec import tonal as command
from launch.codec import training
from launch.codec.tonal import Fitting, fit_codec
from magnet_jax.codec.encodec import load_codec, read_spec
from magnet_jax.errors import UserError


@pytest.fixture
def settings(tmp_path):
    """Six notes, and a rest."""
    for i in range(6):
        wav = np.concatenate([sine(200 * 1.3**i, 12000), np.zeros(1600, np.float32)])
        put(tmp_path / "audio" / f"{i}.flac", wav[:, None])
    return Fitting(audio=tmp_path / "audio", out=tmp_path / "codec", size=12)


def test_notes_get_tokens_of_their_own(settings, capsys):
    words = ["--audio", settings.audio, "--out", settings.out, "--size", "12"]
    command.main([str(word) for word in words])
    said = capsys.readouterr().out
    assert "| frames looked at | 258 |" in said and "% of 12 |" in said
    codec = load_codec(str(settings.out))
    assert codec.spec.num_codebooks == 5 and codec.tonal.centroids_CM.shape == (12, 84)
    tokens = [
        np.unique(codec.encode(sine(200 * 1.3**i, 12000, phase=2.0)[None, None])[0, 0, 4:-4])
        for i in range(6)
    ]
    assert all(len(found) == 1 for found in tokens)
    assert len(np.unique(tokens)) == 6 and 0 not in np.unique(tokens)
    again = replace(settings, out=settings.out.with_name("again"))
    numbers = fit_codec(again)
    assert load_codec(str(again.out)).spec.sha256 == codec.spec.sha256
    assert numbers["entries_used"] > 0.7 and numbers["same_as_before"] > 0.8
    other = replace(settings, out=settings.out.with_name("other"), seed=1)
    fit_codec(other)
    assert load_codec(str(other.out)).spec.sha256 != codec.spec.sha256


def test_frames_are_drawn_as_they_are_heard_in_the_whole_clip(settings, monkeypatch):
    monkeypatch.setattr(command, "_RUN_SECONDS", 0.1)
    clips = training.Clips("--audio", settings.audio, 16000, 0.02)
    drawn = command.draw_frames(settings, clips, 16000, 320)
    whole = [
        command.tonal.levels(clips.read(i, 0, n)[None], settings.spectrum, 16000, 320)[0]
        for i, n in enumerate(clips.frames)
    ]
    np.testing.assert_allclose(drawn.levels_NM, np.concatenate(whole), atol=1e-5)
    assert (~drawn.follows_N).sum() == 6 * 9  # runs of five frames, in each of six clips of 43
    fewer = command.draw_frames(replace(settings, hours=0.0001), clips, 16000, 320)
    assert len(fewer.follows_N) == 20


def test_centroids_that_no_frame_is_near_to_move():
    rng = np.random.default_rng(0)
    places = 10 * rng.standard_normal((8, 5))
    levels_NM = (places[rng.integers(8, size=400)] + 0.01 * rng.standard_normal((400, 5))).astype(
        np.float32
    )
    centroids_CM = command.fit(levels_NM, 9, 0)
    assert not centroids_CM[0].any()
    distances = np.linalg.norm(centroids_CM[1:, None] - places, axis=2)
    assert sorted(distances.argmin(1)) == list(range(8)) and distances.min(1).max() < 0.01


def test_what_cannot_be_fitted_is_one_line(settings, tmp_path):
    put_tonal(tmp_path / "tonal")
    save_random(tmp_path / "like_48khz", SMALL | RANDOM["like_48khz"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    for change, message in (
        ({"audio": tmp_path / "none"}, "--audio .*none: no such folder"),
        ({"audio": tmp_path / "empty"}, "--audio .*empty: no .flac or .wav"),
        ({"out": tmp_path / "taken"}, "--out .*taken: is there already"),
        ({"size": 1025}, "--size 1025: codec embedded has codebooks of 1024 entries"),
        ({"size": 1}, "--size must"),
        ({"size": 500}, "--size 500: more than the 258 frames"),
        ({"codec": str(tmp_path / "like_48khz")}, "norms over chunks or clips"),
        ({"codec": "nowhere"}, "codec nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            fit_codec(replace(settings, **change))
    put(settings.audio / "x.wav", tone(1.0, rate=8000), rate=8000)
    with pytest.raises(UserError, match="x.wav has 1 channels at 8000 Hz, not 1 at 16000 Hz"):
        fit_codec(settings)
    assert not settings.out.exists()


def test_a_codec_that_has_a_stream_gets_another_in_its_place(settings, tmp_path):
    old = put_tonal(tmp_path / "tonal")
    fit_codec(settings)
    fit_codec(replace(settings, codec=old, out=tmp_path / "new"))
    specs = [read_spec(str(path)) for path in (settings.out, tmp_path / "new", old)]
    assert specs[0].sha256 == specs[1].sha256 != specs[2].sha256
    (config, tensors), (of_base, bare) = map(training.read_initial, (old, "embedded"))
    assert config["target_bandwidths"] == of_base["target_bandwidths"]
    assert_same_bits(tensors, bare)


def test_what_is_written_says_how_it_hears(settings):
    fit_codec(replace(settings, spectrum=replace(settings.spectrum, highest_hz=9000.0)))
    written = json.loads((settings.out / "config.json").read_text())
    assert written["tonal"]["highest_hz"] == 7500 and written["target_bandwidths"] == [2.5]
