"""A run that is killed and goes on ends with the bits of one that nothing interrupted."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from constants import XLA_FLAGS
from several import drawn

from magnet_jax.checkpoints import run_folder
from magnet_jax.config import RunConfig, to_json
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import sharding
from magnet_jax.train import loop, plan, steps, watch
from magnet_jax.train.setup import set_up


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        yield


def final_state(config: RunConfig) -> dict:
    t5_config, _, _ = t5_files.load("embedded")
    mesh = sharding.make_mesh(config.mesh)
    settings = steps.make_settings(config, t5_config, np.dtype("float32"), 30, mesh)
    abstract, _ = steps.state_shardings(settings)
    with run_folder.open_manager(config) as manager:
        return run_folder.restore(manager, config.steps, **abstract)


def assert_equal_trees(one, other):
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=jax.tree_util.keystr(path))


def test_killed_at_any_step_and_resumed_equals_never_killed(tmp_path):
    tiny.write_noise(tmp_path / "tokens", {"train": 20})
    finished = tiny.run_config(tmp_path / "tokens", tmp_path / "whole")
    loop.train(finished)
    config = dataclasses.replace(finished, out=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(to_json(config))
    script = (
        "import sys; from pathlib import Path; from magnet_jax.train import loop; "
        "from magnet_jax.config import RunConfig, from_json; "
        "loop.train(from_json(RunConfig, Path(sys.argv[1])))"
    )
    rng = drawn()
    for wanted in (rng.integers(1, 16),):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "config.json")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"XLA_FLAGS": XLA_FLAGS},
        )
        deadline = time.monotonic() + 240
        while tiny.newest_step(Path(config.out)) < wanted:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    loop.train(config)
    assert_equal_trees(final_state(config), final_state(finished))
    lines = [line for line in watch.read_scalars(Path(config.out)) if "train/loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    whole = [line for line in watch.read_scalars(Path(finished.out)) if "train/loss" in line]
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in whole]


def test_a_run_goes_on_with_the_mesh_parts_and_recomputation_that_it_began_with(
    tmp_path, monkeypatch, capsys
):
    """Others would add up in another order; and the compiler's figures may change."""
    tiny.write_noise(tmp_path / "tokens", {"train": 8})
    config = tiny.run_config(tmp_path / "tokens", tmp_path / "run", steps=1)
    share = config.data.batch_size
    peak = lambda settings, *_: 10**9 * share // settings.num_parts  # noqa: E731
    monkeypatch.setattr(plan, "peak_bytes", peak)
    monkeypatch.setattr(plan, "device_memory", lambda: 10**9 * (share - 1))
    assert set_up(config).settings.num_parts == 2
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(plan, "device_memory", lambda: 10**9 * 2 * share)
    assert set_up(config).settings.num_parts == 2
    assert "another mesh, parts or remat" not in capsys.readouterr().out
    changed = dataclasses.replace(config, remat="full")
    assert set_up(changed).settings.num_parts == 1  # which is chosen anew
    assert f"--remat none --clips-per-device {share // 2}" in capsys.readouterr().out
    assert set_up(changed).settings.remat == "full"
    monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]] * 2)
    before = plan.read_choice(Path(config.out))
    assert plan.as_before(changed, before) is None and before.chosen.remat == "full"
    (tmp_path / "run" / "step.json").write_text("{")
    with pytest.raises(UserError, match=r"step.json: not valid JSON .*; remove it, and mesh"):
        set_up(config)
