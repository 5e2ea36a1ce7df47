"""The mesh that a run chooses, and where its devices stand."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny

from magnet_jax.config import MeshConfig, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import sharding
from magnet_jax.train import plan


def choose(config: RunConfig, device: int | None):
    t5_config, _, _ = t5_files.load("embedded")
    said = []
    chosen = plan.choose(config, t5_config, np.dtype("float32"), 30, device, say=said.append)
    return *chosen, said


def test_an_open_mesh_is_the_smallest_whose_steps_fit_as_compiled(monkeypatch):
    monkeypatch.setattr(plan, "peak_bytes", functools.cache(plan.peak_bytes))
    config = tiny.run_config(Path("x"), Path("y"))
    settings, _, _ = choose(config, None)

    def peak(fsdp):
        mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp))
        return plan.peak_bytes(dataclasses.replace(settings, mesh=mesh), 8, 30, 16)

    whole, halves = peak(1), peak(2)
    assert halves < whole
    for device, fsdp in ((whole, 1), (halves, 2)):
        found, taken, said = choose(config, int(device / plan.USABLE) + 1)
        assert (found.mesh.shape["fsdp"], found.num_parts, taken) == (fsdp, 1, device)
        assert found.mesh.size == 8 and said
    with pytest.raises(UserError, match="no mesh of these 8 devices has room.*--mesh.tensor"):
        choose(config, 100_000)


def test_a_batch_is_computed_in_the_fewest_parts_that_fit(monkeypatch):
    config = tiny.run_config(Path("x"), Path("y"), mesh=MeshConfig(data=2, fsdp=4))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=64))
    params = plan.param_bytes(choose(config, None)[0])
    clip = 10 * params  # at once, of the eight that are a device's
    peak = lambda settings, batch_size, *_: params + clip * (8 // settings.num_parts)  # noqa: E731
    monkeypatch.setattr(plan, "peak_bytes", peak)
    for clips, parts in ((9, 1), (8, 1), (7, 2), (3, 4), (1, 8)):
        found, taken, said = choose(config, int((params + clips * clip) / plan.USABLE) + 1)
        assert found.num_parts == parts and taken == params + clip * (8 // parts)
        assert len(said) == (1, 2, 4, 8).index(parts) + 1
    few = dataclasses.replace(config, clips_per_device=2)
    assert choose(few, 100 * clip)[0].num_parts == 4
    with pytest.raises(UserError, match="fsdp 4 and 1 clip.* needs .* GB; .*--remat full"):
        choose(config, clip)
    monkeypatch.setattr(plan, "peak_bytes", lambda *_: None)  # the compiler itself found no room
    with pytest.raises(UserError, match="fsdp 4 and 2 clip.* needs more; .*--clips-per-device"):
        choose(few, 100 * clip)
    with pytest.raises(UserError, match="for parameters and their moments"):
        choose(config, params)


def test_nothing_is_compiled_where_no_memory_is_known(monkeypatch):
    monkeypatch.setattr(plan, "peak_bytes", None)
    config = tiny.run_config(Path("x"), Path("y"))
    for mesh, shape in (
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=2), (2, 4, 1)),  # what is left is fsdp's
        (MeshConfig(tensor=2), (4, 1, 2)),
    ):
        settings, peak, said = choose(dataclasses.replace(config, mesh=mesh), None)
        assert settings.mesh.devices.shape == shape and peak is None and not said
    assert plan.device_memory() is None  # of a CPU


class Chip(NamedTuple):
    """What JAX's meshes ask of a device of a TPU."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU of a test"

    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        place = self.id // 2  # within the slice, a square of chips
        return (place % 2, place // 2 % 2, place // 4)

    @property
    def process_index(self) -> int:
        return self.id // 4


@pytest.mark.parametrize(
    ("sizes", "slices_of_rows"),
    [
        ((2, 4, 2), [[0], [1]]),  # fsdp and tensor stay within a slice
        ((4, 2, 2), [[0], [0], [1], [1]]),
        ((1, 8, 2), [[0, 1]]),  # no data axis to cross the slices
    ],
)
def test_the_data_axis_crosses_slices(sizes, slices_of_rows):
    chips = [Chip(i, i % 2) for i in range(16)]  # in an order that does not show slices
    grid = sharding.device_grid(list(sizes), chips)
    assert grid.shape == sizes and len(set(grid.flat)) == 16
    assert [sorted({chip.slice_index for chip in row.flat}) for row in grid] == slices_of_rows
    # The tensor axis never crosses.
    for group in grid.reshape(-1, sizes[2]):
        assert len({chip.slice_index for chip in group}) == 1


def test_axes_that_slices_do_not_divide_are_refused():
    with pytest.raises(UserError, match="make mesh.data a multiple"):
        sharding.device_grid([1, 1, 16], [Chip(i, i % 2) for i in range(16)])
