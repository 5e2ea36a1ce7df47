"""Tokenization by many machines: Apache Beam, buckets, kills at any moment, cluster scripts."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fake_bucket import serve
from several import free_port
from sounds import album, content, put, tone
from tokenizing import finish, start

from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.io import bucket
from tokenization.job import run
from tokenization.place import Bucket
from tokenization.settings import Job


def kill_when(process, seen):
    """Kills a run as soon as `seen()` is true."""
    deadline = time.monotonic() + 120
    while not seen() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """The words for a source of 24 tracks, one of them not fit, in shards of two."""
    folder = album(tmp_path_factory.mktemp("music") / "audio", 23)
    put(folder / "03b.wav", tone(0.5))
    return ["--audio", folder, "--tracks-per-shard", 2, "--validation-percent", 20]


@pytest.fixture(scope="module")
def whole(audio, tmp_path_factory):
    """What tokenization.job makes of it, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    finish("job", *audio, "--out", out)
    made = content(out)
    assert b"too short" in made["rejects.jsonl"] and len(made) > 24
    return made


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Serves a bucket of that name."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "music").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv(bucket.TIMEOUT, "5")
        bucket._client.cache_clear()
        server = serve(folder, port)
        yield
        server.kill()
        server.wait()
        bucket._client.cache_clear()


def in_bucket(url, folder):
    bucket.fetch(url, folder)
    return content(folder)


def test_beam_killed_and_run_again_makes_the_same_data_set(audio, whole, tmp_path):
    out = tmp_path / "tokens"
    command = [*audio, "--out", out]
    kill_when(start("beam", *command), lambda: list(out.glob("units/*.json")))
    assert not records.is_complete(out)
    (out / "units" / "train-00003.json").write_text("{")  # damaged: made again
    summary = finish("beam", *command)
    assert "23 records" in summary and "1 of 24 files rejected" in summary
    assert content(out) == whole
    found = [r for split in records.SPLITS for r in records.open_split(out, split)]
    assert len(found) == 23 and all(np.asarray(r["codes"]).any() for r in found)


def test_beam_in_a_bucket_killed_and_run_again(audio, whole, music, tmp_path):
    url = "gs://music/by_beam"
    command = [*audio, "--out", url]
    kill_when(
        start("beam", *command), lambda: any(".json" in n for n in bucket.names(f"{url}/units"))
    )
    assert not Bucket(url).is_complete()
    assert "gcloud storage rsync" in finish("beam", *command)
    assert in_bucket(url, tmp_path) == whole


def test_machines_that_share_a_bucket_alone(audio, whole, music, tmp_path):
    url = "gs://music/deep/by_shards"
    command = [*audio, "--out", url]
    part = start("job", *command, "--shard", "0/2")
    kill_when(part, lambda: any(".json" in n for n in bucket.names(f"{url}/units")))
    parts = [start("job", *command, "--shard", f"{i}/2") for i in (0, 1)]
    told = [part.communicate() for part in parts]
    assert [part.returncode for part in parts] == [0, 0], told
    assert any("; 0 of " in stdout for stdout, _ in told)
    # killed while it gives the files their final names
    last = start("job", *command)
    kill_when(last, lambda: any(n.startswith("tokens-") for n in bucket.names(url)))
    finish("job", *command)
    assert in_bucket(url, tmp_path / "fetched") == whole
    # one that is cut is made again
    name = next(name for name in sorted(whole) if name.startswith("tokens-train"))
    bucket.put(url, name, whole[name][:1000])
    finish("job", *command)
    assert bucket.read(url, [name]) == {name: whole[name]}
    job = Job(audio=audio[1], out=url, tracks_per_shard=2, validation_percent=20, min_seconds=0.4)
    with pytest.raises(UserError, match=f"--out {url}: begun with other .*: --min-seconds .was"):
        run(job)


def test_files_of_a_bucket(music, tmp_path):
    url = "gs://music/files"
    (tmp_path / "large").write_bytes(os.urandom(20 << 20))  # several requests
    bucket.put(url, "a/large", tmp_path / "large")
    assert bucket.create(url, "a/small", b"one") == b"one"
    assert bucket.create(url, "a/small", b"two") == b"one"
    assert bucket.sizes(url) == {"a/large": 20 << 20, "a/small": 3}
    bucket.move(url, [("a/large", "b"), ("a/small", "c")])
    found = bucket.read(url, ["b", "c", "a/small"])
    assert found == {"b": (tmp_path / "large").read_bytes(), "c": b"one"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"audio": Path("gs://music/songs")}, "copy it .`gcloud storage rsync -r gs://music/songs"),
        ({"out": "s3://music/tokens"}, "s3://music/tokens: what can be written to is gs://"),
        ({"out": "gs://nobody/tokens"}, "gs://nobody/tokens: no such bucket"),
        ({"out": "gs://music/theses"}, "gs://music/theses: holds other files .mine.txt."),
    ],
)
def test_places_that_do_not_do(audio, music, change, match):
    bucket.put("gs://music/theses", "mine.txt", b"mine")
    values = {"audio": audio[1], "out": "gs://music/new"} | change
    with pytest.raises(UserError, match=match):
        run(Job(**values))


def test_beam_reports_in_one_line(audio, tmp_path):
    cases = [
        (["--max-reject-ratio", 0.01], {}, "error: 1 of 24 audio files rejected"),
        ([], {"BREAK_CODEC": "1"}, "error: the codec is broken\n"),
    ]
    processes = [
        start("beam", *audio, "--out", tmp_path / str(i), *arguments, **environ)
        for i, (arguments, environ, _) in enumerate(cases)
    ]
    for process, (_, _, message) in zip(processes, cases):
        _, stderr = process.communicate()
        assert process.returncode == 2 and "Traceback" not in stderr
        assert message in stderr, stderr


@pytest.mark.parametrize("kind", ["job", "beam"])
def test_killed_at_random_moments(audio, whole, tmp_path, kind):
    """Kills after a random number of further shards and seconds; KILLS sets how often."""
    draw = random.Random(7)
    out, kills = tmp_path / "tokens", 0
    command = [kind, *audio, *(["--workers", 2] if kind == "job" else []), "--out"]
    while kills < int(os.environ.get("KILLS", "3" if kind == "job" else "1")):
        process = start(*command, out)
        wanted = len(list(out.glob("units/*.json"))) + draw.randint(0, 5)
        while process.poll() is None and len(list(out.glob("units/*.json"))) < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        _, stderr = process.communicate()
        if process.returncode == 0:  # it was done before: from the start again
            assert content(out) == whole
            out = out.with_name(f"{out.name}_")
        else:
            assert process.returncode == -signal.SIGKILL, stderr[-3000:]
            kills += 1
    finish(*command, out)
    assert content(out) == whole
