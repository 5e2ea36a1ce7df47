"""Measures what this machine does, as ratios of things run one after the other.

python -m launch.benchmark loader --data DATA     frames/s of the loader against the train step's
python -m launch.benchmark decode --checkpoint RUN     programs compiled, and time a clip
python -m launch.benchmark import                 time and memory of importing a 420 M checkpoint
"""

import contextlib
import dataclasses
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from launch import cli
from launch.make_random_checkpoint import Args as MakeArgs
from launch.make_random_checkpoint import make
from launch.train import load_config
from magnet_jax import (
    convert,
    data,
    decode,
    errors,
    pretrained,
    records,
    sampling,
    sharding,
    t5,
    train,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Frames a second: the loader alone, and a train step alone on batches in memory."""

    data: Path
    """A data set of `python -m tokenization.job`."""
    config: str = "demo"
    """Config of the train step."""
    batches: int = 200
    """Batches to load."""
    steps: int = 20
    """Steps to run, after those that compile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Seconds a clip for several batch sizes, and how many programs were compiled."""

    checkpoint: Path
    """Folder of a training run."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Clips at once."""
    repeats: int = 3
    """Calls timed a batch size, after the one that compiles; their settings all differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Time and memory of importing an AudioCraft checkpoint of full size with random weights, its
    codec and text encoder included; then of making a clip with it."""

    folder: Path | None = None
    """Where to put checkpoint and import (about 4 GB); a temporary folder by default."""
    size: Literal["small", "medium"] = "small"
    dtype: Literal["float16", "float32"] = "float32"


def loader(args: Loader) -> None:
    config = load_config(args.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(args.data)))
    spec = records.read_codec_spec(args.data)
    t5_config, t5_params, tokenizer = t5.load(config.text.source)
    train.check_fit(config, spec, t5_config)
    frames = sampling.segment_frames(config, spec)
    batches = data.make_train_iterator(
        config.data,
        frames=frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=tokenizer,
        max_tokens=config.text.max_tokens,
        seed=config.seed,
    )
    next(batches)
    started = time.perf_counter()
    for _ in range(args.batches):
        batch = next(batches)
    loaded = args.batches * config.data.batch_size * frames / (time.perf_counter() - started)

    mesh = sharding.make_mesh(config.mesh)
    _, shardings = train.state_shardings(config, t5_params, mesh)
    init = functools.partial(train.init_state, config)
    state = jax.jit(init, out_shardings=shardings)(t5_params)
    frozen_text = None if config.text.finetune else t5_params
    batch = train.to_devices(batch, mesh)
    static = dict(
        config=config, t5_config=t5_config, dtype=sampling.compute_dtype(config), mesh=mesh
    )
    # As in training, each codebook has its turn; the first round compiles both programs.
    num_codebooks = config.model.num_codebooks
    for step in range(num_codebooks + args.steps):
        if step == num_codebooks:
            jax.block_until_ready(state)
            started = time.perf_counter()
        stage = step % num_codebooks
        state, _ = train.train_step(
            state, frozen_text, batch, jax.random.key(0), stage, local=stage > 0, **static
        )
    jax.block_until_ready(state)
    trained = args.steps * config.data.batch_size * frames / (time.perf_counter() - started)
    print(f"loader      {loaded:12,.0f} frames/s")
    print(f"train step  {trained:12,.0f} frames/s")
    print(f"ratio       {loaded / trained:12.1f}")


def decoding(args: Decode) -> None:
    loaded = pretrained.load(args.checkpoint)
    config = loaded.config
    frames = sampling.segment_frames(config, loaded.codec)
    decode.generate.clear_cache()
    for size in args.batch_sizes:
        seconds = []
        for repeat in range(args.repeats + 1):
            started = time.perf_counter()
            sampling.generate_codes(
                loaded,
                [f"text {repeat}"] * size,
                num_frames=frames,
                # Other numbers, not other shapes: no new program.
                decoding=dataclasses.replace(config.decode, max_guidance=10.0 - repeat),
                seed=repeat,
            )
            seconds.append(time.perf_counter() - started)
        clip = frames / loaded.codec.frame_rate
        best = min(seconds[1:])
        print(
            f"batch {size}: first call {seconds[0]:.2f} s, then {best:.3f} s: "
            f"{size * clip / best:.1f} s of music a second"
        )
    programs = decode.generate._cache_size()
    print(f"{programs} programs for {len(args.batch_sizes)} shapes")


def importing(args: Import) -> None:
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source, out = folder / "audiocraft", folder / "imported"
        make(MakeArgs(out=source, size=args.size, dtype=args.dtype))
        model, _ = pretrained.read_defaults(source)
        count = sum(map(math.prod, convert.lm_shapes(model).values()))
        seconds, peak = _run("launch.import_audiocraft", "--source", source, "--out", out)
        print(
            f"{count / 1e6:.0f} M parameters, {args.dtype}: imported in {seconds:.1f} s, peak "
            f"memory {peak / 1e9:.2f} GB, {peak / (4 * count):.2f} times the float32 parameters"
        )
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
    return time.perf_counter() - started, usage.ru_maxrss * 1024


Command = (
    Annotated[Loader, tyro.conf.subcommand("loader")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


def main() -> None:
    args = cli.parse(Command, prog="python -m launch.benchmark", description=__doc__)
    {Loader: loader, Decode: decoding, Import: importing}[type(args)](args)


if __name__ == "__main__":
    with errors.reported():
        main()
