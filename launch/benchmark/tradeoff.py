"""What a clip costs by length of the prompt, decoding steps and rescoring."""

import dataclasses
import functools
import math
import shlex
from typing import NamedTuple

import jax
from tqdm import tqdm

from launch.benchmark import models, report
from launch.benchmark.options import Tradeoff
from launch.benchmark.peaks import seconds_of
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import DecodeConfig, HybridConfig, SamplingConfig, decode_of
from magnet_jax.decode import placement, sampling
from magnet_jax.errors import UserError
from magnet_jax.model import precision

PROMPT_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)


class Point(NamedTuple):
    """One way to make a clip."""

    kind: str
    value: float | int | str
    sampling: SamplingConfig
    rescored: bool

    def options(self, args: Tradeoff) -> str:
        """What makes `launch.sample` do it."""
        hybrid = isinstance(self.sampling, HybridConfig)
        steps = decode_of(self.sampling).steps
        words = ["--decode.steps", *map(str, steps)]
        words += ["--prompt-seconds", str(self.sampling.prompt_seconds)] if hybrid else []
        if self.rescored:
            words += ["--rescorer", str(args.rescorer)]
            words += ["--rescorer-weight", str(args.rescorer_weight)]
            words += ["--rescorer-guidance", str(args.rescorer_guidance)]
        return shlex.join(words)


def points(args: Tradeoff, own: SamplingConfig, clip_seconds: float) -> list[Point]:
    """All that is to be measured; what is not varied is the model's `own`, without any prompt."""
    hybrid = isinstance(own, HybridConfig)
    decode: DecodeConfig = decode_of(own)

    def point(
        kind: str, value: float | str, steps: tuple[int, ...], prompt: float = 0.0, by: bool = False
    ) -> Point:
        settings = dataclasses.replace(decode, steps=steps)
        if hybrid:
            settings = dataclasses.replace(own, decode=settings, prompt_seconds=prompt)
        return Point(kind, value, settings, by)

    found, (first, *others) = [], decode.steps
    if hybrid:
        asked = PROMPT_SECONDS if args.prompt_seconds is None else args.prompt_seconds
        lengths = sorted({s for s in asked if s < clip_seconds} | {clip_seconds})
        found += [point("prompt", seconds, decode.steps, seconds) for seconds in lengths]
    for count in sorted(args.first_steps):
        found.append(point("first codebook", count, (count, *others)))
    for count in sorted(args.other_steps):
        found.append(point("other codebooks", count, (first, *(count for _ in others))))
    if args.rescorer is not None:
        found.append(point("rescoring", "without", decode.steps))
        found.append(point("rescoring", "with", decode.steps, by=True))
    return found


def check(args: Tradeoff) -> None:
    """Raises `UserError` for what can be known to fail before anything is loaded."""
    if args.checkpoint is None or args.model is not None:
        return
    model, own = pretrained.read_defaults(args.checkpoint)
    if not model.parallel:
        raise UserError(f"a model of kind {model.kind} has no decoding steps to vary")
    if model.kind != "hybrid" and args.prompt_seconds is not None:
        raise UserError(
            f"--prompt-seconds is for models of kind hybrid, and this is a {model.kind}: "
            "leave it out"
        )
    if not points(args, own, math.inf):  # whatever the clip's length is
        raise UserError("nothing is to be varied: give --first-steps, --other-steps or --rescorer")
    if args.rescorer is not None:
        sampling.check_rescored(own)


def measure(args: Tradeoff) -> None:
    """Measures, prints, and writes what `args` asks for."""
    check(args)
    with models.opened(args.checkpoint, args.model, "hybrid") as (name, loaded):
        config = loaded.config
        frames = models.clip_frames(loaded, args.seconds)
        clip_seconds = frames / loaded.codec.frame_rate
        loaded = placement.prepare(loaded)
        rescorer = None
        if args.rescorer is not None:
            rescorer = models.open_rescorer(
                args.rescorer, loaded, args.rescorer_guidance, args.rescorer_weight
            )
        print(
            f"{name}, {args.batch_size} clip(s) of {clip_seconds:g} s, "
            f"{precision.compute_dtype(config).name} on {jax.devices()[0].device_kind}; from text "
            f"to tokens, the fastest of {args.repeats}",
            flush=True,
        )
        beyond = [f"{s:g}" for s in args.prompt_seconds or () if s > clip_seconds]
        if beyond:
            print(f"left out, as longer than the clip: --prompt-seconds {' '.join(beyond)}")
        rows = []
        for point in tqdm(points(args, config.sampling, clip_seconds), "points", leave=False):
            seconds = latency_of(loaded, point, rescorer, frames, args)
            tqdm.write(f"{point.kind:<16}  {point.value!s:>8}  {seconds:8.3f} s")
            row = {"kind": point.kind, "value": point.value, "seconds": seconds}
            rows.append(row | {"options": point.options(args)})
            report.write_json(args.json, rows)  # at once, as a later point may fail


def latency_of(
    loaded: pretrained.Loaded,
    point: Point,
    rescorer: sampling.Rescorer | None,
    num_frames: int,
    args: Tradeoff,
) -> float:
    """Seconds from texts to tokens."""

    def generate(seed: int) -> None:
        sampling.generate(
            loaded,
            models.texts(args.batch_size),
            num_frames=num_frames,
            decoding=point.sampling,
            seed=seed,
            rescorer=rescorer if point.rescored else None,
        )

    generate(0)
    return min(seconds_of(functools.partial(generate, seed)) for seed in range(args.repeats))
