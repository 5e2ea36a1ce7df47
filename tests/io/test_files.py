"""Files and folders that are written whole, by several writers and on full disks."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from magnet_jax.errors import UserError
from magnet_jax.io import audio, files

ROOM = "make room|as large"


@contextlib.contextmanager
def no_file_beyond(size):
    """A limit on the size of files, which has the effect of a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder, text):
    for name in ("a", "b", "c"):
        (folder / name).write_text(text)


def content(folder):
    return {path.read_text() for path in folder.iterdir()}


def test_two_writers_of_a_folder_publish_each_its_own(tmp_path):
    out = tmp_path / "out"
    with files.replacing(out) as first:
        fill(first, "first")
        with files.replacing(out) as second:
            fill(second, "second")
            (second / "d").write_text("second")
        assert content(out) == {"second"}
    assert content(out) == {"first"} and len(list(out.iterdir())) == 3
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_is_whole_whoever_writes_it_meanwhile(tmp_path):
    out, failed = tmp_path / "out", []

    def write(name):
        try:
            for i in range(20):
                with files.replacing(out) as folder:
                    fill(folder, f"{name}{i}")
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=write, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(content(out)) == 1 and len(list(out.iterdir())) == 3
    assert list(tmp_path.iterdir()) == [out]


HALF = """
import sys, time
from pathlib import Path
from magnet_jax.io import files
with files.{writer}(Path(sys.argv[1])) as path:
    (path / "a" if path.is_dir() else path).write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("writer", ["replacing", "replacing_file"])
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path, writer):
    def begin():
        words = [sys.executable, "-c", HALF.format(writer=writer), tmp_path / "out"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        return process

    dead, living = begin(), begin()
    there = "0" * 4 if files._HERE != "0" * 4 else "1" * 4
    others = {".mine.tmp", ".mine.partial", f".out.{there}01234567.tmp"}  # of another machine
    for name in others:
        (tmp_path / name).write_text("mine")
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert len(list(tmp_path.iterdir())) == 5
        with getattr(files, writer)(tmp_path / "out") as path:
            (path / "a" if path.is_dir() else path).write_text("whole")
        left = {path.name for path in tmp_path.iterdir()} - others - {"out"}
        assert len(left) == 1 and files.is_left_over(*left)  # of the one that lives
    finally:
        for process in (dead, living):
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127], ids=["ascii", "accents"])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    for word in ("old", "new"):
        with files.replacing(tmp_path / name) as folder:
            fill(folder, word)
        assert content(tmp_path / name) == {word}
    with files.replacing_file(tmp_path / f"{name[:-2]}x") as path:
        path.write_text("new")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    fill(tmp_path / "far", "old")
    (tmp_path / "near").symlink_to(tmp_path / "far")
    with files.replacing(tmp_path / "near") as folder:
        fill(folder, "new")
    assert (tmp_path / "near").is_symlink() and content(tmp_path / "far") == {"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"far", "near"}


def test_a_failed_rename_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with files.replacing(out) as folder:
        fill(folder, "old")
    rename = Path.rename

    def refused(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    message = f"out: cannot be written .*your quota.*{ROOM}"
    with pytest.raises(UserError, match=message), files.replacing(out) as folder:
        fill(folder, "new")
    assert content(out) == {"old"} and list(tmp_path.iterdir()) == [out]


# --- full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("there", [False, True])
def test_audio_on_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path, format, there):
    noise = 0.3 * np.random.default_rng(0).standard_normal((1, 64_000)).astype(np.float32)
    path = tmp_path / f"x.{format}"
    if there:
        path.write_bytes(b"earlier")
    with no_file_beyond(2000), pytest.raises(UserError, match=f"x.{format}: cannot.*{ROOM}"):
        audio.audio_write(path, noise, 32_000, format, add_suffix=False)
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"earlier")] * there


def test_no_space_left_is_said_with_the_path_and_what_to_do(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    message = r"/dev/full: cannot be written \(No space left on device\); make room"
    with pytest.raises(UserError, match=message):
        audio.write_wav(full, np.zeros((1, 16_000), np.float32), 16_000)
    with pytest.raises(UserError, match=message), files.replacing_file(full) as path:
        path.write_text("x" * 100_000)
    assert full.is_char_device()
    with files.replacing_file(Path("/dev/null")) as path:
        path.write_text("x")
    assert Path("/dev/null").is_char_device()


def test_libraries_in_other_languages_are_understood(tmp_path):
    refused = pytest.raises(UserError, match=f"out: cannot be written.*{ROOM}")
    with no_file_beyond(2000), refused, files.replacing(tmp_path / "out") as folder:
        save_file({"a": np.zeros(10_000)}, folder / "a")
    assert not list(tmp_path.iterdir())
    assert not files.how_to_make_room(OSError(errno.EACCES, "Permission denied"))
