"""Tables: rows, columns, and the audio within."""

import dataclasses
import io
import json
import os
import shutil
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from sounds import RATE, put, tone
from sources import (
    NAMES,
    a_parquet,
    flac,
    wav_of,
    write_csv,
    write_metadata,
)
from tokenizing import read_audio, read_header

from magnet_jax.data import pipeline, records
from magnet_jax.errors import UserError
from tokenization.intake.audio import Intake, RejectedError
from tokenization.intake.decoder import Decoder
from tokenization.job import run
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.source.settings import Columns, Source


@pytest.fixture(scope="module")
def decoder():
    with Decoder(60) as process:
        yield process


def test_captions_that_commas_cut_are_rejected(tmp_path):
    put(tmp_path / "a.wav", tone(1.0), caption=None)
    put(tmp_path / "b.wav", tone(1.0, frequency=500), caption=None)
    table = tmp_path / "table.csv"
    table.write_text("path,caption\na.wav,slow, sad\nb.wav,fast,,\n")
    found = scan(Source(audio=table))
    assert [t.caption for t in found.tracks] == ["fast"]
    (reject,) = found.rejects
    assert (reject.path, reject.reason) == ("table.csv, line 2", "bad row")
    assert "quote its captions" in reject.detail


def test_lines_of_json_are_a_table_where_they_have_captions(tmp_path):
    put(tmp_path / "a.wav", tone(1.1), caption="beside it")
    put(tmp_path / "b.wav", tone(1.2), caption="beside it")
    table = tmp_path / "songs.jsonl"
    rows = [
        {"audio": "a.wav", "caption": ["one", "two"], "at": 0, "bpm": 90},
        {"caption": "without a path"},
        {"audio": 3, "caption": "a number"},
        {"audio": "b.wav"},
        {"audio": "b.wav", "caption": "three", "at": "1.0", "extra": None},
    ]
    lines = [json.dumps(row) for row in rows]
    table.write_text("\n".join([*lines, '{"audio":', '"b.wav"', '{"audio": "b.wav", "at": 1}']))
    found = scan(Source(audio=table, columns=Columns(start="at")))
    assert [(t.path, t.start, t.captions) for t in found.tracks] == [
        ("a.wav", 0, ("one", "two")),
        ("b.wav", 1, ("three",)),
    ]
    assert json.loads(found.tracks[0].fields) == {"bpm": 90}
    assert sorted((r.reason, r.detail[:20]) for r in found.rejects) == [
        ("bad row", "expected a JSON obje"),
        ("bad row", "no path in it"),
        ("bad row", "no path in it"),
        ("bad row", "not valid JSON (Expe"),
        ("no caption", "no text in its row u"),
        ("no caption", "no text in its row u"),
    ]
    # a manifest of AudioCraft's has its captions elsewhere
    table.write_text(json.dumps({"path": "a.wav", "duration": 1.1}))
    assert [t.caption for t in scan(Source(audio=table)).tracks] == ["beside it"]
    with pytest.raises(UserError, match="--columns.start: for tables; .* is a manifest"):
        scan(Source(audio=table, columns=Columns(start="at")))


def test_rows_that_a_quote_would_swallow_are_there(tmp_path):
    for i, name in enumerate(NAMES):
        put(tmp_path / f"{name}.wav", tone(1.1 + i / 10), caption=None)
    table = tmp_path / "t.tsv"
    table.write_text('path\ttext\na.wav\t"slow\nb.wav\tthe 12" mix\nc.wav\t"said" she\n')
    found = scan(Source(audio=table))
    assert [t.caption for t in found.tracks] == ['"slow', 'the 12" mix', '"said" she']
    table = tmp_path / "t.csv"
    table.write_text('path,text\na.wav,"slow\nb.wav,fast\nc.wav,"loud"\n')
    found = scan(Source(audio=table))
    assert [t.caption for t in found.tracks] == ["fast", "loud"]
    (reject,) = found.rejects
    assert (reject.path, reject.reason) == ("t.csv, line 2", "bad row")


def test_captions_may_be_long_but_not_beyond_4_mib(tmp_path):
    rows = []
    for i, size in enumerate((2 * 10**5, 5 * 10**6, 10)):
        put(tmp_path / f"{i}.wav", tone(1.1 + i / 10), caption=None)
        rows.append({"path": f"{i}.wav", "text": "o" * size, "more": "o" * (5 * 10**6 * (i == 2))})
    table = write_csv(tmp_path / "t.csv", rows)
    found = scan(Source(audio=table))
    assert [len(t.caption) for t in found.tracks] == [2 * 10**5]
    assert [(r.path, r.reason) for r in found.rejects] == [
        ("1.wav", "no caption"),
        ("2.wav", "no caption"),
    ]
    assert all("larger than 4 MiB (t.csv, line" in r.detail for r in found.rejects)


def test_paths_as_other_systems_write_them(tmp_path):
    names = {
        "sub/a.wav": "sub\\a.wav",
        "b.wav": " b.wav ",
        unicodedata.normalize("NFD", "é.wav"): unicodedata.normalize("NFC", "é.wav"),
        unicodedata.normalize("NFC", "ö.wav"): unicodedata.normalize("NFD", "ö.wav"),
        "my song.wav": "my%20song.wav",
        "100%25.wav": "100%25.wav",
        "d.wav": f"file://{tmp_path}/d.wav",
    }
    for i, name in enumerate(names):
        put(tmp_path / name, tone(1.1 + i / 10), caption=None)
    rows = [{"path": path, "text": name} for name, path in names.items()]
    rows += [{"path": path, "text": "x"} for path in ("..\\x.wav", "%2e%2e/x.wav")]
    put(tmp_path.parent / "x.wav", tone(1.1), caption=None)
    found = scan(Source(audio=write_csv(tmp_path / "t.csv", rows)))
    assert [(t.path, t.caption) for t in found.tracks] == [(name, name) for name in names]
    assert [r.reason for r in found.rejects] == ["outside the folder"] * 2
    rows = [{"file_name": path, "text": name} for name, path in list(names.items())[:4]]
    write_metadata(tmp_path / "metadata.jsonl", rows)
    tracks = scan(Source(audio=tmp_path)).tracks
    assert {t.path: t.caption for t in tracks} == {name: name for name in list(names)[:4]}


@pytest.mark.parametrize("kind", ["parquet", "a saved data set"])
def test_values_that_python_cannot_hold_are_left_out(tmp_path, kind):
    """Dates out of its range, and time zones that are none, in columns that nothing is asked of."""
    for name in NAMES:
        put(tmp_path / f"{name}.flac", wav_of(name), caption=None)
    late = pa.array([2**62, 0, None], pa.timestamp("us"))
    inner = pa.struct([("when", pa.timestamp("us")), ("name", pa.string())])
    table = pa.table({
        "path": [f"{name}.flac" for name in NAMES],
        "text": list(NAMES),
        "when": late,
        "where": pa.array([0, 1, 2], pa.timestamp("s", "Mars/Phobos")),
        "length": pa.array([2**62, 1, None], pa.duration("s")),
        "day": pa.array([2**30, 0, None], pa.date32()),
        "hash": pa.array([b"0123456789abcdef"] * 3, pa.binary(16)),
        "nested": pa.array([[{"when": 2**62, "name": "x"}], [], None], pa.list_(inner)),
    })  # fmt: skip
    found = scan(Source(audio=table_of(tmp_path, kind, table), root=tmp_path))
    assert [t.caption for t in found.tracks] == list(NAMES) and not found.rejects
    assert json.loads(found.tracks[0].info) == {"nested": [{"when": None, "name": "x"}]}
    known = {"when": "1970-01-01 00:00:00", "length": "0:00:01", "day": "1970-01-01"}
    assert json.loads(found.tracks[1].info) == known | {"nested": []}
    # as where a track begins it makes no sense
    source = Source(audio=table_of(tmp_path, kind, table), root=tmp_path)
    found = scan(dataclasses.replace(source, columns=Columns(start="length")))
    assert [(r.path, r.reason) for r in found.rejects] == [
        ("a.flac", "bad row"),
        ("b.flac", "bad row"),
    ]


def table_of(folder, kind, table):
    """A file or folder with the rows of an Arrow table."""
    if kind == "parquet":
        pq.write_table(table, folder / "t.parquet")
        return folder / "t.parquet"
    datasets.Dataset(table).save_to_disk(folder / "saved")
    if table.schema.metadata is None:  # the library replaces what is in the columns
        (path,) = (folder / "saved").glob("*.arrow")
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return folder / "saved"


@pytest.mark.parametrize("kind", ["parquet", "a saved data set"])
def test_a_cell_that_is_not_utf8_is_one_reject(tmp_path, kind):
    for name in NAMES:
        put(tmp_path / f"{name}.flac", wav_of(name), caption=None)
    raw = pa.array([b"fine", b"caf\xe9", b"fine"])
    ends = raw.buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, ends, raw.buffers()[2]])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), text)
    large = pa.LargeListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int64()), text)
    fixed = pa.FixedSizeListArray.from_arrays(text, 1)
    paths = pa.array([f"{name}.flac" for name in NAMES])
    good = pa.array(list(NAMES))
    within = pa.StructArray.from_arrays([text], ["x"])
    for columns, reason in [
        ({"path": paths, "text": text}, "no caption"),
        ({"path": paths, "text": lists}, "no caption"),
        ({"path": paths, "text": large}, "no caption"),
        ({"path": paths, "text": good, "more": fixed}, "no caption"),
        ({"path": paths, "text": good, "title": text}, "no caption"),
        ({"path": paths, "text": good, "more": within}, "no caption"),
        ({"path": text, "text": good}, "bad name"),
    ]:  # fmt: skip
        found = scan(Source(audio=table_of(tmp_path, kind, pa.table(columns)), root=tmp_path))
        reasons = [r.reason for r in found.rejects]
        if reason == "bad name":
            assert reasons == ["missing", "bad name", "missing"]
        else:
            assert [t.path for t in found.tracks] == ["a.flac", "c.flac"] and reasons == [reason]
    named = pa.table({"path": paths, "text": good, "name": text})
    source = Source(
        audio=table_of(tmp_path, kind, named), root=tmp_path, columns=Columns(id="name")
    )
    assert [r.reason for r in scan(source).rejects] == ["bad row", "duplicate"]


def test_a_column_of_paths_or_of_audio(tmp_path):
    """Bytes are the audio unless files are there, or the data set says that they are a picture."""
    paths = [f"{name}.flac" for name in NAMES]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    within = pa.array([{"bytes": flac(name), "path": None} for name in NAMES], struct)
    picture = [b"\x89PNG"] * 3
    features = {"info": {"features": {"cover": {"_type": "Image"}, "sound": {"_type": "Audio"}}}}
    noted = {"huggingface": json.dumps(features)}

    def places(**columns):
        table = pa.table({"text": list(NAMES)} | columns)
        for metadata in (None, noted) if "cover" in columns or "sound" in columns else (None,):
            pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
            found = scan(Source(audio=tmp_path / "t.parquet"))
            yield [track.path for track in found.tracks]

    rows = [f"t.parquet/{i}" for i in range(3)]
    assert list(places(path=paths, audio=within)) == [rows]
    assert list(places(audio=pa.array(map(flac, NAMES), pa.binary_view()))) == [rows]
    assert list(places(file_name=paths, sound=within)) == [rows, rows]
    for name in NAMES:
        put(tmp_path / f"{name}.flac", wav_of(name), caption=None)
    assert list(places(path=paths, cover=picture)) == [paths, paths]
    assert list(places(path=paths, audio=within)) == [rows]
    assert list(places(file_name=paths, sound=within)) == [paths, rows]
    assert list(places(path=["gone.flac", *paths[1:]], cover=picture)) == [paths[1:], paths[1:]]
    assert list(places(cover=picture, sound=within))[1] == rows


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a.wav"], ["a"], ["b"]], names=["path", "text", "text"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="t.parquet: 2 columns are called 'text'; rename all but"):
        scan(Source(audio=tmp_path / "t.parquet"))
    folder = table_of(tmp_path, "a saved data set", table.select([0, 1]))
    with pa.ipc.new_stream(next(folder.glob("*.arrow")), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(UserError, match="saved: .*text.* 2 times"):  # as the library says it
        scan(Source(audio=folder))


def test_names_that_are_in_two_folders_are_ambiguous(tmp_path):
    rows = [
        {"youtube_id": name, "start_time": 30, "caption": name} for name in ("x", "y", "z", "é")
    ]
    table = write_csv(tmp_path / "test.csv", rows)
    for i, path in enumerate(("one/Yx.wav", "two/Yx.flac", "one/y.wav", "one/y.flac", "z.wav")):
        put(tmp_path / path, tone(1.1 + i / 10), caption=None)
    put(tmp_path / unicodedata.normalize("NFD", "é_30.wav"), tone(2), caption=None)
    for hidden in (".cache/z.wav", "__MACOSX/z.wav", "one/._y.wav"):
        put(tmp_path / hidden, tone(1.9), caption=None)
    found = scan(Source(audio=table, recipe="audiocaps"))
    # in one folder the first counts, as in a folder of audio
    assert [t.path for t in found.tracks][:2] == ["one/y.flac", "z.wav"]
    assert found.tracks[2].caption == "é"
    (reject,) = found.rejects
    assert (reject.path, reject.reason) == ("test.csv, line 2", "ambiguous")
    assert (
        reject.detail == "both one/Yx.wav and two/Yx.flac are called Yx; --root can name one folder"
    )
    found = scan(Source(audio=table, recipe="audiocaps", root=tmp_path / "one"))
    assert [t.path for t in found.tracks] == ["Yx.wav", "y.flac"]


def test_rows_of_one_clip_lose_nothing(tmp_path):
    put(tmp_path / "a.wav", tone(1.1), caption=None)
    rows = [
        {
            "path": "a.wav",
            "text": "one",
            "bpm": "90",
            "keywords": "calm, slow",
            "by": "x",
            "n": "1",
        },
        {"path": "a.wav", "text": "two", "bpm": "91", "keywords": "slow, sad", "by": "x", "n": "2"},
        {"path": "a.wav", "text": "one", "bpm": "90", "keywords": "", "by": "", "n": "3"},
    ]
    table = write_csv(tmp_path / "t.csv", rows)
    (track,) = scan(Source(audio=table, columns=Columns(id="n"))).tracks
    assert track.track_id == "1" and track.captions == ("one", "two")
    assert json.loads(track.fields) == {
        "bpm": ["90", "91"],
        "keywords": ["calm", "slow", "sad"],
        "by": "x",
        "n": ["1", "2", "3"],
    }
    (track,) = scan(Source(audio=table)).tracks
    assert track.track_id == "a" and json.loads(track.fields)["n"] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("rock", ["rock"]),
        ("'rock'", ["rock"]),
        ('"rock"', ["rock"]),
        ("['rock', 'pop']", ["rock", "pop"]),
        ('["rock", "pop"]', ["rock", "pop"]),
        ("('rock', 'pop')", ["rock", "pop"]),
        ("{'rock', 'pop'}", ["pop", "rock"]),
        ("rock, pop ,", ["rock", "pop"]),
        ("[rock, pop]", ["rock", "pop"]),
        ("['rock', 'pop", ["rock", "pop"]),
        ("['hip, hop', [\"rock 'n' roll\"]]", ["hip, hop", "rock 'n' roll"]),
        ("\"['rock']\"", ["rock"]),
        ("[]", []),
        ("80", ["80"]),
        (["rock", "pop"], ["rock", "pop"]),
        (["rock, pop"], ["rock, pop"]),
    ],
)
def test_keywords_are_words_however_they_are_noted(tmp_path, written, words):
    put(tmp_path / "a.wav", tone(1.1), caption=None)
    row = {"path": "a.wav", "text": "a song", "keywords": written}
    sources = [tmp_path / "t.jsonl", tmp_path / "t.parquet", tmp_path / "music"]
    write_metadata(sources[0], [row])
    pq.write_table(pa.Table.from_pylist([row]), sources[1])
    put(tmp_path / "music" / "a.wav", tone(1.1), caption=None)
    (tmp_path / "music" / "a.json").write_text(json.dumps(row))
    if isinstance(written, str):
        sources.append(write_csv(tmp_path / "t.csv", [row]))
    for source in sources:
        (track,) = scan(Source(audio=source)).tracks
        assert json.loads(track.fields)["keywords"] == words
    caps = {"ytid": "a", "start_s": "0", "end_s": "1", "caption": "x", "aspect_list": written}
    write_metadata(sources[0], [caps])
    source = Source(audio=sources[0], root=tmp_path / "music", recipe="musiccaps")
    (track,) = scan(source).tracks
    fields = json.loads(track.fields)
    assert fields["keywords"] == words and "aspect_list" not in fields
    assert all(word in ", ".join(pipeline.field_texts(fields)) for word in words)


def test_lists_that_were_written_as_text_are_lists(tmp_path):
    put(tmp_path / "a.wav", tone(1.1), caption=None)
    row = {"path": "a.wav", "text": "['one', \"two\"]", "genre": '["rock", "pop"]', "key": "[C]"}
    (track,) = scan(Source(audio=write_csv(tmp_path / "t.csv", [row]))).tracks
    assert track.captions == ("one", "two")
    assert json.loads(track.fields) == {"genre": ["rock", "pop"], "key": "[C]"}
    row |= {"text": "[Verse 1]\nla, la [1999]", "genre": "rock, pop"}
    (track,) = scan(Source(audio=write_csv(tmp_path / "t.csv", [row]))).tracks
    assert track.captions == (row["text"],) and json.loads(track.fields)["genre"] == "rock, pop"


def test_a_table_without_rows_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text("path,text\n")
    with pytest.raises(UserError, match="t.csv: no row in it"):
        scan(Source(audio=tmp_path / "t.csv"))
    for name in ("t.tsv", "t.jsonl"):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=f"{name}.*(is empty|no audio in it)"):
            scan(Source(audio=tmp_path / name))


def test_parts_of_files(tmp_path, decoder):
    wav = tone(30, 44100, channels=2)
    put(tmp_path / "long.wav", wav, 44100, caption=None, subtype="FLOAT")
    rows = [
        {"file": "long.wav", "text": "the first", "from": "0", "to": "2", "id": "one"},
        {"file": "long.wav", "text": "in the middle", "from": "10.5", "to": "12.25", "id": "two"},
        {"file": "long.wav", "text": "to the end", "from": "28", "to": "", "id": "three"},
        {"file": "long.wav", "text": "also the first", "from": "0", "to": "2", "id": "four"},
        {"file": "long.wav", "text": "too far", "from": "29", "to": "31", "id": "five"},
        {"file": "long.wav", "text": "beyond", "from": "31", "to": "32", "id": "six"},
        {"file": "long.wav", "text": "backwards", "from": "3", "to": "2", "id": "seven"},
        {"file": "long.wav", "text": "what", "from": "soon", "to": "2", "id": "eight"},
        {"file": "", "text": "where", "from": "1", "to": "2", "id": "nine"},
        {"file": "long.wav", "text": "whose name", "from": "5", "to": "7", "id": "one"},
    ]
    table = write_csv(tmp_path / "table.csv", rows)
    columns = Columns(start="from", end="to", id="id")
    found = scan(Source(audio=table, columns=columns))
    assert [(t.track_id, t.start, t.duration) for t in found.tracks] == [
        ("one", 0.0, 2.0),
        ("two", 10.5, 1.75),
        ("three", 28.0, None),
        ("five", 29.0, 2.0),
        ("six", 31.0, 1.0),
    ]
    # rows of one clip are one track, which goes by the name of the first
    assert json.loads(found.tracks[0].info) == {
        "captions": ["also the first"],
        "id": ["one", "four"],
    }
    reasons = [(r.reason, r.detail) for r in found.rejects]
    assert reasons[:3] == [
        ("bad row", "it begins before the file, or ends before it begins (table.csv, line 8)"),
        ("bad row", "its from is no number of seconds (table.csv, line 9)"),
        ("bad row", "no path in it"),
    ]
    assert reasons[3] == ("duplicate", "another track is called one")

    intake = Intake(sample_rate=None, channels=2)
    for track, begin, end in zip(found.tracks, (0, 10.5, 28), (2, 12.25, 30)):
        wav_CN, facts = read_audio(track, intake, decoder)
        np.testing.assert_array_equal(wav_CN, wav[round(begin * 44100) : round(end * 44100)].T)
        assert facts.seconds == pytest.approx(end - begin)
    headers = [read_header(track, intake, decoder) for track in found.tracks[:3]]
    assert [header.seconds for header in headers] == [2, 1.75, 2]
    for track, reason in zip(found.tracks[3:], ("cut off", "outside the file")):
        with pytest.raises(RejectedError, match=reason):
            read_audio(track, intake, decoder)
        with pytest.raises(RejectedError, match=reason):
            read_header(track, intake, decoder)


def test_parts_of_one_file_fall_to_one_split(tmp_path, one_codec):
    rows = []
    for i in range(6):
        put(tmp_path / f"{i}.wav", tone(1.6, frequency=200 + 20 * i), caption=None)
        rows += [{"path": f"{i}.wav", "caption": f"part {j}", "at": j / 2} for j in range(2)]
    table = write_csv(tmp_path / "table.csv", rows)
    columns = Columns(start="at")
    run(Job(audio=table, columns=columns, out=tmp_path / "out", validation_percent=50))
    files = {
        split: [r["source_path"].decode() for r in records.open_split(tmp_path / "out", split)]
        for split in records.SPLITS
    }
    assert len(files["train"]) + len(files["validation"]) == 12
    assert files["train"] and files["validation"]
    assert not set(files["train"]) & set(files["validation"])


def test_records_of_parts_say_where_in_the_file_they_begin(tmp_path, one_codec):
    put(tmp_path / "long.wav", tone(9), caption=None)
    rows = [
        {"path": "long.wav", "caption": "a", "at": 1.5, "for": 1.0},
        {"path": "long.wav", "caption": "b", "at": 4.0, "for": 3.0},
    ]
    table = write_csv(tmp_path / "table.csv", rows)
    columns = Columns(start="at", duration="for")
    job = Job(audio=table, columns=columns, out=tmp_path / "out", validation_percent=0,
              max_record_seconds=2)  # fmt: skip
    run(job)
    split = records.open_split(tmp_path / "out", "train")
    found = [records.decode_example(example) for example in split]
    assert [(r["track_id"], r["start"], r["duration"]) for r in found] == [
        ("long@1.5+1.0", 1.5, 1.0),
        ("long@4.0+3.0", 4.0, 1.5),
        ("long@4.0+3.0", 5.5, 1.5),
    ]


def test_parts_that_differ_a_little_have_names_of_their_own(tmp_path):
    put(tmp_path / "a.wav", tone(9), caption=None)
    parts = [(0, 5), (0, 8), (1234.5678, 1), (1234.5679, 1), (1e15, 1), (0, 1e300)]
    rows = [{"path": "a.wav", "text": "x", "at": at, "for": length} for at, length in parts]
    table = write_csv(tmp_path / "t.csv", rows)
    found = scan(Source(audio=table, columns=Columns(start="at", duration="for")))
    assert [track.track_id for track in found.tracks] == [
        "a@0.0+5.0", "a@0.0+8.0", "a@1234.5678+1.0", "a@1234.5679+1.0",
    ]  # fmt: skip
    detail = "it begins, or goes on, after 1e+07 s (t.csv, line {})"
    assert [(r.reason, r.detail) for r in found.rejects] == [
        ("bad row", detail.format(6)),
        ("bad row", detail.format(7)),
    ]
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.wav")
    both = write_csv(tmp_path / "t2.csv", [*rows[:2], rows[1] | {"path": "b.wav"}])
    (reject,) = scan(Source(audio=both, columns=Columns(start="at", duration="for"))).rejects
    assert reject.detail == "the same bytes as a.wav (b@0.0+8.0)"
    found = scan(Source(audio=table, columns=Columns(duration="for")))
    assert [track.track_id for track in found.tracks] == ["a@0.0+5.0", "a@0.0+8.0", "a@0.0+1.0"]


def test_musiccaps(tmp_path):
    """Columns as in the published file; clips as the common scripts call them."""
    row = {
        "ytid": "-0Gj8-vB1q4", "start_s": "30", "end_s": "40",
        "audioset_positive_labels": "/m/0140xf", "aspect_list": "['low quality', 'drums']",
        "caption": "The low quality recording features a ballad song.", "author_id": "4",
        "is_balanced_subset": "False", "is_audioset_eval": "True",
    }  # fmt: skip
    rows = [row, row | {"ytid": "0I6_bHnHtHg"}, row | {"ytid": "gone_gone_g"}]
    table = write_csv(tmp_path / "musiccaps-public.csv", rows)
    put(tmp_path / "wavs" / "-0Gj8-vB1q4.wav", tone(1.1), caption=None)
    put(tmp_path / "wavs" / "[0I6_bHnHtHg]-[30-40].flac", tone(1.2), caption=None)
    found = scan(Source(audio=table, root=tmp_path / "wavs", recipe="musiccaps"))
    assert [track.path for track in found.tracks] == [
        "-0Gj8-vB1q4.wav",
        "[0I6_bHnHtHg]-[30-40].flac",
    ]
    track = found.tracks[0]
    assert track.caption.startswith("The low quality") and (track.start, track.duration) == (
        0,
        None,
    )
    assert json.loads(track.info)["keywords"] == ["low quality", "drums"]
    assert [(r.path, r.reason) for r in found.rejects] == [("gone_gone_g", "missing")]


def test_audiocaps(tmp_path):
    rows = [
        {"audiocap_id": i, "youtube_id": name, "start_time": 30, "caption": f"caption {i}"}
        for i, name in enumerate(["r1nicOVtvkQ", "r1nicOVtvkQ", "ZVV2yKr4I8g", "4B3Ym23Z9v0"])
    ]
    table = write_csv(tmp_path / "test.csv", rows)
    put(tmp_path / "Yr1nicOVtvkQ.wav", tone(1.1), caption=None)
    put(tmp_path / "ZVV2yKr4I8g.mp3", tone(1.2), caption=None)
    put(tmp_path / "sub" / "4B3Ym23Z9v0_30.wav", tone(1.3), caption=None)
    found = scan(Source(audio=table, recipe="audiocaps"))
    assert not found.rejects
    assert [(track.path, track.caption) for track in found.tracks] == [
        ("Yr1nicOVtvkQ.wav", "caption 0"),
        ("ZVV2yKr4I8g.mp3", "caption 2"),
        ("sub/4B3Ym23Z9v0_30.wav", "caption 3"),
    ]
    assert json.loads(found.tracks[0].info)["captions"] == ["caption 1"]


def test_clotho(tmp_path):
    row = {"file_name": "Distorted AM Radio noise.wav"}
    row |= {f"caption_{i}": f"a radio, said {i} times" for i in range(1, 6)}
    table = write_csv(tmp_path / "clotho_captions_development.csv", [row])
    put(tmp_path / "development" / row["file_name"], tone(1.1), caption=None)
    (track,) = scan(Source(audio=table, recipe="clotho")).tracks
    assert track.caption == "a radio, said 1 times"
    assert len(json.loads(track.info)["captions"]) == 4
    with pytest.raises(UserError, match="no column of paths"):
        scan(Source(audio=table, recipe="musiccaps"))


def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path):
    table = write_csv(tmp_path / "a.csv", [{"name": "a.wav", "words": "b"}])
    for columns, match in [
        (Columns(), r"no column of captions; name one, --columns.caption \(it has name, words\)"),
        (Columns(caption=("words",)), "no column of paths; name one, --columns.path"),
        (Columns(caption=("words",), path="nam"), "no column 'nam' .it has name, words"),
        (Columns(caption=("words",), path="{nam}.wav"), "no column 'nam'"),
        (Columns(caption=("words",), path="name", start="at"), "no column 'at'"),
        (Columns(caption=("words",), path="{name"), "--columns.path {name: "),
        (Columns(caption=("words",), path="{name:05d}"), "--columns.path {name:05d}: Unknown"),
    ]:
        with pytest.raises(UserError, match=match):
            scan(Source(audio=table, columns=columns))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match="not readable as Parquet"):
        scan(Source(audio=tmp_path / "bad.parquet"))
    (tmp_path / "song.zip").write_bytes(b"")
    for name in ("song.zip", "songs.tar.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="neither a folder nor|unpack it once"):
            scan(Source(audio=tmp_path / name))


def test_text_in_a_table_that_is_not_utf8_is_a_reject(tmp_path):
    put(tmp_path / "a.wav", tone(1.1), caption=None)
    table = tmp_path / os.fsdecode(b"t\xff.tsv")
    table.write_bytes(b"path\tcaption\na.wav\tcaf\xe9\ncaf\xe9.wav\tx\n\ty\n")
    found = scan(Source(audio=table))
    assert [(r.path, r.reason) for r in found.rejects] == [
        ("a.wav", "no caption"),
        ("caf\\udce9.wav", "bad name"),
        ("t\\udcff.tsv, line 4", "bad row"),
    ]


def test_patterns_take_numbers_and_rows_without_one_are_rejected(tmp_path):
    put(tmp_path / "00007.wav", tone(1.1), caption=None)
    table = pa.table({"id": [7, None], "text": ["seven", "none"]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = scan(Source(audio=tmp_path / "t.parquet", columns=Columns(path="{id:05d}.wav")))
    assert [track.path for track in found.tracks] == ["00007.wav"]
    assert [(r.path, r.detail) for r in found.rejects] == [("t.parquet, row 1", "no path in it")]


def test_all_columns_and_fields_are_kept_as_json(tmp_path):
    """NaN as null, and a column of the name that records have for other captions."""
    names = ["a.wav", "b.wav"]
    for i, name in enumerate(names):
        put(tmp_path / name, tone(1.1 + i / 10), caption=None)
    nan = float("nan")
    table = pa.table({
        "path": [*names, "b.wav"], "text": ["a", "b", "also b"], "bpm": [nan, 90.0, 90.0],
        "vector": [[1.0, nan], [float("inf")], None], "captions": [3, 4, None],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    found = scan(Source(audio=tmp_path / "t.parquet"))
    assert not found.rejects
    assert [json.loads(track.info) for track in found.tracks] == [
        {"vector": [1.0, None], "captions_": 3},
        {"bpm": 90.0, "vector": [None], "captions_": 4, "captions": ["also b"]},
    ]


def test_parquet_of_paths(tmp_path):
    """Both plain paths and the column that `datasets` writes where audio is not embedded."""
    for name in NAMES:
        put(tmp_path / f"{name}.flac", wav_of(name), caption=None)
    paths = [f"{name}.flac" for name in NAMES]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"plain": pa.array(paths), "audio": pa.array([{"path": p} for p in paths], kind)}
    for path, column in [("plain", "plain"), ("audio", "audio"), (None, "audio")]:
        table = pa.table({column: columns[column], "caption": list(NAMES), "when": [1, 2, None]})
        pq.write_table(table, tmp_path / "t.parquet")
        found = scan(Source(audio=tmp_path / "t.parquet", columns=Columns(path=path)))
        assert [t.path for t in found.tracks] == paths and not found.rejects
        assert [json.loads(t.info) for t in found.tracks] == [{"when": 1}, {"when": 2}, {}]


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct([("bytes", pa.binary())])])
def test_rows_of_parquet_without_audio_or_path_are_rejects(tmp_path, kind):
    table = pa.table({"audio": pa.array([None, None], kind), "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "t.parquet")
    rejects = scan(Source(audio=tmp_path / "t.parquet")).rejects
    assert [(r.path, r.detail) for r in rejects] == [
        (f"t.parquet, row {i}", "no path in it") for i in range(2)
    ]


def test_rows_of_parquet_are_read_in_any_order(tmp_path, decoder):
    waves = [tone(1 + i / 100, frequency=200 + i) for i in range(30)]
    audio = []
    for wav in waves:
        file = io.BytesIO()
        soundfile.write(file, wav, RATE, format="WAV", subtype="FLOAT")
        audio.append(file.getvalue())
    table = pa.table({"sound": audio, "text": [f"number {i}" for i in range(30)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=13)
    tracks = scan(Source(audio=tmp_path / "t.parquet")).tracks
    assert [track.path for track in tracks] == [f"t.parquet/{i}" for i in range(30)]
    order = [*range(30), 5, 29, 0, 12, 13, 26, 25, 14]
    for i in order:
        wav_CN, _ = read_audio(tracks[i], Intake(sample_rate=RATE, channels=1), decoder)
        np.testing.assert_array_equal(wav_CN, waves[i].T)
    beyond = dataclasses.replace(tracks[0], place=dataclasses.replace(tracks[0].place, row=30))
    with pytest.raises(RejectedError, match="no row 30"):
        read_audio(beyond, Intake(sample_rate=RATE, channels=1), decoder)


def test_rows_after_damage_never_have_the_audio_of_others(tmp_path, decoder):
    rng = np.random.default_rng(0)
    waves = [(rng.normal(size=RATE) * 0.1).clip(-1, 1).astype(np.float32) for _ in range(30)]
    audio = []
    for wav in waves:
        file = io.BytesIO()
        soundfile.write(file, wav, RATE, format="WAV", subtype="FLOAT")
        audio.append(file.getvalue())
    path = tmp_path / "t.parquet"
    table = pa.table({"sound": audio, "text": ["noise"] * 30})
    pages = {"data_page_size": 1, "write_batch_size": 1, "use_dictionary": False}
    pq.write_table(table, path, row_group_size=15, compression="gzip", **pages)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    damaged = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    damaged[middle : middle + 200] = bytes(200)
    path.write_bytes(damaged)
    read = []
    for i, track in enumerate(scan(Source(audio=path)).tracks):
        try:
            wav_CN, _ = read_audio(track, Intake(sample_rate=None, channels=1), decoder)
        except RejectedError as error:
            assert error.reason == "unreadable"
        else:
            np.testing.assert_array_equal(wav_CN[0], waves[i])
            read.append(i)
    assert read[:4] == [0, 1, 2, 3] and set(range(15, 30)) <= set(read) and len(read) < 30


def test_links_to_parquet_may_have_any_name(tmp_path, decoder):
    """As in the cache of the Hugging Face hub."""
    a_parquet(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, blob in [("train-00000-of-00002", "1f"), ("train-00001-of-00002", "2e")]:
        (tmp_path / f"{name}.parquet").rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / f"{name}.PARQUET").symlink_to(tmp_path / "blobs" / blob)
    source = Source(audio=tmp_path / "snapshot", root=tmp_path)
    for name, track in zip(NAMES, scan(source).tracks, strict=True):
        wav_CN, _ = read_audio(track, Intake(sample_rate=None, channels=1), decoder)
        np.testing.assert_allclose(wav_CN.T, wav_of(name), atol=1e-4)
    with pytest.raises(UserError, match="PARQUET: leads out of .*snapshot; --root can name"):
        scan(Source(audio=tmp_path / "snapshot"))
