"""Folders: who is in them, and where their captions are."""

import dataclasses
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from sounds import RATE, put, tone
from sources import (
    a_csv,
    a_parquet,
    a_saved_data_set,
    a_webdataset,
    add_to_tar,
    caption_of,
    flac,
    write_metadata,
)

from magnet_jax.errors import UserError
from tokenization.source.scan import scan
from tokenization.source.settings import Columns, Source


def test_the_json_file_counts_where_both_are(tmp_path):
    put(tmp_path / "a.wav", tone(1.1), caption="of the json")
    (tmp_path / "a.txt").write_text("of the txt")
    put(tmp_path / "b.wav", tone(1.2), caption=None)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes.txt").write_text("nobody's")
    manifest = scan(Source(audio=tmp_path))
    assert [track.caption for track in manifest.tracks] == ["of the json"]
    assert [(r.path, r.detail) for r in manifest.rejects] == [("b.wav", "b.txt is not UTF-8")]
    assert manifest.ignored == {".txt": 1}


def test_metadata_may_lie_in_a_folder_of_its_own(tmp_path):
    put(tmp_path / "audio" / "deep" / "a.wav", tone(1.1), caption=None)
    put(tmp_path / "audio" / "b.wav", tone(1.2), caption="beside it")
    (tmp_path / "meta").mkdir()
    for name in "ab":
        sound = {"description": [f"sound {name}", "another"], "key": None}
        (tmp_path / "meta" / f"{name}.json").write_text(json.dumps(sound))
    manifest = scan(Source(audio=tmp_path / "audio", metadata=tmp_path / "meta"))
    assert [track.caption for track in manifest.tracks] == ["beside it", "sound a"]
    # the other descriptions of AudioCraft's sounds stay with the first
    assert json.loads(manifest.tracks[1].info) == {"captions": ["another"]}
    with pytest.raises(UserError, match="--metadata .*: no such folder"):
        scan(Source(audio=tmp_path / "audio", metadata=tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_metadata_that_may_be_about_two_files_is_that_of_neither(tmp_path, kind):
    paths = ("x/a.wav", "y/a.wav", "x/b.wav", "y/b.wav", "x/c.wav", "y/c.wav", "y/d.wav")
    for i, path in enumerate(paths):
        caption = "beside it" if path == "x/b.wav" else None
        put(tmp_path / "audio" / path, tone(1.1 + i / 10), caption=caption)
    shutil.copy(tmp_path / "audio" / "x" / "c.wav", tmp_path / "audio" / "y" / "c.wav")
    if kind == "manifest":
        lines = [json.dumps({"path": path}) for path in paths]
        (tmp_path / "audio" / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta").mkdir()
    for name in "abcd":
        (tmp_path / "meta" / f"{name}.json").write_text(json.dumps({"caption": f"of {name}"}))
    found = scan(Source(audio=tmp_path / "audio", metadata=tmp_path / "meta"))
    captions = {"x/b.wav": "beside it", "x/c.wav": "of c", "y/b.wav": "of b", "y/d.wav": "of d"}
    assert {t.path: t.caption for t in found.tracks} == captions
    detail = "a.json in --metadata may be about {} instead; put a .json beside each"
    assert {(r.path, r.reason, r.detail) for r in found.rejects if r.reason != "duplicate"} == {
        ("x/a.wav", "ambiguous", detail.format("y/a.wav")),
        ("y/a.wav", "ambiguous", detail.format("x/a.wav")),
    }
    assert [r.path for r in found.rejects if r.reason == "duplicate"] == ["y/c.wav"]


@pytest.mark.parametrize("make", [a_csv, a_parquet, a_webdataset, a_saved_data_set])
def test_metadata_is_refused_where_captions_are_within(tmp_path, make):
    source = make(tmp_path)
    with pytest.raises(UserError, match="^--metadata .*: for a folder of audio or a manifest; "):
        scan(dataclasses.replace(source, metadata=tmp_path))


def test_tracks_are_in_the_byte_order_of_their_paths(tmp_path):
    names = ["a.wav", "a-b.wav", "a/z.wav", "a.d/b.wav", "ä.wav", "B.wav", "a/b/c.wav"]
    for i, name in enumerate(names):
        put(tmp_path / name, tone(1 + i / 100))
    paths = [track.path for track in scan(Source(audio=tmp_path)).tracks]
    assert paths == sorted(names, key=os.fsencode)


def test_equal_bytes_are_found_and_the_first_counts(tmp_path):
    rng = np.random.default_rng(0)
    noise = (rng.normal(size=40 * RATE) * 0.1).astype(np.float32)
    other = noise.copy()
    other[20 * RATE] += 0.25  # alike in size and at both ends
    for name, wav in [("a", noise), ("b", other), ("c", noise), ("d", other), ("e", noise)]:
        put(tmp_path / f"{name}.wav", wav, caption=f"called {name}")
    put(tmp_path / "f.wav", tone(1.1))
    shutil.copy(tmp_path / "f.wav", tmp_path / "g.wav")
    (tmp_path / "g.txt").write_text("the same tone")
    (tmp_path / "link.wav").symlink_to(tmp_path / "f.wav")
    (tmp_path / "link.txt").write_text("the same tone")
    manifest = scan(Source(audio=tmp_path))
    assert [track.path for track in manifest.tracks] == ["a.wav", "b.wav", "f.wav"]
    assert {reject.path: reject.detail for reject in manifest.rejects} == {
        "c.wav": "the same bytes as a.wav",
        "d.wav": "the same bytes as b.wav",
        "e.wav": "the same bytes as a.wav",
        "g.wav": "the same bytes as f.wav",
        "link.wav": "the same bytes as f.wav",
    }
    assert {reject.reason for reject in manifest.rejects} == {"duplicate"}


def test_sidecars_in_capitals_are_read_and_others_counted(tmp_path):
    for i, suffix in enumerate((".JSON", ".TXT")):
        put(tmp_path / f"{i}.WAV", tone(1.1 + i / 10), caption=None)
        text = f"number {i}"
        (tmp_path / f"{i}{suffix}").write_text(
            json.dumps({"text": text}) if suffix == ".JSON" else text
        )
    for name in ("alone.json", "alone.TXT", "0.Json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "odd.xyz").write_text("no audio")
    (tmp_path / "odd.JSON").write_text('{"text": "odd"}')
    found = scan(Source(audio=tmp_path))
    assert [track.caption for track in found.tracks] == ["number 0", "number 1"]
    assert [(r.path, r.reason) for r in found.rejects] == [("odd.xyz", "unknown format")]
    assert found.ignored == {".json": 2, ".txt": 1}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_to_tar(tar, "a.FLAC", flac("a"))
        add_to_tar(tar, "a.TXT", b"in a tar")
    assert [t.caption for t in scan(Source(audio=tmp_path / "a.tar")).tracks] == ["in a tar"]


def test_of_files_that_differ_in_their_suffix_the_first_is_named(tmp_path):
    put(tmp_path / "song.flac", tone(1.1))
    put(tmp_path / "song.wav", tone(1.2))
    found = scan(Source(audio=tmp_path))
    (reject,) = found.rejects
    assert (reject.path, reject.reason) == ("song.wav", "same name")
    assert reject.detail == "song.flac goes by the same name, and may be other audio; rename one"


def test_what_macos_adds_is_no_audio(tmp_path):
    """AppleDouble files, which have the names of others after `._`."""
    put(tmp_path / "in" / "a.wav", tone(1.1))
    for name in ("._a.wav", "._a.json", ".DS_Store", "__MACOSX/in/._a.wav", "__MACOSX/b.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"\0\5\x16\7")
    assert [t.path for t in scan(Source(audio=tmp_path / "in")).tracks] == ["a.wav"]
    assert not scan(Source(audio=tmp_path / "in")).rejects
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("./a", "./sub/b"):
            folder, stem = name.rsplit("/", 1)
            add_to_tar(tar, f"{folder}/._{stem}.flac", b"\0\5\x16\7")
            add_to_tar(tar, f"{name}.flac", flac(stem))
            add_to_tar(tar, f"{folder}/._{stem}.txt", b"\0\5\x16\7")
            add_to_tar(tar, f"{name}.txt", caption_of(stem).encode())
        add_to_tar(tar, "__MACOSX/a.flac", flac("c"))
        add_to_tar(tar, "__MACOSX/a.txt", b"c")
    found = scan(Source(audio=tmp_path / "a.tar"))
    assert [t.caption for t in found.tracks] == [caption_of("a"), caption_of("b")]
    assert not found.rejects and found.ignored == {"hidden files within tars": 6}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata(tmp_path, name):
    for i, path in enumerate(("a.wav", "sub/b.wav", "c.wav", "train/d.wav", "e.wav")):
        put(tmp_path / path, tone(1.1 + i / 10), caption=None)
    rows = [
        {"file_name": "sub/b.wav", "text": "of b", "bpm": "90"},
        {"file_name": "a.wav", "text": "of a", "bpm": "80"},
        {"file_name": "a.wav", "text": "also of a", "bpm": "81"},
        {"file_name": "gone.wav", "text": "nothing", "bpm": ""},
        {"file_name": "../secret.wav", "text": "nothing", "bpm": ""},
        {"file_name": "c.wav", "text": "", "bpm": ""},
        {"file_name": "", "text": "of none", "bpm": ""},
    ]
    write_metadata(tmp_path / name, rows)
    write_metadata(tmp_path / "train" / name, [{"file_name": "d.wav", "text": "of d"}])
    found = scan(Source(audio=tmp_path))
    assert [(t.path, t.track_id, t.captions) for t in found.tracks] == [
        ("a.wav", "a", ("of a", "also of a")),
        ("sub/b.wav", "sub/b", ("of b",)),
        ("train/d.wav", "train/d", ("of d",)),
    ]
    assert json.loads(found.tracks[0].fields) == {"bpm": ["80", "81"]}
    first = 1 if name == "metadata.jsonl" else 2
    assert {r.path: (r.reason, r.detail) for r in found.rejects} == {
        "c.wav": ("no caption", f"no text in its row under 'text' ({name}, line {first + 5})"),
        "e.wav": ("no caption", "no e.json or e.txt beside it"),
        f"{name}, line {first + 6}": ("bad row", "no path in it"),
        "gone.wav": ("missing", f"no such file ({name}, line {first + 3})"),
        "../secret.wav": (
            "outside the folder",
            f"not below it; --root can name another ({name}, line {first + 4})",
        ),
    }
    assert not found.ignored
    # the table itself has no tracks but its own
    table = scan(Source(audio=tmp_path / name))
    assert [t.path for t in table.tracks] == ["sub/b.wav", "a.wav"]
    assert table.tracks[1].captions == ("of a", "also of a")
    before = found.fingerprint
    rows[0]["text"] = "of another"
    write_metadata(tmp_path / name, rows)
    assert scan(Source(audio=tmp_path)).fingerprint != before


def test_a_sidecar_counts_before_metadata_and_a_bad_one_does_not(tmp_path):
    for i, path in enumerate(("a.wav", "b.wav")):
        put(tmp_path / path, tone(1.1 + i / 10), caption=None)
    (tmp_path / "a.txt").write_text("beside it")
    (tmp_path / "b.json").write_text('{"seconds": 3}')
    rows = [{"file_name": f"{name}.wav", "text": "of the table"} for name in "ab"]
    write_metadata(tmp_path / "metadata.jsonl", rows)
    found = scan(Source(audio=tmp_path))
    assert [t.caption for t in found.tracks] == ["beside it", "of the table"]


def test_metadata_for_other_ends_is_left_alone(tmp_path):
    put(tmp_path / "wavs" / "a.wav", tone(1.1))
    for content in ("a|in no columns", "file_name,seconds\na.wav,3\ngone.wav,4\n", "", "x,x\n"):
        (tmp_path / "metadata.csv").write_text(content)
        (tmp_path / "wavs" / "metadata.csv").write_text(content)
        found = scan(Source(audio=tmp_path))
        assert [t.path for t in found.tracks] == ["wavs/a.wav"] and not found.rejects
    # where there is no other caption it is what is wrong
    (tmp_path / "wavs" / "a.json").unlink()
    for content, match in [
        ("file_name,words\na.wav,of a\n", "metadata.csv: no column of captions; .*has file_name"),
        ("file_name,text,text\na.wav,a,b\n", "metadata.csv: 2 columns are called 'text'"),
    ]:
        (tmp_path / "wavs" / "metadata.csv").write_text(content)
        with pytest.raises(UserError, match=match):
            scan(Source(audio=tmp_path / "wavs"))
    (tmp_path / "wavs" / "metadata.csv").write_text("file_name,words\na.wav,of a\n")
    source = Source(audio=tmp_path / "wavs", columns=Columns(caption=("words",)))
    assert [t.caption for t in scan(source).tracks] == ["of a"]
    write_metadata(tmp_path / "wavs" / "metadata.jsonl", [{"file_name": "a.wav", "text": "of a"}])
    with pytest.raises(UserError, match="wavs/: has metadata.jsonl and metadata.csv; keep one"):
        scan(source)
