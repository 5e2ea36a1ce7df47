import ast
import os
import subprocess
import sys
import types
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from magnet_jax.io import machine

FOLDER = Path(__file__).parents[2]
GROUP = "kubepods/pod1/box"


def control_groups(root, lines, files):
    """What Linux shows of control groups, below `root`."""
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_1(quota, period="100000", group="", folder="cpu,cpuacct"):
    return {
        f"sys/fs/cgroup/{folder}/{group}/cpu.cfs_quota_us": f"{quota}\n",
        f"sys/fs/cgroup/{folder}/{group}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("lines", "files", "count"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what\n"}, 16),
        ("0::/\n", {}, 16),
        # the tightest of a group and those above it
        (
            f"0::/{GROUP}\n",
            {
                f"sys/fs/cgroup/{GROUP}/cpu.max": "max 100000\n",
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "300000 50000\n",
                "sys/fs/cgroup/kubepods/cpu.max": "1200000 100000\n",
            },
            6,
        ),
        # the path is the host's, and what is mounted the container's own
        ("0::/../../box\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ("5:cpu,cpuacct:/docker/box\n0::/\n", version_1(400000), 4),
        (f"5:cpu,cpuacct:/{GROUP}\n", version_1(150000, group=GROUP), 2),
        (f"3:cpu:/{GROUP}\n4:memory:/{GROUP}\n", version_1(700000, group=GROUP, folder="cpu"), 7),
        (f"5:cpuacct,cpu:/{GROUP}\n", version_1(500000), 5),
        ("5:cpu,cpuacct:/\n4:cpuset:/\n", version_1(-1), 16),
        ("5:cpu,cpuacct:/\n", version_1(400000, period="0"), 16),
    ],
)
def test_cpus_within_the_quota_of_a_container(tmp_path, monkeypatch, lines, files, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.num_cpus(control_groups(tmp_path, lines, files)) == count


def test_cpus_that_a_process_is_bound_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert machine.num_cpus(tmp_path) == 3


@pytest.mark.parametrize(("count", "expected"), [(8, 8), (None, 1)])
def test_cpus_where_no_process_is_bound_to_any(tmp_path, monkeypatch, count, expected):
    """As on macOS, which has no /proc either."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert machine.num_cpus(tmp_path) == expected


def test_libraries_are_told_of_a_quota_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for quotas, before, after in [([], None, None), ([2.0], None, "2"), ([2.0], "7", "7")]:
        monkeypatch.setattr(machine, "_quotas", lambda root, quotas=quotas: iter(quotas))
        with monkeypatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS", raising=False)
            if before:
                patch.setenv("OMP_NUM_THREADS", before)
            machine.keep_to_quota()
            assert os.environ.pop("OMP_NUM_THREADS", None) == after


@pytest.mark.parametrize(("platform", "expected"), [("linux", 3 << 20), ("darwin", 3 << 10)])
def test_peak_memory_is_in_bytes(monkeypatch, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.peak_bytes(types.SimpleNamespace(ru_maxrss=3 << 10)) == expected


# Page faults of the last of three turns that each take and give back 64 MB.
FAULTS = """
import ctypes, resource, sys
import numpy as np
from magnet_jax.io import machine
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is a page of 4 KiB
if sys.argv[1] == "keep":
    machine.keep_freed()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("settings", [{}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}])
def test_what_is_freed_is_kept_but_where_the_environment_says_otherwise(settings):
    said = ("GLIBC_TUNABLES", "MALLOC_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(said)} | settings

    def faults(how):
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, env=environ, capture_output=True, check=True).stdout)

    usual, kept = faults("plain"), faults("keep")
    if settings:
        assert kept > usual / 2
    else:
        assert kept < usual / 8


def test_other_c_libraries_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.os, "environ", {})
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: asked.append(name))
    machine.keep_freed()  # (would fail if it called anything)
    assert asked == [None]
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    machine.keep_freed()
    assert asked == [None]


# --- commands started as files ------------------------------------------------------------------


def folders_of_modules():
    """Folders of commands: each is the first on the path when a file of it is started.

    The names in it, of modules and of folders that would be imported.
    """
    folders = {}
    for top in ("configs", "launch", "tokenization"):
        for path in (FOLDER / top).rglob("*.py"):
            names = folders.setdefault(path.parent.relative_to(FOLDER).as_posix(), set())
            names.add(path.stem)
            if path.parent.parent != FOLDER:
                folders.setdefault(path.parent.parent.relative_to(FOLDER).as_posix(), set()).add(
                    path.parent.name
                )
    return {folder: names - {"__init__", "__main__"} for folder, names in folders.items()}


def test_no_module_has_the_name_of_one_that_others_import():
    ours = {"configs", "launch", "magnet_jax", "tests", "tokenization"}
    others = (sys.stdlib_module_names | set(packages_distributions())) - ours
    assert {"inspect", "numpy", "jax"} <= others
    found = folders_of_modules()
    assert {"browse", "job"} <= found["tokenization"] and "compile" in found["launch"]
    hidden = {folder: names & others for folder, names in found.items() if names & others}
    assert not hidden, "python FOLDER/MODULE.py would import these in place of the libraries'"


@pytest.mark.parametrize("name", ["tokenization/job.py", "launch/train.py"])
def test_commands_start_as_files(name):
    """From any folder, where the package is installed."""
    done = subprocess.run(
        [sys.executable, FOLDER / name, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(FOLDER)},
    )
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


# What Python's os module has on Linux alone.
LINUX_ONLY = {
    "copy_file_range", "eventfd", "fdatasync", "getrandom", "getxattr", "listxattr", "memfd_create",
    "pidfd_open", "pipe2", "posix_fadvise", "posix_fallocate", "sched_getaffinity",
    "sched_setaffinity", "setns", "setxattr", "splice", "unshare",
}  # fmt: skip


def test_what_only_linux_has_is_asked_for_first():
    used = set()
    for top in ("configs", "launch", "magnet_jax", "tokenization"):
        for path in (FOLDER / top).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {
                node.attr
                for node in nodes
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "os"
            }
            checks = [
                node
                for node in nodes
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "hasattr"
            ]
            used |= names & LINUX_ONLY
            assert not names & LINUX_ONLY or checks, f"{path}: uses {names & LINUX_ONLY}"
    assert "sched_getaffinity" in used
