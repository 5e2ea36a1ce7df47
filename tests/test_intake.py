"""One file as samples, or why not; in a process that may die of it."""

import os

import numpy as np
import pytest
from sounds import RATE, put, tone

from magnet_jax.errors import UserError
from tokenization import audio
from tokenization.audio import FileBytes, Intake, RejectedError, Track
from tokenization.decoder import Decoder, read_audio
from tokenization.listing import Source
from tokenization.sources import scan


@pytest.fixture(scope="module")
def decoder():
    with Decoder(60) as process:
        yield process


@pytest.fixture
def sound(decoder):
    """Reads a file, or a part of it, as [C, N]."""

    def read(path, channels=1, start=0.0, duration=None, **how):
        track = a_track(path, start=start, duration=duration)
        return read_audio(track, Intake(sample_rate=RATE, channels=channels, **how), decoder)[0]

    return read


def a_track(path, **how):
    place = FileBytes(path=os.fspath(path))
    return Track(path=path.name, track_id=path.stem, place=place, caption="a", info="{}", **how)


# --- formats ------------------------------------------------------------------------------------

FORMATS = [
    ("wav", {"subtype": "PCM_U8"}, 44100),
    ("wav", {"subtype": "PCM_16"}, 8000),
    ("wav", {"subtype": "PCM_24"}, 48000),
    ("wav", {"subtype": "PCM_32"}, 96000),
    ("wav", {"subtype": "FLOAT"}, 37800),
    ("wav", {"subtype": "DOUBLE"}, 16000),
    ("flac", {}, 44100),
    ("ogg", {}, 22050),
    ("opus", {"format": "OGG", "subtype": "OPUS"}, 48000),
    ("mp3", {}, 44100),
    ("aiff", {}, 11025),
    ("AIF", {"format": "AIFF"}, 32000),
    ("caf", {}, 44100),
    ("au", {}, 44100),
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "how", "rate"), FORMATS)
def test_every_format_gives_the_same_sound(tmp_path, suffix, how, rate, channels, sound):
    path = put(tmp_path / f"a.{suffix}", tone(1.5, rate, channels), rate, **how)
    assert [track.path for track in scan(Source(audio=tmp_path)).tracks] == [path.name]
    wav_CN = sound(path)
    expected = tone(1.5).T
    assert wav_CN.dtype == np.float32 and abs(wav_CN.shape[1] - expected.shape[1]) <= 400
    size = min(wav_CN.shape[1], expected.shape[1])
    error = wav_CN[:, :size] - expected[:, :size]
    # lossy formats come close, the others to a few 8-bit steps
    assert np.sqrt(np.mean(error**2)) < (0.02 if suffix in ("mp3", "ogg", "opus") else 0.006)


def test_channels_are_mixed(tmp_path, sound):
    left, right = tone(1.2, frequency=300), tone(1.2, frequency=500)
    path = put(tmp_path / "a.wav", np.hstack([left, right]), subtype="FLOAT")
    np.testing.assert_allclose(sound(path), (left + right).T / 2, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(sound(path, 2), np.hstack([left, right]).T)
    mono = put(tmp_path / "b.wav", left, subtype="FLOAT")
    np.testing.assert_array_equal(sound(mono, 2), np.hstack([left, left]).T)


def test_long_files_are_read_in_blocks_without_seams(tmp_path, sound):
    import soxr

    wav = tone(20, 44100)
    path = put(tmp_path / "a.wav", wav, 44100, subtype="FLOAT")
    np.testing.assert_allclose(
        sound(path)[0],
        soxr.resample(wav[:, 0], 44100, RATE, quality="VHQ"),
        rtol=0,
        atol=1e-6,
    )


def test_a_small_loss_is_not_a_cut_file(tmp_path, sound):
    path = put(tmp_path / "a.mp3", tone(1.5, 44100), 44100)
    path.write_bytes(path.read_bytes()[:-300])
    assert sound(path).shape[1] > 1.4 * RATE
    # a file that was streamed promises more than any file has
    path = put(tmp_path / "b.wav", tone(1.5))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    assert sound(path).shape == (1, 24000)


CUT = ["wav", "aiff", "au", "svx", "w64", "rf64", "voc", "wve", "mat4", "mp3", "ogg", "opus"]


@pytest.mark.parametrize("kind", CUT)
def test_half_a_file_is_cut_off_and_a_whole_one_is_not(tmp_path, kind, sound):
    how = {"format": {"opus": "OGG"}.get(kind, kind)}
    how |= {"subtype": {"opus": "OPUS", "wve": "ALAW", "svx": "PCM_16"}.get(kind)}
    rate = 8000 if kind == "wve" else RATE
    path = put(tmp_path / f"a.{kind}", tone(6, rate), rate, **how)
    data = path.read_bytes()
    assert sound(path).shape[1] == pytest.approx(6 * RATE, abs=400)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(RejectedError) as caught:
        sound(path)
    assert caught.value.reason == "cut off"
    if kind not in ("voc", "ogg", "opus"):  # these do not say how much is missing
        path.write_bytes(data[:-2])
        assert sound(path).shape[1] > 5.9 * RATE


def test_ogg_without_its_last_page_is_cut_off(tmp_path, sound):
    path = put(tmp_path / "a.ogg", tone(6))
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    with pytest.raises(RejectedError) as caught:
        sound(path)
    assert "the page that ends the stream" in caught.value.detail
    path.write_bytes(data + b"TAG" + b"\0" * 125)  # an ID3 tag behind the stream does no harm
    assert sound(path).shape[1] == pytest.approx(6 * RATE, abs=400)


def test_a_folder_that_cannot_be_listed_stops_the_job(tmp_path, monkeypatch):
    put(tmp_path / "sub" / "a.wav", tone(1.1))
    put(tmp_path / "b.wav", tone(1.1))
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"sub: cannot be listed \(Permission denied\)"):
        scan(Source(audio=tmp_path))


def test_a_file_that_cannot_be_opened_is_a_reject(tmp_path, monkeypatch):
    path = put(tmp_path / "a.wav", tone(1.1))

    def refuse(place):
        raise PermissionError(13, "Permission denied", place.path)

    monkeypatch.setattr(audio, "open_bytes", refuse)
    with pytest.raises(RejectedError) as caught:
        next(audio.decode(a_track(path), Intake(sample_rate=RATE, channels=1)))
    assert (caught.value.reason, caught.value.detail) == ("unreadable", "Permission denied")


def test_a_file_that_vanishes_is_no_reject(tmp_path, sound):
    with pytest.raises(UserError, match="vanished while the job ran"):
        sound(tmp_path / "gone.wav")
    with pytest.raises(RejectedError):
        sound(put(tmp_path / "a.wav", tone(0.5)))
