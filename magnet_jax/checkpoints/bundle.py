"""An exported model in this project's own format: safetensors, and JSON beside it."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from magnet_jax.config import (
    EMBEDDED,
    SAMPLING_CONFIGS,
    CodecSpec,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    from_dict,
    from_json,
    to_json,
)
from magnet_jax.convert.audiocraft import Origin, narrowed
from magnet_jax.convert.codec_rules import check_tensors
from magnet_jax.convert.lm_rules import lm_shapes
from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.io.hub import is_hub_id
from magnet_jax.io.trees import flatten, unflatten

FORMAT = "magnet_jax"
FORMAT_VERSION = 2
TEXT_FOLDER = "text_encoder"  # beside the model, where the text encoder travels along


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """What `model.safetensors`, `config.json` and `generation_config.json` hold."""

    model: ModelConfig
    text: TextConfig
    codec: CodecSpec
    generation: SamplingConfig
    """Of the model's kind."""
    segment_seconds: float
    """Length of the clips that the model was trained on."""
    lineage: dict[str, Any]
    """Where the weights come from: run, step, weights, data; or what they were imported from."""
    origin: Origin | None = None
    """Of a model that was imported from AudioCraft."""
    params: dict
    """{'lm': ...} and, where the text encoder was trained along, {'text': ...}; float32."""


def write_safetensors(directory: Path, bundle: Bundle, *, half: bool = False) -> None:
    """Writes `model.safetensors`, `config.json`, `generation_config.json` into an existing folder.

    Tensors are named by their path, 'lm/blocks/attn/query' or 'text/...'. `text.source` and
    `codec.source` may name what lies inside `directory`. `half` writes all of them as float16, as
    is done with the transformer of a model that came so: nothing is lost of numbers that are.
    """
    directory = Path(directory)
    tensors = {
        path: np.ascontiguousarray(np.asarray(leaf))
        for path, leaf in flatten(bundle.params).items()
    }
    lm = flatten(bundle.params["lm"])
    check_tensors(
        "parameters", {path: tensors[f"lm/{path}"] for path in lm}, lm_shapes(bundle.model)
    )
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(bundle.model),
        "text": dataclasses.asdict(bundle.text),
        "codec": dataclasses.asdict(bundle.codec),
        "segment_seconds": bundle.segment_seconds,
        "lineage": bundle.lineage,
        "audiocraft": bundle.origin and dataclasses.asdict(bundle.origin),
    }
    came_so = bundle.origin is not None and bundle.origin.lm_dtype == "float16"
    weights = directory / "model.safetensors"
    if half:
        tensors = {path: array.astype(np.float16) for path, array in tensors.items()}
    elif came_so:
        names = [f"lm/{path}" for path in lm]
        tensors |= {name: narrowed(weights, name, tensors[name], "float16") for name in names}
    save_file(tensors, weights, metadata={"format": "np"})
    (directory / "generation_config.json").write_text(to_json(bundle.generation))
    # Written last: it is what makes the folder an export.
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def is_export(directory: Path) -> bool:
    """Whether `directory` holds an exported model rather than, say, a training run."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


class Config(NamedTuple):
    """What an export's `config.json` says."""

    model: ModelConfig
    text: TextConfig
    codec: CodecSpec
    segment_seconds: float
    lineage: dict[str, Any]
    origin: Origin | None


def read_config(directory: Path) -> Config:
    """An export's `config.json`; sources inside the folder become paths to them.

    Raises `UserError` for a file that is missing, damaged, or of another format.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder that export wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: not the config of a model that this project exported")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {config.get('format_version')}, but this release reads "
            f"{FORMAT_VERSION}; export the model again or use the release that wrote it"
        )
    names = {"format", "format_version", "model", "text", "codec", "segment_seconds", "lineage",
             "audiocraft"}  # fmt: skip
    if wrong := sorted(names ^ config.keys()):
        raise UserError(f"{path}: missing or unknown settings: {', '.join(wrong)}")
    for name, kind in (("segment_seconds", int | float), ("lineage", dict)):
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise UserError(f"{path}: {name} cannot be {config[name]!r}")
    if not 0 < config["segment_seconds"] < math.inf:
        raise UserError(f"{path}: segment_seconds must be positive")
    model = from_dict(ModelConfig, config["model"], f"{path}: model")
    text = from_dict(TextConfig, config["text"], f"{path}: text")
    codec = from_dict(CodecSpec, config["codec"], f"{path}: codec")
    origin = config["audiocraft"]
    if origin is not None:
        origin = from_dict(Origin, origin, f"{path}: audiocraft")

    def resolved(source: str) -> str:
        inside = directory / source
        # Judged by its spelling: in the hub's cache every file is a link to elsewhere.
        leaves = Path(source).is_absolute() or ".." in Path(source).parts
        if source != EMBEDDED and not leaves and inside.exists():
            return str(inside)
        if not is_hub_id(source):
            raise UserError(
                f"{path}: source {source!r} is neither in this folder nor a published name; "
                "exports refer to nothing else"
            )
        return source

    return Config(
        model=model,
        text=dataclasses.replace(text, source=resolved(text.source)),
        codec=dataclasses.replace(codec, source=resolved(codec.source)),
        segment_seconds=config["segment_seconds"],
        lineage=config["lineage"],
        origin=origin,
    )


def _named(path: str) -> str:
    """The path of a tensor, of which earlier releases had another: '.../self/query'."""
    return re.sub(
        "/(norm_)?(self|cross)/",
        lambda old: f"/{old[1] or ''}{'attn' if old[2] == 'self' else 'cross_attn'}/",
        path,
    )


def read_safetensors(directory: Path) -> Bundle:
    """The inverse of `write_safetensors`; see `read_config`.

    Raises `UserError` for a folder that is missing, damaged, or of another format.
    """
    directory = Path(directory)
    path, config = directory / "config.json", read_config(directory)
    weights = directory / "model.safetensors"
    tensors = {_named(name): array for name, array in files.read_tensors(weights).items()}
    expected = {f"lm/{name}": shape for name, shape in lm_shapes(config.model).items()}
    if config.text.finetune:  # the text encoder's own loader checks its tensors
        expected |= {name: a.shape for name, a in tensors.items() if name.startswith("text/")}
    check_tensors(str(weights), tensors, expected)
    params = unflatten(
        {name: array.astype(np.float32, copy=False) for name, array in tensors.items()}
    )
    if config.text.finetune and "text" not in params:
        raise UserError(f"{weights}: holds no text encoder, though {path} says it was trained")

    generation = read_generation(directory, config.model)
    return Bundle(params=params, generation=generation, **config._asdict())


def read_generation(directory: Path, model: ModelConfig) -> SamplingConfig:
    """The `generation_config.json` of an exported model, as its kind has it."""
    return from_json(SAMPLING_CONFIGS[model.kind], Path(directory) / "generation_config.json")
