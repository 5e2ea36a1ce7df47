"""What a compiled program costs, as numbers and as a table."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from launch.compile import hlo, targets
from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file


def compiled_costs(lowered: jax.stages.Lowered, target: targets.Target) -> dict[str, Any]:
    """Compiles a program and lists what one of its devices does: `hlo.Costs` and more.

    Raises `UserError` where the compiler refuses, as for want of memory.
    """
    print(f"compiling for {target.name}, which may take minutes", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{target.name}: {str(error).splitlines()[0]}") from error
    found = {"compile_seconds": time.perf_counter() - started}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        # libtpu writes forms that JAX does not read: the asynchronous collectives of a v5p.
        unknown = {"flops": None, "cycles": None, "estimated_seconds": None}
        return found | unknown | hlo.memory(compiled) | {"readable": False, "text": ""}
    found |= dataclasses.asdict(hlo.work(text)) | hlo.memory(compiled) | {"readable": True}
    clock = target.chip and target.chip.clock
    estimable = clock and found["cycles"] is not None
    found["estimated_seconds"] = found["cycles"] / clock if estimable else None
    found["largest_arrays"] = described(hlo.largest_arrays(text, 5))
    return found | {"text": text}


def described(uses: list[hlo.ArrayUse]) -> list[dict[str, Any]]:
    return [
        {
            "type": str(use.array),
            "bytes": use.array.bytes,
            "opcodes": use.opcodes,
            "in_memory": use.in_memory,
        }
        for use in uses
    ]


def share_of_peak(
    operations: float, seconds: float | None, target: targets.Target, num_devices: int
) -> float | None:
    if seconds is None or target.chip is None:
        return None
    return operations / (seconds * num_devices * target.chip.device_flops)


def size(count: float, unit: str = "B") -> str:
    """A number to three digits with its prefix: 31847415349248 -> '31.8 T'."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    raise AssertionError


def listed(items: list[str] | tuple[str, ...]) -> str:
    return ", ".join(items) or "none"


def cost_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of any program, one device's share."""
    rows = [
        ("compiled in", f"{found['compile_seconds']:.1f} s"),
        (
            "memory",
            ", ".join(
                f"{name} {size(found[f'{name}_bytes'])}"
                for name in ("argument", "output", "temp", "code", "peak")
            ),
        ),
    ]
    if not found["readable"]:
        note = "cannot be counted: this release of JAX does not read the program's text"
        return [*rows, ("the rest", note)]
    cycles, seconds = found["cycles"], found["estimated_seconds"]
    time_ = "no estimate for this hardware" if seconds is None else f"{seconds:.3f} s"
    return [
        *rows,
        ("FLOPs", size(found["flops"], "FLOP")),
        ("time", time_ if cycles is None else f"{size(cycles, '')}cycles, {time_}"),
        (
            "copies",
            f"{found['copy_runs']} from {found['copy_places']} places, "
            f"{size(found['copy_bytes'])}; between memories {found['prefetch_runs']}, "
            f"{size(found['prefetch_bytes'])}",
        ),
        (
            "collectives",
            listed(
                [
                    f"{kind} {runs} from {found['collective_places'][kind]} places, "
                    f"{size(found['collective_bytes'][kind])}"
                    for kind, runs in found["collective_runs"].items()
                ]
            ),
        ),
        (
            "beside products",
            f"{found['overlapping_collective_runs']} of {found['async_collective_runs']} "
            f"asynchronous collectives, {size(found['overlapping_flops'], 'FLOP')}",
        ),
        ("attention", f"fused: {listed(found['fused_attention'])}"),
        (
            "largest arrays",
            listed([f"{one['type']} {size(one['bytes'])}" for one in found["largest_arrays"]]),
        ),
        ("unknown loops", listed(found["unknown_loops"])),
        ("not counted", listed([f"{name} x {n}" for name, n in found["uncounted"].items()])),
    ]


def show(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


def check_file(option: str, path: Path | None) -> None:
    """Raises `UserError` for a file in no folder, before anything is compiled for it."""
    if path and not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no such folder {path.absolute().parent}")


def write_json(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(found, indent=2, default=str) + "\n")
