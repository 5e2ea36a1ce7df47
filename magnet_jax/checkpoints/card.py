"""The model card of an export: its README.md."""

import math
from collections.abc import Iterator

from magnet_jax.checkpoints.bundle import TEXT_FOLDER, Bundle
from magnet_jax.config import KIND_NAMES, AutoregressiveConfig, DecodeConfig
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE
from magnet_jax.convert.lm_rules import lm_shapes

UNSPECIFIED = "unspecified"  # a license that nobody stated
_ABOUT = {
    "magnet": "Text to audio by masked, non-autoregressive token generation.",
    "musicgen": "Text to audio by autoregressive generation of codebooks in a delay pattern.",
    "hybrid": "Text to audio: the first seconds autoregressively, the rest by masked generation.",
}


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
      license_name: of the weights, or `UNSPECIFIED`.
      text_encoder: as in xp.cfg: a published name, or `TEXT_FOLDER`.
      audiocraft_seconds: clip length in xp.cfg; None where no AudioCraft files were written.
      about: Markdown to put in, such as data, scores and limits.
    """
    kind = bundle.model.kind
    lines = [f"# A {KIND_NAMES[kind]} model", "", _ABOUT[kind], ""]
    if license_name != UNSPECIFIED:
        lines = ["---", f"license: {license_name}", "---", "", *lines]
    if about.strip():
        lines += [about.strip(), ""]
    lines += [
        *_license(license_name),
        *_what_it_is(bundle, text_encoder),
        *_lineage(bundle),
        *_files(bundle, audiocraft_seconds is not None),
    ]
    if audiocraft_seconds is not None:
        lines += _in_audiocraft(bundle, text_encoder, audiocraft_seconds)
    return "\n".join(lines) + "\n"


def _license(name: str) -> list[str]:
    text = f"{name}, as stated by whoever exported this model."
    if name == UNSPECIFIED:
        text = (
            "Unspecified: whoever exported this model stated no license. Ask them before you use "
            "or share it (`--license NAME` of the export states one)."
        )
    return ["## License", "", text, ""]


def _what_it_is(bundle: Bundle, text_encoder: str) -> list[str]:
    model, codec = bundle.model, bundle.codec
    count = sum(math.prod(shape) for shape in lm_shapes(model).values())
    context = "no restricted context"
    if model.local_context:
        context = f"local context of {model.local_context} frames"
    if model.first_context:
        context += f"; {model.first_context} frames in the first codebook"
    ways = [f"spans of {model.span_length} frames, {context}"] * model.parallel
    ways += [f"codebook delays {list(model.delays)}"] * model.autoregressive
    trained = "trained along with the model" if bundle.text.changed else "not trained"
    return [
        "## What it is",
        "",
        f"- Transformer: {count / 1e6:.1f} M parameters; width {model.width}, "
        f"{model.num_layers} layers, {model.num_heads} heads; {'; '.join(ways)}.",
        f"- Tokens: {model.num_codebooks} codebooks of {model.codebook_size} at "
        f"{codec.frame_rate:g} frames/s; {codec.sample_rate} Hz, {codec.channels} channel(s).",
        f"- Codec: {codec.source}, sha256 {codec.sha256}.",
        f"- Text encoder: {text_encoder}, width {model.text_width}, {trained}.",
        f"- Clips in training: {bundle.segment_seconds:g} s.",
        "",
    ]


def _lineage(bundle: Bundle) -> list[str]:
    return ["## Lineage", "", *(f"- {name}: {value}" for name, value in bundle.lineage.items()), ""]


def _files(bundle: Bundle, audiocraft: bool) -> Iterator[str]:
    codec = bundle.codec.source
    yield "## Files"
    yield ""
    yield "- `model.safetensors`, `config.json`, `generation_config.json`: for magnet_jax."
    if bundle.text.source == TEXT_FOLDER:
        yield "- `text_encoder/`: the text encoder, a transformers T5 folder."
    if codec == "codec":
        yield "- `codec/`: the codec, a transformers EncodecModel folder."
    elif codec.startswith("codec/"):
        yield f"- `{codec}`: the codec's weights, for the `encodec` package's model."
    if audiocraft:
        yield f"- `{LM_FILE}`, `{CODEC_FILE}`: for AudioCraft (PyTorch)."


def _in_audiocraft(bundle: Bundle, text_encoder: str, seconds: int) -> list[str]:
    name, lines = KIND_NAMES[bundle.model.kind], ["", "## In AudioCraft", ""]
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
            f'conditioners.T5Conditioner.MODELS_DIMS["text_encoder"] = {bundle.model.text_width}',
            "```",
            "",
        ]
    return [
        *lines,
        "```python",
        f"from audiocraft.models import {name}",
        f'model = {name}.get_pretrained("./")',
        "model.set_generation_params(",
        *_generation_params(bundle.generation),
        ")",
        'wav_BCN = model.generate(["a calm piano piece"])',
        "```",
        "",
        f"Clips come out {seconds} s long: AudioCraft counts in whole seconds.",
        "The layout is tested with PyTorch code of the same network; this export was not",
        "loaded in AudioCraft itself.",
    ]


def _generation_params(generation: DecodeConfig | AutoregressiveConfig) -> list[str]:
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
