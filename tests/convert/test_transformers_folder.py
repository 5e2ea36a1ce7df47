"""Folders of weights as transformers writes them; and files that are something else."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from constants import GOLDEN
from tiny import assert_same_bits

from magnet_jax.checkpoints import bundle, pretrained
from magnet_jax.codec.encodec import load_codec, read_spec
from magnet_jax.config import ASSETS
from magnet_jax.convert import lm_rules, t5_files, transformers_folder
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.io.torch_env import import_torch


def in_torch(tensors):
    return {name: import_torch().from_numpy(array.copy()) for name, array in tensors.items()}


def save(path, tensors):
    if path.suffix == ".bin":
        import_torch().save(in_torch(tensors), path)
    else:
        safetensors.numpy.save_file(tensors, path)


def one_file(folder, tensors, suffix):
    save(folder / f"{STEMS[suffix]}{suffix}", tensors)


def two_files(folder, tensors, suffix):
    names, weight_map = sorted(tensors), {}
    for number in (1, 2):
        part = f"{STEMS[suffix]}-{number:05d}-of-00002{suffix}"
        held = {name: tensors[name] for name in names[number - 1 :: 2]}
        save(folder / part, held)
        weight_map |= dict.fromkeys(held, part)
    index = folder / f"{STEMS[suffix]}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
LAYOUTS = [(put, suffix) for put in (one_file, two_files) for suffix in STEMS]


@pytest.mark.parametrize(("put", "suffix"), LAYOUTS)
@pytest.mark.parametrize("kind", ["codec", "text"])
def test_weights_in_every_layout(tmp_path, kind, put, suffix):
    folder = shutil.copytree(ASSETS / kind, tmp_path / kind)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    put(folder, tensors, suffix)
    if kind == "codec":
        assert read_spec(str(folder)).sha256 == read_spec("embedded").sha256
    else:
        found, expected = (trees.flatten(t5_files.load(s)[1]) for s in (str(folder), "embedded"))
        assert_same_bits(found, expected)


def test_of_several_weights_the_first_kind_is_read(tmp_path):
    one_file(tmp_path, {"a": np.zeros(1, np.float32)}, ".safetensors")
    one_file(tmp_path, {"a": np.ones(1, np.float32)}, ".bin")
    tensors, origin = transformers_folder.read_tensors(tmp_path)
    assert tensors["a"] == 0 and origin.name == "model.safetensors"
    origin.unlink()
    assert transformers_folder.read_tensors(tmp_path)[0]["a"] == 1
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.ckpt")
    (tmp_path / "tf_model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="holds tf_model.onnx, weights.ckpt, which are not read"):
        transformers_folder.read_tensors(tmp_path)


def test_parts_that_are_missing_or_elsewhere(tmp_path):
    two_files(tmp_path, {name: np.zeros(1, np.float32) for name in "ab"}, ".bin")
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="00002-of-00002.bin: no such file, but .*index.json names"):
        transformers_folder.read_tensors(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    for text, complaint in (
        ('{"weight_map": {"a": "../x.bin"}}', "'../x.bin' is not the plain name"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ("", "not valid JSON"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=complaint):
            transformers_folder.read_tensors(tmp_path)


# --- files that are no weights ------------------------------------------------------------------


def audiocraft_lm(folder):
    return folder / "state_dict.bin", lambda: lm_rules.read_audiocraft(folder)


def audiocraft_codec(folder):
    path = folder / "compression_state_dict.bin"
    return path, lambda: load_codec(str(path))


def codec_folder(folder):
    shutil.copy(ASSETS / "codec" / "config.json", folder)
    return folder / "model.safetensors", lambda: load_codec(str(folder))


def torch_codec_folder(folder):
    shutil.copy(ASSETS / "codec" / "config.json", folder)
    return folder / "pytorch_model.bin", lambda: load_codec(str(folder))


def encodec_file(folder):
    path = folder / "encodec_24khz.th"
    return path, lambda: load_codec(str(path))


def text_encoder(folder):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(ASSETS / "text" / name, folder)
    return folder / "model.safetensors", lambda: t5_files.load(str(folder))


def torch_text_encoder(folder):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(ASSETS / "text" / name, folder)
    return folder / "pytorch_model.bin", lambda: t5_files.load(str(folder))


def exported(folder):
    for name in ("config.json", "generation_config.json"):
        shutil.copy(ASSETS / "demo" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("text", "codec"):  # what the model has along is not looked at here
        config[name]["source"] = "embedded"
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors", lambda: bundle.read_safetensors(folder)


READERS = [
    audiocraft_lm, audiocraft_codec, codec_folder, torch_codec_folder, encodec_file, text_encoder,
    torch_text_encoder, exported,
]  # fmt: skip
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 841000000\n"
SAFE = safetensors.numpy.save({"a": np.zeros(99, np.float32)})
TORCH = (GOLDEN / "magnet_tiny" / "state_dict.bin").read_bytes()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (GIT_LFS, "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
        (b'{"error": "not found"}', "a text, not weights"),
        (TORCH[:5000], "cut off|torch.save"),
        (SAFE[:200], "cut off|safetensors file"),
        (SAFE[:20], "cut off|safetensors file"),
        (b"\xff" * 8 + b"{" + b" " * 99, "cut off|safetensors file"),
        (bytes(range(256)), "damaged|not readable"),
        (
            b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85q\x02Rq\x03.",
            "refused|damaged",
        ),
    ],
)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_files_that_are_no_weights_are_called_what_they_are(tmp_path, reader, content, cause):
    path, read = reader(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=cause) as error:
        read()
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_whole_weights_under_the_wrong_name(tmp_path):
    for reader, content, cause in (
        (codec_folder, TORCH, r"must end in .bin, not .safetensors"),
        (torch_text_encoder, SAFE, r"must end in .safetensors"),
    ):
        folder = tmp_path / reader.__name__
        folder.mkdir()
        path, read = reader(folder)
        path.write_bytes(content)
        with pytest.raises(UserError, match=cause):
            read()


def test_what_torch_would_run_code_for_is_named(tmp_path):
    omegaconf = b"\x80\x02comegaconf.dictconfig\nDictConfig\nq\x00)\x81q\x01."
    (tmp_path / "state_dict.bin").write_bytes(omegaconf)
    with pytest.raises(UserError, match="omegaconf.dictconfig.DictConfig.*export_lm"):
        lm_rules.read_audiocraft(tmp_path)


def test_folders_and_files_without_a_model(tmp_path):
    (tmp_path / "checkpoint.th").write_bytes(TORCH)
    with pytest.raises(UserError, match="no AudioCraft checkpoint.*it holds checkpoint.th"):
        pretrained.load(tmp_path)
    with pytest.raises(UserError, match="checkpoint.th: is a file; name the folder"):
        pretrained.load(tmp_path / "checkpoint.th")
