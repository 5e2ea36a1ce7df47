"""What the machine can do at best: the fastest of several large matrix products."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SIZES = (1024, 2048, 4096, 8192)  # rows and columns
REPEATS = 4
LONG_ENOUGH = 0.25  # seconds; a product that takes longer is not followed by a larger one


def jax_peak(dtype: jnp.dtype) -> float:
    """FLOP/s of the fastest product through JAX on its default device."""
    multiply = jax.jit(jnp.matmul)

    def product(size: int) -> Callable[[], object]:
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
        return lambda: jax.block_until_ready(multiply(a, b))

    return _fastest(product)


def torch_peak(dtype: str, device: str) -> float:
    """FLOP/s of the fastest product through PyTorch on `device`."""
    from launch.benchmark.torch_peer import synchronize, torch

    def product(size: int) -> Callable[[], object]:
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
        return lambda: (torch.matmul(a, b), synchronize(device))

    return _fastest(product)


def _fastest(product: Callable[[int], Callable[[], object]]) -> float:
    """The best rate over sizes; `product` gives a call that multiplies two of a size and waits."""
    best = 0.0
    for size in SIZES:
        run = product(size)
        run()  # compiles, warms up
        seconds = min(seconds_of(run) for _ in range(REPEATS))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH:
            break
    return best


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
