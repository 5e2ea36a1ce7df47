"""Eight fake CPU devices, strict shapes, and the small things that several tests need."""

import gc
import os
import sys
import tempfile
from pathlib import Path

from constants import EIGHT, XLA_FLAGS

# Not the user's cache of compiled programs; gone with the test session.
_CACHE = tempfile.TemporaryDirectory(prefix="magnet_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
# Where Python is told to keep no bytecode, every process compiles the libraries anew: two seconds
# each. The session's workers, and what they start, share what is gone with the session.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = f"{_CACHE.name}/python"
    sys.dont_write_bytecode = False
# What tests start imports this checkout, and not the folders of tests that have the same names.
_ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {EIGHT}"
# One thread for PyTorch and BLAS: several of them, beside another worker's, wait in busy loops.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # where the code itself asks for more
os.environ["HF_HUB_OFFLINE"] = "1"
# Without credentials Google's libraries look for a machine of theirs, for six seconds each time.
os.environ["NO_GCE_CHECK"] = "true"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # as `io.bucket` does, before the import

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

from magnet_jax import programs  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# A few examples, the same ones each time.
hypothesis.settings.register_profile(
    "few", derandomize=True, max_examples=50, deadline=None, database=None
)
hypothesis.settings.load_profile("few")

# Most of the suite's time is compilation of programs that run once, on little. So they are compiled
# quickly, and not kept on disk; XLA's newer kernels would take three times as long. What is equal
# to the reference, or to the last bit after a resume, is shown on programs as users have them.
AS_USERS_RUN = ("golden", "end_to_end", "resume")
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
NEVER = 3600.0  # seconds that a program would have to take to be kept on disk

# Tracing makes many small objects, and the libraries' own need not be looked through every time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

# Numbers that the reference implementation printed: ours, and those to be checked.

# The files that take minutes go first, so that no worker is left alone with one at the end.
LONGEST = ("bucket", "loop", "end_to_end", "resume", "job", "api", "benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Sets how this module's programs are compiled, here and in processes that it starts."""
    if request.module.__name__.removeprefix("test_") in AS_USERS_RUN:
        yield
        return
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    compile_options = compiler.get_compile_options

    def quick_options(*args, env_options_overrides=None, **keywords):
        overrides = QUICK | (env_options_overrides or {})
        return compile_options(*args, env_options_overrides=overrides, **keywords)

    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick_options)
        patch.setenv("XLA_FLAGS", f"{XLA_FLAGS} {EIGHT} {flags}")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(NEVER))
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", NEVER)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)


# With thousands of compiled programs a process runs out of memory maps (65,530), and XLA crashes.
MANY_MAPS = 30_000
_quick = [None]  # how the programs that are kept were compiled


@pytest.fixture(scope="module", autouse=True)
def forget_programs(request):
    """Modules share programs that are compiled alike, as long as there is room for them."""
    quick = request.module.__name__.removeprefix("test_") not in AS_USERS_RUN
    maps = Path("/proc/self/maps")
    many = not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS
    if many or quick != _quick[0]:
        programs.forget()
        jax.clear_caches()
    _quick[0] = quick


# --- tokenization ---------------------------------------------------------------------------------


@pytest.fixture
def one_codec(monkeypatch):
    """The embedded codec, loaded once for all tokenization jobs."""
    from tokenizing import load_once

    from tokenization import maker

    codec = load_once("embedded")
    monkeypatch.setattr(maker, "load_codec", lambda source, device, count: codec)
    return codec


@pytest.fixture
def inline_decoder(monkeypatch):
    """Decodes in the thread that asks: to start processes takes most of a small job's time."""
    from tokenizing import InlineDecoder

    from tokenization.intake import decoder

    monkeypatch.setattr(decoder, "Decoder", InlineDecoder)


@pytest.fixture
def stub(inline_decoder, monkeypatch):
    """A codec that costs nothing, for jobs whose tokens are not the subject."""
    from tokenizing import stub_codec

    from tokenization import maker

    monkeypatch.setattr(maker, "load_codec", stub_codec)
