"""Writes a trained model for others: an AudioCraft folder and safetensors, checked bit for bit.

python -m launch.export --checkpoint RUN --out DIR
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from magnet_jax import cli
from magnet_jax.errors import UserError, reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Exports a training run, or exports an export again."""

    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="MODEL")]
    """The model: the folder of a training run, or of an earlier export or import, on disk or
    gs://."""
    out: Path
    """Folder to write. It appears when everything in it is written and checked."""
    weights: Literal["ema", "raw"] | None = None
    """Parameters of a run to write: ema are the averaged ones, which is the default, and raw are
    those of the last step."""
    step: int | None = None
    """Checkpoint of a run to export. By default it is the newest."""
    license: str | None = None
    """License of the weights, for the model card, such as cc-by-nc-4.0. By default it is the one
    that an imported model came with."""
    about: Path | None = None
    """Markdown file to put into the model card, about data, scores and limits. That of an earlier
    export is not taken over."""
    t5_name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Published name, such as t5-base, of a text encoder that the run read from a folder.
    AudioCraft finds text encoders by published names only."""
    audiocraft: bool = True
    """Write the AudioCraft pair as well as safetensors."""
    half: bool = False
    """Round the weights to float16, which halves the file of safetensors."""
    verify: bool = False
    """Run what was written in PyTorch and compare its logits with those of the model in JAX."""
    overwrite: bool = False
    """Replace an earlier export."""
    adapter_only: bool = False
    """Write the adapters of a run with --lora.rank alone, not merged into the model."""


def _read_about(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--about {path}: cannot be read as text ({error})") from None


def check(args: Args) -> None:
    """Raises `UserError` for options that do not go with --adapter-only."""
    if args.adapter_only and args.half:
        raise UserError("--half is not for --adapter-only: adapters are small")
    if args.adapter_only and (args.about or args.license):
        raise UserError("--about and --license are of a model card, which --adapter-only has not")
    if args.adapter_only and (args.verify or args.t5_name or not args.audiocraft):
        raise UserError(
            "--verify, --t5-name and --no-audiocraft are of a whole model: leave them out with "
            "--adapter-only"
        )


def main(args: Args) -> None:
    check(args)
    about = "" if args.about is None else _read_about(args.about)
    # JAX is slow to load
    from magnet_jax.checkpoints import adapters, export, pretrained
    from magnet_jax.io import files

    if args.adapter_only:
        factors, config, lineage = pretrained.read_adapters(
            args.checkpoint, args.weights, args.step
        )
        adapters.save_adapter(
            args.out, factors, config.lora, config.model, lineage, overwrite=args.overwrite
        )
        print(f"wrote {args.out}: adapters of rank {config.lora.rank} for {lineage['base']}")
        return
    export.prepare_out(args.out, Path(args.checkpoint), args.overwrite)
    with files.noting_rounded() as notes:
        loaded = pretrained.load(args.checkpoint, weights=args.weights, step=args.step)
    options = export.Options(
        license=args.license,
        t5_name=args.t5_name,
        audiocraft=args.audiocraft,
        half=args.half,
        about=about,
        logits=args.verify,
    )
    lines = export.export_model(loaded, args.out, options, str(args.checkpoint), rounded=notes)
    lineage = ", ".join(f"{name} {value}" for name, value in loaded.lineage.items())
    print(f"wrote {args.out} ({lineage})")
    print(*lines, sep="\n")


if __name__ == "__main__":
    with reported():
        main(cli.parse(Args, prog="python -m launch.export", description=__doc__))
