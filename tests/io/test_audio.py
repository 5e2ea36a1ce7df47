"""Writing audio: levels, formats, and nothing half-written."""

import warnings

import jax.numpy as jnp
import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch

from magnet_jax import audio_write
from magnet_jax.errors import UserError

RATE = 32_000


def noise(channels=1, seconds=3.0, level=0.05, rate=RATE):
    samples = np.random.default_rng(0).normal(size=(channels, round(seconds * rate)))
    return (level * np.clip(samples, -3, 3)).astype(np.float32)


def read(path):
    samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    return samples.T, rate


def decibels(value):
    return 20 * np.log10(value)


@pytest.mark.parametrize("channels", [1, 2])
def test_levels(tmp_path, channels):
    wav = noise(channels)

    def written(**options):
        return read(audio_write(tmp_path / "x", wav, RATE, **options))[0]

    assert decibels(abs(written()).max()) == pytest.approx(-1, abs=0.01)
    rms = np.sqrt(np.square(written(strategy="rms").mean(0)).mean())
    assert decibels(rms) == pytest.approx(-18, abs=0.01)
    np.testing.assert_allclose(written(strategy="none"), wav, atol=4e-5)
    # Without normalisation what is not too loud stays as it is.
    np.testing.assert_allclose(written(normalize=False), wav, atol=4e-5)
    loud, limit = wav * 20, 10 ** (-1 / 20)
    cut = read(audio_write(tmp_path / "x", loud, RATE, strategy="clip"))[0]
    np.testing.assert_allclose(cut, loud.clip(-limit, limit), atol=4e-5)
    turned_down = read(audio_write(tmp_path / "x", loud, RATE, normalize=False))[0]
    assert decibels(abs(turned_down).max()) == pytest.approx(-1, abs=0.01)
    loudness = pyloudnorm.Meter(RATE).integrated_loudness(written(strategy="loudness").T)
    assert loudness == pytest.approx(-14, abs=0.1)


def test_a_compressor_bends_what_would_be_cut(tmp_path, capsys):
    wav = noise()
    wav[0, 1000] = 1.0
    options = dict(strategy="loudness", loudness_headroom_db=6)
    cut = read(audio_write(tmp_path / "cut", wav, RATE, **options))[0]
    assert "cut.wav: peaks of" in capsys.readouterr().err
    bent = read(audio_write(tmp_path / "bent", wav, RATE, loudness_compressor=True, **options))[0]
    assert capsys.readouterr().err == ""
    assert (abs(cut) > 0.999).sum() > 5
    assert np.abs(bent).max() <= 1 and np.abs(bent - cut).max() > 0.05


@pytest.mark.parametrize("wav", [noise(level=1e-4), noise(seconds=0.2), np.zeros((1, RATE))])
def test_silence_and_short_clips_keep_their_loudness(tmp_path, wav):
    found = read(audio_write(tmp_path / "x", wav, RATE, strategy="loudness"))[0]
    np.testing.assert_allclose(found, wav, atol=4e-5)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(tmp_path, format, channels):
    path = audio_write(tmp_path / "a.b", noise(channels), RATE, format=format)
    assert path.name == f"a.b.{format}"
    found, rate = read(path)
    assert rate == RATE and len(found) == channels
    assert abs(found.shape[1] - 3 * RATE) < 2500  # MP3 pads to whole frames
    assert soundfile.info(path).format == format.upper()


@pytest.mark.parametrize("rate", [32_000, 44_100, 16_000])
def test_mp3_has_its_highest_rate(tmp_path, rate):
    path = audio_write(tmp_path / "x", noise(seconds=8, rate=rate), rate, "mp3")
    wanted = 160 if rate == 16_000 else 320
    assert path.stat().st_size * 8 / 8 / 1000 == pytest.approx(wanted, rel=0.03)


def test_minutes_of_vorbis(tmp_path):
    # Handed over at once, this much ends the process.
    path = audio_write(tmp_path / "x", noise(2, seconds=120), RATE, format="ogg")
    assert soundfile.info(path).frames == 120 * RATE


@pytest.mark.parametrize("kind", [jnp.asarray, torch.tensor, np.float16, np.float64, jnp.bfloat16])
def test_arrays_of_all_kinds(tmp_path, kind):
    wav = noise(2)
    found = read(audio_write(tmp_path / "x", kind(wav), RATE, strategy="none"))[0]
    np.testing.assert_allclose(found, wav, atol=1e-3)


def test_names_and_folders(tmp_path):
    assert audio_write(tmp_path / "new" / "x.wav", noise()[0], RATE, add_suffix=False).exists()


@pytest.mark.parametrize(
    ("wav", "options", "complaint"),
    [
        (np.zeros((1, 9), np.int16), {}, "must be floating-point"),
        (np.zeros((1, 1, 9)), {}, "must be floating-point"),
        (np.zeros((1, 0)), {}, "must be floating-point"),
        ([[0.1, 0.2], [0.3]], {}, "cannot be made a NumPy array"),
        (torch.zeros(9, requires_grad=True), {}, "cannot be made a NumPy array"),
        (np.full((1, 9), 1e300), {}, "infinite"),
        *[
            (np.array([0.1, value]), {"strategy": strategy}, "NaN or infinite")
            for value in (np.nan, np.inf)
            for strategy in ("peak", "clip", "rms", "loudness", "none")
        ],
        (np.zeros((6, RATE)), {"strategy": "loudness"}, "at most 5 channels"),
        (np.zeros((3, 9)), {"format": "mp3"}, "cannot be written at 32000 Hz in 3 channels"),
        (np.zeros((1, 9)), {"sample_rate": 0, "strategy": "loudness"}, "sample_rate must be"),
        (np.zeros((1, 9)), {"format": "ogg", "sample_rate": 300_000}, "up to 200000 Hz"),
        (np.zeros((1, 9)), {"sample_rate": 1.5}, "sample_rate must be"),
        (np.zeros((1, 9)), {"format": "wma"}, "format must be one of wav"),
        (np.zeros((1, 9)), {"strategy": "loud"}, "strategy must be one of peak"),
        (np.zeros((1, 9)), {"format": "mp3", "sample_rate": 96_000}, "cannot be written at 96000"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, capsys, wav, options, complaint):
    with warnings.catch_warnings(), pytest.raises(UserError, match=complaint) as error:
        warnings.simplefilter("error")
        audio_write(tmp_path / "x", wav, **{"sample_rate": RATE} | options)
    assert "\n" not in str(error.value) and not capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["wav", "mp3"])
def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch, format):
    written = []

    def half(self, samples):
        written.append(len(samples))
        if len(written) > 1:
            raise OSError(28, "No space left on device", str(self.name))
        whole(self, samples)

    before = audio_write(tmp_path / "x", noise(), RATE, format).read_bytes()
    whole = soundfile.SoundFile.write
    monkeypatch.setattr(soundfile.SoundFile, "write", half)
    with pytest.raises(OSError, match="No space"):
        audio_write(tmp_path / "x", noise(level=0.1), RATE, format)
    assert len(written) == 2
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == before  # the older file, as it was
