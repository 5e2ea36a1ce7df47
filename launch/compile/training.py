"""One step of training, for chips that are not there: does it fit, and what does it cost?"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

from launch.compile import report, targets
from launch.train import load_config
from magnet_jax.config import ComputeDtype, MeshConfig, Remat, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import precision, sharding
from magnet_jax.train import flops, plan, steps

FRAME_RATE = 50  # frames a second of the published codecs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Whose step, and on what."""

    topology: str
    """Devices: v5e:4x8, v5p:4x4x4, h100:4x8 (hosts x GPUs), cpu:1, ..."""
    config: str = "music_small_10s"
    """A config of configs/."""
    mesh: str = ""
    """DATA,FSDP,TENSOR, such as 4,8,1. By default the config's, with the smallest fsdp and the
    fewest parts that fit, for which steps are compiled."""
    batch_size: int | None = None
    """Clips in a global batch; the config's by default."""
    clips_per_device: int = 0
    """Clips that a device computes at once; 0 is as many as fit, or all with --mesh."""
    remat: Remat | None = None
    """What the backward pass computes again; the config's by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Asked):
    """One training step of a config."""

    dtype: ComputeDtype = "auto"
    """float32 or bfloat16; auto is float32 on a CPU, else bfloat16."""
    stage: int = 1
    """0 compiles the step of the first codebook, which sees all frames unless the config has
    model.first_context; above it, that of the others, with model.local_context."""
    json: Path | None = None
    """File for everything that was found out, costs of one device."""


def read_mesh(text: str, default: MeshConfig) -> MeshConfig:
    """'4,8,1' as data, fsdp and tensor."""
    if not text:
        return default
    try:
        data, fsdp, tensor = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--mesh {text}: give DATA,FSDP,TENSOR, such as 4,8,1") from None
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def configured(args: Asked) -> RunConfig:
    """The config with what the command changes."""
    config = load_config(args.config)
    if args.clips_per_device < 0:
        raise UserError("--clips-per-device must be at least 0")
    if args.batch_size is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, batch_size=args.batch_size)
        )
    changes = {} if args.remat is None else {"remat": args.remat}
    return dataclasses.replace(
        config,
        mesh=read_mesh(args.mesh, config.mesh),
        clips_per_device=args.clips_per_device,
        **changes,
    )


def prepared(
    config: RunConfig, target: targets.Target, mesh: str
) -> tuple[steps.StepSettings, int | None, int]:
    """A run's settings on a target, the memory that a step takes, and frames of a clip.

    Where the `mesh` was given, nothing is compiled and the memory is None.
    """
    frames = round(config.data.segment_seconds * FRAME_RATE)
    settings, peak = plan.choose(
        config,
        t5_files.published_config(config.text.source),
        precision.compute_dtype(config, target.platform),
        frames,
        None if mesh or target.chip is None else target.chip.device_bytes,
        list(target.devices),
        functools.partial(print, file=sys.stderr, flush=True),
    )
    return settings, peak, frames


def costs(args: Train) -> dict[str, Any]:
    """Compiles the step, and sets it beside the plan and the chip."""
    report.check_file("--json", args.json)
    config = dataclasses.replace(configured(args), compute_dtype=args.dtype)
    if not 0 <= args.stage < config.model.num_codebooks:
        raise UserError(f"--stage must lie between 0 and {config.model.num_codebooks - 1}")
    target = targets.load(args.topology)
    settings, _, frames = prepared(config, target, args.mesh)
    clips, text_tokens = config.data.batch_size, config.text.max_tokens
    lowered = plan.lower(settings, clips, frames, text_tokens, args.stage)
    found = report.compiled_costs(lowered, target)
    found.pop("text")
    at_once = clips // sharding.num_rows(settings.mesh) // settings.num_parts
    operations = clips * flops.training_flops(
        config.model, frames, text_tokens, config.stage_weights
    )
    seconds, chip = found["estimated_seconds"], target.chip
    memory = None if chip is None else chip.device_bytes
    return {
        "program": "train",
        "arguments": dataclasses.asdict(args) | {"json": None},
        "dtype": settings.dtype.name,
        "num_devices": settings.mesh.size,
        "mesh": dict(settings.mesh.shape),
        "parts": settings.num_parts,
        "clips_at_once": at_once,
        **found,
        "param_bytes": plan.param_bytes(settings),
        "device_bytes": memory,
        "fits": None if memory is None else found["peak_bytes"] <= memory,
        "model_flops": operations,
        "step_seconds": seconds,
        "mfu": report.share_of_peak(operations, seconds, target, settings.mesh.size),
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of training beyond what there is of any program."""
    memory = found["device_bytes"]
    verdict = "unknown" if memory is None else ("yes" if found["fits"] else "NO")
    of = "" if memory is None else f": {report.size(found['peak_bytes'])} of {report.size(memory)}"
    lines = [
        ("batch", f"in {found['parts']} parts of {found['clips_at_once']} clips a device"),
        ("fits", verdict + of),
        ("parameters", f"{report.size(found['param_bytes'])}, with average and optimizer"),
        ("model FLOPs", f"{report.size(found['model_flops'], 'FLOP')} a step, all devices"),
    ]
    if found["mfu"] is not None:
        lines.append(
            (
                "step",
                f"{found['step_seconds']:.3f} s by the compiler's estimate, "
                f"{found['mfu']:.1%} of the peak; collectives are not in it",
            )
        )
    return lines


def run(args: Train) -> None:
    found = costs(args)
    report.write_json(args.json, found)
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    clips = math.prod((found["clips_at_once"], found["parts"]))
    title = (
        f"train, {args.config}, {clips} clips a device row, {found['dtype']}, for "
        f"{found['num_devices']} devices of {args.topology} ({mesh}); a device's share:"
    )
    report.show(title, report.cost_rows(found) + rows(found))
