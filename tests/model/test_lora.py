"""LoRA held to plain NumPy."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import TINY, assert_same_bits, random_adapters, random_params

from magnet_jax.config import LoraConfig, MeshConfig, from_dict
from magnet_jax.convert import lm_rules
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import lora, sharding, transformer

LORA = LoraConfig(rank=2, alpha=3.0)


def small_params() -> dict:
    return jax.tree.map(lambda x: 0.3 * x, random_params(TINY))


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    codes_BKT = rng.integers(0, TINY.codebook_size + 1, (2, TINY.num_codebooks, 7))
    states_BSE = rng.normal(size=(2, 4, TINY.text_width)).astype(np.float32)
    return codes_BKT.astype(np.int32), states_BSE, np.arange(4) < np.array([[4], [2]])


def logits(params, adapters=None, config: LoraConfig = LORA) -> jax.Array:
    """Of both codebooks [B, K, T, V], seen as stage 0 sees."""
    codes_BKT, states_BSE, mask_BS = inputs()
    if adapters is not None:
        params = lora.merge_adapters(params, adapters, config)
    network = transformer.bind(TINY, params)
    states = network.trunk(codes_BKT, network.read_text(states_BSE, mask_BS), local=False)
    return network.all_heads(states)


def test_settings():
    with pytest.raises(UserError, match="lora.rank"):
        LoraConfig(rank=-1)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="lora.alpha"):
            LoraConfig(alpha=alpha)
    for targets in ((), ("self", "self"), ("heads",)):
        with pytest.raises(UserError, match="lora.targets"):
            LoraConfig(targets=targets)
    assert (LORA.scale, LoraConfig().scale) == (1.5, 0.0)
    values = json.loads(json.dumps(dataclasses.asdict(LORA)))
    assert from_dict(LoraConfig, values, "lora") == LORA


def test_fresh_adapters_change_no_bit():
    params, key = small_params(), jax.random.key(1)
    adapters = jax.jit(lora.init_adapters, static_argnums=(0, 1))(LORA, TINY, key)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(adapters).items()}
    assert shapes == lora.adapter_shapes(LORA, TINY)
    assert shapes["blocks/attn/query/a"] == (2, 12, 2)
    assert shapes["blocks/attn/query/b"] == (2, 2, 3, 4)
    assert shapes["blocks/cross_attn/out/a"] == (2, 3, 4, 2)
    assert shapes["blocks/cross_attn/out/b"] == (2, 2, 12)
    assert shapes["blocks/mlp/down/a"] == (2, 24, 2)
    assert len(shapes) == 20
    for path, leaf in trees.flatten(adapters).items():
        bound = 1 / math.sqrt(24 if path == "blocks/mlp/down/a" else 12)
        assert leaf.dtype == jnp.float32
        peak = float(jnp.abs(leaf).max())
        assert peak == 0 if path.endswith("/b") else 0.6 * bound < peak <= bound
    np.testing.assert_array_equal(jax.jit(logits)(params), jax.jit(logits)(params, adapters))

    # What is not adapted is passed on, and an adapter does not depend on the others.
    some = dataclasses.replace(LORA, targets=("mlp",))
    few = lora.init_adapters(some, TINY, key)
    assert few["blocks"].keys() == {"mlp"}
    assert_same_bits(
        trees.flatten(few["blocks"]), trees.flatten({"mlp": adapters["blocks"]["mlp"]})
    )
    merged = lora.merge_adapters(params, few, some)
    assert merged["blocks"]["attn"]["query"] is params["blocks"]["attn"]["query"]
    assert lora.init_adapters(LoraConfig(), TINY, key) == {}
    assert_same_bits(
        trees.flatten(lora.merge_adapters(params, {}, LoraConfig())),
        trees.flatten(params),
    )


def test_merging_refuses_what_is_no_adapter():
    with pytest.raises(ValueError, match="blocks/attn/query: an adapter of rank 2, not 4"):
        lora.merge_adapters(small_params(), random_adapters(LORA), LoraConfig(rank=4))
    with pytest.raises(ValueError, match="heads/a"):
        lora.merge_adapters(small_params(), {"heads": {"a": np.ones(2)}}, LORA)


def numpy_logits(state: dict, factors: dict, scale: float) -> np.ndarray:
    """AudioCraft's network in NumPy, every adapted product with its low-rank one beside it."""
    codes_BKT, text_BSE, mask_BS = inputs()
    batch, _, frames = codes_BKT.shape
    width = TINY.width

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, weight, adapter):
        a, b = factors[adapter]
        return x @ weight.T + scale * ((x @ a) @ b)

    def attend(x, memory, mask_BS, name):
        weights = np.split(state[f"{name}.in_proj_weight"], 3)
        sources = ((x, "q_proj"), (memory, "k_proj"), (memory, "v_proj"))
        query, key, value = (
            linear(y, w, f"{name}.{proj}")
            .reshape(batch, -1, TINY.num_heads, TINY.head_size)
            .transpose(0, 2, 1, 3)
            for (y, proj), w in zip(sources, weights)
        )
        scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(TINY.head_size)
        exps = np.exp(scores) * mask_BS[:, None, None]
        out = exps / exps.sum(-1, keepdims=True) @ value
        out = out.transpose(0, 2, 1, 3).reshape(batch, frames, width)
        return linear(out, state[f"{name}.out_proj.weight"], f"{name}.out_proj")

    x = sum(state[f"emb.{k}.weight"][codes_BKT[:, k]] for k in range(TINY.num_codebooks))
    x = x + transformer.sinusoids(frames, width)
    name = "condition_provider.conditioners.description.output_proj"
    text = text_BSE @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    for i in range(TINY.num_layers):
        layer = f"transformer.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        x = x + attend(h, h, np.ones((batch, frames)), f"{layer}.self_attn")
        h = norm(x, f"{layer}.norm_cross")
        x = x + attend(h, text, mask_BS, f"{layer}.cross_attention")
        h = norm(x, f"{layer}.norm2")
        h = linear(h, state[f"{layer}.linear1.weight"], f"{layer}.linear1")
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = x + linear(h, state[f"{layer}.linear2.weight"], f"{layer}.linear2")
    x = norm(x, "out_norm")
    return np.stack([x @ state[f"linears.{k}.weight"].T for k in range(TINY.num_codebooks)], 1)


def test_merged_logits_are_those_of_low_rank_products():
    """The base model in AudioCraft's layout and the factors beside it, in NumPy alone."""
    params, adapters = small_params(), random_adapters(LORA)
    factors, flat = {}, trees.flatten(adapters)
    for p in lora.PROJECTIONS:
        a_LIr = flat[f"{p.path}/a"].reshape(TINY.num_layers, -1, LORA.rank)
        b_LrO = flat[f"{p.path}/b"].reshape(TINY.num_layers, LORA.rank, -1)
        for layer in range(TINY.num_layers):
            factors[f"transformer.layers.{layer}.{p.module}"] = (
                a_LIr[layer].astype(np.float64),
                b_LrO[layer].astype(np.float64),
            )
    state = lm_rules.to_audiocraft(params, TINY)
    state = {name: x.astype(np.float64) for name, x in state.items()}
    found = logits(params, adapters)
    np.testing.assert_allclose(found, numpy_logits(state, factors, LORA.scale), rtol=0, atol=2e-4)
    assert np.abs(found - logits(params)).max() > 0.1  # the adapters do something


def test_gradients_are_the_chain_rules():
    params, fresh = small_params(), lora.init_adapters(LORA, TINY, jax.random.key(0))
    weights = np.random.default_rng(3).normal(size=(2, 2, 7, 8)).astype(np.float32)

    def loss(adapters, params):
        return jnp.mean(weights * logits(params, adapters))

    # At first b alone moves: a meets its zeros.
    for path, leaf in trees.flatten(jax.jit(jax.grad(loss))(fresh, params)).items():
        assert bool(jnp.any(leaf != 0)) == path.endswith("/b"), path
    adapters = random_adapters(LORA)
    found, full = jax.jit(jax.grad(loss, argnums=(0, 1)))(adapters, params)
    for name, spec_a, spec_b in (
        ("attn/query", "LDNH,LrNH->LDr", "LDNH,LDr->LrNH"),
        ("cross_attn/out", "LNHD,LrD->LNHr", "LNHD,LNHr->LrD"),
        ("mlp/down", "LFD,LrD->LFr", "LFD,LFr->LrD"),
    ):
        part, weight = name.split("/")
        # With respect to a weight the loss does not see whether it was merged.
        own, pair, gradient = (tree["blocks"][part][weight] for tree in (found, adapters, full))
        for factor, other, spec in (("a", "b", spec_a), ("b", "a", spec_b)):
            expected = LORA.scale * np.einsum(spec, gradient, pair[other])
            np.testing.assert_allclose(own[factor], expected, rtol=1e-4, atol=1e-6)


def test_shardings_follow_the_weights():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=3), jax.devices()[:6])
    shardings = lora.adapter_shardings(TINY, LORA, mesh)
    specs = {path: s.spec for path, s in trees.flatten(shardings).items()}
    assert specs.keys() == lora.adapter_shapes(LORA, TINY).keys()
    assert specs["blocks/attn/query/a"] == P(None, "fsdp", None)
    assert specs["blocks/attn/query/b"] == P(None, None, "tensor", None)
    assert specs["blocks/mlp/up/b"] == P(None, None, "tensor")
    assert specs["blocks/mlp/down/a"] == P(None, "tensor", None)
    assert specs["blocks/mlp/down/b"] == P(None, None, "fsdp")

    # Merging leaves every weight where it lies, and gives it the same values.
    where = sharding.model_shardings(TINY, mesh)
    params, adapters = small_params(), random_adapters(LORA)
    merge = jax.jit(functools.partial(lora.merge_adapters, config=LORA))
    compiled = merge.lower(
        jax.device_put(params, where), jax.device_put(adapters, shardings)
    ).compile()
    assert not any(s in compiled.as_text() for s in ("all-gather", "all-reduce", "all-to-all"))
    found = merge(jax.device_put(params, where), jax.device_put(adapters, shardings))
    for path, leaf in trees.flatten(found).items():
        assert leaf.sharding.is_equivalent_to(trees.flatten(where)[path], leaf.ndim), path
    expected = lora.merge_adapters(params, adapters, LORA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
