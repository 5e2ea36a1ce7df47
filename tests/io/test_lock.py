"""One process at a time in a folder, and what the others are told."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import lock

ME = f"process {os.getpid()} on {socket.gethostname()}, since 20"
HOLDER = """
import sys, time
from magnet_jax.io import lock
with lock.held(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SIGN", 0.02)
    monkeypatch.setattr(lock, "SILENCE", 0.5)


def left_in(folder: Path, **changes) -> None:
    """A lock of this process, but for what is changed."""
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(lock.myself() | changes))


def test_the_second_is_told_who_the_first_is(tmp_path):
    folder = tmp_path / "run[1]"
    with lock.held(str(folder), pytest.fail):
        refused = pytest.raises(PassingError, match=f"another process is at work there, {ME}")
        with refused, lock.held(str(folder), pytest.fail):
            pass
        assert [path.name for path in folder.iterdir()] == [lock.NAME]
    assert not folder.exists()  # nothing came of it
    folder.mkdir()
    (folder / "kept").touch()
    with lock.held(str(folder), pytest.fail):
        pass
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("reaped", [False, True])
def test_what_a_killed_process_held_is_taken_over_at_once(tmp_path, reaped):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    refused = pytest.raises(PassingError, match=f"process {process.pid} on")
    with refused, lock.held(str(folder), pytest.fail):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with lock.held(str(folder), pytest.fail):
        pass
    process.wait()


def test_what_this_process_could_not_give_back_it_takes_again(tmp_path, monkeypatch):
    """A bucket out of reach keeps the lock; the same process may begin there once more."""
    with monkeypatch.context() as patch, lock.held(str(tmp_path), pytest.fail):
        patch.setattr(lock.Folder, "swap", lambda *_: False)
    assert (tmp_path / lock.NAME).exists()
    with lock.held(str(tmp_path), pytest.fail):
        pass
    assert not (tmp_path / lock.NAME).exists()


def test_a_process_that_has_the_number_of_a_dead_one_is_another(tmp_path):
    left_in(tmp_path, started="1")
    with lock.held(str(tmp_path), pytest.fail):
        pass


@pytest.mark.parametrize("damage", [None, b"", b'{"process": 1'])
def test_what_a_dead_host_held_is_taken_over_after_a_while(tmp_path, quick, damage):
    left_in(tmp_path, machine="another", host="node7", process=12)
    if damage is not None:
        (tmp_path / lock.NAME).write_bytes(damage)
    said = []
    with lock.held(str(tmp_path), said.append):
        pass
    who = "process 12 on node7" if damage is None else "process ?"
    assert len(said) == 1 and who in said[0] and "for 0.5 s at most" in said[0]


def test_a_host_that_gives_signs_of_life_keeps_its_folder(tmp_path, quick, monkeypatch):
    with lock.held(str(tmp_path), pytest.fail) as first:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_machine", lambda: "another")
            with pytest.raises(PassingError, match=ME), lock.held(str(tmp_path), print):
                pass
        first.check()


def test_one_that_was_taken_for_dead_writes_nothing_more(tmp_path, quick):
    with lock.held(str(tmp_path), pytest.fail) as first:
        left_in(tmp_path, host="node7")
        with pytest.raises(UserError, match="is that of process .* on node7.*writes nothing more"):
            first.check()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "node7"  # not removed
    (tmp_path / lock.NAME).unlink()
    with lock.held(str(tmp_path), pytest.fail) as first:
        (tmp_path / lock.NAME).unlink()
        with pytest.raises(UserError, match="was removed"):
            first.check()


@pytest.mark.parametrize("process", ["12", None, 1.5, 2**70, [1]])
def test_a_lock_whose_process_is_no_number_is_not_of_this_program(tmp_path, quick, process):
    left_in(tmp_path, process=process)
    said = []
    with lock.held(str(tmp_path), said.append):
        assert len(said) == 1 and "held by process ? on ?" in said[0]


def test_of_many_that_begin_at_once_one_does(tmp_path):
    left_in(tmp_path, started="1")  # and a dead one was there
    ready, over, got = threading.Barrier(6), threading.Event(), []

    def run() -> None:
        ready.wait()
        try:
            with lock.held(str(tmp_path), pytest.fail):
                got.append(True)
                over.wait(60)
        except PassingError:
            got.append(False)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(got) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 5 + [True]


def test_without_proc_a_process_is_known_by_its_number(tmp_path, quick, monkeypatch):
    """As on macOS: an ended one is replaced at once, and one of that number has to give signs."""
    monkeypatch.setattr(lock, "_machine", socket.gethostname)
    monkeypatch.setattr(lock, "_started", lambda process: None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_in(tmp_path, process=ended.pid)
    refused = pytest.raises(PassingError, match=ME)
    with lock.held(str(tmp_path), pytest.fail), refused, lock.held(str(tmp_path), print):
        pass
    left_in(tmp_path)
    said = []
    with lock.held(str(tmp_path), said.append):
        assert len(said) == 1
