"""One engine and one server of the smallest model, for all tests of serving."""

import contextlib
import threading

import httpx
import pytest
import uvicorn
from tiny import loaded_model

from launch.serve.uploads import Reader
from magnet_jax.api import MAGNeT
from magnet_jax.codec import encodec
from magnet_jax.decode import placement
from magnet_jax.serving import http
from magnet_jax.serving.access import Access
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.limits import Limits
from magnet_jax.serving.store import Store

OPEN = Access()


@pytest.fixture(scope="session")
def model():
    loaded = loaded_model(steps=(6, 2, 1, 1))
    return MAGNeT(loaded, encodec.load_decoder("embedded"), placement.Execution())


@contextlib.contextmanager
def started(model, folder, **changes):
    """An engine, ready."""
    many = {"max_batch": 4, "queue": 100, "queue_per_client": 100, "job_seconds": 600.0}
    limits = Limits(**many | changes)
    keep = {"keep_seconds": limits.keep_seconds, "keep_bytes": limits.keep_mb * 1e6}
    with Engine(model, Store(folder, **keep), limits, name="tiny") as engine:
        engine.warmed.wait()
        yield engine


@contextlib.contextmanager
def listening(engine, access=OPEN, read=None, *, page=False):
    """The address of a server."""
    app = http.create_app(engine, access, read, page=page)
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session", name="listening")
def _listening():
    return listening


@pytest.fixture(scope="session", name="started")
def _started():
    return started


@pytest.fixture(scope="session")
def engine(model, tmp_path_factory):
    with started(model, tmp_path_factory.mktemp("served")) as engine:
        yield engine


@pytest.fixture(scope="session")
def client(engine):
    reader = Reader()
    with listening(engine, read=reader) as url, httpx.Client(base_url=url, timeout=300) as client:
        yield client
    reader.close()


@pytest.fixture
def gate(engine, monkeypatch):
    """The device thread waits before its next batch while the gate is shut."""
    passing = threading.Event()
    passing.set()
    run = engine._run

    def waiting(batch):
        passing.wait()
        run(batch)

    class Gate:
        @contextlib.contextmanager
        def shut(self):
            passing.clear()
            try:
                yield
            finally:
                passing.set()

    monkeypatch.setattr(engine, "_run", waiting)
    return Gate()
