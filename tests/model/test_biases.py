"""Biases, and norms of queries and keys: what AudioCraft's models may have and the published lack.

PyTorch's side is `torch_lm`, which attends over padding as AudioCraft does: with biases, padding
has keys and values that are not zeros, and no text is something.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from tiny import EMBEDDED_CODEC, TINY, assert_same_bits, random_params

from magnet_jax.checkpoints import run_folder, verify
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.config import (
    DataConfig,
    DecodeConfig,
    KernelConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SamplingMeshConfig,
    TextConfig,
    from_dict,
)
from magnet_jax.convert import lm_rules, t5_files, torch_lm
from magnet_jax.decode import autoregressive, choose, magnet, placement, sampling, schedule
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import attention, patterns, precision, sharding, teacher_forcing, transformer
from magnet_jax.train import objective

# What AudioCraft calls each setting.
XP_CFG = {
    "attention_bias": "bias_attn",
    "mlp_bias": "bias_ff",
    "head_bias": "bias_proj",
    "query_key_norm": "qk_layer_norm",
    "cross_query_key_norm": "qk_layer_norm_cross",
}
EVERYTHING = dict.fromkeys(XP_CFG, True)
# Where no text is something, where it is nothing although padding is, and where all is as ever.
TELLING = (EVERYTHING, {"attention_bias": True}, {"cross_query_key_norm": True}, {"mlp_bias": True})
KINDS = ({}, {"kind": "musicgen", "delays": (0, 2)})
WIDTH = 6  # of the texts
LENGTHS = np.array([4, 0, 6])  # one is padded, one is none, one is whole


def name_of(settings):
    return "all" if len(settings) == len(XP_CFG) else "+".join(map(str, settings.values())) or "-"


def flags_of(settings):
    return "all" if len(settings) == len(XP_CFG) else "+".join(settings)


def make(settings, kind={}):  # noqa: B006
    """A small model and random parameters, small enough for probabilities that are not 0 or 1."""
    model = dataclasses.replace(TINY, **settings, **kind)
    return model, jax.tree.map(lambda x: np.float32(0.4) * x, random_params(model))


def texts(model, lengths=LENGTHS):
    """States, mask and zero keys; the reference pads up to the width, and no text has no keys."""
    states_BSE = np.random.default_rng(1).normal(size=(len(lengths), WIDTH, model.text_width))
    zeros_B = np.where(lengths > 0, WIDTH - lengths, 0).astype(np.int32)
    return states_BSE.astype(np.float32), np.arange(WIDTH) < lengths[:, None], zeros_B


def random_codes(model, num_frames=15):
    shape = (len(LENGTHS), model.num_codebooks, num_frames)
    return np.random.default_rng(2).integers(0, model.codebook_size + 1, shape).astype(np.int32)


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("settings", [{f: True} for f in XP_CFG] + [EVERYTHING], ids=flags_of)
def test_checkpoints_come_back_and_compute_the_same_in_pytorch(settings, kind, tmp_path):
    model, params = make(settings, kind)
    codec = dataclasses.replace(EMBEDDED_CODEC, num_codebooks=2, codebook_size=8)
    steps = DecodeConfig(steps=(2, 2))
    xp_cfg = lm_rules.make_xp_cfg(RunConfig(model=model, decode=steps), codec, "t5-base")
    found = {field for field, name in XP_CFG.items() if xp_cfg["transformer_lm"][name]}
    assert found == settings.keys()
    lm_rules.write_audiocraft(tmp_path, params, model, xp_cfg, codec)
    lm = lm_rules.read_audiocraft(tmp_path)
    assert lm.model == model
    assert_same_bits(trees.flatten(lm.params), trees.flatten(params))
    state = lm_rules.to_audiocraft(lm.params, model)
    assert_same_bits(
        lm_rules.to_audiocraft(lm_rules.from_audiocraft(dict(state), model), model), state
    )

    codes_BKT, (states_BSE, *_) = random_codes(model), texts(model)
    if model.kind == "musicgen":
        found_BKTV = teacher_forcing.step_logits(params, *texts(model), codes_BKT, config=model)
    for stage in range(model.num_codebooks):
        if model.kind == "musicgen":
            found_BTV = found_BKTV[:, stage]
        else:
            found_BTV = verify._stage_logits(
                params, *texts(model), codes_BKT, stage, 0, model, stage > 0
            )
        expected = torch_lm.logits(state, model, codes_BKT, states_BSE, LENGTHS, stage)
        np.testing.assert_allclose(found_BTV, expected, atol=1e-4, rtol=0)
    # The check can fail: without what the settings add, every row with a text has other logits.
    plain = dataclasses.replace(TINY, **kind)
    fewer = {name: state[name] for name in lm_rules.audiocraft_shapes(plain)}
    without = torch_lm.logits(fewer, plain, codes_BKT, states_BSE, LENGTHS, stage)
    assert (np.abs(without - expected).max((1, 2)) > 1e-3)[LENGTHS > 0].all()


def test_tensors_stand_in_audiocrafts_order():
    model, params = make(EVERYTHING)
    names = list(lm_rules.to_audiocraft(params, model))
    layer = "transformer.layers.1."
    attention_names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias",
                       "q_layer_norm.weight", "q_layer_norm.bias", "k_layer_norm.weight",
                       "k_layer_norm.bias")  # fmt: skip
    pairs = lambda *modules: [f"{m}.{n}" for m in modules for n in ("weight", "bias")]  # noqa: E731
    assert [name.removeprefix(layer) for name in names if name.startswith(layer)] == [
        *(f"self_attn.{name}" for name in attention_names),
        *pairs("linear1", "linear2", "norm1", "norm2"),
        *(f"cross_attention.{name}" for name in attention_names),
        *pairs("norm_cross"),
    ]
    assert names[-6:] == pairs("out_norm", "linears.0", "linears.1")
    state = lm_rules.to_audiocraft(params, model)
    self_bias = state[f"{layer}self_attn.in_proj_bias"].reshape(3, model.num_heads, -1)
    for found, name in zip(self_bias, ("query", "key", "value"), strict=True):
        np.testing.assert_array_equal(found, params["blocks"]["attn"][f"{name}_bias"][1])


def test_settings_that_are_neither_on_nor_off():
    run = RunConfig(model=TINY, decode=DecodeConfig(steps=(2, 2)))
    xp_cfg = lm_rules.make_xp_cfg(run, EMBEDDED_CODEC, "t5-base")
    lm = xp_cfg["transformer_lm"]
    del lm["qk_layer_norm"], lm["qk_layer_norm_cross"]  # older files: there was none
    assert lm_rules.model_from_xp_cfg(xp_cfg, TINY.text_width, "x") == TINY
    del lm["bias_ff"]  # AudioCraft would have biases then
    lm["qk_layer_norm"] = "yes"
    with pytest.raises(UserError, match="bias_ff must be true or false, not None; .*qk_layer_norm"):
        lm_rules.model_from_xp_cfg(xp_cfg, TINY.text_width, "x")


def test_models_of_before_have_none_of_it():
    values = json.loads(json.dumps(dataclasses.asdict(TINY)))
    before = {name: value for name, value in values.items() if name not in XP_CFG}
    assert from_dict(ModelConfig, before, "x") == from_dict(ModelConfig, values, "x") == TINY
    with pytest.raises(UserError, match="x: mlp_bias"):
        from_dict(ModelConfig, values | {"mlp_bias": 1}, "x")


# --- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, *TELLING], ids=flags_of)
def test_parameters_are_those_of_the_rules_and_have_shardings(settings):
    model = dataclasses.replace(TINY, **settings)
    shapes = trees.flatten(run_folder.abstract_params(model, None)["lm"])
    assert {path: leaf.shape for path, leaf in shapes.items()} == lm_rules.lm_shapes(model)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    specs = sharding.model_shardings(model, mesh)
    assert trees.flatten(specs).keys() == shapes.keys()
    assert any("_bias" in path or "norm_query" in path for path in shapes) == bool(settings)


def test_biases_are_split_as_what_they_are_added_to():
    model = ModelConfig(width=16, num_heads=4, num_layers=2, codebook_size=32, **EVERYTHING)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: s.spec, sharding.model_shardings(model, mesh))
    for name in ("attn", "cross_attn"):
        layer = specs["blocks"][name]
        assert layer["query_bias"] == layer["value_bias"] == P(None, "tensor", None)
        assert layer["out_bias"] == layer["norm_key"]["scale"] == P(None, "fsdp")
    assert specs["blocks"]["mlp"]["up_bias"] == P(None, "tensor")
    assert specs["blocks"]["mlp"]["down_bias"] == P(None, "fsdp")
    assert specs["heads_bias"] == P(None, None)


def test_fresh_biases_are_zeros_and_change_no_other_parameter():
    plain, extended = (
        trees.flatten(transformer.init_params(dataclasses.replace(TINY, **s), jax.random.key(0)))
        for s in ({}, EVERYTHING)
    )
    assert_same_bits({path: extended[path] for path in plain}, plain)
    new = [path for path in extended if path.endswith("bias") and path not in plain]
    assert new and all((extended[path] == 0).all() for path in new)


def test_padding_weighs_as_that_many_keys():
    """`cross_attention` counts one key several times where PyTorch would attend over each."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 7, 2, 4)), jnp.float32) for _ in "qkv")
    zero = tuple(jnp.asarray(10 * rng.normal(size=(1, 1, 2, 4)), jnp.float32) for _ in "kv")
    run = functools.partial(attention.cross_attention, query, key, value)
    for length, zeros in ((4, 3), (4, 0), (0, 0), (7, 0)):
        is_token = jnp.arange(7)[None] < length
        shown = max(length + zeros, 1)  # without a text: padding, however much
        full_key, full_value = (
            jnp.where(is_token[..., None, None], x, x_zero)[:, :shown]
            for x, x_zero in zip((key, value), zero, strict=True)
        )
        expected = attention.self_attention(query, full_key, full_value)
        found = run(is_token, jnp.array([zeros]), zero)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("local", [False, True])
def test_gradients_are_finite_with_and_without_text(local):
    model, params = make(EVERYTHING)
    states_BSE, mask_BS, _ = texts(model)
    codes_BKT = np.minimum(random_codes(model), model.codebook_size - 1)
    batch, _, num_frames = codes_BKT.shape
    starts_BT = np.random.default_rng(3).random((batch, num_frames), np.float32)
    noise = objective.Noise(np.full(batch, 0.7, np.float32), starts_BT, np.arange(batch) == 2)

    @jax.jit
    @jax.grad
    def gradient(params):
        clips = {
            "text_mask_BS": mask_BS,
            "codes_BKT": codes_BKT,
            "valid_BT": np.ones((batch, num_frames), bool),
        }
        return objective.loss_fn(
            params, states_BSE, clips, noise, int(local), config=model, local=local, remat="full"
        )[0]

    gradients = trees.flatten(gradient(params))
    assert all(np.isfinite(g).all() for g in gradients.values())
    unused = {path for path, g in gradients.items() if not g.any()}
    assert not unused, unused


# --- decoding -----------------------------------------------------------------------------------

generate = jax.jit(magnet.generate, static_argnames=("config", "rules", "kernels", "savings"))


@pytest.mark.parametrize("settings", TELLING[:3], ids=flags_of)
def test_savings_change_no_token(settings):
    model, params = make(settings)
    codes_BKT = np.zeros((len(LENGTHS), model.num_codebooks, 60), np.int32)
    decoding = DecodeConfig(steps=(3, 3), greedy=True, max_guidance=3.0)
    kernels = KernelConfig(full="dense", local="blocks", local_block=32)
    run = functools.partial(
        generate, params, TextStates(*texts(model)), tiny.task(codes_BKT),
        schedule.make_schedule(decoding), config=model, kernels=kernels,
    )  # fmt: skip
    rules = functools.partial(tiny.rules, decoding, 3, model.mask_id)
    reach = model.num_layers * model.local_context
    found = run(savings=magnet.ALL_SAVINGS, rules=rules(reach=reach)).codes_BKT
    plain = run(savings=magnet.NO_SAVINGS, rules=rules(guided="all")).codes_BKT
    np.testing.assert_array_equal(found, plain)


def test_rows_beyond_the_texts_are_refused_where_no_text_is_something():
    model, params = make({"attention_bias": True})
    text = transformer.bind(model, params).read_text(*texts(model))
    codes_BKT = np.concatenate([random_codes(model)] * 2)
    with pytest.raises(ValueError, match="3 rows have no row of text"):
        transformer.bind(model, params).trunk(codes_BKT, text, local=False)


def test_biases_keep_their_precision():
    model, params = make(EVERYTHING)
    rounded = trees.flatten(precision.round_weights(params, jnp.bfloat16))
    kept = {path for path, leaf in rounded.items() if leaf.dtype == jnp.float32}
    assert kept == {path for path in rounded if path.endswith(("bias", "/scale"))} | {"embed"}


def load(settings, kind={}):  # noqa: B006
    """The small model with the shipped text encoder."""
    config, t5_params, tokenizer = t5_files.load("embedded")
    model, params = make(settings | {"text_width": config.d_model}, kind)
    spec = dataclasses.replace(EMBEDDED_CODEC, num_codebooks=2, codebook_size=8)
    run = RunConfig(
        model=model,
        text=TextConfig(max_tokens=16),
        data=DataConfig(segment_seconds=1.2),
        decode=DecodeConfig(steps=(3, 2)),
    )
    return Loaded(run, spec, "", {"lm": params}, config, t5_params, tokenizer, 0, {})


@pytest.mark.parametrize("settings", TELLING[:3:2], ids=flags_of)
def test_a_clip_without_text_is_the_same_beside_others_alone_and_on_any_mesh(settings):
    loaded = load(settings)
    decoding = DecodeConfig(steps=(3, 2), greedy=True, max_guidance=3.0)
    run = functools.partial(
        sampling.generate, loaded, num_frames=60, decoding=decoding, seed=0
    )  # fmt: skip
    both = run(["a waltz", ""]).codes_BKT
    np.testing.assert_array_equal(run([""], first_sample=1).codes_BKT[0], both[1])
    mesh = SamplingMeshConfig(guidance=2)
    many = run(["a waltz", ""], execution=placement.Execution(mesh=mesh)).codes_BKT
    np.testing.assert_array_equal(many, both)


@pytest.mark.parametrize("settings", TELLING[:1], ids=flags_of)
def test_a_musicgens_tokens_are_the_most_probable_in_pytorch(settings):
    model, params = make(settings, KINDS[1])
    batch, num_frames, guidance = len(LENGTHS), 12, 2.0
    codes_BKT = tiny.one_after_another(
        params, *texts(model), choose.sample_keys(0, jnp.arange(batch)),
        np.zeros((batch, model.num_codebooks, 0), np.int32),
        autoregressive.Sampling(1.0, 0.0, guidance),
        config=model, num_frames=num_frames, choice="greedy",
    )  # fmt: skip
    steps_BKS = np.asarray(patterns.to_steps(codes_BKT, model.delays, model.mask_id, num_frames))
    state, (states_BSE, *_) = lm_rules.to_audiocraft(params, model), texts(model)
    with_text, without = (
        np.stack(
            [
                torch_lm.logits(state, model, steps_BKS, states_BSE, lengths_B, k)
                for k in range(model.num_codebooks)
            ],
            axis=1,
        )
        for lengths_B in (LENGTHS, 0 * LENGTHS)
    )
    logits_BKSV = without + guidance * (with_text - without)
    logits_BKTV, valid_KT = patterns.to_frames(logits_BKSV, model.delays, num_frames, first=0)
    found = np.asarray(logits_BKTV).argmax(-1)
    np.testing.assert_array_equal(found[:, valid_KT], np.asarray(codes_BKT)[:, valid_KT])
