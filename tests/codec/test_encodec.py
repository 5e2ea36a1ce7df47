import dataclasses
import http.client
import importlib.util
import json
import pickle
import shutil
import urllib.error
import warnings

import numpy as np
import pytest
import soundfile
import soxr
from safetensors.numpy import load_file, save_file

from magnet_jax.codec import encodec as codec_module
from magnet_jax.codec.encodec import ENCODEC_WEIGHTS, NOMINAL_RMS, check_same_codec, load_codec
from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch


@pytest.fixture(scope="module")
def embedded():
    return load_codec("embedded")


def noise(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def test_torchaudio_can_be_imported_after_torch():
    import_torch()
    assert importlib.util.find_spec("torchaudio") is not None
    import torchaudio

    assert torchaudio.__version__


def test_embedded_codec_is_what_its_folder_says(embedded):
    spec = embedded.spec
    assert (spec.sample_rate, spec.channels, spec.frame_rate) == (16000, 1, 50.0)
    assert (spec.num_codebooks, spec.codebook_size, embedded.hop) == (4, 1024, 320)
    by_path = load_codec(str(ASSETS / "codec")).spec
    assert dataclasses.replace(by_path, source="embedded") == spec


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 16123])
def test_frames_cover_every_sample(embedded, samples):
    codes_BKT = embedded.encode(noise(1, 1, samples))
    assert codes_BKT.dtype == np.int16
    assert codes_BKT.shape == (1, 4, -(-samples // 320))
    assert embedded.decode(codes_BKT).shape == (1, 1, codes_BKT.shape[2] * 320)


def test_round_trip_of_a_clip_keeps_the_music(embedded):
    wav, rate = soundfile.read(ASSETS / "clips" / "02_bach.flac", dtype="float32")
    wav = soxr.resample(wav, rate, 16000)[: 4 * 16000]
    wav *= 0.1 / np.sqrt(np.mean(wav**2))
    back = embedded.decode(embedded.encode(wav[None, None]))[0, 0, : len(wav)]
    assert 10 * np.log10(np.sum(wav**2) / np.sum((wav - back) ** 2)) > 6
    # and the codebooks above the first must help
    coarse = load_codec("embedded", num_codebooks=1)
    coarse_back = coarse.decode(coarse.encode(wav[None, None]))[0, 0, : len(wav)]
    assert np.sum((wav - coarse_back) ** 2) > 1.1 * np.sum((wav - back) ** 2)


def test_codes_equal_those_of_transformers(embedded):
    torch = import_torch()
    import transformers

    model = transformers.EncodecModel.from_pretrained(ASSETS / "codec").eval()
    wav_BCN = noise(2, 1, 16000)
    with torch.no_grad():
        bandwidth = max(model.config.target_bandwidths)
        theirs = model.encode(torch.tensor(wav_BCN), bandwidth=bandwidth).audio_codes
    (codes_BKT,) = theirs.numpy()
    np.testing.assert_array_equal(embedded.encode(wav_BCN), codes_BKT[:, :4])


def test_codes_do_not_depend_on_the_batch(embedded):
    wav_BCN = noise(3, 1, 20000)
    alone = np.concatenate([embedded.encode(wav_CN[None]) for wav_CN in wav_BCN])
    np.testing.assert_array_equal(embedded.encode(wav_BCN), alone)
    assert len(np.unique(alone)) > 50


def test_audio_that_cannot_be_written_to_is_encoded_without_a_word(embedded):
    """Such as `generate` returns, from JAX."""
    torch, wav = import_torch(), noise(1, 1, 640)
    wav.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # (or it would warn once a process)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = embedded.encode(wav)
    finally:
        torch.set_warn_always(before)
    np.testing.assert_array_equal(found, embedded.encode(wav.copy()))


def test_fewer_codebooks_are_the_first_ones(embedded):
    wav_BCN = noise(1, 1, 8000)
    two = load_codec("embedded", num_codebooks=2)
    np.testing.assert_array_equal(two.encode(wav_BCN), embedded.encode(wav_BCN)[:, :2])
    assert two.spec.sha256 == embedded.spec.sha256
    with pytest.raises(UserError, match="has 4 codebooks"):
        load_codec("embedded", num_codebooks=5)
    with pytest.raises(UserError, match="at least 1"):
        load_codec("embedded", num_codebooks=0)


def test_wrong_arrays_are_refused(embedded):
    with pytest.raises(ValueError, match="expected"):
        embedded.encode(noise(1, 2, 100))
    with pytest.raises(ValueError, match="expected"):
        embedded.decode(np.zeros((1, 3, 5), int))
    with pytest.raises(ValueError, match="must lie in"):
        embedded.decode(np.full((1, 4, 5), 1024))


def test_device_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="device nonsense"):
        load_codec("embedded", device="nonsense")

    def no_cuda(*shape, device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    torch = import_torch()
    monkeypatch.setattr(torch, "empty", no_cuda)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device {device}: .* torch 2.13.0 with CUDA"):
            load_codec("embedded", device=device)


@pytest.fixture(scope="module")
def encodec_files(tmp_path_factory):
    """Weights files of the encodec package's models, with random but usable codebooks."""
    torch = import_torch()
    import encodec
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("encodec")
    torch.manual_seed(0)
    for name in ENCODEC_WEIGHTS:
        build = getattr(encodec.EncodecModel, name.replace("encodec_", "encodec_model_"))
        model = build(pretrained=False)
        for layer in model.quantizer.vq.layers:
            torch.nn.init.normal_(layer._codebook.embed, std=0.005)
        torch.save(model.state_dict(), folder / f"{name}-test.th")
    save_file(
        torch.load(folder / "encodec_24khz-test.th", weights_only=True),
        folder / "encodec_24khz-test.safetensors",
    )
    return folder


def test_encodec_24khz(encodec_files):
    path = encodec_files / "encodec_24khz-test.th"
    codec = load_codec(str(path))
    # 6 kbit/s are 8 codebooks of 10 bits at 75 Hz
    assert (codec.spec.sample_rate, codec.spec.channels, codec.spec.frame_rate) == (24000, 1, 75.0)
    assert (codec.spec.num_codebooks, codec.spec.codebook_size) == (8, 1024)
    codes_BKT = codec.encode(noise(2, 1, 24000))
    assert codes_BKT.shape == (2, 8, 75) and len(np.unique(codes_BKT)) > 10
    assert codec.decode(codes_BKT).shape == (2, 1, 24000)
    # the hash is of the tensors, not of the file
    other = load_codec(str(path.with_suffix(".safetensors")), num_codebooks=32).spec
    assert other.sha256 == codec.spec.sha256 and other.num_codebooks == 32


def test_encodec_codes_are_those_of_the_package(encodec_files):
    torch = import_torch()
    import encodec

    path = encodec_files / "encodec_24khz-test.th"
    model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.set_target_bandwidth(6.0)
    wav_BCN = noise(1, 1, 20000)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(wav_BCN))[0][0].numpy()
    np.testing.assert_array_equal(load_codec(str(path)).encode(wav_BCN), expected)


def test_encodec_48khz_needs_no_scales(encodec_files):
    codec = load_codec(str(encodec_files / "encodec_48khz-test.th"))
    assert (codec.spec.sample_rate, codec.spec.channels) == (48000, 2)
    assert (codec.spec.frame_rate, codec.spec.num_codebooks) == (150.0, 4)
    wav_BCN = noise(1, 2, 72000)  # more than its chunks of one second
    codes_BKT = codec.encode(wav_BCN)
    assert codes_BKT.shape == (1, 4, 225)
    # no level is lost that could matter: the codes are those of the clip at RMS 1
    np.testing.assert_array_equal(codec.encode(wav_BCN / 8), codes_BKT)
    wav = codec.decode(codes_BKT)
    assert wav.shape == (1, 2, 72000)
    codec.config = dataclasses.replace(codec.config, normalize=False)
    np.testing.assert_allclose(wav, codec.decode(codes_BKT) * NOMINAL_RMS, rtol=1e-6)


def test_downloads_that_fail_name_the_way_out(monkeypatch):
    torch = import_torch()
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network\nsecond line")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"no network.*encodec_24khz-d7cc33bc.th"):
        load_codec("encodec_24khz")
    for kind in (http.client.IncompleteRead, pickle.UnpicklingError):  # cut off, or not weights

        def broken(*args, kind=kind, **kwargs):
            raise kind(b"half")

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", broken)
        with pytest.raises(UserError, match="cannot be fetched .* copy encodec_24khz-d7cc33bc.th"):
            load_codec("encodec_24khz")
    with pytest.raises(UserError, match=r"no network.*folder.*'embedded'"):
        load_codec("facebook/encodec_32khz")


def test_a_hub_id_is_loaded_from_what_the_hub_gives(monkeypatch, embedded):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda hub_id, **_: str(ASSETS / "codec")
    )
    spec = load_codec("someone/encodec").spec
    assert spec == dataclasses.replace(embedded.spec, source="someone/encodec")


def test_damaged_codecs_give_one_line(tmp_path, encodec_files):
    def broken(change, match):
        shutil.rmtree(tmp_path / "codec", ignore_errors=True)
        shutil.copytree(ASSETS / "codec", tmp_path / "codec")
        change(tmp_path / "codec")
        with pytest.raises(UserError, match=match) as caught:
            load_codec(str(tmp_path / "codec"))
        assert "\n" not in str(caught.value)

    def set_config(**values):
        return lambda folder: change_settings(folder, **values)

    broken(lambda f: (f / "config.json").unlink(), "no config.json")
    broken(lambda f: (f / "config.json").write_text("{"), "damaged config.json")
    broken(set_config(model_type="bert"), "a bert model")
    broken(lambda f: (f / "model.safetensors").unlink(), "no model.safetensors")
    broken(lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "damaged")
    broken(set_config(num_lstm_layers=2), "8 tensors do not fit .* missing")

    def set_tensor(name, change):
        def write(folder):
            tensors = load_file(folder / "model.safetensors")
            tensors[name] = change(tensors[name])
            save_file(tensors, folder / "model.safetensors")

        return write

    bias, conv = "encoder.layers.0.conv.bias", "decoder.layers.0.conv.parametrizations.weight"
    broken(set_tensor(bias, lambda x: x * np.nan), f"safetensors: the tensor {bias} holds NaN")
    wide = set_tensor(bias, lambda x: x.astype(np.float64) + 1e200)
    broken(wide, f"the tensor {bias} holds 1e\\+200")
    broken(set_tensor(f"{conv}.original1", lambda x: x * (np.arange(len(x)) > 1)[:, None, None]),
           f"the tensor {conv}.original1 has a row of zeros")  # fmt: skip
    shutil.copytree(ASSETS / "codec", tmp_path / "codec", dirs_exist_ok=True)
    for name in ("ih", "hh"):  # each is finite, and their sum is not
        set_tensor(f"decoder.layers.1.lstm.bias_{name}_l0", lambda x: x * 0 + 3e38)(
            tmp_path / "codec"
        )
    with pytest.raises(UserError, match="the tensor decoder/lstm/bias holds infinity"):
        codec_module.load_decoder(str(tmp_path / "codec"))
    for source in ("no/such/folder", "/no/such", "nothing"):
        with pytest.raises(UserError, match="no such folder"):
            load_codec(source)
    (tmp_path / "weights.th").write_bytes(b"?")
    with pytest.raises(UserError, match="must be called"):
        load_codec(str(tmp_path / "weights.th"))
    torch = import_torch()
    torch.save({"a": torch.tensor([0.0, np.nan])}, tmp_path / "encodec_24khz.th")
    with pytest.raises(UserError, match="encodec_24khz.th: the tensor a holds NaN"):
        load_codec(str(tmp_path / "encodec_24khz.th"))
    (tmp_path / "encodec_24khz.th").write_bytes(b"?")
    with pytest.raises(UserError, match="not readable as weights"):
        load_codec(str(tmp_path / "encodec_24khz.th"))
    shutil.copy(encodec_files / "encodec_48khz-test.th", tmp_path / "encodec_24khz.th")
    with pytest.raises(UserError, match="not the weights of encodec_24khz"):
        load_codec(str(tmp_path / "encodec_24khz.th"))


def test_hash_follows_the_weights(embedded):
    state = {"b": np.arange(4.0), "a": np.zeros((2, 2))}
    first = codec_module._sha256(state, {})
    assert codec_module._sha256(dict(reversed(state.items())), {}) == first
    for other in (
        state | {"b": np.arange(4.0) + 1e-6},
        state | {"a": np.zeros(4)},
        {"b": state["b"], "c": state["a"]},
    ):
        assert codec_module._sha256(other, {}) != first
    # the two names that torch has had for the parts of a normalised weight
    older = codec_module._sha256({"x.weight_g": state["a"], "x.weight_v": state["b"]}, {})
    prefix = "x.parametrizations.weight.original"
    newer = {f"{prefix}0": state["a"], f"{prefix}1": state["b"]}
    assert codec_module._sha256(newer, {}) == older


def change_settings(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "change",
    [
        {"use_causal_conv": True},
        {"normalize": True},
        {"pad_mode": "constant"},
        {"dilation_growth_rate": 3},
    ],
)
def test_same_weights_computed_otherwise_are_another_codec(tmp_path, embedded, change):
    shutil.copytree(ASSETS / "codec", tmp_path / "codec")
    change_settings(tmp_path / "codec", **change)
    with pytest.raises(UserError, match="tokenize again with that codec"):
        check_same_codec(load_codec(str(tmp_path / "codec")).spec, embedded.spec, "data")


def test_a_setting_that_changes_no_code_changes_no_hash(tmp_path, embedded):
    shutil.copytree(ASSETS / "codec", tmp_path / "codec")
    change_settings(tmp_path / "codec", transformers_version="4.0.0", torch_dtype="float32")
    check_same_codec(load_codec(str(tmp_path / "codec")).spec, embedded.spec, "data")


def test_check_same_codec(embedded):
    spec = embedded.spec
    check_same_codec(dataclasses.replace(spec, source="/elsewhere"), spec, "data")
    with pytest.raises(UserError, match=r"^data: its tokens come from codec embedded"):
        check_same_codec(spec, dataclasses.replace(spec, sha256="0" * 64), "data")
    with pytest.raises(UserError, match="num_codebooks 4, but 8"):
        check_same_codec(spec, dataclasses.replace(spec, num_codebooks=8), "data")
