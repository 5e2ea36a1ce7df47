"""LoRA held to plain NumPy, the adapter folder, and parameters that fit in part."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny import TINY, assert_same_bits, random_params

from magnet_jax.checkpoints import finetune
from magnet_jax.config import LoraConfig, MeshConfig, from_dict
from magnet_jax.convert import lm_rules
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import lora, sharding, transformer

LORA = LoraConfig(rank=2, alpha=3.0)
PREFIX = "base_model.model.transformer.layers"
LINEAGE = {"base": "facebook/magnet-small-10secs", "run": "r", "step": 7}


def small_params() -> dict:
    return jax.tree.map(lambda x: 0.3 * x, random_params(TINY))


def random_adapters(config: LoraConfig = LORA, seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(config, TINY)
    return trees.unflatten(
        {path: 0.3 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )


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


# --- adapters -----------------------------------------------------------------------------------


def test_settings():
    with pytest.raises(UserError, match="lora.rank"):
        LoraConfig(rank=-1)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="lora.alpha"):
            LoraConfig(alpha=alpha)
    for targets in ((), ("self", "self"), ("heads",)):
        with pytest.raises(UserError, match="lora.targets must name some of self, cross, mlp"):
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
        lora.merge_adapters(small_params(), random_adapters(), LoraConfig(rank=4))
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
        a, b = (factors[f"base_model.model.{adapter}.lora_{f}.weight"] for f in "AB")
        return x @ weight.T + scale * ((x @ a.T) @ b.T)

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


def test_merged_logits_are_those_of_low_rank_products(tmp_path):
    """The base model in AudioCraft's layout and the files of the adapter, in NumPy alone."""
    params, adapters = small_params(), random_adapters()
    finetune.save_adapter(tmp_path / "a", adapters, LORA, TINY, LINEAGE)
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    wide = lambda tensors: {name: x.astype(np.float64) for name, x in tensors.items()}  # noqa: E731
    expected = numpy_logits(wide(lm_rules.to_audiocraft(params, TINY)), wide(factors), LORA.scale)
    found = logits(params, adapters)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert np.abs(found - logits(params)).max() > 0.1  # the adapters do something


def test_gradients_are_the_chain_rules():
    params, fresh = small_params(), lora.init_adapters(LORA, TINY, jax.random.key(0))
    weights = np.random.default_rng(3).normal(size=(2, 2, 7, 8)).astype(np.float32)

    def loss(adapters, params):
        return jnp.mean(weights * logits(params, adapters))

    # At first b alone moves: a meets its zeros.
    for path, leaf in trees.flatten(jax.jit(jax.grad(loss))(fresh, params)).items():
        assert bool(jnp.any(leaf != 0)) == path.endswith("/b"), path
    adapters = random_adapters()
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
    params, adapters = small_params(), random_adapters()
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


# --- the adapter folder -------------------------------------------------------------------------


def test_folder_round_trip(tmp_path):
    folder = tmp_path / "runs" / "adapter"
    for config in (LORA, LoraConfig(rank=3, alpha=16.0, targets=("cross", "mlp"))):
        adapters = random_adapters(config)
        finetune.save_adapter(folder, adapters, config, TINY, LINEAGE, overwrite=True)
        found = finetune.load_adapter(folder, TINY)
        assert (found.config, found.lineage) == (config, LINEAGE)
        assert_same_bits(trees.flatten(found.adapters), trees.flatten(adapters))
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"adapter"}
    peft = json.loads((folder / "adapter_config.json").read_text())
    assert (peft["peft_type"], peft["r"], peft["lora_alpha"]) == ("LORA", 3, 16)
    assert peft["base_model_name_or_path"] == LINEAGE["base"]
    assert peft["target_modules"] == [
        *(f"cross_attention.{name}_proj" for name in ("q", "k", "v", "out")), "linear1", "linear2",
    ]  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}.1.linear2.lora_A.weight"].shape == (3, 24)
    assert tensors[f"{PREFIX}.1.linear2.lora_B.weight"].shape == (12, 3)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    # What PEFT writes: no lineage, modules named for short, perhaps half precision.
    (folder / "lineage.json").unlink()
    short = peft | {"target_modules": ["linear1", "linear2"]}
    (folder / "adapter_config.json").write_text(json.dumps(short | {"exclude_modules": None}))
    halves = {name: x.astype(np.float16) for name, x in tensors.items() if ".linear" in name}
    save_file(halves, folder / "adapter_model.safetensors")
    found = finetune.load_adapter(folder, TINY)
    assert (found.config.targets, found.lineage) == (("mlp",), {})
    up_a = found.adapters["blocks"]["mlp"]["up"]["a"]
    assert up_a.dtype == np.float32
    np.testing.assert_allclose(up_a, adapters["blocks"]["mlp"]["up"]["a"], rtol=1e-3)


def test_files_add_up_to_the_merged_export_in_pytorchs_layout(tmp_path):
    params, adapters = random_params(TINY), random_adapters()
    finetune.save_adapter(tmp_path / "a", adapters, LORA, TINY, LINEAGE)
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    base = lm_rules.to_audiocraft(params, TINY)
    merged = lm_rules.to_audiocraft(lora.merge_adapters(params, adapters, LORA), TINY)
    expected, width = {name: x.copy() for name, x in base.items()}, TINY.width
    for layer in range(TINY.num_layers):

        def product(module, layer=layer):
            a, b = (factors.pop(f"{PREFIX}.{layer}.{module}.lora_{f}.weight") for f in "AB")
            return LORA.scale * b @ a

        name = f"transformer.layers.{layer}"
        for block in ("self_attn", "cross_attention"):
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(i * width, (i + 1) * width)
                expected[f"{name}.{block}.in_proj_weight"][rows] += product(f"{block}.{part}")
            expected[f"{name}.{block}.out_proj.weight"] += product(f"{block}.out_proj")
        for part in ("linear1", "linear2"):
            expected[f"{name}.{part}.weight"] += product(part)
    assert not factors
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5, err_msg=name)
        changed = name.startswith("transformer.layers") and "norm" not in name
        assert np.array_equal(tensor, base[name]) != changed, name


def test_folders_that_cannot_be_read(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(UserError, match="a/adapter_config.json: no such file"):
        finetune.load_adapter(folder, TINY)
    finetune.save_adapter(folder, random_adapters(), LORA, TINY, LINEAGE)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())

    def refused(complaint, model=TINY):
        with pytest.raises(UserError, match=complaint) as caught:
            finetune.load_adapter(folder, model)
        assert len(str(caught.value)) < 600

    for change, complaint in (
        ({"peft_type": "IA3"}, "peft_type must be LORA, not IA3"),
        ({"r": 0}, "r must be a whole number above 0"),
        ({"r": None}, "r must be"),
        ({"r": 5}, "adapters of rank 2, but adapter_config.json says r 5"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_alpha": -8}, "adapter_config.json: lora.alpha must be positive"),
        ({"use_rslora": True}, "use_rslora must be false, not true"),
        ({"use_qalora": True}, "use_qalora must be false"),
        ({"bias": "all"}, 'bias must be "none", not "all"'),
        ({"rank_pattern": {"linear1": 4}}, "rank_pattern must be"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"target_modules": "all-linear"}, "must be a list of names"),
        ({"target_modules": []}, "lora.targets"),
        ({"target_modules": ["linear1", "c_attn"]}, "unknown names: c_attn"),
        ({"target_modules": ["linear1"]}, "lacks linear2"),
        ({"target_modules": ["linear1", "linear2"]}, "32 unexpected: .* and 28 more"),
    ):
        config.write_text(json.dumps(values | change))
        refused(complaint)
    config.write_text("{")
    refused("adapter_config.json: not valid JSON")
    config.write_text(json.dumps(values))

    # Another model: what the folder says, and what the shapes say where it says nothing.
    narrow = dataclasses.replace(TINY, num_heads=2)
    refused("lineage.json: the adapter is for another model: num_heads 3, not 2", narrow)
    near = dataclasses.replace(TINY, first_context=7)
    refused("the adapter is for another model: first_context 0, not 7", near)
    lineage = (folder / "lineage.json").read_text()
    earlier = json.loads(lineage)  # of a release that did not say what frames see
    del earlier["model"]["first_context"], earlier["model"]["local_context"]
    (folder / "lineage.json").write_text(json.dumps(earlier))
    finetune.load_adapter(folder, near)
    (folder / "lineage.json").write_text(json.dumps({"format": "other"}))
    refused("lineage.json: not of format")
    (folder / "lineage.json").unlink()
    wide = dataclasses.replace(TINY, width=24)
    refused(
        "misshapen: .*layers.0.self_attn.q_proj.lora_A.weight \\[2, 12\\], not \\[2, 24\\]", wide
    )
    refused("20 missing: .*layers.2", dataclasses.replace(TINY, num_layers=3))
    (folder / "lineage.json").write_text(lineage)

    name = f"{PREFIX}.0.linear1.lora_A.weight"
    save_file(tensors | {"base_model.model.extra": tensors[name]}, weights)
    refused("1 unexpected: base_model.model.extra")
    save_file({n: x for n, x in tensors.items() if n != name}, weights)
    refused("1 missing: .*linear1.lora_A")
    save_file(tensors | {name: np.zeros((2, 12), np.int32)}, weights)
    refused("not floating point: .*linear1.lora_A")
    save_file(tensors | {name: np.full((2, 12), np.inf, np.float16)}, weights)
    refused("adapter_model.safetensors: the tensor .*linear1.lora_A.weight holds infinity")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused("adapter_model.safetensors: damaged")
    weights.unlink()
    refused("adapter_model.safetensors: no such file")


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    save = functools.partial(finetune.save_adapter, lineage=LINEAGE, model=TINY)
    folder, adapters = tmp_path / "a", random_adapters()
    with pytest.raises(UserError, match="lora.rank is 0"):
        save(folder, {}, LoraConfig())
    with pytest.raises(UserError, match="misshapen: blocks/attn/query/a \\[2, 12, 2\\], not"):
        save(folder, adapters, LoraConfig(rank=3))
    del (part := random_adapters())["blocks"]["mlp"]
    with pytest.raises(UserError, match="4 missing: blocks/mlp/up/a"):
        save(folder, part, LORA)
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is no adapter"):
        save(folder, adapters, LORA, overwrite=True)
    (folder / "thesis.txt").unlink()
    save(folder, adapters, LORA)
    with pytest.raises(UserError, match="holds an adapter"):
        save(folder, adapters, LORA)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files as well .thesis.txt."):
        save(folder, adapters, LORA, overwrite=True)
    (folder / "thesis.txt").unlink()

    # Neither a full disk nor a kill between the renames loses the earlier adapter.
    whole = (folder / "adapter_model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_file", full)
        with pytest.raises(UserError, match="a: cannot be written .*No space left"):
            save(folder, random_adapters(seed=5), LORA, overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    folder.rename(tmp_path / ".a.old")
    with pytest.raises(UserError, match="holds an adapter"):
        save(folder, adapters, LORA)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


# --- parameters that fit in part ----------------------------------------------------------------


def test_an_exact_match_is_the_given_parameters():
    params = random_params(TINY)
    for wanted in (
        lm_rules.lm_shapes(TINY),
        jax.eval_shape(lambda: transformer.init_params(TINY, jax.random.key(0))),
    ):
        for partial in (False, True):
            tree, lines = finetune.match_params(wanted, params, partial, "base")
            assert_same_bits(trees.flatten(tree), trees.flatten(params))
            assert lines[0] == f"base: {len(lines) - 1} of {len(lines) - 1} parameters matched"
            assert all(line.startswith("  matched  ") for line in lines[1:])


def test_partial_matches():
    """From two codebooks without biases to three with: all but what counts codebooks is taken."""
    given = random_params(TINY) | {"stray": np.ones(2, np.float32)}
    model = dataclasses.replace(TINY, num_codebooks=3, mlp_bias=True)
    fresh = random_params(model, seed=4)
    with pytest.raises(UserError) as caught:
        finetune.match_params(fresh, given, False, "base")
    message = str(caught.value)
    for part in ("base: ", "2 missing: blocks/mlp/", "2 misshapen: ", "embed [2, 9, 12], not [3, 9",
                 "1 unexpected: stray", "--init-partial"):  # fmt: skip
        assert part in message, message

    tree, lines = finetune.match_params(fresh, given, True, "base")
    flat = trees.flatten(tree)
    taken = {path for path, leaf in flat.items() if leaf is not None}
    missing = {"embed", "heads", "blocks/mlp/up_bias", "blocks/mlp/down_bias"}
    assert flat.keys() == lm_rules.lm_shapes(model).keys()
    assert taken == flat.keys() - missing
    assert lines[0] == f"base: {len(taken)} of {len(flat)} parameters matched"
    for line in (
        "  matched  blocks/attn/query [2, 12, 3, 4]",
        "  fresh    embed [3, 9, 12] (given as [2, 9, 12])",
        "  fresh    blocks/mlp/up_bias [2, 24] (not given)",
        "  unused   stray [2]",
    ):
        assert line in lines
    filled = trees.flatten(finetune.fill_params(tree, fresh))
    old, new = trees.flatten(given), trees.flatten(fresh)
    assert_same_bits(filled, {path: (old if path in taken else new)[path] for path in flat})


def test_long_lists_are_cut_and_strangers_refused():
    with pytest.raises(UserError, match=r"22 missing: (\S+, ){3}\S+ and 18 more; .*unexpected"):
        finetune.match_params(lm_rules.lm_shapes(TINY), {"x": np.ones(2)}, False)
    with pytest.raises(UserError, match="not one parameter of this model"):
        finetune.match_params(lm_rules.lm_shapes(TINY), {"x": np.ones(2)}, True)
