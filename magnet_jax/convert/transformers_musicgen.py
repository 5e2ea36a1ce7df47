"""transformers' MusicGen -> AudioCraft's, whose names `convert` has for our parameters.

The tensors are the same but for their names, and for queries, keys and values, which AudioCraft
keeps as one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.convert import lm_rules, transformers_folder
from magnet_jax.convert.audiocraft import misfits, xp_setting
from magnet_jax.convert.codec_rules import check_tensors
from magnet_jax.errors import UserError
from magnet_jax.io import files

_DECODER = "decoder.model.decoder"
_PROJECTION = "enc_to_dec_proj"
# AudioCraft's names as patterns, and what transformers has in their place.
_NAMES = (
    (r"^condition_provider\.conditioners\.description\.output_proj", _PROJECTION),
    (r"^emb\.", f"{_DECODER}.embed_tokens."),
    (r"^linears\.", "decoder.lm_heads."),
    (r"^out_norm\.", f"{_DECODER}.layer_norm."),
    (r"^transformer\.layers\.", f"{_DECODER}.layers."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm_cross\.", ".encoder_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.linear(\d)\.", r".fc\1."),
)
_SETTINGS = {
    "num_codebooks": "decoder.num_codebooks",
    "codebook_size": "decoder.vocab_size",
    "width": "decoder.hidden_size",
    "num_heads": "decoder.num_attention_heads",
    "num_layers": "decoder.num_hidden_layers",
    "mlp_width": "decoder.ffn_dim",
    "text_width": "text_encoder.d_model",
}
# What our transformer computes; where a setting is absent, transformers' own default fits.
_FITTING_OR_ABSENT = {
    "decoder.activation_function": "gelu",
    "decoder.scale_embedding": False,
    "decoder.audio_channels": 1,
    "decoder.cross_attention_hidden_size": None,
}


def read_model(folder: Path) -> ModelConfig:
    """The model that a MusicGen's config.json describes; `UserError` where we lack it."""
    path = folder / "config.json"
    config = files.read_object(path, "a MusicGen folder needs it")
    parts = {p: transformers_folder.part_of(config, p)[0] for p in ("decoder", "text_encoder")}
    problems = misfits(parts, {}, _FITTING_OR_ABSENT)
    settings = {ours: xp_setting(parts, theirs) for ours, theirs in _SETTINGS.items()}
    for ours, value in settings.items():
        if type(value) is not int or value < 1:
            problems.append(f"{_SETTINGS[ours]} must be a whole number above 0, not {value!r}")
    if not problems and settings["mlp_width"] % settings["width"]:
        problems.append("decoder.ffn_dim must be a multiple of decoder.hidden_size")
    if problems:
        raise UserError(f"{path}: not a model that can be converted: {'; '.join(problems)}")
    settings["mlp_ratio"] = settings.pop("mlp_width") // settings["width"]
    delays = tuple(range(settings["num_codebooks"]))
    try:
        return ModelConfig(kind="musicgen", delays=delays, **settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_params(folder: Path, model: ModelConfig) -> dict:
    """Our parameters of a MusicGen's folder, float32.

    Raises `UserError` for weights that are missing or damaged, or do not fit `model`.
    """

    def wanted(name: str) -> bool:
        # The positions are sinusoids, which older files hold along.
        return name.startswith(("decoder.", _PROJECTION)) and ".embed_positions." not in name

    tensors, origin = transformers_folder.read_tensors(folder, wanted)
    if model.text_width == model.width and f"{_PROJECTION}.weight" not in tensors:
        # transformers projects nothing where the widths are equal.
        tensors[f"{_PROJECTION}.weight"] = np.eye(model.width, dtype=np.float32)
        tensors[f"{_PROJECTION}.bias"] = np.zeros(model.width, np.float32)
    state_dict = to_audiocraft(tensors, model, str(origin))
    return lm_rules.from_audiocraft(state_dict, model, str(origin), empty=True)


def to_audiocraft(
    tensors: Mapping[str, np.ndarray], model: ModelConfig, where: str
) -> dict[str, np.ndarray]:
    """transformers' tensors under AudioCraft's names; `UserError` where they do not fit `model`."""
    shapes = lm_rules.audiocraft_shapes(model)
    theirs = {name: _their_names(name) for name in shapes}
    expected: dict[str, tuple[Any, ...]] = {}
    for name, (rows, *rest) in shapes.items():
        parts = theirs[name]
        expected |= dict.fromkeys(parts, (rows // len(parts), *rest))
    check_tensors(where, tensors, expected)
    return {
        name: np.concatenate([tensors[part] for part in parts]) if parts[1:] else tensors[parts[0]]
        for name, parts in theirs.items()
    }


def _their_names(name: str) -> list[str]:
    """What transformers calls a tensor of AudioCraft: three names for queries, keys and values."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if name.endswith("in_proj_weight"):
        stem = name.removesuffix("in_proj_weight")
        return [f"{stem}{kind}_proj.weight" for kind in "qkv"]
    return [name]
