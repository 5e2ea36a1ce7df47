"""The one way to torch: every module that needs it calls `import_torch` first."""

import importlib.machinery
import pickle
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax.errors import UserError, first_line
from magnet_jax.io import files


def import_torch() -> types.ModuleType:
    """Imports torch and makes sure that `import torchaudio` cannot fail afterwards.

    The published torchaudio wheel does not load beside a CPU torch, yet the `encodec` package and
    transformers' model modules import it. Nothing here uses its compiled part, so where the real
    one fails a module without that stands in: its modules of plain Python can be imported from it,
    such as `torchaudio.compliance.kaldi`; anything else raises `AttributeError`, `ImportError`
    or `OSError`.
    """
    import torch

    if "torchaudio" in sys.modules:
        return torch
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        # a failed import leaves its submodules behind
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stand_in = types.ModuleType("torchaudio", "Stands in for a torchaudio that cannot load.")
        # libraries look for installed packages with find_spec, which needs a __spec__
        stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
        stand_in.__version__ = "0.0.0"
        real = importlib.machinery.PathFinder.find_spec("torchaudio")
        stand_in.__path__ = list(real.submodule_search_locations) if real else []
        sys.modules["torchaudio"] = stand_in
    return torch


def load_tensors(path: Path) -> Any:
    """What a `torch.save` or safetensors file holds, on the CPU. Runs no code in it.

    Raises `UserError` for a missing, damaged or unsafe file.
    """
    torch = import_torch()
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # what a damaged file raises depends on the damage
        if unlike := files.unlike_weights(Path(path)):
            raise UserError(f"{path}: not readable as weights ({unlike})") from None
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(_refused(path, str(error))) from None
        raise UserError(f"{path}: damaged, not readable as weights ({first_line(error)})") from None


def _refused(path: Path, complaint: str) -> str:
    """What to say of a file that PyTorch does not open without running code in it."""
    named = re.search(r"GLOBAL ([\w.]+)", complaint)
    mend = "re-save its tensors alone"
    if named and named[1].startswith("omegaconf."):  # so AudioCraft saves while it trains
        mend = "AudioCraft's audiocraft.utils.export.export_lm writes a state_dict.bin from it"
    holds = f"holds {named[1]}, " if named else "is damaged, or holds "
    return (
        f"{path}: not readable as weights and refused: it {holds}more than tensors and plain "
        f"values, and loading it could run code; {mend}"
    )


def as_arrays(where: Path | str, tensors: Any) -> dict[str, np.ndarray]:
    """Torch's tensors by name as NumPy arrays, see `files.finite`.

    Raises `UserError` for anything but plain tensors, and for numbers that are not finite.
    """
    torch, arrays = import_torch(), {}
    if not isinstance(tensors, Mapping):
        raise UserError(f"{where}: holds something other than tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where}: holds {name}, which is not a tensor")
        # NumPy has no bfloat16; widening is exact.
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        try:
            arrays[name] = tensor.detach().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised and the like
            raise UserError(f"{where}: {name} is not a plain tensor ({error})") from None
    return files.finite(where, arrays)
