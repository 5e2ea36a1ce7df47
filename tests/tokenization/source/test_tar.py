"""Tars and saved data sets."""

import os
import shutil
import subprocess
import tarfile

import datasets
import numpy as np
import pytest
from sounds import RATE, put, tone
from sources import (
    a_parquet,
    a_saved_data_set,
    a_webdataset,
    add_to_tar,
    caption_of,
    flac,
    save_data_set,
    wav_of,
)
from tokenizing import read_audio

from magnet_jax.errors import UserError
from tokenization.intake.audio import Intake
from tokenization.intake.decoder import Decoder
from tokenization.source.scan import scan
from tokenization.source.settings import Source


@pytest.fixture(scope="module")
def decoder():
    with Decoder(60) as process:
        yield process


def test_a_damaged_tar_loses_what_is_damaged(tmp_path, decoder):
    source = a_webdataset(tmp_path)
    with tarfile.open(tmp_path / "shard-2.tar", "w") as tar:
        add_to_tar(tar, "alone.flac", flac("a")[:-1])
        add_to_tar(tar, "stems.mix.flac", flac("b")[:-1])
        add_to_tar(tar, "stems.voice.flac", flac("c")[:-1])
        add_to_tar(tar, "stems.txt", b"two parts of one song")
        add_to_tar(tar, "last.txt", b"cut within its audio")
        add_to_tar(tar, "last.flac", flac("c"))
    with tarfile.open(tmp_path / "shard-2.tar") as tar:
        end = tar.getmember("last.flac").offset_data + 100
    os.truncate(tmp_path / "shard-2.tar", end)
    (tmp_path / "shard-3.tar").write_bytes(b"no tar at all" * 100)
    found = scan(source)
    assert [t.track_id for t in found.tracks] == [
        "shard-0/x/a", "shard-0/x/b", "shard-1/c", "shard-2/stems",
    ]  # fmt: skip
    assert [(r.path, r.reason) for r in found.rejects] == [
        ("shard-2.tar/alone.flac", "no caption"),
        ("shard-2.tar/stems.voice.flac", "same name"),
        ("shard-2.tar", "damaged tar"),
        ("shard-3.tar", "damaged tar"),
    ]
    wav_CN, _ = read_audio(found.tracks[1], Intake(sample_rate=RATE, channels=1), decoder)
    np.testing.assert_allclose(wav_CN, wav_of("b").T, atol=1e-4)


@pytest.mark.parametrize("damage", ["header", "zeros", "no end", "within a header", "another tar"])
def test_a_tar_that_does_not_end_where_its_members_do_is_damaged(tmp_path, damage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in "abc":
            add_to_tar(tar, f"{name}.flac", flac(name))
            add_to_tar(tar, f"{name}.txt", caption_of(name).encode())
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("c.flac").offset
    assert len(scan(Source(audio=path)).tracks) == 3
    path.write_bytes(
        {
            "header": data[: third + 150] + b"x" + data[third + 151 :],  # its checksum
            "zeros": data[:third] + bytes(512) + data[third + 512 :],
            "no end": data[:third],
            "within a header": data[: third + 100],
            "another tar": data + data,
        }[damage]
    )
    found = scan(Source(audio=path))
    assert [track.track_id for track in found.tracks][:2] == ["a/a", "a/b"]
    (reject,) = found.rejects
    whole = 6 if damage == "another tar" else 4
    assert (reject.path, reject.reason) == ("a.tar", "damaged tar")
    assert reject.detail.startswith(f"after {whole} whole files: ")


@pytest.mark.parametrize("size", [2**87 - 1, -5, -512, -1536])
def test_a_size_in_a_tar_that_no_file_can_have_is_damage(tmp_path, size):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add_to_tar(tar, "a.flac", flac("a"))
        add_to_tar(tar, "a.txt", b"of a")
    content = bytearray((tmp_path / "t.tar").read_bytes())
    header = content.index(b"a.txt")
    number = size.to_bytes(11, "big", signed=True)
    content[header + 124 : header + 136] = (b"\xff" if size < 0 else b"\x80") + number
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    (tmp_path / "t.tar").write_bytes(content)
    found = scan(Source(audio=tmp_path / "t.tar"))
    assert "damaged tar" in [r.reason for r in found.rejects] and not found.tracks


def test_files_of_one_name_in_a_tar_are_not_one_clip(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in "ab":
            add_to_tar(tar, "song.flac", flac(name))
            add_to_tar(tar, "song.txt", caption_of(name).encode())
            add_to_tar(tar, "cover.png", b"a picture")
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "song.flac"
        tar.addfile(link)
    found = scan(Source(audio=tmp_path / "a.tar"))
    assert [track.captions for track in found.tracks] == [(caption_of("a"),)]
    assert [(r.path, r.detail) for r in found.rejects] == [
        ("a.tar/song.flac", "another track is called a/song")
    ]
    assert found.ignored == {".png": 2, "links and the like within tars": 1}


def test_sparse_and_empty_members_of_tars_are_rejected(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("audio.flac", "caption.json"):
        with (tmp_path / "in" / name).open("wb") as file:
            file.write(flac("a") if name == "audio.flac" else b'{"text": "a", "more": "')
            file.seek(2**20)
            file.write(b'"}')
    (tmp_path / "in" / "audio.txt").write_text("a hole in its middle")
    (tmp_path / "in" / "caption.flac").write_bytes(flac("b"))
    (tmp_path / "in" / "empty.flac").write_bytes(b"")
    (tmp_path / "in" / "empty.txt").write_text("nothing")
    for kind in ("gnu", "posix"):
        tar = tmp_path / f"{kind}.tar"
        names = [
            "audio.flac",
            "audio.txt",
            "caption.flac",
            "caption.json",
            "empty.flac",
            "empty.txt",
        ]
        command = ["tar", "-cSf", tar, f"--format={kind}", "-C", tmp_path / "in", *names]
        subprocess.run(command, check=True)
        found = scan(Source(audio=tar))
        assert not found.tracks
        assert [r.reason for r in found.rejects] == ["sparse file", "sparse file", "empty"]


def test_a_tar_may_have_a_name_that_is_not_utf8(tmp_path, decoder):
    path = tmp_path / os.fsdecode(b"t\xff.tar")
    with tarfile.open(path, "w") as tar:
        add_to_tar(tar, "a.flac", flac("a"))
        add_to_tar(tar, "a.txt", b"text")
    (track,) = scan(Source(audio=path)).tracks
    assert (track.path, track.track_id) == ("t\\udcff.tar/a.flac", "t\\udcff/a")
    read_audio(track, Intake(sample_rate=None, channels=1), decoder)


def test_files_of_several_kinds_must_be_chosen_from(tmp_path):
    a_webdataset(tmp_path)
    put(tmp_path / "sub" / "music" / "a.wav", tone(1.1))
    with pytest.raises(UserError, match="several kinds in it .shard-0.tar, sub.; name"):
        scan(Source(audio=tmp_path))
    shutil.rmtree(tmp_path / "sub")
    a_parquet(tmp_path)
    with pytest.raises(UserError, match="several kinds .*shard-0.tar, train-00000-of-00002.parq"):
        scan(Source(audio=tmp_path))
    (tmp_path / "cache").mkdir()
    for path in tmp_path.glob("*.parquet"):
        path.rename(tmp_path / "cache" / path.name)
    assert len(scan(Source(audio=tmp_path)).tracks) == 3


def test_shards_and_saved_files_that_lie_elsewhere_are_refused(tmp_path):
    (tmp_path / "tars").mkdir()
    a_webdataset(tmp_path)
    (tmp_path / "tars" / "shard-0.tar").symlink_to(tmp_path / "shard-0.tar")
    with pytest.raises(UserError, match="shard-0.tar: leads out of .*tars; --root can name"):
        scan(Source(audio=tmp_path / "tars"))
    assert len(scan(Source(audio=tmp_path / "tars", root=tmp_path)).tracks) == 2
    a_saved_data_set(tmp_path)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.rename(tmp_path / "x.arrow")
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace(file.name, "../x.arrow"))
    with pytest.raises(UserError, match="x.arrow: leads out of .*saved; --root can name"):
        scan(Source(audio=tmp_path / "saved"))


def test_duplicates_within_tars_and_saved_data_sets(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, name in enumerate("aba"):
            add_to_tar(tar, f"{i}.flac", flac(name))
            add_to_tar(tar, f"{i}.txt", b"text")
    rejects = scan(Source(audio=tmp_path / "a.tar")).rejects
    assert [(r.path, r.detail) for r in rejects] == [
        ("a.tar/2.flac", "the same bytes as a.tar/0.flac")
    ]
    save_data_set(tmp_path / "saved", "abca", list("abcd"))
    (reject,) = scan(Source(audio=tmp_path / "saved")).rejects
    assert reject.path.endswith(".arrow/3") and reject.detail.endswith(".arrow/0")


def test_several_splits_must_be_chosen_from(tmp_path):
    a_saved_data_set(tmp_path)
    saved = datasets.load_from_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match="several splits; name one of .*dict/test, .*dict/train"):
        scan(Source(audio=tmp_path / "dict"))
    assert len(scan(Source(audio=tmp_path / "dict" / "train")).tracks) == 3
    for path in (tmp_path / "dict" / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged, not readable as a data set"):
        scan(Source(audio=tmp_path / "dict" / "train"))
