"""Training: resumed exactly, the same on one device and on eight, clear about what is wrong."""

import contextlib
import dataclasses
import errno
import functools
import math
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from launch.train import config_names, inherited, load_config
from magnet_jax.checkpoints import pretrained, run_folder
from magnet_jax.codec import encodec
from magnet_jax.config import (
    ASSETS,
    DataConfig,
    DecodeConfig,
    KernelConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
    from_dict,
    from_json,
    to_json,
)
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline, records
from magnet_jax.errors import UserError
from magnet_jax.io import files, trees
from magnet_jax.model import sharding, transformer
from magnet_jax.model.forms import choose_forms
from magnet_jax.train import evaluate, loop, plan, steps, watch
from magnet_jax.train.setup import Setup, first_state, set_up, to_devices


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "tokens"
    tiny.write_noise(directory, {"train": 20, "validation": 5})
    return directory


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """A run that nothing interrupted, with validation and samples on."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny.run_config(
        tokens, out, eval_every=15, eval_batches=2, sample_every=30, sample_prompts=("noise",)
    )
    loop.train(config)
    return config


def test_only_weighted_stages_are_trained(tokens, tmp_path, capsys):
    out = tmp_path / "run [1]"
    config = tiny.run_config(tokens, out, stage_weights=(0.0, 1.0, 0.0, 0.0), steps=6)
    loop.train(config)
    assert f"--checkpoint '{out}' --prompt" in capsys.readouterr().out  # can be pasted
    losses = {name for line in watch.read_scalars(out) for name in line if "loss_" in name}
    assert losses == {"train/loss_1"}


def test_what_a_run_takes_over_fits_the_model_that_it_begins_with(monkeypatch):
    of = RunConfig(
        model=ModelConfig(num_codebooks=2),
        decode=DecodeConfig(steps=(1, 1)),
        text=TextConfig(source="t5-base", finetune=True),
    )
    monkeypatch.setattr(pretrained, "read_settings", lambda source: of)
    config = RunConfig(stage_weights=(7.0, 1.0, 1.0, 1.0))
    found = inherited(config, "model", "")
    assert (found.model, found.stage_weights) == (of.model, ())
    # It is not t5-base any more, though this run does not train it.
    assert not found.text.finetune and found.text.trained and found.text.changed
    of = dataclasses.replace(RunConfig(), text=found.text)
    found = inherited(config, "model", "")
    assert found.stage_weights == config.stage_weights and found.text.changed


def make_settings(config: RunConfig, mesh=None) -> steps.StepSettings:
    t5_config, _, _ = t5_files.load("embedded")
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    return steps.make_settings(config, t5_config, np.dtype("float32"), 30, mesh)


def test_a_finished_run_holds_what_the_readme_promises(finished):
    out = Path(finished.out)
    assert tiny.newest_step(out) == 30
    assert len(list((out / "checkpoints").iterdir())) == finished.keep_last
    assert list((out / "tensorboard").iterdir())
    scalars = watch.read_scalars(out)
    assert [line["step"] for line in scalars if "train/loss" in line] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in scalars if "validation/loss_3" in line] == [15, 30]
    assert [path.name for path in sorted((out / "samples" / "step_0000030").iterdir())] == [
        "00.wav",
        "prompts.txt",
    ]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tokens, tmp_path):
    """Whatever the folder was left with, and with other settings if need be."""
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    write_text = files.write_text
    for fatal in ("codec.json", "config.json"):

        def dying(path, text, fatal=fatal):
            if path.name == fatal:
                raise KeyboardInterrupt
            write_text(path, text)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "write_text", dying)
            set_up(config)
    set_up(dataclasses.replace(config, seed=5))
    loop.train(config)
    assert tiny.newest_step(Path(config.out)) == 1
    with pytest.raises(UserError, match="other settings: seed"):
        set_up(dataclasses.replace(config, seed=5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no run .thesis.tex."):
        set_up(dataclasses.replace(config, out=str(tmp_path / "other")))


def test_a_data_set_is_no_folder_for_a_run(tokens, tmp_path):
    tiny.write_noise(tmp_path / "tokens", {"train": 2})
    held = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    with pytest.raises(UserError, match="^--out .*/tokens: is a data set"):
        loop.train(tiny.run_config(tokens, tmp_path / "tokens", steps=1))
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == held


def test_a_file_is_no_folder_for_a_run(tokens, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="^--out .*/run: is a file, and a run needs a folder$"):
        loop.train(tiny.run_config(tokens, tmp_path / "run", steps=1))


def test_going_on_with_another_data_set_is_refused(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    loop.train(config)
    tiny.write_noise(tmp_path / "other", {"train": 9})
    moved = dataclasses.replace(config.data, path=str(tmp_path / "other"))
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="is not the data set"):
        set_up(dataclasses.replace(config, steps=2, data=moved))  # before anything is compiled
    assert (tmp_path / "run" / "config.json").read_text() == before
    shutil.copytree(tokens, tmp_path / "copy")
    copied = dataclasses.replace(config.data, path=str(tmp_path / "copy"))
    loop.train(dataclasses.replace(config, steps=2, data=copied))


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (None, {"keep_last": 0}, "keep_last"),
        (None, {"seed": -1}, "seed"),
        (None, {"eval_batches": -1}, "eval_batches"),
        ("text", {"max_tokens": 0}, "max_tokens"),
        ("optimizer", {"clip_norm": 0.0}, "clip_norm"),
        ("data", {"batch_size": 0}, "batch_size"),
        ("decode", {"top_p": 0.0}, "top_p"),
        ("decode", {"max_guidance": float("nan")}, "max_guidance"),
        ("decode", {"temperature": float("inf")}, "temperature"),
        (None, {"keep_best": 1, "eval_every": 300, "save_every": 1000}, "keep_best"),
        (None, {"profile": (3, 2)}, "profile"),
        (None, {"init_partial": True}, "init_partial"),
        (None, {"init_from": "a", "init_codes": "codec"}, "init_codes codec is for a new model"),
        ("decode", {"steps": (1, 1)}, "one number a codebook"),
        (None, {"stage_weights": (1.0, 2.0)}, "stage_weights .* must be 4 numbers"),
        (None, {"stage_weights": (0.0, 0.0, 0.0, 0.0)}, "stage_weights .* not all 0"),
        (None, {"stage_weights": (1.0, -1.0, 1.0, 1.0)}, "stage_weights"),
    ],
)
def test_impossible_settings_are_refused(section, settings, message):
    config = RunConfig()
    with pytest.raises(UserError, match=message):
        if section:
            settings = {section: dataclasses.replace(getattr(config, section), **settings)}
        dataclasses.replace(config, **settings)


def test_a_new_model_begins_with_what_tokens_sound_like(tokens, tmp_path, monkeypatch):
    config = tiny.run_config(tokens, tmp_path / "run", init_codes="codec")
    setup = set_up(config)
    lm = first_state(setup, jax.random.key(0))["params"]["lm"]
    _, vectors_KVE = encodec.codebook_vectors("embedded", 4)
    assert vectors_KVE.shape[:2] == (4, 1024)
    fresh = transformer.init_params(config.model, jax.random.key(0))
    wide = {
        "embed": np.zeros((4, 1025, 256), np.float32) - 1,
        "heads": np.zeros((4, 256, 1024), np.float32),
    }
    wide = jax.tree.map(jnp.asarray, wide)
    wide = transformer.with_code_vectors(wide, vectors_KVE, jax.random.key(1))
    assert (wide["embed"][:, -1] == -1).all()  # 'masked' is no token

    def cosines(vectors_VE):
        unit = vectors_VE - vectors_VE.mean(0)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        return (unit[:200] @ unit[:200].T)[np.triu_indices(200, 1)]

    for k in range(4):  # projections keep angles, the better the wider they are
        expected = cosines(vectors_KVE[k])
        for found, least in ((lm["embed"][k, :-1], 0.4), (wide["embed"][k, :-1], 0.9)):
            assert np.corrcoef(cosines(np.asarray(found)), expected)[0, 1] > least
        np.testing.assert_allclose(
            np.asarray(lm["heads"][k]).T * 64**0.5, lm["embed"][k, :-1], rtol=1e-5
        )
    assert 0.5 < np.std(lm["heads"]) / np.std(fresh["heads"]) < 2
    spec = dataclasses.replace(setup.spec, sha256="0" * 64)
    monkeypatch.setattr(records, "read_codec_spec", lambda path: spec)
    with pytest.raises(UserError, match="tokenize again with that codec"):
        set_up(dataclasses.replace(config, out=str(tmp_path / "other")))


def test_sigterm_saves_and_exits(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=1000, save_every=1000)
    step = steps.train_step

    def interrupting(*args, **kwargs):
        if tiny.newest_step(Path(config.out)) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", interrupting)
        with pytest.raises(SystemExit) as exit_:
            loop.train(config)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert tiny.newest_step(Path(config.out)) == 1


@pytest.fixture(scope="module")
def twenty_steps(tokens):
    """Runs twenty steps, of all stages, on a mesh and in parts; (losses, final state, settings).

    Or in the forms of training on TPUs.
    """
    config = tiny.run_config(tokens, Path("unused"))
    # Adam blows the rounding of gradients near zero up to whole steps; a large eps does not.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eps=1e-3))
    t5_config, t5_params, tokenizer = t5_files.load("embedded")
    t5_params = jax.tree.map(np.asarray, t5_params)
    batches = pipeline.make_train_iterator(
        config.data, frames=30, num_codebooks=4, tokenizer=tokenizer, max_tokens=16, seed=0
    )
    rows = [next(batches) for _ in range(20)]

    @functools.cache
    def run(sizes: tuple[int, int, int], parts: int = 1, remat: str = "none", platform="cpu"):
        changed = dataclasses.replace(config, remat=remat)
        mesh = sharding.make_mesh(
            MeshConfig(**dict(zip(sharding.AXES, sizes))), jax.devices()[: math.prod(sizes)]
        )
        settings = dataclasses.replace(make_settings(changed, mesh), num_parts=parts)
        if platform == "tpu":
            chosen = KernelConfig(full="chunks", local="slices", local_block=12)
            settings = dataclasses.replace(settings, kernels=chosen, form=choose_forms(platform))
        setup = Setup(None, t5_config, t5_params, tokenizer, None, 30, settings)
        state, losses = first_state(setup, jax.random.key(0)), []
        for batch, stage in zip(rows, (0, 1, 2, 0, 3) * 4):
            state, metrics = steps.train_step(
                state, {}, to_devices(batch, mesh), jax.random.key(0), stage,
                settings=settings, local=stage > 0,
            )  # fmt: skip
            losses.append(float(metrics["loss"]))
        return losses, state, settings

    return run


@pytest.mark.parametrize(
    ("sizes", "parts", "remat", "platform"),
    [
        ((8, 1, 1), 1, "none", "cpu"),
        ((1, 8, 1), 1, "full", "cpu"),
        ((2, 2, 2), 2, "attention", "tpu"),
        ((1, 4, 2), 1, "products", "tpu"),
    ],
)
def test_meshes_and_parts_equal_one_device(twenty_steps, sizes, parts, remat, platform):
    expected, one, _ = twenty_steps((1, 1, 1))
    found, state, settings = twenty_steps(sizes, parts, remat, platform)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    shardings = steps.state_shardings(settings)[1]
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    assert all(jax.tree.leaves(same))
    for a, b in zip(jax.tree.leaves(one["params"]), jax.tree.leaves(state["params"]), strict=True):
        # A hundredth of the way that a parameter can go in so many steps of 1e-3.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_every_parameter_and_moment_is_split_as_its_axes_say(twenty_steps):
    _, state, settings = twenty_steps((2, 2, 2), 2, "attention", "tpu")
    expected = {
        "embed": (None, None, "fsdp"),
        "heads": (None, "fsdp"),
        "text_proj/kernel": (None, "fsdp"),
        "text_proj/bias": ("fsdp",),
        "norm_final/scale": ("fsdp",),
        "blocks/mlp/up": (None, "fsdp", "tensor"),
        "blocks/mlp/down": (None, "tensor", "fsdp"),
        "blocks/norm_mlp/bias": (None, "fsdp"),
        **{
            f"blocks/{kind}/{name}": (None, "fsdp", "tensor")
            for kind in ("attn", "cross_attn")
            for name in ("query", "key", "value")
        },
        **{f"blocks/{kind}/out": (None, "tensor", None, "fsdp") for kind in ("attn", "cross_attn")},
    }
    adam = state["opt"][1][0]
    for tree in (state["params"], state["ema"], adam.mu, adam.nu):
        flat = trees.flatten(tree["lm"])
        for path, axes in expected.items():
            where = jax.sharding.NamedSharding(settings.mesh, jax.P(*axes))
            assert flat[path].sharding.is_equivalent_to(where, flat[path].ndim), path
    # A quarter of the device's bytes by fsdp x tensor, but for norms, which tensor leaves whole.
    abstract = steps.state_shardings(settings)[0]
    whole = steps.state_shardings(twenty_steps((1, 1, 1))[2])[0]
    assert plan.tree_bytes(abstract["opt"]) < 0.6 * plan.tree_bytes(whole["opt"])


@pytest.mark.parametrize("name", [*config_names(), "music_small_10s_span5_full"])
def test_every_config_is_built(name):
    """Shapes alone; ablations differ in settings that change no shape."""
    config = load_config(name)
    state, _ = steps.state_shardings(make_settings(config))
    stack = state["params"]["lm"]["blocks"]["mlp"]["up"].shape
    width = config.model.width
    assert stack == (config.model.num_layers, width, 4 * width)


@pytest.mark.parametrize("name", ["demo", "music_small_10s", "sound_small"])
def test_configs_are_stepped(name, tokens, tmp_path, capsys):
    config = load_config(name)
    small = dataclasses.replace(
        config.model, codebook_size=1024, width=16, num_heads=2, num_layers=2, text_width=128
    )
    shrunken = dataclasses.replace(
        config,
        model=small,
        text=dataclasses.replace(config.text, source="embedded", max_tokens=8),
        data=dataclasses.replace(config.data, path=str(tokens), segment_seconds=0.6, batch_size=8),
        out=str(tmp_path / "run"),
        steps=2,
        eval_every=0,
        sample_every=0,
    )
    loop.train(shrunken)
    assert tiny.newest_step(Path(shrunken.out)) == 2
    # A run that ends before its first average says which weights to take.
    assert ("--weights raw" in capsys.readouterr().out) == (config.optimizer.ema_updates == 10)


def test_config_survives_json(tmp_path):
    config = load_config("demo")
    (tmp_path / "config.json").write_text(to_json(config))
    assert from_json(RunConfig, tmp_path / "config.json") == config


def test_what_a_config_leaves_out_has_its_default_and_unknown_settings_are_named():
    values = {"model": {"width": 128}, "profile": [1, 2], "data": {"segment_seconds": 10}}
    found = from_dict(RunConfig, values, "x")
    expected = RunConfig(
        model=ModelConfig(width=128), profile=(1, 2), data=DataConfig(segment_seconds=10.0)
    )
    assert found == expected and type(found.data.segment_seconds) is float
    with pytest.raises(UserError, match="x: data: unknown settings: shuffel"):
        from_dict(RunConfig, {"data": {"shuffel": True}}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"seed"', '"sead"'), "unknown settings: sead"),
        (lambda text: text[:50], "not valid JSON"),
        (lambda text: text.replace('"width": 128', '"width": "128"'), "width must be"),
        (lambda text: text.replace('"auto"', '"half"'), "compute_dtype must be one of"),
        (
            lambda text: text.replace('"local_block"', '"products": 1, "local_block"'),
            "kernels: unknown settings: products",
        ),
    ],
)
def test_damaged_configs_are_named(tmp_path, change, message):
    (tmp_path / "config.json").write_text(change(to_json(load_config("demo"))))
    with pytest.raises(UserError, match=message):
        from_json(RunConfig, tmp_path / "config.json")


def test_settings_that_do_not_go_together_are_refused(tokens, finished, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run")
    model = dataclasses.replace(config.model, codebook_size=2048)
    with pytest.raises(UserError, match="codebooks of 1024.*wants 4 of 2048"):
        loop.train(dataclasses.replace(config, model=model))
    model = dataclasses.replace(config.model, text_width=768)
    with pytest.raises(UserError, match="text_width is 768: set --model.text-width 128"):
        loop.train(dataclasses.replace(config, model=model))
    with pytest.raises(UserError, match="no_such_folder"):
        missing = dataclasses.replace(config.data, path=str(tmp_path / "no_such_folder"))
        loop.train(dataclasses.replace(config, data=missing))
    with pytest.raises(UserError, match="other settings: seed .was 0, now 1."):
        loop.train(dataclasses.replace(finished, seed=1))
    with pytest.raises(UserError, match="even multiple"):
        ModelConfig(width=30, num_heads=4)


def test_tokens_of_another_codec_are_refused(finished, tmp_path):
    spec = encodec.load_codec("embedded").spec
    example = {
        "codes": np.zeros((4, 60), np.int16), "caption": "x", "info": "{}", "track_id": "x",
        "source_path": "x", "start": 0.0, "duration": 1.2,
    }  # fmt: skip
    other = dataclasses.replace(spec, sha256="0" * 64)
    tiny.write_data_set(tmp_path / "tokens", {"train": [example] * 8}, other)
    moved = dataclasses.replace(finished.data, path=str(tmp_path / "tokens"))
    with pytest.raises(UserError, match="tokenize again"):
        loop.train(dataclasses.replace(finished, data=moved))


def test_a_resumed_run_reads_its_own_text_encoder(tokens, tmp_path):
    source = tmp_path / "text"
    shutil.copytree(ASSETS / "text", source)
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, source=str(source), finetune=False)
    )
    loop.train(config)
    shutil.rmtree(source)
    loop.train(dataclasses.replace(config, steps=2))
    assert tiny.newest_step(Path(config.out)) == 2


def test_damaged_checkpoints_are_named(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    for path in (run / "checkpoints" / "30" / "ema").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/30: damaged.*from step 25"):
        pretrained.load(run)
    assert pretrained.load(run, step=25).step == 25
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        pretrained.load(run, step=7)
    with pytest.raises(UserError, match="no training run there"):
        pretrained.load(tmp_path)


def test_raw_and_averaged_weights_differ(finished):
    raw = pretrained.load(Path(finished.out), weights="raw")
    ema = pretrained.load(Path(finished.out), weights="ema")
    assert (raw.params["lm"]["heads"] != ema.params["lm"]["heads"]).any()
    assert raw.t5_params is raw.params["text"]


def test_a_runs_weights_are_averaged_every_ten_steps(finished):
    """The average of step 25 is that of steps 10 and 20, to which step 30 adds its own weights."""
    run, share = Path(finished.out), 1 / (1 + 0.99 + 0.99**2)
    raw, *averages = (
        trees.flatten(pretrained.load(run, weights=weights, step=step).params)
        for weights, step in (("raw", 30), ("ema", 25), ("ema", 30))
    )
    for path, before in averages[0].items():
        expected = (1 - share) * before + share * raw[path]
        np.testing.assert_allclose(averages[1][path], expected, atol=1e-6, err_msg=path)


def test_data_set_and_records_go_together(tokens):
    assert records.read_codec_spec(tokens) == encodec.load_codec("embedded").spec


# --- memory, and what cannot be -----------------------------------------------------------------


def compiled_memory(config: RunConfig, sizes: tuple[int, int, int], clips: int):
    """Bytes on a device of a step's arguments and temporaries, of its parameters, and the peak."""
    mesh = sharding.make_mesh(
        MeshConfig(**dict(zip(sharding.AXES, sizes))), jax.devices()[: math.prod(sizes)]
    )
    settings = make_settings(config, mesh)
    found = plan.lower(settings, clips, 500, 64, 0).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes, plan.param_bytes(settings)


MIDDLING = ModelConfig(codebook_size=512, width=256, num_heads=4, num_layers=6, text_width=128)


def test_memory_of_a_device_falls_with_fsdp():
    config = RunConfig(
        model=MIDDLING, text=TextConfig(finetune=True), data=DataConfig(segment_seconds=10.0)
    )
    whole, temporaries, params = compiled_memory(config, (8, 1, 1), 8)
    share, temporaries_split, params_split = compiled_memory(config, (1, 8, 1), 8)
    print(f"arguments {whole / 1e6:.1f} -> {share / 1e6:.1f} MB, temporaries "
          f"{temporaries / 1e6:.0f} -> {temporaries_split / 1e6:.0f} MB")  # fmt: skip
    # All of the state is split; tokens and texts are there beside it.
    assert params <= whole < params + 1e6
    assert params_split == pytest.approx(params / 8, rel=0.01)
    assert params_split <= share < params_split + 1e6
    # Gradients are split too; what is gathered for a layer is less than that.
    assert temporaries_split < temporaries


def test_batches_are_computed_in_equal_parts():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    assert plan.parts_to_try(48, 0, mesh) == [1, 2, 3, 4, 6, 12]
    for clips, parts in ((12, 1), (11, 2), (5, 3), (1, 12)):
        assert plan.parts_to_try(48, clips, mesh) == [parts]
    with pytest.raises(UserError, match="50 is not a multiple of the 4 devices"):
        plan.parts_to_try(50, 1, mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=1, fsdp=1, tensor=8), "mesh.tensor 8 does not divide model.num_heads 2"),
        (dict(data=1, fsdp=3, tensor=1), "mesh.fsdp 3 does not divide model.width 16"),
        (dict(data=3, fsdp=1, tensor=1), "does not fit 8 devices"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(sizes, message):
    config = tiny.run_config(Path("x"), Path("y"))
    t5_config, _, _ = t5_files.load("embedded")
    count = 8 if "fit" in message else math.prod(sizes.values())
    with pytest.raises(UserError, match=message):
        mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
        steps.make_settings(config, t5_config, np.dtype("float32"), 30, mesh)


def test_tensor_groups_stay_within_a_process():
    class Device(NamedTuple):
        process_index: int

    def mesh(*owners):  # a grid of (data, fsdp, tensor)
        grid = np.empty((1, len(owners) // 2, 2), object)
        for i, owner in enumerate(owners):
            grid.reshape(-1)[i] = Device(owner)
        shape = dict(zip(sharding.AXES, grid.shape))
        return types.SimpleNamespace(devices=grid, shape=shape)

    model = tiny.run_config(Path("x"), Path("y")).model
    sharding.check_mesh(model, mesh(0, 0, 1, 1))
    with pytest.raises(UserError, match="mesh.tensor 2 would reach over"):
        sharding.check_mesh(model, mesh(0, 1, 0, 1))


def test_a_save_that_fails_is_one_line_and_the_run_goes_on_afterwards(tokens, tmp_path):
    """A full disk, as Orbax meets it."""
    config = tiny.run_config(tokens, tmp_path / "run", steps=6, save_every=2)
    loop.train(dataclasses.replace(config, steps=2))
    real = ocp.CheckpointManager.save

    def full(self, step, **keywords):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, step, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError, match="No space left.*whole ones are of steps: 2; make room"):
            loop.train(config)
    loop.train(config)
    assert tiny.newest_step(Path(config.out)) == 6


def test_weights_and_biases_get_the_same_numbers(tmp_path, monkeypatch):
    """Of a stand-in: what it is told, and that a resumed run goes on in the same place."""
    told = []
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end")
    )
    begun = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: begun.append(settings) or run
    wandb.Audio = lambda path, caption: (path, caption)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny.run_config("", tmp_path, wandb="songs")
    for step in (0, 1):
        with contextlib.closing(watch.Scalars(config, tmp_path, step)) as scalars:
            scalars.log(step + 1, {"loss": np.float32(step)})
    scalars.log_audio(2, [tmp_path / "a.wav"], ("a song",))
    audio = {"samples": [(str(tmp_path / "a.wav"), "a song")]}
    assert told == [(1, {"loss": 0.0}), "end", (2, {"loss": 1.0}), "end", (2, audio)]
    assert [line["loss"] for line in watch.read_scalars(tmp_path)] == [0.0, 1.0]
    assert begun[0] == begun[1] and begun[0]["id"] == tmp_path.name
    assert begun[0]["project"] == "songs" and begun[0]["resume"] == "allow"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        watch.Scalars(config, tmp_path, 0)


def test_metrics_that_cannot_be_written_are_one_line(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=2, log_every=2)
    scalars = watch.Scalars(config, tmp_path, 0)
    scalars.path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: step 2 cannot be logged .No space left"):
        scalars.log(2, {"loss": 1.0})


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=4, save_every=2, log_every=1)
    step = steps.train_step

    def diverging(*args, **keywords):
        state, metrics = step(*args, **keywords)
        if int(state["opt"][1][0].count) == 3:
            metrics["grad_norm"] *= np.nan
        return state, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", diverging)
        with pytest.raises(UserError, match="of step 3 is nan.*the checkpoint of step 2"):
            loop.train(config)
    assert tiny.newest_step(Path(config.out)) == 2


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("dadam", 1.0)])
def test_one_step_whose_gradient_is_nan_is_named_whenever_it_is_seen(tokens, tmp_path, name, rate):
    """D-Adaptation leaves such a step out, so that all later ones are finite again."""
    config = tiny.run_config(
        tokens, tmp_path / "run", steps=4, save_every=4, log_every=100,
        text=TextConfig(max_tokens=16),
        optimizer=OptimizerConfig(name=name, peak_lr=rate, warmup_steps=2, schedule_steps=60),
    )  # fmt: skip
    step, calls = steps.train_step, []

    def poisoned_once(state, frozen, *args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            frozen = jax.tree.map(lambda x: x * np.nan, frozen)
        return step(state, frozen, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", poisoned_once)
        with pytest.raises(UserError, match="loss of step 2 is nan.*none was saved yet"):
            loop.train(config)
    assert len(calls) == 4 and not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sum_nll", "the loss of step 2 is inf"),
        ("grad_norm", "the gradient norm of step 2 is inf"),
        ("param_norm", "the norm of the parameters after step 2 is inf"),
    ],
)
def test_a_window_names_the_first_step_that_is_not_finite(name, found):
    window = watch.Window()
    for step in (1, 2, 3):
        metrics = dict.fromkeys(("loss", "sum_nll", "grad_norm", "param_norm"), jnp.ones(()))
        if step == 2:
            metrics[name] = jnp.full((), np.inf)
        window.add(0, metrics)
        assert metrics.keys() == {"grad_norm"}
        if step == 1:
            window.check_finite(1, 0)  # what was checked is not counted again
    with pytest.raises(UserError, match=f"{found}.*the checkpoint of step 1"):
        window.check_finite(3, 1)


def test_a_validation_loss_that_is_not_finite_ends_a_run(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=4, eval_every=2, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "validate", lambda *_: {"validation/loss": np.nan})
        with pytest.raises(UserError, match="validation loss of step 2 is nan.*of step 1"):
            loop.train(config)


def test_a_poisoned_checkpoint_is_neither_loaded_nor_gone_on_from(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=1, save_every=1)
    save = run_folder.save

    def poisoned(manager, step, state, *rest):
        for name in ("ema", "params"):
            lm = state[name]["lm"]
            state = state | {name: state[name] | {"lm": lm | {"heads": lm["heads"] * np.nan}}}
        save(manager, step, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", poisoned)
        loop.train(config)
    for weights, item in (("ema", "ema"), ("raw", "params")):
        with pytest.raises(UserError, match=f"checkpoints/1/{item}: the tensor lm/heads holds NaN"):
            pretrained.load(config.out, weights=weights)
    with pytest.raises(UserError, match="checkpoints/1: the tensor ema/lm/heads holds NaN or"):
        loop.train(dataclasses.replace(config, steps=2))


def test_the_best_and_every_nth_checkpoint_stay(tokens, tmp_path):
    config = tiny.run_config(
        tokens, tmp_path / "run", steps=12, save_every=2, eval_every=2, eval_batches=1,
        keep_last=1, keep_every=6, keep_best=1,
    )  # fmt: skip
    losses = iter([5.0, 3.0, 4.0, 4.5, 4.2, 4.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "validate", lambda *_: {"validation/loss": next(losses)})
        loop.train(dataclasses.replace(config, steps=8))
        loop.train(config)  # a resumed run remembers which was best
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [4, 6, 12]


def test_a_profile_is_recorded(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=4, profile=(2, 3))
    loop.train(config)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
