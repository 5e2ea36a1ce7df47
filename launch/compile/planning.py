"""What a run will take, without data."""

from launch.compile import report, targets, training
from launch.compile.options import Plan
from magnet_jax.model import sharding, transformer
from magnet_jax.train import flops, plan, steps


def rows(args: Plan) -> list[tuple[str, str]]:
    """What there is to say."""
    config = training.configured(args)
    target = targets.load(args.topology)
    settings, peak, frames = training.prepared(config, target)
    count = transformer.count_params(steps.state_shardings(settings)[0]["params"])
    batch = config.data.batch_size
    at_once = batch // sharding.num_rows(settings.mesh) // settings.num_parts
    a_step = batch * flops.training_flops(
        config.model, frames, config.text.max_tokens, config.stage_weights
    )
    sizes = ", ".join(f"{name} {count}" for name, count in settings.mesh.shape.items())
    lines = [
        ("mesh", sizes),
        ("trained parameters", report.size(count, "")),
        ("batch", f"{batch} clips of {config.data.segment_seconds:g} s, {frames} frames each"),
        ("at once", f"{at_once} clips a device, {settings.num_parts} parts"),
        (
            "parameters",
            f"{report.size(plan.param_bytes(settings))} a device, with average and optimizer",
        ),
        ("model FLOPs", f"{report.size(a_step, 'FLOP')} a step"),
    ]
    if target.chip is not None:
        if peak is not None:
            of = report.size(target.chip.device_bytes)
            lines.append(("memory", f"{report.size(peak)} of {of}, as compiled"))
        chips = settings.mesh.size / target.chip.devices
        seconds = a_step / (args.mfu * chips * target.chip.peak_flops)
        hours = seconds * config.steps / 3600
        lines += [
            ("step", f"{seconds:.3f} s at {args.mfu:.0%} of the peak"),
            (
                f"{config.steps:,} steps",
                f"{hours:,.0f} hours ({hours / 24:.1f} days), {hours * chips:,.0f} chip-hours",
            ),
        ]
    return lines


def run(args: Plan) -> None:
    report.show(f"{args.config} on {args.topology}", rows(args))
