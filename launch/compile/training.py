"""One step of training, for chips that are not there: does it fit, and what does it cost?"""

import dataclasses
import functools
import math
import sys
from typing import Any

from launch.compile import report, targets
from launch.compile.options import FRAME_RATE, Step, Train
from launch.train import load_config
from magnet_jax.config import MeshConfig, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import precision, sharding
from magnet_jax.train import flops, plan, steps


def configured(args: Step) -> RunConfig:
    """The config with what the command changes."""
    config = load_config(args.config)
    if args.batch_size is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, batch_size=args.batch_size)
        )
    changes = {} if args.remat is None else {"remat": args.remat}
    return dataclasses.replace(
        config,
        mesh=config.mesh if args.mesh == MeshConfig() else args.mesh,
        clips_per_device=args.clips_per_device,
        **changes,
    )


def prepared(
    config: RunConfig, target: targets.Target
) -> tuple[steps.StepSettings, int | None, int]:
    """A run's settings on a target, the memory that a step takes, and frames of a clip.

    Where mesh.fsdp was given, nothing is compiled and the memory is None.
    """
    frames = round(config.data.segment_seconds * FRAME_RATE)
    settings, peak = plan.choose(
        config,
        t5_files.published_config(config.text.source),
        precision.compute_dtype(config, target.platform),
        frames,
        None if config.mesh.fsdp or target.chip is None else target.chip.device_bytes,
        list(target.devices),
        functools.partial(print, file=sys.stderr, flush=True),
    )
    return settings, peak, frames


def average(config: RunConfig, seconds: list[float | None]) -> float | None:
    """A step's time over all stages, from those of the first and of the others, or of one alone."""
    if len(seconds) == 1 or None in seconds:
        return seconds[0] if len(seconds) == 1 else None
    weights = config.stage_weights or (1.0,) * config.model.num_codebooks
    first = weights[0] / sum(weights)
    return first * seconds[0] + (1 - first) * seconds[1]


def costs(args: Train) -> dict[str, Any]:
    """Compiles the steps of the first stage and of those above it, or one of them.

    Sets them, and their average, beside the plan and the chip.
    """
    report.check_file("--json", args.json)
    config = dataclasses.replace(configured(args), compute_dtype=args.compute_dtype)
    if args.stage is not None and args.stage >= config.model.num_codebooks:
        raise UserError(f"--stage must lie between 0 and {config.model.num_codebooks - 1}")
    target = targets.load(args.topology)
    settings, _, frames = prepared(config, target)
    clips, text_tokens = config.data.batch_size, config.text.max_tokens
    operations = clips * flops.training_flops(
        config.model, frames, text_tokens, config.stage_weights
    )
    share = functools.partial(
        report.share_of_peak, operations, target=target, num_devices=settings.mesh.size
    )
    programs = []
    for stage in (0, 1) if args.stage is None else (args.stage,):
        lowered = plan.lower(settings, clips, frames, text_tokens, stage)
        found = {"stage": stage} | report.compiled_costs(lowered, target)
        found.pop("text")
        programs.append(found | {"mfu": share(seconds=found["estimated_seconds"])})
    seconds = [found["estimated_seconds"] for found in programs]
    mean = average(config, seconds)
    peak, chip = plan.peak_of(programs), target.chip
    memory = None if chip is None else chip.device_bytes
    return {
        "program": "train",
        "arguments": dataclasses.asdict(args) | {"json": None},
        "dtype": settings.dtype.name,
        "num_devices": settings.mesh.size,
        "mesh": dict(settings.mesh.shape),
        "remat": settings.remat,
        "parts": settings.num_parts,
        "clips_at_once": clips // sharding.num_rows(settings.mesh) // settings.num_parts,
        "programs": programs,
        "param_bytes": plan.param_bytes(settings),
        "peak_bytes": peak,
        "device_bytes": memory,
        # (of one of the two programs it is not known what the other one's code takes)
        "fits": None if memory is None or len(programs) < 2 else peak <= plan.USABLE * memory,
        "model_flops": operations,
        "step_seconds": mean,
        "mfu": share(seconds=mean),
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of training beyond what there is of any program."""
    memory = found["device_bytes"]
    verdict = {None: "unknown", True: "yes", False: "NO"}[found["fits"]]
    of = "" if memory is None else f": {report.size(found['peak_bytes'])} of {report.size(memory)}"
    lines = [
        ("batch", f"in {found['parts']} parts of {found['clips_at_once']} clips a device"),
        ("computed again", found["remat"]),
        ("fits", verdict + of),
        ("parameters", f"{report.size(found['param_bytes'])}, with average and optimizer"),
        ("model FLOPs", f"{report.size(found['model_flops'], 'FLOP')} a step, all devices"),
    ]
    if found["mfu"] is not None:
        lines += [
            (_name(one), f"{one['estimated_seconds']:.3f} s, {one['mfu']:.1%} of the peak")
            for one in found["programs"]
        ]
        over = "" if len(found["programs"]) == 1 else ", on average over the stages"
        lines.append(
            (
                "step",
                f"{found['step_seconds']:.3f} s by the compiler's estimate, "
                f"{found['mfu']:.1%} of the peak{over}; collectives are not in it",
            )
        )
    return lines


def _name(program: dict[str, Any]) -> str:
    return "stages above the first" if program["stage"] else "first stage"


def run(args: Train) -> None:
    found = costs(args)
    report.write_json(args.json, found)
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    clips = math.prod((found["clips_at_once"], found["parts"]))
    title = (
        f"train, {args.config}, {clips} clips a device row, {found['dtype']}, for "
        f"{found['num_devices']} devices of {args.topology} ({mesh}); a device's share:"
    )
    print(title)
    for program in found["programs"]:
        report.show(f"{_name(program)}:", report.cost_rows(program))
    report.show("training:", rows(found))
