"""What rescoring adds to the time of a call, beside what the rescorer costs by itself."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from launch.benchmark import models
from launch.benchmark.peaks import seconds_of
from magnet_jax.decode import sampling
from magnet_jax.decode.sampling import Rescorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescoring:
    """What a second model costs; times in seconds a call."""

    batch_size: int
    passes: int  # of the rescorer
    without: float  # from texts to tokens
    rescored: float  # the same with the rescorer
    alone: float  # the rescorer's passes and its text encoder, in a program of their own

    @property
    def extra(self) -> float:
        return self.rescored - self.without

    @property
    def ratio(self) -> float:
        """The extra time over the rescorer's own."""
        return self.extra / self.alone

    def figures(self) -> dict[str, float]:
        """All that was measured, and what follows from it."""
        return dataclasses.asdict(self) | {"extra": self.extra, "ratio": self.ratio}

    def line(self) -> str:
        return (
            f"rescoring, batch {self.batch_size}: {self.rescored:.3f} s to tokens, "
            f"{self.extra:.3f} s more than without; the rescorer's {self.passes} passes alone take "
            f"{self.alone:.3f} s: {self.ratio:.2f} of them"
        )


def measure(job: models.Job, rescorer: Rescorer, batch: int, repeats: int) -> Rescoring:
    """Times a call with the rescorer, one without, and the rescorer alone, in turns."""
    texts = rescorer.tokenize(models.texts(batch), None)
    # A codebook's last step is not rescored: nothing reads its scores.
    stages = [np.full(steps - 1, stage, np.int32) for stage, steps in enumerate(job.decoding.steps)]
    codes_BKT = job.tokens(batch, 0)
    # Over as many frames as the program computes, which rounds lengths up.
    config = job.loaded.config
    span = job.decoding.span_length or config.model.span_length
    model = dataclasses.replace(config.model, span_length=span)
    usual = sampling.segment_frames(config, job.loaded.codec)
    _, usual = sampling.decoded_frames(model, job.decoding, usual)
    more = sampling.frame_bucket(job.num_frames, usual, span) - job.num_frames
    codes_BKT = np.pad(codes_BKT, ((0, 0), (0, 0), (0, more)), mode="edge")
    alone = functools.partial(
        _passes, rescorer.params, texts, codes_BKT, stages[0], np.concatenate(stages[1:]),
        read=rescorer.read,
    )  # fmt: skip
    calls = {
        "without": lambda repeat: job.tokens(batch, repeat),
        "with": lambda repeat: job.tokens(batch, repeat, rescorer=rescorer),
        "alone": lambda repeat: jax.block_until_ready(alone()),
    }
    for call in calls.values():  # compiles
        call(0)
    seconds = {name: [] for name in calls}
    for repeat in tqdm(range(repeats), "rescoring", leave=False):
        for name, call in calls.items():
            seconds[name].append(seconds_of(functools.partial(call, repeat)))
    return Rescoring(
        batch_size=batch,
        passes=sum(map(len, stages)),
        without=min(seconds["without"]),
        rescored=min(seconds["with"]),
        alone=min(seconds["alone"]),
    )


@functools.partial(jax.jit, static_argnames="read")
def _passes(
    params: Any,
    texts: Any,
    codes_BKT: jax.Array,
    first: jax.Array,
    others: jax.Array,
    *,
    read: Callable[..., Callable[..., jax.Array]],
) -> jax.Array:
    """The rescorer's passes over a clip: `first` and `others` name the codebook of each."""
    probabilities = read(params, texts, num_frames=codes_BKT.shape[-1], length=None)
    hidden_BT = jnp.ones_like(codes_BKT[:, 0], bool)

    def one(codes_BKT, stage, local):
        prob_BT = probabilities(codes_BKT, hidden_BT, stage, local=local)
        # No probability is above 1, but each pass has to wait for the one before.
        return jnp.where(prob_BT[:, None] > 2, 0, codes_BKT), None

    for stages, local in ((first, False), (others, True)):
        codes_BKT, _ = jax.lax.scan(functools.partial(one, local=local), codes_BKT, stages)
    return codes_BKT
