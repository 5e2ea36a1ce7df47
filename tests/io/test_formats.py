"""Any file of sound gives the whole sound at its own speed, or the reason why not."""

import base64
import io
import shutil
import struct
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from sounds import RATE, cut_file, put, put_with_ffmpeg, tone

from magnet_jax.io import formats
from magnet_jax.io.formats import RejectedError, open_sound, read_whole


def steady(seconds, rate, channels=1):
    wav = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wav[:, None], channels, axis=1).astype(np.float32)


def pitch(wav_N, rate):
    """Of the last second but the very end, in Hz."""
    second = wav_N[-round(1.1 * rate) : -round(0.1 * rate)]
    return np.abs(np.fft.rfft(second * np.hanning(len(second)))).argmax()


def packets_of(stream, wav):
    """[n, channels] as the stream's codec has it."""
    if stream.codec_context.format is None:
        stream.format = "s16"
    layout = ("mono", "stereo")[wav.shape[1] - 1]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav.T), "fltp", layout)
    frame.sample_rate, frame.pts = stream.rate, 0
    stream.bit_rate = 128_000
    size = stream.codec_context.frame_size or 1024
    convert = av.AudioResampler(stream.codec_context.format, frame_size=size)
    parts = (*convert.resample(frame), *convert.resample(None), None)
    return [packet for part in parts for packet in stream.encode(part)]


def encoded(path, codec, rate, channels=1, seconds=3.0, **how):
    wav = steady(seconds, rate, channels)
    if codec in ("FLAC", "VORBIS", "OPUS"):
        kind = "FLAC" if codec == "FLAC" else "OGG"
        return put(path, wav, rate, None, format=kind, subtype=None if codec == "FLAC" else codec)
    with av.open(str(path), "w", **how) as container:
        stream = container.add_stream(codec, rate=rate, layout=("mono", "stereo")[channels - 1])
        container.mux(packets_of(stream, wav))
    return path


def joined(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


# --- rates and channels that change ---------------------------------------------------------------

JOINED = [
    ("mp3", "libmp3lame"),
    ("aac", "aac"),
    ("flac", "FLAC"),
    ("ogg", "VORBIS"),
    ("mp2", "mp2"),
    ("ac3", "ac3"),
]


@pytest.mark.parametrize("rates", [(44100, 32000), (32000, 44100), (48000, 48000)])
@pytest.mark.parametrize(("suffix", "codec"), JOINED)
def test_a_rate_that_changes_midway_changes_no_pitch(tmp_path, suffix, codec, rates):
    parts = [encoded(tmp_path / f"{i}.{suffix}", codec, rate) for i, rate in enumerate(rates)]
    path = joined(tmp_path / f"c.{suffix}", *parts)
    (wav_N,), rate = read_whole(str(path))
    assert rate == rates[0]
    assert len(wav_N) / rate == pytest.approx(6, abs=0.15)
    assert pitch(wav_N, rate) == pytest.approx(440, abs=1)
    assert pitch(wav_N[: 2 * rate], rate) == pytest.approx(440, abs=1)
    level = 0.3 / 2**0.5
    for second in (wav_N[rate : 2 * rate], wav_N[-2 * rate : -rate]):
        assert second.std() == pytest.approx(level, rel=0.06)  # LAME makes things softer
    with open_sound(str(path)) as sound:  # a part is that part
        (part,) = np.concatenate(list(sound.read(4 * rate, rate))).T
    assert len(part) == rate and part.std() == pytest.approx(level, rel=0.06)
    assert pitch(np.tile(part, 2), rate) == pytest.approx(440, abs=1)


@pytest.mark.parametrize("channels", [(1, 2), (2, 1)])
@pytest.mark.parametrize(("suffix", "codec"), JOINED)
def test_channels_that_change_midway_are_mixed(tmp_path, suffix, codec, channels):
    parts = [encoded(tmp_path / f"{n}.{suffix}", codec, 44100, n) for n in channels]
    wav_CN, rate = read_whole(str(joined(tmp_path / f"c.{suffix}", *parts)))
    assert wav_CN.shape[0] == 2 and wav_CN.shape[1] / rate == pytest.approx(6, abs=0.15)
    for at in (1, 4):
        second = wav_CN[:, at * rate : (at + 1) * rate]
        np.testing.assert_allclose(second[0], second[1], atol=0.05)
        assert second.std() == pytest.approx(0.3 / 2**0.5, rel=0.06)


def test_links_of_one_serial_number_are_read_to_the_end(tmp_path):
    first = encoded(tmp_path / "a.opus", "OPUS", 48000)
    (wav_N,), rate = read_whole(str(joined(tmp_path / "c.opus", first, first, first)))
    (once,), _ = read_whole(str(first))
    np.testing.assert_array_equal(wav_N, np.tile(once, 3))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("wav", "pcm_s16le"), ("aiff", "pcm_s16be"), ("caf", "pcm_s16be"), ("au", "pcm_s16be"),
     ("w64", "pcm_s16le"), ("voc", "pcm_s16le"), ("m4a", "aac"), ("mka", "libopus"), ("flv", "aac"),
     ("wma", "wmav2"), ("tta", "tta"), ("wv", "wavpack"), ("avi", "libmp3lame"), ("ts", "aac")],
)  # fmt: skip
def test_a_file_behind_another_is_read_too(tmp_path, suffix, codec):
    rates = (48000, 48000) if codec == "libopus" else (44100, 48000)
    parts = [encoded(tmp_path / f"{i}.{suffix}", codec, rate) for i, rate in enumerate(rates)]
    apart = [read_whole(str(part)) for part in parts]
    (wav_N,), rate = read_whole(str(joined(tmp_path / f"c.{suffix}", *parts)))
    seconds = sum(wav_CN.shape[1] / its_rate for wav_CN, its_rate in apart)
    assert rate == rates[0] and len(wav_N) / rate == pytest.approx(seconds, abs=0.05)
    np.testing.assert_array_equal(wav_N[:rate], apart[0][0][0, :rate])
    assert pitch(wav_N, rate) == pytest.approx(440, abs=1)
    assert wav_N[-2 * rate : -rate].std() == pytest.approx(0.3 / 2**0.5, rel=0.06)
    cut_file(parts[1])
    if suffix != "ts":  # it does not tell
        with pytest.raises(RejectedError):
            read_whole(str(joined(tmp_path / f"c.{suffix}", *parts)))


def tag(size, flags=0):
    """Of ID3v2, of so many bytes in all; flag 16 counts ten more at its end."""
    size -= 20 if flags & 16 else 10
    length = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    end = b"3DI\4\0\x10" + length if flags & 16 else b""
    return b"ID3\4\0" + bytes([flags]) + length + bytes(size) + end


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Three seconds each in a format, as bytes."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for kind, how in (("wav", {}), ("aiff", {}), ("flac", {}), ("ogg", {}), ("mp3", {})):
        found[kind] = put(folder / f"a.{kind}", steady(3, 48000), 48000, None, **how).read_bytes()
    for kind, codec in (("m4a", "aac"), ("aac", "aac"), ("wv", "wavpack")):
        found[kind] = encoded(folder / f"a.{kind}", codec, 48000).read_bytes()
    return found


@pytest.mark.parametrize(
    "order",
    ["mp3 flac", "mp3 wav", "mp3 m4a", "mp3 ogg", "mp3 wv", "flac mp3", "flac wav", "flac ogg",
     "wav flac", "wav mp3", "aiff wav", "m4a mp3", "m4a flac", "aac flac", "flac mp3 flac mp3"],
)  # fmt: skip
@pytest.mark.parametrize("between", [b"", tag(3000)])
def test_a_file_of_another_format_behind_is_read_too(tmp_path, kinds, order, between):
    path = tmp_path / f"a.{order.split()[0]}"
    path.write_bytes(between.join(kinds[kind] for kind in order.split()))
    (wav_N,), rate = read_whole(str(path))
    assert len(wav_N) / rate == pytest.approx(3 * len(order.split()), abs=0.1)
    for second in np.array_split(wav_N, len(wav_N) // rate):  # nothing is played as noise
        assert pitch(np.tile(second[:rate], 2), rate) == pytest.approx(440, abs=1)
    with open_sound(str(path)) as sound:
        (part,) = np.concatenate(list(sound.read(4 * rate, rate))).T
    assert len(part) == rate and part.std() == pytest.approx(0.3 / 2**0.5, rel=0.06)


def test_what_is_behind_an_mp3_and_cannot_be_read_is_no_tag(tmp_path, kinds):
    path = tmp_path / "a.mp3"
    words = np.random.default_rng(0).integers(32, 127, 100_000, np.uint8).tobytes()
    for end in (tag(100_000)[:10] + words, bytes(100_000), b"APETAGEX" + words, words[:20_000]):
        path.write_bytes(kinds["mp3"] + end)
        assert read_whole(str(path))[0].shape[1] == pytest.approx(3 * 48000, abs=100)
    for end in (kinds["aac"], words):
        path.write_bytes(kinds["mp3"] + end)
        with pytest.raises(RejectedError, match="bytes behind its sound are no MP3"):
            read_whole(str(path))


@pytest.mark.parametrize("kind", ["wav", "aiff", "flac", "ogg", "mp3", "m4a", "aac", "wv"])
def test_tags_before_a_sound_are_passed_over(tmp_path, kinds, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(kinds[kind])
    expected, rate = read_whole(str(path))
    for tags in (tag(2000), tag(300) + tag(20_000, 16)):
        path.write_bytes(tags + kinds[kind])
        found, its_rate = read_whole(str(path))
        assert its_rate == rate
        np.testing.assert_array_equal(found, expected)
        path.write_bytes(path.read_bytes()[: -len(kinds[kind]) // 2])
        with pytest.raises(RejectedError, match="unreadable" if kind == "m4a" else "cut off"):
            read_whole(str(path))
    for content, reason in ((tag(2000), "empty"), (tag(2000)[:-1], "cut off")):
        path.write_bytes(content)
        with pytest.raises(RejectedError, match=reason):
            read_whole(str(path))


# --- FLAC -----------------------------------------------------------------------------------------


def with_total(data, total):
    """FLAC with other total samples in its header: 36 bits, the last of bytes 18 to 26."""
    data = bytearray(data)
    data[18:26] = ((int.from_bytes(data[18:26]) >> 36 << 36) | total).to_bytes(8)
    return bytes(data)


@pytest.fixture(scope="module")
def noise_flac(tmp_path_factory):
    wav = 0.1 * np.random.default_rng(0).normal(size=(6 * RATE, 2)).clip(-4, 4)
    return put(tmp_path_factory.mktemp("flac") / "a.flac", wav, RATE, None)


@pytest.mark.parametrize("total", [0, 1, 6 * RATE // 4])
def test_flac_of_a_wrong_total_is_read_to_its_end(tmp_path, noise_flac, total):
    expected, _ = soundfile.read(noise_flac, dtype="float32")
    data = noise_flac.read_bytes()
    path = tmp_path / "a.flac"
    path.write_bytes(with_total(data, total))
    np.testing.assert_array_equal(read_whole(str(path))[0], expected.T)
    with open_sound(str(path)) as sound:
        part = np.concatenate(list(sound.read(4 * RATE, 1000)))
    np.testing.assert_array_equal(part, expected[4 * RATE : 4 * RATE + 1000])
    path.write_bytes(with_total(data, total)[: len(data) // 2])
    with pytest.raises(RejectedError, match="cut off"):
        read_whole(str(path))


@pytest.mark.parametrize("total", [0, 6 * RATE])
def test_damaged_flac_is_rejected(tmp_path, noise_flac, total):
    data = with_total(noise_flac.read_bytes(), total)
    half = len(data) // 2
    for i, damaged in enumerate(
        (data[:half] + bytes(100) + data[half + 100 :], data[:half] + bytes(9000) + data[half:])
    ):
        (tmp_path / f"{i}.flac").write_bytes(damaged)
        with pytest.raises(RejectedError, match="damaged"):
            read_whole(str(tmp_path / f"{i}.flac"))


def test_flac_behind_flac(tmp_path, noise_flac):
    expected, _ = soundfile.read(noise_flac, dtype="float32")
    path = joined(tmp_path / "b.flac", noise_flac, noise_flac)
    np.testing.assert_array_equal(read_whole(str(path))[0], np.tile(expected.T, 2))


@pytest.mark.parametrize("second", [(48000, 2), (32000, 1), (44100, 2), (96000, 2)])
@pytest.mark.parametrize("first", [(44100, 1), (32000, 1)])
def test_flac_behind_flac_of_another_rate_has_each_frame_once(tmp_path, first, second):
    """Where the frames of two rates come in one stream FFmpeg's parser gives some twice."""
    parts = [tmp_path / f"{i}.flac" for i in range(2)]
    for part, (rate, channels) in zip(parts, (first, second)):
        put(part, steady(3, rate, channels), rate, None)
    wav_CN, rate = read_whole(str(joined(tmp_path / "c.flac", *parts)))
    assert rate == first[0] and wav_CN.shape == (second[1], 6 * rate)
    expected = np.concatenate([steady(3, rate, second[1])] * 2).T
    around = np.r_[3 * rate - 50 : 3 * rate + 50, -50:0]  # what a resampler does to edges
    expected[:, around] = wav_CN[:, around]
    np.testing.assert_allclose(wav_CN, expected, atol=1e-3)


def test_headers_within_a_flac_are_no_files(tmp_path, noise_flac):
    """The flac program keeps the header of the WAV that it was given."""
    data = noise_flac.read_bytes()
    wav = b"riffRIFF\0\0\0\1WAVEfmt "
    block = b"\2" + len(wav).to_bytes(3) + wav
    (tmp_path / "a.flac").write_bytes(data[:42] + block + data[42:])
    data = read_whole(str(tmp_path / "a.flac"))[0]
    np.testing.assert_array_equal(data, read_whole(str(noise_flac))[0])


# --- containers whose header tells a time ---------------------------------------------------------


def muxed(path, codec, start, gap, seconds=6.0, rate=48000):
    """A tone that begins at a time, with as much nothing in its middle."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.time_base = Fraction(1, rate)
        packets = packets_of(stream, steady(seconds, rate))
        for i, packet in enumerate(packets):
            later = start + (gap if i >= len(packets) // 2 else 0)
            shift = round(later / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            container.mux(packet)
    return path


CONTAINERS = [
    ("mka", "libopus"),
    ("webm", "libopus"),
    ("mkv", "aac"),
    ("wma", "wmav2"),
    ("m4a", "aac"),
    ("mov", "aac"),
    ("flv", "aac"),
    ("avi", "libmp3lame"),
    ("avi", "ac3"),
]


@pytest.mark.parametrize(("start", "gap"), [(0, 0), (8, 0), (0, 2), (8, 2)])
@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_starts_and_gaps_are_no_loss(tmp_path, suffix, codec, start, gap):
    path = muxed(tmp_path / f"a.{suffix}", codec, start, gap)
    (wav_N,), rate = read_whole(str(path))
    # FFmpeg's WMA lacks its first frame
    assert len(wav_N) / rate == pytest.approx(6, abs=0.1)
    assert pitch(wav_N, rate) == pytest.approx(440, abs=1)
    cut_file(path)
    with pytest.raises(RejectedError) as caught:
        read_whole(str(path))
    assert caught.value.reason == ("unreadable" if suffix in ("m4a", "mov") else "cut off")


class Pipe(io.RawIOBase):
    """Nobody can go back in it."""

    def __init__(self):
        self.data = b""

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("size", [0, 2**32 - 1])
@pytest.mark.parametrize("codec", ["libmp3lame", "ac3", "pcm_s16le"])
def test_an_avi_that_went_through_a_pipe(tmp_path, codec, size):
    pipe, whole = Pipe(), encoded(tmp_path / "a.avi", codec, 48000)
    with av.open(str(whole)) as source, av.open(pipe, "w", format="avi") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = bytearray(pipe.data)
    for at in (4, data.index(b"movi") - 4):
        assert data[at : at + 4] == b"\xff" * 4
        data[at : at + 4] = size.to_bytes(4, "little")
    path = tmp_path / "b.avi"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_whole(str(path))[0], read_whole(str(whole))[0])
    path.write_bytes(data[: len(data) // 2 + 7])
    with pytest.raises(RejectedError, match="cut off"):
        read_whole(str(path))


# --- headers of plain samples ---------------------------------------------------------------------

HEADERS = {  # where the size of the sound is, with its bytes, their order, and what it counts more
    "wav": (lambda data: data.index(b"data") + 4, 4, "little", 0),
    "aiff": (lambda data: data.index(b"SSND") + 4, 4, "big", 8),
    "au": (lambda data: 8, 4, "big", 0),
    "caf": (lambda data: data.index(b"data") + 4, 8, "big", 4),
    "w64": (lambda data: data.index(b"data") + 16, 8, "little", 24),
    "rf64": (lambda data: data.index(b"ds64") + 16, 8, "little", 0),
}
TRAILER = {"little": b"LIST\x0c\0\0\0INFOabcd\0\0\0\0", "big": b"ANNO\0\0\0\x0cwords, words"}


def with_size(data, kind, size):
    where, width, order, more = HEADERS[kind]
    data, at = bytearray(data), where(data)
    size = size + more if size >= 0 else size
    data[at : at + width] = (size % 2 ** (8 * width)).to_bytes(width, order)
    return bytes(data)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_promise_too_little_or_do_not_tell(tmp_path, kind, channels):
    wav = (0.1 * np.random.default_rng(0).normal(size=(6 * RATE, channels))).clip(-1, 1)
    path = put(tmp_path / f"a.{kind}", wav, RATE, None, format=kind, subtype="PCM_16")
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    data = path.read_bytes()
    whole = data + b"\0" * (-len(data) % 8)
    ends = [b""]
    if kind in ("wav", "aiff", "rf64"):
        ends.append(TRAILER[HEADERS[kind][2]])
    for end in ends:
        # A quarter, nothing, the most there is; and the header as it is.
        for size in (len(wav) * channels * 2 // 4, 0, -1, None):
            data = (whole if size is None else with_size(whole, kind, size)) + end
            path.write_bytes(data)
            found, rate = read_whole(str(path))
            assert rate == RATE and found.shape[0] == channels
            # W64's padding may count as a sample or two
            assert 0 <= found.shape[1] - len(wav) <= 8, (size, end)
            np.testing.assert_array_equal(found[:, : len(wav)], expected.T)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RejectedError, match="cut off"):
        read_whole(str(path))


@pytest.mark.parametrize("size", [0x7F000000, 0x7FFFF000, 2**31 - 1, 2**32 - 40, 2**32 - 1])
def test_streamed_sizes_are_no_promise(tmp_path, size):
    path = put(tmp_path / "a.wav", tone(2), RATE, None)
    path.write_bytes(with_size(path.read_bytes(), "wav", size))
    assert read_whole(str(path))[0].shape == (1, 2 * RATE)
    path.write_bytes(with_size(path.read_bytes(), "wav", 3_000_000_000))
    with pytest.raises(RejectedError, match="cut off"):
        read_whole(str(path))


@pytest.mark.parametrize("tag", [b"ID3\3\0\0\0\0\x4e\x10", b"APETAGEX"])
def test_tags_behind_a_wav_are_no_sound(tmp_path, tag):
    path = put(tmp_path / "a.wav", tone(2), RATE, None)
    path.write_bytes(path.read_bytes() + tag + np.random.default_rng(0).bytes(10_000))
    assert read_whole(str(path))[0].shape == (1, 2 * RATE)


def test_an_empty_file_with_tags_is_empty(tmp_path):
    path = put(tmp_path / "a.wav", tone(0), RATE, None)
    path.write_bytes(path.read_bytes() + TRAILER["little"])
    with pytest.raises(RejectedError, match="empty"):
        read_whole(str(path))


def test_a_wav_beyond_4_gib_is_read_to_its_end(tmp_path):
    samples = 2**32 + 2**20
    path = tmp_path / "a.wav"
    put(path, tone(2), RATE, None)
    data = with_size(path.read_bytes(), "wav", samples % 2**32)
    end = (tone(2)[:, 0] * 2**15).astype("<i2").tobytes()
    with path.open("wb") as file:  # the middle takes no place on the disk
        file.write(data)
        file.seek(len(data) + 2**20)
        file.write(end)
        file.seek(44 + samples - len(end))
        file.write(end)
    with open_sound(str(path)) as sound:
        (found,) = np.concatenate(list(sound.read(samples // 2 - 2 * RATE, None))).T
    np.testing.assert_allclose(found, tone(2)[:, 0], atol=1e-4)


# --- codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", [0x1234, 0x7A21, 0x0270, 0x2000])
def test_a_codec_that_nobody_knows_is_rejected(tmp_path, tag):
    path = put(tmp_path / "a.wav", tone(2), RATE, None)
    data = bytearray(path.read_bytes())
    data[20:22] = tag.to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(RejectedError, match="unreadable.*FFmpeg"):
        read_whole(str(path))


def as_wav(path, data, rate):
    head = struct.pack("<IHHIIHH4sI", 16, 1, 2, rate, 4 * rate, 4, 16, b"data", len(data))
    path.write_bytes(b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + head + data)
    return path


def swapped(data):
    return np.frombuffer(data[: len(data) // 2 * 2], "<u2").byteswap().tobytes()


# 512 samples of a tone of 375 Hz at 48 kHz: four whole periods
DTS_FRAME = base64.b85decode(
    "fBt|0{5%zKH2?uP00HlVWq<$h5C8xG0aU4rLe_H(!5NHk6oUvt5QHHJLI3~&0YnfXVSo!70000$00|5<5b|U|5FiKu"
    "0ilWw7Yy||*^e-^VrdNZIoXdev|?!Cb8O*rZ1UW6?=8npm73a_DOs(llQf3Oc{GN}czkUq#?t$T3Vi#A3VoRBXBC+0"
    "XB3r7(y4hDNQ<R!Zvmiy&;Vzac`M|V@>9YI;R4_wTm%lz(GVga1pp`jj0nl6rk`J0XdwVs*ZqBceOK4l*TX$dc4N#f"
    "7@9*pPIhC=Ef|_OT-!KY+dQ`&JIis?rDnFKN>*!XWX&P6UQHpgULPAt@wC3-!k<3j!k=b3nZ;&0nZ+ei^r~J((jw_w"
    "+rVfbGyoapo=W*8e3bBlctE%a7Xbsav_uGq0YC}>BLXsM>8ID$ng~D@_5WXAUsd(>_5c6i"
)


def of_14_bits(data):
    """DTS as on CDs: the same bits, 14 in each word of 16."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, len(DTS_FRAME)), axis=1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 28))).reshape(-1, 14)
    words = bits @ (1 << np.arange(13, -1, -1))
    return np.where(words >= 2**13, words - 2**14, words).astype("<i2").tobytes()


def bursts(data, size):
    """AC-3 frames as IEC 61937 has them: a word each for sync, kind and length, then silence."""
    found = bytearray()
    for at in range(0, len(data) // size * size, size):
        burst = bytes.fromhex("72f81f4e0100") + struct.pack("<H", 8 * size)
        burst += swapped(data[at : at + size])
        found += burst.ljust(6144, b"\0")
    return bytes(found)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("film")
    ac3 = encoded(folder / "a.ac3", "ac3", 48000, 2, seconds=4).read_bytes()
    dts = 375 * DTS_FRAME
    size = len(ac3) // (len(ac3) // next(i for i in range(64, 4000) if ac3[i : i + 2] == ac3[:2]))
    return {"ac3": ac3, "dts": dts, "dts of 14 bits": of_14_bits(dts), "spdif": bursts(ac3, size)}


@pytest.mark.parametrize("silence", [0, 40_000])
@pytest.mark.parametrize("order", [bytes, swapped])
@pytest.mark.parametrize("kind", ["ac3", "dts", "dts of 14 bits", "spdif"])
def test_film_sound_in_a_wav_is_decoded_or_rejected(tmp_path, film, kind, order, silence):
    path = as_wav(tmp_path / "a.wav", bytes(4 * silence) + order(film[kind]), 48000)
    try:
        wav_CN, rate = read_whole(str(path))
    except RejectedError as error:
        assert error.reason == "not sound" and "DTS or Dolby Digital" in error.detail
    else:
        assert wav_CN.shape[1] / rate == pytest.approx(4, abs=0.1)
        assert pitch(wav_CN[0], rate) == pytest.approx(375 if "dts" in kind else 440, abs=1)
        level = 0.125 if "dts" in kind else 0.3
        assert wav_CN[:, rate : 2 * rate].std() == pytest.approx(level / 2**0.5, rel=0.1)
    # in a file of other plain samples there is nothing but noise
    samples = np.frombuffer(order(film[kind])[: len(film[kind]) // 4 * 4], "<i2").reshape(-1, 2)
    soundfile.write(tmp_path / "a.flac", samples, 48000)
    with pytest.raises(RejectedError, match="not sound"):
        read_whole(str(tmp_path / "a.flac"))


def test_loud_music_is_no_film_sound(tmp_path):
    rng = np.random.default_rng(0)
    square = np.sign(np.sin(np.arange(2 * RATE) * 0.05))
    loud = {
        "noise": rng.uniform(-1, 1, 2 * RATE),
        "clipped": (9 * rng.normal(size=2 * RATE)).clip(-1, 1),
        "square": square,
        "almost": square * 32766.5 / 32768 - 0.5 / 32768,
        # the sync word of AC-3 in each period, and those of DTS once
        "periodic": np.tile([30475, 0, 20000, 0, -9], RATE // 2) / 32768,
        "once": np.concatenate([[32766, -32767, 8191, -6144], rng.normal(0, 3e3, RATE)]) / 32768,
    }
    for name, wav in loud.items():
        path = put(tmp_path / f"{name}.wav", wav[:, None], RATE, None, subtype="PCM_16")
        assert read_whole(str(path))[0].shape == (1, len(wav)), name


# --- more suffixes --------------------------------------------------------------------------------

FILES = [
    ("ts", "aac", 48000),
    ("flv", "libmp3lame", 44100),
    ("avi", "libmp3lame", 48000),
    ("spx", "libspeex", 16000),
    ("amr", "libopencore_amrnb", 8000),
    ("eac3", "eac3", 48000),
    ("tta", "tta", 44100),
    ("3gp", "aac", 48000),
    ("voc", "pcm_s16le", 44100),
    ("mpg", "mp2", 48000),
    ("rm", "ac3", 48000),
]


def test_all_that_libsndfile_knows_counts_as_audio():
    names = {f".{name.lower()}" for name in soundfile.available_formats()}
    assert names - formats.SUFFIXES == {".raw"}  # samples without a header


@pytest.mark.parametrize(("suffix", "codec", "rate"), FILES)
def test_files_beside_films_and_telephones(tmp_path, suffix, codec, rate):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    assert f".{suffix}" in formats.SUFFIXES
    how = {"format": "ogg"} if suffix == "spx" else {}
    path = encoded(tmp_path / f"a.{suffix}", codec, rate, **how)
    wav_CN, its_rate = read_whole(str(path))
    assert its_rate == rate and wav_CN.shape[1] / rate == pytest.approx(3, abs=0.1)
    assert pitch(wav_CN[0], rate) == pytest.approx(440, abs=1)


# --- against the program --------------------------------------------------------------------------

PROGRAM = shutil.which("ffmpeg")


@pytest.mark.skipif(PROGRAM is None, reason="the ffmpeg program is not here to compare with")
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp3", "libmp3lame"), ("opus", "OPUS"), ("ogg", "VORBIS"), ("flac", "FLAC"), ("m4a", "aac"),
     ("wma", "wmav2"), ("mka", "libopus"), ("aac", "aac"), ("ac3", "ac3"), ("ts", "aac")],
)  # fmt: skip
def test_files_are_what_ffmpeg_makes_of_them(tmp_path, suffix, codec):
    path = encoded(tmp_path / f"a.{suffix}", codec, 48000, 2)
    command = [PROGRAM, "-v", "error", "-i", str(path), "-f", "wav", "-c:a", "pcm_f32le", "-"]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    theirs, rate = soundfile.read(io.BytesIO(made), dtype="float32", always_2d=True)
    ours, our_rate = read_whole(str(path))
    assert our_rate == rate and abs(ours.shape[1] - len(theirs)) <= 1
    size = min(ours.shape[1], len(theirs))
    np.testing.assert_allclose(ours[:, :size], theirs.T[:, :size], atol=1e-3)


def test_an_mp3_begins_and_ends_where_its_music_does(tmp_path):
    for rate in (44100, 16000):
        path = put(tmp_path / "a.mp3", tone(3, rate), rate, None)
        (wav_N,), _ = read_whole(str(path))
        assert len(wav_N) == 3 * rate
        assert np.sqrt(np.mean((wav_N - tone(3, rate)[:, 0]) ** 2)) < 0.01
        with open_sound(str(path)) as sound:
            assert sound.frames == 3 * rate
        cut_file(path)
        with pytest.raises(RejectedError, match="cut off"):
            read_whole(str(path))


def test_parts_of_long_files_are_where_they_belong(tmp_path):
    for suffix, codec in (("mp3", "libmp3lame"), ("m4a", "aac"), ("mka", "libopus")):
        rate = 48000 if codec == "libopus" else 44100
        path = put_with_ffmpeg(tmp_path / f"a.{suffix}", tone(20, rate), rate, codec, None)
        with open_sound(str(path)) as sound:
            (whole,) = np.concatenate(list(sound.read(0, None))).T
        with open_sound(str(path)) as sound:
            (part,) = np.concatenate(list(sound.read(15 * rate, rate))).T
        shifts = range(-60, 60)  # some containers' times are whole milliseconds
        errors = [
            np.abs(part[100:-100] - whole[15 * rate + k + 100 :][: rate - 200]).max()
            for k in shifts
        ]
        assert len(part) == rate and min(errors) < 0.01, suffix


# --- times that are of something else -------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libmp3lame", "ac3", "pcm_s16le"])
def test_a_matroska_that_went_through_a_pipe_promises_nothing(tmp_path, codec):
    """FFmpeg guesses its length from the bit rate, which leaves out what lies between packets."""
    path, pipe = tmp_path / "a.mka", Pipe()
    with av.open(pipe, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        container.mux(packets_of(stream, steady(60, 48000)))
    path.write_bytes(pipe.data)
    (wav_N,), rate = read_whole(str(path))
    assert len(wav_N) / rate == pytest.approx(60, abs=0.06)
    assert pitch(wav_N, rate) == pytest.approx(440, abs=1)


def film_of(path, codec, seconds, other):
    """Sound, and beside it a picture or another sound that lasts for nine seconds."""
    with av.open(str(path), "w") as container:
        sounds = [(container.add_stream(codec, rate=48000, layout="mono"), seconds)]
        if other == "sound":
            sounds.append((container.add_stream(codec, rate=48000, layout="mono"), 9))
        else:
            video = container.add_stream(other, rate=25, width=64, height=64)
            video.pix_fmt = "yuv420p"
        packets = [
            p for stream, length in sounds for p in packets_of(stream, steady(length, 48000))
        ]
        if other != "sound":
            pixels = np.random.default_rng(0).integers(0, 255, (9 * 25, 64, 64, 3), np.uint8)
            for image in pixels:
                packets += video.encode(av.VideoFrame.from_ndarray(image))
            packets += video.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


FILMS = [
    ("mkv", "ac3", "mpeg4"), ("mkv", "libopus", "mpeg4"), ("mka", "ac3", "sound"),
    ("wmv", "wmav2", "wmv2"), ("wma", "wmav2", "sound"), ("flv", "libmp3lame", "flv"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "codec", "other"), FILMS)
def test_sound_that_ends_before_its_film_is_whole(tmp_path, suffix, codec, other):
    path = film_of(tmp_path / f"a.{suffix}", codec, 6, other)
    (wav_N,), rate = read_whole(str(path))
    assert len(wav_N) / rate == pytest.approx(6, abs=0.1)
    assert pitch(wav_N, rate) == pytest.approx(440, abs=1)


@pytest.mark.parametrize("seconds", [6, 9])
@pytest.mark.parametrize(("suffix", "codec", "other"), FILMS)
def test_a_film_that_was_cut_is_rejected(tmp_path, suffix, codec, other, seconds):
    path = film_of(tmp_path / f"a.{suffix}", codec, seconds, other)
    cut_file(path)
    with pytest.raises(RejectedError, match="cut off"):
        read_whole(str(path))
