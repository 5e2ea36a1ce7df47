"""From files to scores: clips are found and read, kept, and held against the right ones."""

import numpy as np
import pytest
from sounds import cut_file, put, put_with_ffmpeg, tone

from magnet_jax.errors import UserError
from magnet_jax.evaluation import scores
from magnet_jax.evaluation.embedders import Embedded, Embedder
from magnet_jax.evaluation.scores import Clips, Listening


def test_what_the_reference_gives_is_kept_under_the_hash_of_its_content(tmp_path):
    calls = []

    def embed(wav_N):
        calls.append(len(wav_N))
        return Embedded(np.array([[wav_N.std(), wav_N.mean()], [1, len(wav_N)]]), None)

    embedder = Embedder("counting", 8000, embed, "", "hash", "all")
    for i, name in enumerate("abcd"):
        put(tmp_path / "real" / f"{name}.wav", tone(1.5, frequency=220 * (i + 1)))
    files = scores.find_audio(tmp_path / "real")
    cache = tmp_path / "cache"
    first = scores.embed(embedder, files, cache=cache)
    assert len(calls) == 4 and calls[0] == pytest.approx(1.5 * 8000, abs=1)
    again = scores.embed(embedder, files, cache=cache)
    assert len(calls) == 4
    for name, row in first.embedded.items():
        np.testing.assert_array_equal(row.embeddings_PE, again.embedded[name].embeddings_PE)
        assert again.embedded[name].logits_PL is None
    scores.embed(embedder, files, Listening(seconds=1.0), cache=cache)
    scores.embed(embedder._replace(sha256="other"), files, cache=cache)
    put(files["a"], tone(2.0))
    scores.embed(embedder, files, cache=cache)
    assert len(calls) == 16 and len(list(cache.iterdir())) == 4
    assert calls[4] == 8000
    for path in cache.iterdir():
        cut_file(path)
    with pytest.raises(UserError, match=r"\.npz: damaged \(.*\); remove it"):
        scores.embed(embedder, files, cache=cache)


def test_clips_are_found_and_read_as_in_tokenization(tmp_path, capsys):
    wav = tone(2.0)
    kept = [
        put(tmp_path / "a.wav", wav, caption=None),
        put(tmp_path / "b" / "a.FLAC", wav, caption=None, format="FLAC"),
        put(tmp_path / "b" / "c" / "d.au", wav, caption=None, format="AU"),
        put_with_ffmpeg(tmp_path / "e.m4a", wav, 16000, "aac", caption=None),
        put_with_ffmpeg(tmp_path / "b" / "e.wma", wav, 16000, "wmav2", caption=None),
    ]
    streamed = bytearray(kept[1].read_bytes())
    streamed[21:26] = bytes([streamed[21] & 0xF0, 0, 0, 0, 0])  # of unknown length
    kept[1].write_bytes(streamed)
    put(tmp_path / ".hidden" / "f.wav", wav)
    put(tmp_path / "b" / "._g.wav", wav)
    (tmp_path / "cover.jpg").touch()
    (tmp_path / "b" / "h.xyz").touch()
    files = scores.find_audio(tmp_path)
    assert files == dict(zip(["a", "b/a", "b/c/d", "b/e", "e"], sorted(kept), strict=True))
    assert "left out what is no audio: 1 .jpg, 1 .xyz" in capsys.readouterr().out
    for path in kept:
        wav_N = scores.read_mono(path, 16000, Listening())
        assert len(wav_N) == pytest.approx(2 * 16000, abs=2500)
        assert scores.describe(path)[:2] == (16000, 1)
        assert scores.describe(path)[2] == pytest.approx(2, abs=0.1)
    np.testing.assert_allclose(scores.read_mono(kept[1], 16000, Listening()), wav[:, 0], atol=1e-4)
    for path in (kept[0], kept[1]):
        cut_file(path)
        with pytest.raises(UserError, match=f"{path.name}: cannot be read .cut off"):
            scores.read_mono(path, 16000, Listening())


def test_loudness_is_levelled_if_asked(tmp_path):
    quiet, loud = (put(tmp_path / f"{g}.wav", g * tone(2.0), subtype="FLOAT") for g in (0.01, 1))
    level = Listening(lufs=-23)
    np.testing.assert_allclose(
        scores.read_mono(quiet, 16000, level), scores.read_mono(loud, 16000, level), atol=1e-4
    )
    assert scores.read_mono(quiet, 16000, Listening()).max() < 0.01


def test_clap_and_pairs_follow_the_ids():
    """Of a space with an axis a word: agreement is whatever the captions and clips say."""
    axes = {"low": [1.0, 0], "high": [0, 1.0]}
    embedder = Embedder(
        "toy", 8000, None, "", "", "all",
        embed_texts=lambda texts: np.array([axes[text] for text in texts]),
    )  # fmt: skip
    certain_PL = 20 * np.eye(2)[None]
    rows = {name: Embedded(np.array([axes[name]] * 3), certain_PL[:, i]) for i, name in
            enumerate(axes)}  # fmt: skip
    clips = Clips({}, {"x": rows["low"], "y": rows["high"]})
    reference = Clips({}, {"x": rows["low"], "y2": rows["high"]})

    def found(captions, pairs):
        return scores.score(
            embedder, clips, captions=captions, reference=reference, pairs=pairs,
            settings=scores.Settings(resamples=0),
        )  # fmt: skip

    right = found({"x": "low", "y": "high"}, {"x": "x", "y": "y2"})
    assert right["clap"]["value"] == pytest.approx(1) and right["clap"]["clips"] == 2
    assert right["kl"]["value"] == pytest.approx(0, abs=1e-5) and right["kl"]["clips"] == 2
    wrong = found({"x": "high", "y": "low"}, {"x": "y2", "y": "x"})
    assert wrong["clap"]["value"] == pytest.approx(0) and wrong["kl"]["value"] > 5
    half = found({"x": "low"}, {"y": "x"})
    assert half["clap"]["clips"] == 1 and half["kl"]["value"] > 5
    assert right["fad"]["value"] == wrong["fad"]["value"] == pytest.approx(0, abs=1e-9)
