"""Writing a model for others: this project's format, AudioCraft's, a model card; all of it checked.

Everything is made in a folder beside the wanted one that takes its name at the end, so that no
half-written export is ever seen and a replaced one is lost at no moment.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from magnet_jax.checkpoints import bundle, verify
from magnet_jax.checkpoints.bundle import TEXT_FOLDER, Bundle
from magnet_jax.checkpoints.card import UNSPECIFIED, model_card
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import encodec as codecs
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.convert import codec_rules, lm_rules, t5_files, transformers_folder
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE, parse_xp_cfg, read_file, xp_setting
from magnet_jax.errors import UserError
from magnet_jax.io import bucket, files, hub, trees

CODEC_FOLDER = "codec"
NAMES = {LM_FILE, CODEC_FILE, "model.safetensors", "config.json", "generation_config.json",
         "README.md", TEXT_FOLDER, CODEC_FOLDER}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to write."""

    license: str | None = None
    """License of the weights; None is the one that the model came with."""
    t5_name: str | None = None
    """Published name of a text encoder that the run read from a folder."""
    audiocraft: bool = True
    """Write AudioCraft's pair as well."""
    offline: bool = False
    """Copy the text encoder and the codec along even if they are published under a name."""
    logits: bool = False
    """Compare the logits of what was written with the model's."""
    half: bool = False
    """Round the weights to float16, which halves the file; what is written is what is compared."""
    overwrite: bool = False
    """Replace an earlier export."""
    about: str = ""
    """Markdown for the model card."""


def prepare_out(out: Path, source: Path, overwrite: bool) -> None:
    """Puts back an export that a kill left under its other name, and checks that `out` may be used.

    Raises `UserError` unless `out` is free, or an earlier export that may be replaced, and does
    not hold `source`.
    """
    if bucket.is_url(out):
        raise UserError(f"--out {out}: exporting needs a folder on disk; copy it from there")
    files.put_back(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not bundle.is_export(out):
        raise UserError(f"{out}: exists and is not an export; give another --out")
    if not overwrite:
        raise UserError(f"{out}: exists; add --overwrite to replace it, or give another --out")
    files.check_holds_only(out, NAMES)
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out}: holds the model itself; give another --out")


def export_model(
    loaded: Loaded, out: Path, options: Options, where: str, rounded: Sequence[str] = ()
) -> list[str]:
    """Writes and checks an export; returns lines on what was rounded and checked.

    Args:
      loaded: the model.
      out: the folder, see `prepare_out`.
      options: what to write.
      where: what to call the model in messages.
      rounded: what was rounded as the model was read, see `files.noting_rounded`.

    Raises:
      UserError: the model cannot be expressed, or the folder cannot be written.
    """
    out = out.absolute()
    codec = dataclasses.replace(loaded.codec, source=loaded.codec_source)
    if options.audiocraft and codec.interleaved:
        raise UserError(f"{where}: interleaved stereo has no AudioCraft files: --no-audiocraft")
    if options.audiocraft and loaded.config.model.kind == "hybrid":
        raise UserError(f"{where}: AudioCraft has no hybrid models: --no-audiocraft")
    if options.audiocraft and loaded.config.model.first_context:
        raise UserError(
            f"{where}: AudioCraft's first codebook sees all frames, this one's "
            f"{loaded.config.model.first_context} to each side: --no-audiocraft"
        )
    if Path(codec.source).exists() or codec.source == EMBEDDED:
        found = codecs.load_codec(
            codec.source, num_codebooks=codec.num_codebooks, interleaved=codec.interleaved
        ).spec
        codecs.check_same_codec(found, codec, where)
    elif codec.source not in codecs.ENCODEC_WEIGHTS and not (
        "/" in codec.source and hub.is_hub_id(codec.source)
    ):
        raise UserError(f"codec {codec.source}: no such folder or file; put it there again")
    leaves = {name: np.asarray(x) for name, x in trees.flatten(loaded.params).items()}
    files.finite(where, leaves)
    if options.half:
        params = _rounded(loaded.params, where)
        loaded = loaded._replace(params=params, t5_params=params.get("text", loaded.t5_params))
    if rounded:
        lineage = loaded.lineage | {"rounded": "from float64 to float32"}
        loaded = loaded._replace(lineage=lineage)
    encoder = text_encoder_name(loaded, options.t5_name)
    # What was rounded when the model was read is read, and rounded, again.
    with files.noting_rounded(), files.replacing(out) as partial:
        written = _write(loaded, options, partial, codec, encoder)
        return [*rounded, *_checked(partial, written, loaded, options, where)]


def _checked(
    folder: Path, written: Bundle, loaded: Loaded, options: Options, where: str
) -> list[str]:
    count = verify.read_back(folder, written, loaded.t5_params, options.audiocraft)
    lines = [f"checked: {count} tensors read back, every bit equal"]
    if options.half:
        lines[0] += " to the weights rounded to float16"
    if rounded := loaded.lineage.get("rounded"):
        lines[0] += f", but for what was rounded {rounded} before"
    if options.logits:
        lines.append(verify.compare_logits(folder, written, options.audiocraft, where))
    return lines


def _rounded(params: dict, where: str) -> dict:
    """Float32 numbers that are float16's."""
    halves = {}
    for name, leaf in trees.flatten(params).items():
        with np.errstate(over="ignore"):
            halves[name] = np.asarray(leaf).astype(np.float16).astype(np.float32)
        if not np.isfinite(halves[name]).all():
            raise UserError(
                f"{where}: the tensor {name} has numbers beyond float16's 65504: leave out --half"
            )
    return trees.unflatten(halves)


def text_encoder_name(loaded: Loaded, t5_name: str | None) -> str:
    """What xp.cfg calls the text encoder: its published name, or `TEXT_FOLDER`.

    A fine-tuned encoder is never called by the published name: AudioCraft would then load the
    original weights, and the model would not hear the text as it was trained to.

    Raises `UserError` where `t5_name` cannot be the model's encoder.
    """
    if loaded.origin:
        if t5_name is not None:
            raise UserError(f"--t5-name {t5_name}: an imported model has its own; leave it out")
        xp_cfg = parse_xp_cfg(loaded.origin.lm_xp_cfg, "config.json: audiocraft")
        name = xp_setting(xp_cfg, "conditioners.description.t5.name")
        return name if isinstance(name, str) else TEXT_FOLDER
    source = loaded.config.text.source.removeprefix("google-t5/")
    if t5_name is None:
        name = source
    elif loaded.config.text.changed:
        raise UserError(f"--t5-name {t5_name}: the run trained its text encoder; leave it out")
    elif t5_name not in lm_rules.PUBLISHED_T5_WIDTHS:
        names = ", ".join(lm_rules.PUBLISHED_T5_WIDTHS)
        raise UserError(f"--t5-name {t5_name}: AudioCraft knows {names}")
    else:
        name = t5_name
    if loaded.config.text.changed or name not in lm_rules.PUBLISHED_T5_WIDTHS:
        return TEXT_FOLDER
    width = lm_rules.PUBLISHED_T5_WIDTHS[name]
    if width != loaded.config.model.text_width:
        raise UserError(
            f"{name} is {width} wide, but the run's text encoder "
            f"{loaded.config.model.text_width}: they cannot be the same"
        )
    return name


def _write(
    loaded: Loaded, options: Options, folder: Path, codec: CodecSpec, encoder: str
) -> Bundle:
    """Writes every file of the export into `folder`; `codec.source` is where the codec lies now."""
    config = loaded.config
    text = dataclasses.replace(config.text, source=encoder)
    if encoder == TEXT_FOLDER or options.offline or Path(config.text.source).is_dir():
        text = dataclasses.replace(text, source=TEXT_FOLDER)
        t5_files.save(folder / TEXT_FOLDER, loaded.t5_config, loaded.t5_params, loaded.tokenizer)
    shipped_codec = _copy_codec(codec, folder, options.offline)
    license_name = options.license or loaded.lineage.get("license") or UNSPECIFIED
    written = Bundle(
        model=config.model,
        text=text,
        codec=shipped_codec,
        generation=config.sampling,
        segment_seconds=config.data.segment_seconds,
        lineage=loaded.lineage | {"license": license_name},
        origin=loaded.origin,
        params=loaded.params,
    )
    seconds = None
    if options.audiocraft:
        if (folder / shipped_codec.source).is_dir():
            codec = dataclasses.replace(codec, source=str(folder / shipped_codec.source))
        if loaded.origin:
            xp_cfg = loaded.origin.lm_xp_cfg
        else:
            xp_cfg = lm_rules.make_xp_cfg(config, codec, encoder)
        lm_rules.write_audiocraft(
            folder, loaded.params["lm"], config.model, xp_cfg, codec, loaded.origin
        )
        seconds = lm_rules.segment_seconds(config)
    bundle.write_safetensors(folder, written, half=options.half)
    readme = folder / "README.md"
    readme.write_text(model_card(written, license_name, encoder, seconds, options.about))
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(readme, path)  # safetensors makes files that nobody else may read
    return written


def _copy_codec(codec: CodecSpec, folder: Path, offline: bool) -> CodecSpec:
    """Copies what is neither shipped with the package nor published; the codec as found there."""
    path, copied = Path(codec.source), folder / CODEC_FOLDER
    if not path.exists() and offline and "/" in codec.source:
        path = transformers_folder.fetch(codec.source, ("config.json",), "codec")
    if not path.exists():
        return codec
    copied.mkdir()
    if path.is_dir():
        settings, tensors = codec_rules.read_codec_folder(path)
        codec_rules.write_codec_folder(copied, settings, tensors)
    elif path.name == CODEC_FILE:
        file = read_file(path)
        codec_rules.codec_folder_from_audiocraft(file.tensors, file.xp_cfg, copied, str(path))
    else:
        shutil.copyfile(path, copied / path.name)
        return dataclasses.replace(codec, source=f"{CODEC_FOLDER}/{path.name}")
    return dataclasses.replace(codec, source=CODEC_FOLDER)
