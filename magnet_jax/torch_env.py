"""The one way to torch: every module that needs it calls `import_torch` first."""

import importlib.machinery
import sys
import types


def import_torch() -> types.ModuleType:
    """Imports torch and makes sure that `import torchaudio` cannot fail afterwards.

    The published torchaudio wheel does not load beside a CPU torch, yet the `encodec` package and
    transformers' model modules import it. Nothing here uses it, so where the real one fails an
    empty module stands in; using that raises `AttributeError` or `ModuleNotFoundError`.
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
        sys.modules["torchaudio"] = stand_in
    return torch
