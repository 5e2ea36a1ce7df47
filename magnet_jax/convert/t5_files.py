"""T5 folders of transformers: config.json, tokenizer.json and model.safetensors."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from magnet_jax.config import ASSETS, EMBEDDED
from magnet_jax.convert import transformers_folder
from magnet_jax.convert.codec_rules import check_tensors
from magnet_jax.errors import UserError
from magnet_jax.io import files, hub
from magnet_jax.io.trees import flatten, unflatten
from magnet_jax.model.t5 import END, PAD, UNKNOWN, Params, T5Config, Weight, weights

_SAFETENSORS = "model.safetensors"


# Sizes of published encoders, for planning without their weights.
PUBLISHED = {
    name: T5Config(d_kv=64, vocab_size=32128, **sizes)
    for name, sizes in {
        "t5-small": dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8),
        "t5-base": dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        "t5-large": dict(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    }.items()
}


def published_config(source: str) -> T5Config:
    """The sizes of an encoder, from its folder or, of the published ones, without."""
    name = source.removeprefix("google-t5/")
    return (
        PUBLISHED[name] if name in PUBLISHED else _read_config(_locate(source) / "config.json")[0]
    )


def load(source: str) -> tuple[T5Config, Params, Tokenizer]:
    """Configuration, float32 parameters and tokenizer of a T5 checkpoint; a decoder is left out.

    Args:
      source: 'embedded' (the small one that ships), a folder with config.json, tokenizer.json and
        model.safetensors (or its shards, or pytorch_model.bin), or a hub id such as 't5-base'.

    Raises:
      UserError: nothing there, or not a T5 encoder; names every missing or misshapen tensor.
    """
    directory = _locate(source)
    config, prefix = _read_config(directory / "config.json")
    tokenizer = _read_tokenizer(directory / "tokenizer.json", config.vocab_size)
    tensors, origin = transformers_folder.read_tensors(directory, _of_encoder, prefix)
    if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"]

    table = {weight: _file_names(weight, config) for weight in weights(config)}
    expected = {name: weight.file_shape for weight, names in table.items() for name in names}
    tensors = {name: array for name, array in tensors.items() if name in expected}
    check_tensors(f"{origin}: does not fit {directory / 'config.json'}", tensors, expected)
    leaves = {}
    for weight, names in table.items():
        layers = [_from_file(tensors[name], weight) for name in names]
        leaf = np.stack(layers) if weight.stacked else layers[0]
        leaves[weight.path] = jnp.asarray(leaf, jnp.float32)
    return config, unflatten(leaves), tokenizer


def save(directory: Path, config: T5Config, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a folder that `load`, and transformers' T5EncoderModel and AutoTokenizer, read."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, flat = {}, flatten(params)
    for weight in weights(config):
        layers = np.asarray(flat[weight.path], np.float32)
        for name, layer in zip(
            _file_names(weight, config), layers if weight.stacked else [layers], strict=True
        ):
            tensors[name] = _to_file(layer, weight)
    safetensors.numpy.save_file(tensors, directory / _SAFETENSORS, metadata={"format": "pt"})
    (directory / _SAFETENSORS).chmod(0o644)  # the library leaves it to its owner alone
    model = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **dataclasses.asdict(config),
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    (directory / "config.json").write_text(json.dumps(model, indent=2) + "\n")
    # (its own `save` raises a bare Exception of a full disk)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    # this class takes tokenizer.json as it is; T5Tokenizer would put its own normaliser in
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def _file_names(weight: Weight, config: T5Config) -> list[str]:
    if weight.stacked:
        return [weight.name.format(i) for i in range(config.num_layers)]
    return [weight.name]


def _from_file(array: np.ndarray, weight: Weight) -> np.ndarray:
    return array.T.reshape(weight.shape) if _linear(weight) else array


def _to_file(array: np.ndarray, weight: Weight) -> np.ndarray:
    if not _linear(weight):
        return np.ascontiguousarray(array)
    out_size, in_size = weight.file_shape
    return np.ascontiguousarray(array.reshape(in_size, out_size).T)


def _linear(weight: Weight) -> bool:
    """Whether the leaf is a linear map, which torch keeps transposed."""
    return weight.stacked and len(weight.file_shape) == 2


def _locate(source: str) -> Path:
    """The folder of a source; a hub id is fetched, or found in the hub's cache."""
    if source == EMBEDDED:
        return ASSETS / "text"
    if Path(source).is_dir():
        return Path(source)
    if not hub.is_hub_id(source):
        raise UserError(f"text encoder {source!r}: no such folder")
    return transformers_folder.fetch(source, ("config.json", "tokenizer.json"), "text encoder")


def _of_encoder(name: str) -> bool:
    return name == "shared.weight" or name.startswith("encoder.")


def _read_config(path: Path) -> tuple[T5Config, str]:
    """The sizes, and the prefix of the encoder's tensors, which is MusicGen's."""
    values = files.read_object(path, "a T5 folder needs it")
    values, prefix = transformers_folder.part_of(values, "text_encoder")
    if values.get("model_type") != "t5":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}, not 't5'")
    fields = dataclasses.fields(T5Config)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{path}: missing settings: {', '.join(missing)}")
    try:
        sizes = {f.name: values[f.name] for f in fields if f.name in values}
        return T5Config(**sizes), prefix
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error})") from None
    # `tokenize` does both itself
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if absent := [t for t in (PAD, END) if tokenizer.token_to_id(t) is None]:
        raise UserError(f"{path}: not T5's tokenizer: it has no {' and no '.join(absent)}")
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise UserError(f"{path}: {size} tokens, but config.json has vocab_size {vocab_size}")
    return tokenizer
