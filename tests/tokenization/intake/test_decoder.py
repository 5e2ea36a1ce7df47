"""Audio within Parquet files is unpacked once, whoever decodes it."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from sounds import RATE, tone
from tokenizing import read_audio

from tokenization.intake import decoder as decoding
from tokenization.intake.audio import Intake, RejectedError, open_bytes
from tokenization.intake.decoder import Decoder, Unpacker
from tokenization.job import run
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.source.settings import Source
from tokenization.track import FileBytes, HeldBytes

INTAKE = Intake(sample_rate=RATE, channels=1)


@pytest.fixture
def unpacker():
    unpacker = Unpacker(60)
    yield unpacker
    unpacker.close()


def sounds(count):
    files = []
    for i in range(count):
        files.append(io.BytesIO())
        soundfile.write(files[-1], tone(1.1 + i / 100, frequency=200 + i), RATE, format="WAV")
    return [file.getvalue() for file in files]


def table(path, audio, **how):
    path.parent.mkdir(exist_ok=True)
    texts = [f"number {i}" for i in range(len(audio))]
    pq.write_table(pa.table({"audio": audio, "text": texts}), path, **how)
    return Source(audio=path)


@pytest.mark.parametrize("as_struct", [False, True])
def test_rows_are_unpacked_by_one_process(tmp_path, unpacker, as_struct):
    audio = sounds(12)
    column = [{"bytes": data, "path": "x.wav"} for data in audio] if as_struct else audio
    tracks = scan(table(tmp_path / "t.parquet", column, row_group_size=5)).tracks
    found = [future.result() for future in [unpacker.submit(track.part) for track in tracks]]
    process = unpacker._decoder._process.pid
    assert [one.place for one in found] == [
        HeldBytes(path=str(tmp_path / "t.parquet"), data=data) for data in audio
    ]
    assert all(not hasattr(one, "captions") for one in found)
    assert unpacker.submit(tracks[3].part).result() == found[3]  # what was passed over
    assert unpacker._decoder._process.pid == process
    with Decoder(60) as decoder:
        for track, one in zip(tracks[:3], found):
            wav_CN, facts = read_audio(one, INTAKE, decoder)
            expected_CN, same = read_audio(track, INTAKE, decoder)
            np.testing.assert_array_equal(wav_CN, expected_CN)
            assert facts == same


def test_what_cannot_be_unpacked_is_left_to_its_decoder(tmp_path, unpacker):
    audio = [*sounds(1), None, b"no sound", b""]
    tracks = scan(table(tmp_path / "t.parquet", audio)).tracks
    found = [unpacker.submit(track.part).result() for track in tracks]
    assert found[1] == tracks[1].part and isinstance(found[2].place, HeldBytes)
    for i, reason in ((1, "empty"), (2, "unreadable"), (3, "empty")):
        with Decoder(60) as decoder, pytest.raises(RejectedError, match=reason) as caught:
            read_audio(found[i], INTAKE, decoder)
        assert str(tmp_path) not in caught.value.detail
    (tmp_path / "a.wav").write_bytes(audio[0])
    with open_bytes(FileBytes(path=str(tmp_path / "a.wav"))) as file:
        assert file.read() == audio[0]


@pytest.mark.usefixtures("stub")
def test_the_job_hands_rows_to_its_decoders(tmp_path, monkeypatch):
    places, open_audio = [], decoding.open_audio

    def opened(part, *how):
        places.append(part.place)
        return open_audio(part, *how)

    monkeypatch.setattr(decoding, "open_audio", opened)
    audio = sounds(6)
    source = table(tmp_path / "audio" / "t.parquet", [*audio, b"no sound"])
    out = tmp_path / "out"
    summary = run(Job(audio=source.audio, out=out, validation_percent=0, max_reject_ratio=0.5))
    assert "6 records" in summary and "1 of 7 files rejected (1 unreadable" in summary
    assert {place.data for place in places} == {*audio, b"no sound"} and len(places) == 7
