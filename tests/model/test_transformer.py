"""The network by property: leaks, sharding, remat (its logits: test_golden.py)."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from magnet_jax.config import KernelConfig, MeshConfig, ModelConfig, RunConfig
from magnet_jax.convert import lm_rules, t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import kernels, sharding, transformer
from magnet_jax.train import objective, steps

SMALL = ModelConfig(
    codebook_size=32, width=16, num_heads=4, num_layers=3, text_width=12, local_context=2
)


@functools.partial(jax.jit, static_argnames=("config", "local", "remat"))
def logits(params, states, mask, zeros, codes, stage, *, config, local, remat="none"):
    model = transformer.bind(config, params)
    text = model.read_text(states, mask, zeros)
    x_BTD = model.trunk(codes, text, local=local, remat=remat)
    return model.head(x_BTD, stage)


def text_of(model, batch=1):
    states = jax.random.normal(jax.random.key(5), (batch, 3, SMALL.text_width))
    return model.read_text(states, jnp.ones((batch, 3), bool))


@pytest.mark.parametrize("first_context", [0, 4])
def test_nothing_leaks_past_the_local_context(first_context):
    """Zero gradient beyond L * context frames, and some just within."""
    config = dataclasses.replace(SMALL, first_context=first_context)
    params = transformer.init_params(config, jax.random.key(0))
    model = transformer.bind(config, params)
    num_frames, middle = 41, 20
    codes_BKT = jax.random.randint(jax.random.key(1), (1, 4, num_frames), 0, 32)

    def output(embed, stage):
        # One embedding row a frame, so that its gradient says what the frame contributed.
        own = dataclasses.replace(config, codebook_size=num_frames - 1)
        shifted = transformer.bind(own, params | {"embed": embed})
        places = jnp.broadcast_to(jnp.arange(num_frames), codes_BKT.shape)
        states = shifted.trunk(places, text_of(model), local=stage > 0)
        return states[0, middle].sum()

    # A sum of layer-normed states is constant; weigh it by a random vector through the scale.
    params["norm_final"]["scale"] = jax.random.normal(jax.random.key(2), (SMALL.width,))
    embed = jax.random.normal(jax.random.key(3), (4, num_frames, SMALL.width))
    for stage, context in ((0, first_context), (1, SMALL.local_context)):
        reach = SMALL.num_layers * context
        gradient_T = jnp.abs(jax.jit(jax.grad(output), static_argnums=1)(embed, stage)).sum((0, 2))
        distance_T = abs(np.arange(num_frames) - middle)
        if not context:
            assert (gradient_T > 0).all()
        else:
            assert (gradient_T[distance_T > reach] == 0).all()
            assert (gradient_T[distance_T <= reach] > 0).all()


def test_without_a_restricted_context_every_stage_sees_everything():
    """Table 2's models without it: stage 2 has the logits of full attention."""
    params = transformer.init_params(SMALL, jax.random.key(0))
    states = jax.random.normal(jax.random.key(5), (2, 3, SMALL.text_width))
    codes = jax.random.randint(jax.random.key(1), (2, 4, 30), 0, 33)
    text = (states, jnp.ones((2, 3), bool), jnp.zeros(2, jnp.int32))
    run = functools.partial(logits, params, *text, codes, 2)
    unrestricted = dataclasses.replace(SMALL, local_context=0)
    full = run(config=SMALL, local=False)
    np.testing.assert_array_equal(run(config=unrestricted, local=True), full)
    wide = dataclasses.replace(SMALL, local_context=30)
    np.testing.assert_allclose(run(config=wide, local=True), full, atol=1e-5)
    assert abs(run(config=SMALL, local=True) - full).max() > 1e-2


def test_a_row_never_depends_on_its_neighbours():
    params = transformer.init_params(SMALL, jax.random.key(0))
    states = jax.random.normal(jax.random.key(5), (2, 6, SMALL.text_width))
    codes = jax.random.randint(jax.random.key(1), (2, 4, 12), 0, 33)
    mask = jnp.arange(6)[None] < jnp.array([[3], [6]])
    run = functools.partial(logits, params, config=SMALL, local=False)
    both = run(states, mask, jnp.zeros(2, jnp.int32), codes, 0)
    alone = run(states[:1, :3], mask[:1, :3], jnp.zeros(1, jnp.int32), codes[:1], 0)
    np.testing.assert_allclose(both[0], alone[0], atol=1e-5)


@pytest.mark.parametrize("local", [False, True])
def test_rows_beyond_the_texts_are_rows_without_text(local):
    """Bit for bit: cross-attention over nothing adds zeros."""
    params = transformer.init_params(SMALL, jax.random.key(0))
    states = jax.random.normal(jax.random.key(5), (2, 3, SMALL.text_width))
    codes = jax.random.randint(jax.random.key(1), (4, 4, 12), 0, 33)

    @jax.jit
    def run(params, mask):
        model = transformer.bind(SMALL, params)
        return model.trunk(codes, model.read_text(states[: len(mask)], mask), local=local)

    fewer = run(params, jnp.ones((2, 3), bool))
    states = jnp.concatenate([states, states])
    all_rows = run(params, jnp.ones((4, 3), bool).at[2:].set(False))
    np.testing.assert_array_equal(fewer, all_rows)
    assert (fewer[:2] != fewer[2:]).any()


@pytest.mark.parametrize("policy", ["products", "mlp", "attention", "full"])
def test_remat_changes_neither_values_nor_gradients(policy):
    params = transformer.init_params(SMALL, jax.random.key(0))
    states = jax.random.normal(jax.random.key(5), (2, 3, SMALL.text_width))
    codes = jax.random.randint(jax.random.key(1), (2, 4, 12), 0, 33)

    def total(params, remat):
        out = logits(
            params, states, jnp.ones((2, 3), bool), jnp.zeros(2, jnp.int32), codes, 1,
            config=SMALL, local=True, remat=remat,
        )  # fmt: skip
        return jnp.square(out).sum()

    both = jax.jit(jax.value_and_grad(total), static_argnums=1)
    plain, changed = both(params, "none"), both(params, policy)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_positions_are_cosines_then_sines():
    table = transformer.sinusoids(7, 8)
    for t in range(7):
        for i in range(4):
            phase = t / 10000 ** (i / 3)
            assert table[t, i] == pytest.approx(np.cos(phase), abs=1e-6)
            assert table[t, 4 + i] == pytest.approx(np.sin(phase), abs=1e-6)


def test_no_biases_but_the_norms_and_the_text_projections():
    leaves, _ = jax.tree.flatten_with_path(transformer.init_params(SMALL, jax.random.key(0)))
    biases = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    biases = {name for name in biases if "bias" in name}
    assert biases == {"text_proj/bias", "norm_final/bias"} | {
        f"blocks/norm_{name}/bias" for name in ("attn", "cross_attn", "mlp")
    }


def as_audiocraft_begins(model):
    """The law by which AudioCraft begins each tensor of a checkpoint, by its names and formulas.

    It is a number, ('uniform', its bound) or ('gaussian', its deviation), cut at three of those.
    """
    laws = {}
    for name, shape in lm_rules.audiocraft_shapes(model).items():
        fan_in = shape[-1]
        layer = re.match(r"transformer\.layers\.(\d+)\.(self_attn|cross_attention|linear)", name)
        if "norm" in name:
            laws[name] = 1.0 if name.endswith("weight") else 0.0
        elif ".output_proj." in name:  # a Linear that AudioCraft leaves as torch makes it
            laws[name] = ("uniform", 1 / math.sqrt(model.text_width))
        elif name.endswith("bias"):
            laws[name] = 0.0
        elif name.endswith("in_proj_weight"):  # no Linear by name, so as torch makes it
            laws[name] = ("uniform", 1 / math.sqrt(fan_in))
        elif layer:  # weight_init gaussian, depthwise_init current
            depth = int(layer[1]) + 1
            laws[name] = ("gaussian", 1 / math.sqrt(fan_in) / math.sqrt(2 * depth))
        else:
            assert name.startswith(("emb.", "linears.")), name
            laws[name] = ("gaussian", 1 / math.sqrt(fan_in))
    return laws


EVERYTHING = dict.fromkeys(
    ("attention_bias", "mlp_bias", "head_bias", "query_key_norm", "cross_query_key_norm"), True
)
DELAYED = {"delays": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    "settings",
    [{}, EVERYTHING, {"kind": "hybrid"} | DELAYED, {"kind": "musicgen"} | DELAYED],
    ids=["magnet", "biases and norms", "hybrid", "musicgen"],
)
def test_every_tensor_of_every_layer_begins_as_in_audiocraft(settings):
    model = ModelConfig(
        codebook_size=256, width=64, num_heads=4, num_layers=5, text_width=96, **settings
    )
    params = jax.device_get(transformer.init_params(model, jax.random.key(0)))
    tensors, laws = lm_rules.to_audiocraft(params, model), as_audiocraft_begins(model)
    assert tensors.keys() == laws.keys()
    for name, law in laws.items():
        array = tensors[name]
        if isinstance(law, float):
            assert (array == law).all(), name
            continue
        kind, size = law
        law = stats.truncnorm(-3, 3, scale=size)
        if kind == "uniform":
            law = stats.uniform(-size, 2 * size)
        least, most = law.support()
        assert least <= array.min() and array.max() <= most, name
        assert array.std() == pytest.approx(law.std(), rel=4 / math.sqrt(array.size)), name
        assert stats.kstest(array.ravel(), law.cdf).pvalue > 1e-4, name
    for leaf in jax.tree.leaves(params["blocks"]):
        assert not leaf.std() or len({layer.tobytes() for layer in leaf}) == len(leaf)


def test_shardings_of_the_stacked_layers():
    """A Flax release that changed these would change them silently."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: s.spec, sharding.model_shardings(SMALL, mesh))
    assert specs["blocks"]["attn"]["query"] == P(None, "fsdp", "tensor", None)
    assert specs["blocks"]["attn"]["out"] == P(None, "tensor", None, "fsdp")
    assert specs["blocks"]["mlp"]["up"] == P(None, "fsdp", "tensor")
    assert specs["blocks"]["mlp"]["down"] == P(None, "tensor", "fsdp")
    assert specs["blocks"]["norm_attn"]["scale"] == P(None, "fsdp")
    assert specs["embed"] == P(None, None, "fsdp")
    assert specs["heads"] == P(None, "fsdp", None)


@pytest.mark.parametrize("mesh", [dict(data=3), dict(data=0), dict(data=-1, fsdp=-1)])
def test_impossible_meshes_are_refused(mesh):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(MeshConfig(**mesh))


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_of_float32_are_of_float32(dtype, precision):
    """On accelerators the default would round their factors; here it shows in the program alone."""
    run = transformer.exact_products(lambda x, *, dtype: x.astype(dtype) @ x.astype(dtype))
    text = jax.jit(functools.partial(run, dtype=jnp.dtype(dtype))).lower(jnp.ones((4, 4))).as_text()
    assert f"precision = [{precision}, {precision}]" in text


@pytest.mark.parametrize("full", ["dense", "chunks"])
def test_gradients_of_float32_are_of_float32(full):
    """Those too whose rules are our own, which are traced last."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    t5_config, _, _ = t5_files.load("embedded")
    config = RunConfig(model=SMALL, remat="products")
    settings = steps.make_settings(config, t5_config, jnp.dtype("float32"), 12, mesh)
    attend = kernels.with_kernels(KernelConfig(full=full), near=False, mesh=mesh)
    codes = jax.random.randint(jax.random.key(1), (2, 4, 12), 0, 33)

    @transformer.exact_products
    def loss(params, codes, dtype=jnp.float32):
        model = transformer.bind(SMALL, params)
        states_BTD = model.trunk(codes, text_of(model, 2), local=False, attend=attend)
        nll = states_BTD.sum((1, 2))
        return nll.sum(), objective.LossAux(nll, nll, nll)

    run = functools.partial(steps.batch_gradients, loss, settings=settings, shardings=None)
    params = transformer.init_params(SMALL, jax.random.key(0))
    products = re.findall("stablehlo.dot_general.*", jax.jit(run).lower(params, codes).as_text())
    assert len(products) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
