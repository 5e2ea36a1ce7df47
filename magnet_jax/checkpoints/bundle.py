"""An exported model in this project's own format: safetensors, JSON beside it, a model card."""

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
    KIND_NAMES,
    SAMPLING_CONFIGS,
    AutoregressiveConfig,
    CodecSpec,
    DecodeConfig,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    from_dict,
    from_json,
    to_json,
)
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE, Origin, narrowed
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


_ABOUT = {
    "magnet": "Text to audio by masked, non-autoregressive token generation.",
    "musicgen": "Text to audio by autoregressive generation of codebooks in a delay pattern.",
    "hybrid": "Text to audio: the first seconds autoregressively, the rest by masked generation.",
}


def _audiocraft_parameters(generation: DecodeConfig | AutoregressiveConfig) -> list[str]:
    """The arguments of AudioCraft's `set_generation_params`, as lines of Python."""
    g = generation
    lines = [f"use_sampling={not g.greedy}, top_k={g.top_k}, top_p={0.0 if g.top_k else g.top_p},"]
    if isinstance(g, AutoregressiveConfig):
        lines.append(f"temperature={g.temperature}, cfg_coef={g.guidance},")
    else:
        lines += [
            f"temperature={g.temperature}, span_arrangement={g.span_arrangement!r},",
            f"max_cfg_coef={g.max_guidance}, min_cfg_coef={g.min_guidance},",
            f"decoding_steps={list(g.steps)},",
        ]
    return [f"    {line}" for line in lines]


def model_card(
    bundle: Bundle,
    license_name: str,
    text_encoder: str,
    audiocraft_seconds: int | None,
    about: str = "",
) -> str:
    """The README.md of an exported model.

    Args:
      bundle: what was exported.
      license_name: of the weights, or 'unspecified'.
      text_encoder: as in xp.cfg: a published name, or `TEXT_FOLDER`.
      audiocraft_seconds: clip length in xp.cfg; None where no AudioCraft files were written.
      about: Markdown to put in, such as data, scores and limits.
    """
    model, codec = bundle.model, bundle.codec
    name = KIND_NAMES[model.kind]
    count = sum(math.prod(shape) for shape in lm_shapes(model).values())
    context = "no restricted context"
    if model.local_context:
        context = f"local context of {model.local_context} frames"
    if model.first_context:
        context += f"; {model.first_context} frames in the first codebook"
    if license_name == "unspecified":
        licence = (
            "Unspecified: whoever exported this model stated no license. Ask them before you use "
            "or share it (`--license NAME` of the export states one)."
        )
    else:
        licence = f"{license_name}, as stated by whoever exported this model."
    lines = [
        *(() if license_name == "unspecified" else ("---", f"license: {license_name}", "---", "")),
        f"# A {name} model",
        "",
        _ABOUT[model.kind],
        "",
        *((about.strip(), "") if about.strip() else ()),
        "## License",
        "",
        licence,
        "",
        "## What it is",
        "",
        f"- Transformer: {count / 1e6:.1f} M parameters; width {model.width}, "
        f"{model.num_layers} layers, {model.num_heads} heads; "
        + "; ".join(
            [f"spans of {model.span_length} frames, {context}"] * model.parallel
            + [f"codebook delays {list(model.delays)}"] * model.autoregressive
        )
        + ".",
        f"- Tokens: {model.num_codebooks} codebooks of {model.codebook_size} at "
        f"{codec.frame_rate:g} frames/s; {codec.sample_rate} Hz, {codec.channels} channel(s).",
        f"- Codec: {codec.source}, sha256 {codec.sha256}.",
        f"- Text encoder: {text_encoder}, width {model.text_width}"
        + (", trained along with the model." if bundle.text.changed else ", not trained."),
        f"- Clips in training: {bundle.segment_seconds:g} s.",
        "",
        "## Lineage",
        "",
        *(f"- {name}: {value}" for name, value in bundle.lineage.items()),
        "",
        "## Files",
        "",
        "- `model.safetensors`, `config.json`, `generation_config.json`: for magnet_jax.",
    ]
    if bundle.text.source == TEXT_FOLDER:
        lines.append("- `text_encoder/`: the text encoder, a transformers T5 folder.")
    if codec.source == "codec":
        lines.append("- `codec/`: the codec, a transformers EncodecModel folder.")
    elif codec.source.startswith("codec/"):
        lines.append(f"- `{codec.source}`: the codec's weights, for the `encodec` package's model.")
    if audiocraft_seconds is not None:
        lines += [
            f"- `{LM_FILE}`, `{CODEC_FILE}`: for AudioCraft (PyTorch).",
            "",
            "## In AudioCraft",
            "",
        ]
        if text_encoder == TEXT_FOLDER:
            lines += [
                "AudioCraft builds text encoders by published names only, and this model's is not "
                "one of them. Run from this folder and register the encoder first (with the "
                "tokenizer as it is: `T5Tokenizer` would drop its normaliser):",
                "",
                "```python",
                "import transformers",
                "from audiocraft.modules import conditioners",
                "conditioners.T5Tokenizer = transformers.AutoTokenizer",
                'conditioners.T5Conditioner.MODELS.append("text_encoder")',
                f'conditioners.T5Conditioner.MODELS_DIMS["text_encoder"] = {model.text_width}',
                "```",
                "",
            ]
        lines += [
            "```python",
            f"from audiocraft.models import {name}",
            f'model = {name}.get_pretrained("./")',
            "model.set_generation_params(",
            *_audiocraft_parameters(bundle.generation),
            ")",
            'wav_BCN = model.generate(["a calm piano piece"])',
            "```",
            "",
            f"Clips come out {audiocraft_seconds} s long: AudioCraft counts in whole seconds.",
            "The layout is tested with PyTorch code of the same network; this export was not",
            "loaded in AudioCraft itself.",
        ]
    return "\n".join(lines) + "\n"
