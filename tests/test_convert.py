"""Conversion to AudioCraft's checkpoints and to safetensors, both ways."""

import copy
import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import yaml
from safetensors import SafetensorError

from launch import export, sample
from magnet_jax import api, checkpoint, convert, convert_codec, t5
from magnet_jax import bundle as bundles
from magnet_jax.config import ASSETS, CodecSpec, ModelConfig, RunConfig, TextConfig
from magnet_jax.errors import UserError
from magnet_jax.torch_env import import_torch

GOLDEN = Path(__file__).parent / "golden"
MAGNET = GOLDEN / "magnet_tiny"
TINY = ModelConfig(
    num_codebooks=2, codebook_size=8, width=12, num_heads=3, num_layers=2, mlp_ratio=2, text_width=5
)
# What the embedded codec's hash is does not matter here, except to the export, which computes it.
EMBEDDED_CODEC = CodecSpec(
    source="embedded",
    sha256="0" * 64,
    sample_rate=16000,
    channels=1,
    frame_rate=50.0,
    num_codebooks=4,
    codebook_size=1024,
)
PUBLISHED_CODEC = dataclasses.replace(
    EMBEDDED_CODEC, source="facebook/encodec_32khz", sample_rate=32000, codebook_size=2048
)


# Of a small EnCodec of the published 32 kHz architecture.
GOLDEN_CODEC_SETTINGS = {
    "audio_channels": 1,
    "chunk_length_s": None,
    "codebook_dim": 32,
    "codebook_size": 128,
    "compress": 2,
    "dilation_growth_rate": 2,
    "hidden_size": 32,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "norm_type": "weight_norm",
    "normalize": False,
    "num_filters": 8,
    "num_lstm_layers": 2,
    "num_residual_layers": 1,
    "pad_mode": "constant",
    "residual_kernel_size": 3,
    "sampling_rate": 32000,
    "trim_right_ratio": 1.0,
    "upsampling_ratios": [8, 5, 4, 4],
    "use_causal_conv": False,
    "use_conv_shortcut": False,
}


@pytest.fixture(scope="module")
def reference():
    """The reference's checkpoint as its author wrote it: tensors by name and the xp.cfg."""
    torch = import_torch()
    content = torch.load(MAGNET / "state_dict.bin", weights_only=True)
    tensors = {name: tensor.numpy() for name, tensor in content["best_state"].items()}
    return tensors, yaml.safe_load(content["xp.cfg"])


def random_params(model: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = convert.lm_shapes(model)
    return convert.unflatten(
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


# --- the rule table -----------------------------------------------------------------------------


def test_import_then_export_is_the_identity(reference, tmp_path):
    tensors, xp_cfg = reference
    model, lm_params, found_cfg = convert.read_audiocraft(MAGNET)
    assert model == ModelConfig(
        codebook_size=128, width=64, num_heads=4, num_layers=3, text_width=768
    )
    assert found_cfg == xp_cfg
    exported = convert.to_audiocraft(lm_params, model)
    assert_same_bits(exported, tensors)
    assert list(exported) == list(tensors)  # the order as well
    convert.write_audiocraft(tmp_path, lm_params, model, found_cfg, PUBLISHED_CODEC)
    again = convert.read_checkpoint(tmp_path / "state_dict.bin")
    assert_same_bits(again["best_state"], tensors)
    assert again["xp.cfg"] == xp_cfg
    assert again["exported"] is True


@pytest.mark.parametrize("model", [TINY, ModelConfig(num_layers=24)])
def test_every_tensor_has_exactly_one_rule(model):
    names = [name for name, _, _ in convert._expand(convert._sizes(model))]
    assert len(names) == len(set(names)) == 2 + 2 * model.num_codebooks + 12 * model.num_layers + 2
    used = [rule for _, rule, _ in convert._expand(convert._sizes(model))]
    assert set(used) == set(convert.LM_RULES)
    paths = [path for rule in convert.LM_RULES for path in rule.ours]
    assert len(paths) == len(set(paths))
    theirs, ours = convert.audiocraft_shapes(model), convert.lm_shapes(model)
    assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, ours.values()))


def test_rules_fit_the_transformer():
    """The table's paths and shapes are those of the network that trains."""
    shapes = checkpoint.abstract_params(TINY, None)["lm"]
    found = {path: leaf.shape for path, leaf in convert.flatten(shapes).items()}
    assert found == convert.lm_shapes(TINY)


def test_round_trip_from_our_side():
    params = random_params(TINY)
    state_dict = convert.to_audiocraft(params, TINY)
    back = convert.from_audiocraft(state_dict, TINY)
    assert_same_bits(convert.flatten(back), convert.flatten(params))
    # Nothing is shared: writing to the export leaves the parameters alone.
    state_dict["out_norm.weight"][:] = 0
    assert np.all(params["norm_final"]["scale"] != 0)


def test_float16_is_widened_exactly():
    state_dict = convert.to_audiocraft(random_params(TINY), TINY)
    half = {name: array.astype(np.float16) for name, array in state_dict.items()}
    back = convert.to_audiocraft(convert.from_audiocraft(half, TINY), TINY)
    assert_same_bits({name: array.astype(np.float16) for name, array in back.items()}, half)


def test_all_mismatches_in_one_message():
    state_dict = convert.to_audiocraft(random_params(TINY), TINY)
    del state_dict["emb.1.weight"]
    state_dict["transformer.layers.2.linear1.weight"] = np.zeros((24, 12), np.float32)
    state_dict["linears.0.weight"] = np.zeros((9, 12), np.float32)
    state_dict["out_norm.bias"] = np.zeros(12, np.int64)
    with pytest.raises(UserError) as error:
        convert.from_audiocraft(state_dict, TINY, "here")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("here: 4 tensors do not fit the model: ")
    assert "emb.1.weight [9, 12] is missing" in message
    assert "transformer.layers.2.linear1.weight [24, 12] is unknown" in message
    assert "linears.0.weight is [9, 12], not [8, 12]" in message
    assert "out_norm.bias is int64" in message

    params = random_params(TINY)
    params["blocks"]["self"]["query"] = params["blocks"]["self"]["query"][:1]
    del params["heads"]
    with pytest.raises(UserError, match="2 tensors.*heads .* is missing.*self/query is"):
        convert.to_audiocraft(params, TINY)


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
        convert.read_audiocraft(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 100, 40_000, 1_000_000])
def test_truncated_checkpoint(tmp_path, size):
    data = (MAGNET / "state_dict.bin").read_bytes()[:size]
    (tmp_path / "state_dict.bin").write_bytes(data)
    with pytest.raises(UserError, match="state_dict.bin"):
        convert.read_audiocraft(tmp_path)


def test_files_of_another_kind(tmp_path):
    torch = import_torch()
    path = tmp_path / "state_dict.bin"
    with pytest.raises(UserError, match="no such file"):
        convert.read_audiocraft(tmp_path)
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
            convert.read_audiocraft(tmp_path)


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
    found = convert.make_xp_cfg(config, PUBLISHED_CODEC, "t5-base")
    assert structure(found) == structure(expected)
    assert list(found) == list(expected)
    assert found == expected  # this run has the golden model's settings: every value is equal
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert convert.model_from_xp_cfg(found, 768, "x") == config.model


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
    found = convert.make_xp_cfg(config, codec, "text_encoder")
    assert convert.model_from_xp_cfg(found, TINY.text_width, "x") == config.model
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


def test_models_that_cannot_be_converted(reference):
    _, xp_cfg = reference
    changed = copy.deepcopy(xp_cfg)
    changed["transformer_lm"]["bias_attn"] = True
    changed["transformer_lm"]["causal"] = True
    changed["conditioners"]["self_wav"] = {"model": "chroma_stem"}
    changed["fuser"]["prepend"] = ["self_wav"]
    del changed["masking"]
    with pytest.raises(UserError) as error:
        convert.model_from_xp_cfg(changed, 768, "here")
    for part in ("bias_attn must be False", "causal must be False", "masking.span_len",
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
    assert convert.model_from_xp_cfg(changed, 768, "x").codebook_size == 128
    changed["size"] = "${codes.size}"  # in a ring
    with pytest.raises(UserError, match="card must be a whole number"):
        convert.model_from_xp_cfg(changed, 768, "x")


# --- the whole model in PyTorch -----------------------------------------------------------------


def torch_forward(torch, state, xp_cfg, codes_BKT, t5_hidden_BSE, text_lengths_B, stage):
    """AudioCraft's network written out in plain PyTorch, straight from a state dict."""
    lm = xp_cfg["transformer_lm"]
    width, heads = lm["dim"], lm["num_heads"]
    functional = torch.nn.functional
    batch, _, frames = codes_BKT.shape
    x = sum(state[f"emb.{k}.weight"][codes_BKT[:, k]] for k in range(lm["n_q"]))
    half = torch.arange(width // 2, dtype=torch.float32)
    phase = torch.arange(frames)[:, None] / 10000 ** (half / (width // 2 - 1))
    x = x + torch.cat([phase.cos(), phase.sin()], dim=1)

    name = "condition_provider.conditioners.description.output_proj"
    text = functional.linear(t5_hidden_BSE, state[f"{name}.weight"], state[f"{name}.bias"])
    text = text * (torch.arange(text.shape[1]) < text_lengths_B[:, None])[:, :, None]

    allowed = None
    if stage > 0:
        place = torch.arange(frames)
        allowed = (place[:, None] - place).abs() <= lm["subcodes_context"]

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (width,), weight, bias)

    def attend(x, memory, name, mask):
        projections = state[f"{name}.in_proj_weight"].chunk(3)
        query, key, value = (
            functional.linear(source, weight).view(batch, -1, heads, width // heads).transpose(1, 2)
            for source, weight in zip((x, memory, memory), projections)
        )
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).reshape(batch, frames, width)
        return functional.linear(out, state[f"{name}.out_proj.weight"])

    for i in range(lm["num_layers"]):
        layer = f"transformer.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        x = x + attend(h, h, f"{layer}.self_attn", allowed)
        x = x + attend(norm(x, f"{layer}.norm_cross"), text, f"{layer}.cross_attention", None)
        h = functional.linear(norm(x, f"{layer}.norm2"), state[f"{layer}.linear1.weight"])
        x = x + functional.linear(functional.gelu(h), state[f"{layer}.linear2.weight"])
    return functional.linear(norm(x, "out_norm"), state[f"linears.{stage}.weight"])


def test_exported_state_dict_computes_the_references_logits_in_pytorch(tmp_path):
    torch = import_torch()
    model, lm_params, xp_cfg = convert.read_audiocraft(MAGNET)
    convert.write_audiocraft(tmp_path, lm_params, model, xp_cfg, PUBLISHED_CODEC)
    content = torch.load(tmp_path / "state_dict.bin", weights_only=True)
    state, xp_cfg = content["best_state"], yaml.safe_load(content["xp.cfg"])
    forward = np.load(MAGNET / "forward.npz")
    codes = torch.from_numpy(forward["codes"].astype(np.int64))
    hidden = torch.from_numpy(forward["t5_hidden"])
    lengths = torch.from_numpy(forward["text_lengths"])
    with torch.inference_mode():
        for stage in range(model.num_codebooks):
            for prefix, present in (("logits", lengths), ("null_logits", lengths * 0)):
                found = torch_forward(torch, state, xp_cfg, codes, hidden, present, stage)
                expected = forward[f"{prefix}_stage{stage}"]
                np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=0)
    # The check can fail: heads taken as interleaved rows give other numbers.
    wrong = dict(state)
    for name, weight in state.items():
        if name.endswith("self_attn.in_proj_weight"):
            d, n = weight.shape[1], xp_cfg["transformer_lm"]["num_heads"]
            wrong[name] = weight.view(3, n, d // n, d).transpose(1, 2).reshape(3 * d, d)
    with torch.inference_mode():
        found = torch_forward(torch, wrong, xp_cfg, codes, hidden, lengths, 0)
    assert np.abs(found.numpy() - forward["logits_stage0"]).max() > 1e-2


# --- the codec ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_codec():
    return convert_codec.read_codec_folder(ASSETS / "codec")


def test_codec_layout_equals_the_references():
    """Names, shapes and settings of a small EnCodec of the published 32 kHz architecture."""
    expected = json.loads((GOLDEN / "encodec_tiny_layout.json").read_text())
    settings = GOLDEN_CODEC_SETTINGS
    layout = convert_codec.codec_layout(settings, 4)
    assert {name: list(shape) for _, name, shape in layout} == expected["tensors"]
    assert len({here for here, _, _ in layout}) == len({there for _, there, _ in layout})
    assert convert_codec.make_codec_xp_cfg(settings, 4) == expected["xp.cfg"]
    # Two residual layers shift every later place: the count alone must still be right.
    deeper = convert_codec.codec_layout(settings | {"num_residual_layers": 2}, 4)
    assert len(deeper) == len(layout) + 8 * 6


def test_a_codec_of_audiocraft_gives_the_references_codes_and_audio(tmp_path):
    from safetensors.numpy import save_file

    from magnet_jax.codec import load_codec

    content = convert.read_checkpoint(GOLDEN / "encodec_tiny" / "compression_state_dict.bin")
    settings = GOLDEN_CODEC_SETTINGS | {"model_type": "encodec", "target_bandwidths": [1.4]}
    assert content["xp.cfg"] == convert_codec.make_codec_xp_cfg(settings, 4)
    tensors = convert_codec.codec_from_audiocraft(content["best_state"], settings, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    codec = load_codec(str(tmp_path))
    golden = np.load(GOLDEN / "encodec_tiny" / "codec.npz")
    np.testing.assert_array_equal(codec.encode(golden["wav"]), golden["codes"])
    assert len(np.unique(golden["codes"])) > 30
    np.testing.assert_allclose(codec.decode(golden["codes"]), golden["decoded"], atol=1e-6, rtol=0)


def test_codec_round_trip_is_the_identity(shipped_codec):
    settings, tensors = shipped_codec
    state_dict = convert_codec.codec_to_audiocraft(tensors, settings, 4)
    assert len(state_dict) == len(tensors)
    back = convert_codec.codec_from_audiocraft(state_dict, settings, 4)
    assert_same_bits(back, tensors)
    fewer = convert_codec.codec_to_audiocraft(tensors, settings, 2)
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
        convert_codec.codec_to_audiocraft(wrong, settings, 4)
    with pytest.raises(UserError, match="quantizer.layers.4"):
        convert_codec.codec_to_audiocraft(tensors, settings, 5)
    unfit = settings | {"norm_type": "time_group_norm", "chunk_length_s": 1.0}
    del unfit["compress"]
    with pytest.raises(UserError, match="compress is missing.*norm_type.*chunk"):
        convert_codec.codec_layout(unfit, 4)
    with pytest.raises(UserError, match="normalize must be false"):
        convert_codec.codec_layout(settings | {"normalize": True}, 4)


def test_exported_codec_computes_the_same_codes_and_audio(tmp_path):
    """AudioCraft's EnCodec has the `encodec` package's modules: they load the export and agree."""
    torch = import_torch()
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer
    from transformers.models.encodec.modeling_encodec import EncodecModel

    convert.write_audiocraft(tmp_path, random_params(TINY), TINY, {}, EMBEDDED_CODEC)
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
        return convert_codec.codec_pointer(dataclasses.replace(EMBEDDED_CODEC, source=source))

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

    convert.write_audiocraft(tmp_path, random_params(TINY), TINY, {}, PUBLISHED_CODEC)
    content = convert.read_checkpoint(tmp_path / "compression_state_dict.bin")
    assert content["pretrained"] == "facebook/encodec_32khz"
    assert content["exported"] is True


# --- safetensors --------------------------------------------------------------------------------


def make_bundle(**changes) -> bundles.Bundle:
    return bundles.Bundle(
        **{
            "model": TINY,
            "text": TextConfig(source="t5-small"),
            "codec": PUBLISHED_CODEC,
            "decode": dataclasses.replace(RunConfig().decode, steps=(3, 2), top_p=0.5),
            "segment_seconds": 2.5,
            "lineage": {"run": "r", "step": 7},
            "params": {"lm": random_params(TINY)},
        }
        | changes
    )


def test_safetensors_round_trip(tmp_path):
    text_params = {"embed": np.ones((3, 5), np.float32), "blocks": {"up": np.zeros(2, np.float32)}}
    bundle = make_bundle(
        text=TextConfig(source="text_encoder", finetune=True),
        params={"lm": random_params(TINY), "text": text_params},
    )
    bundles.write_safetensors(tmp_path, bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    found = bundles.read_safetensors(tmp_path)
    assert dataclasses.replace(found, params={}) == dataclasses.replace(bundle, params={})
    assert_same_bits(convert.flatten(found.params), convert.flatten(bundle.params))
    assert "lm/blocks/self/query" in convert.flatten(found.params)
    # Folders that travel along are found wherever the model lies.
    (tmp_path / "text_encoder").mkdir()
    assert bundles.read_safetensors(tmp_path).text.source == str(tmp_path / "text_encoder")


@pytest.mark.parametrize("kind", ["text", "codec"])
def test_exports_refer_to_nothing_outside(tmp_path, monkeypatch, kind):
    (tmp_path / "private_home" / "thing").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "private_home" / "thing"
    for source in ("../private_home/thing", str(outside), "./private_home/../private_home/thing"):
        part = dataclasses.replace(getattr(make_bundle(), kind), source=source)
        bundles.write_safetensors(tmp_path / "out", make_bundle(**{kind: part}))
        with pytest.raises(UserError, match="config.json: source .* neither in this folder"):
            bundles.read_safetensors(tmp_path / "out")


def test_damaged_safetensors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        bundles.read_safetensors(tmp_path)
    bundles.write_safetensors(tmp_path, make_bundle())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="damaged"):
        bundles.read_safetensors(tmp_path)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, complaint in (
        ({"format_version": 2}, "format version 2"),
        ({"format": "other"}, "not the config"),
        ({"extra": 1}, "extra"),
        ({"segment_seconds": "10"}, "segment_seconds cannot be '10'"),
        ({"segment_seconds": -1}, "segment_seconds must be positive"),
        ({"lineage": 3}, "lineage cannot be 3"),
        ({"model": config["model"] | {"num_layers": 3}}, "blocks/.* is \\[2, .*not \\[3, "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=complaint):
            bundles.read_safetensors(tmp_path)
    with pytest.raises(UserError, match="heads"):
        params = random_params(TINY)
        del params["heads"]
        bundles.write_safetensors(tmp_path, make_bundle(params={"lm": params}))


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    """A run with the shipped codec and the shipped text encoder, the latter trained along."""
    from magnet_jax.codec import load_codec

    codec = load_codec("embedded").spec
    text_config, text_params, tokenizer = t5.load("embedded")
    model = dataclasses.replace(
        TINY, num_codebooks=4, codebook_size=1024, text_width=text_config.d_model
    )
    config = RunConfig(model=model, text=TextConfig(source="embedded", finetune=True))
    params = {"lm": random_params(model), "text": text_params}
    return checkpoint.Loaded(
        config, codec, codec.source, params, text_config, text_params, tokenizer, 5
    )


def run_export(loaded, tmp_path, **changes):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    args = export.Args(checkpoint=run, out=tmp_path / "out", **changes)
    export.prepare_out(args)
    return export.export_model(loaded, {"run": "my-run", "step": 5, "data": "clips"}, args)


def test_export_writes_a_whole_folder(loaded, tmp_path):
    line = run_export(loaded, tmp_path, license="cc-by-4.0")
    assert "every bit equal" in line
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md", "compression_state_dict.bin", "config.json", "generation_config.json",
        "model.safetensors", "state_dict.bin", "text_encoder",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    assert len({path.stat().st_mode for path in out.rglob("*") if path.is_file()}) == 1
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for part in ("my-run", "step: 5", "clips", loaded.codec.sha256, "T5Conditioner"):
        assert part in card
    assert str(tmp_path) not in card + (out / "config.json").read_text()
    model, _, xp_cfg = convert.read_audiocraft(out)
    assert model == loaded.config.model
    # AudioCraft would load the original weights under a published name.
    assert xp_cfg["conditioners"]["description"]["t5"]["name"] == "text_encoder"

    with pytest.raises(UserError, match="--overwrite"):
        run_export(loaded, tmp_path)
    run_export(loaded, tmp_path, overwrite=True, audiocraft=False)
    assert not (out / "state_dict.bin").exists()
    assert "Unspecified" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_one_line_and_leaves_no_half_folder(loaded, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(export, "write_safetensors", fail)
    with pytest.raises(UserError, match="out: cannot be written .*No space left"):
        run_export(loaded, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_full_disk_under_torchs_files_is_an_oserror():
    with pytest.raises(OSError, match="No space left"):
        convert._write_torch(Path("/dev/full"), {"a": import_torch().zeros(100_000)})


def test_a_kill_while_an_export_is_replaced_loses_nothing(loaded, tmp_path, monkeypatch):
    run_export(loaded, tmp_path, audiocraft=False)
    whole = (tmp_path / "out" / "config.json").read_bytes()
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run_export(loaded, tmp_path, audiocraft=False, overwrite=True)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--overwrite"):  # it is back, and as precious as before
        run_export(loaded, tmp_path)
    assert (tmp_path / "out" / "config.json").read_bytes() == whole
    run_export(loaded, tmp_path, audiocraft=False, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_export_notices_what_was_written_wrongly(loaded, tmp_path, monkeypatch):
    to_audiocraft = convert.to_audiocraft

    def flip_a_bit(*args):
        state_dict = to_audiocraft(*args)
        state_dict["linears.3.weight"].view(np.int32)[-1, -1] ^= 1
        return state_dict

    monkeypatch.setattr(convert, "to_audiocraft", flip_a_bit)
    with pytest.raises(RuntimeError, match="state_dict.bin: what was read back differs: heads"):
        run_export(loaded, tmp_path)
    assert not (tmp_path / "out").exists()


def test_export_refuses(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an export"):
        run_export(loaded, tmp_path, overwrite=True)
    (tmp_path / "out" / "thesis.txt").unlink()
    changed = loaded._replace(codec=dataclasses.replace(loaded.codec, sha256="1" * 64))
    with pytest.raises(UserError, match="codec"):
        run_export(changed, tmp_path)
    with pytest.raises(UserError, match="trained its text encoder"):
        run_export(loaded, tmp_path, t5_name="t5-base")


def test_text_encoder_names(loaded):
    def name(source, width, t5_name=None, finetune=False):
        config = dataclasses.replace(
            loaded.config,
            text=TextConfig(source=source, finetune=finetune),
            model=dataclasses.replace(loaded.config.model, text_width=width),
        )
        return export.text_encoder_name(loaded._replace(config=config), t5_name)

    assert name("t5-base", 768) == "t5-base"
    assert name("google-t5/t5-small", 512) == "t5-small"
    assert name("google/flan-t5-large", 1024) == "google/flan-t5-large"
    assert name("t5-base", 768, finetune=True) == "text_encoder"
    assert name("embedded", 128) == "text_encoder"
    assert name("some/folder", 768, "t5-base") == "t5-base"
    with pytest.raises(UserError, match="768 wide"):
        name("some/folder", 512, "t5-base")
    with pytest.raises(UserError, match="AudioCraft knows"):
        name("some/folder", 512, "bert")


def test_export_copies_a_codec_folder(loaded, tmp_path):
    import shutil

    shutil.copytree(ASSETS / "codec", tmp_path / "codec")
    source = str(tmp_path / "codec")
    codec = dataclasses.replace(loaded.codec, source=source)
    run_export(loaded._replace(codec=codec, codec_source=source), tmp_path)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["codec"]["source"] == "codec"
    shutil.rmtree(tmp_path / "codec")
    moved = out.rename(tmp_path / "elsewhere")
    found = bundles.read_safetensors(moved).codec
    assert found.source == str(moved / "codec")
    assert str(tmp_path) not in (moved / "README.md").read_text()
    convert_codec.read_codec_folder(convert_codec.codec_folder(found))


def all_text(folder: Path) -> str:
    return "".join(path.read_bytes().decode("latin1") for path in folder.rglob("*.*"))


def test_a_text_encoder_called_by_its_published_name_leaves_no_path(loaded, tmp_path):
    model = dataclasses.replace(loaded.config.model, text_width=512)
    config = RunConfig(model=model, text=TextConfig(source=str(tmp_path / "home" / "my_t5")))
    params = {"lm": random_params(model)}
    changed = loaded._replace(config=config, params=params)
    run_export(changed, tmp_path, t5_name="t5-small")
    assert bundles.read_safetensors(tmp_path / "out").text.source == "t5-small"
    assert str(tmp_path) not in all_text(tmp_path / "out")


def test_a_codec_from_a_weights_file_travels_along(loaded, tmp_path):
    torch = import_torch()
    import encodec

    from magnet_jax.codec import load_codec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    (tmp_path / "home").mkdir()
    weights = tmp_path / "home" / "encodec_24khz-mine.th"
    torch.save(model.state_dict(), weights)
    spec = load_codec(str(weights), num_codebooks=4).spec

    # Into the run ...
    config = dataclasses.replace(loaded.config, out=str(tmp_path / "run"))
    checkpoint.prepare_run(config, spec)
    source = checkpoint.codec_source(tmp_path / "run", spec)
    assert source == str(tmp_path / "run" / "codec" / "encodec_24khz-mine.th")
    weights.unlink()
    # ... and on into the export.
    changed = loaded._replace(codec=spec, codec_source=source)
    with pytest.raises(UserError, match="--no-audiocraft"):
        run_export(changed, tmp_path)
    run_export(changed, tmp_path, audiocraft=False)
    assert str(tmp_path) not in all_text(tmp_path / "out")
    assert "- `codec/encodec_24khz-mine.th`: " in (tmp_path / "out" / "README.md").read_text()
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    found = bundles.read_safetensors(moved).codec
    assert load_codec(found.source, num_codebooks=4).spec == found


def test_an_export_samples_as_its_run_does_and_can_be_exported_again(loaded, tmp_path):
    decode = dataclasses.replace(loaded.config.decode, steps=(2, 1, 1, 1), top_p=0.7)
    data = dataclasses.replace(loaded.config.data, segment_seconds=0.4)
    config = dataclasses.replace(loaded.config, decode=decode, data=data)
    run = loaded._replace(config=config)
    run_export(run, tmp_path, audiocraft=False)
    out = tmp_path / "out"
    found = checkpoint.load_for_inference(out)
    assert (found.step, found.codec, found.config.decode) == (5, loaded.codec, decode)
    assert sample.parse(["--checkpoint", str(out), "--out", "x"]).decode == decode

    def codes(model):
        frames = api.segment_frames(model.config, model.codec)
        assert frames == 20
        return api.generate_codes(
            model, ["drums", ""], num_frames=frames, decoding=model.config.decode, seed=3
        ).codes_BKT

    np.testing.assert_array_equal(codes(found), codes(run))
    with pytest.raises(UserError, match="step 5 alone; give --step 5"):
        checkpoint.load_for_inference(out, step=4)

    export.main(export.Args(checkpoint=out, out=tmp_path / "again"))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
