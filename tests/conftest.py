"""Eight fake CPU devices, strict shapes, and the small things that several tests need."""

import os
import tempfile

# Programs compiled by one process are there for the next; gone with the test session.
_CACHE = tempfile.TemporaryDirectory(prefix="magnet_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers that the reference implementation printed: GOLDEN_DIR, or ours."""
    return GOLDEN
