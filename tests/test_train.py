"""Training: resumed exactly, the same on one device and on eight, clear about what is wrong."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from launch.train import config_names, load_config
from magnet_jax import checkpoint, codec, data, pretrained, records, sharding, t5, train
from magnet_jax.config import ASSETS, MeshConfig, ModelConfig, RunConfig, from_json, to_json
from magnet_jax.errors import UserError


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
    train.train(config)
    return config


def final_state(config: RunConfig) -> dict:
    _, t5_params, _ = t5.load(config.text.source)
    abstract, _ = train.state_shardings(config, t5_params, sharding.make_mesh(config.mesh))
    with checkpoint.open_manager(config) as manager:
        return checkpoint.restore(manager, config.steps, **abstract)


def assert_equal_trees(one, other):
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=jax.tree_util.keystr(path))


def newest_step(run: Path) -> int:
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def test_killed_at_any_step_and_resumed_equals_never_killed(finished, tmp_path):
    config = dataclasses.replace(
        finished, out=str(tmp_path / "killed"), eval_every=0, sample_every=0
    )
    (tmp_path / "config.json").write_text(to_json(config))
    script = (
        "import sys; from pathlib import Path; from magnet_jax import train; "
        "from magnet_jax.config import RunConfig, from_json; "
        "train.train(from_json(RunConfig, Path(sys.argv[1])))"
    )
    seed = int.from_bytes(os.urandom(4))
    print("moments of the kills drawn with seed", seed)
    rng = np.random.default_rng(seed)
    for wanted in (5, 15):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "config.json")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        deadline = time.monotonic() + 240
        while newest_step(Path(config.out)) < wanted:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    train.train(config)
    assert_equal_trees(final_state(config), final_state(finished))
    lines = [line for line in train.read_scalars(Path(config.out)) if "train/loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    whole = [line for line in train.read_scalars(Path(finished.out)) if "train/loss" in line]
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in whole]


def test_a_finished_run_holds_what_the_readme_promises(finished):
    out = Path(finished.out)
    assert newest_step(out) == 30
    assert len(list((out / "checkpoints").iterdir())) == finished.keep_last
    assert list((out / "tensorboard").iterdir())
    scalars = train.read_scalars(out)
    assert [line["step"] for line in scalars if "train/loss" in line] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in scalars if "validation/loss_3" in line] == [15, 30]
    assert [path.name for path in sorted((out / "samples" / "step_0000030").iterdir())] == [
        "00.wav",
        "prompts.txt",
    ]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tokens, tmp_path):
    """Whatever the folder was left with, and with other settings if need be."""
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    write_text = records.write_text
    for fatal in ("codec.json", "config.json"):

        def dying(path, text, fatal=fatal):
            if path.name == fatal:
                raise KeyboardInterrupt
            write_text(path, text)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(records, "write_text", dying)
            train.set_up(config)
    train.set_up(dataclasses.replace(config, seed=5))
    train.train(config)
    assert newest_step(Path(config.out)) == 1
    with pytest.raises(UserError, match="other settings: seed"):
        train.set_up(dataclasses.replace(config, seed=5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no run .thesis.tex."):
        train.set_up(dataclasses.replace(config, out=str(tmp_path / "other")))


def test_going_on_with_another_data_set_is_refused(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    train.train(config)
    tiny.write_noise(tmp_path / "other", {"train": 9})
    moved = dataclasses.replace(config.data, path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not the data set"):
        train.train(dataclasses.replace(config, steps=2, data=moved))
    shutil.copytree(tokens, tmp_path / "copy")
    copied = dataclasses.replace(config.data, path=str(tmp_path / "copy"))
    train.train(dataclasses.replace(config, steps=2, data=copied))


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
        ("decode", {"steps": (1, 1)}, "one number a codebook"),
    ],
)
def test_impossible_settings_are_refused(section, settings, message):
    config = RunConfig()
    with pytest.raises(UserError, match=message):
        if section:
            settings = {section: dataclasses.replace(getattr(config, section), **settings)}
        dataclasses.replace(config, **settings)


def test_sigterm_saves_and_exits(tokens, tmp_path):
    config = tiny.run_config(tokens, tmp_path / "run", steps=1000, save_every=1000)
    step = train.train_step

    def interrupting(*args, **kwargs):
        if newest_step(Path(config.out)) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupting)
        with pytest.raises(SystemExit) as exit_:
            train.train(config)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert newest_step(Path(config.out)) == 1


def test_eight_devices_equal_one(tokens):
    """Two steps on (2, 2, 2) devices and on one."""
    config = tiny.run_config(tokens, Path("unused"))
    # Adam blows the rounding of gradients near zero up to whole steps; a large eps does not.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eps=1e-3))
    t5_config, t5_params, tokenizer = t5.load(config.text.source)
    batches = data.make_train_iterator(
        config.data, frames=30, num_codebooks=4, tokenizer=tokenizer, max_tokens=16, seed=0
    )
    rows = [next(batches) for _ in range(2)]
    results = []
    for sizes, devices in ((dict(data=1), 1), (dict(data=2, fsdp=2, tensor=2), 8)):
        mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
        _, shardings = train.state_shardings(config, t5_params, mesh)
        init = functools.partial(train.init_state, config)
        state = jax.jit(init, out_shardings=shardings)(t5_params)
        for batch in rows:
            state, metrics = train.train_step(
                state, None, train.to_devices(batch, mesh), jax.random.key(0), 2,
                config=config, t5_config=t5_config, local=True, dtype=np.dtype("float32"),
                mesh=mesh,
            )  # fmt: skip
        spec = state["params"]["lm"]["blocks"]["mlp"]["up"].sharding.spec
        if devices == 8:
            assert spec == jax.P(None, "fsdp", "tensor")
        same = jax.tree.map(
            lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings
        )
        assert all(jax.tree.leaves(same))
        assert state["opt"][1][0].mu["lm"]["blocks"]["mlp"]["up"].sharding.spec == spec
        results.append(jax.device_get((state["params"], metrics["loss"])))
    for one, eight in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*config_names(), "music_small_10s_span5_full"])
def test_every_config_is_built(name):
    """Shapes alone; ablations differ in settings that change no shape."""
    config = load_config(name)
    _, t5_params, _ = t5.load("embedded")
    state, _ = train.state_shardings(config, t5_params, sharding.make_mesh(config.mesh))
    stack = state["params"]["lm"]["blocks"]["mlp"]["up"].shape
    width = config.model.width
    assert stack == (config.model.num_layers, width, 4 * width)


@pytest.mark.parametrize("name", ["demo", "music_small_10s", "sound_small"])
def test_configs_are_stepped(name, tokens, tmp_path):
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
    train.train(shrunken)
    assert newest_step(Path(shrunken.out)) == 2


def test_config_survives_json(tmp_path):
    config = load_config("demo")
    (tmp_path / "config.json").write_text(to_json(config))
    assert from_json(RunConfig, tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"seed"', '"sead"'), "missing or unknown settings: sead, seed"),
        (lambda text: text[:50], "not valid JSON"),
        (lambda text: text.replace('"width": 128', '"width": "128"'), "width must be of type int"),
        (lambda text: text.replace('"auto"', '"half"'), "compute_dtype must be one of"),
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
        train.train(dataclasses.replace(config, model=model))
    model = dataclasses.replace(config.model, text_width=768)
    with pytest.raises(UserError, match="text_width is 768: set --model.text-width 128"):
        train.train(dataclasses.replace(config, model=model))
    with pytest.raises(UserError, match="no_such_folder"):
        missing = dataclasses.replace(config.data, path=str(tmp_path / "no_such_folder"))
        train.train(dataclasses.replace(config, data=missing))
    with pytest.raises(UserError, match="other settings: seed .was 0, now 1."):
        train.train(dataclasses.replace(finished, seed=1))
    with pytest.raises(UserError, match="even multiple"):
        ModelConfig(width=30, num_heads=4)


def test_tokens_of_another_codec_are_refused(finished, tmp_path):
    spec = codec.load_codec("embedded").spec
    example = {
        "codes": np.zeros((4, 60), np.int16), "caption": "x", "info": "{}", "track_id": "x",
        "source_path": "x", "start": 0.0, "duration": 1.2,
    }  # fmt: skip
    other = dataclasses.replace(spec, sha256="0" * 64)
    tiny.write_data_set(tmp_path / "tokens", {"train": [example] * 8}, other)
    moved = dataclasses.replace(finished.data, path=str(tmp_path / "tokens"))
    with pytest.raises(UserError, match="tokenize again"):
        train.train(dataclasses.replace(finished, data=moved))


def test_a_resumed_run_reads_its_own_text_encoder(tokens, tmp_path):
    source = tmp_path / "text"
    shutil.copytree(ASSETS / "text", source)
    config = tiny.run_config(tokens, tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, source=str(source), finetune=False)
    )
    train.train(config)
    shutil.rmtree(source)
    train.train(dataclasses.replace(config, steps=2))
    assert newest_step(Path(config.out)) == 2


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


def test_data_set_and_records_go_together(tokens):
    assert records.read_codec_spec(tokens) == codec.load_codec("embedded").spec
