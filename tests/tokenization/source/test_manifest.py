"""The manifest of a job: written once, read by shards, restarts and other machines."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sounds import album, content, put, tone
from sources import KINDS

from magnet_jax.errors import UserError
from magnet_jax.io import files
from tokenization import job as jobs
from tokenization.job import run
from tokenization.settings import Job
from tokenization.source import manifest
from tokenization.source import scan as scanning
from tokenization.source.manifest import Manifest
from tokenization.source.settings import Columns, Source
from tokenization.track import FileBytes, Reject, Track

pytestmark = pytest.mark.usefixtures("stub")


def paths_of(written):
    return {track.place.path for track in written.manifest.tracks}


@pytest.fixture
def scans(monkeypatch):
    """The sources that jobs have scanned."""
    found = []

    def scan(source):
        found.append(source)
        return scanning.scan(source)

    monkeypatch.setattr(jobs, "scan", scan)
    return found


@pytest.mark.parametrize("make", KINDS)
def test_it_is_read_as_it_was_written(make, tmp_path):
    source = make(tmp_path)
    scanned = scanning.scan(source)
    written = manifest.read(line.encode() for line in manifest.lines(source, scanned))
    assert written.manifest == scanned and scanned.tracks
    assert written.source == manifest.settings(source)
    assert manifest.is_as_it_was(written, paths_of(written))
    places = [track.place.path for track in written.manifest.tracks]
    same = [a is b for a, b in zip(places, places[1:]) if a == b]
    assert all(same)  # one text in memory for all that lie in one file


def test_odd_names_and_numbers_come_back(tmp_path):
    track = Track(
        path="é ☃",
        track_id="\u2028 \x7f",
        place=FileBytes(path="/folder/\udcff.wav", offset=2**40, size=3),
        captions=('"', "\n\\", "\x00"),
        fields='{"bpm": 90.5}',
        start=1 / 3,
        duration=0.1 + 0.2,
    )
    rejects = (Reject(path="b", reason="no caption", detail="\U0001f3b5"),)
    whole = Manifest(tracks=(track,) * 2, rejects=rejects, ignored={".png": 2}, fingerprint="f")
    written = manifest.read(x.encode() for x in manifest.lines(Source(audio=tmp_path), whole))
    assert written.manifest == whole
    assert not manifest.is_as_it_was(written, paths_of(written))  # there is no such file


def test_what_is_damaged_is_not_taken(tmp_path):
    source = Source(audio=album(tmp_path / "audio", 3))
    lines = [line.encode() for line in manifest.lines(source, scanning.scan(source))]
    assert manifest.read(lines)
    for damaged in (
        [], lines[:1], lines[:-1], lines[:2] + lines[3:],
        lines[:1] + lines[2:3] + lines[1:2] + lines[3:],
        [lines[0].replace(b"manifest 1", b"manifest 0"), *lines[1:]],
        [*lines[:2], lines[2].replace(b"a tone", b"a town"), *lines[3:]],
        [*lines[:2], lines[2][:20], *lines[3:]], [b"[]\n"], [b"\xff\n"], [b"{}\n", *lines[1:]],
        [lines[0], b"[" * 10**5],
    ):  # fmt: skip
        assert manifest.read(damaged) is None


def test_a_source_is_scanned_once_for_all_shards_and_restarts(tmp_path, scans):
    folder, out = album(tmp_path / "audio", 6), tmp_path / "out"
    put(folder / "mute.wav", tone(1.2), caption=None)
    (folder / "cover.png").write_bytes(b"")
    job = Job(audio=folder, out=out, tracks_per_shard=1, max_reject_ratio=0.5)
    whole = run(dataclasses.replace(job, out=tmp_path / "whole"))
    for shard in ("0/2", "1/2", "1/2"):
        run(dataclasses.replace(job, shard=shard))
    # nobody looks for the captions again
    (folder / "00.json").unlink()
    summary = run(job)
    assert summary == whole.replace("/whole", "/out") and run(job) == summary
    assert "1 of 7 files rejected (1 no caption" in summary and "1 other files: 1 .png" in summary
    assert content(out) == content(tmp_path / "whole")
    assert [source.out for source in scans] == [tmp_path / "whole", out]


def test_the_source_is_scanned_again_on_demand(tmp_path, scans):
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"
    job = Job(audio=folder, out=out)
    summary = run(job)
    before = content(out)
    assert run(dataclasses.replace(job, rescan=True)) == summary and len(scans) == 2
    put(folder / "new.wav", tone(1.1, frequency=99))
    assert run(job) == summary and len(scans) == 2
    for change in ({}, {"shard": "0/2"}):
        with pytest.raises(UserError, match=f"--out {out}: the audio or captions changed"):
            run(dataclasses.replace(job, rescan=True, **change))
    assert content(out) == before


def overwrite(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [Path.unlink, overwrite, lambda path: put(path, tone(1.7))])
def test_a_shard_sees_that_its_files_have_changed(tmp_path, scans, change):
    folder, out = album(tmp_path / "audio", 4), tmp_path / "out"
    job = Job(audio=folder, out=out, tracks_per_shard=1, validation_percent=0)
    run(dataclasses.replace(job, shard="0/2"))
    change(folder / "03.wav")  # the other shard's
    run(dataclasses.replace(job, shard="0/2"))
    for shard in ("1/2", "0/1"):
        with pytest.raises(UserError, match=f"--out {out}: the audio or captions changed"):
            run(dataclasses.replace(job, shard=shard))
    assert len(scans) == 3


def test_a_copy_with_other_times_is_the_same(tmp_path, scans):
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"
    summary = run(Job(audio=folder, out=out))
    before = content(out)
    os.utime(folder / "01.wav", ns=(7, 7))
    assert run(Job(audio=folder, out=out)) == summary and content(out) == before
    folder.rename(tmp_path / "moved")
    moved = Job(audio=tmp_path / "moved", out=out)
    assert run(moved) == summary and len(scans) == 3
    os.utime(out / "manifest.jsonl", ns=(7, 7))
    assert run(moved) == summary and len(scans) == 3


def test_other_settings_of_the_source_mean_another_manifest(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    kinds = [
        Source(audio=a), Source(audio=b), Source(audio=a, root=b), Source(audio=a, metadata=b),
        Source(audio=a, recipe="clotho"), Source(audio=a, columns=Columns(id="x")),
        Source(audio=a, columns=Columns(caption=("x", "y"))),
    ]  # fmt: skip
    found = [json.dumps(manifest.settings(source)) for source in kinds]
    assert len(set(found)) == len(kinds)
    names = {field.name for field in dataclasses.fields(Source)}
    assert names <= manifest.settings(kinds[0]).keys()


def test_a_table_that_changed_is_read_again(tmp_path, scans):
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"
    table = folder / "songs.csv"
    table.write_text("path,caption\n" + "".join(f"0{i}.wav,tone {i}\n" for i in range(3)))
    job = Job(audio=table, out=out, validation_percent=0)
    run(job)
    run(job)
    assert len(scans) == 1
    table.write_text(table.read_text().replace("tone 1", "noise"))
    with pytest.raises(UserError, match="the audio or captions changed"):
        run(job)


def test_a_lost_or_damaged_manifest_is_written_again(tmp_path, scans):
    job = Job(audio=album(tmp_path / "audio", 3), out=tmp_path / "out")
    summary = run(job)
    before = content(job.out)
    path = job.out / manifest.NAME
    for count, spoil in enumerate((Path.unlink, lambda path: os.truncate(path, 300)), 2):
        spoil(path)
        assert run(job) == summary
        assert content(job.out) == before and len(scans) == count


SHARD = """
import sys
from pathlib import Path
from tokenization import job
from tokenization.job import run
from tokenization.settings import Job

scan = job.scan

def slow(source):
    Path(sys.argv[3]).touch()
    while not Path(sys.argv[4]).exists():
        pass
    return scan(source)

job.scan = slow
job._work = lambda job, place, manifest, units, making: print(len(manifest.tracks))
job.read_done = lambda place, units: [None] * len(units)
run(Job(audio=Path(sys.argv[1]), out=Path(sys.argv[2]), shard=sys.argv[5]))
"""


def test_of_shards_that_begin_at_once_one_scans_and_the_others_wait(tmp_path):
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"

    def start(shard):
        paths = [folder, out, tmp_path / f"scans-{shard[0]}", tmp_path / "go"]
        return subprocess.Popen(
            [sys.executable, "-c", SHARD, *map(str, paths), shard],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, deadline = start("0/2"), time.monotonic() + 120
    while not (tmp_path / "scans-0").exists() and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second = start("1/2")
    assert second.stdout.readline().startswith("waiting for another shard, which scans")
    (tmp_path / "go").touch()
    told = [process.communicate() for process in (first, second)]
    assert [out.splitlines()[0] for out, _ in told] == ["3", "3"], told
    assert not (tmp_path / "scans-1").exists()


def test_a_lock_of_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def held(path, wait):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files, "held", held)
    with pytest.raises(UserError, match=f"--out {tmp_path}/out: its file system has no locks"):
        run(Job(audio=album(tmp_path / "audio", 1), out=tmp_path / "out", shard="0/2"))
