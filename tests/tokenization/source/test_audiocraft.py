"""AudioCraft's manifests, and their metadata elsewhere."""

import gzip
import json
import os
import zipfile

import pytest
from sounds import put, tone
from sources import (
    NAMES,
    wav_of,
    write_metadata,
)

from magnet_jax.errors import UserError
from tokenization.source.scan import scan
from tokenization.source.settings import Source


def test_paths_of_a_manifest_stay_below_its_root(tmp_path):
    put(tmp_path / "music" / "a.wav", tone(1.1))
    put(tmp_path / "secret.wav", tone(1.2))
    (tmp_path / "music" / "link").symlink_to(tmp_path)
    (tmp_path / "music" / "again").symlink_to(tmp_path / "music")
    outside = [
        "../secret.wav",
        str(tmp_path / "secret.wav"),
        "link/secret.wav",
        "x/../../secret.wav",
    ]
    outside.append("again/../secret.wav")
    paths = ["a.wav", "again/a.wav", *outside, "gone.wav", "a\0.wav", "\ud800.wav", "again"]
    manifest = tmp_path / "music" / "data.jsonl"
    manifest.write_text("".join(json.dumps({"path": path}) + "\n\n" for path in paths))
    found = scan(Source(audio=manifest))
    assert [track.path for track in found.tracks] == ["a.wav"]
    reasons = {reject.path: reject.reason for reject in found.rejects}
    assert {path: reasons.pop(path) for path in outside} == dict.fromkeys(
        outside, "outside the folder"
    )
    assert reasons == {
        "gone.wav": "missing",
        "a\0.wav": "bad name",
        "\\ud800.wav": "bad name",
        "again": "unreadable",
        "again/a.wav": "duplicate",
    }
    with pytest.raises(UserError, match="none of its 1 files is there .* --root names the folder"):
        manifest.write_text(json.dumps({"path": "music/a.wav"}))
        scan(Source(audio=manifest))
    manifest.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    # from the root above, the others are there too
    above = scan(Source(audio=manifest, root=tmp_path))
    assert [track.path for track in above.tracks] == ["secret.wav"]


def test_a_manifest_with_metadata_elsewhere(tmp_path):
    for name in NAMES:
        put(tmp_path / f"{name}.wav", wav_of(name), caption=None)
    with zipfile.ZipFile(tmp_path / "info.zip", "w") as archive:
        archive.writestr("music/a.json", json.dumps({"description": "zipped", "bpm": 90.5}))
    (tmp_path / "b_info.json").write_text(json.dumps({"description": "elsewhere"}))
    lines = [
        {"path": "a.wav", "info_path": f"{tmp_path}/info.zip:/music/a.json"},
        {"path": "b.wav", "info_path": "b_info.json"},
        {"path": "c.wav", "info_path": "info.zip:/music/c.json"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = scan(Source(audio=tmp_path))
    assert [track.caption for track in found.tracks] == ["zipped", "elsewhere"]
    assert json.loads(found.tracks[0].info) == {"bpm": 90.5}
    assert [(r.path, r.reason) for r in found.rejects] == [("c.wav", "no caption")]


def test_archives_of_metadata_that_cannot_be_read_are_rejects(tmp_path, monkeypatch):
    names = ["good", "bomb", "locked", "odd", "pipe", "huge", "nothing"]
    for i, name in enumerate(names):
        put(tmp_path / f"{name}.wav", tone(1.1 + i / 100), caption=None)
    with zipfile.ZipFile(tmp_path / "info.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names[:4]:
            text = name * (10**7 if name == "bomb" else 1)
            archive.writestr(f"{name}.json", json.dumps({"text": text}))
    with zipfile.ZipFile(tmp_path / "info.zip") as archive:
        offsets = {
            name: archive.getinfo(f"{name}.json").header_offset for name in ("locked", "odd")
        }
    data = bytearray((tmp_path / "info.zip").read_bytes())
    for name, at, value in [("locked", 6, 1), ("odd", 8, 97)]:  # flags: encrypted; method: unknown
        directory = data.rindex(f"{name}.json".encode()) - 46
        data[offsets[name] + at] = data[directory + at + 2] = value
    (tmp_path / "info.zip").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.zip")
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**30)
    where = dict.fromkeys(names, "info.zip:{}.json") | {
        "pipe": "pipe.zip:{}.json",
        "huge": "huge.json",
    }
    lines = [{"path": f"{n}.wav", "info_path": where[n].format(n)} for n in names]
    lines.append({"path": "pipe.wav", "info_path": "pipe.json"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    opened = []
    real = zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda self, *how: opened.append(how) or real(self, *how)
    )
    found = scan(Source(audio=tmp_path))
    assert [track.caption for track in found.tracks] == ["good"]
    assert len(opened) == 1  # for one and all
    reject = {r.path.removesuffix(".wav"): r for r in found.rejects}
    assert set(reject) == set(names[1:]) and len(found.rejects) == 7
    assert {r.reason for r in found.rejects} == {"no caption"}
    assert reject["bomb"].detail == "info.zip:bomb.json: larger than 4 MiB"
    assert reject["huge"].detail == "huge.json: larger than 4 MiB"
    assert reject["locked"].detail == "info.zip:locked.json cannot be read"


@pytest.mark.parametrize("kind", ["a pipe", "large"])
def test_sidecars_that_would_take_for_ever_are_rejects(tmp_path, kind):
    put(tmp_path / "music" / "a.wav", tone(1.1), caption=None)
    put(tmp_path / "music" / "b.wav", tone(1.2), caption=None)
    put(tmp_path / "music" / "c.wav", tone(1.3), caption=None)
    (tmp_path / "meta").mkdir()
    for path in (
        tmp_path / "music" / "a.json",
        tmp_path / "music" / "b.txt",
        tmp_path / "meta" / "c.json",
    ):
        if kind == "large":
            path.write_text(" " * 2**22 + '"a"')
        else:
            os.mkfifo(path)
    why = "larger than 4 MiB" if kind == "large" else "not a regular file"
    found = scan(Source(audio=tmp_path / "music", metadata=tmp_path / "meta"))
    assert [(r.reason, r.detail) for r in found.rejects] == [
        ("no caption", f"{name}: {why}") for name in ("a.json", "b.txt", "c.json")
    ]


def test_links_to_folders_that_are_passed_over_are_rejected(tmp_path):
    put(tmp_path / ".store" / "music" / "a.wav", tone(1.1))
    put(tmp_path / "b.wav", tone(1.2))
    put(tmp_path / "seen" / "c.wav", tone(1.3))
    (tmp_path / ".config").mkdir()
    for name, to in (("music", ".store/music"), ("again", "seen"), ("config", ".config")):
        (tmp_path / name).symlink_to(tmp_path / to)
    (tmp_path / "up").symlink_to(tmp_path)
    found = scan(Source(audio=tmp_path))
    assert [track.path for track in found.tracks] == ["b.wav", "seen/c.wav"]
    assert [(r.path, r.reason) for r in found.rejects] == [("music", "hidden")]


def test_links_out_of_the_folder_of_metadata_are_rejected(tmp_path):
    put(tmp_path / "music" / "a.wav", tone(1.1), caption=None)
    (tmp_path / "secret.json").write_text('{"text": "secret"}')
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "a.json").symlink_to(tmp_path / "secret.json")
    put(tmp_path / "music" / "b.wav", tone(1.2))
    found = scan(Source(audio=tmp_path / "music", metadata=tmp_path / "meta"))
    assert [(r.path, r.reason) for r in found.rejects] == [("a.wav", "outside the folder")]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"path": "a.wav", "x": ' + b"[" * 200_000 + b"\n", "line 1 is not a JSON object"),
        (b'{"path": "a.wav"}\n{"pa', "line 2 is not a JSON object with a 'path'"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"path": "a.wav", "path": "b.wav"}\n', "line 1: 'path' is there twice"),
        (b'{"path": 3}\n', "line 1 is not a JSON object"),
        (gzip.compress(b'{"path": "a.wav"}\n' * 9, mtime=0)[:-9], "damaged after line 9"),
        (gzip.compress(b'{"path": 3}\n', mtime=0), "line 1 is not a JSON object"),
    ],
)
def test_a_damaged_manifest_is_an_error(tmp_path, content, match):
    put(tmp_path / "a.wav", tone(1.1))
    name = "data.jsonl.gz" if content[:1] == b"\x1f" else "data.jsonl"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: ({match})"):
        scan(Source(audio=tmp_path / name))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "data.jsonl.gz", "t.tar", "t.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    put(tmp_path / "audio" / "a.wav", tone(1.1), caption=None)
    for path in (tmp_path / name, tmp_path / "audio" / "metadata.jsonl"):
        os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name}: neither a file nor a folder"):
        scan(Source(audio=tmp_path / name))
    (reject,) = scan(Source(audio=tmp_path / "audio")).rejects
    assert (reject.path, reject.reason) == ("a.wav", "no caption")


def test_a_list_of_captions_that_lies_elsewhere_is_not_taken(tmp_path):
    put(tmp_path / "audio" / "a.wav", tone(1.1), caption=None)
    write_metadata(tmp_path / "metadata.jsonl", [{"file_name": "a.wav", "text": "elsewhere"}])
    (tmp_path / "audio" / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match="audio/metadata.jsonl: a link out of the folder"):
        scan(Source(audio=tmp_path / "audio"))
