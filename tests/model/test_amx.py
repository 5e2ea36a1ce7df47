import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.config import (
    DecodeConfig,
    KernelConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    with_hybrid_objective,
)
from magnet_jax.errors import UserError
from magnet_jax.model import amx, attention, sharding, t5, transformer
from magnet_jax.train import plan, steps

MODEL = ModelConfig(
    num_codebooks=2, codebook_size=32, width=32, num_heads=2, num_layers=3, text_width=8
)
HAS_TILES = "no AMX" not in str(amx.hindrance())
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="no AMX on this machine")


def choose(products, platform="cpu", dtype="bfloat16", num_devices=1):
    asked, dtype = KernelConfig(products=products), np.dtype(jnp.dtype(dtype))
    chosen = attention.choose_kernels(asked, platform, MODEL, 12, dtype, num_devices=num_devices)
    return chosen.products


@needs_tiles
@pytest.mark.parametrize("sizes", [(33, 64, 17), (1, 5, 3), (700, 256, 129)])
def test_products_and_gradients_are_those_of_the_factors_rounded_once(sizes):
    m, c, n = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((m, c), (c, n), (m, n))
    first, second, weight = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes))
    found, transpose = jax.vjp(jax.jit(amx.matmul), first, second)
    a, b, g = (np.asarray(x, np.float64) for x in (first, second, weight))
    for x, expected in zip((found, *transpose(weight)), (a @ b, g @ b.T, a.T @ g), strict=True):
        assert x.dtype == jnp.bfloat16
        # (half a unit in the last of 8 places, and what float32 sums leave)
        np.testing.assert_allclose(np.asarray(x, np.float64), expected, rtol=2**-8, atol=1e-3)


@needs_tiles
def test_what_goes_wrong_within_reaches_the_caller():
    amx._register()
    call = jax.ffi.ffi_call("magnet_jax_amx_plain", jax.ShapeDtypeStruct((3, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="amx: .*a factor or result of type 11"):
        jax.jit(call)(jnp.ones((3, 2)), jnp.ones((2, 4)))


@needs_tiles
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_layers_gradients_are_those_of_the_products_of_xla(remat):
    params = transformer.init_params(MODEL, jax.random.key(0))
    states = jax.random.normal(jax.random.key(5), (2, 3, MODEL.text_width))
    codes = jax.random.randint(jax.random.key(1), (2, 2, 12), 0, 33)

    def total(params, products):
        model = transformer.bind(MODEL, params)
        text = model.read_text(states, jnp.ones((2, 3), bool), dtype=jnp.bfloat16)
        x_BTD = model.trunk(codes, text, local=False, remat=remat, products=products)
        return jnp.square(model.head(x_BTD, 0)).mean()

    both = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (loss, plain), (again, changed) = both(params, "rows"), both(params, "amx")
    assert abs(again - loss) < 0.01 * loss
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        scale = float(jnp.abs(one).max())
        np.testing.assert_allclose(one, other, atol=0.03 * scale + 1e-9)


@pytest.mark.parametrize("kind", ["magnet", "hybrid"])
def test_training_takes_them_where_it_is_told_to(kind, monkeypatch):
    monkeypatch.setattr(amx, "hindrance", lambda: None)
    config = RunConfig(model=MODEL, decode=DecodeConfig(steps=(1, 1)))
    if kind == "hybrid":
        config = with_hybrid_objective(config)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    t5_config = t5.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    for products, count in (("amx", 3), ("rows", 0)):
        config = dataclasses.replace(config, kernels=KernelConfig(products=products))
        settings = steps.make_settings(config, t5_config, jnp.dtype(jnp.bfloat16), 12, mesh)
        text = plan.lower(settings, 2, 12, 4, 1).as_text()
        found = {name for name in amx._PRODUCTS if f"magnet_jax_amx_{name}" in text}
        assert len(found) == count


def test_an_empty_product_is_zeros():
    found = amx.matmul(jnp.zeros((4, 0), jnp.bfloat16), jnp.zeros((0, 3), jnp.bfloat16))
    assert found.shape == (4, 3) and not found.any()


def test_products_are_chosen_by_platform():
    assert [choose("auto", platform) for platform in ("cpu", "gpu", "tpu")] == [
        "rows", "axes", "axes",
    ]  # fmt: skip
    assert choose("axes") == "axes"


def test_tiles_are_taken_where_nothing_hinders(monkeypatch):
    monkeypatch.setattr(amx, "hindrance", lambda: None)
    assert choose("amx") == "amx"
    for where in ({"dtype": "float32"}, {"num_devices": 2}, {"platform": "tpu"}):
        with pytest.raises(UserError, match="for one CPU device and bfloat16"):
            choose("amx", **where)
    monkeypatch.setattr(amx, "hindrance", lambda: "there are none")
    with pytest.raises(UserError, match="products amx: there are none"):
        choose("amx")


def test_what_hinders_is_named(monkeypatch, tmp_path):
    processors = tmp_path / "cpuinfo"
    monkeypatch.setattr(amx, "Path", lambda name: processors if "cpuinfo" in name else Path(name))
    assert "no AMX" in amx.hindrance()
    processors.write_text("flags: amx_bf16")
    assert "JAX_CPU_ENABLE_ASYNC_DISPATCH" in amx.hindrance()
    monkeypatch.setattr(amx, "_VERSION", (0, 99))
    assert "in another way ((0, 3), not (0, 99))" in amx.hindrance()


@needs_tiles
def test_a_process_ends_and_can_be_interrupted_while_products_run():
    """As a program of its own runs them: the signal finds it in the midst of one.

    (`launch.train` catches signals itself.)
    """
    script = """
import gc, os, signal, sys, threading, time
import jax, jax.numpy as jnp
from magnet_jax.model import amx
amx.use_synchronous_dispatch()
assert amx.hindrance() is None
signal.signal(signal.SIGINT, signal.default_int_handler)  # (shells' background jobs ignore it)
gc.disable()  # what is raised in JAX's own part of it is not heard of
x = jnp.ones((512, 512), jnp.bfloat16)
length = 20_000 if sys.argv[1] == "interrupt" else 1
run = jax.jit(lambda x: jax.lax.scan(lambda x, _: (amx.matmul(x, x), None), x, length=length)[0])
run = run.lower(x).compile()
def interrupt():
    while True:  # what finds the few instructions between two products is not heard of either
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
if sys.argv[1] == "interrupt":
    threading.Thread(target=interrupt, daemon=True).start()
run(x)
"""
    for how in ("end", "interrupt"):
        words = [sys.executable, "-c", script, how]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == (how == "end"), done
        assert ("amx: KeyboardInterrupt" in done.stderr) == (how == "interrupt"), done
