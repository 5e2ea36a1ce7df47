"""Several processes as one program: joining them, and agreeing.

One process is the rule and needs nothing of this: `start` does nothing then, and the helpers
answer at once. JAX finds out who the processes of Slurm, Open MPI, Kubernetes and TPU pods are.
Elsewhere three variables or one option say it:

    MAGNET_JAX_COORDINATOR=HOST:PORT MAGNET_JAX_PROCESS_ID=I MAGNET_JAX_NUM_PROCESSES=N
    --distributed HOST:PORT,I,N

Where JAX knows the cluster, MAGNET_JAX_COORDINATOR alone replaces the address that it found. Of
several GPUs on a host JAX gives each process of Slurm and Open MPI the one of its number, or those
that JAX_LOCAL_DEVICE_IDS lists.
"""

import functools
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # nothing public tells who is there without joining
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from magnet_jax.errors import UserError

COORDINATOR = "MAGNET_JAX_COORDINATOR"
PROCESS_ID = "MAGNET_JAX_PROCESS_ID"
NUM_PROCESSES = "MAGNET_JAX_NUM_PROCESSES"
TIMEOUT = "MAGNET_JAX_TIMEOUT"  # seconds that processes wait for each other at the start
ALONE = "--distributed off runs alone"


class Start(NamedTuple):
    """One process among several."""

    coordinator: str  # HOST:PORT of process 0
    index: int
    count: int
    local_devices: Sequence[int] | None = None  # GPUs of this process; None: all that it sees


def _integer(text: str, what: str) -> int:
    if not re.fullmatch(r"\d+", text.strip()):
        raise UserError(f"{what} is {text!r}, not a whole number")
    return int(text)


def _told(what: str, coordinator: str, index: str, count: str) -> Start | None:
    """A start that somebody typed, None of one process; `UserError` for what cannot be."""
    start = Start(
        coordinator.strip(),
        _integer(index, f"{what}: the process's index"),
        _integer(count, f"{what}: the number of processes"),
    )
    if not re.fullmatch(r".+:\d{1,5}", start.coordinator):
        raise UserError(f"{what}: the coordinator {coordinator!r} is not HOST:PORT")
    if start.index >= start.count:
        raise UserError(f"{what}: of {start.count} processes there is none of index {start.index}")
    return start if start.count > 1 else None


def find(given: str | None, timeout: int) -> Start | None:
    """Who this process is among several; None where it is alone.

    `given` is the option --distributed: 'auto' (or None), 'off', or 'HOST:PORT,INDEX,COUNT'. JAX
    may wait `timeout` seconds for a coordinator's name to be known.

    Raises `UserError` where the option or a variable is malformed or missing, or JAX cannot learn
    who is there.
    """
    if given == "off":
        return None
    if given not in (None, "auto"):
        if given.count(",") != 2:
            raise UserError(f"--distributed {given}: give auto, off, or HOST:PORT,INDEX,COUNT")
        return _told(f"--distributed {given}", *given.split(","))
    coordinator, *numbers = map(os.environ.get, (COORDINATOR, PROCESS_ID, NUM_PROCESSES))
    if numbers != [None, None]:
        if None in (coordinator, *numbers):
            raise UserError(
                f"{COORDINATOR}, {PROCESS_ID} and {NUM_PROCESSES} go together: set all three; "
                f"{ALONE}"
            )
        return _told(f"{COORDINATOR}, {PROCESS_ID}, {NUM_PROCESSES}", coordinator, *numbers)
    devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, None, None, devices and [*map(int, devices.split(","))], None, timeout
        )
    except Exception as error:  # a variable, a package, a server or a name that is not there
        raise UserError(
            f"JAX cannot learn who the processes of this cluster are ({_line(error)}): set "
            f"{COORDINATOR}, {PROCESS_ID} and {NUM_PROCESSES}; {ALONE}"
        ) from error
    if coordinator and count is None:
        raise UserError(
            f"{COORDINATOR} is set, but JAX finds no cluster here: set {PROCESS_ID} and "
            f"{NUM_PROCESSES} as well; {ALONE}"
        )
    return Start(address, index, count, devices) if count and count > 1 else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_port(start: Start) -> None:
    """Raises `UserError` where process 0 cannot listen: JAX may crash on that."""
    port = int(start.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if dual else (socket.AF_INET, "0.0.0.0")
    try:
        # Sets SO_REUSEADDR, as connections that ended lately are no obstacle.
        socket.create_server((address, port), family=family, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 of {start.count} cannot listen at {start.coordinator} "
            f"({_line(error)}): {COORDINATOR} sets another address, for all processes; {ALONE}"
        ) from None


def _give_up(start: Start, seconds: int) -> None:
    """Ends the process: it waits inside JAX, which would end it with a trace of C++."""
    print(
        f"error: process {start.index} of {start.count}: not all came together at "
        f"{start.coordinator} in {seconds} s: is process 0 running there, and may hosts reach each "
        f"other on that port? {TIMEOUT} sets the seconds; {ALONE}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def start(
    given: str | None = None, say: Callable[[str], None] = print, *, timeout: int | None = None
) -> None:
    """Joins the processes that run this program, if there are several; to be called first of all.

    Nothing may have touched a device before. Does nothing alone, or when called again. `given` is
    the option --distributed; `say` gets one line where there are several processes; `timeout` is
    seconds to wait for the others, by default MAGNET_JAX_TIMEOUT, or 300.

    Raises `UserError` for malformed settings, or a coordinator that cannot listen. Where some
    process never comes, this one ends with such a line and status 2.
    """
    if jax.distributed.is_initialized():
        return
    if timeout is None:
        timeout = _integer(os.environ.get(TIMEOUT, "300"), TIMEOUT)
    found = find(given, timeout)
    if found is None:
        return
    say(f"process {found.index} of {found.count}, coordinator {found.coordinator}")
    if found.index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(found)
    watch = threading.Timer(timeout, _give_up, (found, timeout))
    watch.daemon = True
    watch.start()
    try:
        # JAX waits longer than the watch, whose line is the better one. Processes that end without
        # the others (an error of one of them) are not waited for as long as JAX would. All is
        # known, so JAX need not look for a cluster again.
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            local_device_ids=found.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {found.index} of {found.count} cannot join at {found.coordinator} "
            f"({_line(error)}); {ALONE}"
        ) from error
    finally:
        watch.cancel()


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def say_first(text: str) -> None:
    """Prints a line, once for all processes and above any progress bar."""
    if is_first():
        tqdm.write(text)


def broadcast_json(value: Any) -> Any:
    """Process 0's value in every process, as JSON gives it back; the others' is ignored."""
    text = json.dumps(value if is_first() else None).encode()
    if jax.process_count() > 1:
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        # Everyone must know the size beforehand; in blocks, not to compile for every length.
        block = np.zeros(-(-size // 4096) * 4096, np.uint8)
        if is_first():
            block[:size] = np.frombuffer(text, np.uint8)
        text = bytes(multihost_utils.broadcast_one_to_all(block)[:size])
    return json.loads(text)


def first_does(what: Callable[[], None]) -> None:
    """Process 0 alone does it, and the others wait; where it fails all raise the `UserError`."""
    failure = problem = None
    if is_first():
        try:
            what()
        except UserError as error:
            failure, problem = error, str(error)
        except OSError as error:  # a full disk, a folder of someone else's
            problem = f"{error.filename or 'cannot write'}: {error.strerror}"
    if (problem := broadcast_json(problem)) is not None:
        raise failure or UserError(problem)


def first_tells(what: Callable[[], Any]) -> Any:
    """What it gives in process 0, as JSON gives it back; fails as `first_does` does."""
    told = []
    first_does(lambda: told.append(what()))
    return broadcast_json(told[0] if told else None)


def all_do(what: Callable[[], Any]) -> Any:
    """What it gives here; where it raises in any process, all end."""
    result, problem = None, None
    try:
        result = what()
    except Exception as error:  # whatever it is: the others must not wait
        problem = error
    failed = agree(problem is not None)
    if problem is not None:
        raise problem
    if failed:
        raise UserError("another process cannot begin; its own line says why")
    return result


def check_shared(folder: Path, patience: float = 10.0) -> None:
    """Raises `UserError`, in all processes, where they do not all see the same folder.

    The first process must be able to write to it. A file system may take `patience` seconds to show
    a file to all.
    """

    def leave() -> str:
        handle, name = tempfile.mkstemp(prefix=".seen_by_all_", dir=folder)
        os.close(handle)
        return Path(name).name

    name = first_tells(leave)

    def look() -> None:
        deadline = time.monotonic() + patience
        while not (folder / name).exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: process {jax.process_index()} has another folder of this name "
                    "than process 0; --out must be on a file system that all hosts share, or in "
                    "a bucket"
                )
            time.sleep(0.1)

    try:
        all_do(look)
    finally:
        if is_first():
            (folder / name).unlink()


@functools.cache
def _voting() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    return NamedSharding(mesh, P("all")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def vote(flag: bool) -> jax.Array | np.bool_:
    """As `agree`, but a scalar that need not be there yet: `bool` of it waits.

    All devices take part, after what they were given before. A loop that reads each vote one step
    later never waits for its devices.
    """
    if jax.process_count() == 1:
        return np.bool_(flag)
    sharding, any_of = _voting()
    mine = np.full(jax.local_device_count(), flag)
    return any_of(jax.make_array_from_process_local_data(sharding, mine))


def agree(flag: bool) -> bool:
    """Whether any process says True: the same answer for all, who must all ask."""
    return bool(vote(flag))
