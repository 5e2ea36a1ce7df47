import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sounds import RATE, album, content, cut_file, put, put_with_ffmpeg, tone
from tokenizing import InlineDecoder, finish, read_audio, start

from magnet_jax.config import ASSETS
from magnet_jax.data import records
from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import files
from tokenization import job as job_module
from tokenization import place as place_module
from tokenization.intake import decoder as decoder_module
from tokenization.intake.audio import Intake
from tokenization.intake.decoder import Decoder
from tokenization.job import run
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.source.settings import Source
from tokenization.units import split_of

pytestmark = pytest.mark.usefixtures("stub")


def read(out, split="train"):
    return [records.decode_example(example) for example in records.open_split(out, split)]


# --- files that are not fit ---------------------------------------------------------------------


def bad_files(folder):
    """One file for each reason to reject it: {path: reason}."""
    sound = tone(1.5)
    nan = sound.copy()
    nan[5000] = np.nan
    put(folder / "text.wav", sound).write_text("no sound at all")
    put(folder / "zero.wav", sound).write_bytes(b"")
    put(folder / "no_samples.wav", sound[:0])
    put(folder / "silent.wav", sound * 1e-3)
    put(folder / "offset.wav", np.full_like(sound, 0.5))
    put(folder / "nan.wav", nan, subtype="FLOAT")
    put(folder / "short.wav", sound[:15999])
    put(folder / "long.wav", tone(4.2))
    cut_file(put(folder / "cut.wav", sound))
    cut_file(put(folder / "cut.aiff.aiff", sound))
    put(folder / "loud.wav", sound * 32768, subtype="FLOAT")
    put(folder / "half.wav", sound).with_suffix(".json").write_text(r'{"description": "\ud800"}')
    put(folder / "half_info.wav", sound).with_suffix(".json").write_text(
        r'{"description": "a", "keywords": ["\udfff"]}'
    )
    put(folder / "deep.wav", sound).with_suffix(".json").write_text("[" * 200_000)
    put(folder / "song.wav", sound).rename(folder / "song.xyz")
    os.mkfifo(folder / "pipe.wav")
    cut_file(put(folder / "cut_mp3.mp3", tone(3, 44100), 44100))
    cut_file(put(folder / "cut_flac.flac", sound))
    put(folder / "alone.wav", sound, caption=None)
    put(folder / "blank.wav", sound, caption="  ")
    put(folder / "damaged.wav", sound).with_suffix(".json").write_text("{")
    put(folder / "list.wav", sound).with_suffix(".json").write_text("[]")
    put(folder / "twice.flac", sound)
    put(folder / "twice.wav", sound)
    put(folder.parent / "elsewhere" / "secret.wav", sound)
    (folder / "link.wav").symlink_to(folder.parent / "elsewhere" / "secret.wav")
    (folder / "link.json").write_text('{"description": "a link"}')
    (folder / "nowhere.wav").symlink_to(folder / "nothing")
    (folder / "linked_folder").symlink_to(folder.parent / "elsewhere")
    put(folder / "caption_link.wav", sound, caption=None)
    (folder / "caption_link.json").symlink_to(folder.parent / "elsewhere" / "secret.json")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.wav")).write_bytes(b"")
    return {
        "text.wav": "unreadable",
        "zero.wav": "empty",
        "no_samples.wav": "empty",
        "silent.wav": "silent",
        "offset.wav": "silent",
        "nan.wav": "not finite",
        "short.wav": "too short",
        "long.wav": "too long",
        "cut.wav": "cut off",
        "cut.aiff.aiff": "cut off",
        "loud.wav": "too loud",
        "half.wav": "no caption",
        "half_info.wav": "no caption",
        "deep.wav": "no caption",
        "song.xyz": "unknown format",
        "pipe.wav": "unreadable",
        "cut_mp3.mp3": "cut off",
        "cut_flac.flac": "cut off",
        "alone.wav": "no caption",
        "blank.wav": "no caption",
        "damaged.wav": "no caption",
        "list.wav": "no caption",
        "twice.wav": "same name",
        "link.wav": "outside the folder",
        "nowhere.wav": "unreadable",
        "linked_folder": "outside the folder",
        "caption_link.wav": "outside the folder",
        "bad\\udcff.wav": "bad name",
    }


def test_every_reason_to_reject_a_file(tmp_path, capfd):
    folder = tmp_path / "audio"
    expected = bad_files(folder)
    (folder / "notes.txt").write_text("not audio")
    (folder / "twice.png").write_text("beside a song, with the caption of the song")
    (folder / ".hidden.wav").write_bytes(b"")
    out = tmp_path / "out"
    job = Job(audio=folder, out=out, max_reject_ratio=0.99, max_track_seconds=4)
    summary = run(dataclasses.replace(job, tracks_per_shard=2))
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == expected
    assert [line["path"] for line in lines] == sorted(expected)
    assert all(line["detail"] and str(tmp_path) not in line["detail"] for line in lines)
    # shards of which nothing is left do not show
    assert [record["track_id"] for record in read(out)] == ["twice"]
    assert len(list(out.glob("tokens-*"))) == 1
    assert "1 records (1 train, 0 validation)" in summary
    assert "28 of 29 files rejected (7 no caption, 4 cut off, 3 outside the folder, " in summary
    assert "2 other files: 1 .png, 1 .txt" in summary
    # with a lower limit the command says why not, and keeps the list
    for ratio, message in [
        (0.9, "28 of 29 audio files rejected.*0.9: 7 no caption, 4 cut off"),
        (0.1, "16 of 29 audio files rejected so far.*0.1: 7 no caption, 3 outside"),  # at once
    ]:
        strict = tmp_path / f"strict{ratio}"
        with pytest.raises(UserError, match=message):
            run(dataclasses.replace(job, out=strict, max_reject_ratio=ratio))
        assert len((strict / "rejects.jsonl").read_text().splitlines()) == int(message[:2])
        with pytest.raises(UserError, match="unfinished"):
            records.read_codec_spec(strict)
    # nothing needs to be encoded again to let it pass
    assert run(dataclasses.replace(job, out=tmp_path / "strict0.9"))


def messy_files(folder):
    """200 files in five folders, of which forty are bad: {path: reason} of those."""
    bad = {}

    def sound(i, rate=RATE, channels=1, seconds=0.6):
        return tone(seconds, rate, channels, frequency=150 + 3 * i)

    for i in range(160):
        path = folder / "good" / f"{i % 4}" / f"{i:03d}"
        match i % 16:
            case 0:
                put(path.with_suffix(".wav"), sound(i, 192_000), 192_000)
            case 1:
                put(path.with_suffix(".wav"), sound(i, 8000), 8000, subtype="PCM_U8")
            case 2:
                put(path.with_suffix(".wav"), sound(i, RATE, 6))
            case 3:
                put_with_ffmpeg(path.with_suffix(".m4a"), sound(i, 48000), 48000, "aac")
            case 4:
                put_with_ffmpeg(path.with_suffix(".webm"), sound(i, 48000), 48000, "libopus")
            case 5:
                put(path.with_suffix(".MP3"), sound(i, 44100, 2), 44100, format="MP3")
            case 6:
                put(path.with_suffix(".flac"), sound(i), caption=None)
                path.with_suffix(".txt").write_text("a tone")
            case 7:  # a name that promises another format
                put(path.with_suffix(".mp3"), sound(i), format="WAV")
            case _:
                put(path.with_suffix(".ogg"), sound(i))

    def spoil(reason, name, change):
        for i in range(len(bad), len(bad) + (4 if len(bad) < 16 else 3)):
            wav = sound(200 + i, seconds=1.0 + i / 50)
            path = put(folder / "bad" / f"{name} {i}.wav", wav)
            bad[path.relative_to(folder).as_posix()] = reason
            change(path, wav)

    def not_finite(path, wav):
        wav[700] = np.nan
        put(path, wav, subtype="FLOAT")

    def leave(path, wav):
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)

    def loop(path, wav):
        path.unlink()
        path.symlink_to(path.name)

    spoil("empty", "nothing in it", lambda path, wav: path.write_bytes(b""))
    spoil("cut off", "truncated", lambda path, wav: cut_file(path))
    spoil(
        "unreadable", "a picture", lambda path, wav: path.write_bytes(b"\x89PNG" + bytes(len(wav)))
    )
    spoil("not finite", "NaN", not_finite)
    spoil("silent", "silence", lambda path, wav: put(path, 1e-3 * wav))
    spoil("no caption", "no bytes", lambda path, wav: path.with_suffix(".json").write_bytes(b""))
    spoil(
        "no caption",
        "latin",
        lambda path, wav: path.with_suffix(".json").write_bytes(
            '{"description": "café"}'.encode("latin1")
        ),
    )
    spoil("no caption", "alone", lambda path, wav: path.with_suffix(".json").unlink())
    spoil("outside the folder", "leaves", leave)
    spoil("unreadable", "loop", loop)
    spoil("too short", "short", lambda path, wav: put(path, wav[:4800]))
    spoil(
        "duplicate", "twice", lambda path, wav: shutil.copy(folder / "bad" / "../first.wav", path)
    )
    return bad


def test_a_messy_folder(tmp_path):
    folder, out = tmp_path / "audio", tmp_path / "out"
    put(folder / "first.wav", tone(2.0))
    bad = messy_files(folder)
    (folder / "first.wav").rename(folder / "bad" / "a first.wav")
    (folder / "first.json").rename(folder / "bad" / "a first.json")
    summary = run(Job(audio=folder, out=out, min_seconds=0.5, max_reject_ratio=0.25))
    assert len(bad) == 40 and len(set(bad.values())) >= 9
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == bad
    found = [r for split in records.SPLITS for r in read(out, split)]
    assert len({r["track_id"] for r in found}) == len(found) == 161
    assert all(0.55 < r["duration"] < 0.75 or r["track_id"] == "bad/a first" for r in found)
    assert "40 of 201 files rejected" in summary


def test_files_that_kill_their_decoder_do_not_kill_the_job(tmp_path, monkeypatch):
    stand_in = Path(__file__).parents[1].joinpath("stand_in_decoder.py")
    monkeypatch.setattr(decoder_module, "Decoder", InlineDecoder.__base__)
    monkeypatch.setattr(decoder_module, "PROGRAM", (str(stand_in),))
    folder, out = album(tmp_path / "audio", 6), tmp_path / "out"
    expected = {}
    for i, (name, reason) in enumerate([("abort", "crashed"), ("segfault", "crashed"),
                                        ("hang", "hung"), ("late_hang", "hung")]):  # fmt: skip
        put(folder / f"0{i}_{name}.wav", tone(20 + i))
        expected[f"0{i}_{name}.wav"] = f"decoder {reason}"
    job = Job(audio=folder, out=out, max_reject_ratio=0.5, validation_percent=0, decode_timeout=1.5)
    assert "6 records" in run(job)
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == expected
    assert len(read(out)) == 6
    # what kills them from outside is no fault of the file
    put(folder / "00_sigkill.wav", tone(2))
    with pytest.raises(UserError, match="was killed, twice: out of memory"):
        run(dataclasses.replace(job, out=tmp_path / "killed"))
    assert not (tmp_path / "killed" / "rejects.jsonl").exists()


# --- the whole job ------------------------------------------------------------------------------


def test_records_are_parts_of_their_tracks_tokens(tmp_path, one_codec):
    folder = album(tmp_path / "audio", 6)
    put(folder / "sub" / "long.wav", tone(3.77, 44100, 2), 44100, caption=" a long tone ")
    out = tmp_path / "out"
    summary = run(
        Job(
            audio=folder,
            out=out,
            max_record_seconds=2,
            window_seconds=1,
            batch_size=3,
            validation_percent=40,
        )
    )
    assert records.read_codec_spec(out) == one_codec.spec
    assert tfds.builder_from_directory(out).info.metadata["about"]["audio_files"] == 7
    found = [(split, r) for split in records.SPLITS for r in read(out, split)]
    assert f"{len(found)} records" in summary and len(found) == 8
    tracks = {track.path: track for track in scan(Source(audio=folder)).tracks}
    with Decoder(60) as decoder:
        wavs = {
            path: read_audio(track, Intake(sample_rate=RATE, channels=1), decoder)[0]
            for path, track in tracks.items()
        }
    for split, record in found:
        assert split == split_of(record["track_id"], 40)
        wav_CN = wavs[record["source_path"]]
        filled_CN = np.pad(wav_CN, ((0, 0), (0, -wav_CN.shape[1] % one_codec.hop)))
        whole_KT = one_codec.encode(filled_CN[None])[0]
        first = round(record["start"] * one_codec.spec.frame_rate)
        frames = record["codes_KT"].shape[1]
        assert frames == math.ceil(record["duration"] * one_codec.spec.frame_rate - 1e-3)
        assert (record["codes_KT"] != whole_KT[:, first : first + frames]).mean() < 0.005
        assert record["info"] == {"bpm": 90}
    pieces = [r for _, r in found if r["track_id"] == "sub/long"]
    assert [r["caption"] for r in pieces] == ["a long tone"] * 2
    assert [r["start"] for r in pieces] == [0.0, pytest.approx(1.9)]
    assert sum(r["duration"] for r in pieces) == pytest.approx(3.77, abs=1e-3)
    assert (out / "rejects.jsonl").read_text() == ""


def test_splits_are_stable_and_of_the_wanted_size():
    ids = [f"track {i}" for i in range(4000)]
    five = {i for i in ids if split_of(i, 5) == "validation"}
    assert 140 < len(five) < 260
    assert split_of("01_monteverdi", 8) == "validation"
    assert split_of("01_monteverdi", 7) == "train"


def test_folders_can_be_the_splits(tmp_path):
    for i, name in enumerate(("train/a", "train/sub/valid", "valid/b", "test/c", "d")):
        put(tmp_path / "audio" / f"{name}.wav", tone(1.1, frequency=200 + 50 * i))
    job = Job(audio=tmp_path / "audio", out=tmp_path / "out", split_by_folder=True)
    run(job)
    ids = {
        split: {r["track_id"] for r in read(tmp_path / "out", split)} for split in records.SPLITS
    }
    assert ids == {"train": {"train/a", "train/sub/valid"}, "validation": {"valid/b"}}
    with pytest.raises(UserError, match=r"begun with other settings: --split-by-folder \(was"):
        run(dataclasses.replace(job, split_by_folder=False))
    job = dataclasses.replace(job, audio=tmp_path / "audio" / "train", out=tmp_path / "other")
    with pytest.raises(UserError, match="--split-by-folder: no track lies below a folder train"):
        run(job)


def test_all_in_validation_is_an_error(tmp_path):
    put(tmp_path / "audio" / "01_monteverdi.wav", tone(1.2))
    job = Job(audio=tmp_path / "audio", out=tmp_path / "out", validation_percent=50)
    with pytest.raises(UserError, match="all 1 tracks would fall to validation: lower"):
        run(job)
    assert not (tmp_path / "out").exists()
    # the one track to train on turns out to be unfit
    name = next(n for n in map(str, range(99)) if split_of(n, 50) == "train")
    put(tmp_path / "audio" / f"{name}.wav", tone(0.5))
    with pytest.raises(UserError, match="1 records of validation are left.*name a new --out"):
        run(dataclasses.replace(job, max_reject_ratio=0.9))


@pytest.mark.parametrize(("codec", "said"), [("embedded", True), (ASSETS / "codec", False)])
def test_what_the_shipped_codec_is_for_is_said_at_once(tmp_path, capsys, monkeypatch, codec, said):
    def scan(source):
        raise UserError("the source is scanned")

    monkeypatch.setattr(job_module, "scan", scan)
    with pytest.raises(UserError, match="is scanned"):
        run(Job(audio=album(tmp_path / "audio", 1), out=tmp_path / "out", codec=str(codec)))
    told = capsys.readouterr().err
    assert told.count("\n") == said
    assert all((word in told) == said for word in ("16 kHz", "--codec facebook/encodec_32khz"))


def test_a_device_that_is_not_there_is_said_before_the_source_is_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "scan", lambda source: pytest.fail("the source was scanned"))
    job = Job(audio=album(tmp_path / "audio", 1), out=tmp_path / "out", device="nonsense")
    with pytest.raises(UserError, match="device nonsense: cannot hold codec embedded"):
        run(job)
    assert not (tmp_path / "out").exists()


def test_too_many_rejects_stop_the_job_as_soon_as_they_are_certain(tmp_path):
    folder, out = tmp_path / "audio", tmp_path / "out"
    for i in range(6):
        put(folder / f"{i}.wav", tone(0.5 if i < 3 else 1.1, frequency=200 + i))
    job = Job(audio=folder, out=out, tracks_per_shard=1, validation_percent=0, max_reject_ratio=0.2)
    with pytest.raises(UserError, match="2 of 6 audio files rejected so far"):
        run(job)
    assert len(list((out / "units").glob("*.json"))) == 2
    run(dataclasses.replace(job, max_reject_ratio=0.5))
    before = content(out)
    # the list of a complete data set stays whole
    put(folder / "7.wav", tone(1.1), caption=None)
    other = dataclasses.replace(job, out=tmp_path / "other")
    run(dataclasses.replace(other, max_reject_ratio=0.6))
    whole = (tmp_path / "other" / "rejects.jsonl").read_bytes()
    with pytest.raises(UserError, match="4 of 7 audio files rejected so far"):
        run(dataclasses.replace(other, max_reject_ratio=0.0))
    assert (tmp_path / "other" / "rejects.jsonl").read_bytes() == whole
    assert whole.count(b"\n") == 4 and content(out) == before


def test_a_wrong_out_is_left_as_it_was(tmp_path, monkeypatch):
    folder = album(tmp_path / "audio", 2)
    before = content(folder)
    with pytest.raises(UserError, match="holds other files"):
        run(Job(audio=folder, out=folder))
    assert content(folder) == before and len(list(folder.iterdir())) == len(before)

    def refuse(*how):
        raise PermissionError(13, "Permission denied", "somewhere")

    # the lock, and job.json
    for module, name in [(place_module.fcntl, "flock"), (files, "write_text")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(UserError, match=r"out: cannot be written \(Permission denied\)"):
                run(Job(audio=folder, out=tmp_path / "out"))


def test_locks_of_network_file_systems(tmp_path, monkeypatch):
    flock = fcntl.flock

    def as_nfs(file, kind):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, kind)

    def as_lustre(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    place = place_module.Folder(tmp_path / "out")
    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with (
        place.held("0/2"),
        place.held("1/2"),
        pytest.raises(PassingError, match="another job is writing there"),
        place.held("0/1"),
    ):
        pass
    with place.held("0/1"):
        assert place.create("job.json", "{}") == b"{}"
    monkeypatch.setattr(fcntl, "flock", as_lustre)
    with (
        pytest.raises(UserError, match="its file system has no locks .*-o flock"),
        place.held("0/1"),
    ):
        pass


def test_of_two_machines_that_begin_at_once_one_says_what_is_begun(tmp_path, monkeypatch):
    write, begun, go_on = files.write_text, threading.Event(), threading.Event()

    def write_text(path, text):
        if text == "first":
            begun.set()
            assert go_on.wait(60)
        write(path, text)

    monkeypatch.setattr(files, "write_text", write_text)
    place = place_module.Folder(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(place.create, "job.json", "first")
        assert begun.wait(60)
        second = pool.submit(place.create, "job.json", "second")
        wait([second], timeout=0.5)
        go_on.set()
        assert first.result() == second.result() == b"first"


def test_record_files_of_unknown_settings_are_not_gone_on_with(tmp_path):
    job = Job(audio=album(tmp_path / "audio", 2), out=tmp_path / "out", validation_percent=0)
    run(dataclasses.replace(job, shard="0/2"))
    (job.out / "job.json").unlink()
    before = content(job.out)
    with pytest.raises(UserError, match="record files in units, but no job.json"):
        run(dataclasses.replace(job, min_seconds=1.05))
    assert content(job.out) == before and len(before) == 3


def test_a_damaged_note_means_that_the_unit_is_made_again(tmp_path):
    out = tmp_path / "out"
    job = Job(audio=album(tmp_path / "audio", 2), out=out, validation_percent=0)
    run(job)
    before = content(out)
    (note,) = (out / "units").glob("*.json")
    for damaged in ("", '{"seconds": 1', "[]", "{}", '{"shard": 1, "seconds": 1, "rejects": []}'):
        note.write_text(damaged)
        run(job)
        assert content(out) == before


def test_a_folder_belongs_to_one_job(tmp_path):
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"
    first = Job(audio=folder, out=out)
    summary = run(first)
    before = content(out)
    assert run(first) == summary and content(out) == before
    # speed may differ, results may not
    run(dataclasses.replace(first, decode_timeout=50.0, max_reject_ratio=0.5))
    with pytest.raises(
        UserError,
        match=r"begun with other settings: --min-seconds \(was 1.0, now 1.05\), --tracks-per",
    ):
        run(dataclasses.replace(first, min_seconds=1.05, tracks_per_shard=2))
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another job is writing there"):
            run(first)
    os.utime(folder / "01.wav", ns=(0, 0))  # as after a plain copy
    assert run(first) == summary
    with pytest.raises(UserError, match=r"begun with other settings: --device \(was"):
        run(dataclasses.replace(first, device="cuda:1"))
    data = (folder / "01.wav").read_bytes()
    (folder / "01.wav").write_bytes(data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    with pytest.raises(UserError, match="the audio or captions changed"):
        run(first)
    assert content(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files .thesis.txt."):
        run(Job(audio=folder, out=tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_until_a_shard_is_done_audio_and_settings_may_change(tmp_path):
    """As after a first look at the rejects, or a device that is not there."""
    folder, out = album(tmp_path / "audio", 3), tmp_path / "out"
    bad = put(folder / "bad.wav", tone(1.5), caption=None)
    job = Job(audio=folder, out=out)
    with pytest.raises(UserError, match="1 of 4 audio files rejected.*the same command again"):
        run(dataclasses.replace(job, min_seconds=1.05, tracks_per_shard=1))
    bad.unlink()
    (out / "units" / ".train-00000.array_record.killed.tmp").write_bytes(b"half")
    assert "3 records" in run(job)
    whole = tmp_path / "whole"
    run(dataclasses.replace(job, out=whole))
    assert content(out) == content(whole)
    put(folder / "silent.wav", tone(1.5) * 0)
    with pytest.raises(UserError, match="1 of 4 audio files rejected.*a new --out"):
        run(dataclasses.replace(job, out=tmp_path / "late"))


def test_lost_and_cut_record_files_are_made_again(tmp_path):
    folder, out = album(tmp_path / "audio", 4), tmp_path / "out"
    job = Job(audio=folder, out=out, tracks_per_shard=1, validation_percent=0)
    run(job)
    before = content(out)
    paths = sorted(out.glob("tokens-*"))
    assert len(paths) == 4
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    run(job)
    assert content(out) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"audio": Path("no/such")}, "audio no/such: no such file or folder"),
        ({"audio": Path("texts")}, "no audio in it .1 other files: 1 .txt."),
        ({"out": Path("texts/a.txt")}, r"cannot be written \(Not a directory\)"),
        ({"min_seconds": 0.0}, "--min-seconds must"),
        ({"max_record_seconds": 121.0}, "--max-record-seconds must"),
        ({"validation_percent": 100.0}, "--validation-percent must"),
        ({"max_reject_ratio": float("nan")}, "--max-reject-ratio must"),
        ({"batch_size": 0}, "--batch-size must"),
        ({"shard": "2/2"}, "--shard 2/2: give I/N with I below N"),
    ],
)
def test_bad_settings_give_one_line(tmp_path, monkeypatch, change, match):
    monkeypatch.chdir(tmp_path)
    album(tmp_path / "audio", 1)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    job = Job(audio=tmp_path / "audio", out=tmp_path / "out")
    with pytest.raises(UserError, match=match) as caught:
        run(dataclasses.replace(job, **change))
    assert "\n" not in str(caught.value)


# --- kills --------------------------------------------------------------------------------------

# Loads the codec once, then forks one process for each kill: it dies just before or just after its
# n-th rename (a rename is what commits anything), and another one finishes what it left.
KILLER = """
import os, signal, sys
from pathlib import Path
import av, soundfile, tensorflow_datasets  # once, and not in each fork
from tokenization import maker
from tokenization.intake import decoder
from tokenization.job import run
from tokenization.settings import Job
from tokenizing import InlineDecoder, stub_codec
maker.load_codec, decoder.Decoder = stub_codec, InlineDecoder
tensorflow_datasets.features, tensorflow_datasets.builder_from_directory  # which it loads late
audio, root = map(Path, sys.argv[1:])
rename = os.replace

def attempt(out, die_at, after):
    pid = os.fork()
    if pid == 0:
        count = 0
        def replace(*args):
            nonlocal count
            count += os.path.exists(args[0])  # what was moved before is not there
            if count == die_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        run(Job(audio=audio, out=out, tracks_per_shard=2, validation_percent=30,
                max_reject_ratio=0.5, batch_size=1))
        os._exit(count)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

renames = attempt(root / "whole", 0, False)
print(renames)
for n in range(1, renames + 1):
    after = n % 2 == 0  # just before one rename, just after the next
    out = root / f"killed{n}{after}"
    assert attempt(out, n, after) == -signal.SIGKILL, out
    assert attempt(out, 0, False) > 0, out
# one that is killed again and again, always a little further on
tries = 1
while attempt(root / "often", 6, True) == -signal.SIGKILL:
    tries += 1
    assert tries < 100
"""


def test_killed_at_any_rename_and_run_again_gives_the_same_bytes(tmp_path):
    folder = album(tmp_path / "audio", 5, 1.0)
    put(folder / "03b.wav", tone(0.5))
    put(folder / "03c.wav", tone(0.5), caption=None)
    finished = subprocess.run(
        [sys.executable, "-c", KILLER, folder, tmp_path / "outs"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    renames = int(finished.stdout)
    whole = content(tmp_path / "outs" / "whole")
    assert renames >= 12 and b"too short" in whole["rejects.jsonl"]
    assert len(list((tmp_path / "outs").iterdir())) == renames + 2
    for out in (tmp_path / "outs").iterdir():
        assert content(out) == whole, out.name
        assert len(read(out)) + len(read(out, "validation")) == 5


def test_workers_and_machines_make_the_same_data_set(tmp_path):
    folder = album(tmp_path / "audio", 9, 1.2)
    put(folder / "03b.wav", tone(0.5))
    job = Job(
        audio=folder, out=tmp_path / "one", tracks_per_shard=2, validation_percent=30,
        max_reject_ratio=0.5, mix_ratio=0.6,
    )  # fmt: skip
    summary = run(job)
    assert any("mixed" in record["info"] for record in read(tmp_path / "one"))
    words = ["--audio", folder, "--tracks-per-shard", 2, "--validation-percent", 30]
    words += ["--max-reject-ratio", 0.5, "--mix-ratio", 0.6, "--workers", 2]
    workers = finish("job", *words, "--out", tmp_path / "workers")
    assert workers == summary.replace("/one", "/workers") + "\n"
    assert content(tmp_path / "workers") == content(tmp_path / "one")
    out = tmp_path / "machines"
    part = dataclasses.replace(job, out=out, shard="0/2")
    assert " are still to be made" in run(part)
    assert not records.is_complete(out)
    with (out / ".lock-1-2").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other machine is at work
        run(part)
        with pytest.raises(UserError, match="another job is writing there"):
            run(dataclasses.replace(job, out=out, shard="1/2"))
    assert "; 0 of " in run(dataclasses.replace(job, out=out, shard="1/2"))
    run(dataclasses.replace(job, out=out))
    assert content(out) == content(tmp_path / "one")


def test_a_worker_that_dies_ends_the_job_in_one_line(tmp_path):
    folder, out = album(tmp_path / "audio", 8, 2.0), tmp_path / "out"
    arguments = ["--audio", folder, "--out", out, "--tracks-per-shard", 1, "--workers", 2]
    first = start("job", *arguments)
    deadline = time.monotonic() + 120
    while not list(out.glob("units/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    for child in children:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    stdout, stderr = first.communicate()
    assert first.returncode == 75 and "error: a worker ended by itself" in stderr, stderr
    assert "Traceback" not in stderr
    run(Job(audio=folder, out=out, tracks_per_shard=1))
    unbroken = tmp_path / "unbroken"
    run(Job(audio=folder, out=unbroken, tracks_per_shard=1))
    assert content(out) == content(unbroken)


def test_a_worker_that_cannot_load_the_codec_says_so(tmp_path):
    job = Job(audio=album(tmp_path / "audio", 1), out=tmp_path / "out", workers=2, device="cuda:99")
    with pytest.raises(UserError, match="device cuda:99: cannot hold codec embedded"):
        run(job)


def test_command_line_stopped_while_encoding(tmp_path):
    folder, out = album(tmp_path / "audio", 12, 2.0), tmp_path / "out"
    arguments = ["--audio", folder, "--out", out, "--tracks-per-shard", 3]
    first = start("job", *arguments)
    deadline = time.monotonic() + 120
    while not list(out.glob("units/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.terminate()
    assert "stopped; the same command goes on" in first.communicate()[1]
    assert first.returncode == 128 + signal.SIGTERM
    assert not (out / "dataset_info.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        records.read_codec_spec(out)
    second = start("job", *arguments)
    unbroken = tmp_path / "unbroken"
    run(Job(audio=folder, out=unbroken, tracks_per_shard=3))
    stdout, stderr = second.communicate()
    assert second.returncode == 0, stderr
    assert "12 records" in stdout and "tfds.builder_from_directory(" in stdout
    assert "x real time" in stderr and "Traceback" not in stderr
    assert content(out) == content(unbroken)


def test_command_line_reports_in_one_line(tmp_path):
    words = ["--audio", tmp_path / "nothing", "--out", tmp_path / "out"]
    job = subprocess.Popen(
        [sys.executable, "-m", "tokenization.job", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stdout, stderr = job.communicate()
    assert job.returncode == 2 and stdout == ""
    assert stderr == f"error: audio {tmp_path}/nothing: no such file or folder\n"
    assert not (tmp_path / "out").exists()


def test_shipped_clips_are_all_fit(tmp_path):
    from magnet_jax.config import ASSETS

    manifest = scan(Source(audio=ASSETS / "clips"))
    assert len(manifest.tracks) == 20 and not manifest.rejects
    track = manifest.tracks[2]
    assert track.track_id == "02_bach" and "vibraphone" in track.caption
    assert json.loads(track.info)["bpm"] == 70 and "description" not in track.info
    # nothing hangs on where the folder is, or on other files beside the music
    shutil.copytree(ASSETS / "clips", tmp_path / "copy")
    (tmp_path / "copy" / "cover.png").write_bytes(b"")
    copy = scan(Source(audio=tmp_path / "copy"))
    assert copy.fingerprint == manifest.fingerprint and copy.ignored[".png"] == 1
