"""Every array of a golden folder: what the reference implementation printed for small models.

The folder is `tests/golden`, or the one that GOLDEN_DIR names: all sizes, cases and settings are
read from its files. Logits are held to 1e-3 absolute in float32, losses and gradient norms to 1e-3
relative, tokens and codes to equality.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from constants import GOLDEN
from golden_model import magnet_logits, read_text

from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import DecodeConfig, KernelConfig, MeshConfig, RunConfig
from magnet_jax.convert import audiocraft, codec_rules, lm_rules, t5_files
from magnet_jax.decode import autoregressive, choose, hybrid, magnet, schedule
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.model import sharding, transformer
from magnet_jax.train import masking, objective, steps

MAGNET, MUSICGEN, CODEC = (GOLDEN / f"{name}_tiny" for name in ("magnet", "musicgen", "encodec"))
CASES = json.loads((MAGNET / "generate.json").read_text())
STAGES = range(lm_rules.read_audiocraft(MAGNET).model.num_codebooks)
BFLOAT16_TOLERANCE = 0.02  # mean error, as a share of the logits' standard deviation


# --- MAGNeT -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return lm_rules.read_audiocraft(MAGNET)


generate_magnet = jax.jit(
    magnet.generate, static_argnames=("config", "rules", "savings", "kernels")
)


def stage_logits(golden, stage, with_text=True, dtype=jnp.float32):
    """Logits of a stage on the tokens and texts of forward.npz."""
    return magnet_logits(
        golden.params,
        *read_text(MAGNET / "forward.npz", with_text),
        np.load(MAGNET / "forward.npz")["codes"].astype(np.int32),
        stage,
        config=golden.model,
        local=stage > 0,
        dtype=dtype,
    )


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_magnet_logits(golden, stage, with_text):
    reference = np.load(MAGNET / "forward.npz")
    logits_BTV = stage_logits(golden, stage, with_text)
    name = f"logits_stage{stage}" if with_text else f"null_logits_stage{stage}"
    np.testing.assert_allclose(logits_BTV, reference[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_magnet_logits_in_bfloat16(golden, stage):
    reference = np.load(MAGNET / "forward.npz")
    logits_BTV = stage_logits(golden, stage, dtype=jnp.bfloat16)
    expected_BTV = reference[f"logits_stage{stage}"]
    error = np.abs(logits_BTV - expected_BTV).mean() / expected_BTV.std()
    assert error < BFLOAT16_TOLERANCE


# What is left out, and how attention is computed, changes no token: every case with all savings,
# and some with each alone, with none, and with other kernels.
VARIANTS = {
    "all": (magnet.ALL_SAVINGS, KernelConfig(full="dense", local="blocks", local_block=32)),
    "none": (magnet.NO_SAVINGS, KernelConfig(full="dense", local="dense")),
    "blocks": (magnet.ALL_SAVINGS, KernelConfig(full="blocks", local="blocks", local_block=54)),
    "slices": (magnet.ALL_SAVINGS, KernelConfig(full="slices", local="slices", local_block=32)),
    **{
        f"{field.name} alone": (
            dataclasses.replace(magnet.NO_SAVINGS, **{field.name: True}),
            KernelConfig(full="dense", local="dense"),
        )
        for field in dataclasses.fields(magnet.Savings)
    },
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, "all") for name in CASES]
    + [("default", variant) for variant in VARIANTS if variant != "all"]
    + [("prompt", "none"), ("stride1", "none")],
)
def test_magnet_tokens(golden, name, variant):
    case, (savings, kernels) = CASES[name], VARIANTS[variant]
    text = np.load(MAGNET / "forward.npz")
    reference = np.load(MAGNET / "generate.npz")
    span, num_prompt = case["span_len"], case["prompt_frames"]
    num_frames = text["codes"].shape[-1]
    if case["span_arrangement"] == "nonoverlap":
        num_frames = num_frames // span * span
    decoding = DecodeConfig(
        steps=tuple(case["decoding_steps"]),
        temperature=case["temp"],
        anneal_temperature=case["anneal_temp"],
        max_guidance=case["max_cfg_coef"],
        min_guidance=case["min_cfg_coef"],
        span_score=case["span_scoring"],
        span_arrangement=case["span_arrangement"],
        greedy=True,
    )
    assert not case["use_sampling"]
    batch, num_codebooks, _ = text["codes"].shape
    codes_BKT = np.zeros((batch, num_codebooks, num_frames), np.int32)
    if num_prompt:
        codes_BKT[..., :num_prompt] = reference["prompt_codes"][..., :num_prompt]
    reach = golden.model.num_layers * golden.model.local_context * savings.last_window or None
    decoded = generate_magnet(
        golden.params,
        TextStates(*read_text(MAGNET / "forward.npz", case["text"])),
        tiny.task(codes_BKT, num_given=num_prompt),
        schedule.make_schedule(decoding),
        config=golden.model,
        rules=tiny.rules(
            decoding,
            span,
            golden.model.mask_id,
            any_text=case["text"],
            reach=reach,
            **{} if savings.last_guidance or not case["text"] else {"guided": "all"},
        ),
        savings=savings,
        kernels=kernels,
    )
    np.testing.assert_array_equal(decoded.codes_BKT, reference[name])


def test_every_generated_array_has_its_case():
    assert set(np.load(MAGNET / "generate.npz").files) - {"prompt_codes"} == CASES.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_magnet_loss_and_gradients(golden, stage):
    reference = np.load(MAGNET / "loss.npz")
    config = golden.model
    codes_BKT = jnp.asarray(reference["tokens"].astype(np.int32))
    mask_BT, valid_BT = (jnp.asarray(reference[k]) for k in (f"mask_stage{stage}", "valid"))

    def loss(params):
        # These numbers were printed with the padding's own tokens given, so it is not hidden here.
        given = objective.corrupt(
            codes_BKT, mask_BT, jnp.ones_like(valid_BT), stage, config.mask_id
        )
        model = transformer.bind(config, params)
        text = model.read_text(*map(jnp.asarray, read_text(MAGNET / "loss.npz")))
        logits_BTV = model.head(model.trunk(given.input_BKT, text, local=stage > 0), stage)
        scored = objective.corrupt(codes_BKT, mask_BT, valid_BT, stage, config.mask_id)
        aux_B = objective.cross_entropy(logits_BTV, scored.target_BT, scored.mask_BT)
        return aux_B.metrics()["loss"]

    value, gradients = jax.jit(jax.value_and_grad(loss))(golden.params)
    assert float(value) == pytest.approx(float(reference[f"ce_stage{stage}"]), rel=1e-3)
    prefix = f"gradnorm_stage{stage}/"
    expected = {n.removeprefix(prefix): reference[n] for n in reference if n.startswith(prefix)}
    found = lm_rules.to_audiocraft(gradients, config)
    assert expected and expected.keys() <= found.keys()
    for name, gradient in found.items():
        norm = float(expected.get(name, 0))  # what the reference gave no gradient has none
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("stage", STAGES)
def test_magnet_loss_and_gradients_on_a_mesh_in_parts(golden, stage):
    """The gradients that a train step takes, of the reference's tokens, masks and text states."""
    reference, config = np.load(MAGNET / "loss.npz"), golden.model
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
    t5_config, _, _ = t5_files.load("embedded")
    settings = steps.make_settings(
        RunConfig(model=config), t5_config, np.dtype("float32"), 30, mesh
    )
    shardings = sharding.model_shardings(config, mesh)

    def loss_fn(params, part):
        # (the padding's own tokens are given, see above)
        given = objective.corrupt(
            part["tokens"], part["mask"], jnp.ones_like(part["valid"]), stage, config.mask_id
        )
        model = transformer.bind(config, params)
        text = model.read_text(part["states"], part["text_mask"], part["zeros"])
        logits_BTV = model.head(model.trunk(given.input_BKT, text, local=stage > 0), stage)
        mask_BT = part["mask"] & part["valid"]
        aux_B = objective.cross_entropy(logits_BTV, given.target_BT, mask_BT)
        return aux_B.nll.sum(), aux_B

    states_BSE, text_mask_BS, zeros_B = read_text(MAGNET / "loss.npz")
    batch = {
        "tokens": reference["tokens"].astype(np.int32),
        "mask": reference[f"mask_stage{stage}"],
        "valid": reference["valid"],
        "states": states_BSE,
        "text_mask": text_mask_BS,
        "zeros": zeros_B,
    }
    # Every row four times, for two devices and two parts, leaves the mean as it is.
    batch = {name: np.concatenate([x] * 4) for name, x in batch.items()}
    gradients, aux = jax.jit(
        lambda params, batch: steps.batch_gradients(
            loss_fn, params, batch, dataclasses.replace(settings, num_parts=2), shardings
        )
    )(
        jax.device_put(golden.params, shardings),
        jax.device_put(batch, sharding.batch_sharding(mesh)),
    )
    loss = float(aux.metrics()["loss"])
    assert loss == pytest.approx(float(reference[f"ce_stage{stage}"]), rel=1e-3)
    prefix = f"gradnorm_stage{stage}/"
    for name, gradient in lm_rules.to_audiocraft(gradients, config).items():
        norm = float(reference[prefix + name]) if prefix + name in reference else 0.0
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-3, abs=1e-7), name


# --- MusicGen -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def musicgen():
    return lm_rules.read_audiocraft(MUSICGEN)


@pytest.mark.parametrize(
    ("codes", "logits", "with_text"),
    [
        ("codes", "logits", True),
        ("codes", "null_logits", False),
        ("partial_codes", "partial_logits", True),
    ],
)
def test_musicgen_logits(musicgen, codes, logits, with_text):
    reference = np.load(MUSICGEN / "forward.npz")
    logits_BKTV, valid_KT = tiny.teacher_forced(
        musicgen.params,
        *read_text(MUSICGEN / "forward.npz", with_text),
        codes_BKT=reference[codes].astype(np.int32),
        config=musicgen.model,
    )
    valid_BKT = np.broadcast_to(valid_KT, reference["valid"].shape)
    np.testing.assert_array_equal(valid_BKT, reference["valid"])
    np.testing.assert_allclose(
        np.asarray(logits_BKTV)[valid_BKT], reference[logits][valid_BKT], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ["greedy", "prompted"])
def test_musicgen_tokens(musicgen, name):
    reference = np.load(MUSICGEN / "generate.npz")
    batch, num_codebooks, num_frames = reference[name].shape
    prompt_BKP = np.zeros((batch, num_codebooks, 0), np.int32)
    if name == "prompted":
        prompt_BKP = reference["prompt"].astype(np.int32)
    codes_BKT = tiny.one_after_another(
        musicgen.params,
        *read_text(MUSICGEN / "forward.npz"),
        choose.sample_keys(0, jnp.arange(batch)),
        prompt_BKP,
        autoregressive.Sampling(1.0, 0.0, 3.0),
        config=musicgen.model,
        num_frames=num_frames,
        choice="greedy",
    )
    np.testing.assert_array_equal(codes_BKT, reference[name])


@pytest.mark.parametrize("apart", [False, True])
def test_musicgen_tokens_of_the_program_that_users_run(musicgen, apart):
    """(`sampling` makes of a MusicGen a hybrid's beginning.)"""
    reference = np.load(MUSICGEN / "generate.npz")
    num_given, (batch, num_codebooks, num_frames) = (
        reference["prompt"].shape[-1],
        reference["prompted"].shape,
    )
    codes_BKT = np.full((batch, num_codebooks, num_frames), musicgen.model.mask_id, np.int32)
    codes_BKT[..., :num_given] = reference["prompt"]
    beginning = autoregressive.Beginning(
        num_given=num_given, num_frames=num_frames, whole=True, choice="greedy", guided=True,
        apart=apart,
    )  # fmt: skip
    rules = tiny.rules(DecodeConfig(greedy=True), 1, musicgen.model.mask_id)
    run = functools.partial(
        hybrid.generate, config=musicgen.model, beginning=beginning, rules=rules
    )
    found = jax.jit(run)(
        musicgen.params,
        TextStates(*read_text(MUSICGEN / "forward.npz")),
        tiny.task(codes_BKT, num_given=num_given),
        (),
        autoregressive.Sampling(1.0, 0.0, 3.0),
    )
    np.testing.assert_array_equal(found.codes_BKT, reference["prompted"])


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [MAGNET, MUSICGEN], ids=lambda folder: folder.name)
def test_language_models_come_back_bit_for_bit(folder, tmp_path):
    file = audiocraft.read_file(folder / "state_dict.bin")
    imported = lm_rules.read_audiocraft(folder)
    audiocraft.write_weights(
        tmp_path / "state_dict.bin",
        lm_rules.to_audiocraft(imported.params, imported.model),
        imported.xp_cfg_text,
        imported.dtype,
    )
    again = audiocraft.read_file(tmp_path / "state_dict.bin")
    assert list(again.tensors) == list(file.tensors)
    for name, array in file.tensors.items():
        assert again.tensors[name].dtype == array.dtype
        assert again.tensors[name].tobytes() == array.tobytes(), name
    assert again.xp_cfg_text == file.xp_cfg_text


# --- EnCodec ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec():
    return load_codec(str(CODEC / "compression_state_dict.bin"))


def test_codec_codes(codec):
    reference = np.load(CODEC / "codec.npz")
    np.testing.assert_array_equal(codec.encode(reference["wav"]), reference["codes"])


def test_codec_waveform(codec):
    reference = np.load(CODEC / "codec.npz")
    np.testing.assert_allclose(codec.decode(reference["codes"]), reference["decoded"], atol=1e-4)


def test_codec_comes_back_bit_for_bit():
    file = audiocraft.read_file(CODEC / "compression_state_dict.bin")
    settings, count = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "codec")
    tensors = codec_rules.codec_from_audiocraft(file.tensors, settings, count)
    again = codec_rules.codec_to_audiocraft(tensors, settings, count)
    assert again.keys() == file.tensors.keys()
    for name, array in file.tensors.items():
        assert np.array_equal(again[name], array), name


# --- masks and nucleus --------------------------------------------------------------------------


def masking_cases():
    names = (name.split("_")[2:] for name in np.load(GOLDEN / "masking.npz") if "count" in name)
    return [(int(frames[1:]), int(span[1:])) for frames, span in names]


@pytest.mark.parametrize(("num_frames", "span_length"), masking_cases())
def test_span_masks(num_frames, span_length):
    reference = np.load(GOLDEN / "masking.npz")
    np.testing.assert_array_equal(
        masking.span_counts(num_frames, span_length),
        reference[f"span_count_T{num_frames}_l{span_length}"],
    )
    uniform_BT = reference[f"uniform_T{num_frames}_l{span_length}"]
    mask_BT = np.asarray(
        masking.span_mask(jnp.asarray(uniform_BT), jnp.asarray(reference["rates"]), span_length)
    )
    # Where two numbers are equal, either may come first.
    clear = np.array([len(np.unique(row)) == num_frames for row in uniform_BT])
    assert clear.sum() >= 5
    expected_BT = reference[f"mask_T{num_frames}_l{span_length}"]
    np.testing.assert_array_equal(mask_BT[clear], expected_BT[clear])


@pytest.mark.parametrize(
    "name", [n for n in np.load(GOLDEN / "top_p.npz") if n.startswith("probs_p")]
)
def test_nucleus(name):
    reference = np.load(GOLDEN / "top_p.npz")
    mass = float(name.removeprefix("probs_p"))
    probs = choose.nucleus(jax.nn.softmax(reference["logits"]), mass)
    np.testing.assert_allclose(probs, reference[name], atol=1e-6)
    np.testing.assert_array_equal(probs > 0, reference[name] > 0)
