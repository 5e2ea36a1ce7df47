"""Time and memory of importing an AudioCraft checkpoint of full size."""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from launch import make_random_checkpoint
from magnet_jax import errors
from magnet_jax.checkpoints import pretrained
from magnet_jax.convert import lm_rules
from magnet_jax.io import machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Time and memory of importing an AudioCraft checkpoint of full size with random weights, its
    codec and text encoder included."""

    folder: Path | None = None
    """Where to put checkpoint and import (about 4 GB); a temporary folder by default."""
    size: Literal["small", "medium"] = "small"
    dtype: Literal["float16", "float32"] = "float32"
    clip: bool = False
    """Make a clip of 10 s with it as well; minutes on a CPU."""


def measure(args: Args) -> None:
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source, out = folder / "audiocraft", folder / "imported"
        make_random_checkpoint.make(
            make_random_checkpoint.Args(out=source, size=args.size, dtype=args.dtype)
        )
        model, _ = pretrained.read_defaults(source)
        count = sum(map(math.prod, lm_rules.lm_shapes(model).values()))
        seconds, peak = _run("launch.import_audiocraft", "--checkpoint", source, "--out", out)
        print(
            f"{count / 1e6:.0f} M parameters, {args.dtype}: imported in {seconds:.1f} s, peak "
            f"memory {peak / 1e9:.2f} GB, {peak / (4 * count):.2f} times the float32 parameters"
        )
        if not args.clip:
            return
        seconds, _ = _run(
            "launch.sample", "--checkpoint", out, "--prompt", "x", "--out", folder / "wavs",
            "--decode.steps", "20", "10", "10", "10",
        )  # fmt: skip
        print(f"a first clip of 10 s in {seconds:.1f} s, loading and compilation included")


def _run(module: str, *args: str | Path) -> tuple[float, float]:
    """Runs a command and returns its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, *map(str, args)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise errors.UserError(f"{module} failed, see above")
    return time.perf_counter() - started, machine.peak_bytes(usage)
