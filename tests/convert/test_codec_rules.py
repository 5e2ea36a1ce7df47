"""AudioCraft's EnCodec as a transformers folder and back: settings, tensors, refusals."""

import copy
import json

import numpy as np
import pytest
from constants import SHIPPED_GOLDEN
from tiny import assert_same_bits

from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import ASSETS
from magnet_jax.convert import audiocraft, codec_rules
from magnet_jax.errors import UserError


@pytest.fixture(scope="module")
def file():
    return audiocraft.read_file(SHIPPED_GOLDEN / "encodec_tiny" / audiocraft.CODEC_FILE)


def contains(found, expected) -> bool:
    """Whether every setting of `expected` is in `found`, with an equal value."""
    if isinstance(expected, dict):
        return all(name in found and contains(found[name], v) for name, v in expected.items())
    return found == expected


def test_settings_come_back(file):
    settings, count = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "x")
    assert contains(codec_rules.make_codec_xp_cfg(settings, count), file.xp_cfg)


def test_the_layout_is_the_references(file):
    """Names and shapes of a small EnCodec of the published 32 kHz architecture."""
    settings, count = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "x")
    layout = codec_rules.codec_layout(settings, count)
    assert {there: shape for _, there, shape in layout} == {
        name: array.shape for name, array in file.tensors.items()
    }
    assert len({here for here, _, _ in layout}) == len({there for _, there, _ in layout})
    # Two residual layers shift every later place: the count alone must still be right.
    deeper = codec_rules.codec_layout(settings | {"num_residual_layers": 2}, count)
    assert len(deeper) == len(layout) + 8 * 6


def test_the_shipped_codec_is_the_same_after_a_visit_to_audiocraft(tmp_path):
    settings, tensors = codec_rules.read_codec_folder(ASSETS / "codec")
    before = load_codec("embedded").spec
    xp_cfg = codec_rules.make_codec_xp_cfg(settings, before.num_codebooks)
    state = codec_rules.codec_to_audiocraft(tensors, settings, before.num_codebooks)
    codec_rules.codec_folder_from_audiocraft(state, xp_cfg, tmp_path, "x")
    after = load_codec(str(tmp_path)).spec
    assert after.sha256 == before.sha256
    assert after.num_codebooks == before.num_codebooks


@pytest.mark.parametrize("codebooks", [1, 3, 7, 16])
@pytest.mark.parametrize("bins", [2, 100, 2048])
def test_any_size_has_as_many_codebooks_as_it_should(file, tmp_path, codebooks, bins):
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["rvq"] |= {"n_q": codebooks, "bins": bins}
    xp_cfg["seanet"] |= {"ratios": [8, 5, 4, 2], "dimension": 6, "n_filters": 2, "lstm": 1}
    xp_cfg["sample_rate"] = xp_cfg["encodec"]["sample_rate"] = 16000
    settings, count = codec_rules.codec_settings_from_xp_cfg(xp_cfg, "x")
    rng = np.random.default_rng(0)
    state = {
        there: rng.normal(size=shape).astype(np.float16)
        for _, there, shape in codec_rules.codec_layout(settings, count)
    }
    codec_rules.codec_folder_from_audiocraft(state, xp_cfg, tmp_path, "x")
    codec = load_codec(str(tmp_path))
    assert codec.spec.num_codebooks == codebooks
    assert (codec.spec.sample_rate, codec.spec.frame_rate) == (16000, 50)
    assert codec.spec.codebook_size == bins
    wav = rng.normal(size=(1, 1, 3200)).astype(np.float32)
    assert codec.encode(wav).shape == (1, codebooks, 10)


def test_float16_and_newer_names_are_taken(file, tmp_path):
    settings, count = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "x")
    newer = {codec_rules.parametrized_name(n): a for n, a in file.tensors.items()}
    assert newer.keys() != file.tensors.keys()
    assert_same_bits(
        codec_rules.codec_from_audiocraft(newer, settings, count),
        codec_rules.codec_from_audiocraft(file.tensors, settings, count),
    )
    half = {name: array.astype(np.float16) for name, array in file.tensors.items()}
    codec_rules.codec_folder_from_audiocraft(half, file.xp_cfg, tmp_path, "x")
    _, tensors = codec_rules.read_codec_folder(tmp_path)
    back = codec_rules.codec_to_audiocraft(tensors, settings, count)
    assert_same_bits({name: back[name].astype(np.float16) for name in half}, half)


def test_references_are_followed(file):
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["encodec"] |= {"sample_rate": "${sample_rate}", "channels": "${channels}"}
    xp_cfg["seanet"] |= {"causal": "${encodec.causal}", "channels": "${encodec.channels}"}
    expected = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "x")
    assert codec_rules.codec_settings_from_xp_cfg(xp_cfg, "x") == expected


def test_absent_settings_are_as_audiocraft_has_them(file):
    """The reference's own settings are its defaults, which an older checkpoint may leave out."""
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["encodec"]["renorm"] = xp_cfg["encodec"].pop("renormalize")  # the older name
    for section, name in (("encodec", "causal"), ("seanet", "causal"), ("seanet", "true_skip")):
        del xp_cfg[section][name]
    xp_cfg["seanet"]["decoder"] = {}
    expected = codec_rules.codec_settings_from_xp_cfg(file.xp_cfg, "x")
    assert codec_rules.codec_settings_from_xp_cfg(xp_cfg, "x") == expected
    # One alone leaves the other at its default, and they differ.
    xp_cfg["encodec"]["causal"] = True
    with pytest.raises(UserError, match=r"causal must be given, and equal, not \[True, False\]"):
        codec_rules.codec_settings_from_xp_cfg(xp_cfg, "x")


def test_settings_that_change_nothing(file, tmp_path):
    """Also the codec's hash stays: a float is one, however YAML spells it."""
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["seanet"]["decoder"] |= {"trim_right_ratio": 1, "final_activation_params": {"a": 2}}
    for folder, settings in (("before", file.xp_cfg), ("after", xp_cfg)):
        codec_rules.codec_folder_from_audiocraft(file.tensors, settings, tmp_path / folder, "x")
    after = load_codec(str(tmp_path / "after")).spec
    assert after.sha256 == load_codec(str(tmp_path / "before")).spec.sha256


def test_true_is_no_number(file):
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["seanet"]["channels"] = True
    with pytest.raises(UserError, match="seanet.channels must be given, and equal"):
        codec_rules.codec_settings_from_xp_cfg(xp_cfg, "x")


def test_all_that_does_not_fit_is_told_in_one_line(file):
    xp_cfg = copy.deepcopy(file.xp_cfg)
    xp_cfg["compression_model"] = "dac"
    xp_cfg["encodec"] |= {"renormalize": True, "channels": 2}
    xp_cfg["seanet"] |= {"norm": "time_group_norm", "activation": "Snake", "ratios": [8, 0],
                         "lstm": True, "encoder": {"compress": 4}}  # fmt: skip
    xp_cfg["seanet"]["decoder"] |= {"final_activation": "Tanh", "n_filters": 3}
    del xp_cfg["seanet"]["dimension"]
    del xp_cfg["rvq"]["n_q"]
    with pytest.raises(UserError) as error:
        codec_rules.codec_settings_from_xp_cfg(xp_cfg, "here")
    message = str(error.value)
    assert message.startswith("here: ") and "\n" not in message
    for part in ("compression_model must be encodec", "renormalize", "channels and", "seanet.norm",
                 "seanet.activation", "seanet.ratios", "seanet.lstm", "seanet.encoder",
                 "final_activation", "n_filters", "seanet.dimension", "rvq.n_q"):  # fmt: skip
        assert part in message, part


def test_tensors_that_do_not_fit(file, tmp_path):
    state = dict(file.tensors)
    removed = state.pop("quantizer.vq.layers.0._codebook.embed")
    state["something"] = removed
    with pytest.raises(UserError, match="2 tensors do not fit.*embed .* missing.*something"):
        codec_rules.codec_folder_from_audiocraft(state, file.xp_cfg, tmp_path, "here")
    assert not any(tmp_path.iterdir())


def test_a_pointer_holds_no_codec(tmp_path):
    audiocraft.write_pointer(tmp_path / audiocraft.CODEC_FILE, "facebook/encodec_32khz")
    with pytest.raises(UserError, match="points to facebook/encodec_32khz"):
        load_codec(str(tmp_path / audiocraft.CODEC_FILE))


def test_the_folder_is_one_that_transformers_reads(file, tmp_path):
    codec_rules.codec_folder_from_audiocraft(file.tensors, file.xp_cfg, tmp_path, "x")
    from transformers import EncodecModel

    model = EncodecModel.from_pretrained(tmp_path, local_files_only=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert model.config.num_quantizers == file.xp_cfg["rvq"]["n_q"]
    assert config["sampling_rate"] == file.xp_cfg["sample_rate"]
