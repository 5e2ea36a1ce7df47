"""What a checkpoint's items hold: whole or not saved, whatever the folder is called."""

import logging
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny

from magnet_jax.checkpoints import items, run_folder
from magnet_jax.errors import UserError

STATE = {
    "params": {"w": jnp.arange(6.0).reshape(2, 3), "deep": {"b": jnp.zeros(5), "n": jnp.int32(7)}},
    "ema": {"w": jnp.ones((2, 3))},
}


def save(config, steps) -> None:
    manager = run_folder.open_manager(config)
    with run_folder.closing(manager):
        for step in steps:
            run_folder.save(manager, step, STATE, {"next": step})


def restored(config, step: int) -> dict:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), STATE)
    with run_folder.open_manager(config) as manager:
        return run_folder.restore(manager, step, **shapes, data=None)


@pytest.mark.parametrize(
    "name", ["run[1]", "run[!1]", "run*", "r?n", "sweep[lr=1]/run", "{a,b}", "a#b%20 c", "[", "~"]
)
def test_a_folder_may_have_any_name(tmp_path, name):
    config = tiny.run_config("x", tmp_path / name, keep_last=2)
    save(config, (2, 4, 6))
    found = restored(config, 6)
    assert found.pop("data") == {"next": 6}
    jax.tree.map(np.testing.assert_array_equal, found, STATE)


def test_a_pattern_is_that_of_no_other_folder(tmp_path):
    for name in ("run1", "run*"):
        (tmp_path / name / "ocdbt.process_0").mkdir(parents=True)
    (tmp_path / "run*" / "other").mkdir()
    (tmp_path / "run*" / "deeper[1]" / "process_0").mkdir(parents=True)
    folder = items.Literal(tmp_path / "run*")
    assert [path.as_posix() for path in folder.glob("ocdbt.*")] == [
        f"{tmp_path}/run*/ocdbt.process_0"
    ]
    assert [path.name for path in folder.glob("deeper[1]/process_*")] == ["process_0"]
    assert list(folder.glob("nowhere/*")) == []


async def skipped(*_, **__) -> None:
    pass


async def without_a_chunk(directory, **keywords) -> None:
    await merged(directory, **keywords)
    base = {"driver": "file", "path": f"{directory}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store.delete_range(tensorstore.KvStore.KeyRange("w/0", "w/1")).result()


merged = ocp.type_handlers.merge_ocdbt_per_process_files


@pytest.mark.parametrize("merge", [skipped, without_a_chunk])
def test_what_is_not_whole_replaces_no_older_one(tmp_path, monkeypatch, capfd, merge):
    config = tiny.run_config("x", tmp_path / "run", keep_last=1)
    save(config, (2,))
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.type_handlers, "merge_ocdbt_per_process_files", merge)
        with pytest.raises(
            UserError, match="cannot be written: what was written is not whole.*are of steps: 2;"
        ):
            save(config, (4,))
    assert capfd.readouterr().err == ""  # the line is all that there is to say
    assert logging.getLogger("absl").level < logging.CRITICAL  # now as before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert restored(config, 2)["data"] == {"next": 2}
    save(config, (4,))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]


def test_when_one_read_fails_the_others_are_waited_for(tmp_path, monkeypatch):
    """None of them reports afterwards, and nothing of the process is changed meanwhile."""
    large = {"params": {f"w{i}": jnp.arange(200_000.0) + i for i in range(60)}}
    config = tiny.run_config("x", tmp_path / "run")
    manager = run_folder.open_manager(config)
    with run_folder.closing(manager):
        run_folder.save(manager, 2, large, {})
    stores = (tmp_path / "run" / "checkpoints" / "2" / "params").rglob("d/*")
    largest = max(stores, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    late = []
    monkeypatch.setattr(sys, "unraisablehook", late.append)
    hook = sys.unraisablehook
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), large)
    for _ in range(3):
        damaged = pytest.raises(UserError, match="checkpoints/2: damaged")
        with run_folder.open_manager(config) as manager, damaged:
            run_folder.restore(manager, 2, **shapes)
        assert sys.unraisablehook is hook
    time.sleep(0.2)
    assert late == []
