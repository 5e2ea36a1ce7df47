"""Folders that transformers wrote: config.json, and weights in one file or several.

A MusicGen's folder holds three models. The settings of each stand under its name in config.json
('text_encoder', 'audio_encoder', 'decoder'), and its tensors have that name for a prefix.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.io import files, hub
from magnet_jax.io.torch_env import as_arrays, load_tensors

# The first that is there is read, as in transformers.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# The same as patterns for the hub: what to ask for, and what else where that is not there.
_SAFE = ("model*.safetensors", "model.safetensors.index.json")
_TORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def model_type(folder: Path) -> str | None:
    """Which of transformers' models a folder holds; None where it holds none."""
    try:
        found = files.read_object(folder / "config.json", "").get("model_type")
    except UserError:
        return None
    return found if isinstance(found, str) else None


def fetch(source: str, names: Sequence[str], what: str, instead: str = "") -> Path:
    """The folder of a repository of the hub, with these files and its weights; see `hub.fetch`."""
    folder = hub.fetch(source, (*names, *_SAFE), what, instead)
    if not any(folder.glob("model*.safetensors")):
        folder = hub.fetch(source, (*names, *_SAFE, *_TORCH), what, instead)
    return folder


def part_of(config: dict[str, Any], part: str) -> tuple[dict[str, Any], str]:
    """The settings of a part, and the prefix of its tensors; of other models than MusicGen all."""
    if config.get("model_type") != "musicgen":
        return config, ""
    found = config.get(part)
    return found if isinstance(found, dict) else {}, f"{part}."


def read_tensors(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True, prefix: str = ""
) -> tuple[dict[str, np.ndarray], Path]:
    """The wanted tensors by their names behind the prefix, and the file that they are from.

    Raises `UserError` for weights that are missing, damaged or not finite.
    """
    origin = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if origin is None:
        others = files.weights_beside(folder)
        raise UserError(f"{folder}: no {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} in it{others}")
    parts = [origin]
    if origin.suffix == ".json":
        parts = [folder / name for name in _part_names(origin)]
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        if part is not origin and not part.is_file():
            raise UserError(f"{part}: no such file, but {origin} names it")
        mine = lambda name: name.startswith(prefix) and wanted(name.removeprefix(prefix))  # noqa: E731
        if part.suffix == ".safetensors":
            held = files.read_tensors(part, mine)
        else:
            state = load_tensors(part)
            if isinstance(state, Mapping):
                kept = {n: tensor for n, tensor in state.items() if isinstance(n, str) and mine(n)}
                # Of what holds none of them, it is to be said what it holds.
                state = kept or (state if part is origin else {})
            held = as_arrays(part, state)
        tensors |= {name.removeprefix(prefix): array for name, array in held.items()}
    return tensors, origin


def _part_names(index: Path) -> list[str]:
    """The files that an index of weights names: in its own folder, and nowhere else."""
    weight_map = files.read_object(index, "the folder needs it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no 'weight_map' from tensors to files in it")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{index}: {name!r} is not the plain name of a file beside it")
    return sorted(set(weight_map.values()))
