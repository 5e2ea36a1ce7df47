"""Writing a model for others: this project's format, AudioCraft's, a model card; all of it checked.

Everything is made in a folder beside the wanted one that takes its name at the end, so that no
half-written export is ever seen and a replaced one is lost at no moment.
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from magnet_jax.checkpoints import bundle
from magnet_jax.checkpoints.bundle import TEXT_FOLDER, Bundle
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import encodec as codecs
from magnet_jax.config import EMBEDDED, CodecSpec, ModelConfig
from magnet_jax.convert import codec_rules, lm_rules, t5_files, torch_lm, transformers_folder
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE, parse_xp_cfg, read_file, xp_setting
from magnet_jax.errors import UserError
from magnet_jax.io import bucket, files, hub, trees
from magnet_jax.model import attention, teacher_forcing, transformer
from magnet_jax.model.patterns import to_steps

CODEC_FOLDER = "codec"
NAMES = {LM_FILE, CODEC_FILE, "model.safetensors", "config.json", "generation_config.json",
         "README.md", TEXT_FOLDER, CODEC_FOLDER}  # fmt: skip
LOGITS_TOLERANCE = 1e-3  # float32 sums in another order


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
        return [*rounded, *_check(partial, written, loaded, options, where)]


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
    license_name = options.license or loaded.lineage.get("license") or "unspecified"
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
    card = folder / "README.md"
    card.write_text(bundle.model_card(written, license_name, encoder, seconds, options.about))
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(card, path)  # safetensors makes files that nobody else may read
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


# --- checks -------------------------------------------------------------------------------------


def _check(
    folder: Path, written: Bundle, loaded: Loaded, options: Options, where: str
) -> list[str]:
    """Reads everything back from `folder` and compares it bit for bit.

    Raises `RuntimeError`, naming what differs: that would be a bug or a failing disk.
    """
    if (model := bundle.read_config(folder).model) != written.model:
        raise RuntimeError(f"config.json: describes {model}, not {written.model}")
    params = trees.flatten(written.params)
    _require_equal_file(folder / "model.safetensors", params)
    count = len(params)
    lm = trees.flatten(written.params["lm"])
    if options.audiocraft:
        model, lm_params, *_ = lm_rules.read_audiocraft(folder)
        if model != written.model:
            raise RuntimeError(f"{LM_FILE}: xp.cfg describes {model}, not {written.model}")
        _require_equal(LM_FILE, trees.flatten(lm_params), lm)
        del lm_params
        count += len(lm) + _check_codec(folder, written)
    if written.text.source == TEXT_FOLDER:
        _, t5_params, _ = t5_files.load(str(folder / TEXT_FOLDER))
        expected = trees.flatten(loaded.t5_params)
        _require_equal(TEXT_FOLDER, trees.flatten(t5_params), expected)
        count += len(expected)
    lines = [f"checked: {count} tensors read back, every bit equal"]
    if options.half:
        lines[0] += " to the weights rounded to float16"
    if rounded := loaded.lineage.get("rounded"):
        lines[0] += f", but for what was rounded {rounded} before"
    if options.logits:
        lines.append(_compare_logits(folder, written, options.audiocraft, where))
    return lines


def _check_codec(folder: Path, written: Bundle) -> int:
    """The same for AudioCraft's codec; how many tensors it compared."""
    file = read_file(folder / CODEC_FILE)
    shipped = folder / written.codec.source
    codec = dataclasses.replace(
        written.codec, source=str(shipped) if shipped.is_dir() else written.codec.source
    )
    if pointer := lm_rules.audiocraft_pointer(codec, written.origin):
        if file.pretrained != pointer:
            raise RuntimeError(f"{CODEC_FILE}: does not point to {pointer}")
        return 0
    settings, tensors = codec_rules.read_codec_folder(codec_rules.codec_folder(codec))
    back = codec_rules.codec_from_audiocraft(file.tensors, settings, codec.num_codebooks)
    back = {name: array.astype(np.float32, copy=False) for name, array in back.items()}
    _require_equal(CODEC_FILE, back, {name: tensors[name] for name in back})
    return len(back)


def _require_equal_file(path: Path, expected: dict) -> None:
    """`_require_equal` for a safetensors file of a large model, which is not to be held twice."""
    with safetensors.safe_open(path, "np") as file:
        differing = set(file.keys()) ^ expected.keys()
        names = expected.keys() - differing
        differing |= {n for n in names if file.get_slice(n).get_shape() != [*expected[n].shape]}
    for name in expected.keys() - differing:
        # Opened for each tensor: what was read stays in memory until the file is closed.
        with safetensors.safe_open(path, "np") as file:
            rows = file.get_slice(name)
            for i, row in enumerate(expected[name]):
                found = rows[i : i + 1].astype(np.float32, copy=False)
                if not _same_bits(found[0], np.asarray(row)):
                    differing.add(name)
    if differing:
        raise RuntimeError(
            f"{path.name}: what was read back differs: {', '.join(sorted(differing))}"
        )


def _require_equal(what: str, found: dict, expected: dict) -> None:
    differing = found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        if a.dtype != b.dtype or a.shape != b.shape or not _same_bits(a, b):
            differing.add(name)
    if differing:
        raise RuntimeError(f"{what}: what was read back differs: {', '.join(sorted(differing))}")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    # (as integers: a NaN equals itself, 0 differs from -0, and nothing is copied)
    return np.array_equal(*(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b)))


def _compare_logits(folder: Path, written: Bundle, from_audiocraft: bool, where: str) -> str:
    """Runs what was written in PyTorch and the model in JAX, on random tokens and text states.

    Raises `RuntimeError` where they differ by more than `LOGITS_TOLERANCE`, and `UserError` where
    the model, called `where`, overflows.
    """
    if from_audiocraft:
        state_dict = read_file(folder / LM_FILE).tensors
    else:
        params = bundle.read_safetensors(folder).params["lm"]
        state_dict = lm_rules.to_audiocraft(params, written.model)
    with jax.default_matmul_precision("highest"):  # accelerators would shorten float32
        worst = logits_difference(written.params["lm"], written.model, state_dict)
    if not np.isfinite(worst):
        raise UserError(
            f"{where}: the model computes NaN or infinity in place of logits: its weights "
            "are damaged, or their training diverged"
        )
    if not worst <= LOGITS_TOLERANCE:
        raise RuntimeError(f"{folder.name}: logits in PyTorch differ by {worst:.1e}")
    return f"checked: logits in PyTorch within {worst:.1e} of those in JAX"


def logits_difference(params: dict, model: ModelConfig, state_dict: dict) -> float:
    """The largest difference of any logit between JAX and PyTorch, over all codebooks.

    Of a hybrid half of the steps are its prompt.

    Args:
      params: our parameters.
      model: their sizes.
      state_dict: the same as AudioCraft has them.
    """
    frames, width = 3 * model.span_length + 2 * model.widest_context, 6
    first = frames // 2
    rng = np.random.default_rng(0)
    shape = (2, model.num_codebooks, frames)
    codes_BKT = rng.integers(0, model.codebook_size + 1, shape).astype(np.int32)
    states_BSE = rng.normal(size=(2, width, model.text_width)).astype(np.float32)
    lengths_B = np.array([width - 2, width])
    text = (states_BSE, np.arange(width) < lengths_B[:, None], (width - lengths_B).astype(np.int32))
    if model.kind == "musicgen":
        steps_BKS = np.asarray(to_steps(codes_BKT, model.delays, model.mask_id, frames))
        ours_BKTV = teacher_forcing.step_logits(params, *text, steps_BKS, config=model)
    else:
        steps_BKS = codes_BKT
        stages = range(model.num_codebooks)
        ours_BKTV = jnp.stack(
            [_stage_logits(params, *text, codes_BKT, s, first, model, s > 0) for s in stages],
            axis=1,
        )
    theirs_BKTV = np.stack(
        [
            torch_lm.logits(state_dict, model, steps_BKS, states_BSE, lengths_B, stage, first)
            for stage in range(model.num_codebooks)
        ],
        axis=1,
    )
    with np.errstate(invalid="ignore"):  # a model may overflow
        return float(np.abs(np.asarray(ours_BKTV) - theirs_BKTV).max())


@jax.jit(static_argnames=("model", "local"))
def _stage_logits(params, states_BSE, mask_BS, zeros_B, codes_BKT, stage, first, model, local):
    network = transformer.bind(model, params)
    text = network.read_text(states_BSE, mask_BS, zeros_B)
    attend = attention.self_attention
    if model.kind == "hybrid":
        attend = functools.partial(
            attention.hybrid_attention,
            first_B=jnp.broadcast_to(first, len(codes_BKT)),
            delay=jnp.asarray(model.delays)[stage],
        )
    return network.head(network.trunk(codes_BKT, text, local=local, attend=attend), stage)
