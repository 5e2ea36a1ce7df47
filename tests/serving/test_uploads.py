"""Uploads by people who mean harm, or whose files are broken: refused, with a reason, apart."""

import functools
import io
import pickle
import resource
import struct
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from launch.serve.uploads import Reader
from magnet_jax.io import machine
from magnet_jax.serving.errors import RequestError

RATE = 8000


def encoded(wav_NC, format="WAV", rate=RATE, **more):
    file = io.BytesIO()
    soundfile.write(file, wav_NC, rate, format=format, **more)
    return file.getvalue()


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(10_000_000))
    return file.getvalue()


def huge_header():
    """A WAV that promises 3 GB, and has a kilobyte. (4 GB would say that it does not know.)"""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 3 * 10**9 + 36, b"WAVE", b"fmt ", 16, 1, 1,
                       RATE, 2 * RATE, 2, 16, b"data", 3 * 10**9)  # fmt: skip
    return head + bytes(1000)


def endless_flac():
    """A minute of silence whose header does not tell its length."""
    flac = bytearray(encoded(np.zeros(RATE * 60, np.int16), "FLAC"))
    at = 8 + 13  # within STREAMINFO: the lower 36 bits are how many samples there are
    flac[at] &= 0xF0
    flac[at + 1 : at + 5] = bytes(4)
    return bytes(flac)


WAV = encoded((0.5 * np.sin(np.arange(RATE) / 9)).astype(np.float32))
MP3 = encoded((0.5 * np.sin(np.arange(4 * RATE) / 9)).astype(np.float32), "MP3")
HOSTILE = {
    "a zip bomb": bomb(),
    "a pickle": pickle.dumps({"a": print}),
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a list of files": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "a path": b"/etc/passwd",
    "nothing": b"",
    "noise": np.random.default_rng(0).bytes(50_000),
    "3 GB": huge_header(),
    "half an MP3's header": MP3[:20],
    "a WAV that ends early": WAV[: len(WAV) // 2],
    "not a number": encoded(np.full(RATE, np.nan, np.float32), subtype="FLOAT"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_is_refused(client, engine, name):
    before = machine.peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    answer = client.post("/v1/files", files={"file": ("x.wav", HOSTILE[name])})
    assert answer.status_code == 400, (name, answer.text)
    error = answer.json()["error"]
    assert error["code"] == "invalid_audio" and error["param"] == "file"
    assert str(engine.files.folder) not in error["message"] and "/tmp" not in error["message"]
    assert list(engine.files.coming.iterdir()) == []
    assert machine.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before < 64 * 2**20


def test_a_form_without_a_file_is_refused(client):
    for how in ({"files": {"other": b"x"}}, {"files": {"file": (None, b"x")}}):
        assert client.post("/v1/files", **how).status_code == 400
    two = [("file", ("a", WAV)), ("file", ("b", WAV))]
    assert client.post("/v1/files", files=two).status_code == 400
    assert client.post("/v1/files", content=WAV).status_code == 415


def test_a_file_that_is_too_large_or_long_is_refused(client):
    large = client.post("/v1/files", files={"file": bytes(51_000_000)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    long = client.post(
        "/v1/files", files={"file": encoded(np.zeros(601 * 1000, np.int16), rate=1000)}
    )
    assert (long.status_code, long.json()["error"]["code"]) == (413, "file_too_long")


def test_uploads_do_not_keep_everything_waiting(listening, engine):
    """Two of a client, and others are answered meanwhile."""
    reading, passing = threading.Semaphore(0), threading.Event()

    def read(path, out, seconds):
        reading.release()
        passing.wait()
        raise RequestError("it was none")

    with listening(engine, read=read) as url, httpx.Client(base_url=url, timeout=60) as client:
        with ThreadPoolExecutor() as pool:
            send = functools.partial(client.post, "/v1/files", files={"file": WAV})
            first = [pool.submit(send) for _ in range(2)]
            for _ in first:
                assert reading.acquire(timeout=60)
            third = send()
            assert (third.status_code, third.headers["retry-after"]) == (429, "5")
            assert client.get("/v1/stats").status_code == 200
            passing.set()
            assert {answer.result().status_code for answer in first} == {400}
        assert send().status_code == 400  # there is room again


def test_the_decoder_is_not_told_the_key(monkeypatch):
    monkeypatch.setenv("MAGNET_JAX_API_KEY", "k" * 16)
    given = {}

    def start(*_, env, **__):
        given.update(env)
        raise OSError("enough is known")

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RequestError):
        Reader()(Path("x"), Path("y"), 1.0)
    assert given and "MAGNET_JAX_API_KEY" not in given


def test_sounds_are_read_as_they_are(tmp_path):
    """Each in the one process, which a length that no header tells does not keep busy."""
    reader, rng = Reader(), np.random.default_rng(0)
    path, out = tmp_path / "in", tmp_path / "out.wav"
    try:
        path.write_bytes(endless_flac())
        with pytest.raises(RequestError, match="too long") as error:
            reader(path, out, 5.0)
        assert error.value.status == 413 and out.stat().st_size < 2**22
        path.write_bytes(encoded(np.zeros((3 * 48_000, 2), np.int16), "FLAC", 96_000))
        reader(path, out, 3.0)
        with pytest.raises(RequestError, match="too long"):  # of all channels
            path.write_bytes(encoded(np.zeros((3 * 48_000, 4), np.int16), "FLAC", 96_000))
            reader(path, out, 3.0)
        whole = rng.integers(-(2**15), 2**15, (RATE, 2)) * 2**16
        for format, subtype, dropped in (
            ("WAV", "PCM_16", 16), ("FLAC", "PCM_24", 8), ("AIFF", "PCM_S8", 24),
        ):  # fmt: skip
            samples_NC = (whole >> dropped << dropped).astype(np.int32)
            path.write_bytes(encoded(samples_NC, format, subtype=subtype))
            reader(path, out, 5.0)
            np.testing.assert_array_equal(soundfile.read(out, dtype="int32")[0], samples_NC)
        path.write_bytes(MP3)
        reader(path, out, 5.0)
        assert soundfile.info(out).subtype == "PCM_24"
        assert abs(soundfile.info(out).frames - 4 * RATE) < 1200
    finally:
        reader.close()
