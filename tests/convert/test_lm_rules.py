"""Conversion to AudioCraft's checkpoints and to safetensors, both ways."""

import copy
import dataclasses
import math
import os
import warnings

import huggingface_hub
import numpy as np
import pytest
import soundfile
import yaml
from constants import SHIPPED_GOLDEN
from tiny import EMBEDDED_CODEC, PUBLISHED_CODEC, TINY, assert_same_bits, random_params

from magnet_jax.checkpoints import run_folder, verify
from magnet_jax.config import ASSETS, ModelConfig, RunConfig
from magnet_jax.convert import audiocraft, codec_rules, lm_rules, torch_lm
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.io.torch_env import import_torch

MAGNET, MUSICGEN = (SHIPPED_GOLDEN / f"{name}_tiny" for name in ("magnet", "musicgen"))


@pytest.fixture(scope="module")
def reference():
    """The reference's checkpoint as its author wrote it: tensors by name and the xp.cfg."""
    torch = import_torch()
    content = torch.load(MAGNET / "state_dict.bin", weights_only=True)
    tensors = {name: tensor.numpy() for name, tensor in content["best_state"].items()}
    return tensors, yaml.safe_load(content["xp.cfg"])


# --- the rule table -----------------------------------------------------------------------------


def test_import_then_export_is_the_identity(reference, tmp_path):
    tensors, xp_cfg = reference
    model, lm_params, found_cfg, *_ = lm_rules.read_audiocraft(MAGNET)
    assert found_cfg == xp_cfg
    exported = lm_rules.to_audiocraft(lm_params, model)
    assert_same_bits(exported, tensors)
    assert list(exported) == list(tensors)  # the order as well
    lm_rules.write_audiocraft(tmp_path, lm_params, model, found_cfg, PUBLISHED_CODEC)
    again = audiocraft.read_file(tmp_path / "state_dict.bin")
    assert_same_bits(again.tensors, tensors)
    assert again.xp_cfg == xp_cfg


@pytest.mark.parametrize("model", [TINY, ModelConfig(num_layers=24)])
def test_every_tensor_has_exactly_one_rule(model):
    names = [name for name, _, _ in lm_rules._expand(model)]
    assert len(names) == len(set(names)) == 2 + 2 * model.num_codebooks + 12 * model.num_layers + 2
    used = [rule for _, rule, _ in lm_rules._expand(model)]
    assert set(used) == {rule for rule in lm_rules.LM_RULES if not rule.setting}
    paths = [path for rule in lm_rules.LM_RULES for path in rule.ours]
    assert len(paths) == len(set(paths))
    theirs, ours = lm_rules.audiocraft_shapes(model), lm_rules.lm_shapes(model)
    assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, ours.values()))


def test_rules_fit_the_transformer():
    """The table's paths and shapes are those of the network that trains."""
    shapes = run_folder.abstract_params(TINY, None)["lm"]
    found = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    assert found == lm_rules.lm_shapes(TINY)


def test_round_trip_from_our_side():
    params = random_params(TINY)
    state_dict = lm_rules.to_audiocraft(params, TINY)
    back = lm_rules.from_audiocraft(state_dict, TINY)
    assert_same_bits(trees.flatten(back), trees.flatten(params))
    # Nothing is shared: writing to the export leaves the parameters alone.
    state_dict["out_norm.weight"][:] = 0
    assert np.all(params["norm_final"]["scale"] != 0)


def test_float16_is_widened_exactly():
    state_dict = lm_rules.to_audiocraft(random_params(TINY), TINY)
    half = {name: array.astype(np.float16) for name, array in state_dict.items()}
    back = lm_rules.to_audiocraft(lm_rules.from_audiocraft(half, TINY), TINY)
    assert_same_bits({name: array.astype(np.float16) for name, array in back.items()}, half)


def test_all_mismatches_in_one_message():
    state_dict = lm_rules.to_audiocraft(random_params(TINY), TINY)
    del state_dict["emb.1.weight"]
    state_dict["transformer.layers.2.linear1.weight"] = np.zeros((24, 12), np.float32)
    state_dict["linears.0.weight"] = np.zeros((9, 12), np.float32)
    state_dict["out_norm.bias"] = np.zeros(12, np.int64)
    with pytest.raises(UserError) as error:
        lm_rules.from_audiocraft(state_dict, TINY, "here")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("here: 4 tensors do not fit the model: ")
    assert "emb.1.weight [9, 12] is missing" in message
    assert "transformer.layers.2.linear1.weight [24, 12] is unknown" in message
    assert "linears.0.weight is [9, 12], not [8, 12]" in message
    assert "out_norm.bias is int64" in message

    params = random_params(TINY)
    params["blocks"]["attn"]["query"] = params["blocks"]["attn"]["query"][:1]
    del params["heads"]
    with pytest.raises(UserError, match="2 tensors.*heads .* is missing.*attn/query is"):
        lm_rules.to_audiocraft(params, TINY)


# --- files --------------------------------------------------------------------------------------


class Payload:
    """Would make a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_unsafe_checkpoint_is_refused(tmp_path):
    torch = import_torch()
    content = {"best_state": {}, "xp.cfg": "", "code": Payload(tmp_path / "executed")}
    torch.save(content, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match="refused") as error:
        lm_rules.read_audiocraft(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 100, 40_000, 1_000_000])
def test_truncated_checkpoint(tmp_path, size):
    data = (MAGNET / "state_dict.bin").read_bytes()[:size]
    (tmp_path / "state_dict.bin").write_bytes(data)
    with pytest.raises(UserError, match="state_dict.bin"):
        lm_rules.read_audiocraft(tmp_path)


def test_files_of_another_kind(tmp_path):
    torch = import_torch()
    path = tmp_path / "state_dict.bin"
    with pytest.raises(UserError, match="no such file"):
        lm_rules.read_audiocraft(tmp_path)
    for content, complaint in (
        ([1, 2], "not an AudioCraft checkpoint"),
        ({"best_state": {}}, "not an AudioCraft checkpoint"),
        ({"best_state": {"a": 1}, "xp.cfg": "a: 1"}, "not a tensor"),
        ({"best_state": {"a": torch.eye(2).to_sparse()}, "xp.cfg": "a: 1"}, "not a plain tensor"),
        ({"best_state": {}, "xp.cfg": "conditioners: 1"}, "not a model that can be converted"),
        ({"best_state": {}, "xp.cfg": "just text"}, "not YAML settings"),
        ({"best_state": {}, "xp.cfg": "a: [1"}, "not YAML settings"),
        ({"pretrained": "facebook/encodec_32khz"}, "holds no language model"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=complaint):
            lm_rules.read_audiocraft(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("best", [None, {}])
def test_the_best_weights_of_fsdp(tmp_path, nested, best):
    """AudioCraft keeps them under a key of their own, and 'best_state' is empty or not there."""
    torch = import_torch()
    content = torch.load(MAGNET / "state_dict.bin", weights_only=True)
    state = {f"_fsdp_wrapped_module.{n}": t for n, t in content.pop("best_state").items()}
    content["fsdp_best_state"] = {"model": state} if nested else state
    if best is not None:
        content["best_state"] = best
    torch.save(content, tmp_path / "state_dict.bin")
    found, expected = (lm_rules.read_audiocraft(folder) for folder in (tmp_path, MAGNET))
    assert found.model == expected.model
    assert_same_bits(trees.flatten(found.params), trees.flatten(expected.params))


def test_other_files_of_torch_are_told_by_what_they_hold(tmp_path):
    torch = import_torch()
    for content, complaint in (
        ({"pytorch-lightning_version": "2.0", "state_dict": {}}, "PyTorch Lightning"),
        ({"model": {}, "optimizer": {}}, "holds model, optimizer"),
        ({}, "it is empty"),
        ([1], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
    ):
        torch.save(content, tmp_path / "state_dict.bin")
        with pytest.raises(UserError, match=f"not an AudioCraft checkpoint.*{complaint}"):
            lm_rules.read_audiocraft(tmp_path)


# --- xp.cfg -------------------------------------------------------------------------------------


def structure(value):
    """Names of a nested dict without its values."""
    return (
        {name: structure(inner) for name, inner in value.items()}
        if isinstance(value, dict)
        else None
    )


def test_xp_cfg_has_the_golden_structure_and_survives_yaml(reference):
    _, expected = reference
    config = RunConfig(
        model=ModelConfig(codebook_size=128, width=64, num_heads=4, num_layers=3),
        data=dataclasses.replace(RunConfig().data, segment_seconds=2.0),
    )
    found = lm_rules.make_xp_cfg(config, PUBLISHED_CODEC, "t5-base")
    assert structure(found) == structure(expected)
    assert list(found) == list(expected)
    assert found == expected  # this run has the golden model's settings: every value is equal
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert lm_rules.model_from_xp_cfg(found, 768, "x") == config.model


def test_a_musicgens_xp_cfg_is_the_references():
    lm = lm_rules.read_audiocraft(MUSICGEN)
    data = dataclasses.replace(RunConfig().data, segment_seconds=2.0)
    found = lm_rules.make_xp_cfg(RunConfig(model=lm.model, data=data), PUBLISHED_CODEC, "t5-base")
    assert found.pop("generate")["lm"]["top_k"] == 250
    assert found == {name: value for name, value in lm.xp_cfg.items() if name != "generate"}
    assert lm_rules.model_from_xp_cfg(found | {"generate": {}}, 768, "x") == lm.model


def test_xp_cfg_carries_the_runs_settings():
    defaults = RunConfig()
    config = RunConfig(
        model=dataclasses.replace(TINY, span_length=2, local_context=7),
        data=dataclasses.replace(defaults.data, segment_seconds=2.4, word_dropout=0.1),
        decode=dataclasses.replace(
            defaults.decode, steps=(6, 3), greedy=True, span_score="prod", top_p=0.8
        ),
        condition_dropout=0.2,
    )
    codec = dataclasses.replace(EMBEDDED_CODEC, num_codebooks=2, codebook_size=8)
    found = lm_rules.make_xp_cfg(config, codec, "text_encoder")
    assert lm_rules.model_from_xp_cfg(found, TINY.text_width, "x") == config.model
    assert (found["sample_rate"], found["channels"]) == (16000, 1)
    # Whole numbers, as AudioCraft multiplies them to a sequence length.
    assert found["dataset"]["segment_duration"] == 2
    assert isinstance(found["transformer_lm"]["compression_model_framerate"], int)
    assert found["masking"]["span_len"] == found["transformer_lm"]["span_len"] == 2
    assert found["transformer_lm"]["subcodes_context"] == 7
    assert found["classifier_free_guidance"]["training_dropout"] == 0.2
    assert found["conditioners"]["description"]["t5"]["name"] == "text_encoder"
    assert found["conditioners"]["description"]["t5"]["word_dropout"] == 0.1
    assert found["codebooks_pattern"]["delay"]["delays"] == [0, 1]
    generate = found["generate"]["lm"]
    assert generate["decoding_steps"] == [6, 3]
    assert (generate["use_sampling"], generate["span_scoring"]) == (False, "prod")
    assert generate["top_p"] == 0.8


def test_a_model_without_a_restricted_context_is_audiocrafts_minus_one():
    model = dataclasses.replace(TINY, local_context=0)
    config = RunConfig(model=model, decode=dataclasses.replace(RunConfig().decode, steps=(6, 3)))
    codec = dataclasses.replace(EMBEDDED_CODEC, num_codebooks=2, codebook_size=8)
    found = lm_rules.make_xp_cfg(config, codec, "text_encoder")
    assert found["transformer_lm"]["subcodes_context"] == -1
    assert lm_rules.model_from_xp_cfg(found, TINY.text_width, "x") == model
    params = random_params(model)
    assert verify.logits_difference(params, model, lm_rules.to_audiocraft(params, model)) < 1e-4
    for theirs in (0, -2):  # there, 0 is a frame that sees itself alone
        found["transformer_lm"]["subcodes_context"] = theirs
        with pytest.raises(UserError, match="subcodes_context must be -1 or positive"):
            lm_rules.model_from_xp_cfg(found, TINY.text_width, "x")


def test_models_that_cannot_be_converted(reference):
    _, xp_cfg = reference
    changed = copy.deepcopy(xp_cfg)
    changed["transformer_lm"]["bias_attn"] = None
    changed["transformer_lm"]["layer_scale"] = 0.1
    changed["transformer_lm"]["causal"] = True
    changed["codebooks_pattern"]["modeling"] = "unroll"
    changed["conditioners"]["self_wav"] = {"model": "chroma_stem"}
    changed["fuser"]["prepend"] = ["self_wav"]
    del changed["masking"]
    with pytest.raises(UserError) as error:
        lm_rules.model_from_xp_cfg(changed, 768, "here")
    for part in ("bias_attn must be true or false", "layer_scale must be None",
                 "causal must be False", "masking.span_len", "modeling must be parallel",
                 "conditioners other than text: self_wav", "fuser.prepend"):  # fmt: skip
        assert part in str(error.value)


def test_xp_cfg_references_and_optional_settings(reference):
    _, xp_cfg = reference
    changed = copy.deepcopy(xp_cfg)
    changed["transformer_lm"]["card"] = "${codes.size}"
    changed["codes"] = {"size": "${size}"}
    changed["size"] = 128
    changed["conditioners"]["args"] = {"merge_text_conditions_p": 0.25}
    del changed["transformer_lm"]["kv_repeat"]
    assert lm_rules.model_from_xp_cfg(changed, 768, "x").codebook_size == 128
    changed["size"] = "${codes.size}"  # in a ring
    with pytest.raises(UserError, match="card must be a whole number"):
        lm_rules.model_from_xp_cfg(changed, 768, "x")


# --- the whole model in PyTorch -----------------------------------------------------------------


def test_exported_state_dict_computes_the_references_logits_in_pytorch(tmp_path):
    lm = lm_rules.read_audiocraft(MAGNET)
    lm_rules.write_audiocraft(tmp_path, lm.params, lm.model, lm.xp_cfg, PUBLISHED_CODEC)
    state = audiocraft.read_file(tmp_path / "state_dict.bin").tensors
    forward = np.load(MAGNET / "forward.npz")
    codes, states, lengths = (forward[n] for n in ("codes", "t5_hidden", "text_lengths"))
    for stage in range(lm.model.num_codebooks):
        for prefix, present in (("logits", lengths), ("null_logits", lengths * 0)):
            found = torch_lm.logits(state, lm.model, codes, states, present, stage)
            expected = forward[f"{prefix}_stage{stage}"]
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    # The check can fail: heads taken as interleaved rows give other numbers.
    wrong = dict(state)
    for name, weight in state.items():
        if name.endswith("self_attn.in_proj_weight"):
            d, n = lm.model.width, lm.model.num_heads
            wrong[name] = weight.reshape(3, n, d // n, d).swapaxes(1, 2).reshape(3 * d, d)
    found = torch_lm.logits(wrong, lm.model, codes, states, lengths, 0)
    assert np.abs(found - forward["logits_stage0"]).max() > 1e-2


@pytest.mark.parametrize("folder", [MAGNET, MUSICGEN], ids=lambda folder: folder.name)
def test_logits_here_and_in_pytorch_agree_or_differ(folder):
    lm = lm_rules.read_audiocraft(folder)
    state = lm_rules.to_audiocraft(lm.params, lm.model)
    assert verify.logits_difference(lm.params, lm.model, state) < 1e-4
    state["linears.0.weight"] = state["linears.0.weight"][::-1].copy()
    assert verify.logits_difference(lm.params, lm.model, state) > 1e-2


# --- the codec ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_codec():
    return codec_rules.read_codec_folder(ASSETS / "codec")


def test_codec_round_trip_is_the_identity(shipped_codec):
    settings, tensors = shipped_codec
    state_dict = codec_rules.codec_to_audiocraft(tensors, settings, 4)
    assert len(state_dict) == len(tensors)
    back = codec_rules.codec_from_audiocraft(state_dict, settings, 4)
    assert_same_bits(back, tensors)
    fewer = codec_rules.codec_to_audiocraft(tensors, settings, 2)
    assert fewer.keys() == {
        name
        for name in state_dict
        if not name.startswith(("quantizer.vq.layers.2", "quantizer.vq.layers.3"))
    }


def test_codec_mismatches_are_reported_together(shipped_codec):
    settings, tensors = shipped_codec
    wrong = dict(tensors)
    del wrong["encoder.layers.0.conv.bias"]
    wrong["decoder.layers.99.conv.bias"] = np.zeros(1, np.float32)
    with pytest.raises(UserError, match=r"2 tensors .*layers\.0\.conv\.bias.*layers\.99"):
        codec_rules.codec_to_audiocraft(wrong, settings, 4)
    with pytest.raises(UserError, match="quantizer.layers.4"):
        codec_rules.codec_to_audiocraft(tensors, settings, 5)
    unfit = settings | {"norm_type": "time_group_norm", "chunk_length_s": 1.0}
    del unfit["compress"]
    with pytest.raises(UserError, match="compress is missing.*norm_type.*chunk"):
        codec_rules.codec_layout(unfit, 4)
    with pytest.raises(UserError, match="normalize must be false"):
        codec_rules.codec_layout(settings | {"normalize": True}, 4)


def test_exported_codec_computes_the_same_codes_and_audio(tmp_path):
    """AudioCraft's EnCodec has the `encodec` package's modules: they load the export and agree."""
    torch = import_torch()
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer
    from transformers.models.encodec.modeling_encodec import EncodecModel

    lm_rules.write_audiocraft(tmp_path, random_params(TINY), TINY, {}, EMBEDDED_CODEC)
    content = torch.load(tmp_path / "compression_state_dict.bin", weights_only=True)
    xp_cfg = yaml.safe_load(content["xp.cfg"])
    settings = dict(xp_cfg["seanet"])
    settings.pop("disable_norm_outer_blocks")  # the package came before it; 0 changes nothing
    for_encoder, for_decoder = settings.pop("encoder"), settings.pop("decoder")
    rvq = xp_cfg["rvq"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weight norm is deprecated in torch
        modules = torch.nn.ModuleDict(
            {
                "encoder": SEANetEncoder(**settings, **for_encoder),
                "decoder": SEANetDecoder(**settings, **for_decoder),
                "quantizer": ResidualVectorQuantizer(
                    dimension=settings["dimension"], n_q=rvq["n_q"], bins=rvq["bins"]
                ),
            }
        ).eval()
    modules.load_state_dict(content["best_state"])  # strict: every name and shape

    original = EncodecModel.from_pretrained(ASSETS / "codec", local_files_only=True).eval()
    clips = []
    for name in ("03_bach", "08_oneills1850"):
        samples, rate = soundfile.read(ASSETS / "clips" / f"{name}.flac", dtype="float32")
        assert rate == 32_000
        clips.append(samples[64_000:96_320:2])  # every other sample: crude, but music at 16 kHz
    wav = torch.from_numpy(np.stack(clips)[:, None])
    with torch.inference_mode():
        codes_KBT = modules["quantizer"].vq.encode(modules["encoder"](wav))
        expected = original.encode(wav, bandwidth=2.0).audio_codes[0]
        assert torch.equal(codes_KBT.transpose(0, 1), expected)
        assert len(expected.unique()) > 50  # not one code throughout
        found_wav = modules["decoder"](modules["quantizer"].vq.decode(codes_KBT))
        expected_wav = original.decode(expected[None], [None]).audio_values
        assert torch.allclose(found_wav, expected_wav, atol=1e-5)


def test_codec_pointers(tmp_path, monkeypatch):
    def pointer(source):
        return codec_rules.codec_pointer(dataclasses.replace(EMBEDDED_CODEC, source=source))

    assert pointer("embedded") is None
    assert pointer(str(ASSETS / "codec")) is None
    assert pointer("facebook/encodec_32khz") == "facebook/encodec_32khz"
    assert pointer("encodec_24khz") == "facebook/encodec_24khz"
    for source in ("encodec_48khz", "facebook/encodec_48khz"):
        with pytest.raises(UserError, match="--no-audiocraft"):
            pointer(source)
    # Under another name as well, if the codec's config says so.
    cached = tmp_path / "config.json"
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda *_: str(cached) if cached.exists() else None,
    )
    assert pointer("someone/codec") == "someone/codec"
    cached.write_text('{"normalize": false}')
    assert pointer("someone/codec") == "someone/codec"
    cached.write_text('{"normalize": true}')
    with pytest.raises(UserError, match="--no-audiocraft"):
        pointer("someone/codec")
    cached.unlink()
    (tmp_path / "encodec_24khz.th").write_bytes(b"")
    with pytest.raises(UserError, match="--no-audiocraft"):
        pointer(str(tmp_path / "encodec_24khz.th"))
    with pytest.raises(UserError, match="no such folder"):
        pointer(str(tmp_path / "gone" / "codec"))

    lm_rules.write_audiocraft(tmp_path, random_params(TINY), TINY, {}, PUBLISHED_CODEC)
    file = audiocraft.read_file(tmp_path / "compression_state_dict.bin")
    assert file.pretrained == "facebook/encodec_32khz"
