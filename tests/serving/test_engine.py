"""The engine: order, fairness, batches, ends of all kinds."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.prompts import Prompt
from magnet_jax.serving import admission, store, work
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import new_job
from magnet_jax.serving.requests import KINDS, Extend, Generate, Inpaint, Result, Vary

SECONDS = 0.6


def request(text="a calm harp", **fields):
    return Generate(**{"input": text, "seconds": SECONDS, "seed": 1} | fields)


def codes_of(engine, job, index=0):
    path = engine.audio_path(job, index).with_suffix(".tokens.npz")
    with np.load(path) as file:
        return file["codes_KT"]


@pytest.fixture
def batches(engine, monkeypatch):
    """The batches that the device makes, as lists of (client, text)."""
    made, generate = [], work.generate

    def watched(model, rows, between):
        made.append([(row.job.client, row.text) for row in rows])
        return generate(model, rows, between)

    monkeypatch.setattr(work, "generate", watched)
    return made


def test_jobs_of_two_programs_are_made_in_batches_and_in_turn(engine, gate, batches):
    """Clips equal those made alone, whoever shares their batch."""
    with gate.shut():
        jobs = [engine.submit(request("first"), client="other")]
        while engine._queue:  # the device holds it at the gate
            time.sleep(0.01)
        for i in range(8):
            # A client who asks for much does not keep another waiting.
            jobs.append(engine.submit(request(f"greedy {i}", seed=i), client="greedy"))
        for i in range(4):
            fields = {"seed": i, "temperature": 1.0 + i, "guidance": [5.0, 1.0]}
            jobs.append(engine.submit(request(f"modest {i}", **fields), client="modest"))
        for i in range(4):
            jobs.append(engine.submit(request(f"draft {i}", steps=[2, 1, 1, 1]), client="other"))
        places = [engine.view(job)["position"] for job in jobs]
        assert places == [0, *range(1, 17)]
    assert all(job.wait(300) and job.state == "done" for job in jobs)
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == 17 and np.mean(sizes[1:]) >= 4
    shared = [{client for client, _ in batch} for batch in batches]
    assert {"greedy", "modest"} in shared  # settings of one's own share a program
    assert shared.index({"other"}, 1) <= 3  # whose turn came before all of the others' were made
    model = engine.model
    for job in (jobs[3], jobs[10], jobs[14]):
        alone = sampling.generate(
            model.loaded, [job.request.input], num_frames=round(SECONDS * model.frame_rate),
            decoding=work.decoding_of(model, job.request), seed=job.seed,
        )  # fmt: skip
        np.testing.assert_array_equal(codes_of(engine, job), alone.codes_BKT[0])


def test_longer_clips_let_others_go_between_their_windows(engine, gate):
    """A clip of several windows is the Python API's, and does not keep a short one waiting."""
    with gate.shut():
        longer = engine.submit(request(seconds=4.0, n=2, steps=[2, 1, 1, 1]))
        short = engine.submit(request())
    assert short.wait(300) and short.state == "done" and longer.state == "running"
    assert longer.wait(300) and longer.state == "done"
    assert [clip.seconds for clip in longer.clips] == [4.0, 4.0]
    assert longer.done == longer.total > 5
    model = engine.model
    model.generation = work.decoding_of(model, longer.request)
    made = model.clips(["a calm harp"] * 2, num_frames=200, seed=longer.seed)
    model.set_generation_params()
    for index in range(2):
        np.testing.assert_array_equal(codes_of(engine, longer, index), made.codes_BKT[index])


def test_a_deterministic_job_is_made_one_clip_at_a_time(engine, gate, batches):
    with gate.shut():
        jobs = [engine.submit(request(n=2, deterministic=True)), engine.submit(request())]
    assert all(job.wait(300) for job in jobs)
    assert sorted(map(len, batches)) == [1, 1, 1]
    first = engine.audio_path(jobs[0], 0).read_bytes()
    assert engine.audio_path(jobs[1], 0).read_bytes() == first


def test_a_job_that_is_cancelled_midway_leaves_its_batch_alone(engine, gate, monkeypatch):
    """Queued, running or done: its row disturbs nobody, and a batch nobody wants is left."""
    seen, live = [], engine._live

    def cancelling(jobs):
        seen.append(jobs)
        for job in jobs:
            if job.request.input == "unwanted":
                engine.cancel(job)
        return live(jobs)

    monkeypatch.setattr(engine, "_live", cancelling)
    with gate.shut():
        engine.submit(request("at the gate"))
        while engine._queue:
            time.sleep(0.01)
        wanted = engine.submit(request("wanted"))
        unwanted = [engine.submit(request("unwanted")) for _ in range(2)]
        queued = engine.submit(request("never"))
        engine.cancel(queued)
    assert wanted.wait(300) and wanted.state == "done"
    assert all(job.wait(300) for job in unwanted)
    assert [job.state for job in (*unwanted, queued)] == ["cancelled"] * 3
    engine.cancel(wanted)
    assert wanted.state == "done"
    seen.clear()
    lonely = engine.submit(request("unwanted"))
    assert lonely.wait(300) and lonely.state == "cancelled"
    assert engine.submit(request("wanted")).wait(300)
    assert [jobs == [lonely] for jobs in seen].count(True) == 1  # after one segment of several


def test_a_device_that_fails_fails_its_own_jobs_alone(engine, gate, monkeypatch):
    generate = work.generate

    def failing(model, rows, between):
        if any(row.text == "bad" for row in rows):
            raise RuntimeError("RESOURCE_EXHAUSTED: no room" if len(rows) > 9 else "it burns")
        return generate(model, rows, between)

    monkeypatch.setattr(work, "generate", failing)
    with gate.shut():
        jobs = [engine.submit(request(text)) for text in ("good", "bad", "also good")]
    assert all(job.wait(300) for job in jobs)
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert jobs[1].error.status == 500 and "burns" not in str(jobs[1].error)


def test_a_batch_that_fails_late_is_made_once_more_from_the_start(engine, monkeypatch):
    """Each clip of its own time, and none is there twice."""
    sure, begun, failed = engine._sure, [], []

    def failing(row, made):
        begun.append(engine._since)
        if row.index == 1 and not failed:
            failed.append(row)
            raise RuntimeError("it burns")
        return sure(row, made)

    monkeypatch.setattr(engine, "_sure", failing)
    before = engine.stats()["clips"]
    job = engine.submit(request(n=2))
    assert job.wait(300) and job.state == "done"
    assert [clip.index for clip in job.clips] == [0, 1] and len(begun) == 4
    assert begun[0] == begun[1] < begun[2] < begun[3]
    assert engine.stats()["clips"] == before + 2


def test_a_job_that_takes_too_long_is_ended(engine, monkeypatch):
    monkeypatch.setattr(engine._pace, "_speed", {})
    limits = dataclasses.replace(engine.limits, job_seconds=1e-9)
    monkeypatch.setattr(engine, "limits", limits)
    job = engine.submit(request())
    assert job.wait(300) and job.error.status == 504


def test_a_job_is_charged_what_its_batch_takes(engine, gate, monkeypatch):
    """Its share of a batch is no measure of when the batch ends."""
    assert engine.submit(request()).wait(300)
    monkeypatch.setattr(engine, "limits", dataclasses.replace(engine.limits, job_seconds=1e-9))
    with gate.shut():
        engine.submit(request("at the gate"))
        while engine._queue:
            time.sleep(0.01)
        jobs = [engine.submit(request(seed=seed)) for seed in range(4)]
        each = engine._pace.seconds_of(jobs[0])
        assert engine.view(jobs[3])["eta_seconds"] == round(5 * each, 1)
    assert all(job.wait(300) for job in jobs)
    assert jobs[0].budget >= 8 * each * 0.5 > 2 * each * 0.5  # the pace has changed meanwhile


def test_the_device_waits_for_the_disk(engine, monkeypatch):
    keep, passing = engine._keep_row, threading.Event()

    def slow(*arguments):
        passing.wait()
        keep(*arguments)

    monkeypatch.setattr(engine, "_keep_row", slow)
    jobs = [engine.submit(request(seed=seed, n=2)) for seed in range(10)]
    while engine._writing < 2 * engine.limits.max_batch:
        time.sleep(0.01)
    while engine._running:
        time.sleep(0.01)
    assert engine._queue and engine._writing < 3 * engine.limits.max_batch
    passing.set()
    assert all(job.wait(300) and job.state == "done" for job in jobs)


def test_cancelled_longer_clips_leave_nothing_behind(engine, monkeypatch):
    """Cancelled while the device is at a window."""
    monkeypatch.setattr(engine, "_tell", lambda job, progress: engine.cancel(job))
    longer = engine.submit(request(seconds=4.0, steps=[2, 1, 1, 1]))
    assert longer.wait(300) and longer.state == "cancelled"
    with engine._lock:
        assert engine._lock.wait_for(lambda: not engine._running, 300)
    assert engine._begun == {}


def test_jobs_that_came_to_nothing_are_forgotten(engine, gate, monkeypatch):
    monkeypatch.setattr("magnet_jax.serving.engine.MOST_UNDONE", 3)
    with gate.shut():
        jobs = [engine.submit(request(), owner="clumsy") for _ in range(5)]
        for job in jobs:
            engine.cancel(job)
    assert engine.jobs("clumsy") == jobs[2:]


def test_the_text_of_an_extension_is_as_late_as_its_clip():
    text = Prompt([(0, "a"), (3.0, "b")])
    edit = SimpleNamespace(clips=[SimpleNamespace(text=text)])  # as generate_extension gives it
    job = new_job(Extend(**CLIP | {"input": None}, before=1.0), "", "")
    assert work.edited_text(job, edit, 0) == text


def test_a_full_disk_fails_a_job_and_says_so(engine, monkeypatch):
    def full(path):
        raise UserError(f"{path}: cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(store, "replacing_file", full)
        job = engine.submit(request())
        assert job.wait(300)
    assert (job.state, job.error.status) == ("failed", 507)
    assert str(engine.files.folder) not in str(job.error)
    assert engine.submit(request()).wait(300)  # and the server goes on


def test_results_expire_and_the_oldest_go_first(engine, monkeypatch):
    jobs = [engine.submit(request(seed=seed)) for seed in range(2)]
    assert all(job.wait(300) for job in jobs)
    with monkeypatch.context() as patch:
        patch.setattr(engine.files, "keep_bytes", engine.files.size() - 1)
        engine.files.hold(engine.files.job(jobs[0].id))
        engine.expire()
        engine.files.release(engine.files.job(jobs[0].id))
    assert engine.audio_path(jobs[0], 0).exists() and engine.audio_path(jobs[1], 0).exists()
    (engine.files.folder / "jobs" / "stray").write_text("not ours")
    with monkeypatch.context() as patch:
        patch.setattr(engine.files, "keep_seconds", 0)
        engine.expire()
    (engine.files.folder / "jobs" / "stray").unlink()
    assert engine.files.size() == 0
    with pytest.raises(RequestError, match="expired"):
        engine.job(jobs[0].id)


def test_estimates_come_of_what_was_made(engine, gate):
    assert engine.submit(request()).wait(300)
    with gate.shut():
        jobs = [engine.submit(request()) for _ in range(3)]
        views = [engine.view(job) for job in jobs]
        assert all(view["eta_seconds"] is not None for view in views)
        assert views[2]["eta_seconds"] >= views[0]["eta_seconds"]
    assert all(job.wait(300) for job in jobs)


def test_what_was_left_teaches_nothing_of_how_long_work_takes(engine, gate, monkeypatch):
    """Else the next job of its kind is ended as one that takes too long."""
    assert engine.submit(request()).wait(300)  # which compiles
    taught, took = [], engine._pace.took

    def watched(batch, *how):
        taught.extend(row.job for row in batch)
        took(batch, *how)

    monkeypatch.setattr(engine._pace, "took", watched)
    with gate.shut():
        left = engine.submit(request("left"))
        while left.state == "queued":
            time.sleep(0.01)
        engine.cancel(left)
    assert left.wait(300) and left.state == "cancelled"

    def fail(*args):
        raise UserError("the region is too short")

    monkeypatch.setattr(work.Editor, "run", fail)
    monkeypatch.setattr(admission, "check", lambda *args: None)
    failed = engine.submit(Vary(job=Result(id=left.id), input="x"))
    assert failed.wait(300) and failed.error
    assert failed.budget >= 10 * engine.limits.job_seconds
    made = [engine.submit(request(seed=seed)) for seed in (1, 2)]  # behind those
    assert all(job.wait(300) for job in made)
    while engine._running:
        time.sleep(0.01)
    assert set(taught) == set(made)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_tonal_stream_is_not_heard_alone(sides):
    sounds = np.ones((5, 4, 3), np.float32)
    loaded = SimpleNamespace(codec=SimpleNamespace(sides=sides))
    decoder = SimpleNamespace(params={"codebooks": sounds})
    model = SimpleNamespace(decoder=decoder, loaded=loaded)
    assert work.first_heard(model) == sides
    sounds[0] = 0
    assert work.first_heard(model) == 2 * sides


@pytest.mark.parametrize("heard", [1, 2])
def test_a_preview_is_made_once_as_soon_as_something_is_heard(engine, monkeypatch, heard):
    """Also where no segment of steps ends with that codebook."""
    previewed = []
    monkeypatch.setattr(engine, "_heard", heard)
    monkeypatch.setattr(engine, "_previews", lambda batch, progress: previewed.append(progress))
    assert engine.submit(request(steps=[6, 2, 2, 3], preview=True)).wait(300)
    assert len(previewed) == 1 and sum([6, 2][:heard]) <= previewed[0].done < 13


CLIP = {"job": {"id": "a" * 26}, "seed": 5, "input": "x"}
EDITS = [
    ("inpaint", {"regions": [[0.0, 1.0]], "codebooks": [1]}, "generate_inpainting",
     {"regions": [[0.0, 1.0]], "codebooks": (1,)}),
    ("extend", {"before": 1.0, "context": 2.0}, "generate_extension",
     {"before": 1.0, "after": 0.0}),
    ("restyle", {"how": "replay", "original": "y"}, "generate_restyle",
     {"strength": 0.5, "how": "replay", "original": "y"}),
    ("vary", {"n": 2}, "generate_variations", {"n": 2, "variation": 0.3}),
    ("repair", {"rounds": 2}, "repair", {"worst": 0.1, "rounds": 2}),
]  # fmt: skip


def test_edits_are_the_methods_of_the_api(engine, monkeypatch):
    """Each with what was asked for, under settings that are the model's own again afterwards."""
    model, called = engine.model, []
    before = model.editing, model.generation, model.execution

    def method(name):
        def call(*given, **how):
            called.append((name, given, how, model.editing, model.generation))

        return call

    for kind, fields, name, wanted in EDITS:
        monkeypatch.setattr(model, name, method(name))
        job = new_job(KINDS[kind](**CLIP, **fields, steps=[1, 1, 1, 1], edge="inside"), "", "")
        engine._editor.run(job, lambda progress: None)
        found, given, how, editing, generation = called.pop()
        assert (found, given) == (name, (engine.files.clip("a" * 26, 0),))
        assert how == {"descriptions": ["x"], "seed": 5} | wanted
        assert editing.edge == "inside" and editing.context == fields.get("context", 4.0)
        assert generation.steps == (1, 1, 1, 1)
    monkeypatch.setattr(model, "generate_between", method("between"))
    two = KINDS["between"](**CLIP, then_file="b" * 26, seconds=1.0)
    engine._editor.run(new_job(two, "", ""), lambda progress: None)
    then = engine.files.upload("b" * 26) / "audio.wav"
    assert called.pop()[1] == (engine.files.clip("a" * 26, 0), then, 1.0)
    assert (model.editing, model.generation, model.execution) == before


def test_what_cannot_be_made_is_refused_before_it_waits(engine):
    with pytest.raises(RequestError, match="no file"):
        engine.submit(Inpaint(file="a" * 26, regions=[[0.0, 1.0]]))
    job = engine.submit(request())
    assert job.wait(300)
    bad = engine.submit(Inpaint(job=Result(id=job.id), regions=[[0.0, 99.0]]))
    assert bad.wait(300) and bad.error.status == 400 and "99" in str(bad.error)


def test_a_server_that_ends_finishes_what_was_begun(model, started, tmp_path):
    with started(model, tmp_path, max_batch=1) as engine:
        jobs = [engine.submit(request(seed=seed)) for seed in range(3)]
        waiting = threading.Thread(target=engine.drain)
        waiting.start()
        while not engine.draining:
            time.sleep(0.01)
        with pytest.raises(RequestError, match="ending") as error:
            engine.submit(request())
        assert error.value.status == 503
        waiting.join(300)
        assert [job.state for job in jobs] == ["done"] * 3
    assert not engine._device.is_alive()
