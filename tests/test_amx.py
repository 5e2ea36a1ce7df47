import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import amx, attention, transformer
from magnet_jax.config import KernelConfig, ModelConfig
from magnet_jax.errors import UserError

MODEL = ModelConfig(
    num_codebooks=2, codebook_size=32, width=32, num_heads=2, num_layers=3, text_width=8
)
needs_tiles = pytest.mark.skipif(not amx.is_available(), reason="no AMX on this machine")


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
    with pytest.raises(jax.errors.JaxRuntimeError, match="amx: a factor or result of type 11"):
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


def test_products_are_chosen_by_platform_and_precision():
    assert [choose("auto", platform) for platform in ("tpu", "gpu")] == ["axes", "axes"]
    assert choose("auto", dtype="float32") == choose("auto", num_devices=2) == "rows"
    assert choose("auto") == ("amx" if amx.is_available() else "rows")
    assert choose("rows") == "rows"


@pytest.mark.parametrize(
    "where",
    [{"dtype": "float32"}, {"num_devices": 2}, {"platform": "tpu"}],
    ids=lambda where: next(iter(where)),
)
def test_tiles_that_cannot_be_used_are_refused(where):
    with pytest.raises(UserError, match=re.escape("kernels.products amx needs one CPU device")):
        choose("amx", **where)


def test_an_interface_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(amx, "_VERSION", (0, 99))
    assert not amx.is_available.__wrapped__()
