"""Time to compile the program of a model of full size: from nothing, and from the disk's cache."""

import dataclasses
import tempfile
import time
from typing import Literal

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from launch.benchmark import models
from magnet_jax.checkpoints import pretrained
from magnet_jax.decode import canvas, placement, sampler, sampling, tokens_of_text
from magnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds from texts to a compiled program, text encoder and codec included."""

    model: Literal["small", "medium"] = "small"
    """A model of a published size with random weights, made in memory."""
    seconds: float = 10.0
    """Length of a clip."""
    batch: int = 1
    """Clips at once."""


def measure(args: Args) -> None:
    """Compiles the same program twice, with a cache folder that is empty at first."""
    if not 0 < args.seconds <= 600 or args.batch < 1:
        raise UserError("--seconds must be positive, and at most 600, and --batch at least 1")
    if not jax.config.jax_enable_compilation_cache:
        raise UserError("JAX_ENABLE_COMPILATION_CACHE is off, and the cache is what is measured")
    with models.opened(None, args.model) as (name, loaded), tempfile.TemporaryDirectory() as folder:
        decoder = pretrained.load_decoder(loaded, name)
        loaded = placement.prepare(loaded)
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # or the folder that is open already goes on to be used
        print(f"{name}; {args.batch} x {args.seconds:g} s on {jax.devices()[0].device_kind}")
        for what in ("from nothing", "from the cache"):
            jax.clear_caches()
            started = time.perf_counter()
            num_frames = round(args.seconds * loaded.codec.frame_rate)
            batch = sampling.Batch(
                text=tokens_of_text.tokenize_texts(loaded, ["a text"] * args.batch),
                sample_B=np.arange(args.batch),
                seed=0,
                canvas=canvas.blank(args.batch, loaded.config.model.num_codebooks, num_frames),
                decoding=loaded.config.decode,
                decoder=decoder,
            )
            inputs, made_for = sampling.make_program(
                loaded, batch, placement.Execution(), platform=jax.default_backend(), mesh=None
            )
            sampler.sample.lower(inputs, sampler=made_for).compile()
            print(f"{what:15} {time.perf_counter() - started:6.1f} s", flush=True)
