"""Compiled programs: made once a shape, announced while they are made, kept between processes."""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import platformdirs

Say = Callable[[str], None]

MOST_PROGRAMS = 64  # kept in memory; the one used longest ago goes first
DISK_BYTES = 4 * 2**30  # of the cache folder; likewise


@dataclasses.dataclass
class _Program:
    run: jax.stages.Compiled
    seconds: float  # that it took to trace and compile
    calls: int = 0


# By function, settings, shapes and placement: what `jax.jit` keeps by itself, with the compilation
# as a step of its own that can be announced and timed.
_programs: OrderedDict[tuple, _Program] = OrderedDict()


def keep_on_disk() -> None:
    """Lets compiled programs outlive the process, in the user's cache folder.

    Leaves alone what JAX was told already (`JAX_COMPILATION_CACHE_DIR`,
    `jax.config.jax_compilation_cache_dir`); JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    Programs that call back into Python, as for a progress bar, are not kept.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(platformdirs.user_cache_dir("magnet_jax")) / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", DISK_BYTES)


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
    # What else a program depends on, of what may change between calls.
    context = (jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64)
    key = (function, structure, shapes, tuple(sorted(static.items())), context)
    if key not in _programs:
        if say is not None:
            say(f"preparing the program for {what} (compiled once, kept on disk) ...")
        started = time.perf_counter()
        compiled = function.lower(*args, **static).compile()
        _programs[key] = _Program(compiled, time.perf_counter() - started)
        if say is not None:
            say(f"ready in {_programs[key].seconds:.1f} s")
        if len(_programs) > MOST_PROGRAMS:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    _programs[key].calls += 1
    return _programs[key].run(*args)


def count() -> int:
    """Programs that are there."""
    return len(_programs)


def calls() -> list[tuple[jax.stages.Compiled, int]]:
    """Each of them, and how often it has run."""
    return [(program.run, program.calls) for program in _programs.values()]


def seconds() -> float:
    """Seconds that they took to compile."""
    return sum(program.seconds for program in _programs.values())


def forget() -> None:
    """Forgets all programs of this process."""
    _programs.clear()


def _placement(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) else None
