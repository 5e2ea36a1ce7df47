"""Compiled programs: made once a shape, announced while they are made, kept between processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import platformdirs

Say = Callable[[str], None]

# By function, settings, shapes and placement. What `jax.jit` keeps by itself, with the compilation
# as a step of its own that can be announced and timed.
_compiled: dict[tuple, jax.stages.Compiled] = {}


def keep_on_disk() -> None:
    """Lets compiled programs outlive the process, in the user's cache folder.

    Leaves alone what JAX was told already (`JAX_COMPILATION_CACHE_DIR`,
    `jax.config.jax_compilation_cache_dir`); JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(platformdirs.user_cache_dir("magnet_jax")) / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a command line runs dozens of them before the large one.
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def call(function: Any, *args: Any, what: str, say: Say | None = None, **static: Any) -> Any:
    """Calls a jitted function; says so where that needs a new program, and how long it took.

    Args:
      function: from `jax.jit`.
      args: arrays, in trees.
      what: names the program for people.
      say: takes the lines, if anyone wants them.
      static: the function's static arguments.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((jnp.shape(x), jnp.result_type(x), _placement(x)) for x in leaves)
    key = (function, structure, shapes, tuple(sorted(static.items())))
    if key not in _compiled:
        if say is not None:
            say(f"compiling {what}, once for this shape ...")
        started = time.perf_counter()
        _compiled[key] = function.lower(*args, **static).compile()
        if say is not None:
            say(f"compiled in {time.perf_counter() - started:.1f} s")
    return _compiled[key](*args)


def count() -> int:
    """Programs made so far."""
    return len(_compiled)


def forget() -> None:
    """Forgets all programs of this process."""
    _compiled.clear()


def _placement(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) else None
