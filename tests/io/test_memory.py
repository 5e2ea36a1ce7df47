import os
import subprocess
import sys

import pytest

from magnet_jax.io import memory

# Page faults of the last of three turns that each take and give back 64 MB.
FAULTS = """
import ctypes, resource, sys
import numpy as np
from magnet_jax.io import memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is a page of 4 KiB
if sys.argv[1] == "keep":
    memory.keep_freed()
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
    monkeypatch.setattr(memory.os, "environ", {})
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: asked.append(name))
    memory.keep_freed()  # (would fail if it called anything)
    assert asked == [None]
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory.keep_freed()
    assert asked == [None]
