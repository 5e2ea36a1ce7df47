"""How near training comes to the machine's peak, with the loader and everything else of a run."""

import dataclasses
import tempfile
import time
from pathlib import Path

from launch.benchmark import report
from launch.benchmark.options import Train
from launch.benchmark.peaks import jax_peak
from launch.train import load_config
from magnet_jax.arguments import check_fields
from magnet_jax.config import RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.data import records
from magnet_jax.decode import sampling
from magnet_jax.model import precision, sharding
from magnet_jax.train import flops, loop, plan, steps, watch


def _config(args: Train, out: Path) -> RunConfig:
    config = load_config(args.config)
    model, data = config.model, dataclasses.replace(config.data, path=str(args.data))
    if args.width is not None:
        model = dataclasses.replace(model, width=args.width, num_heads=max(1, args.width // 64))
    if args.layers is not None:
        model = dataclasses.replace(model, num_layers=args.layers)
    if args.seconds is not None:
        data = dataclasses.replace(data, segment_seconds=args.seconds)
    if args.batch_size is not None:
        data = dataclasses.replace(data, batch_size=args.batch_size)
    if args.compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=args.compute_dtype)
    return dataclasses.replace(
        config, model=model, data=data, out=str(out), steps=2 * args.steps,
        log_every=args.steps, eval_every=0, sample_every=0, save_every=10 * args.steps,
    )  # fmt: skip


def compile_seconds(config: RunConfig, depth: int) -> float:
    """To compile the two programs of a step of a model with `depth` layers."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=depth))
    spec = records.read_codec_spec(config.data.path)
    t5_config = t5_files.published_config(config.text.source)
    frames = sampling.segment_frames(config, spec)
    mesh = sharding.make_mesh(config.mesh)
    settings = steps.make_settings(config, t5_config, precision.compute_dtype(config), frames, mesh)
    seconds = 0.0
    for stage in (0, 1):
        lowered = plan.lower(
            settings, config.data.batch_size, frames, config.text.max_tokens, stage
        )
        started = time.perf_counter()
        lowered.compile()
        seconds += time.perf_counter() - started
    return seconds


def measure(args: Train) -> None:
    check_fields(args, "--")
    report.check_parent("--json", args.json)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(args, Path(folder) / "run")
        peaks = [jax_peak(precision.compute_dtype(config))]
        loop.train(config)
        # The peak before and after: the machine may have others on it.
        peaks.append(jax_peak(precision.compute_dtype(config)))
        line = watch.read_scalars(Path(config.out))[-1]
    spec = records.read_codec_spec(args.data)
    frames = sampling.segment_frames(config, spec)
    a_clip = flops.training_flops(
        config.model, frames, config.text.max_tokens, config.stage_weights
    )
    rate = line["speed/frames_per_second"] / frames * a_clip
    depth = config.model.num_layers
    compiled = {layers: compile_seconds(config, layers) for layers in (depth, 4 * depth)}
    found = {
        "flops_per_second": rate,
        "matmul_peak": max(peaks),
        "share_of_peak": rate / max(peaks),
        "frames_per_second": line["speed/frames_per_second"],
        "wait_for_data_share": line["speed/wait_for_data_share"],
        "compile_seconds": compiled,
    }
    report.write_json(args.json, found)
    print(f"training     {rate / 1e9:8.1f} GFLOP/s of the model, loader included")
    print(f"matmul peak  {max(peaks) / 1e9:8.1f} GFLOP/s")
    waited = found["wait_for_data_share"]
    print(f"share        {rate / max(peaks):8.1%}; waiting for data {waited:.1%}")
    for layers, seconds in compiled.items():
        print(f"compiled     {seconds:8.1f} s for {layers} layers, both programs")
