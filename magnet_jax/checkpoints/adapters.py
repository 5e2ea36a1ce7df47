"""The folder of an adapter (model/lora.py): what `launch.export --adapter-only` writes.

adapter.safetensors   the factors in float32, by their paths, such as 'blocks/mlp/up/a'
adapter.json          rank, alpha and targets; the sizes of the model; where the adapter comes from
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from magnet_jax.checkpoints.matching import misfit
from magnet_jax.config import LoraConfig, ModelConfig, from_dict
from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.io.trees import flatten, unflatten
from magnet_jax.model import lora

SETTINGS, WEIGHTS = "adapter.json", "adapter.safetensors"
FORMAT, FORMAT_VERSION = "magnet_jax_adapter", 2
# What an adapter depends on. The shapes of its factors do not show the heads or the contexts.
_MODEL_FIELDS = ("kind", "width", "num_heads", "num_layers", "mlp_ratio", "first_context",
                 "local_context")  # fmt: skip


class Adapter(NamedTuple):
    """What an adapter folder holds."""

    adapters: dict  # NumPy, float32
    config: LoraConfig
    lineage: dict[str, Any]


def save_adapter(
    folder: Path,
    adapters: Mapping,
    config: LoraConfig,
    model: ModelConfig,
    lineage: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a folder, which appears whole or not at all.

    Args:
      folder: is made; may be there where it is empty.
      adapters: of every weight that `config` names.
      config: of the adapters; its rank is not 0.
      model: whose weights they adapt.
      lineage: where the adapter comes from.
      overwrite: replace an earlier adapter.

    Raises:
      UserError: adapters that do not fit, a folder that is in use or cannot be written.
    """
    if not config.rank:
        raise UserError(f"{folder}: lora.rank is 0, so there is no adapter to write")
    folder = Path(folder).absolute()
    flat = flatten(adapters)
    shapes = {path: np.shape(leaf) for path, leaf in flat.items()}
    if problems := misfit(lora.adapter_shapes(config, model), shapes):
        raise UserError(f"{folder}: adapters do not fit the model: {problems}")
    settings = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "lora": dataclasses.asdict(config),
        "model": {name: getattr(model, name) for name in _MODEL_FIELDS},
        "lineage": dict(lineage),
    }
    with files.replacing(folder) as partial:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            if not (folder / SETTINGS).is_file():
                raise UserError(f"{folder}: exists and is no adapter; give another folder")
            if not overwrite:
                raise UserError(f"{folder}: holds an adapter; overwrite it or give another folder")
            files.check_holds_only(folder, {SETTINGS, WEIGHTS})
        tensors = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in flat.items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "np"})
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        # safetensors makes files that nobody else may read.
        shutil.copymode(partial / SETTINGS, partial / WEIGHTS)


def load_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """The inverse of `save_adapter`.

    Raises `UserError` for files that are missing or damaged, and adapters of another model.
    """
    path, weights = Path(folder) / SETTINGS, Path(folder) / WEIGHTS
    settings = files.read_object(path, "expected the folder of an adapter")
    if (settings.get("format"), settings.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{path}: not of format {FORMAT} {FORMAT_VERSION}, which this release reads"
        )
    made_for, lineage = settings.get("model"), settings.get("lineage")
    if not isinstance(made_for, dict) or not isinstance(lineage, dict):
        raise UserError(f"{path}: model and lineage must be objects")
    differing = [
        f"{name} {made_for.get(name)}, not {getattr(model, name)}"
        for name in _MODEL_FIELDS
        if made_for.get(name) != getattr(model, name)
    ]
    if differing:
        raise UserError(f"{path}: the adapter is for another model: {'; '.join(differing)}")
    config = from_dict(LoraConfig, settings.get("lora"), f"{path}: lora")
    tensors = files.read_tensors(weights)
    shapes = {name: array.shape for name, array in tensors.items()}
    if problems := misfit(lora.adapter_shapes(config, model), shapes):
        raise UserError(f"{weights}: does not fit the model: {problems}")
    if wrong := [name for name, array in tensors.items() if array.dtype != np.float32]:
        raise UserError(f"{weights}: not float32: {files.few(wrong)}")
    return Adapter(unflatten(tensors), config, lineage)
