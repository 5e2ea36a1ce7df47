"""What music programs read of a loop, read back by libsndfile and by our own reader."""

import io
import struct

import numpy as np
import soundfile

from magnet_jax.io import audio, chunks, exact

RATE, COUNT, STARTS = 32_000, 240_001, (0, 60_000, 120_000, 180_000)
INFO = {"INAM": "a räv", "ISFT": "x", "ICMT": '{"seed": 1}'}


def loop(**more):
    wav_CN = 0.1 * np.random.default_rng(0).normal(size=(1, COUNT)).astype(np.float32)
    content = bytes(audio.encoded("x.wav", wav_CN, RATE, **audio.WAV))
    return content, chunks.with_chunks(content, chunks.of_loop(COUNT, RATE, STARTS, **more))


def read(content):
    """Name and content of every chunk but the samples."""
    found = chunks._chunks(content, "<", content.index(b"data") + 8, 2 * COUNT)
    return [(name, data) for name, _, data, _ in found if name and name != b"data"]


def test_libsndfile_reads_what_was_written():
    plain, content = loop(bpm=128.5, beats=16, beats_per_bar=4, info=INFO)
    assert struct.unpack_from("<I", content, 4)[0] == len(content) - 8
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        log = " ".join(file.extra_info.split())
        assert file.title == INFO["INAM"] and file.frames == COUNT
        expected_N, _ = soundfile.read(io.BytesIO(plain), dtype="int16")
        np.testing.assert_array_equal(file.read(dtype="int16"), expected_N)
    for words in (
        "(Loop,RootNoteInvalid,StretchOn,RAMBased", "Beats : 16 Meter : 4/4 Tempo : 128.5",
        "Period : 31250 nsec Midi Note : 60", f"Loop Count : 1 Cue ID : 0 Type : 0 Start : 0 End : "
        f"{COUNT - 1} Fraction : 0 Count : 0", "Cue ID : 4 Pos : 180000 Chunk : data",
        "labl : 4 : bar 4", 'ICMT : {"seed": 1}',
    ):  # fmt: skip
        assert words in log, words
    assert "error" not in log.lower() and "***" not in log


def test_our_reader_finds_the_same_and_edits_keep_it(tmp_path):
    _, content = loop(bpm=90.0, beats=12, beats_per_bar=3, info=INFO)
    (tmp_path / "a.wav").write_bytes(content)
    before = dict(read(content))
    flags, _, _, _, beats, low, high, bpm = struct.unpack("<IHHfIHHf", before[b"acid"])
    assert (flags, beats, high, low, bpm) == (4, 12, 3, 4, 90.0)
    assert struct.unpack("<15I", before[b"smpl"])[7:] == (1, 0, 0, 0, 0, COUNT - 1, 0, 0)
    assert struct.unpack_from("<I", before[b"cue "])[0] == 4
    source = exact.read(tmp_path / "a.wav")
    new_NC = source.samples_NC.copy()
    new_NC[5:500] = 0
    exact.write(tmp_path / "b.wav", source, new_NC)
    assert read((tmp_path / "b.wav").read_bytes()) == read(content)
    # A clip that was drawn out has other beats.
    exact.write(tmp_path / "c.wav", source, np.pad(new_NC, ((0, 9), (0, 0))))
    with soundfile.SoundFile(tmp_path / "c.wav") as file:
        assert "acid" not in file.extra_info and "smpl" in file.extra_info


def test_without_a_tempo_there_is_no_acid_chunk():
    _, content = loop()
    assert [name for name, _ in read(content)][1:] == [b"smpl", b"cue ", b"LIST"]
