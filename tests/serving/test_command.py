"""The server as a process, in a container and in a cluster; load."""

import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from tiny import finished_run

from launch.serve import __main__ as serve
from magnet_jax.errors import UserError

ROOT = Path(__file__).parents[2]
CLIP = {"input": "a calm harp", "seconds": 0.6, "seed": 1}


def test_a_server_is_not_open_by_mistake(tmp_path, monkeypatch):
    def access(*words):
        return serve.access_of(serve.parse(["--checkpoint", "demo", *words]))

    assert access().hosts == ("localhost", "127.0.0.1", "::1") and access().keys == ()
    with pytest.raises(UserError, match="--api-key-file"):
        access("--host", "0.0.0.0")
    assert access("--host", "0.0.0.0", "--open").hosts is None
    (tmp_path / "keys").write_text("# mine\n" + "k" * 20 + "\n\n" + "m" * 20 + "\n")
    keys = ("--api-key-file", str(tmp_path / "keys"))
    assert access("--host", "0.0.0.0", *keys).keys == ("k" * 20, "m" * 20)
    (tmp_path / "keys").write_text("short\n")
    for path in (tmp_path / "keys", tmp_path / "none"):
        with pytest.raises(UserError, match="--api-key-file"):
            access("--api-key-file", str(path))
    monkeypatch.setenv("MAGNET_JAX_API_KEY", " short ")
    with pytest.raises(UserError, match="MAGNET_JAX_API_KEY: a key needs 16 characters"):
        access()
    monkeypatch.setenv("MAGNET_JAX_API_KEY", "e" * 20 + "\n")
    assert access("--host", "0.0.0.0").keys == ("e" * 20,)
    assert "page.example" in access("--allow-host", "page.example").hosts


def test_a_port_that_is_taken_is_said_at_once():
    with serve.bound(serve.parse(["--checkpoint", "demo", "--port", "0"])) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened at"):
            serve.bound(serve.parse(["--checkpoint", "demo", "--port", port]))


def test_what_is_to_be_warm(monkeypatch):
    def warm(*words):
        return serve.warm_of(serve.parse(["--checkpoint", "demo", *words]), 10.0)

    assert warm("--warm", "5:1,3") == ((5.0, 1), (5.0, 4)) and warm("--warm", "none") == ()
    assert warm("--limits.max-batch", "6") == ((10.0, 1),)  # on a CPU
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert warm("--limits.max-batch", "6") == ((10.0, 1), (10.0, 2), (10.0, 4), (10.0, 8))
    with pytest.raises(UserError, match="--warm x"):
        warm("--warm", "x")


def test_a_process_serves_and_ends_what_was_begun(tmp_path_factory, tmp_path):
    """SIGTERM: no new job, those that were begun are done, exit status 0."""
    command = [
        sys.executable, "-m", "launch.serve", "--checkpoint", str(finished_run(tmp_path_factory)),
        "--port", "0", "--folder", str(tmp_path / "served"), "--warm", "0.6:1", "--no-page",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next(found[1] for line in lines if (found := re.match(r"ready: (http\S+)", line)))
        with httpx.Client(base_url=url, timeout=120) as client:
            jobs = [
                client.post("/v1/audio/generate", json=CLIP | {"async": True, "seed": seed}).json()
                for seed in range(3)
            ]
            waiting = [
                threading.Thread(target=client.get, args=(f"/v1/jobs/{job['id']}?wait=60",))
                for job in jobs
            ]
            for thread in waiting:
                thread.start()
            process.send_signal(signal.SIGTERM)
            for thread in waiting:
                thread.join()
        rest = process.communicate(timeout=120)[0]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
        made = {path.parent.name for path in (tmp_path / "served" / "jobs").glob("*/0.wav")}
        assert made == {job["id"] for job in jobs}
    finally:
        process.kill()


def test_fifty_requests_ten_at_a_time(client, engine):
    """None fails, and they share batches: two at least of three of a batch's rows are clips."""
    before = engine.stats()

    def ask(seed):
        return client.post("/v1/audio/generate", json=CLIP | {"seed": seed, "guidance": seed % 5})

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 50
    after = engine.stats()
    batches = after["batches"] - before["batches"]
    assert 50 / batches >= 2 / 3 * engine.limits.max_batch


def test_the_deployment_is_kubernetes_and_starts_the_command(monkeypatch):
    text = (ROOT / "launch" / "cluster" / "serve_deployment.yaml").read_text(encoding="utf-8")
    names = re.search(r"envsubst '([^']*)'", text)[1].replace("$", "").split()
    values = dict.fromkeys(names, "2") | {"MODEL": "demo", "NAME": "magnet", "IMAGE": "r/magnet"}
    deployment, service = yaml.safe_load_all(string.Template(text).safe_substitute(values))
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(names)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-u", "-m", "launch.serve"]
    args = serve.parse(container["args"])
    assert args.host == "0.0.0.0" and args.checkpoint == "demo"
    (port,) = container["ports"]
    assert port["containerPort"] == args.port
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert pod["spec"]["terminationGracePeriodSeconds"] > args.drain_seconds
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_container_starts_the_command():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    words = re.findall(r'"([^"]*)"', lines.partition("\nCMD ")[2])
    assert words[:4] == ["python", "-u", "-m", "launch.serve"]
    assert set(serve.access_of(serve.parse(words[4:])).hosts) == {"localhost", "127.0.0.1", "::1"}
    for source in re.findall(r"(?m)^COPY (.*) \S+$", lines):
        for name in source.split():
            assert (ROOT / name).exists()
            assert f"!{name}\n" in (ROOT / ".dockerignore").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here")
def test_the_container_file_is_well_written():
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True, env=os.environ)
