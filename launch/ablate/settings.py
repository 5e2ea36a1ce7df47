"""What a study is asked for."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from magnet_jax.arguments import Between, Count, Seconds, Seed, check_fields
from magnet_jax.config import RescoreConfig
from magnet_jax.errors import UserError
from magnet_jax.io import bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    out: Path = Path("runs/ablations")
    """Folder of all studies: they share runs and cells that are alike."""
    prompts: Path = Path("data/recipe/test")
    """Folder of real clips with sidecars: captions to generate from, and the reference."""
    clips: Annotated[int, Between(2, 1_000_000)] = 64
    """Clips a cell: so many prompts, from the beginning of the list."""
    probe: Literal["off"] | Path | None = Path("data/recipe/valid")
    """Folder of further real clips, for launch.evaluate's probes of the instrument; off for
    none."""
    probe_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """What the second probe hears them through, by default the codec of the tokens."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of training and sampling, or of sampling alone; more may be added later."""
    seconds: Seconds | None = None
    """Length of a clip, where models are trained in training too; by default the model's own."""
    batch_size: Count = 8
    """Clips generated at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Common):
    data: Path = Path("data/tokens")
    """Folder that tokenization.job wrote."""
    text: str = "data/text"
    """Text encoder, as for --text.source of launch.train; it is trained along."""
    train_steps: Annotated[int, Between(1, 10**9)] = 1000
    """Steps of each model; the learning rate has fallen to 0 after them."""
    train_options: str = ""
    """Further options of launch.train for all models, as --train-options="--model.width 64"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Common):
    checkpoint: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A MAGNeT or a hybrid, as for launch.sample."""
    step: int | None = None
    """Of a run: the checkpoint to use, by default the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Trained):
    """Trains with spans of 1, 3 and 5 frames, with restricted and with full context: Table 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(Given):
    """Samples with guidance 1 to 1, 3 to 3, 10 to 1 and 20 to 1: Table 6."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Given):
    """Samples with 5 to 100 steps of the first codebook, 1 to 20 of each other: Fig. 7."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescoring(Trained):
    """Trains a MAGNeT and a hybrid, and lets the hybrid's autoregressive half rescore: Table 3."""

    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(Trained):
    """Trains a hybrid, and lets it make beginnings of several lengths: Fig. 2c."""

    prompt_seconds: tuple[float, ...] | None = None
    """Of the beginnings, by default 0, 0.5, 1 and 2; the whole clip comes in addition."""


Command = (
    Annotated[Spans, tyro.conf.subcommand("spans", description=Spans.__doc__)]
    | Annotated[Guidance, tyro.conf.subcommand("guidance", description=Guidance.__doc__)]
    | Annotated[Steps, tyro.conf.subcommand("steps", description=Steps.__doc__)]
    | Annotated[Rescoring, tyro.conf.subcommand("rescoring", description=Rescoring.__doc__)]
    | Annotated[Hybrid, tyro.conf.subcommand("hybrid", description=Hybrid.__doc__)]
)


def checked(args: Common) -> Common:
    """The arguments, with None for a probe that is off.

    Raises `UserError` for what does not go together.
    """
    check_fields(args, "--")
    if args.probe == "off":
        args = dataclasses.replace(args, probe=None)
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: give one at least, and each once")
    if args.probe_codec is not None and args.probe is None:
        raise UserError("--probe-codec goes with --probe FOLDER")
    if bucket.is_url(args.out):
        raise UserError(f"--out {args.out}: needs a folder on disk; copy it from there")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the studies need a folder")
    if not args.prompts.is_dir():
        raise UserError(
            f"--prompts {args.prompts}: no such folder; launch.recipe makes one, see docs/recipe.md"
        )
    return args
