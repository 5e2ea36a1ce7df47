"""Which mesh, parts and recomputation make a training step the fastest, by the compiler's estimate.

For every mesh and every way to recompute, the fewest parts that fit are compiled, both programs.
What was found out of a program is kept in the user's cache folder, under the hash of its text.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import platformdirs

from launch.compile import hlo, report, targets
from launch.compile.options import FRAME_RATE, Train
from launch.compile.training import average, configured
from magnet_jax.config import RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file
from magnet_jax.model import precision, sharding
from magnet_jax.train import chips, flops, plan
from magnet_jax.train.steps import StepSettings

LEAST_COLUMNS = 128  # of a parameter on a device; of fewer, a TPU's products are many times slower

Costs = Callable[[StepSettings, int], dict[str, Any] | None]  # of a stage; None where no room is


def compiled(
    settings: StepSettings, stage: int, config: RunConfig, target: targets.Target
) -> dict[str, Any] | None:
    """Costs of a step's program as `report.compiled_costs` has them, compiled once for all times.

    None where the compiler finds no room.
    """
    frames = round(config.data.segment_seconds * FRAME_RATE)
    lowered = plan.lower(settings, config.data.batch_size, frames, config.text.max_tokens, stage)
    made_by = [target.name, jax.__version__, inspect.getsource(hlo), inspect.getsource(chips)]
    made_by += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    made_by += [
        f"{found.name} {found.version}" for found in importlib.metadata.distributions(name="libtpu")
    ]
    digest = hashlib.sha256("\n".join([*made_by, lowered.as_text()]).encode()).hexdigest()
    file = Path(platformdirs.user_cache_dir("magnet_jax")) / "costs" / f"{digest}.json"
    if file.exists():
        return json.loads(file.read_text())
    try:
        found = report.compiled_costs(lowered, target)
        found.pop("text")
    except UserError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = None
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(file) as temporary:
        temporary.write_text(json.dumps(found))
    return found


def fitting(
    candidates: Iterator[StepSettings], costs: Costs, config: RunConfig, device: int
) -> Iterator[tuple[StepSettings, list[dict[str, Any]]]]:
    """Of each mesh and recomputation the fewest parts that fit, with the costs of both programs."""
    done = set()
    for settings in candidates:
        kind = settings.remat, settings.mesh
        columns = settings.model.width // settings.mesh.shape["fsdp"]
        if kind in done or (settings.mesh.shape["fsdp"] > 1 and columns < LEAST_COLUMNS):
            continue
        clips = config.data.batch_size // sharding.num_rows(settings.mesh) // settings.num_parts
        frames = round(config.data.segment_seconds * FRAME_RATE)
        least = plan.param_bytes(settings) + plan.kept_bytes(settings, clips, frames)
        if least > plan.USABLE * device:
            continue
        programs = []
        for stage in (0, 1):
            found = costs(settings, stage)
            if found is None or plan.peak_of([*programs, found]) > plan.USABLE * device:
                break
            programs.append({"stage": stage} | found)
        if len(programs) == 2:
            done.add(kind)
            yield settings, programs


def ranking(args: Train) -> list[dict[str, Any]]:
    """What fits, the fastest first."""
    if args.stage is not None:
        raise UserError("--stage has no effect on --search, which goes by all stages: leave it out")
    config = dataclasses.replace(configured(args), compute_dtype=args.compute_dtype)
    target = targets.load(args.topology)
    if target.chip is None or target.chip.clock is None:
        raise UserError(f"--search needs a TPU: the compiler estimates no time for {target.name}")
    frames = round(config.data.segment_seconds * FRAME_RATE)
    operations = config.data.batch_size * flops.training_flops(
        config.model, frames, config.text.max_tokens, config.stage_weights
    )
    candidates = plan.candidates(
        config,
        t5_files.published_config(config.text.source),
        precision.compute_dtype(config, target.platform),
        frames,
        list(target.devices),
    )
    rows = []
    for settings, programs in fitting(
        candidates,
        lambda settings, stage: compiled(settings, stage, config, target),
        config,
        target.chip.device_bytes,
    ):
        seconds = average(config, [one["estimated_seconds"] for one in programs])
        if seconds is None:
            raise UserError(
                f"--search cannot rank for {target.name}: this release of JAX does not read the "
                "times that the compiler estimates; leave it out, to learn whether a step fits"
            )
        rows.append(
            {
                "mesh": dict(settings.mesh.shape),
                "remat": settings.remat,
                "parts": settings.num_parts,
                "step_seconds": seconds,
                "mfu": report.share_of_peak(operations, seconds, target, settings.mesh.size),
                "peak_bytes": plan.peak_of(programs),
                "programs": programs,
            }
        )
    if not rows:
        raise UserError(f"nothing of {args.config} fits {args.topology}: take more devices")
    return sorted(rows, key=lambda row: row["step_seconds"])


def run(args: Train) -> None:
    report.check_file("--json", args.json)
    rows = ranking(args)
    report.write_json(args.json, {"program": "search", "ranking": rows})
    report.show(f"train, {args.config}, {args.topology}; the fastest first:", shown(rows))


def shown(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    lines = []
    for row in rows:
        time = f"{row['step_seconds']:.3f} s, {row['mfu']:.1%} of the peak"
        mesh = plan.mesh_options(row["mesh"]) or "one device"
        settings = f"{mesh}, {row['parts']} parts, --remat {row['remat']}"
        lines.append((settings, f"{time}, {report.size(row['peak_bytes'])}"))
    return lines
