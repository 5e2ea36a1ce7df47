"""Two replicas under Ray Serve, on this machine."""

import os
import socket

import httpx
import pytest
from tiny import finished_run

from magnet_jax.errors import UserError

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[ray]'")

CLIP = {"input": "a calm harp", "seconds": 0.6, "seed": 1}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    import ray
    from ray import serve

    from launch.serve import on_ray

    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"checkpoint": finished_run(tmp_path_factory), "folder": folder, "warm": "none"}
        application = on_ray.build(
            {**options, "min_replicas": "2", "max_replicas": "2", "cpus": "0.5"}
        )
        serve.run(application)
        status = serve.status()
        assert status.applications["default"].status == "RUNNING"
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_share_requests_and_find_each_others_clips(address):
    with httpx.Client(base_url=address, timeout=300) as client:
        processes = {}
        for number in range(40):
            session = {"X-Session-Id": f"session {number}"}
            process = client.get("/v1/stats", headers=session).json()["process"]
            processes.setdefault(process, session)
            # A session stays where it is.
            assert client.get("/v1/stats", headers=session).json()["process"] == process
            if len(processes) == 2:
                break
        (one, other) = processes.values()
        assert os.getpid() not in processes
        sessions = one, other
        answers = [client.post("/v1/audio/generate", json=CLIP, headers=s) for s in sessions]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        path = f"/v1/jobs/{answers[0].headers['x-job-id']}"
        for session in sessions:
            assert client.get(path, headers=session).json()["state"] == "done"
            audio = client.get(f"{path}/audio/0", headers=session)
            assert audio.content == answers[0].content
        wrong = client.post("/v1/audio/generate", json={"tempo": 3})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tempo"


def test_options_that_are_wrong_are_said_before_anything_starts():
    from launch.serve import on_ray

    for options, message in (
        ({"checkpoint": "demo"}, "folder"),
        ({"checkpoint": "demo", "folder": "x", "replicas": "2"}, "replicas"),
        ({"checkpoint": "demo", "folder": "x", "cpus": "-1"}, "cpus"),
    ):
        with pytest.raises(UserError, match=message):
            on_ray.build(options)
