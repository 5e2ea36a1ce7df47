"""A model to sample from or to export, wherever it lies.

`load` takes the folder of a training run, of an exported model, of an AudioCraft checkpoint or of
transformers' MusicGen, and hub ids of the latter three; any folder may be in a bucket (gs://). Of
AudioCraft's it takes MAGNeT and the text-conditioned MusicGen. 'demo' is the model that ships with
the package.
"""

import functools
import hashlib
import importlib.metadata
import typing
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from magnet_jax.checkpoints import adapters, bundle, run_folder
from magnet_jax.codec import encodec as codec_module
from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import (
    ASSETS,
    CodecSpec,
    DataConfig,
    DecodeConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TextConfig,
    from_json,
    with_sampling,
)
from magnet_jax.convert import lm_rules, t5_files, transformers_folder, transformers_musicgen
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE, File, Origin, read_file, xp_setting
from magnet_jax.errors import UserError
from magnet_jax.io import bucket, files, hub, trees
from magnet_jax.model import lora, t5

CodecBackend = Literal["jax", "torch"]

SHIPPED = {"demo": ASSETS / "demo"}  # exports that come with the package, by name

# AudioCraft cuts no text; this many tokens hold about 90 words.
MAX_TOKENS = 128


class Loaded(NamedTuple):
    """What sampling and export need of a model."""

    config: RunConfig
    codec: CodecSpec
    codec_source: str  # what `encodec.load_codec` takes
    params: dict  # {'lm': transformer} and, where it was trained, {'text': T5}
    t5_config: t5.T5Config
    t5_params: dict
    tokenizer: Tokenizer
    step: int
    lineage: dict  # where the weights come from
    origin: Origin | None = None  # of a model that was imported from AudioCraft


def load(
    source: Path | str,
    *,
    weights: str | None = None,
    step: int | None = None,
    text_encoder: str | None = None,
    codec: str | None = None,
    adapter: Path | str | None = None,
) -> Loaded:
    """Reads a model onto one device.

    Args:
      source: folder of a run, an export or an AudioCraft checkpoint, or its gs:// URL; a hub id; or
        'demo', the model that ships ('./demo' is a folder).
      weights: of a run: 'ema' for the averaged parameters (as does None), 'raw' for the last ones.
      step: of a run: the checkpoint; None is the newest.
      text_encoder: of an AudioCraft checkpoint: where its text encoder lies, if not where it says.
      codec: where the codec lies, if not where the model says.
      adapter: folder of low-rank adapters to add to the transformer (adapters.py).

    Raises:
      UserError: no model there, no such checkpoint, or a damaged one.
    """
    if adapter is not None:
        loaded = load(source, weights=weights, step=step, text_encoder=text_encoder, codec=codec)
        added = adapters.load_adapter(Path(adapter), loaded.config.model)
        lm = _merged(loaded.params["lm"], added.adapters, added.config, str(adapter))
        lineage = loaded.lineage | {"adapter": Path(adapter).resolve().name}
        return loaded._replace(params=loaded.params | {"lm": lm}, lineage=lineage)
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights must be 'ema' or 'raw', not {weights!r}")
    folder = locate(source)
    if is_audiocraft(folder) or is_musicgen(folder):
        _check_held(folder, {}, weights, step)
        read = read_audiocraft if is_audiocraft(folder) else read_musicgen
        loaded = read(folder, str(source), text_encoder=text_encoder, codec=codec)
        return loaded._replace(params=jax.device_put(loaded.params, jax.local_devices()[0]))
    if text_encoder is not None:
        raise UserError(
            f"{source}: has a text encoder; only checkpoints of AudioCraft and transformers take "
            "another"
        )
    if bundle.is_export(folder):
        loaded = _load_export(folder, weights, step)
    else:
        loaded = _load_run(folder, source, weights or "ema", step)
    return loaded._replace(codec_source=codec or loaded.codec_source)


def _merged(lm: dict, factors: dict, config: LoraConfig, where: str) -> dict:
    """The transformer with adapters, whose product may overflow though both factors are finite."""
    merged = lora.merge_adapters(lm, factors, config)
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(merged).items()}
    files.finite(f"{where}, added to the model", leaves)
    return merged


def load_decoder(
    loaded: Loaded, where: str, backend: CodecBackend = "jax"
) -> codec_module.Decoder | codec_module.Codec:
    """The codec that turns a model's tokens into audio: in JAX, or in PyTorch, which also encodes.

    Raises `UserError`, which calls the model `where`, if it cannot be had or is another codec.
    """
    if backend not in typing.get_args(CodecBackend):
        raise UserError(f"codec backend must be 'jax' or 'torch', not {backend!r}")
    load = codec_module.load_decoder if backend == "jax" else load_codec
    decoder = load(
        loaded.codec_source,
        num_codebooks=loaded.codec.num_codebooks,
        interleaved=loaded.codec.interleaved,
    )
    if decoder.spec.sha256 != loaded.codec.sha256:
        raise UserError(
            f"{where} learnt the tokens of codec {loaded.codec.source}, and "
            f"{decoder.spec.source} is another: name that one as --codec"
        )
    return decoder


def locate(source: Path | str) -> Path:
    """The folder of a model; a hub id's is fetched, and a bucket's, but for its checkpoints.

    Raises `UserError` where there is no model.
    """
    if source in SHIPPED:
        return SHIPPED[source]
    folder = _mirror(str(source)).folder if bucket.is_url(source) else Path(source)
    if folder.is_dir():
        if (folder / "config.json").exists() or (folder / LM_FILE).exists():
            return folder
        raise UserError(
            f"{source}: no training run there, no exported model (config.json) and no AudioCraft "
            f"checkpoint ({LM_FILE}){files.weights_beside(folder)}"
        )
    name = str(source)
    if folder.exists():
        raise UserError(f"{source}: is a file; name the folder that holds it")
    if name in SHIPPED:  # (given as a path)
        raise UserError(
            f"{source}: no such folder; the model that ships is called by a text, {name!r}, not by "
            "a path"
        )
    if "/" not in name or not hub.is_hub_id(name):
        raise UserError(
            f"{source}: no such folder, and neither a hub id (owner/name) nor "
            f"{', '.join(SHIPPED)}, which ships"
        )
    # A first look, as such repositories may hold gigabytes for other libraries.
    instead = f"a folder with its files, such as {LM_FILE} and {CODEC_FILE}"
    folder = hub.fetch(name, ("config.json", "README.md"), "model", instead)
    if bundle.is_export(folder):
        wanted = ("*.json", "*.safetensors", "text_encoder/*", "codec/*")
        return hub.fetch(name, wanted, "model", instead)
    folder = hub.fetch(name, (LM_FILE, CODEC_FILE), "model", instead)
    if (folder / LM_FILE).exists():
        return folder
    if is_musicgen(folder):
        return transformers_folder.fetch(name, ("*.json",), "model", instead)
    raise UserError(f"{source}: holds no AudioCraft checkpoint ({LM_FILE}) and no export")


@functools.cache
def _mirror(url: str) -> bucket.Mirror:
    """What a folder of a bucket tells of a model; fetched once, and here until the process ends."""
    return bucket.Mirror(url, run_folder.UNREAD | {"metrics.jsonl"})


def is_audiocraft(folder: Path) -> bool:
    """Whether a folder holds an AudioCraft checkpoint and not an export, which may hold both."""
    return (folder / LM_FILE).exists() and not bundle.is_export(folder)


def is_musicgen(folder: Path) -> bool:
    """Whether a folder holds transformers' MusicGen; raises `UserError` for its other models."""
    found = transformers_folder.model_type(folder)
    if found in (None, "musicgen"):
        return found is not None
    uses = {"encodec": "a codec, for --codec", "t5": "a text encoder, for --text-encoder"}
    raise UserError(
        f"{folder}: {uses.get(found, f'a {found} model of transformers')}; of its models MusicGen "
        "alone is read"
    )


def fingerprint(loaded: Loaded) -> str:
    """Tells models of other weights apart, quickly: a hash of some values of every parameter.

    Of the transformer and the text encoder, as they are loaded, and of the latter's words; the
    codec has a hash of its own. Training and fine-tuning change about every value.
    """
    found = hashlib.sha256(loaded.tokenizer.to_str().encode())
    for path, leaf in jax.tree.leaves_with_path((loaded.params, loaded.t5_params)):
        # (an odd stride, which meets all columns of a matrix)
        few = jnp.ravel(leaf)[:: leaf.size // 1024 | 1]
        found.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        found.update(np.asarray(few).tobytes())
    return found.hexdigest()


def read_defaults(source: Path | str) -> tuple[ModelConfig, SamplingConfig]:
    """The kind of a model and its sampling settings, without its weights where that can be.

    Raises `UserError` where there is no model.
    """
    folder = locate(source)
    if bundle.is_export(folder):
        model = bundle.read_config(folder).model
        return model, bundle.read_generation(folder, model)
    if is_audiocraft(folder):
        file = read_file(folder / LM_FILE)
        model = lm_rules.model_from_xp_cfg(file.xp_cfg, 1, str(folder / LM_FILE))
        config = _imported_config(model, file.xp_cfg, "", str(folder / LM_FILE))
    elif is_musicgen(folder):
        config = _musicgen_config(folder, "")
    else:
        config = from_json(RunConfig, folder / "config.json")
    return config.model, config.sampling


def read_settings(source: Path | str) -> RunConfig:
    """What a model says of itself: sizes, text, clip length, sampling; a run its whole config.

    The rest has the defaults. Raises `UserError` where there is no model.
    """
    folder = locate(source)
    if is_audiocraft(folder):
        lm = lm_rules.read_audiocraft(folder)
        return _imported_config(lm.model, lm.xp_cfg, "", str(folder / LM_FILE))
    if is_musicgen(folder):
        return _musicgen_config(folder, "")
    if bundle.is_export(folder):
        exported = bundle.read_config(folder)
        return _exported_config(exported, bundle.read_generation(folder, exported.model))
    return from_json(RunConfig, folder / "config.json")


def _exported_config(
    exported: bundle.Config | bundle.Bundle, generation: SamplingConfig
) -> RunConfig:
    """What an export does not tell of the run has the defaults."""
    config = RunConfig(
        objective="hybrid" if exported.model.kind == "hybrid" else "magnet",
        model=exported.model,
        text=exported.text,
        data=DataConfig(segment_seconds=exported.segment_seconds),
        # (as many steps as codebooks; a MusicGen, whose sampling is another, keeps these unread)
        decode=DecodeConfig(steps=(1,) * exported.model.num_codebooks),
    )
    return with_sampling(config, generation)


def _load_run(run: Path, out: Path | str, weights: str, step: int | None) -> Loaded:
    """The model of a run; `run` is where the small files of its folder `out` are."""
    config = from_json(RunConfig, run / "config.json")
    codec = from_json(CodecSpec, run / "codec.json")
    t5_config, t5_params, tokenizer = t5_files.load(str(run / "text"))
    trained = t5_config if config.text.finetune else None
    params, step = run_folder.read_params(out, config, trained, weights=weights, step=step)
    if config.lora.rank:
        base = run_folder.read_base(run)
        params = {"lm": _merged(base, params["lora"], config.lora, str(out))}
    return Loaded(
        config=config,
        codec=codec,
        codec_source=run_folder.codec_source(run, codec),
        params=params,
        t5_config=t5_config,
        t5_params=t5_params if trained is None else params["text"],
        tokenizer=tokenizer,
        step=step,
        # Names alone: where folders lay on this machine is nobody's business.
        lineage=_lineage(run, config, weights, step),
    )


def _lineage(run: Path, config: RunConfig, weights: str, step: int) -> dict:
    """Names alone: where folders lay on this machine is nobody's business."""
    return {
        "run": run.resolve().name,
        "step": step,
        "weights": weights,
        "data": Path(config.data.path).name,
        "seed": config.seed,
        **({"init_from": Path(config.init_from).name} if config.init_from else {}),
        **({"lora_rank": config.lora.rank} if config.lora.rank else {}),
        "magnet_jax": importlib.metadata.version("magnet-jax"),
    }


def read_adapters(
    run: Path | str, weights: str | None, step: int | None
) -> tuple[dict, RunConfig, dict]:
    """The adapters that a run trained, its config, and where they come from.

    Raises `UserError` for a run that trained none.
    """
    folder = locate(run)
    config = None
    if not is_audiocraft(folder) and not bundle.is_export(folder):
        config = from_json(RunConfig, folder / "config.json")
    if config is None or not config.lora.rank:
        raise UserError(f"{run}: no run that trained adapters (--lora.rank)")
    weights = weights or "ema"
    params, step = run_folder.read_params(run, config, None, weights=weights, step=step)
    lineage = _lineage(folder, config, weights, step) | {"base": Path(config.init_from).name}
    return params["lora"], config, lineage


def _load_export(folder: Path, weights: str | None, step: int | None) -> Loaded:
    exported = bundle.read_safetensors(folder)
    _check_held(folder, exported.lineage, weights, step)
    t5_config, t5_params, tokenizer = t5_files.load(exported.text.source)
    params = jax.device_put(exported.params, jax.local_devices()[0])
    return Loaded(
        config=_exported_config(exported, exported.generation),
        codec=exported.codec,
        codec_source=exported.codec.source,
        params=params,
        t5_config=t5_config,
        t5_params=params.get("text", t5_params),
        tokenizer=tokenizer,
        step=exported.lineage.get("step", 0),
        lineage=exported.lineage,
        origin=exported.origin,
    )


def _check_held(folder: Path, lineage: dict, weights: str | None, step: int | None) -> None:
    """Raises `UserError` for what only runs have a choice of, unless it is what there is."""
    there = {"weights": lineage.get("weights"), "step": lineage.get("step", 0)}
    for name, wanted in (("weights", weights), ("step", step)):
        if wanted in (None, there[name]):
            continue
        if name in lineage:
            held = lineage[name]
            raise UserError(
                f"{folder}: an exported model with {name} {held} alone; give --{name} {held}"
            )
        raise UserError(f"{folder}: only training runs have --{name} to choose; leave it out")


def read_audiocraft(
    folder: Path, name: str, *, text_encoder: str | None = None, codec: str | None = None
) -> Loaded:
    """The model of an AudioCraft folder, parameters as NumPy arrays; see `load`.

    `name` says where the model comes from, for its lineage.
    """
    lm = lm_rules.read_audiocraft(folder)
    where = folder / LM_FILE
    named = xp_setting(lm.xp_cfg, "conditioners.description.t5.name")
    beside = folder / "text_encoder"
    text_source = text_encoder or (str(beside) if beside.is_dir() else named)
    if not isinstance(text_source, str):
        raise UserError(f"{where}: names no text encoder; give one (--text-encoder DIR)")
    try:
        t5_config, t5_params, tokenizer = t5_files.load(text_source)
    except UserError as error:
        raise UserError(
            f"{folder} needs the text encoder {named}; name its folder as --text-encoder ({error})"
        ) from None
    if t5_config.d_model != lm.model.text_width:
        raise UserError(
            f"{where}: needs a text encoder {lm.model.text_width} wide, and {text_source} is "
            f"{t5_config.d_model} wide; name another as --text-encoder"
        )
    spec, codec_source, codec_origin = _read_codec(folder, lm.model, codec)
    return Loaded(
        config=_imported_config(lm.model, lm.xp_cfg, text_source, str(where)),
        codec=spec,
        codec_source=codec_source,
        params={"lm": lm.params},
        t5_config=t5_config,
        t5_params=t5_params,
        tokenizer=tokenizer,
        step=0,
        # (of a local folder its name alone)
        lineage={"imported_from": Path(name).resolve().name if Path(name).exists() else name},
        origin=Origin(lm_xp_cfg=lm.xp_cfg_text, lm_dtype=lm.dtype, **codec_origin),
    )


def read_musicgen(
    folder: Path, name: str, *, text_encoder: str | None = None, codec: str | None = None
) -> Loaded:
    """The model of transformers' MusicGen, parameters as NumPy arrays; see `load`."""
    text_source, codec_source = text_encoder or str(folder), codec or str(folder)
    config = _musicgen_config(folder, text_source)
    t5_config, t5_params, tokenizer = t5_files.load(text_source)
    if t5_config.d_model != config.model.text_width:
        raise UserError(
            f"{folder}: needs a text encoder {config.model.text_width} wide, and {text_source} is "
            f"{t5_config.d_model} wide; name another as --text-encoder"
        )
    return Loaded(
        config=config,
        codec=_fitting_codec(codec_source, config.model, folder),
        codec_source=codec_source,
        params={"lm": transformers_musicgen.read_params(folder, config.model)},
        t5_config=t5_config,
        t5_params=t5_params,
        tokenizer=tokenizer,
        step=0,
        lineage={"imported_from": Path(name).resolve().name if Path(name).exists() else name},
    )


def _musicgen_config(folder: Path, text_source: str) -> RunConfig:
    """What transformers' MusicGen says of itself; its clips are 30 s long where it says nothing."""
    model = transformers_musicgen.read_model(folder)
    return RunConfig(
        model=model,
        text=TextConfig(source=text_source, max_tokens=MAX_TOKENS),
        data=DataConfig(segment_seconds=30.0),
    )


def _fitting_codec(source: str, model: ModelConfig, where: Path) -> CodecSpec:
    """What a codec is; `UserError` unless its tokens can be the model's."""
    spec = codec_module.read_spec(source, model.num_codebooks)
    if spec.codebook_size != model.codebook_size:
        raise UserError(
            f"{where}: the codec {source} has codebooks of {spec.codebook_size}, and the model "
            f"reads {model.codebook_size}; name the right one as --codec"
        )
    return spec


def _imported_config(model: ModelConfig, xp_cfg: dict, text_source: str, where: str) -> RunConfig:
    seconds = xp_setting(xp_cfg, "dataset.segment_duration")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise UserError(f"{where}: dataset.segment_duration must be a length, not {seconds}")
    return RunConfig(
        model=model,
        text=TextConfig(source=text_source, max_tokens=MAX_TOKENS),
        data=DataConfig(segment_seconds=float(seconds)),
        decode=lm_rules.published_defaults(xp_cfg, model, seconds),
    )


def _read_codec(
    folder: Path, model: ModelConfig, given: str | None
) -> tuple[CodecSpec, str, dict[str, str]]:
    """The codec of an AudioCraft folder: what it is, where it lies, its part of the origin."""
    path = folder / CODEC_FILE
    if path.exists():
        file = read_file(path)
    elif given:
        file = File({}, {}, "", "float32", "")
    else:
        raise UserError(
            f"{path}: no such file; copy the codec there, or name the folder of one as --codec"
        )
    source = given or file.pretrained or str(path)
    try:
        spec = _fitting_codec(source, model, path)
    except UserError as error:
        if not file.pretrained or given:
            raise
        raise UserError(
            f"{path} points to the codec {file.pretrained}; name its folder as --codec ({error})"
        ) from None
    own = not given and not file.pretrained
    return spec, source, {
        "codec_pretrained": file.pretrained,
        "codec_xp_cfg": file.xp_cfg_text if own else "",
        "codec_dtype": file.dtype if own else "float32",
    }  # fmt: skip
