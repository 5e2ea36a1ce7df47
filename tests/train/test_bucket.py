"""Runs of several processes, and in a bucket: of an emulator of Google's, a process of its own."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tiny
from fake_bucket import serve
from gcsfs.retry import HttpError
from google.api_core import exceptions
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.storage.exceptions import DataCorruption
from several import begin, drawn, finish, free_port, losses

from launch import export, sample
from magnet_jax.checkpoints import run_folder
from magnet_jax.config import DecodeConfig, LoraConfig, MeshConfig, RunConfig, to_json
from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import bucket, lock
from magnet_jax.train import loop, steps


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A list of the process that serves the bucket 'music', and a function that starts it again."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "music").mkdir()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv(bucket.TIMEOUT, "2")
        tiny.use_one_device(patch)
        running = [serve(folder, port)]

        def again() -> None:
            running[0].wait()
            running[0] = serve(folder, port)

        yield running, again
        running[0].kill()
        running[0].wait()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "tokens"
    tiny.write_noise(directory, {"train": 20, "validation": 5})
    return directory


def steps_in(url: str) -> list[int]:
    """The whole checkpoints of a run."""
    steps = [int(name) for name in bucket.names(f"{url}/checkpoints") if name.isdigit()]
    return sorted(
        step for step in steps if "commit_success.txt" in bucket.names(f"{url}/checkpoints/{step}")
    )


def losing(number: int, url: str, server: subprocess.Popen, last: int) -> Callable:
    """A train step whose call of a number finds the server gone, with no save under way."""
    step, count = steps.train_step, itertools.count(1)

    def losing_step(*args, **keywords):
        if next(count) == number:
            while last not in steps_in(url):
                time.sleep(0.05)
            time.sleep(1)  # until what the checkpoint replaces is deleted
            server.kill()
        return step(*args, **keywords)

    return losing_step


def wait_for_step(url: str, step: int, processes: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 240
    while max(steps_in(url), default=0) < step:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log_*")))
        assert all(process.poll() is None for process in processes), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)


def assert_as_if_uninterrupted(config: RunConfig, folder: Path) -> None:
    """Trains it once more, in one go, and compares the losses of all steps."""
    whole = dataclasses.replace(config, out=str(folder / "whole"), sample_every=0)
    loop.train(whole)
    bucket.fetch(config.out, folder / "fetched", {"checkpoints"})
    found, expected = losses(folder / "fetched"), losses(folder / "whole")
    assert found.keys() == expected.keys() == set(range(1, config.steps + 1))
    assert found == pytest.approx(expected, rel=1e-5)
    assert list((folder / "fetched" / "tensorboard").iterdir())


@pytest.fixture(scope="module")
def rng():
    return drawn()


@pytest.fixture(scope="module")
def run(server, tokens, rng, tmp_path_factory):
    """A run that one process has begun, and two went on with, of which one was stopped."""
    folder = tmp_path_factory.mktemp("run")
    url, file = "gs://music/runs/one", folder / "config.json"
    config = tiny.run_config(
        tokens, url, steps=3, log_every=1, save_every=3, eval_every=3, mesh=MeshConfig(data=-1),
        decode=DecodeConfig(steps=(1, 1, 1, 1)),
    )  # fmt: skip
    loop.train(config)

    config = dataclasses.replace(config, steps=400)
    file.write_text(to_json(config))
    two = begin(file, 2)
    wait_for_step(url, 6, two, folder)
    time.sleep(rng.uniform(0, 0.3))
    two[rng.integers(2)].send_signal(signal.SIGTERM)
    assert finish(two, folder) == [128 + signal.SIGTERM] * 2
    assert "the same command goes on" in (folder / "log_0").read_text()
    assert "the same command" not in (folder / "log_1").read_text()
    return config


def test_stopped_cut_off_and_resumed_as_if_nothing_had_been(server, run, tmp_path, capfd):
    """By one process, whose bucket vanishes, and one more. Then samples and exports."""
    running, again = server
    url = run.out
    stopped_at = steps_in(url)[-1]
    last = stopped_at + run.save_every - stopped_at % run.save_every
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", losing(last + 2 - stopped_at, url, running[0], last))
        with pytest.raises(UserError, match=f"^{url}: out of reach .*mend the network"):
            loop.train(run)
    shown = re.split(r"[\r\n]+", capfd.readouterr().err)
    # TensorStore's own line on credentials stays: to hide it would hide other threads' lines.
    shown = [line for line in shown if "google_auth_provider" not in line]
    assert [line for line in shown if line.strip() and not line.startswith("train:")] == []
    again()
    assert steps_in(url)[-1] == last

    config = dataclasses.replace(run, steps=last + 3)
    loop.train(config)
    assert steps_in(url) == [last, last + 3]
    assert_as_if_uninterrupted(config, tmp_path)

    options = ["--out", str(tmp_path / "wavs"), "--prompt", "noise", "--weights", "raw"]
    (wav,) = sample.sample(sample.parse(["--checkpoint", url, *options]))
    settings = json.loads(wav.with_suffix(".json").read_text())
    assert settings["step"] == config.steps and settings["checkpoint"] == url
    out = tmp_path / "exported"
    export.main(export.Args(checkpoint=url, out=out, audiocraft=False))
    lineage = json.loads((out / "config.json").read_text())["lineage"]
    assert (lineage["run"], lineage["step"]) == ("one", config.steps)


def test_two_processes_fine_tune_are_killed_and_one_goes_on(run, rng, tmp_path):
    """Adapters, on a mesh over both processes, of which the first one samples."""
    file, url = tmp_path / "config.json", "gs://music/runs/tuned"
    config = dataclasses.replace(
        run, out=url, init_from=run.out, lora=LoraConfig(rank=2), mesh=MeshConfig(data=1, fsdp=2),
        text=dataclasses.replace(run.text, finetune=False),
        steps=400, eval_every=0, sample_every=3, sample_prompts=("noise",),
    )  # fmt: skip
    file.write_text(to_json(config))
    two = begin(file, 2)
    wait_for_step(url, 3, two, tmp_path)
    time.sleep(rng.uniform(0, 0.3))
    two[rng.integers(2)].send_signal(signal.SIGKILL)
    time.sleep(0.3)
    for process in two:  # as a scheduler does when one is gone
        process.kill()
        process.wait()
    killed_at = steps_in(url)[-1]
    held = bucket.names(f"{url}/checkpoints/{killed_at}/params")
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= held  # each wrote its own
    assert "00.wav" in bucket.names(f"{url}/samples/step_0000003")

    config = dataclasses.replace(
        config, mesh=MeshConfig(), steps=killed_at + 3, sample_every=0, sample_prompts=()
    )
    loop.train(config)
    assert_as_if_uninterrupted(config, tmp_path)


def test_the_best_and_every_nth_checkpoint_stay(server, tokens):
    config = tiny.run_config(
        tokens,
        "gs://music/best",
        save_every=2,
        eval_every=2,
        keep_last=1,
        keep_every=6,
        keep_best=1,
    )
    state = {"params": {"w": jax.numpy.zeros(3)}}
    for saved, seen in (((2, 4, 6, 8), [5.0, 3.0, 4.0, 4.5]), ((10, 12), [4.2, 4.1])):
        manager = run_folder.open_manager(config)  # opened again: it remembers which was best
        with run_folder.closing(manager):
            for step, loss in zip(saved, seen):
                run_folder.save(manager, step, state, {"next": step}, loss)
    assert steps_in(config.out) == [4, 6, 12]


def test_what_is_only_begun_is_no_checkpoint(server, tokens):
    url = "gs://music/begun"
    config = tiny.run_config(tokens, url)
    mirror = bucket.Mirror(url, ())
    (mirror.folder / "config.json").write_text(to_json(config))
    (mirror.folder / "checkpoints" / "5" / "params").mkdir(parents=True)
    (mirror.folder / "checkpoints" / "5" / "params" / "_METADATA").write_text("{}")
    mirror.push()
    assert not run_folder.has_begun(url)
    (mirror.folder / "checkpoints" / "5" / "commit_success.txt").write_text("done")
    mirror.push()
    assert run_folder.has_begun(url)
    (mirror.folder / "checkpoints" / "10" / "params").mkdir(parents=True)
    (mirror.folder / "checkpoints" / "10" / "params" / "_METADATA").write_text("{}")
    mirror.push()
    with run_folder.open_manager(config) as manager:
        assert manager.latest_step() == 5


def test_only_what_has_changed_is_brought_to_the_bucket(server, monkeypatch):
    mirror = bucket.Mirror("gs://music/mirrored/run", ())
    assert mirror.folder.name == "run"
    for name in ("one", "two"):
        (mirror.folder / name).write_text(name)
    mirror.push()
    assert bucket.names("gs://music/mirrored/run") == {"one", "two"}
    (mirror.folder / "one").unlink()
    (mirror.folder / "two").write_text("changed")
    other = bucket.Mirror("gs://music/mirrored/run/", {"one"})
    assert [path.name for path in other.folder.iterdir()] == ["two"]
    mirror.push()
    (mirror.folder / "three").mkdir()
    (mirror.folder / "three" / "a").write_bytes(b"a")
    mirror.push()
    last = bucket.Mirror("gs://music//mirrored//run", ())
    held = {p.name: p.read_text() for p in last.folder.rglob("*") if p.is_file()}
    assert held == {"one": "one", "two": "changed", "a": "a"}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("gs://nobody/run", "gs://nobody/run: no such bucket .*make the bucket, or mend its name"),
        ("gs://music", "gs://music: what can be written to is gs://BUCKET/FOLDER"),
        ("s3://b/run", "another kind must be mounted"),
    ],
)
def test_a_bucket_that_cannot_be_had_is_one_line_before_training(server, tokens, out, message):
    with pytest.raises(UserError, match=message):
        loop.train(tiny.run_config(tokens, out))


def test_names_that_are_patterns_are_refused(tokens):
    """What is deleted by such a name might be another run's."""
    for name in ("run[1]", "run*", "r?n", "run#1"):
        message = re.escape(f"gs://music/{name}: {re.search('[][*?#]', name)[0]} is a pattern")
        with pytest.raises(UserError, match=message):
            loop.train(tiny.run_config(tokens, f"gs://music/{name}"))


def test_a_second_run_is_told_of_the_first(server, tokens, monkeypatch):
    url = "gs://music/held"
    monkeypatch.setattr(lock, "SIGN", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 2.0)
    with lock.held(url, pytest.fail) as first:
        refused = pytest.raises(PassingError, match=f"{url}: another .* process {os.getpid()} on")
        with refused:
            loop.train(tiny.run_config(tokens, url, steps=1))
        with monkeypatch.context() as patch:  # seen from another machine
            patch.setattr(lock, "_machine", lambda: "another")
            with refused, lock.held(url, print):
                pass
        first.check()
        assert bucket.names(url) == {lock.NAME}
        left = json.dumps(lock.myself() | {"machine": "another", "host": "node7"}).encode()
        _, version = bucket.read_version(url, lock.NAME)
        while not bucket.swap(url, lock.NAME, version, left):
            _, version = bucket.read_version(url, lock.NAME)
        with pytest.raises(UserError, match="is that of process .* on node7"):
            first.check()
    said = []
    with lock.held(url, said.append) as second:  # that host is dead
        second.check()
    assert len(said) == 1 and "on node7" in said[0]
    assert bucket.names(url) == set()


def test_other_contents_are_refused(server, tokens):
    mirror = bucket.Mirror("gs://music/other", ())
    (mirror.folder / "thesis.txt").write_text("mine")
    mirror.push()
    with pytest.raises(UserError, match="gs://music/other is not empty .*thesis.txt"):
        loop.train(tiny.run_config(tokens, "gs://music/other"))


def test_records_are_not_read_from_a_bucket(tokens):
    config = tiny.run_config(tokens, "run")
    data = dataclasses.replace(config.data, path="gs://music/data")
    with pytest.raises(UserError, match="gcloud storage rsync -r gs://music/data DIR"):
        loop.train(dataclasses.replace(config, data=data))


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (exceptions.Forbidden("x does not have storage.buckets.get access"), "no permission"),
        (OSError("Forbidden: https://storage.googleapis.com/b/x"), "no permission"),
        (ValueError("PERMISSION_DENIED: no [http_response_code='403']"), "no permission"),
        (DefaultCredentialsError("none were found"), "no valid credentials"),
        (exceptions.NotFound("the bucket does not exist"), "no such bucket"),
        (FileNotFoundError("music/run/checkpoints"), "no such bucket"),
        (DataCorruption(None, "the checksums differ"), "damaged on the way"),
        (chained(RuntimeError("save failed"), exceptions.Forbidden("no")), "no permission"),
        (ValueError("ABORTED: All 3 retry attempts failed: CURL error"), "out of reach"),
        (ValueError("Error writing gs://b/checkpoints/404/params: CURL error"), "out of reach"),
        (exceptions.RetryError("Timeout of 3.0s exceeded", None), "out of reach"),
        (HttpError({"code": 403, "message": "no access"}), "no permission"),
        (HttpError({"code": 401, "message": "Invalid Credentials"}), "no valid credentials"),
        (HttpError({"code": 503, "message": "Backend Error"}), "out of reach"),
    ],
)
def test_reasons_are_told_apart(error, line):
    assert bucket.reason(error).startswith(line)
    with pytest.raises(UserError, match=f"^gs://b: {line}") as caught, bucket.explained("gs://b"):
        raise error
    assert isinstance(caught.value, PassingError) == (line == "out of reach")


def test_what_is_written_locally_is_not_sent_to_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs a folder on disk"):
        sample.sample(sample.Args(checkpoint="run", out=Path("gs://music/wavs"), unconditional=1))
    with pytest.raises(UserError, match="needs a folder on disk"):
        export.main(export.Args(checkpoint="run", out=Path("gs://music/exported")))
    assert not list(tmp_path.iterdir())


def test_patience_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv(bucket.TIMEOUT, "soon")
    with pytest.raises(UserError, match="'soon', not a whole number"):
        bucket.patience()
