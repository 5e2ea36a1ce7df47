"""MAGNeT in JAX: masked, non-autoregressive text-to-music and text-to-sound."""

import importlib

_WHERE = {
    "HybridMAGNeT": "api",
    "MAGNeT": "api",
    "MusicGen": "api",
    "Prompt": "prompts",
    "audio_write": "io.audio",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    # On demand, since commands that need no JAX should not wait for it.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"magnet_jax.{_WHERE[name]}"), name)
