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
    return chosen[0], said


def test_an_open_mesh_is_the_smallest_whose_steps_fit_as_compiled(monkeypatch):
    monkeypatch.setattr(plan, "peak_bytes", functools.cache(plan.peak_bytes))
    config = tiny.run_config(Path("x"), Path("y"))
    settings, _ = choose(config, None)

    def peak(fsdp):
        mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp))
        return plan.peak_bytes(dataclasses.replace(settings, mesh=mesh), 8, 30, 16)

    whole, halves = peak(1), peak(2)
    assert halves < whole
    for device, fsdp in ((whole, 1), (halves, 2)):
        found, said = choose(config, int(device / plan.USABLE) + 1)
        assert (found.mesh.shape["fsdp"], found.num_parts) == (fsdp, 1)
        assert found.mesh.size == 8 and said
    with pytest.raises(UserError, match="no mesh of these 8 devices has room.*--mesh.tensor"):
        choose(config, 100_000)


def test_nothing_is_compiled_where_memory_is_ample_or_the_mesh_is_given(monkeypatch):
    monkeypatch.setattr(plan, "peak_bytes", None)
    config = tiny.run_config(Path("x"), Path("y"))
    assert choose(config, 10**9) == choose(config, None)
    assert dict(choose(config, 10**9)[0].mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    for mesh, shape in (
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=2), (2, 4, 1)),  # what is left is fsdp's
        (MeshConfig(tensor=2), (4, 1, 2)),
    ):
        chosen, _ = choose(dataclasses.replace(config, mesh=mesh), 10**9)
        assert chosen.mesh.devices.shape == shape
    with pytest.raises(UserError, match="--mesh.fsdp"):
        choose(dataclasses.replace(config, mesh=MeshConfig(fsdp=1)), 100_000)


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
