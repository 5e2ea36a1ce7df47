"""Importing AudioCraft checkpoints and the Python API on top, as a user meets them."""

import dataclasses
import fnmatch
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tiny
import yaml
from constants import GOLDEN
from tiny import assert_same_bits

import magnet_jax
from launch import export as export_command
from launch import import_audiocraft, sample
from launch import train as launch_train
from magnet_jax import MAGNeT, MusicGen, api
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import LongConfig, LoraConfig
from magnet_jax.convert import audiocraft, lm_rules, t5_files
from magnet_jax.decode import long
from magnet_jax.errors import UserError
from magnet_jax.io import files, trees
from magnet_jax.io.torch_env import import_torch
from magnet_jax.model import lora, t5
from magnet_jax.train import loop, watch

XP_NAME = "conditioners.description.t5.name"


def save_text_encoder(folder, width):
    """A random T5 of some width, with the shipped tokenizer."""
    config, _, tokenizer = t5_files.load("embedded")
    config = dataclasses.replace(config, d_model=width, d_ff=16, num_layers=1)
    t5_files.save(folder, config, t5.init(config, jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders as AudioCraft publishes them: the golden models with the golden codec beside them."""
    root = tmp_path_factory.mktemp("audiocraft")
    for name in ("magnet", "musicgen"):
        folder = root / name
        folder.mkdir()
        shutil.copy(GOLDEN / f"{name}_tiny" / "state_dict.bin", folder)
        shutil.copy(GOLDEN / "encodec_tiny" / "compression_state_dict.bin", folder)
        (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    width = lm_rules.read_audiocraft(root / "magnet").model.text_width
    save_text_encoder(root / "t5", width)
    return root


@pytest.fixture(scope="module")
def imported(sources, tmp_path_factory):
    """The same, imported by the command."""
    out = tmp_path_factory.mktemp("imported")
    for name in ("magnet", "musicgen"):
        run_import(sources, name, out / name, verify=True)
    return out


def run_import(sources, name, out, **options):
    options = {"text_encoder": str(sources / "t5")} | options
    args = import_audiocraft.Args(checkpoint=str(sources / name), out=out, **options)
    import_audiocraft.main(args)


def assert_same_sound(found, expected):
    """Equal up to rounding, which the number of clips in a batch may change."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# --- import -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnet", "musicgen"])
def test_import_then_export_gives_the_same_files(sources, imported, name, tmp_path):
    export_command.main(
        export_command.Args(checkpoint=imported / name, out=tmp_path / "out", verify=True)
    )
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        before = audiocraft.read_file(sources / name / file)
        after = audiocraft.read_file(tmp_path / "out" / file)
        assert_same_bits(after.tensors, before.tensors)
        assert after.xp_cfg == before.xp_cfg
        assert after.dtype == before.dtype


def test_an_import_is_whole_and_says_where_it_comes_from(sources, imported):
    folder = imported / "magnet"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "codec",
        "text_encoder",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "imported_from: magnet" in card
    text = "".join(path.read_text() for path in folder.glob("*.json")) + card
    assert str(sources) not in text
    loaded = pretrained.load(folder)
    xp_cfg = yaml.safe_load(loaded.origin.lm_xp_cfg)
    assert loaded.config.data.segment_seconds == xp_cfg["dataset"]["segment_duration"]
    assert (
        loaded.codec.sha256
        == load_codec(str(sources / "magnet" / audiocraft.CODEC_FILE)).spec.sha256
    )


def test_the_license_goes_on_with_the_model(imported, tmp_path):
    export_command.main(
        export_command.Args(checkpoint=imported / "magnet", out=tmp_path / "out", audiocraft=False)
    )
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: cc-by-nc-4.0\n")


def rewrite(folder, change, file="state_dict.bin"):
    """Applies `change` to a checkpoint's content as torch has it."""
    torch = import_torch()
    content = torch.load(folder / file, weights_only=True)
    xp_cfg = yaml.safe_load(content["xp.cfg"]) if "xp.cfg" in content else {}
    change(content, xp_cfg)
    if "xp.cfg" in content:
        content["xp.cfg"] = yaml.safe_dump(xp_cfg)
    torch.save(content, folder / file)


@pytest.fixture
def copied(sources, tmp_path):
    shutil.copytree(sources, tmp_path / "in")
    return tmp_path / "in"


def test_float16_checkpoints_come_and_go_as_float16(copied, tmp_path):
    def halve(content, _):
        state = content["best_state"]
        content["best_state"] = {name: tensor.half() for name, tensor in state.items()}

    rewrite(copied / "magnet", halve)
    run_import(copied, "magnet", tmp_path / "bundle")
    export_command.main(export_command.Args(checkpoint=tmp_path / "bundle", out=tmp_path / "out"))
    before = audiocraft.read_file(copied / "magnet" / "state_dict.bin")
    after = audiocraft.read_file(tmp_path / "out" / "state_dict.bin")
    assert before.dtype == after.dtype == "float16"
    assert_same_bits(after.tensors, before.tensors)
    stored = (tmp_path / "bundle" / "model.safetensors").stat().st_size
    assert stored < 1.1 * sum(array.nbytes for array in before.tensors.values())


def test_float64_is_rounded_and_said(copied, tmp_path, capsys):
    """At import, in its model card, and whenever the import is exported."""

    def widen(content, _):
        state = {name: tensor.double() for name, tensor in content["best_state"].items()}
        for name in ("out_norm.weight", "linears.0.weight"):
            state[name][0] += 1e-12
        content["best_state"] = state

    rewrite(copied / "magnet", widen)
    run_import(copied, "magnet", tmp_path / "bundle", verify=True)
    said = capsys.readouterr().out
    names = "out_norm.weight, linears.0.weight"
    assert f"state_dict.bin: 2 float64 tensors rounded to float32: {names}" in said
    assert "every bit equal, but for what was rounded from float64 to float32 before" in said
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "- rounded: from float64 to float32" in card
    export_command.main(export_command.Args(checkpoint=tmp_path / "bundle", out=tmp_path / "out"))
    assert "but for what was rounded from float64 to float32" in capsys.readouterr().out
    after = audiocraft.read_file(tmp_path / "out" / "state_dict.bin").tensors
    with files.noting_rounded():
        before = audiocraft.read_file(copied / "magnet" / "state_dict.bin").tensors
    assert_same_bits(after, before)


def test_float64_that_loses_nothing_is_as_good_as_float32(copied, tmp_path, capsys):
    def widen(content, _):
        state = content["best_state"]
        content["best_state"] = {name: tensor.double() for name, tensor in state.items()}

    rewrite(copied / "magnet", widen)
    run_import(copied, "magnet", tmp_path / "bundle")
    said = capsys.readouterr().out
    assert "every bit equal\n" in said and "rounded" not in said


def test_a_poisoned_model_is_not_sampled_from(copied, tmp_path):
    """The codec's tensor is named as the model's is; and nothing is written."""
    rewrite(copied / "musicgen", poisoned)

    def infinite_bias(content, _):
        content["best_state"]["decoder.model.0.conv.conv.bias"][0] = float("inf")

    rewrite(copied / "magnet", infinite_bias, audiocraft.CODEC_FILE)
    text = str(copied / "t5")
    for name, found in (
        ("musicgen", "state_dict.bin: the tensor out_norm.weight holds NaN"),
        ("magnet", "compression_state_dict.bin: the tensor decoder.model.0.* holds infinity"),
    ):
        with pytest.raises(UserError, match=found):
            sample.sample(
                sample.Args(
                    checkpoint=copied / name, out=tmp_path / "wavs", unconditional=1,
                    text_encoder=text,
                )
            )  # fmt: skip
    with pytest.raises(UserError, match="out_norm.weight holds NaN"):
        MusicGen.get_pretrained(copied / "musicgen", text_encoder=text)
    with pytest.raises(UserError, match="the tensor decoder.model.0.* holds infinity"):
        shutil.copytree(copied / "magnet", tmp_path / "codec")
        (tmp_path / "codec" / "state_dict.bin").unlink()
        import_audiocraft.main(
            import_audiocraft.Args(checkpoint=str(tmp_path / "codec"), out=tmp_path / "out")
        )
    assert sorted(found.name for found in tmp_path.iterdir()) == ["codec", "in"]


def test_a_model_whose_numbers_overflow_gives_no_clip(model):
    """Its weights are finite, and its logits are not; or its audio is not."""
    loaded = model.loaded
    norm = loaded.params["lm"]["norm_final"]
    lm = loaded.params["lm"] | {"norm_final": norm | {"scale": norm["scale"] * 3e38}}
    huge = type(model)(loaded._replace(params=loaded.params | {"lm": lm}), model.decoder)
    for greedy in (True, False):
        huge.set_generation_params(use_sampling=not greedy, duration=0.4)
        with pytest.raises(UserError, match="the model computes NaN.*no clip was made"):
            huge.generate(["drums", ""])
    quiet = model.generate_audio(np.zeros((1, loaded.codec.num_codebooks, 3), int))
    assert np.isfinite(quiet).all()
    params, most = model.decoder.params, np.finfo(np.float32).max
    loudest = jax.tree.map(
        lambda x: np.full_like(x, most), {n: params[n] for n in ("last", "first")}
    )
    decoder = model.decoder._replace(params=params | loudest)
    loud = type(model)(loaded, decoder)
    with pytest.raises(UserError, match="the codec computes NaN or infinity"):
        loud.generate_audio(np.zeros((1, loaded.codec.num_codebooks, 3), int))
    loud.set_generation_params(duration=0.4)
    with pytest.raises(UserError, match="the codec computes NaN or infinity"):
        loud.generate("drums")


def test_a_codec_that_is_named_is_asked_for_and_named_again(copied, tmp_path, capsys):
    audiocraft.write_pointer(copied / "magnet" / audiocraft.CODEC_FILE, "someone/encodec")
    with pytest.raises(UserError, match="points to the codec someone/encodec.*--codec"):
        run_import(copied, "magnet", tmp_path / "bundle")
    codec = GOLDEN / "encodec_tiny" / audiocraft.CODEC_FILE
    run_import(copied, "magnet", tmp_path / "bundle", codec=str(codec))
    export_command.main(export_command.Args(checkpoint=tmp_path / "bundle", out=tmp_path / "out"))
    again = audiocraft.read_file(tmp_path / "out" / audiocraft.CODEC_FILE)
    assert again.pretrained == "someone/encodec"
    assert (tmp_path / "out" / "codec" / "model.safetensors").exists()


def test_a_text_encoder_that_is_named_is_asked_for(sources, tmp_path):
    with pytest.raises(UserError, match="needs the text encoder .*--text-encoder") as error:
        run_import(sources, "magnet", tmp_path / "bundle", text_encoder=None)
    assert "\n" not in str(error.value)
    save_text_encoder(tmp_path / "t5", 8)
    with pytest.raises(UserError, match="8 wide"):
        run_import(sources, "magnet", tmp_path / "bundle", text_encoder=str(tmp_path / "t5"))


def without_tensor(content, _):
    del content["best_state"]["out_norm.weight"]


def misshapen(content, _):
    content["best_state"]["out_norm.weight"] = content["best_state"]["out_norm.weight"][:-1]


def poisoned(content, _):
    content["best_state"]["out_norm.weight"][1] = float("nan")


def infinite_half(content, _):
    state = {name: tensor.half() for name, tensor in content["best_state"].items()}
    state["linears.1.weight"][0, 0] = float("-inf")
    content["best_state"] = state


def too_large(content, _):
    state = {name: tensor.double() for name, tensor in content["best_state"].items()}
    state["emb.0.weight"][2, 3] = 1e300
    content["best_state"] = state


def melody(_, xp_cfg):
    xp_cfg["conditioners"]["self_wav"] = {"model": "chroma_stem"}
    xp_cfg["fuser"]["prepend"] = ["self_wav", "description"]


def no_length(_, xp_cfg):
    del xp_cfg["dataset"]


def other_class(_, xp_cfg):
    xp_cfg["lm_model"] = "transformer_flow"


def normalized(_, xp_cfg):
    xp_cfg["conditioners"]["description"]["t5"]["normalize_text"] = True


def stereo(_, xp_cfg):
    xp_cfg["interleave_stereo_codebooks"] = {"use": True}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_tensor, "out_norm.weight .* is missing"),
        (misshapen, "out_norm.weight is "),
        (poisoned, "state_dict.bin: the tensor out_norm.weight holds NaN"),
        (infinite_half, "state_dict.bin: the tensor linears.1.weight holds infinity"),
        (too_large, r"state_dict.bin: the tensor emb.0.weight holds 1e\+300"),
        (melody, "fuser.prepend must be .*conditioners other than text: self_wav"),
        (no_length, "segment_duration must be a length"),
        (other_class, "lm_model must be .* not transformer_flow"),
        (stereo, "interleave_stereo_codebooks"),
        (normalized, "normalize_text must be False"),
    ],
)
@pytest.mark.parametrize("name", ["magnet", "musicgen"])
def test_broken_checkpoints_are_one_line_and_nothing_is_written(
    copied, tmp_path, name, change, complaint
):
    rewrite(copied / name, change)
    with pytest.raises(UserError, match=complaint) as error:
        run_import(copied, name, tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_sources_that_are_no_checkpoint(sources, imported, tmp_path):
    for source, complaint in (
        (tmp_path, "no AudioCraft checkpoint"),
        (tmp_path / "gone", "no such folder"),
        (imported / "magnet", "needs no import"),
        ("someone/magnet", "model 'someone/magnet'.*offline"),
    ):
        with pytest.raises(UserError, match=complaint):
            import_audiocraft.main(
                import_audiocraft.Args(checkpoint=str(source), out=tmp_path / "bundle")
            )
    assert not (tmp_path / "bundle").exists()


def test_a_codec_that_is_given_need_not_lie_beside_the_model(copied, tmp_path):
    name = "compression_state_dict.bin"
    (tmp_path / "codec").mkdir()
    codec = (copied / "magnet" / name).rename(tmp_path / "codec" / name)
    with pytest.raises(UserError, match=f"{name}: no such file; .* as --codec"):
        run_import(copied, "magnet", tmp_path / "bundle")
    run_import(copied, "magnet", tmp_path / "bundle", codec=str(codec))
    assert (tmp_path / "bundle" / "config.json").exists()


def test_a_codec_by_itself(sources, tmp_path, capsys):
    shutil.copytree(GOLDEN / "encodec_tiny", tmp_path / "in")
    args = import_audiocraft.Args(checkpoint=str(tmp_path / "in"), out=tmp_path / "out")
    import_audiocraft.main(args)
    codec = load_codec(str(tmp_path / "out"))
    reference = np.load(GOLDEN / "encodec_tiny" / "codec.npz")
    np.testing.assert_array_equal(codec.encode(reference["wav"]), reference["codes"])
    with pytest.raises(UserError, match="exists; add --overwrite"):
        import_audiocraft.main(args)
    for option, value in (
        ("text_encoder", "t5"), ("codec", "other"), ("license", "mit"), ("verify", True),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is of a whole model"):
            import_audiocraft.main(dataclasses.replace(args, **{option: value}))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    import_audiocraft.main(dataclasses.replace(args, overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files as well .thesis.txt."):
        import_audiocraft.main(dataclasses.replace(args, overwrite=True))
    with pytest.raises(UserError, match="exists and is not a codec"):
        import_audiocraft.main(dataclasses.replace(args, out=tmp_path / "in", overwrite=True))
    audiocraft.write_pointer(tmp_path / "in" / audiocraft.CODEC_FILE, "someone/encodec")
    with pytest.raises(UserError, match="points to someone/encodec"):
        import_audiocraft.main(dataclasses.replace(args, out=tmp_path / "new"))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("kind", ["audiocraft", "export"])
def test_models_from_the_hub(sources, imported, tmp_path, monkeypatch, kind):
    """A stand-in for the hub, which gives what is asked for and nothing else."""
    repository = (sources if kind == "audiocraft" else imported) / "magnet"
    if kind == "audiocraft":  # such repositories may hold a config for other libraries, too
        repository = shutil.copytree(repository, tmp_path / "repository")
        (repository / "config.json").write_text('{"model_type": "musicgen"}')
        (repository / "model.safetensors").write_text("gigabytes for others")

    def download(name, allow_patterns):
        assert name == "someone/magnet"
        for path in repository.rglob("*"):
            local = path.relative_to(repository)
            if path.is_file() and any(fnmatch.fnmatch(str(local), p) for p in allow_patterns):
                (tmp_path / "cache" / local).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "cache" / local)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"text_encoder": str(sources / "t5")} if kind == "audiocraft" else {}
    model = fast(MAGNeT.get_pretrained("someone/magnet", **options))
    assert model.generate("a waltz").shape[0] == 1
    assert (tmp_path / "cache" / "model.safetensors").exists() == (kind == "export")
    if kind == "audiocraft":
        args = import_audiocraft.Args(checkpoint="someone/magnet", out=tmp_path / "out", **options)
        import_audiocraft.main(args)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "imported_from: someone/magnet" in card and "license: cc-by-nc-4.0" in card


def test_a_codec_of_another_size_is_refused(copied, tmp_path):
    codec = load_codec("embedded").spec
    if codec.codebook_size == lm_rules.read_audiocraft(copied / "magnet").model.codebook_size:
        pytest.skip("these happen to be of one size")
    with pytest.raises(UserError, match="codebooks of"):
        run_import(copied, "magnet", tmp_path / "bundle", codec="embedded")


# --- the Python API -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def magnet(imported):
    return MAGNeT.get_pretrained(imported / "magnet")


@pytest.fixture(scope="module")
def musicgen(imported):
    return MusicGen.get_pretrained(imported / "musicgen")


def fast(model):
    """As few steps as can be, and every seed another clip."""
    if isinstance(model, MAGNeT):
        num_codebooks = model.loaded.config.model.num_codebooks
        steps = [2] + [1] * (num_codebooks - 1)
        model.set_generation_params(decoding_steps=steps, duration=0.5, temperature=20.0)
    else:
        model.set_generation_params(duration=0.5, temperature=20.0)
    return model


@pytest.fixture(params=["magnet", "musicgen"])
def model(request):
    return fast(request.getfixturevalue(request.param))


def test_properties(magnet, sources):
    xp_cfg = audiocraft.read_file(sources / "magnet" / "state_dict.bin").xp_cfg
    assert magnet.sample_rate == xp_cfg["sample_rate"]
    assert magnet.audio_channels == xp_cfg["channels"]
    assert magnet.max_duration == xp_cfg["dataset"]["segment_duration"]
    assert (
        magnet.frame_rate
        == load_codec(str(sources / "magnet" / audiocraft.CODEC_FILE)).spec.frame_rate
    )


def test_generate(model):
    wav, tokens = model.generate(["a waltz", "a march"], return_tokens=True, seed=3)
    frames = round(0.5 * model.frame_rate)
    hop = model.sample_rate // round(model.frame_rate)
    assert wav.dtype == np.float32
    assert wav.shape == (2, model.audio_channels, frames * hop)
    assert tokens.shape == (2, model.loaded.config.model.num_codebooks, frames)
    assert (tokens >= 0).all() and (tokens < model.loaded.config.model.codebook_size).all()
    assert_same_sound(model.generate("a waltz", seed=3)[0], wav[0])
    assert (model.generate("a waltz", seed=4)[0] != wav[0]).any()
    assert_same_sound(model.generate_audio(tokens), wav)


def test_no_text(model):
    wav = model.generate_unconditional(2, seed=1)
    assert_same_sound(wav, model.generate([None, ""], seed=1))
    assert model.generate(None).shape[0] == 1
    with pytest.raises(UserError, match="num_samples"):
        model.generate_unconditional(0)


def test_continuation(model):
    first = model.generate("a waltz", seed=1)
    half = first[..., : first.shape[-1] // 2]
    wav, tokens = model.generate_continuation(
        half, model.sample_rate, "a waltz", return_tokens=True, seed=2
    )
    prompt = model.encoder.encode(half)
    assert wav.shape == first.shape
    np.testing.assert_array_equal(tokens[..., : prompt.shape[-1]], prompt)
    # Stereo of another rate, without text and without a batch.
    stereo = np.repeat(half[0], 2, axis=0)[:, ::2]
    assert model.generate_continuation(stereo, model.sample_rate / 2).shape == first.shape


@pytest.mark.parametrize(
    ("prompt", "texts", "complaint"),
    [
        (np.zeros((1, 1, 10**6), np.float32), "x", "leaves nothing to generate"),
        (np.zeros((2, 1, 100), np.float32), "x", "2 prompts need as many descriptions"),
        (np.zeros(100, np.float32), "x", "must be floating-point audio"),
        (np.zeros((1, 100), np.int16), "x", "must be floating-point audio"),
        (np.full((1, 100), np.nan, np.float32), "x", "NaN"),
        (np.full((1, 100), -np.inf, np.float16), "x", "infinite"),
        (np.full((1, 100), 1e300), "x", "infinite"),
    ],
)
def test_bad_prompts(model, prompt, texts, complaint):
    with pytest.raises(UserError, match=complaint):
        model.generate_continuation(prompt, model.sample_rate, texts)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**40}, "seed must lie"),
        ({"seed": 1.5}, "seed must lie"),
        ({"text_pad_len": "longest"}, "text_pad_len must be"),
    ],
)
def test_bad_options(model, options, complaint):
    with pytest.raises(UserError, match=complaint):
        model.generate("a waltz", **options)


def test_odd_values_that_are_good(model):
    torch = import_torch()
    first, tokens = model.generate(
        np.array(["a waltz"]), return_tokens=np.True_, seed=np.int64(3), text_pad_len=np.int8(0)
    )
    assert_same_sound(model.generate(("a waltz",), seed=torch.tensor(3)), first)
    for kind in (torch.tensor, jnp.asarray, np.ndarray.tolist, np.uint16):
        assert_same_sound(model.generate_audio(kind(tokens)), first)
    half = first[..., : first.shape[-1] // 2]
    strided = torch.from_numpy(np.repeat(half, 2, axis=-1))[..., ::2]
    expected = model.generate_continuation(half, model.sample_rate, seed=2)
    for prompt in (
        torch.tensor(half), torch.tensor(half).double(), strided, jnp.asarray(half),
        half.tolist(), half[0],
    ):  # fmt: skip
        found = model.generate_continuation(prompt, np.int32(model.sample_rate), [""], seed=2)
        assert_same_sound(found, expected)


def test_a_span_longer_than_the_clip(magnet):
    magnet.set_generation_params(span_len=26, duration=0.5)
    with pytest.raises(UserError, match="span_len.* 26 is longer than the clip, .* 25 frames"):
        magnet.generate("a waltz")


@pytest.mark.parametrize("descriptions", [[], [1], ["x", 2.0]])
def test_bad_descriptions(model, descriptions):
    with pytest.raises(UserError, match="descriptions"):
        model.generate(descriptions)


def test_progress(model, capfd):
    seen = []
    model.set_custom_progress_callback(lambda done, total: seen.append((done, total)))
    quiet = model.generate("a waltz", seed=1)
    assert not seen
    assert_same_sound(model.generate("a waltz", progress=True, seed=1), quiet)
    assert sorted(seen) == [(i, seen[0][1]) for i in range(1, seen[0][1] + 1)]
    model.set_custom_progress_callback(None)
    model.generate("a waltz", progress=True, seed=1)
    assert f"{seen[0][1]}/{seen[0][1]}" in capfd.readouterr().err


def test_the_batchs_padding_can_be_attended_to_as_in_audiocraft(model):
    texts = ["a waltz", "a march of many, many, many more words"]
    alone, padded = (model.generate(texts, seed=1, text_pad_len=pad) for pad in (None, "batch"))
    assert (alone[0] != padded[0]).any()
    assert_same_sound(alone[1], padded[1])
    longer = 40
    assert_same_sound(
        model.generate(texts[0], seed=1, text_pad_len=longer),
        model.generate(texts, seed=1, text_pad_len=longer)[:1],
    )


def test_defaults_follow_the_checkpoint(copied):
    """Kind and length of the checkpoint decide; a second call forgets the first's settings."""

    def make(solver, seconds):
        def change(_, xp_cfg):
            xp_cfg["solver"], xp_cfg["dataset"]["segment_duration"] = solver, seconds

        rewrite(copied / "magnet", change)
        return MAGNeT.get_pretrained(copied / "magnet", text_encoder=str(copied / "t5"))

    music = make("magnet", 10)
    expected = (3.0, 0.9, 10.0, 1.0)

    def numbers(model):
        g = model.generation
        return g.temperature, g.top_p, g.max_guidance, g.min_guidance

    assert numbers(music) == expected
    assert music.generation.steps[:2] == (20, 10)
    music.set_generation_params(temperature=1.0, top_k=7)
    assert (music.generation.temperature, music.generation.top_k) == (1.0, 7)
    music.set_generation_params(top_k=7, top_p=0.5)  # in AudioCraft the nucleus goes first
    assert (music.generation.top_p, music.generation.top_k) == (0.5, 0)
    music.set_generation_params(top_k=7, top_p=0.0)
    assert (music.generation.top_p, music.generation.top_k) == (1.0, 7)
    music.set_generation_params()
    assert numbers(music) == expected and music.generation.top_k == 0
    assert make("magnet", 30).generation.steps[:2] == (60, 10)
    sound = make("audio_magnet", 10)
    assert numbers(sound) == (3.5, 0.8, 20.0, 1.0)


def test_a_long_text_is_cut_with_a_warning(model):
    with pytest.warns(UserWarning, match="cut to the 128 tokens"):
        model.generate("waltz " * 200)


def test_temperature_0_is_greedy(model):
    model.set_generation_params(temperature=0)
    assert model.generation.greedy


def test_musicgens_defaults(musicgen):
    musicgen.set_generation_params()
    g = musicgen.generation
    assert (g.temperature, g.top_k, g.guidance, g.greedy) == (1.0, 250, 3.0, False)
    musicgen.set_generation_params(top_p=0.9)
    assert (musicgen.generation.top_k, musicgen.generation.top_p) == (0, 0.9)


def test_settings_that_do_not_fit(magnet, musicgen, imported):
    for call, complaint in (
        (lambda: magnet.set_generation_params(decoding_steps=[1]), "one number a codebook"),
        (lambda: magnet.set_generation_params(top_p=1.5), "top_p"),
        (lambda: magnet.set_generation_params(temperature=-1.0), "temperature"),
        (lambda: magnet.set_generation_params(span_arrangement="stride2"), "stride2"),
        (lambda: magnet.set_generation_params(duration=-1), "duration"),
        (lambda: musicgen.set_generation_params(extend_stride=999), "extend_stride"),
        (lambda: MAGNeT.get_pretrained(imported / "magnet", weights="best"), "weights must be"),
        (lambda: MAGNeT.get_pretrained(imported / "musicgen"), "MusicGen.get_pretrained"),
        (lambda: MusicGen.get_pretrained(imported / "magnet"), "MAGNeT.get_pretrained"),
    ):
        with pytest.raises(UserError, match=complaint):
            call()


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_lengths(magnet, arrangement):
    """As long as asked for, whatever the span; trimmed to whole spans where that is asked for."""
    steps = [2] + [1] * (magnet.loaded.config.model.num_codebooks - 1)
    span = magnet.loaded.config.model.span_length
    frames = 4 * span + 1
    for whole, expected in ((False, frames), (True, 4 * span)):
        magnet.set_generation_params(
            decoding_steps=steps, span_arrangement=arrangement, whole_spans=whole,
            duration=frames / magnet.frame_rate,
        )  # fmt: skip
        _, tokens = magnet.generate("a waltz", return_tokens=True)
        # Spans of any neighbouring frames have no grid to trim to.
        assert tokens.shape[-1] == (frames if arrangement == "stride1" else expected)


def test_spans_of_another_length(magnet):
    fast(magnet)
    tokens = {}
    for span_len in (None, 1, 5):
        generation = magnet.generation
        magnet.set_generation_params(
            decoding_steps=generation.steps, duration=0.5, whole_spans=True, span_len=span_len
        )
        _, tokens[span_len] = magnet.generate("a waltz", return_tokens=True)
    frames = round(0.5 * magnet.frame_rate)
    own = magnet.loaded.config.model.span_length
    assert [t.shape[-1] for t in tokens.values()] == [frames // s * s for s in (own, 1, 5)]


def test_longer_than_the_window(musicgen):
    seconds = musicgen.max_duration
    musicgen.set_generation_params(
        duration=1.4 * seconds, extend_stride=0.5 * seconds, use_sampling=False
    )
    _, tokens = musicgen.generate("a waltz", return_tokens=True)
    assert tokens.shape[-1] == round(1.4 * seconds * musicgen.frame_rate)
    musicgen.set_generation_params(duration=seconds, use_sampling=False)
    _, window = musicgen.generate("a waltz", return_tokens=True)
    np.testing.assert_array_equal(tokens[..., : window.shape[-1]], window)
    # What follows the window was generated from its second half.
    stride = round(0.5 * seconds * musicgen.frame_rate)
    musicgen.set_generation_params(
        duration=(tokens.shape[-1] - stride) / musicgen.frame_rate, use_sampling=False
    )
    again = musicgen.clips(
        ["a waltz"], num_frames=tokens.shape[-1] - stride, seed=0,
        prompt_BKP=window[..., stride:],
    )  # fmt: skip
    np.testing.assert_array_equal(again.codes_BKT, tokens[..., stride:])


def test_the_command_generates_long_clips_in_windows_as_the_api_does(musicgen, imported, tmp_path):
    window = musicgen.max_duration
    seconds, stride = round(1.4 * window, 2), 0.5 * window
    musicgen.set_generation_params(duration=seconds, extend_stride=stride)
    (expected,) = musicgen.generate("a waltz", seed=3)
    words = ["--checkpoint", str(imported / "musicgen"), "--prompt", "a waltz", "--seed", "3"]
    words += ["--out", str(tmp_path), "--lufs", "off", "--seconds"]
    (path,) = sample.sample(sample.parse([*words, str(seconds), "--extend-stride", str(stride)]))
    found, _ = soundfile.read(path, always_2d=True)
    np.testing.assert_allclose(found.T, expected.clip(-1, 1), atol=1e-4)  # (of 16 bits)
    assert json.loads(path.with_suffix(".json").read_text())["extend_stride"] == stride
    assert long.window_stride(musicgen.loaded, None, "x") == 0.6 * window
    for more, complaint in (
        ((str(seconds), "--extend-stride", "999"), "--extend-stride must lie between 0 and"),
        (("0.4", "--extend-stride", "0.5"), "--extend-stride is for clips of more than"),
    ):
        with pytest.raises(UserError, match=complaint):
            sample.sample(sample.parse([*words, *more]))


def test_the_command_makes_longer_clips_of_a_magnet(magnet, imported, tmp_path):
    window = magnet.max_duration
    words = ["--checkpoint", str(imported / "magnet"), "--prompt", "a waltz", "--seed", "3"]
    words += ["--decode.steps", "2", "1", "1", "1", "--lufs", "off", "--out", str(tmp_path)]
    long_clip = ["--seconds", str(1.3 * window)]
    (path,) = sample.sample(sample.parse([*words, *long_clip, "--extend-stride", "0.6"]))
    settings = json.loads(path.with_suffix(".json").read_text())
    assert settings["extend_stride"] == 0.6 and settings["long"]["mode"] == LongConfig.mode
    magnet.set_generation_params(decoding_steps=[2, 1, 1, 1], duration=1.3 * window)
    magnet.set_long_params(extend_stride=0.6)
    try:
        (expected,) = magnet.generate("a waltz", seed=3)
    finally:
        magnet.set_long_params()
    found, _ = soundfile.read(path, always_2d=True)
    np.testing.assert_allclose(found.T, expected.clip(-1, 1), atol=1e-4)  # (of 16 bits)
    for more, complaint in (
        (["--long.mode", "joint"], "--long is for clips of a MAGNeT of more than"),
        ([*long_clip, "--long.lead", "0.8"], "long.lead must lie between"),
        ([*long_clip, "--extend-stride", "99"], "--extend-stride must lie between"),
    ):
        with pytest.raises(UserError, match=complaint):
            sample.sample(sample.parse([*words, *more]))


def test_a_checkpoint_needs_no_import(sources, imported):
    """Straight from AudioCraft's folder: the same audio as from the import."""
    direct = fast(MAGNeT.get_pretrained(sources / "magnet", text_encoder=str(sources / "t5")))
    through = fast(MAGNeT.get_pretrained(imported / "magnet"))
    assert_same_sound(direct.generate("a waltz"), through.generate("a waltz"))


def test_the_command_samples_from_imports(imported, tmp_path):
    for name, options in (
        ("magnet", ["--decode.greedy", "--decode.span-arrangement", "stride1"]),
        ("musicgen", ["--autoregressive.top-k", "5"]),
    ):
        args = ["--checkpoint", str(imported / name), "--out", str(tmp_path / name)]
        paths = sample.sample(
            sample.parse([*args, "--prompt", "a waltz", "--seconds", "0.4", *options])
        )
        settings = json.loads(paths[0].with_suffix(".json").read_text())
        assert settings["seconds"] == 0.4 and settings["extend_stride"] is None
        key = {"magnet": "span_arrangement", "musicgen": "top_k"}[name]
        assert settings["decode"][key] == {"magnet": "stride1", "musicgen": 5}[name]


def test_a_rescorer_takes_part(magnet, musicgen, imported):
    fast(magnet).set_generation_params(decoding_steps=[4, 2, 1, 1], duration=0.5, temperature=20.0)

    def tokens(rescorer, weight=None, **settings):
        magnet.set_rescorer(rescorer, weight, **settings)
        return magnet.generate(["a waltz", "a march"], return_tokens=True)[1]

    try:
        without = tokens(None)
        np.testing.assert_array_equal(tokens(musicgen, 0.0), without)
        found = tokens(musicgen, 1.0, guidance=3.0)
        assert (found != without).any()
        np.testing.assert_array_equal(tokens(imported / "musicgen", 1.0, guidance=3.0), found)
        notes = magnet.notes(["a very long waltz " * 100])
        assert [note.split(" that")[0] for note in notes] == [
            "cut to the 128 tokens",
            "rescorer: cut to the 128 tokens",
        ]
        np.testing.assert_array_equal(tokens(None), without)
        for given, complaint in (
            (("nowhere", 0.5), "^rescorer: nowhere: no such folder"),
            ((musicgen, 1.5), "rescorer weight must lie between 0"),
            ((3,), "rescorer must be a folder, .* not 3"),
            ((None, 0.5), "weight and guidance need a rescorer"),
        ):
            with pytest.raises(UserError, match=complaint):
                magnet.set_rescorer(*given)
        for settings, complaint in (
            ({"rescorer": None, "guidance": 3.0}, "weight and guidance need a rescorer"),
            ({"rescorer": musicgen, "guidance": -1.0}, "rescorer guidance must"),
        ):
            with pytest.raises(UserError, match=complaint):
                magnet.set_rescorer(**settings)
        magnet.set_generation_params(decoding_steps=[1, 1, 1, 1], duration=0.5)
        with pytest.raises(UserError, match="nothing is rescored where every codebook has one"):
            tokens(musicgen)
    finally:
        magnet.set_rescorer(None)


def test_the_command_rescores(imported, sources, tmp_path):
    words = [
        "--checkpoint", str(imported / "magnet"), "--out", str(tmp_path / "out"),
        "--prompt", "a waltz", "--seconds", "0.4", "--decode.steps", "2", "1", "1", "1",
    ]  # fmt: skip
    partner = ["--rescorer", str(imported / "musicgen"), "--rescorer-weight", "0.7"]
    paths = sample.sample(sample.parse([*words, *partner]))
    settings = json.loads(paths[0].with_suffix(".json").read_text())
    assert settings["rescorer"] == {
        "checkpoint": str(imported / "musicgen"),
        "step": 0,
        "weights": None,
        "parameters": pretrained.fingerprint(pretrained.load(imported / "musicgen")),
        "weight": 0.7,
        "guidance": 1.0,
    }
    musicgen = ["--checkpoint", str(imported / "musicgen"), *words[2:8]]
    for given, complaint in (
        ([*words, "--rescorer-weight", "0.7"], "need --rescorer MODEL"),
        ([*words, *partner[:3], "1.7"], "rescorer weight must lie between 0"),
        ([*words[:9], "1", *words[10:], *partner], "every codebook has one step"),
        ([*words, "--rescorer", "nowhere"], "^rescorer: nowhere: no such folder"),
        ([*musicgen, *partner], "kind musicgen has no spans to score"),
        ([*musicgen, *words[8:]], "--decode is not for models of kind musicgen"),
        (
            [*words, "--autoregressive.top-k", "5"],
            "--autoregressive is not for models of kind magnet",
        ),
        ([*words, "--rescorer", str(sources / "musicgen")], "launch.import_audiocraft"),
    ):
        with pytest.raises(UserError, match=complaint):
            sample.sample(sample.parse(given))


def test_the_command_is_not_misled_by_other_libraries_config(copied):
    """Published folders of MusicGen hold a config.json for transformers as well."""
    (copied / "magnet" / "config.json").write_text('{"model_type": "musicgen"}')
    args = sample.parse(["--checkpoint", str(copied / "magnet"), "--out", "x"])
    assert args.decode == pretrained.read_defaults(copied / "magnet")[1]


def test_what_the_package_offers():
    offered = {"HybridMAGNeT", "MAGNeT", "MusicGen", "Prompt", "audio_write"}
    assert set(magnet_jax.__all__) == offered
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        magnet_jax.nothing  # noqa: B018


def test_of_several_devices_that_report_a_step_one_is_heard():
    report, seen = api._Report(), []
    report.listen(lambda done, total: seen.append((done, total)))
    for done in (1, 1, 2, 1, 2, 3):
        report(np.int32(done), 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- fine-tuning --------------------------------------------------------------------------------


def test_adapters_of_an_import_are_trained_merged_and_exported(imported, tmp_path, monkeypatch):
    """LoRA from an imported checkpoint, by the commands that a user has."""
    tiny.use_one_device(monkeypatch)
    base_folder = tmp_path / "base"
    shutil.copytree(imported / "magnet", base_folder)
    base = pretrained.load(base_folder)
    rng = np.random.default_rng(0)
    frames = round(base.config.data.segment_seconds * base.codec.frame_rate)
    k, v = base.codec.num_codebooks, base.codec.codebook_size
    examples = [
        {
            "codes": rng.integers(0, v, (k, frames)).astype(np.int16),
            "caption": f"noise {i}", "info": "{}", "track_id": f"{i}", "source_path": f"{i}",
            "start": 0.0, "duration": base.config.data.segment_seconds,
        }
        for i in range(2)
    ]  # fmt: skip
    tiny.write_data_set(tmp_path / "tokens", {"train": examples}, base.codec)
    run = tmp_path / "run"
    command = [
        "--config", "demo", "--init-from", str(base_folder), "--data",
        str(tmp_path / "tokens"), "--out", str(run), "--lora.rank", "4", "--sample-every", "0",
        "--batch-size", "4", "--save-every", "20", "--condition-dropout", "0", "--log-every", "1",
        "--optimizer.peak-lr", "1e-2", "--optimizer.warmup-steps", "1",
    ]  # fmt: skip
    launch_train.main([*command, "--steps", "40"])
    lines = [line for line in watch.read_scalars(run) if "train/loss" in line]
    losses = [line["train/loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    tuned = pretrained.load(run)
    assert tuned.lineage["init_from"] == "base" and tuned.lineage["lora_rank"] == 4
    before, after = (trees.flatten(m.params["lm"]) for m in (base, tuned))
    changed = {path for path in before if (np.asarray(before[path]) != after[path]).any()}
    assert changed == {p.path for p in lora.PROJECTIONS}
    # Adapters are not averaged: their products would be other than those of the averages.
    last = trees.flatten(pretrained.load(run, weights="raw").params["lm"])
    assert_same_bits(last, after)

    out = tmp_path / "merged"
    export_command.main(export_command.Args(checkpoint=run, out=out, verify=True))
    assert_same_bits(trees.flatten(pretrained.load(out).params["lm"]), after)
    adapter = tmp_path / "adapter"
    export_command.main(export_command.Args(checkpoint=run, out=adapter, adapter_only=True))
    assert_same_bits(
        trees.flatten(pretrained.load(base_folder, adapter=adapter).params["lm"]), after
    )
    with pytest.raises(UserError, match="no run that trained adapters"):
        export_command.main(export_command.Args(checkpoint=out, out=adapter, adapter_only=True))
    for asked in (
        {"half": True}, {"license": "mit"}, {"about": tmp_path / "about.md"}, {"verify": True},
        {"t5_name": "t5-base"}, {"audiocraft": False},
    ):  # fmt: skip
        with pytest.raises(UserError, match="--adapter-only"):
            export_command.main(
                export_command.Args(checkpoint=run, out=adapter, adapter_only=True, **asked)
            )

    # The run has what it needs: the base may be gone.
    shutil.rmtree(base_folder)
    launch_train.main([*command, "--steps", "41"])
    assert pretrained.load(run).step == 41


def test_what_does_not_match_is_refused_or_listed(imported, tmp_path, monkeypatch, capsys):
    tiny.use_one_device(monkeypatch)
    base = pretrained.load(imported / "magnet")
    tiny.write_noise(tmp_path / "tokens", {"train": 4})
    config = tiny.run_config(
        tmp_path / "tokens", tmp_path / "run", init_from=str(imported / "magnet"), steps=1
    )
    text = dataclasses.replace(config.text, finetune=False)
    model = dataclasses.replace(
        base.config.model, codebook_size=1024, num_codebooks=4, first_context=7
    )
    config = dataclasses.replace(config, model=model, text=text)
    with pytest.raises(UserError, match="tokenize with that codec, or give --init-partial"):
        loop.train(config)
    loop.train(dataclasses.replace(config, init_partial=True))
    said = capsys.readouterr().out
    assert "  matched  blocks/mlp/up" in said and "  fresh    heads" in said
    assert f"model.first_context is 7; {imported / 'magnet'} learnt with 0" in said
    assert "local_context is" not in said
    run = pretrained.load(tmp_path / "run", weights="raw")
    np.testing.assert_allclose(
        run.params["lm"]["blocks"]["mlp"]["up"], base.params["lm"]["blocks"]["mlp"]["up"], atol=2e-3
    )
    with pytest.raises(UserError, match="give it with --init-from"):
        dataclasses.replace(config, init_from="", lora=LoraConfig(rank=2))
