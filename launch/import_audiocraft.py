"""Brings an AudioCraft checkpoint in: MAGNeT, Audio-MAGNeT, MusicGen, AudioGen or an EnCodec.

python -m launch.import_audiocraft --checkpoint facebook/magnet-small-10secs --out DIR

The folder that it writes holds all that sampling needs, the text encoder and the codec included,
and works without a network: launch.sample, launch.export and the Python API take it. A folder with
compression_state_dict.bin alone becomes a codec for tokenization.job.
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Annotated

import tyro

from magnet_jax import cli
from magnet_jax.convert import audiocraft
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE
from magnet_jax.convert.codec_rules import codec_folder_from_audiocraft
from magnet_jax.errors import UserError, reported
from magnet_jax.io import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Imports an AudioCraft checkpoint."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """The checkpoint: a folder with state_dict.bin and compression_state_dict.bin, or with the
    latter alone, or a hub id."""
    out: Path
    """Folder to write. It appears when everything in it is written and checked."""
    text_encoder: str | None = None
    """Folder of the T5 that the checkpoint names (config.json, tokenizer.json, model.safetensors),
    where the hub is out of reach."""
    codec: str | None = None
    """Folder of the EnCodec that the checkpoint points to, where the hub is out of reach."""
    license: str | None = None
    """License of the weights. By default it is the one in the README.md beside them."""
    verify: bool = False
    """Compare the logits of the checkpoint's tensors in PyTorch with those in JAX."""
    overwrite: bool = False
    """Replace an earlier import."""


def stated_license(folder: Path) -> str | None:
    """The license in the header of a model card."""
    try:
        text = (folder / "README.md").read_text(errors="replace")
    except OSError:
        return None
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^license: *[\"']?([\w.-]+)", header[1], re.MULTILINE)
    return found[1] if found else None


def import_codec(path: Path, args: Args) -> None:
    """Writes a codec that lies by itself as a transformers EncodecModel folder.

    Raises `UserError` for options that are of a whole model.
    """
    for name in ("text_encoder", "codec", "license", "verify"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} is of a whole model, and {path.parent} holds a codec "
                "alone: leave it out"
            )
    out = args.out
    files.put_back(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        config = out / "config.json"
        if not config.is_file() or files.read_object(config, "").get("model_type") != "encodec":
            raise UserError(f"{out}: exists and is not a codec; give another --out")
        if not args.overwrite:
            raise UserError(f"{out}: exists; add --overwrite to replace it, or give another --out")
        files.check_holds_only(out, {"config.json", "model.safetensors"})
        if out.resolve() in path.resolve().parents:
            raise UserError(f"{out}: holds the codec itself; give another --out")
    with files.noting_rounded() as notes:
        file = audiocraft.read_file(path)
    if file.pretrained:
        raise UserError(
            f"{path}: points to {file.pretrained} and holds no codec; name that instead"
        )
    with files.replacing(out) as folder:
        codec_folder_from_audiocraft(file.tensors, file.xp_cfg, folder, str(path))
    print(f"wrote the codec {out}, for tokenization.job --codec", *notes, sep="\n")


def main(args: Args) -> None:
    # JAX is slow to load
    from magnet_jax.checkpoints import export, pretrained

    started = time.perf_counter()
    source = Path(args.checkpoint)
    if (source / CODEC_FILE).exists() and not (source / LM_FILE).exists():
        import_codec(source / CODEC_FILE, args)
        return
    export.prepare_out(args.out, source, args.overwrite)
    folder = pretrained.locate(args.checkpoint)
    if not pretrained.is_audiocraft(folder):
        raise UserError(
            f"{args.checkpoint}: not an AudioCraft checkpoint but a model that "
            "needs no import: launch.sample and launch.export take it as it is"
        )
    with files.noting_rounded() as notes:
        loaded = pretrained.read_audiocraft(
            folder, args.checkpoint, text_encoder=args.text_encoder, codec=args.codec
        )
    options = export.Options(
        license=args.license or stated_license(folder),
        audiocraft=False,
        offline=True,
        logits=args.verify,
    )
    lines = export.export_model(loaded, args.out, options, args.checkpoint, rounded=notes)
    print(f"wrote {args.out} in {time.perf_counter() - started:.1f} s")
    print(*lines, sep="\n")


if __name__ == "__main__":
    with reported():
        main(cli.parse(Args, prog="python -m launch.import_audiocraft", description=__doc__))
