"""What each exact saving of decoding is worth here: the same clips with it and without it."""

import dataclasses
import time
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from launch import make_random_checkpoint as random_checkpoint
from launch.benchmark import models
from magnet_jax import programs
from magnet_jax.decode import magnet, placement, sampling
from magnet_jax.errors import UserError

NAMES = tuple(field.name for field in dataclasses.fields(magnet.Savings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds from texts to tokens with all savings, and with each of them left out."""

    model: Literal["small", "medium"] = "small"
    """A model of a published size with random weights, made in memory."""
    seconds: float = 10.0
    """Length of a clip."""
    batch: int = 1
    """Clips at once."""
    steps: tuple[int, ...] = (3, 2, 2, 2)
    """Decoding steps of each codebook. Of few steps the last ones are a larger part."""
    repeats: int = 3
    """Calls timed of each, of which the fastest counts."""


def measure(args: Args) -> None:
    """Times all in turns, so that a busy moment hits every one."""
    if not 0 < args.seconds <= 600 or args.batch < 1 or args.repeats < 1:
        raise UserError("--seconds (at most 600), --batch and --repeats must be positive")
    if len(args.steps) != random_checkpoint.NUM_CODEBOOKS or min(args.steps) < 1:
        raise UserError(f"--steps: give {random_checkpoint.NUM_CODEBOOKS} numbers of at least 1")
    with models.opened(None, args.model) as (name, loaded):
        loaded = placement.prepare(loaded)
        print(f"{name}; {args.batch} x {args.seconds:g} s on {jax.devices()[0].device_kind}")
        decoding = dataclasses.replace(loaded.config.decode, steps=args.steps)
        kinds = {"all": magnet.ALL_SAVINGS} | {
            f"without {n}": dataclasses.replace(magnet.ALL_SAVINGS, **{n: False}) for n in NAMES
        }

        def call(savings: magnet.Savings, seed: int) -> float:
            compiling, started = programs.seconds(), time.perf_counter()
            sampling.generate(
                loaded,
                ["a slow waltz on the piano"] * args.batch,
                num_frames=round(args.seconds * loaded.codec.frame_rate),
                decoding=decoding,
                seed=seed,
                execution=placement.Execution(savings=savings),
            )
            return time.perf_counter() - started - (programs.seconds() - compiling)

        calls = [
            [call(savings, seed) for savings in kinds.values()]
            for seed in tqdm(range(args.repeats + 1), "calls", leave=False)
        ]
    fastest = np.min(calls[1:], axis=0)  # (the first ones of a program are slower)
    for kind, seconds in zip(kinds, fastest):
        print(f"{kind:22} {seconds:8.2f} s  {seconds / fastest[0]:6.3f}")
