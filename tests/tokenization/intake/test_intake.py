"""One file as samples, or why not; in a process that may die of it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE, cut_file, put, put_with_ffmpeg, tone
from tokenizing import measure, read_audio, read_header

from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import formats
from tokenization.intake import audio
from tokenization.intake import decoder as decoder_module
from tokenization.intake.audio import Intake, RejectedError
from tokenization.intake.decoder import Decoder, open_audio, readers
from tokenization.source import captions, paths
from tokenization.source.scan import scan
from tokenization.source.settings import Source
from tokenization.track import FileBytes, Track, rejected


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
    texts = {"captions": ("a",), "fields": "{}"}
    return Track(path=path.name, track_id=path.stem, place=place, **texts, **how)


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


def test_an_ogg_file_may_end_with_any_whole_page(tmp_path, sound):
    path = put(tmp_path / "a.ogg", tone(6))
    data = path.read_bytes()
    path.write_bytes(data + b"TAG" + b"\0" * 125)  # an ID3 tag behind the stream does no harm
    assert sound(path).shape[1] == pytest.approx(6 * RATE, abs=400)
    # FFmpeg cuts streams into files whose last page does not say that it is the last. Nobody can
    # tell those from a file that was cut between two pages.
    last = data.rindex(b"OggS")
    path.write_bytes(data[:last])
    assert 4 * RATE < sound(path).shape[1] < 6 * RATE
    path.write_bytes(data[: last + 200])
    with pytest.raises(RejectedError) as caught:
        sound(path)
    assert (caught.value.reason, caught.value.detail) == ("cut off", "ends within a page")
    # a packet of which there is more on the page that is missing: its last piece has 255 bytes
    before = data.rindex(b"OggS", 0, last)
    more = bytearray(data[:last] + b"\xff" * 255)
    more[before + 26] += 1
    more.insert(before + 26 + more[before + 26], 255)
    path.write_bytes(more)
    with pytest.raises(RejectedError) as caught:
        sound(path)
    assert (caught.value.reason, caught.value.detail) == ("cut off", "ends within a packet")


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


OUTAGES = [(errno.ENOTCONN, None, True), (errno.EIO, "a.wav", True), (errno.EIO, None, False)]


@pytest.mark.parametrize(("number", "name", "is_outage"), OUTAGES)
def test_a_file_out_of_reach_is_no_reject(tmp_path, monkeypatch, number, name, is_outage):
    path = put(tmp_path / "a.wav", tone(1.1))
    error = OSError(number, os.strerror(number), name)

    def refuse(*how):
        raise error

    places = [(audio, "open_bytes"), (paths, "range_ends"), (captions, "open_regular")]
    for module, function in places:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, refuse)
            if module is not audio and is_outage:
                with pytest.raises(PassingError, match=f"out of reach .{os.strerror(number)}"):
                    scan(Source(audio=tmp_path))
            elif module is not audio:
                (reject,) = scan(Source(audio=tmp_path)).rejects
                assert reject.reason in ("unreadable", "no caption")
            else:
                with pytest.raises(OSError if is_outage else RejectedError) as caught:
                    next(audio.decode(a_track(path), INTAKE))
                assert not is_outage or caught.value is error


def test_a_file_that_vanishes_is_no_reject(tmp_path, sound):
    with pytest.raises(UserError, match="vanished while the job ran"):
        sound(tmp_path / "gone.wav")
    with pytest.raises(RejectedError):
        sound(put(tmp_path / "a.wav", tone(0.5)))


# --- what libsndfile does not read --------------------------------------------------------------

FFMPEG = [
    ("m4a", "aac", {}),
    ("mp4", "aac", {"picture": True}),
    ("mov", "pcm_s16le", {}),
    ("webm", "libopus", {}),
    ("mka", "flac", {}),
    ("wma", "wmav2", {}),
    ("aac", "aac", {}),
    ("wv", "wavpack", {}),
]


@pytest.mark.parametrize(("suffix", "codec", "how"), FFMPEG)
def test_formats_of_ffmpeg(tmp_path, decoder, sound, suffix, codec, how):
    wav = tone(6, 48000)
    path = put_with_ffmpeg(tmp_path / f"a.{suffix}", wav, 48000, codec, **how)
    (track,) = scan(Source(audio=tmp_path)).tracks
    wav_CN, facts = read_audio(track, Intake(sample_rate=None, channels=1), decoder)
    assert facts.sample_rate == 48000 and codec.removeprefix("lib") in facts.format
    assert facts.seconds == pytest.approx(6, abs=0.05)
    # raw AAC begins with what its encoder put before, FFmpeg's WMA lacks its first frame
    lag = {"aac": 1024, "wma": -2048}.get(suffix, 0)
    size = 5 * 48000
    error = wav_CN[0, 4096 + lag : 4096 + lag + size] - wav[4096 : 4096 + size, 0]
    assert np.sqrt(np.mean(error**2)) < 0.01
    if (seconds := read_header(track, INTAKE, decoder).seconds) is not None:
        assert seconds == pytest.approx(6, abs=0.05)
    # a part is that part; the times of some containers are whole milliseconds
    part = sound(path, start=3.5, duration=1.0)[0]
    whole = sound(path)[0]
    shifts = [np.abs(part[100:-100] - whole[56000 + k + 100 :][:15800]).max() for k in range(-9, 9)]
    assert part.shape == (RATE,) and min(shifts) < 0.01
    # half of it
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RejectedError) as caught:
        sound(path)
    # where the index comes last there is nothing to tell more from
    no_index = suffix in ("m4a", "mp4", "mov")
    assert caught.value.reason == ("unreadable" if no_index else "cut off")


def test_a_cut_file_that_begins_with_its_index_is_cut_off(tmp_path, sound):
    how = {"options": {"movflags": "faststart"}}
    path = put_with_ffmpeg(tmp_path / "a.m4a", tone(6, 48000), 48000, "aac", **how)
    cut_file(path)
    with pytest.raises(RejectedError, match="cut off"):
        sound(path)


def test_odd_mp3_files_are_read(tmp_path, sound):
    data = put(tmp_path / "a.mp3", tone(3, 44100), 44100).read_bytes()
    expected = sound(tmp_path / "a.mp3")
    # zeros before it; a tag of 16 KiB with nothing in it; the suffix of another format
    tag = b"ID3\4\0\0\0\1\0\0" + bytes(2**14)
    for name, content in [("b.mp3", bytes(5000) + data), ("c.mp3", tag + data), ("d.wav", data)]:
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(sound(tmp_path / name), expected)


def test_files_that_point_to_others_lead_nowhere(tmp_path, sound):
    secret = put_with_ffmpeg(tmp_path / "secret.m4a", tone(3, 48000), 48000, "aac")
    playlists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {secret}\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        "text": "no sound at all",
    }
    for name, content in playlists.items():
        path = tmp_path / f"{name}.m4a"
        path.write_text(content)
        with pytest.raises(RejectedError) as caught:
            sound(path)
        assert caught.value.reason == "unreadable"
        assert "neither libsndfile nor FFmpeg reads it" in caught.value.detail
    video = put_with_ffmpeg(tmp_path / "v.mp4", tone(1), RATE, "aac", picture=True)
    assert sound(video).shape[1] >= RATE


# --- files of which libsndfile would read the beginning alone ------------------------------------


@pytest.fixture(scope="module")
def guessed_mp3(tmp_path_factory):
    """A loud half and a quiet one as MP3 of variable bit rate, without a header of its length."""
    rng = np.random.default_rng(0)
    wav = np.concatenate([rng.normal(0, 0.2, 6 * 44100), 0.001 * rng.normal(0, 0.2, 6 * 44100)])
    how = {"options": {"write_xing": "0"}, "quality": 2}
    path = tmp_path_factory.mktemp("mp3") / "a.mp3"
    put_with_ffmpeg(path, wav[:, None].astype(np.float32), 44100, "libmp3lame", **how)
    with soundfile.SoundFile(path) as file:
        assert file.frames < 8 * 44100  # or this would test nothing
    return path


def test_mp3_without_a_header_is_read_to_its_end(guessed_mp3, tmp_path, decoder, sound):
    wav_CN, facts = read_audio(a_track(guessed_mp3), INTAKE, decoder)
    assert facts.seconds == pytest.approx(12, abs=0.1)
    assert wav_CN[0, :RATE].std() > 100 * wav_CN[0, -RATE:].std() > 0
    part = sound(guessed_mp3, start=5.0, duration=3.0)
    assert part.shape == (1, 3 * RATE) and part[0, :8000].std() > 100 * part[0, -8000:].std()
    # tags and padding at the end are no damage, what lies in between is
    data = guessed_mp3.read_bytes()
    for i, end in enumerate((b"TAG" + bytes(125), bytes(5000), b"some words " * 50)):
        (tmp_path / f"{i}.mp3").write_bytes(data + end)
        np.testing.assert_array_equal(sound(tmp_path / f"{i}.mp3"), wav_CN)
    half = len(data) // 2
    (tmp_path / "damaged.mp3").write_bytes(data[:half] + bytes(20_000) + data[half:])
    with pytest.raises(RejectedError, match="unreadable"):
        sound(tmp_path / "damaged.mp3")


def test_mp3_behind_mp3_is_read_to_its_end(tmp_path, sound):
    parts = [
        put(tmp_path / f"{n}.mp3", tone(n, 44100, frequency=f), 44100).read_bytes()
        for n, f in ((3, 300), (4, 500))
    ]
    tag = b"ID3\4\0\0\0\0\x10\0" + b"TIT2" + b"a" * 2044
    (tmp_path / "both.mp3").write_bytes(parts[0] + tag + parts[1])
    wav_CN = sound(tmp_path / "both.mp3")
    assert wav_CN.shape[1] == pytest.approx(7 * RATE, abs=0.15 * RATE)
    spectrum = np.abs(np.fft.rfft(wav_CN[0, -2 * RATE : -RATE]))
    assert spectrum.argmax() == pytest.approx(500, abs=2)
    part = sound(tmp_path / "both.mp3", start=5.0, duration=1.0)
    np.testing.assert_allclose(part[0, 50:-50], wav_CN[0, 5 * RATE + 50 : 6 * RATE - 50], atol=0.01)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_of_several_streams_is_read_to_its_end(tmp_path, sound, subtype):
    how = {"format": "OGG", "subtype": subtype}
    first = put(tmp_path / "a.ogg", tone(2, 48000, frequency=300), 48000, **how)
    second = put(tmp_path / "b.ogg", tone(3, 48000, frequency=500), 48000, **how)
    chained = tmp_path / "chained.ogg"
    chained.write_bytes(first.read_bytes() + second.read_bytes())
    wav_CN = sound(chained)
    assert wav_CN.shape[1] == pytest.approx(5 * RATE, abs=400)
    error = wav_CN[0, -2 * RATE : -RATE] - tone(3, frequency=500)[-2 * RATE : -RATE, 0]
    assert np.sqrt(np.mean(error**2)) < 0.02
    part = sound(chained, start=3.5, duration=1.0)
    expected = wav_CN[0, 3 * RATE + 8050 : 4 * RATE + 7950]
    np.testing.assert_allclose(part[0, 50:-50], expected, atol=0.01)
    data = chained.read_bytes()
    chained.write_bytes(data[: data.rindex(b"OggS") + 100])
    with pytest.raises(RejectedError, match="cut off"):
        sound(chained)


# --- channels, levels, clipping -----------------------------------------------------------------


def test_channels_are_mixed_as_audiocraft_does(tmp_path, sound):
    wav = np.hstack([tone(1.2, frequency=300 + 50 * i) for i in range(6)])
    path = put(tmp_path / "a.wav", wav, subtype="FLOAT")
    np.testing.assert_allclose(sound(path, 1), wav.mean(1)[None], atol=1e-6)
    np.testing.assert_array_equal(sound(path, 2), wav[:, :2].T)
    stereo = put(tmp_path / "b.wav", wav[:, :2], subtype="FLOAT")
    with pytest.raises(RejectedError, match="too few channels"):
        sound(stereo, 6)


@pytest.mark.parametrize("suffix", ["wav", "aac"])  # the header of AAC does not tell
def test_long_tracks_are_rejected_at_once(tmp_path, decoder, suffix):
    wav = tone(60, 48000)
    if suffix == "aac":
        path = put_with_ffmpeg(tmp_path / "a.aac", wav, 48000, "aac")
    else:
        path = put(tmp_path / "a.wav", wav, 48000)
    intake = Intake(sample_rate=RATE, channels=1, max_track_seconds=20)
    blocks = open_audio(a_track(path), intake, decoder)
    seconds = 0.0
    with pytest.raises(RejectedError, match="too long"):
        for block in blocks:
            seconds += block.shape[1] / RATE
    assert seconds == 0 if suffix == "wav" else 10 < seconds < 20
    if suffix == "wav":
        with pytest.raises(RejectedError, match="too long"):
            read_header(a_track(path), intake, decoder)
    assert measure(a_track(path, start=5, duration=20), intake, decoder).seconds == 20


@pytest.mark.parametrize("suffix", ["wav", "m4a", "aac"])
@pytest.mark.parametrize("start", [1e15, 1e306])
def test_parts_far_beyond_the_file_are_rejects(tmp_path, decoder, suffix, start):
    wav = tone(3, 48000)
    path = tmp_path / f"a.{suffix}"
    put(path, wav, 48000) if suffix == "wav" else put_with_ffmpeg(path, wav, 48000, "aac")
    track = a_track(path, start=start, duration=1.0)
    # (the header of raw AAC does not say where it ends)
    for read in (measure,) if suffix == "aac" else (measure, read_header):
        with pytest.raises(RejectedError) as caught:
            read(track, INTAKE, decoder)
        assert caught.value.reason in ("unreadable", "outside the file")
        assert rejected(track, caught.value).detail.endswith("(a)")  # which part


def test_clipping_is_measured_and_rejected_only_where_asked(tmp_path, decoder):
    rng = np.random.default_rng(0)
    clean = 0.2 * rng.normal(size=(3 * RATE, 2)).clip(-4, 4)
    cases = {"clean": clean, "peaks": clean.copy(), "clipped": clean.copy()}
    cases["peaks"][::100, 0] = 1.0  # alone
    cases["clipped"][1000 : 1000 + 4800, 1] = 1.0  # a tenth of one channel, over several blocks
    cases["clipped"][-4800:, 1] = -1.0
    facts = {}
    for name, wav in cases.items():
        for suffix, subtype in [("wav", "PCM_16"), ("u8.wav", "PCM_U8"), ("flac", "PCM_24")]:
            path = put(tmp_path / f"{name}.{suffix}", wav, subtype=subtype)
            facts[name] = measure(a_track(path), Intake(sample_rate=RATE, channels=1), decoder)
            expected = 2 * (4800 - 2) / (2 * 3 * RATE) if name == "clipped" else 0
            assert facts[name].clipped == pytest.approx(expected, abs=1e-6), path
    assert facts["clean"].clipped <= audio.CLIPPED < facts["clipped"].clipped
    strict = Intake(sample_rate=RATE, channels=1, max_clipped=0.05)
    with pytest.raises(RejectedError, match="clipped"):
        measure(a_track(tmp_path / "clipped.wav"), strict, decoder)
    measure(a_track(tmp_path / "peaks.wav"), strict, decoder)


def test_clipping_does_not_depend_on_blocks(tmp_path, decoder, monkeypatch):
    wav = tone(0.25)
    wav[990:1003] = 1.0
    path = put(tmp_path / "a.wav", wav, subtype="FLOAT")
    intake = Intake(sample_rate=None, channels=1, min_seconds=0.1)
    for block in (1, 7, 1000, 4000):
        monkeypatch.setattr(formats, "BLOCK", block)
        blocks = audio.decode(a_track(path), intake)
        with pytest.raises(StopIteration) as end:
            while True:
                next(blocks)
        assert end.value.value.clipped == 11 / 4000


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_odd_rates_come_of_damaged_headers(tmp_path, sound, rate):
    path = put(tmp_path / "a.wav", tone(2))
    data = bytearray(path.read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(RejectedError) as caught:
        sound(path)
    assert (caught.value.reason, caught.value.detail) == ("odd sample rate", f"{rate} Hz")


def test_the_level_is_that_of_the_sound(tmp_path, decoder):
    wav = 0.25 + 0.1 * np.sin(np.arange(2 * RATE) * 0.3)[:, None]
    path = put(tmp_path / "a.wav", wav, subtype="FLOAT")
    facts = measure(a_track(path), Intake(sample_rate=RATE, channels=2), decoder)
    assert facts.level == pytest.approx(20 * np.log10(0.1 / 2**0.5), abs=0.01)
    assert (facts.format, facts.channels, facts.seconds) == ("WAV float", 1, 2.0)


# --- streaming, and decoders that die -----------------------------------------------------------


def test_a_long_file_takes_little_memory(tmp_path):
    """Twenty minutes of stereo are 420 MB as numbers."""
    path = tmp_path / "long.wav"
    minute = np.tile(tone(1, 44100, 2), (60, 1))
    with soundfile.SoundFile(path, "w", 44100, 2, subtype="PCM_U8") as file:
        for _ in range(20):
            file.write(minute)
    with Decoder(60) as process:
        stream = open_audio(a_track(path), Intake(sample_rate=RATE, channels=2), process)
        largest = total = 0
        for block in stream:
            assert block.shape[0] == 2 and block.dtype == np.float32
            largest, total = max(largest, block.shape[1]), total + block.shape[1]
        assert total == 20 * 60 * RATE and stream.facts.seconds == 1200
        assert largest < 2**17
        status = Path(f"/proc/{process._process.pid}/status").read_text()
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        assert int(peak) < 200_000  # KiB


@pytest.fixture
def fragile(monkeypatch):
    path = str(Path(__file__).parents[2].joinpath("stand_in_decoder.py"))
    monkeypatch.setattr(decoder_module, "PROGRAM", (path,))
    with Decoder(1.5) as process:
        yield process


INTAKE = Intake(sample_rate=RATE, channels=1)


def test_a_decoder_that_dies_is_a_reject_and_another_takes_over(tmp_path, fragile):
    good = a_track(put(tmp_path / "good.wav", tone(20)))
    expected, _ = read_audio(good, INTAKE, fragile)
    for name, reason, detail in [
        ("abort", "decoder crashed", "SIGABRT"),
        ("segfault", "decoder crashed", "SIGSEGV"),
        ("exit", "decoder crashed", "exit status 3"),
        ("hang", "decoder hung", "no progress within 1.5 s"),
        ("late_hang", "decoder hung", "no progress within 1.5 s"),
        ("memory", "unreadable", "asks for more memory than there is"),
        ("greedy", "unreadable", "asks for more memory than there is"),
        ("bug", "decoder failed", "ZeroDivisionError"),
    ]:
        bad = a_track(put(tmp_path / f"{name}.wav", tone(20)))
        for read in (read_audio, measure):
            began = time.monotonic()
            with pytest.raises(RejectedError) as caught:
                read(bad, INTAKE, fragile)
            assert (caught.value.reason, caught.value.detail) == (reason, detail)
            assert time.monotonic() - began < 30
            if name != "abort":
                break
        np.testing.assert_array_equal(read_audio(good, INTAKE, fragile)[0], expected)


def test_a_second_try_goes_on_where_the_first_one_died(tmp_path, fragile):
    good = a_track(put(tmp_path / "good.wav", tone(20)))
    expected, facts = read_audio(good, INTAKE, fragile)
    for how in ("sigterm", "sigkill", "hang"):
        for when in ("once", "once_late"):
            track = a_track(put(tmp_path / f"{when}_{how}.wav", tone(20)))
            wav_CN, again = read_audio(track, INTAKE, fragile)
            np.testing.assert_array_equal(wav_CN, expected)
            assert again == facts and Path(f"{track.place.path}.tried").exists()
    # what kills processes like this is no file
    killed = a_track(put(tmp_path / "sigkill.wav", tone(2)))
    with pytest.raises(UserError, match="was killed, twice: out of memory"):
        read_audio(killed, INTAKE, fragile)
    np.testing.assert_array_equal(read_audio(good, INTAKE, fragile)[0], expected)


def test_whoever_stops_reading_gets_the_next_track_all_the_same(tmp_path, decoder):
    long, short = (a_track(put(tmp_path / f"{n}.wav", tone(n))) for n in (60, 2))
    first = next(iter(open_audio(long, INTAKE, decoder)))
    assert 0 < first.shape[1] < 60 * RATE
    np.testing.assert_allclose(read_audio(short, INTAKE, decoder)[0], tone(2).T, atol=1e-4)


def test_a_decoder_that_is_ended_between_two_tracks_is_started_again(tmp_path, decoder):
    track = a_track(put(tmp_path / "a.wav", tone(2)))
    for _ in range(2):
        assert measure(track, INTAKE, decoder).seconds == 2.0
        os.kill(decoder._process.pid, signal.SIGKILL)
        decoder._process.wait()
    assert read_header(track, INTAKE, decoder).seconds == 2.0


def test_readers_share_the_work_and_end_at_once(tmp_path, fragile):
    tracks = [a_track(put(tmp_path / f"{i}.wav", tone(1 + i / 10))) for i in range(6)]
    tracks.insert(2, a_track(put(tmp_path / "abort.wav", tone(1))))
    with readers(2, 60) as submit:
        found = [submit(measure, track, INTAKE) for track in tracks]
        lengths = [None if f.exception() else round(f.result().seconds, 3) for f in found]
    assert lengths == [1.0, 1.1, None, 1.2, 1.3, 1.4, 1.5]
    began = time.monotonic()
    hanging = a_track(put(tmp_path / "hang.wav", tone(1)))
    with pytest.raises(KeyboardInterrupt), readers(2, 60) as submit:
        late = [submit(measure, hanging, INTAKE) for _ in range(5)]
        time.sleep(2)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30 and all(future.done() for future in late)
    # not even one that is about to start goes on
    process = Decoder(60)
    process.kill()
    with pytest.raises(UserError, match="was ended"):
        measure(tracks[0], INTAKE, process)


def test_a_decoder_ends_with_its_parent(tmp_path):
    program = (
        "import time; from tokenization.intake.decoder import Decoder; d = Decoder(60); "
        "d._start(); print(d._process.pid, flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(child, 0)
            time.sleep(0.05)


def test_a_track_left_in_the_middle_leaves_nothing_to_the_next(tmp_path, decoder):
    left = a_track(put(tmp_path / "left.wav", tone(60, frequency=300)))
    next_ = a_track(put(tmp_path / "next.wav", tone(60, frequency=500)))
    expected, _ = read_audio(next_, INTAKE, decoder)
    held = iter(open_audio(left, INTAKE, decoder))
    next(held)  # as the frames of an exception may hold it
    blocks = iter(open_audio(next_, INTAKE, decoder))
    first = next(blocks)
    held.close()
    del held
    np.testing.assert_array_equal(np.concatenate([first, *blocks], axis=1), expected)


def test_an_outage_ends_the_job_and_not_the_file(tmp_path, fragile):
    path = put(tmp_path / "outage.wav", tone(2))
    for read in (read_audio, measure):
        with pytest.raises(PassingError, match="outage.wav: Transport endpoint is not connected; "):
            read(a_track(path), INTAKE, fragile)
    good = a_track(put(tmp_path / "good.wav", tone(2)))
    assert read_audio(good, INTAKE, fragile)[0].shape == (1, 2 * RATE)


def test_a_decoder_that_cannot_start_is_an_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(decoder_module, "PROGRAM", ("-c", "import nothing_of_this_name"))
    with Decoder(60) as process, pytest.raises(UserError, match="did not start"):
        read_audio(a_track(put(tmp_path / "a.wav", tone(1))), INTAKE, process)
    assert "No module named 'nothing_of_this_name'" in capfd.readouterr().err
