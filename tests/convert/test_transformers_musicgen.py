"""transformers' MusicGen folders: the same model here, or a line on why not."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from tiny import assert_same_bits

from launch import export, import_audiocraft
from magnet_jax import MusicGen
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import ASSETS
from magnet_jax.convert import lm_rules, t5_files, transformers_musicgen
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.io.torch_env import import_torch
from magnet_jax.model import t5, teacher_forcing


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random MusicGen of transformers, and the folder that it wrote."""
    torch = import_torch()
    import transformers

    codec = json.loads((ASSETS / "codec" / "config.json").read_text())
    unlike = ("architectures", "model_type", "transformers_version")
    codec = {name: value for name, value in codec.items() if name not in unlike}
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(
            d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=4096
        ),
        audio_encoder=transformers.EncodecConfig(**codec),
        decoder=transformers.MusicgenDecoderConfig(
            vocab_size=1024, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
            hidden_size=32, num_codebooks=4, pad_token_id=1024, bos_token_id=1024,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in [*model.decoder.parameters(), *model.enc_to_dec_proj.parameters()]:
            parameter.normal_(0, 0.2)  # biases and norms too
    folder = tmp_path_factory.mktemp("transformers") / "musicgen"
    model.save_pretrained(folder)
    t5_files.load("embedded")[2].save(str(folder / "tokenizer.json"))
    return model, folder


@pytest.fixture(scope="module")
def loaded(theirs):
    return pretrained.load(theirs[1])


@pytest.fixture
def folder(theirs, tmp_path):
    return shutil.copytree(theirs[1], tmp_path / "musicgen")


def test_logits_are_transformers(theirs, loaded):
    torch = import_torch()
    ids_BS = np.array([[5, 60, 7, 1]])
    steps_BKS = np.random.default_rng(0).integers(0, 1025, (1, 4, 9))
    with torch.no_grad():
        expected = theirs[0](
            input_ids=torch.from_numpy(ids_BS),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            decoder_input_ids=torch.from_numpy(steps_BKS[0]),
        ).logits.numpy()
    mask_BS = np.ones((1, 4), bool)
    states_BSE = t5.encode(loaded.t5_params, loaded.t5_config, ids_BS, mask_BS)
    found = teacher_forcing.step_logits(
        loaded.params["lm"], states_BSE, mask_BS, np.zeros(1, np.int32), steps_BKS,
        config=loaded.config.model,
    )  # fmt: skip
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_it_generates_with_its_own_codec_and_goes_on_as_audiocrafts(theirs, loaded, tmp_path):
    _, folder = theirs
    assert pretrained.read_settings(folder).model == loaded.config.model
    assert pretrained.read_defaults(folder) == (loaded.config.model, loaded.config.sampling)
    export.main(export.Args(checkpoint=folder, out=tmp_path / "out"))
    again = lm_rules.read_audiocraft(tmp_path / "out")
    assert again.model == loaded.config.model
    assert_same_bits(trees.flatten(again.params), trees.flatten(loaded.params["lm"]))
    sounds = []
    for source in (folder, tmp_path / "out"):
        model = MusicGen.get_pretrained(source)
        model.set_generation_params(duration=0.1)
        sounds.append(model.generate("a waltz", seed=1))
    assert model.loaded.codec.sha256 == loaded.codec.sha256
    np.testing.assert_array_equal(*sounds)
    with pytest.raises(UserError, match="needs no import"):
        args = import_audiocraft.Args(checkpoint=str(folder), out=tmp_path / "imported")
        import_audiocraft.main(args)


def test_weights_in_parts_and_of_torch(folder, loaded):
    torch = import_torch()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, parts = sorted(tensors), {}
    for number in (0, 1):
        parts |= dict.fromkeys(names[number::2], f"pytorch_model-{number}.bin")
        part = {name: torch.from_numpy(tensors[name].copy()) for name in names[number::2]}
        torch.save(part, folder / f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    found = pretrained.load(folder)
    assert_same_bits(trees.flatten(found.params), trees.flatten(loaded.params))
    assert found.codec.sha256 == loaded.codec.sha256


def test_texts_as_wide_as_the_model_need_no_projection(folder, loaded):
    model = dataclasses.replace(loaded.config.model, text_width=loaded.config.model.width)
    change_tensors(folder, lambda name: not name.startswith("enc_to_dec_proj"))
    params = transformers_musicgen.read_params(folder, model)
    np.testing.assert_array_equal(params["text_proj"]["kernel"], np.eye(model.width))
    assert not params["text_proj"]["bias"].any()


def change_tensors(folder, kept):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({n: a for n, a in tensors.items() if kept(n)}, path)


def change_config(folder, part=None, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: change_config(f, model_type="musicgen_melody"), "a musicgen_melody model"),
        (lambda f: change_config(f, model_type="encodec"), "a codec, for --codec"),
        (lambda f: change_config(f, model_type="t5"), "a text encoder, for --text-encoder"),
        (lambda f: change_config(f, "decoder", audio_channels=2), "decoder.audio_channels must"),
        (lambda f: change_config(f, "decoder", activation_function="relu"), "activation_function"),
        (lambda f: change_config(f, "decoder", hidden_size="x"), "decoder.hidden_size must be"),
        (lambda f: change_config(f, "decoder", ffn_dim=65), "decoder.ffn_dim must be a multiple"),
        (lambda f: change_config(f, "decoder", num_hidden_layers=3), "layers.2.* is missing"),
        (lambda f: change_config(f, "decoder", vocab_size=512), "of 1024, and the model reads 512"),
        (lambda f: change_config(f, decoder=None), "decoder.hidden_size must be"),
        (lambda f: change_config(f, "audio_encoder", model_type="dac"), "a dac model"),
        (lambda f: change_config(f, "text_encoder", model_type="bert"), "'bert', not 't5'"),
        (
            lambda f: change_tensors(f, lambda name: "fc1" not in name),
            r"fc1.weight \[64, 32\] is m",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").write_text("["), "config.json: not valid JSON"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, change, complaint):
    change(folder)
    with pytest.raises(UserError, match=complaint) as error:
        pretrained.load(folder)
    assert "\n" not in str(error.value)
