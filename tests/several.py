"""Runs in several processes, each of which has one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from constants import EIGHT

from magnet_jax.train import watch

SCRIPT = """
import sys
from pathlib import Path
from magnet_jax import errors
from magnet_jax.config import RunConfig, from_json
from magnet_jax.train import loop
with errors.reported():
    loop.train(from_json(RunConfig, Path(sys.argv[1])))
"""


def drawn() -> np.random.Generator:
    """Gives the moments of signals: others each time, or those of MAGNET_JAX_TEST_SEED."""
    seed = int(os.environ.get("MAGNET_JAX_TEST_SEED") or int.from_bytes(os.urandom(4)))
    print("moments of signals: MAGNET_JAX_TEST_SEED =", seed)
    return np.random.default_rng(seed)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def begin(file: Path, count: int) -> list[subprocess.Popen]:
    """Starts a run in `count` processes with a device each; what they say goes to a file each."""
    port = free_port()
    processes = []
    for index in range(count):
        environ = {
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(EIGHT, ""),  # compiled as here
            "MAGNET_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "MAGNET_JAX_PROCESS_ID": str(index),
            "MAGNET_JAX_NUM_PROCESSES": str(count),
        }
        with (file.parent / f"log_{index}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, str(file)],
                    stdout=log,
                    stderr=log,
                    env=os.environ | environ,
                )
            )
    return processes


def finish(processes: list[subprocess.Popen], folder: Path) -> list[int]:
    """Their exit statuses, and an end to those that hang."""
    try:
        return [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log_*")))
        raise AssertionError(f"a process hangs:\n{logs}") from None
    finally:
        for process in processes:
            process.kill()


def losses(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["train/loss"] for line in watch.read_scalars(run) if "train/loss" in line
    }
