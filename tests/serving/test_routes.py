"""The API, by real requests to a real server."""

import dataclasses
import io
import json
import re
import threading
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from starlette.datastructures import Headers

from launch.make import openapi
from launch.make.docs_check import blocks
from magnet_jax.config import ASSETS
from magnet_jax.prompts import Prompt
from magnet_jax.serving.access import Access
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import Clip
from magnet_jax.serving.requests import KINDS

ROOT = Path(__file__).parents[2]
SECONDS = 0.6
CLIP = ASSETS / "clips" / "02_bach.flac"


def ask(client, kind="generate", *, headers=None, **fields):
    if kind == "generate":
        fields = {"input": "a calm harp", "seconds": SECONDS, "seed": 7} | fields
    return client.post(f"/v1/audio/{kind}", json=fields, headers=headers)


def sound(answer):
    assert answer.status_code == 200, answer.text
    return soundfile.read(io.BytesIO(answer.content))


def failed(answer, status, code=None, param=None):
    """Checks an error's form: OpenAI's, one line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    assert code in (None, error["code"]) and param in (None, error["param"])
    return error["message"]


def test_a_clip_and_what_is_told_of_it(client, model):
    answer = ask(client)
    wav_N, rate = sound(answer)
    assert (len(wav_N), rate) == (SECONDS * 16000, 16000)
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-seed"] == "7" and answer.headers["x-sample-rate"] == "16000"
    assert 'filename="a-calm-harp-seed7-0.wav"' in answer.headers["content-disposition"]
    path = f"/v1/jobs/{answer.headers['x-job-id']}/audio/0"
    assert client.head(path).headers["content-length"] == str(len(answer.content))
    # It is the clip that the Python API makes.
    model.set_generation_params(duration=SECONDS)
    codes_BKT = model.generate(["a calm harp"], return_tokens=True, seed=7)[1]
    model.set_generation_params()
    job = client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()
    assert job["state"] == "done" and job["progress"] == {"done": 10, "total": 10, "stage": ""}
    (result,) = job["results"]
    tokens = np.load(io.BytesIO(client.get(result["tokens"]).content))
    np.testing.assert_array_equal(tokens["codes_KT"], codes_BKT[0])
    settings = client.get(result["settings"]).json()
    assert settings["prompt"] == "a calm harp" and settings["seed"] == 7
    assert settings["request"]["seconds"] == SECONDS and "async" in settings["request"]
    # The same again in other formats, and a part of it.
    assert client.get(result["audio"]).content == answer.content
    for format in ("flac", "mp3"):
        other = client.get(result["audio"], params={"format": format})
        assert abs(len(sound(other)[0]) - len(wav_N)) < 2500
    part = client.get(result["audio"], headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, answer.content[10:20])
    assert client.get(result["audio"], headers={"Range": "bytes=9999999-"}).status_code == 416


def test_guidance_may_end_at_nothing(client):
    job = client.get(f"/v1/jobs/{ask(client, guidance=[10, 0]).headers['x-job-id']}").json()
    decode = client.get(job["results"][0]["settings"]).json()["decode"]
    assert (decode["max_guidance"], decode["min_guidance"]) == (10, 0)


def test_what_becomes_longer_stays_within_the_limit(client):
    clip = {"id": ask(client).headers["x-job-id"]}
    told = failed(ask(client, "extend", job=clip, after=599.9), 400, param="after")
    assert "must be at most 600 in all, with the" in told


def test_names_of_similar_services_and_drawn_seeds(client):
    fields = {"prompt": "a harp", "audio_length": SECONDS, "guidance_scale": 3, "input": None}
    del fields["input"]
    answers = [client.post("/v1/audio/generate", json=fields) for _ in range(2)]
    assert answers[0].headers["x-seed"] != answers[1].headers["x-seed"]
    assert sound(answers[0])[1] == 16000


def test_texts_over_time_and_what_a_clip_is_not_to_be(client, model):
    timeline = [[0, "a harp"], [0.3, [["a fiddle", 0.5], ["an organ", 0.5]]]]
    answer = ask(client, input="", timeline=timeline, text_fade=0.1, negative_prompt="noise")
    assert answer.headers["content-disposition"].count("a-harp-a-fiddle-an-organ-seed7-0.wav")
    job = client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()
    tokens = np.load(io.BytesIO(client.get(job["results"][0]["tokens"]).content))
    model.set_generation_params(duration=SECONDS)
    prompt = Prompt([(0, "a harp"), (0.3, [("a fiddle", 0.5), ("an organ", 0.5)])], "noise", 0.1)
    codes_BKT = model.generate([prompt], return_tokens=True, seed=7)[1]
    model.set_generation_params()
    np.testing.assert_array_equal(tokens["codes_KT"], codes_BKT[0])
    assert client.get(job["results"][0]["settings"]).json()["prompt"]["negative"] == "noise"
    failed(ask(client, timeline=timeline), 400, param="timeline")
    failed(ask(client, input="", timeline=[[1, "a harp"]]), 400)
    failed(ask(client, input="", timeline=[[0, "a harp"], [5, "a fiddle"]]), 400)
    failed(ask(client, input="", blend=[["a harp", -1]]), 400)


def test_several_clips_are_a_zip(client):
    answer = ask(client, n=3, response_format="flac")
    assert answer.headers["content-type"] == "application/zip"
    names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
    stems = [f"a-calm-harp-seed7-{i}" for i in range(3)]
    assert sorted(names) == sorted(
        f"{stem}{end}" for stem in stems for end in (".flac", ".json", ".tokens.npz")
    )


def test_a_job_is_followed_to_its_end(client):
    answer = ask(client, headers={"Prefer": "respond-async"}, preview=True, confidence=True)
    assert answer.status_code == 202
    path = answer.headers["location"]
    events = []
    with client.stream("GET", f"{path}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                events.append(value)
            elif name == "data":
                job = json.loads(value)
    assert events[-1] == "done" and set(events) <= {"progress", "preview", "done"}
    assert job == client.get(path, params={"wait": 20}).json()
    assert len(job["results"][0]["confidence"]) == SECONDS * 50
    assert sound(client.get(job["preview"]))[0].std() > 0
    # Who comes late gets the state as it is.
    late = client.get(f"{path}/events", headers={"Last-Event-ID": "1"})
    assert late.text.count("event: done") == 1
    assert path.removeprefix("/v1/jobs/") in {
        j["id"] for j in client.get("/v1/jobs").json()["data"]
    }


@pytest.fixture(scope="module")
def uploaded(client):
    wav_NC, rate = soundfile.read(CLIP, frames=32000, dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, wav_NC, rate, format="WAV")
    answer = client.post("/v1/files", files={"file": ("../../evil name.wav", file.getvalue())})
    assert answer.status_code == 201, answer.text
    return answer.json(), wav_NC


def test_an_upload_is_edited_and_other_samples_stay(client, uploaded):
    about, before_NC = uploaded
    assert about.keys() >= {"id", "seconds", "sample_rate", "channels", "sha256", "peaks"}
    assert len(about["peaks"]) == 2000 and "owner" not in about
    np.testing.assert_array_equal(sound(client.get(about["audio"]))[0] * 2**15, before_NC)
    answer = ask(client, "inpaint", file=about["id"], regions=[[0.5, 1.0]], edge="inside", seed=1)
    after_NC, rate = sound(answer)
    (result,) = client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()["results"]
    ((first, end),) = result["changed"]
    assert 0.5 <= first < end <= 1.0 and result["tokens"] is None
    same = np.ones(len(before_NC), bool)
    same[round(first * rate) : round(end * rate)] = False
    np.testing.assert_array_equal(after_NC[same] * 2**15, before_NC[same])
    failed(ask(client, "inpaint", file=about["id"], regions=[[0.5, 99.0]]), 400)


def test_what_the_docs_say_works_as_pasted(client, tmp_path, monkeypatch, capsys):
    """The Python, which edits a clip that was made here; and what curl sends."""
    found = list(blocks((ROOT / "docs" / "serving.md").read_text(encoding="utf-8")))
    (code,) = (block for language, block in found if language == "py")
    url = str(client.base_url).rstrip("/")
    for old, new in (
        ("http://127.0.0.1:7860", url), ("seconds=5", "seconds=0.6"), ("[[2, 3]]", "[[0.1, 0.5]]"),
    ):  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    ((first, end),) = json.loads(capsys.readouterr().out)
    assert first < 0.5 and end > 0.1
    assert soundfile.info(tmp_path / "edited.wav").frames == SECONDS * 16000
    shell = "".join(block for language, block in found if language == "sh")
    sent = re.findall(r"/v1/audio/(\w+) -H '[^']*' \\\n +-d '([^']*)'", shell)
    assert len(sent) == shell.count(" -d '")
    for kind, body in sent:
        KINDS[kind].model_validate_json(body)


def test_a_loop_is_as_long_as_its_bars(client):
    answer = ask(
        client, "loop", input="a jig", bpm=240, bars=1, n=2, seed=3, response_format="flac"
    )
    job = client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()
    assert [r["loop"]["samples"] for r in job["results"]] == [16000, 16000]
    name = "a-jig-240bpm-1bars-seed3-1.flac"
    file = zipfile.ZipFile(io.BytesIO(answer.content)).read(name)
    assert soundfile.info(io.BytesIO(file)).frames == 16000 and b"BPM=240" in file
    audio = job["results"][0]["audio"]
    wav = client.get(audio).content
    assert b"acid" in wav and b"smpl" in wav
    failed(client.get(audio, params={"format": "mp3"}), 400, param="format")
    begun = ask(client, "loop", input="a jig", seconds=1.0, start_job={"id": job["id"]}, seed=3)
    assert len(sound(begun)[0]) == 16000
    failed(ask(client, "loop", bars=4), 400)
    failed(ask(client, "loop", bpm=240, response_format="mp3"), 400, param="response_format")
    failed(ask(client, "loop", bpm=240, start_seconds=1.0), 400, param="start_seconds")
    failed(ask(client, "loop", bpm=240, start_file="a" * 26), 404)


def test_what_is_wrong_with_a_request_is_said(client):
    """Every 4xx by a request that deserves it."""
    failed(ask(client, tempo=3), 400, param="tempo")
    failed(ask(client, n="two"), 400, param="n")
    failed(ask(client, n=99), 400, param="n")
    failed(ask(client, seed=-1), 400, param="seed")
    failed(ask(client, input="x" * 2001), 400, param="input")
    half = b'{"input": "\\ud800"}'
    told = failed(client.post("/v1/audio/generate", content=half, headers=JSON), 400)
    assert "not valid Unicode" in told
    failed(ask(client, seconds=601.0), 400, param="seconds")
    failed(ask(client, "loop", seconds=3.0), 400, param="seconds")
    failed(ask(client, seconds=0.001), 400, param="seconds")
    failed(ask(client, steps=[1, 2]), 400, param="steps")
    failed(ask(client, steps=[1, 1, 1, 1], preset="draft"), 400, param="steps")
    assert "codebook" in failed(ask(client, num_inference_steps=50), 400)
    turns = [[float(i), "ab"[i % 2]] for i in range(65)]
    failed(ask(client, input="", timeline=turns), 400, param="timeline")
    failed(ask(client, input="", blend=[["a", 1.0]] * 65), 400, param="blend")
    endless = b'{"input": "x", "seconds": Infinity}'
    failed(client.post("/v1/audio/generate", content=endless, headers=JSON), 400, param="seconds")
    failed(ask(client, "vary", job={"id": "a" * 26, "index": 1001}), 400, param="job.index")
    failed(ask(client, "vary", job={"id": "a" * 26, "index": "1"}), 400, param="job.index")
    failed(ask(client, model="other"), 404, "model_not_found", "model")
    failed(client.post("/v1/audio/generate", content=b"{", headers=JSON), 400)
    failed(client.post("/v1/audio/generate", content=b"[" * 100_000, headers=JSON), 400)
    failed(client.post("/v1/audio/generate", content=b"\xff", headers=JSON), 400)
    failed(client.post("/v1/audio/generate", data={"input": "x"}), 415, "unsupported_media_type")
    failed(client.post("/v1/audio/generate", content=b" " * 2_000_000, headers=JSON), 413)
    stream = (b" " * 100_000 for _ in range(20))
    failed(client.post("/v1/audio/generate", content=stream, headers=JSON), 413, "too_large")
    failed(client.get("/v1/nothing"), 404)
    wrong = client.get("/v1/audio/generate")
    failed(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    for name in ("aaaa", "..%2f..%2fetc", "a" * 26, "%00"):
        failed(client.get(f"/v1/jobs/{name}"), 404)
        failed(client.get(f"/v1/files/{name}"), 404, "not_found")
    for file in ("a" * 26, "../../etc/passwd", "/etc/passwd", "http://127.0.0.1/x.wav"):
        failed(ask(client, "inpaint", file=file, regions=[[0, 1]]), 404, "not_found")
    failed(ask(client, "inpaint", regions=[[0, 1]]), 400, param="file")
    for field in ("n", "lufs"):  # which would have no effect
        edit = {"file": "a" * 26, "regions": [[0, 1]], field: 1}
        failed(ask(client, "inpaint", **edit), 400, param=field)
    failed(ask(client, "inpaint", file="a" * 26, regions=[[0]]), 400)
    failed(ask(client, "inpaint", job={"id": "a" * 26}, regions=[[0, 1]]), 404)


JSON = {"Content-Type": "application/json"}


def test_a_job_that_is_not_done_has_no_audio(client, engine, gate):
    with gate.shut():
        job = ask(client, asynchronous=True, n=2).json()
        failed(client.get(f"/v1/jobs/{job['id']}/audio/0"), 409, "job_not_done")
        known = engine.job(job["id"])
        known.clips = [Clip(index=0, seed=1, number=0, seconds=1.0)]  # of two
        failed(client.get(f"/v1/jobs/{job['id']}/zip"), 409, "job_not_done")
        known.clips = []
        failed(ask(client, "vary", job={"id": job["id"]}), 409, "job_not_done")
        assert client.get("/health").elapsed.total_seconds() < 2
        cancelled = client.delete(f"/v1/jobs/{job['id']}")
        assert (cancelled.status_code, cancelled.json()["state"]) == (202, "cancelled")
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 202
    failed(client.get(f"/v1/jobs/{job['id']}/audio/0"), 409)
    assert not engine.files.job(job["id"]).exists()


def test_a_full_queue_says_when_to_come_back(client, engine, gate, monkeypatch):
    monkeypatch.setattr(engine, "limits", dataclasses.replace(engine.limits, queue=2))
    with gate.shut():
        jobs = []
        while (answer := ask(client, asynchronous=True)).status_code == 202:
            jobs.append(answer.json()["id"])
            assert len(jobs) < 10
        failed(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        for job in jobs:
            client.delete(f"/v1/jobs/{job}")


def test_a_client_that_leaves_cancels(client, engine, gate):
    before = {job.id for job in engine.jobs()}
    with gate.shut():
        with pytest.raises(Exception, match="timed out"):
            client.post("/v1/audio/generate", json={"input": "x", "seconds": SECONDS}, timeout=0.5)
        (job,) = (job for job in engine.jobs() if job.id not in before)
        assert job.wait(300) and job.state == "cancelled"


def test_the_same_idempotency_key_is_the_same_job(client, engine, gate):
    headers = {"Idempotency-Key": "one"}
    answers = [ask(client, headers=headers) for _ in range(2)]
    assert answers[0].headers["x-job-id"] == answers[1].headers["x-job-id"]
    failed(ask(client, headers=headers, seed=8), 409, "idempotency_conflict")
    headers = {"Idempotency-Key": "two"}
    with gate.shut():  # one that was cancelled is made after all
        job = ask(client, headers=headers, asynchronous=True).json()["id"]
        again = ask(client, headers=headers, asynchronous=True).json()["id"]
        engine.cancel(engine.job(job))
    anew = ask(client, headers=headers, asynchronous=True).json()["id"]
    assert job == again != anew and engine.job(anew).wait(300)


def test_what_the_server_tells_of_itself(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    (about,) = client.get("/v1/models").json()["data"]
    assert about["id"] == "tiny" and "inpaint" in about["makes"]
    stats = client.get("/v1/stats").json()
    assert stats["done"] > 0 and stats["clips"] >= stats["done"]
    metrics = client.get("/metrics").text
    assert f'magnet_jax_jobs_total{{state="done"}} {stats["done"]}' in metrics


def test_the_description_that_is_kept_is_the_one_that_is_served(client):
    """python -m launch.make.openapi writes it anew."""
    assert openapi.OUT.read_text(encoding="utf-8") == openapi.description()
    assert client.get("/openapi.json").json() == json.loads(openapi.description())


def test_threads_ask_at_once(client):
    """Concurrent requests of several settings are all answered, each with its own clip."""
    found, alone = {}, {}

    def one(seed):
        found[seed] = ask(client, seed=seed, temperature=1.0 + seed).content

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 5):
        alone[seed] = ask(client, seed=seed, temperature=1.0 + seed).content
        assert found[seed] == alone[seed]
    assert len(set(found.values())) == 6


def test_pages_elsewhere_and_other_hosts_may_not_ask(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1", ""):
        failed(client.get("/v1/jobs", headers={"Host": host}), 403, "forbidden_host")
    for origin in ("https://evil.example", "null", f"{client.base_url}x"):
        answer = ask(client, headers={"Origin": origin})
        failed(answer, 403, "forbidden_origin")
        assert "access-control-allow-origin" not in answer.headers
        upload = client.post("/v1/files", files={"file": b"x"}, headers={"Origin": origin})
        failed(upload, 403, "forbidden_origin")
    assert client.get("/health", headers={"Host": "10.0.0.3"}).status_code == 200
    own = str(client.base_url).rstrip("/")
    assert ask(client, headers={"Origin": own}).status_code == 200


def test_an_open_server_is_asked_by_an_address():
    """A page elsewhere that rebinds a name of its own is refused; a probe is not."""
    access = Access(hosts=None)
    for host in ("10.0.0.3:7860", "[fe80::1]:80", "localhost:1"):
        access.check_source("GET", Headers({"host": host}))
    for host in ("evil.example", "10.0.0.3.evil.example", ""):
        with pytest.raises(RequestError, match="not called"):
            access.check_source("GET", Headers({"host": host}))
        Access(hosts=None, keys=("k" * 16,)).check_source("GET", Headers({"host": host}))


def test_keys_and_what_they_may_see(engine, listening):
    access = Access(keys=("k" * 16, "m" * 16), hosts=None, origins=("https://ours.example",))
    with listening(engine, access) as url, httpx.Client(base_url=url, timeout=300) as client:
        failed(ask(client), 401, "invalid_api_key")
        failed(ask(client, headers={"Authorization": "Bearer no"}), 401)
        failed(ask(client, headers={"Authorization": "Basic %%%"}), 401)
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        mine, other = ({"Authorization": f"Bearer {key}"} for key in access.keys)
        answer = ask(client, headers=mine | {"Origin": "https://ours.example"})
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        path = f"/v1/jobs/{answer.headers['x-job-id']}"
        assert client.get(path, headers=mine).status_code == 200
        failed(client.get(path, headers=other), 404)
        failed(client.delete(path, headers=other), 404)
        assert client.get("/v1/jobs", headers=other).json()["data"] == []
        assert client.get(path, auth=("anybody", access.keys[0])).status_code == 200
        failed(client.post("/v1/files", files={"file": b"x"}, headers=mine), 501)
