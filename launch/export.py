"""Writes a trained model for others: an AudioCraft folder and safetensors, checked bit for bit.

python -m launch.export --checkpoint RUN --out DIR
"""

import dataclasses
import importlib.metadata
import shutil
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from safetensors import SafetensorError

from launch import cli
from magnet_jax import codec as codecs
from magnet_jax import convert, convert_codec, t5
from magnet_jax.bundle import (
    Bundle,
    is_export,
    model_card,
    read_safetensors,
    write_safetensors,
)
from magnet_jax.checkpoint import Loaded, load_for_inference
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.errors import UserError, reported
from magnet_jax.hub import is_hub_id

TEXT_FOLDER = "text_encoder"
CODEC_FOLDER = "codec"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Exports a training run."""

    checkpoint: Path
    """Folder of the training run, or of an earlier export."""
    out: Path
    """Folder to write; it appears when everything in it is written and checked."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged parameters, or those of the last step."""
    step: int | None = None
    """Checkpoint to export; the newest by default."""
    license: str = "unspecified"
    """License of the weights, for the model card, such as cc-by-nc-4.0."""
    t5_name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Published name, such as t5-base, of a text encoder that the run read from a folder:
    AudioCraft finds text encoders by published names only."""
    audiocraft: bool = True
    """Write the AudioCraft pair as well; without it the model is written as safetensors alone."""
    overwrite: bool = False
    """Replace an earlier export."""


def text_encoder_name(loaded: Loaded, t5_name: str | None) -> str:
    """What xp.cfg calls the text encoder: its published name, or `TEXT_FOLDER`.

    A fine-tuned encoder is never called by the published name: AudioCraft would then load the
    original weights, and the model would not hear the text as it was trained to.

    Raises `UserError` where `t5_name` cannot be the run's encoder.
    """
    source = loaded.config.text.source.removeprefix("google-t5/")
    if t5_name is None:
        name = source
    elif loaded.config.text.finetune:
        raise UserError(f"--t5-name {t5_name}: the run trained its text encoder; leave it out")
    elif t5_name not in convert.PUBLISHED_T5_WIDTHS:
        names = ", ".join(convert.PUBLISHED_T5_WIDTHS)
        raise UserError(f"--t5-name {t5_name}: AudioCraft knows {names}")
    else:
        name = t5_name
    if loaded.config.text.finetune or name not in convert.PUBLISHED_T5_WIDTHS:
        return TEXT_FOLDER
    width = convert.PUBLISHED_T5_WIDTHS[name]
    if width != loaded.config.model.text_width:
        raise UserError(
            f"{name} is {width} wide, but the run's text encoder "
            f"{loaded.config.model.text_width}: they cannot be the same"
        )
    return name


def export_model(loaded: Loaded, lineage: dict, args: Args) -> str:
    """Writes and checks the export; returns one line on what was checked.

    Everything is made in a folder beside `args.out` that takes its name at the end.

    Raises:
      UserError: the model cannot be expressed, or the folder cannot be written.
    """
    out = args.out.absolute()
    codec = dataclasses.replace(loaded.codec, source=loaded.codec_source)
    if Path(codec.source).exists() or codec.source == EMBEDDED:
        found = codecs.load_codec(codec.source, num_codebooks=codec.num_codebooks).spec
        codecs.check_same_codec(found, codec, str(args.checkpoint))
    elif codec.source not in codecs.ENCODEC_WEIGHTS and not (
        "/" in codec.source and is_hub_id(codec.source)
    ):
        raise UserError(f"codec {codec.source}: no such folder or file; put it there again")
    encoder = text_encoder_name(loaded, args.t5_name)
    partial, old = _beside(out, "partial"), _beside(out, "old")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        bundle = _write(loaded, lineage, args, partial, codec, encoder)
        line = verify(partial, bundle, loaded, codec, encoder, args.audiocraft)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except (OSError, SafetensorError) as error:  # a full disk, a folder of someone else's
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return line


def _beside(out: Path, kind: str) -> Path:
    """Where the new export ('partial') and the one it replaces ('old') lie meanwhile."""
    return out.absolute().with_name(f".{out.absolute().name}.{kind}")


def prepare_out(args: Args) -> None:
    """Puts back an export that a kill left under its other name, and checks that `out` may be used.

    Raises `UserError` unless `args.out` is free, or an earlier export that may be replaced.
    """
    out, old = args.out, _beside(args.out, "old")
    if not out.exists() and old.exists():
        old.rename(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file() or not (out / "model.safetensors").is_file():
        raise UserError(f"{out}: exists and is not an export; give another --out")
    if not args.overwrite:
        raise UserError(f"{out}: exists; add --overwrite to replace it, or give another --out")
    if out.resolve() in (args.checkpoint.resolve(), *args.checkpoint.resolve().parents):
        raise UserError(f"{out}: holds the training run itself; give another --out")


def _write(
    loaded: Loaded, lineage: dict, args: Args, folder: Path, codec: CodecSpec, encoder: str
) -> Bundle:
    """Writes every file of the export into `folder`; `codec.source` is where the codec lies now."""
    config = loaded.config
    text = dataclasses.replace(config.text, source=encoder)
    if encoder == TEXT_FOLDER:
        t5.save(folder / TEXT_FOLDER, loaded.t5_config, loaded.t5_params, loaded.tokenizer)
    # What is neither shipped with the package nor published travels along.
    codec_path, shipped_codec = Path(codec.source), codec
    if codec_path.is_dir():
        (folder / CODEC_FOLDER).mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(codec_path / name, folder / CODEC_FOLDER / name)
        shipped_codec = dataclasses.replace(codec, source=CODEC_FOLDER)
    elif codec_path.is_file():
        (folder / CODEC_FOLDER).mkdir()
        shutil.copyfile(codec_path, folder / CODEC_FOLDER / codec_path.name)
        shipped_codec = dataclasses.replace(codec, source=f"{CODEC_FOLDER}/{codec_path.name}")
    bundle = Bundle(
        model=config.model,
        text=text,
        codec=shipped_codec,
        decode=config.decode,
        segment_seconds=config.data.segment_seconds,
        lineage=lineage,
        params=loaded.params,
    )
    seconds = None
    if args.audiocraft:
        xp_cfg = convert.make_xp_cfg(config, codec, encoder)
        convert.write_audiocraft(folder, loaded.params["lm"], config.model, xp_cfg, codec)
        seconds = convert.segment_seconds(config)
    write_safetensors(folder, bundle)
    card = folder / "README.md"
    card.write_text(model_card(bundle, args.license, encoder, seconds))
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(card, path)  # safetensors makes files that nobody else may read
    return bundle


def verify(
    folder: Path, bundle: Bundle, loaded: Loaded, codec: CodecSpec, encoder: str, audiocraft: bool
) -> str:
    """Reads everything back from `folder` and compares it bit for bit; one line on what it did.

    Raises `RuntimeError`, naming what differs: that would be a bug or a failing disk.
    """
    params = convert.flatten(bundle.params)
    _require_equal("model.safetensors", convert.flatten(read_safetensors(folder).params), params)
    count = len(params)
    if audiocraft:
        model, lm_params, _ = convert.read_audiocraft(folder)
        if model != bundle.model:
            raise RuntimeError(f"{convert.LM_FILE}: xp.cfg describes {model}, not {bundle.model}")
        lm = convert.flatten(bundle.params["lm"])
        _require_equal(convert.LM_FILE, convert.flatten(lm_params), lm)
        count += len(lm)
        content = convert.read_checkpoint(folder / convert.CODEC_FILE)
        if pointer := convert_codec.codec_pointer(codec):
            if content.get("pretrained") != pointer:
                raise RuntimeError(f"{convert.CODEC_FILE}: does not point to {pointer}")
        else:
            settings, tensors = convert_codec.read_codec_folder(convert_codec.codec_folder(codec))
            k = codec.num_codebooks
            back = convert_codec.codec_from_audiocraft(content["best_state"], settings, k)
            _require_equal(convert.CODEC_FILE, back, {name: tensors[name] for name in back})
            count += len(back)
    if encoder == TEXT_FOLDER:
        _, t5_params, _ = t5.load(str(folder / TEXT_FOLDER))
        expected = convert.flatten(loaded.t5_params)
        _require_equal(TEXT_FOLDER, convert.flatten(t5_params), expected)
        count += len(expected)
    return f"checked: {count} tensors read back, every bit equal"


def _require_equal(what: str, found: dict, expected: dict) -> None:
    differing = found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            differing.add(name)
    if differing:
        raise RuntimeError(f"{what}: what was read back differs: {', '.join(sorted(differing))}")


def main(args: Args) -> None:
    prepare_out(args)
    loaded = load_for_inference(args.checkpoint, weights=args.weights, step=args.step)
    if is_export(args.checkpoint):
        lineage = read_safetensors(args.checkpoint).lineage
    else:
        lineage = {
            # Names alone: where folders lay on this machine is nobody's business.
            "run": args.checkpoint.resolve().name,
            "step": loaded.step,
            "weights": args.weights,
            "data": Path(loaded.config.data.path).name,
            "seed": loaded.config.seed,
            "magnet_jax": importlib.metadata.version("magnet-jax"),
        }
    line = export_model(loaded, lineage, args)
    print(f"wrote {args.out} (step {loaded.step}, {args.weights} weights)")
    print(line)


if __name__ == "__main__":
    with reported():
        main(cli.parse(Args, prog="python -m launch.export", description=__doc__))
