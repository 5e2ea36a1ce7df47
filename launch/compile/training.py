"""One step of training, for chips that are not there: does it fit, and what does it cost?"""

import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from launch.compile import report, targets
from launch.train import load_config
from magnet_jax.config import ComputeDtype, MeshConfig, Remat, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io.files import check_new_file, replacing_file
from magnet_jax.model import sharding
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
    """DATA,FSDP,TENSOR, such as 4,8,1. By default the config's, whose fsdp is the smallest that
    fits."""
    batch_size: int | None = None
    """Clips in a global batch; the config's by default."""
    clips_per_device: int = 0
    """Clips that a device computes at once; 0 is as many as fit, by the estimate of memory."""
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
    picture: Path | None = None
    """PNG, PDF or SVG file: planned memory of a device on every mesh of these devices."""


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


def _sizes(config: RunConfig, target: targets.Target) -> tuple:
    """What `plan.choose` takes beside the config: text encoder, dtype, frames, bytes a device."""
    return (
        t5_files.published_config(config.text.source),
        sampling.compute_dtype(config, target.platform),
        round(config.data.segment_seconds * FRAME_RATE),
        None if target.chip is None else target.chip.device_bytes,
    )


def prepared(
    config: RunConfig, target: targets.Target
) -> tuple[steps.StepSettings, plan.Memory, int]:
    """The programs of a run on a target, planned memory, and frames of a clip."""
    sizes = _sizes(config, target)
    say = functools.partial(print, file=sys.stderr, flush=True)
    settings, planned = plan.choose(config, *sizes, list(target.devices), say)
    return settings, planned, sizes[2]


def costs(args: Train) -> dict[str, Any]:
    """Compiles the step, and sets it beside the plan and the chip."""
    report.check_file("--json", args.json)
    report.check_file("--picture", args.picture)
    check_new_file("--picture", args.picture, (".png", ".pdf", ".svg"))
    config = dataclasses.replace(configured(args), compute_dtype=args.dtype)
    if not 0 <= args.stage < config.model.num_codebooks:
        raise UserError(f"--stage must lie between 0 and {config.model.num_codebooks - 1}")
    target = targets.load(args.topology)
    settings, planned, frames = prepared(config, target)
    clips, text_tokens = config.data.batch_size, config.text.max_tokens
    lowered = steps.lower(settings, clips, frames, text_tokens, args.stage)
    found = report.compiled_costs(lowered, target)
    found.pop("text")
    at_once = clips // sharding.num_rows(settings.mesh) // settings.num_parts
    operations = clips * flops.training_flops(
        config.model, frames, text_tokens, config.stage_weights
    )
    seconds, memory = found["estimated_seconds"], planned.device
    return {
        "program": "train",
        "arguments": dataclasses.asdict(args) | {"json": None, "picture": None},
        "dtype": settings.dtype.name,
        "num_devices": settings.mesh.size,
        "mesh": dict(settings.mesh.shape),
        "parts": settings.num_parts,
        "clips_at_once": at_once,
        **found,
        "planned_bytes": planned.total(at_once),
        "planned": planned._asdict(),
        "device_bytes": memory,
        "fits": None if memory is None else found["peak_bytes"] <= memory,
        "model_flops": operations,
        "step_seconds": seconds,
        "mfu": report.share_of_peak(operations, seconds, target, settings.mesh.size),
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of training beyond what there is of any program."""
    planned = found["planned"]
    parts = ", ".join(
        f"{name} {report.size(planned[name])}" for name in ("state", "frozen", "gradients")
    )
    memory = found["device_bytes"]
    verdict = "unknown" if memory is None else ("yes" if found["fits"] else "NO")
    of = "" if memory is None else f": {report.size(found['peak_bytes'])} of {report.size(memory)}"
    lines = [
        ("batch", f"in {found['parts']} parts of {found['clips_at_once']} clips a device"),
        ("fits", verdict + of),
        (
            "planned",
            f"{report.size(found['planned_bytes'])}: {parts}, a clip "
            f"{report.size(planned['a_clip'])}",
        ),
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


def meshes(devices: tuple[jax.Device, ...], config: RunConfig) -> list[Mesh]:
    """All meshes of these devices that fit the model and its batch."""
    count, found = len(devices), []
    for tensor in (n for n in range(1, count + 1) if not count % n):
        rest = count // tensor
        for fsdp in (n for n in range(1, rest + 1) if not rest % n):
            sizes = MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor)
            mesh = sharding.make_mesh(sizes, list(devices))
            with contextlib.suppress(UserError):
                sharding.check_mesh(config.model, mesh)
                steps.count_parts(config.data.batch_size, config.data.batch_size, mesh)
                found.append(mesh)
    return found


def draw(args: Train, path: Path) -> None:
    """Planned memory of a device on every mesh, one clip at once, as stacked bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, target = configured(args), targets.load(args.topology)
    config = dataclasses.replace(config, compute_dtype=args.dtype)
    names, bars = [], []
    for mesh in meshes(target.devices, config):
        names.append(",".join(str(n) for n in mesh.devices.shape))
        t5_config, dtype, frames, memory = _sizes(config, target)
        settings = steps.make_settings(config, t5_config, dtype, frames, mesh)
        bars.append(plan.memory(settings, frames, config.text.max_tokens, memory))
    figure, axes = plt.subplots(figsize=(max(6, 0.6 * len(names)), 4.5), layout="constrained")
    base = np.zeros(len(names))
    for part in ("state", "frozen", "gradients", "gathered", "a_clip"):
        heights = np.array([getattr(bar, part) for bar in bars]) / 1e9
        label = "one clip" if part == "a_clip" else part
        axes.bar(names, heights, bottom=base, label=label)
        base += heights
    if target.chip is not None:
        memory = target.chip.device_bytes / 1e9
        axes.axhline(memory, color="black", linestyle="--", label="memory of a device")
        axes.set_ylim(0, min(max(base.max(), memory), 2.5 * memory) * 1.05)
    axes.set(xlabel="mesh: data, fsdp, tensor", ylabel="GB a device", title=args.config)
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
    plt.close(figure)


def run(args: Train) -> None:
    found = costs(args)
    report.write_json(args.json, found)
    if args.picture is not None:
        draw(args, args.picture)
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    clips = math.prod((found["clips_at_once"], found["parts"]))
    title = (
        f"train, {args.config}, {clips} clips a device row, {found['dtype']}, for "
        f"{found['num_devices']} devices of {args.topology} ({mesh}); a device's share:"
    )
    report.show(title, report.cost_rows(found) + rows(found))
