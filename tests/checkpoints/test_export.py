"""Exported and imported models: the formats, the commands, and what they do when things fail."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save_file
from tiny import PUBLISHED_CODEC, TINY, assert_same_bits, random_params
from tonal_codec import put_tonal, sine

from launch import export as command
from launch import sample
from magnet_jax.checkpoints import bundle as bundles
from magnet_jax.checkpoints import export, pretrained, run_folder
from magnet_jax.config import ASSETS, DecodeConfig, ModelConfig, RunConfig, TextConfig
from magnet_jax.convert import audiocraft, codec_rules, lm_rules, t5_files
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.io.torch_env import import_torch

# --- safetensors --------------------------------------------------------------------------------


def make_bundle(**changes) -> bundles.Bundle:
    return bundles.Bundle(
        **{
            "model": TINY,
            "text": TextConfig(source="t5-small"),
            "codec": PUBLISHED_CODEC,
            "generation": dataclasses.replace(RunConfig().decode, steps=(3, 2), top_p=0.5),
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
    assert_same_bits(trees.flatten(found.params), trees.flatten(bundle.params))
    assert "lm/blocks/attn/query" in trees.flatten(found.params)
    # Folders that travel along are found wherever the model lies.
    (tmp_path / "text_encoder").mkdir()
    assert bundles.read_safetensors(tmp_path).text.source == str(tmp_path / "text_encoder")


def test_exports_of_earlier_releases_are_read(tmp_path):
    """Their tensors have other names."""
    bundle = make_bundle(params={"lm": random_params(TINY)})
    bundles.write_safetensors(tmp_path, bundle)
    tensors = load_file(tmp_path / "model.safetensors")

    def named(path):
        path = re.sub("/(norm_)?attn/", r"/\1self/", path)
        return re.sub("/(norm_)?cross_attn/", r"/\1cross/", path)

    before = {named(path): array for path, array in tensors.items()}
    assert len(before) == len(tensors)
    assert {"lm/blocks/self/query", "lm/blocks/cross/out"} < before.keys()
    assert {"lm/blocks/norm_self/scale", "lm/blocks/norm_cross/bias"} < before.keys()
    save_file(before, tmp_path / "model.safetensors")
    found = bundles.read_safetensors(tmp_path)
    assert_same_bits(trees.flatten(found.params), trees.flatten(bundle.params))


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
    tensors = load(whole)
    for value, found in ((np.nan, "NaN"), (1e39, r"1e\+39")):
        wide = tensors["lm/heads"].astype(np.float64)
        wide[0, 1, 2] = value
        save_file(tensors | {"lm/heads": wide}, path)
        with pytest.raises(
            UserError, match=f"model.safetensors: the tensor lm/heads holds {found}"
        ):
            bundles.read_safetensors(tmp_path)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, complaint in (
        ({"format_version": 3}, "format version 3"),
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
    from magnet_jax.codec.encodec import load_codec

    codec = load_codec("embedded").spec
    text_config, text_params, tokenizer = t5_files.load("embedded")
    model = dataclasses.replace(
        TINY, num_codebooks=4, codebook_size=1024, text_width=text_config.d_model
    )
    config = RunConfig(model=model, text=TextConfig(source="embedded", finetune=True))
    params = {"lm": random_params(model), "text": text_params}
    lineage = {"run": "my-run", "step": 5, "data": "clips"}
    return pretrained.Loaded(
        config, codec, codec.source, params, text_config, text_params, tokenizer, 5, lineage
    )


def run_export(loaded, tmp_path, **changes):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    out, options = tmp_path / "out", export.Options(**changes)
    export.prepare_out(out, run, options.overwrite)
    return "; ".join(export.export_model(loaded, out, options, "run"))


def test_export_writes_a_whole_folder(loaded, tmp_path):
    about = "## Scores\n\nFAD 0.1\n"
    line = run_export(loaded, tmp_path, license="cc-by-4.0", about=about)
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
    for part in (
        "\n\n## Scores\n\nFAD 0.1\n\n## License",
        "my-run",
        "step: 5",
        "clips",
        loaded.codec.sha256,
        "T5Conditioner",
    ):
        assert part in card
    assert str(tmp_path) not in card + (out / "config.json").read_text()
    model, _, xp_cfg, *_ = lm_rules.read_audiocraft(out)
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
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(bundles, "write_safetensors", fail)
    with pytest.raises(UserError, match="out: cannot be written .*No space left"):
        run_export(loaded, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_full_disk_under_torchs_files_is_an_oserror():
    with pytest.raises(OSError, match="No space left"):
        audiocraft.write_weights(Path("/dev/full"), {"a": np.zeros(100_000)}, {})


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
    to_audiocraft = lm_rules.to_audiocraft

    def flip_a_bit(*args):
        state_dict = to_audiocraft(*args)
        state_dict["linears.3.weight"].view(np.int32)[-1, -1] ^= 1
        return state_dict

    monkeypatch.setattr(lm_rules, "to_audiocraft", flip_a_bit)
    with pytest.raises(RuntimeError, match="state_dict.bin: what was read back differs: heads"):
        run_export(loaded, tmp_path)
    assert not (tmp_path / "out").exists()


def test_export_refuses(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an export"):
        run_export(loaded, tmp_path, overwrite=True)
    # another library's model has these files too
    (tmp_path / "out" / "config.json").write_text('{"model_type": "musicgen"}')
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match="not an export"):
        run_export(loaded, tmp_path, overwrite=True)
    (tmp_path / "out" / "config.json").write_text(json.dumps({"format": bundles.FORMAT}))
    with pytest.raises(UserError, match="holds other files as well .thesis.txt."):
        run_export(loaded, tmp_path, overwrite=True)
    shutil.rmtree(tmp_path / "out")
    changed = loaded._replace(codec=dataclasses.replace(loaded.codec, sha256="1" * 64))
    with pytest.raises(UserError, match="codec"):
        run_export(changed, tmp_path)
    with pytest.raises(UserError, match="trained its text encoder"):
        run_export(loaded, tmp_path, t5_name="t5-base")
    near = dataclasses.replace(loaded.config.model, first_context=4)
    changed = loaded._replace(config=dataclasses.replace(loaded.config, model=near))
    with pytest.raises(UserError, match="this one's 4 to each side: --no-audiocraft"):
        run_export(changed, tmp_path)


def test_a_first_codebook_that_sees_near_frames_is_exported_without_audiocraft(loaded, tmp_path):
    near = dataclasses.replace(loaded.config.model, first_context=4)
    changed = loaded._replace(config=dataclasses.replace(loaded.config, model=near))
    line = run_export(changed, tmp_path, audiocraft=False, logits=True)
    assert "logits" in line
    assert pretrained.load(tmp_path / "out").config.model == near
    assert "4 frames in the first codebook" in (tmp_path / "out" / "README.md").read_text()


def test_clips_of_other_weights_are_not_taken_for_these(loaded, tmp_path):
    run_export(loaded, tmp_path)
    same = pretrained.fingerprint(pretrained.load(tmp_path / "out"))
    assert pretrained.fingerprint(loaded) == same
    lm = jax.tree.map(np.array, loaded.params["lm"])
    lm["blocks"]["mlp"]["up"] += 1e-6
    other = pretrained.fingerprint(loaded._replace(params=loaded.params | {"lm": lm}))
    assert other != same
    (tmp_path / "0.wav").write_bytes(b"made")
    clip = (tmp_path / "0.wav", tmp_path / "0.json")

    def settings(parameters, partners):
        partner = {"weight": 0.5, "parameters": partners}
        return {"seed": 1, "parameters": parameters, "rescorer": partners and partner}

    for partners in (None, same):
        clip[1].write_text(json.dumps(settings(same, partners)))
        assert sample.is_made(*clip, settings(same, partners))
        with pytest.raises(UserError, match="made with other settings .parameters.; name another"):
            sample.is_made(*clip, settings(other, partners))
    with pytest.raises(UserError, match="made with other settings .rescorer.; name another"):
        sample.is_made(*clip, settings(same, other))


def test_what_only_runs_have_to_choose_is_refused():
    for lineage, weights, step, message in (
        ({}, "raw", None, "x: only training runs have --weights"),
        ({}, None, 3, "x: only training runs have --step"),
        ({"weights": "ema", "step": 2}, "raw", None, "with weights ema alone"),
        ({"weights": "ema", "step": 2}, None, 3, "with step 2 alone"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained._check_held(Path("x"), lineage, weights, step)
    pretrained._check_held(Path("x"), {"weights": "ema", "step": 2}, "ema", 2)
    pretrained._check_held(Path("x"), {}, None, 0)  # (which is what an import calls its step)


def test_text_encoder_names(loaded):
    def name(source, width, t5_name=None, **changed):
        config = dataclasses.replace(
            loaded.config,
            text=TextConfig(source=source, **changed),
            model=dataclasses.replace(loaded.config.model, text_width=width),
        )
        return export.text_encoder_name(loaded._replace(config=config), t5_name)

    assert name("t5-base", 768) == "t5-base"
    assert name("google-t5/t5-small", 512) == "t5-small"
    assert name("google/flan-t5-large", 1024) == "google/flan-t5-large"
    assert name("t5-base", 768, finetune=True) == "text_encoder"
    assert name("t5-base", 768, trained=True) == "text_encoder"  # (by a run begun with)
    with pytest.raises(UserError, match="trained its text encoder"):
        name("some/folder", 768, "t5-base", trained=True)
    assert name("embedded", 128) == "text_encoder"
    assert name("some/folder", 768, "t5-base") == "t5-base"
    with pytest.raises(UserError, match="768 wide"):
        name("some/folder", 512, "t5-base")
    with pytest.raises(UserError, match="AudioCraft knows"):
        name("some/folder", 512, "bert")


@pytest.mark.parametrize("num_codebooks", [1, 8])
def test_settings_of_any_number_of_codebooks_are_read_back(num_codebooks):
    decoding = DecodeConfig(steps=(2,) * num_codebooks)
    exported = bundles.Config(
        model=ModelConfig(num_codebooks=num_codebooks), text=TextConfig(), codec=PUBLISHED_CODEC,
        segment_seconds=3.0, lineage={}, origin=None,
    )  # fmt: skip
    config = pretrained._exported_config(exported, decoding)
    assert (config.model, config.decode) == (exported.model, decoding)


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
    codec_rules.read_codec_folder(codec_rules.codec_folder(found))


def test_a_tonal_stream_travels_along_but_for_audiocrafts_file(loaded, tmp_path):
    from encodec.quantization import ResidualVectorQuantizer

    from magnet_jax.codec.encodec import load_codec

    codec = load_codec(put_tonal(tmp_path / "codec"))
    model = dataclasses.replace(loaded.config.model, num_codebooks=5)
    config = dataclasses.replace(
        loaded.config, model=model, decode=dataclasses.replace(loaded.config.decode, steps=(1,) * 5)
    )
    model = loaded._replace(
        config=config, codec=codec.spec, codec_source=codec.spec.source,
        params=loaded.params | {"lm": random_params(model)},
    )  # fmt: skip
    assert "every bit equal" in run_export(model, tmp_path, logits=True)
    out, wav_BCN = tmp_path / "out", sine(330.0)[None, None]
    shutil.rmtree(tmp_path / "codec")
    again = pretrained.load(out)
    there = pretrained.load_decoder(again, "it", "torch")  # as edits of uploads have it
    assert there.spec.sha256 == codec.spec.sha256
    codes_BKT = codec.encode(wav_BCN)
    np.testing.assert_array_equal(there.encode(wav_BCN), codes_BKT)
    # AudioCraft's encoder, which knows no stream, gives 0 in its place and the same in the others.
    file = audiocraft.read_file(out / audiocraft.CODEC_FILE)
    assert file.xp_cfg["rvq"]["n_q"] == 5
    torch = import_torch()
    quantizer = ResidualVectorQuantizer(dimension=64, n_q=5, bins=1024).eval()
    prefix = "quantizer."
    quantizer.load_state_dict(
        {n[len(prefix) :]: torch.from_numpy(a) for n, a in file.tensors.items() if prefix in n}
    )
    with torch.inference_mode():
        latent = codec.encoder(torch.from_numpy(wav_BCN))
        theirs_BKT = quantizer.encode(latent, sample_rate=1).transpose(0, 1).numpy()
    assert not theirs_BKT[:, 0].any()
    np.testing.assert_array_equal(theirs_BKT[:, 1:], codes_BKT[:, 1:])
    # Its pair alone makes sound, but takes no uploads unless the codec's folder is named.
    pair = tmp_path / "pair"
    pair.mkdir()
    for name in (audiocraft.CODEC_FILE, audiocraft.LM_FILE):
        shutil.copy(out / name, pair / name)
    text = {"text_encoder": str(out / "text_encoder")}
    alone = pretrained.load_decoder(pretrained.load(pair, **text), "it", "torch")
    assert np.array_equal(alone.decode(codes_BKT), codec.decode(codes_BKT))
    with pytest.raises(UserError, match="its first codebook is zeros"):
        alone.encode(wav_BCN)
    named = pretrained.load(pair, codec=str(out / "codec"), **text)
    assert pretrained.load_decoder(named, "it", "torch").spec.sha256 == codec.spec.sha256


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

    from magnet_jax.codec.encodec import load_codec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    (tmp_path / "home").mkdir()
    weights = tmp_path / "home" / "encodec_24khz-mine.th"
    torch.save(model.state_dict(), weights)
    spec = load_codec(str(weights), num_codebooks=4).spec

    # Into the run ...
    config = dataclasses.replace(loaded.config, out=str(tmp_path / "run"))
    text = (loaded.t5_config, loaded.t5_params, loaded.tokenizer)
    run_folder.prepare_run(tmp_path / "run", config, spec, text)
    source = run_folder.codec_source(tmp_path / "run", spec)
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
    found = pretrained.load(out)
    assert (found.step, found.codec, found.config.decode) == (5, loaded.codec, decode)
    assert sample.parse(["--checkpoint", str(out), "--out", "x"]).decode == decode

    def codes(model):
        frames = sampling.segment_frames(model.config, model.codec)
        assert frames == 20
        return sampling.generate(
            model, ["drums", ""], num_frames=frames, decoding=model.config.decode, seed=3
        ).codes_BKT

    np.testing.assert_array_equal(codes(found), codes(run))
    with pytest.raises(UserError, match="step 5 alone; give --step 5"):
        pretrained.load(out, step=4)

    command.main(command.Args(checkpoint=out, out=tmp_path / "again", verify=True))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_half_the_numbers_are_rounded_and_read_back_as_they_were_written(loaded, tmp_path):
    line = run_export(loaded, tmp_path, half=True)
    assert "every bit equal to the weights rounded to float16" in line
    out = tmp_path / "out"
    found = pretrained.load(out)
    for name in ("lm", "text"):
        for a, b in zip(jax.tree.leaves(found.params[name]), jax.tree.leaves(loaded.params[name])):
            np.testing.assert_array_equal(np.asarray(a), np.float32(np.float16(b)))
    tensors = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    huge = jax.tree.map(lambda x: np.full_like(x, 7e4), loaded.params["lm"])
    with pytest.raises(UserError, match="the tensor lm/.* beyond float16's 65504"):
        run_export(loaded._replace(params={"lm": huge}), tmp_path, half=True, overwrite=True)
    assert pretrained.load(out).step == 5


def test_weights_that_are_not_finite_are_not_written(loaded, tmp_path):
    heads = np.array(loaded.params["lm"]["heads"])
    heads[1, 0, 3] = np.inf
    lm = loaded.params["lm"] | {"heads": heads}
    for half in (False, True):
        with pytest.raises(UserError, match="run: the tensor lm/heads holds infinity"):
            run_export(loaded._replace(params={"lm": lm}), tmp_path, half=half)
    assert not (tmp_path / "out").exists()


def test_logits_that_overflow_are_one_line(loaded, tmp_path):
    norm = loaded.params["lm"]["norm_final"]
    lm = loaded.params["lm"] | {"norm_final": norm | {"scale": norm["scale"] * 1e38}}
    with pytest.raises(UserError, match="run: the model computes NaN or infinity"):
        run_export(loaded._replace(params={"lm": lm}), tmp_path, logits=True)
    assert not (tmp_path / "out").exists()


def test_numbers_that_have_changed_are_not_cut_to_the_type_that_they_came_in(tmp_path):
    params = {"heads": np.float32([0.5, 70_000])}
    with pytest.raises(UserError, match="x.bin: the tensor heads does not fit float16"):
        audiocraft.write_weights(tmp_path / "x.bin", params, {}, "float16")
    origin = audiocraft.Origin(
        lm_xp_cfg="{}", lm_dtype="float16", codec_pretrained="a/b", codec_xp_cfg="",
        codec_dtype="float32",
    )  # fmt: skip
    with pytest.raises(UserError, match="safetensors: the tensor lm/.* does not fit float16"):
        bundles.write_safetensors(tmp_path, make_bundle(origin=origin))
    assert not list(tmp_path.iterdir())
