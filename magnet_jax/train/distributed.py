"""Several processes as one program: finding out who they are, joining them, and agreeing.

One process is the rule and needs nothing of this: `start` does nothing then, and the helpers
answer at once. What launched several processes is read from the environment; where it says
nothing, three variables or one option say it:

    MAGNET_JAX_COORDINATOR=HOST:PORT MAGNET_JAX_PROCESS_ID=I MAGNET_JAX_NUM_PROCESSES=N
    --distributed HOST:PORT,I,N

Where the cluster is known, MAGNET_JAX_COORDINATOR alone replaces the address that was found.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from magnet_jax.errors import UserError

COORDINATOR = "MAGNET_JAX_COORDINATOR"
PROCESS_ID = "MAGNET_JAX_PROCESS_ID"
NUM_PROCESSES = "MAGNET_JAX_NUM_PROCESSES"
TIMEOUT = "MAGNET_JAX_TIMEOUT"  # seconds that processes wait for each other at the start
PORT = 12345  # of the coordinator, where nothing makes another one likelier to be free


class Start(NamedTuple):
    """One process among several."""

    kind: str  # for people: what it was found by
    coordinator: str | None  # HOST:PORT of process 0; None: JAX finds all of it
    index: int | None
    count: int | None
    local_devices: tuple[int, ...] | None  # GPUs of this process; None: all that it sees


def _integer(text: str, what: str) -> int:
    if not re.fullmatch(r"\d+", text.strip()):
        raise UserError(f"{what} is {text!r}, not a whole number")
    return int(text)


def _read(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise UserError(
            f"{name} is not set, and without it several processes cannot find each other: set "
            f"{COORDINATOR}, {PROCESS_ID} and {NUM_PROCESSES}, or give --distributed off to run "
            "alone"
        )
    return _integer(environ[name], name)


def _checked(start: Start, what: str) -> Start | None:
    """The start, or None where it is the only process; raises `UserError` for what cannot be."""
    host, _, port = start.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"{what}: the coordinator {start.coordinator!r} is not HOST:PORT")
    if start.count < 1:
        raise UserError(f"{what}: {start.count} processes, there must be at least one")
    if start.index >= start.count:
        raise UserError(
            f"{what}: process {start.index} of {start.count}; they are counted from 0 to "
            f"{start.count - 1}"
        )
    return start if start.count > 1 else None


def _from_option(given: str) -> Start | None:
    parts = given.split(",")
    if len(parts) != 3:
        raise UserError(f"--distributed {given}: give auto, off, or HOST:PORT,INDEX,COUNT")
    index, count = (
        _integer(part, f"--distributed {given}: its {name}")
        for part, name in zip(parts[1:], ("index", "count"))
    )
    return _checked(
        Start("--distributed", parts[0].strip(), index, count, None), f"--distributed {given}"
    )


def _share_of_gpus(
    environ: Mapping[str, str], local: int, on_host: int
) -> tuple[str, tuple[int, ...] | None]:
    """How the processes of one host share its GPUs: in words, and the GPUs of process `local`."""
    if on_host == 1:
        return "one per node", None
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
    if visible is not None:
        gpus = len([gpu for gpu in visible.split(",") if gpu.strip()])
    elif "SLURM_GPUS_ON_NODE" in environ:
        gpus = _read(environ, "SLURM_GPUS_ON_NODE")
    else:
        gpus = on_host
    if gpus == 0:  # JAX on CPU: each process has its own
        return f"{on_host} per node", None
    if gpus == 1:  # as by --gpus-per-task=1: each process sees one, and it is its own
        return "one per GPU", None
    if gpus % on_host:
        raise UserError(
            f"{on_host} processes on this host cannot share its {gpus} GPUs evenly: start one a "
            "host or one a GPU"
        )
    share = gpus // on_host
    how = "one per GPU" if share == 1 else f"one per {share} GPUs"
    return how, tuple(range(local * share, (local + 1) * share))


def _first_host(nodes: str) -> str:
    """The first name of a Slurm list: n01 of 'n01', 'n01,n02', 'n[01-04,07]' and 'n[01,03],m1'."""
    match = re.fullmatch(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?(?:,.*)?", nodes)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r} is not understood: set {COORDINATOR}")
    return "".join(part or "" for part in match.groups())


def _from_variables(environ: Mapping[str, str]) -> Start | None:
    count = _read(environ, NUM_PROCESSES)
    if count == 1:
        return None
    index = _read(environ, PROCESS_ID)
    if COORDINATOR not in environ:
        raise UserError(f"{PROCESS_ID} is set and {COORDINATOR} is not: set it to HOST:PORT")
    return _checked(Start(PROCESS_ID, environ[COORDINATOR], index, count, None), PROCESS_ID)


def _likely_free_port(job: int) -> int:
    """Another port for every job, so that two on one host do not meet; JAX takes the same."""
    return 2**16 - 2**12 + job % 2**12


def _from_open_mpi(environ: Mapping[str, str]) -> Start | None:
    count = _read(environ, "OMPI_COMM_WORLD_SIZE")
    if count == 1:
        return None
    coordinator = environ.get(COORDINATOR)
    if coordinator is None:
        # Only Open MPI up to 4 says where mpirun runs, and process 0 with it.
        match = re.match(
            r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))",
            environ.get("OMPI_MCA_orte_hnp_uri", ""),
        )
        if not match:
            raise UserError(
                f"Open MPI started {count} processes but does not say where the first one is: "
                f"set {COORDINATOR}=HOST:PORT (mpirun -x {COORDINATOR}=...)"
            )
        host = match[2] or f"[{match[3]}]"
        coordinator = f"{host}:{_likely_free_port(int(match[1]) // 2**12)}"
    how, devices = _share_of_gpus(
        environ,
        _read(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        _read(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
    )
    index = _read(environ, "OMPI_COMM_WORLD_RANK")
    return _checked(Start(f"Open MPI, {how}", coordinator, index, count, devices), "Open MPI")


def _from_slurm(environ: Mapping[str, str]) -> Start | None:
    # Of the step, not of the job: an editor's or an ssh shell on a node, and the batch script
    # itself, carry the job's variables and are one process.
    count = _read(environ, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    # 8(x2),4: eight processes on the first two hosts, four on the third.
    per_host = [
        _integer(number, "SLURM_STEP_TASKS_PER_NODE")
        for number, times in re.findall(
            r"([^,()]+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
        )
        for _ in range(int(times or 1))
    ]
    node = _integer(environ.get("SLURM_NODEID", "0"), "SLURM_NODEID")
    on_host = per_host[node] if node < len(per_host) else per_host[0]
    how, devices = _share_of_gpus(environ, _read(environ, "SLURM_LOCALID"), on_host)
    coordinator = environ.get(COORDINATOR)
    if coordinator is None:
        host = _first_host(environ["SLURM_STEP_NODELIST"])
        coordinator = f"{host}:{_likely_free_port(_read(environ, 'SLURM_JOB_ID'))}"
    index = _read(environ, "SLURM_PROCID")
    return _checked(Start(f"Slurm, {how}", coordinator, index, count, devices), "Slurm")


def _from_kubernetes(environ: Mapping[str, str]) -> Start | None:
    # No pod is told how many there are: launch/cluster/gke_jobset.yaml tells it.
    count = _read(environ, NUM_PROCESSES)
    if count == 1:
        return None
    kind, coordinator = "Kubernetes, an indexed job", environ.get(COORDINATOR)
    if "JOBSET_NAME" in environ:
        kind = "Kubernetes, a JobSet"
    if coordinator is None:
        if not ("JOBSET_NAME" in environ and "REPLICATED_JOB_NAME" in environ):
            raise UserError(
                f"Kubernetes started {count} pods but does not say where the first one is: set "
                f"{COORDINATOR}=HOST:PORT, or JOBSET_NAME and REPLICATED_JOB_NAME"
            )
        jobset, job = environ["JOBSET_NAME"], environ["REPLICATED_JOB_NAME"]
        coordinator = f"{jobset}-{job}-0-0.{jobset}:{PORT}"
    index = _read(environ, "JOB_COMPLETION_INDEX")
    return _checked(Start(kind, coordinator, index, count, None), "Kubernetes")


def _from_tpu(environ: Mapping[str, str]) -> Start | None:
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    if workers is not None and len(workers.split(",")) * slices == 1:
        return None
    # A TPU VM outside Kubernetes learns from its metadata server who and how many there are; JAX
    # asks it, and is content with one.
    return Start("TPU pod", None, None, None, None)


def detect(environ: Mapping[str, str], given: str | None = None) -> Start | None:
    """What this process is among several, from its environment; None where it is alone.

    Args:
      environ: environment variables, as they are once `jax` has been imported: on a TPU VM that
        sets TPU_ML_PLATFORM.
      given: the option --distributed: 'auto' (or None), 'off', or 'HOST:PORT,INDEX,COUNT'.

    Raises:
      UserError: the option or a variable is malformed, missing or contradicts the others.
    """
    if given == "off":
        return None
    if given not in (None, "auto"):
        return _from_option(given)
    if PROCESS_ID in environ:
        return _from_variables(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _from_open_mpi(environ)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_STEP_NODELIST" in environ:
        return _from_slurm(environ)
    platforms = environ.get("JAX_PLATFORMS", "")
    if environ.get("TPU_ML_PLATFORM") == "JAX" and (not platforms or "tpu" in platforms):
        return _from_tpu(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        return _from_kubernetes(environ)
    if NUM_PROCESSES in environ or COORDINATOR in environ:
        return _from_variables(environ)
    return None


def _wait_for_coordinator(start: Start, seconds: float) -> None:
    """Raises `UserError` where nothing answers in time: JAX would end the process with a trace."""
    host, _, port = start.coordinator.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:  # no such name yet, nobody listens yet, no way there
            if time.monotonic() > until:
                raise UserError(
                    f"process {start.index} of {start.count} by {start.kind}: no answer from the "
                    f"coordinator {start.coordinator} in {seconds:g} s ({error}): is process 0 "
                    f"running, and may hosts reach each other on that port? {TIMEOUT} sets the "
                    "seconds, --distributed off runs alone"
                ) from None
        time.sleep(min(0.5, seconds / 10))


def _check_port(start: Start) -> None:
    """Raises `UserError` where process 0 cannot listen: JAX may crash on that."""
    port = int(start.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if dual else (socket.AF_INET, "0.0.0.0")
    try:
        # Sets SO_REUSEADDR, as connections that ended lately are no obstacle.
        socket.create_server((address, port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UserError(
            f"process 0 of {start.count} by {start.kind}: cannot listen on port {port} "
            f"({error.strerror}), as coordinator {start.coordinator}: another program may have it; "
            f"{COORDINATOR} sets another one, for all processes"
        ) from None


def _give_up(start: Start, seconds: float) -> None:
    """Ends the process: it waits inside JAX, which would end it with a trace of C++."""
    who = f"process {start.index} of {start.count} by {start.kind}"
    if start.count is None:
        who = f"a process by {start.kind}"
    text = f"error: {who}: not all processes came together in {seconds:g} s"
    where = f" at {start.coordinator}" if start.coordinator else ""
    print(f"{text}{where}: {TIMEOUT} sets the seconds", file=sys.stderr, flush=True)
    os._exit(2)


def start(
    given: str | None = None,
    say: Callable[[str], None] = print,
    *,
    timeout: float | None = None,
) -> None:
    """Joins the processes that run this program, if there are several; to be called first of all.

    Nothing may have touched a device before. Does nothing alone, or when called again.

    Args:
      given: the option --distributed, see `detect`.
      say: gets one line that says what was found, where there are several processes.
      timeout: seconds to wait for the others; None is MAGNET_JAX_TIMEOUT, or 300.

    Raises:
      UserError: malformed settings, or a coordinator that cannot be had. Where the coordinator
        answers but some process never comes, the process ends with such a line and status 2.
    """
    if jax.distributed.is_initialized():
        return
    found = detect(os.environ, given)
    if found is None:
        return
    if timeout is None:
        timeout = _read(os.environ, TIMEOUT) if TIMEOUT in os.environ else 300
    if found.coordinator:
        say(
            f"process {found.index} of {found.count} by {found.kind}, coordinator "
            f"{found.coordinator}"
        )
    if found.index:
        _wait_for_coordinator(found, timeout)
    elif found.coordinator and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(found)
    watch = threading.Timer(timeout, _give_up, (found, timeout))
    watch.daemon = True
    watch.start()
    # JAX waits longer than the watch, whose line is the better one. Processes that end without the
    # others (an error of one of them) are not waited for as long as JAX would.
    limits = dict(initialization_timeout=int(timeout) + 60, shutdown_timeout_seconds=60)
    try:
        if found.coordinator is None:
            jax.distributed.initialize(**limits)
        else:
            # All is known: without 'deactivate' JAX looks for a cluster when local_device_ids is
            # None, and gives a process that has a node to itself one GPU of it.
            jax.distributed.initialize(
                found.coordinator,
                found.count,
                found.index,
                local_device_ids=found.local_devices,
                cluster_detection_method="deactivate",
                **limits,
            )
    except (OSError, ValueError, RuntimeError) as error:
        if found.coordinator is not None:
            raise
        raise UserError(
            f"a TPU is here but JAX cannot learn of how many hosts ({error}): give --distributed "
            "off to run on this host alone, or HOST:PORT,INDEX,COUNT"
        ) from error
    finally:
        watch.cancel()
    if found.coordinator is None:
        say(f"process {jax.process_index()} of {jax.process_count()} by {found.kind}")


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def say_first(text: str) -> None:
    """Prints a line, once for all processes and above any progress bar."""
    if is_first():
        tqdm.write(text)


def barrier(name: str) -> None:
    """Waits until all processes are here; a bug, with an error, if they are elsewhere."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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

    Args:
      folder: that the first process can write to.
      patience: seconds that a file system may take to show a file to all.
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
