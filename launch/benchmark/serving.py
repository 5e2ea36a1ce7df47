"""A server under load: its clips in a time against batches without it, and single requests."""

import contextlib
import dataclasses
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import uvicorn

from launch.benchmark.options import Serving, balanced
from launch.serve.__main__ import Args, open_engine
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.serving import http as serving_http
from magnet_jax.serving.access import Access
from magnet_jax.serving.limits import Limits

if TYPE_CHECKING:
    from magnet_jax.serving.engine import Engine

TEXTS = ("a calm harp", "a slow waltz on the piano", "a lively fiddle tune", "an organ chorale")


@contextlib.contextmanager
def _served(engine: "Engine") -> Iterator[int]:
    """The port of a server in this process."""
    config = uvicorn.Config(serving_http.create_app(engine, Access()), port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def _ask(port: int, args: Serving, seed: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    fields = {"input": TEXTS[seed % len(TEXTS)], "seconds": args.seconds, "seed": seed}
    body = json.dumps(fields | {"steps": args.steps, "lufs": None})
    connection.request("POST", "/v1/audio/generate", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise UserError(f"a request failed: {content[:200]!r}")


def _batches(engine: "Engine", args: Serving, size: int) -> None:
    """The clips in batches, without a server; of one number of steps, as they are served."""
    model = engine.model
    decoding = dataclasses.replace(model.loaded.config.decode, steps=args.steps)
    for first in range(0, args.requests, size):
        seeds = range(first, min(first + size, args.requests))
        sampling.generate(
            model.loaded, [TEXTS[seed % len(TEXTS)] for seed in seeds],
            num_frames=round(args.seconds * model.frame_rate), decoding=decoding, seed=list(seeds),
            first_sample=[0] * len(seeds), decoder=model.decoder, execution=model.execution,
        )  # fmt: skip


def _timed(way: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of all this process's CPUs."""
    began = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def measure(args: Serving) -> None:
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(max_batch=args.concurrency, queue=1000, queue_per_client=1000)
        serve = Args(checkpoint=args.checkpoint, folder=Path(folder), warm="none", limits=limits)
        engine = open_engine(serve)
        steps = balanced(args.steps, engine.model.loaded.config.decode)
        args = dataclasses.replace(args, steps=steps)
        with engine, _served(engine) as port, ThreadPoolExecutor(args.concurrency) as pool:
            engine.warmed.wait()

            def at_once() -> None:
                list(pool.map(lambda seed: _ask(port, args, seed), range(args.requests)))

            def one_by_one() -> None:
                for seed in range(args.requests):
                    _ask(port, args, seed)

            ways = {
                f"served, {args.concurrency} requests at a time": at_once,
                "served, one request at a time": one_by_one,
                f"batches of {args.concurrency}, no server": lambda: _batches(
                    engine, args, args.concurrency
                ),
                "one clip at a time, no server": lambda: _batches(engine, args, 1),
            }
            for way in ways.values():  # compiles
                way()
            before = engine.stats()
            found = {name: [] for name in ways}
            for _ in range(args.repeats):
                for name, way in ways.items():
                    found[name].append(_timed(way))
            _report(args, found, before, engine.stats())


def _report(args: Serving, found: dict, before: dict, after: dict) -> None:
    print(f"{args.requests} clips of {args.seconds:g} s, steps {args.steps}; medians")
    print(f"{'':40} clips/min   CPU s a clip")
    medians = {name: np.median(taken, 0) / args.requests for name, taken in found.items()}
    for name, (wall, cpu) in medians.items():
        print(f"{name:40} {60 / wall:9.1f} {cpu:14.3f}")
    served, single, batched, _ = medians.values()
    for what, other in (("batches without it", batched), ("one request at a time", single)):
        print(
            f"the server against {what}: {other[0] / served[0]:.2f} by the clock, "
            f"{other[1] / served[1]:.2f} by CPU seconds"
        )
    clips, batches = (after[n] - before[n] for n in ("clips", "batches"))
    print(f"clips a batch, of both served ways: {clips / batches:.2f}")
