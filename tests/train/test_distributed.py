"""Several processes: how they are found, that they agree, and the command lines of clusters."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from constants import XLA_FLAGS
from several import free_port

from magnet_jax import cli
from magnet_jax.errors import UserError
from magnet_jax.train import distributed
from tokenization.job import Job

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "launch" / "cluster"

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "n[01-02]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
VARIABLES = {
    "MAGNET_JAX_COORDINATOR": "h:1",
    "MAGNET_JAX_PROCESS_ID": "1",
    "MAGNET_JAX_NUM_PROCESSES": "2",
}


@pytest.fixture
def find(monkeypatch):
    """`distributed.find` in an environment that has these variables and no cluster's."""

    def found(environ, given=None):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "MAGNET_JAX_", "JAX_LOCAL", "KUBERNETES_")):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return distributed.find(given, 1)

    return found


@pytest.mark.parametrize(
    ("environ", "given", "expected"),
    [
        ({}, None, None),
        ({}, "auto", None),
        ({}, "h:1,0,1", None),
        ({}, "h:1,2,3", ("h:1", 2, 3, None)),
        ({}, "[::1]:9,0,2", ("[::1]:9", 0, 2, None)),
        (SLURM | VARIABLES, "off", None),
        (SLURM | VARIABLES, "h:2,0,2", ("h:2", 0, 2, None)),
        (VARIABLES, None, ("h:1", 1, 2, None)),
        (SLURM | VARIABLES, "auto", ("h:1", 1, 2, None)),
        (VARIABLES | {"MAGNET_JAX_PROCESS_ID": "0", "MAGNET_JAX_NUM_PROCESSES": "1"}, None, None),
        # JAX gives a process the GPU of its number, unless it is told which.
        (SLURM, None, ("n01:62344", 11, 16, [3])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None, ("n01:62344", 11, 16, [0, 1])),
        (SLURM | {"MAGNET_JAX_COORDINATOR": "ib01:7"}, None, ("ib01:7", 11, 16, [3])),
        (SLURM | {"SLURM_NTASKS": "1"}, None, None),
        # A shell within a job has the job's variables without those of a step.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None, None),
        (SLURM | OPEN_MPI, None, ("10.96.0.1:62624", 2, 4, [0])),
    ],
)
def test_who_a_process_is(find, environ, given, expected):
    assert find(environ, given) == expected


@pytest.mark.parametrize(
    ("environ", "given", "words"),
    [
        ({}, "on", "give auto, off, or HOST:PORT,INDEX,COUNT"),
        ({}, "h:1,0", "give auto, off, or HOST:PORT,INDEX,COUNT"),
        ({}, "h,0,2", "'h' is not HOST:PORT"),
        ({}, ":1,0,2", "is not HOST:PORT"),
        ({}, "h:1,x,2", "--distributed h:1,x,2: the process's index is 'x', not a whole number"),
        ({}, "h:1,-1,2", "index is '-1', not a whole number"),
        ({}, "h:1,0,0", "of 0 processes there is none of index 0"),
        (VARIABLES | {"MAGNET_JAX_PROCESS_ID": "2"}, None, "of 2 processes there is none"),
        (VARIABLES | {"MAGNET_JAX_PROCESS_ID": ""}, None, "MAGNET_JAX_PROCESS_ID.* is ''"),
        ({"MAGNET_JAX_PROCESS_ID": "0"}, None, "MAGNET_JAX_NUM_PROCESSES go together"),
        ({"MAGNET_JAX_NUM_PROCESSES": "2"}, None, "MAGNET_JAX_NUM_PROCESSES go together"),
        ({"MAGNET_JAX_COORDINATOR": "h:1"}, None, "finds no cluster.*MAGNET_JAX_PROCESS_ID"),
        (SLURM | {"SLURM_PROCID": "x"}, None, "'x'.*set MAGNET_JAX_COORDINATOR"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "?"}, None, "set MAGNET_JAX_COORDINATOR"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;?"}, None, "Open MPI.*--distributed off"),
    ],
)
def test_what_is_malformed_is_said(find, environ, given, words):
    with pytest.raises(UserError, match=words):
        find(environ, given)


def test_alone_nothing_happens(find):
    assert find({}) is None
    said = []
    distributed.start("auto", said.append)
    distributed.start("off", said.append)
    assert not said and not jax.distributed.is_initialized()
    assert distributed.is_first()
    assert distributed.broadcast_json({"a": (1, None)}) == {"a": [1, None]}
    assert distributed.agree(True) is True and distributed.agree(False) is False


TWO = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from magnet_jax.train import distributed
from magnet_jax import errors

sys.stdout = open(sys.argv[3], "w")  # Gloo writes between the lines of the true one
with errors.reported():
    distributed.start(sys.argv[1])
    distributed.start(sys.argv[1])  # a second time: nothing
    me = jax.process_index()
    assert jax.process_count() == 2 and jax.device_count() == 4 and jax.local_device_count() == 2
    for value in ({"me": me, "text": "é" * 5000}, "", [me]):
        print("json", len(str(distributed.broadcast_json(value))), flush=True)
    print("first", distributed.broadcast_json(me), flush=True)
    # A handler set after the start gets SIGTERM, whatever JAX set before; one process's is enough.
    caught = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    assert not distributed.agree(bool(caught))
    if me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.agree(bool(caught))
    before = time.perf_counter()
    for _ in range(50):
        assert not distributed.agree(False)
    print(f"agree {(time.perf_counter() - before) * 20:.2f} ms", file=sys.stderr)
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    local = np.arange(2.0) + 2 * me
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), local)
    total = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    )(rows)
    print("psum", float(total[0]), flush=True)
    distributed.check_shared(Path(sys.argv[2]))
    try:
        distributed.check_shared(Path(sys.argv[2], str(me)), patience=0)
    except errors.UserError as error:
        print("folders", error, flush=True)
    distributed.say_first("once")
"""

START = """
import sys
from magnet_jax.train import distributed
from magnet_jax import errors
with errors.reported():
    distributed.start(sys.argv[1], timeout=int(sys.argv[2]))
"""


def begin(script: str, *args: str) -> subprocess.Popen:
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "MAGNET_JAX_"))
    }
    environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """(status, output, errors) of each; none outlives this."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_two_processes_join_and_agree(tmp_path):
    port = free_port()
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
    places = [f"127.0.0.1:{port},{i},2" for i in range(2)]
    said_to = [tmp_path / f"said_{i}" for i in range(2)]
    both = finish([begin(TWO, *map(str, (places[i], tmp_path, said_to[i]))) for i in range(2)], 240)
    said = [
        "folders another process cannot begin; its own line says why",
        f"folders {tmp_path}/1: process 1 has another folder of this name than process 0; --out "
        "must be on a file system that all hosts share, or in a bucket",
    ]
    for i, (status, _, complaint) in enumerate(both):
        assert status == 0, complaint
        lines = said_to[i].read_text().splitlines()
        found = f"process {i} of 2, coordinator 127.0.0.1:{port}"
        assert lines[:6] == [found, "json 5021", "json 0", "json 3", "first 0", "psum 6.0"]
        assert lines[6:] == ([said[0], "once"] if i == 0 else [said[1]])
    assert not list(tmp_path.rglob(".seen*"))


def test_who_does_not_come_is_one_line():
    port, other = free_port(), free_port()
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        in_use = taken.getsockname()[1]
        nobody, alone, cannot = finish(
            [
                begin(START, f"127.0.0.1:{port},1,2", "2"),
                begin(START, f"127.0.0.1:{other},0,2", "2"),
                begin(START, f"127.0.0.1:{in_use},0,2", "60"),
            ],
            120,
        )
    assert [nobody[0], alone[0], cannot[0]] == [2, 2, 2], (nobody, alone, cannot)
    for index, where, (_, _, complaint) in ((1, port, nobody), (0, other, alone)):
        (line,) = complaint.splitlines()
        expected = f"error: process {index} of 2: not all came together at 127.0.0.1:{where} in 2 s"
        assert line.startswith(expected)
    (line,) = cannot[2].splitlines()
    assert f"process 0 of 2 cannot listen at 127.0.0.1:{in_use}" in line


SCRIPTS = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed; only bash -n was run")
    subprocess.run([checker, "--shell=bash", script], check=True)


def test_the_jobset_says_who_a_pod_is(find):
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((CLUSTER / "gke_jobset.yaml").read_text().replace("${NODES}", "2"))
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 2
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    pod = {
        "jobset.sigs.k8s.io/jobset-name": "run",
        "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
        "batch.kubernetes.io/job-completion-index": "1",
    }
    environ = {}
    for variable in container["env"]:
        if "valueFrom" in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            value = pod[path.removeprefix("metadata.annotations['").removesuffix("']")]
        else:
            value = variable["value"]
        for name, known in environ.items():
            value = value.replace(f"$({name})", known)
        environ[variable["name"]] = value
    assert find(environ) == ("run-train-0-0.run:12345", 1, 2, None)
    assert container["command"] == ["python", "-u", "-m", "launch.train"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a fake program on PATH, and one that gives the calls of all."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def fake(name: str, body: str = "") -> None:
        # Words are kept apart by \x1f, calls by \x1e: some words hold lines.
        record = f"{{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >> {log}"
        (folder / name).write_text(f"#!/usr/bin/env bash\n{record}\n{body}\n")
        (folder / name).chmod(0o755)

    def calls() -> list[list[str]]:
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    return fake, calls


def bash(script: str, *args: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", CLUSTER / script, *args],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (143, "RUNNING", "0", True),
        (143, "COMPLETING", "0", False),  # as after scancel
        (143, "RUNNING", "100", False),
        (0, "RUNNING", "0", False),
        (2, "RUNNING", "0", False),
        (137, "RUNNING", "0", False),
    ],
)
def test_slurm_queues_again_what_was_stopped(programs, status, state, restarts, requeued):
    fake, calls = programs
    fake("srun", f"exit {status}")
    fake("squeue", f"echo {state}")
    fake("scontrol")
    done = bash("slurm.sbatch", **JOB, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == status
    requeues = [call for call in calls() if call[0] == "scontrol"]
    assert requeues == ([["scontrol", "requeue", "77"]] if requeued else [])


def test_slurm_tokenizes_in_an_array_and_then_completes(programs):
    fake, calls = programs
    fake("sbatch", 'echo "$((100 + $#));cluster"')
    script = str(CLUSTER / "tokenize_slurm.sbatch")
    words = ["--audio", "a folder", "--out", "gs://music/tokens"]
    done = bash("tokenize_slurm.sbatch", *words, SHARDS="3", OPTIONS="--gpus=1 -p gpu")
    assert done.returncode == 0, done.stderr
    array, last = calls()
    options = ["sbatch", "--parsable", "--gpus=1", "-p", "gpu"]
    assert array == [*options, "--array=0-2", script, *words]
    (after,) = (word for word in last if word.startswith("--dependency="))
    assert after == f"--dependency=afterok:{100 + len(array) - 1}"
    assert last[:5] == options and last[-5:] == [script, *words] and "--array" not in str(last)
    assert f"array {100 + len(array) - 1} of 3 tasks" in done.stdout
    wrong = bash("tokenize_slurm.sbatch", *words, SHARDS="0")
    assert wrong.returncode == 2 and "SHARDS is '0'" in wrong.stderr and not calls()

    fake("python")
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    for given, shard in [(task, ["--shard", "2/3"]), ({}, [])]:
        done = bash("tokenize_slurm.sbatch", *words, **JOB, **given, PYTHON="python")
        assert done.returncode == 0, done.stderr
        assert calls() == [["python", "-u", "-m", "tokenization.job", *words, *shard]]


def test_the_indexed_job_gives_each_pod_its_shard():
    yaml = pytest.importorskip("yaml")
    text = (CLUSTER / "tokenize_job.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+)\}", text))
    assert variables == {"NAME", "SHARDS", "IMAGE", "CLAIM"}
    for name in variables:
        text = text.replace(f"${{{name}}}", "8")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["parallelism"] == spec["completions"] == 8
    assert spec["completionMode"] == "Indexed"  # which backoffLimitPerIndex needs
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    (container,) = pod["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    (variable,) = container["env"]
    words = [word.replace(f"$({variable['name']})", "3") for word in container["args"]]
    assert container["command"] == ["python", "-u", "-m", "tokenization.job"]
    parsed = cli.parse(Job, words, prog="job")
    assert (parsed.shard, str(parsed.audio), str(parsed.out)) == (
        "3/8",
        "/data/audio",
        "/data/tokens",
    )


@pytest.mark.parametrize(("processes", "per_node", "cpus"), [("node", 1, 96), ("gpu", 8, 12)])
def test_slurm_starts_a_process_a_node_or_a_gpu(programs, processes, per_node, cpus):
    fake, calls = programs
    fake("srun", 'echo "GPUs $JAX_LOCAL_DEVICE_IDS."')
    words = ["--data", "a folder", "--out", "run"]
    done = bash("slurm.sbatch", *words, **JOB, PROCESSES=processes)
    assert done.returncode == 0, done.stderr
    assert f"GPUs {'0,1,2,3,4,5,6,7' if processes == 'node' else ''}." in done.stdout
    ((srun, *options),) = calls()
    command = options.index(".venv/bin/python")
    assert set(options[:command]) == {
        "--nodes=2", f"--ntasks={2 * per_node}", f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cpus}", "--gpu-bind=none", "--kill-on-bad-exit=1",
    }  # fmt: skip
    assert options[command + 1 :] == ["-u", "-m", "launch.train", *words]
    assert bash("slurm.sbatch", **JOB, PROCESSES="gpus").returncode == 2 and not calls()
    assert "#SBATCH --signal=TERM@120\n" in (CLUSTER / "slurm.sbatch").read_text()


def test_tpu_vms_from_create_to_delete(programs):
    fake, calls = programs
    fake("gcloud", 'if [[ "$*" == *describe* ]]; then echo ACTIVE; fi')
    fake("git")
    slice_ = dict(NAME="mine", ZONE="z", ACCELERATOR="v5litepod-16", SPOT="1", MOUNT="mount it")
    tpus = ["gcloud", "compute", "tpus"]

    def tpu(*args):
        done = bash("tpu_vm.sh", *args, **slice_)
        assert done.returncode == 0, done.stderr
        return calls()

    assert tpu("create") == [
        [*tpus, "queued-resources", "create", "mine", "--zone=z", "--node-id=mine",
         "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    ]  # fmt: skip
    assert tpu("wait")[0][3:6] == ["queued-resources", "describe", "mine"]
    git, scp, install, mount = tpu("install")
    assert git[3] == "archive" and scp[3:5] == ["tpu-vm", "scp"] and "--worker=all" in scp
    ssh = [*tpus, "tpu-vm", "ssh", "mine", "--zone=z", "--worker=all"]
    assert install[:-1] == ssh and '--editable ".[tpu,gcs]"' in install[-1]
    assert mount == [*ssh, "--command=mount it"]
    ((*words, command),) = tpu("run", "--data", "a folder", "--out", "run")
    assert words == ssh
    assert "-m launch.train --data a\\ folder --out run > train.log" in command
    subprocess.run(["bash", "-n", "-c", command.removeprefix("--command=")], check=True)
    assert "kill -TERM" in tpu("stop")[0][-1]
    assert "--worker=0" in tpu("follow")[0]
    assert tpu("delete") == [
        [*tpus, "queued-resources", "delete", "mine", "--zone=z", "--force", "--quiet"]
    ]
    fake("gcloud", "echo FAILED")
    assert bash("tpu_vm.sh", "wait", **slice_).returncode == 1
    assert bash("tpu_vm.sh", "dance", **slice_).returncode == 2


def test_what_a_tpu_vm_runs_outlives_the_shell_and_stops(programs, tmp_path):
    """The commands for the hosts, run here: the program is one that waits for SIGTERM."""
    fake, calls = programs
    host = tmp_path / "host" / "magnet_jax"
    (host / ".venv" / "bin").mkdir(parents=True)
    python = host / ".venv" / "bin" / "python"
    python.write_text(
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\n"
        'echo "$@"\nwhile true; do sleep 0.1; done\n'
    )
    python.chmod(0o755)
    fake("gcloud", f'cd {host.parent}; command="${{@: -1}}"; bash -c "${{command#--command=}}"')
    slice_ = dict(NAME="mine", ZONE="z")
    first = bash("tpu_vm.sh", "run", "--out", "a run", **slice_)
    assert first.returncode == 0, first.stderr
    again = bash("tpu_vm.sh", "run", "--out", "a run", **slice_)
    assert again.returncode == 2 and "a run is going on here" in again.stderr
    stopped = bash("tpu_vm.sh", "stop", **slice_)
    assert stopped.returncode == 0 and stopped.stdout.strip().endswith("saved")
    log = (host / "train.log").read_text()
    assert log == "-u -m launch.train --out a run\nsaved\n"


def test_xpk_gets_the_same_command(programs):
    fake, calls = programs
    fake("xpk")
    done = bash(
        "xpk.sh", "--out", "a run",
        CLUSTER="c", WORKLOAD="w", TPU_TYPE="v5litepod-16", IMAGE="i", SPARE="--zone z",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (call,) = calls()
    assert call[:3] == ["xpk", "workload", "create"] and "--tpu-type=v5litepod-16" in call
    assert call[-3:] == ["--zone", "z", "--command=exec python -u -m launch.train --out a\\ run"]
