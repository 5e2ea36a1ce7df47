"""AudioCraft's checkpoint files and their settings: opened without running code in them, written.

An AudioCraft folder holds `state_dict.bin`, the language model, and `compression_state_dict.bin`,
the codec. Both are `torch.save` files of {'best_state': tensors, 'xp.cfg': YAML text, 'version',
'exported'}; a codec may instead be a pointer {'pretrained': name}.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from magnet_jax.errors import UserError
from magnet_jax.io.files import few
from magnet_jax.io.torch_env import as_arrays, import_torch, load_tensors

AUDIOCRAFT_VERSION = "1.4.0a2"  # of the layout written here
LM_FILE = "state_dict.bin"
CODEC_FILE = "compression_state_dict.bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """How an imported model stood in its AudioCraft files, so that an export stands alike."""

    lm_xp_cfg: str
    """YAML text."""
    lm_dtype: Literal["float32", "float16"]
    codec_pretrained: str
    """Hub id that the codec's file pointed to; empty where it held weights."""
    codec_xp_cfg: str
    """YAML text; empty for a pointer, and where another codec was given at import."""
    codec_dtype: Literal["float32", "float16"]


class File(NamedTuple):
    """What a `.bin` file holds. A pointer has a name and nothing else, weights have no name."""

    tensors: dict[str, np.ndarray]
    xp_cfg: dict[str, Any]
    xp_cfg_text: str  # as it stood in the file
    dtype: str  # 'float16' where all tensors are, else 'float32'
    pretrained: str  # hub id of the weights that are meant


def read_file(path: Path) -> File:
    """Opens an AudioCraft `.bin` file. Runs no code in it.

    Raises `UserError` for a missing, damaged or unsafe file, or one of another layout.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("pretrained"), str):
        return File({}, {}, "", "float32", content["pretrained"])
    state = _best_state(content) if isinstance(content, dict) else None
    if state is None or not isinstance(content.get("xp.cfg"), str):
        raise UserError(
            f"{path}: not an AudioCraft checkpoint (no 'best_state' and 'xp.cfg'{_held(content)})"
        )
    tensors = as_arrays(path, state)
    xp_cfg = parse_xp_cfg(content["xp.cfg"], f"{path}: its 'xp.cfg'")
    halves = all(array.dtype == np.float16 for array in tensors.values())
    dtype = "float16" if tensors and halves else "float32"
    return File(tensors, xp_cfg, content["xp.cfg"], dtype, "")


def _best_state(content: Mapping) -> dict[str, Any] | None:
    """The best weights of a checkpoint, which FSDP keeps under a key of its own."""
    states = [content.get(key) for key in ("fsdp_best_state", "best_state")]
    states = [state for state in states if isinstance(state, dict)]
    # The other one is there, too, and empty.
    state = next(filter(None, states), states[0] if states else None)
    if state is not None and isinstance(state.get("model"), dict):
        state = state["model"]  # so AudioCraft's solvers keep it
    # FSDP wraps modules, which may show in their names.
    return state and {
        str(name).replace("_fsdp_wrapped_module.", ""): t for name, t in state.items()
    }


def _held(content: Any) -> str:
    """What a file holds instead, in a few words."""
    if not isinstance(content, dict):
        return f"; it holds a {type(content).__name__}"
    if "pytorch-lightning_version" in content:
        return "; it is a checkpoint of PyTorch Lightning"
    return f"; it holds {few([str(key) for key in content])}" if content else "; it is empty"


def parse_xp_cfg(text: str, where: str) -> dict[str, Any]:
    """Settings from their YAML text; `UserError` where it is none."""
    try:
        xp_cfg = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        xp_cfg = None
    if not isinstance(xp_cfg, dict):
        raise UserError(f"{where} is not YAML settings")
    return xp_cfg


def write_weights(
    path: Path, tensors: Mapping[str, np.ndarray], xp_cfg: Mapping | str, dtype: str = "float32"
) -> None:
    """Writes weights and settings, the latter as a dict or as YAML text.

    Raises `UserError` where `dtype` is narrower than a tensor's values.
    """
    torch = import_torch()
    state = {
        name: torch.from_numpy(narrowed(path, name, array, dtype))
        for name, array in tensors.items()
    }
    text = xp_cfg if isinstance(xp_cfg, str) else yaml.safe_dump(dict(xp_cfg), sort_keys=False)
    _save(path, {"best_state": state, "xp.cfg": text})


def narrowed(path: Path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy of a tensor in the type that it came in, which loses nothing of its values.

    Raises `UserError`, which names the file to write and the tensor, where it would.
    """
    with np.errstate(over="ignore"):
        narrow = np.array(array, dtype)
    if not np.array_equal(narrow.astype(array.dtype), array):
        raise UserError(
            f"{path}: the tensor {name} does not fit {dtype}, in which the model came: its weights "
            "have changed since"
        )
    return narrow


def write_pointer(path: Path, pretrained: str) -> None:
    """Writes the name of published weights in place of weights."""
    _save(path, {"pretrained": pretrained})


def _save(path: Path, content: dict[str, Any]) -> None:
    content |= {"version": AUDIOCRAFT_VERSION, "exported": True}
    with Path(path).open("wb") as file:  # given a path, torch reports a full disk as RuntimeError
        import_torch().save(content, file)


def misfits(xp_cfg: Mapping, required: Mapping[str, Any], or_absent: Mapping[str, Any]) -> list:
    """Complaints of the settings that have not the only value that fits.

    Those of `required` must be given; one of `or_absent` that is not is taken to fit.
    """
    found = {name: xp_setting(xp_cfg, name) for name in required}
    found |= {name: xp_setting(xp_cfg, name, fitting) for name, fitting in or_absent.items()}
    return [
        f"{name} must be {fitting}, not {found[name]}"
        for name, fitting in (*required.items(), *or_absent.items())
        if found[name] != fitting
    ]


def xp_setting(xp_cfg: Mapping, name: str, default: Any = None) -> Any:
    """The setting 'a.b' of an xp.cfg, or `default`; '${c.d}' is followed to what it stands for."""
    path, node = name, None
    for _ in range(10):  # references in a ring end as the text they are
        node = xp_cfg
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        reference = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if not reference:
            return node
        path = reference[1]
    return node
