"""The mesh that a run chooses, and where its devices stand."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from magnet_jax.config import MeshConfig, ModelConfig, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import sharding, transformer
from magnet_jax.train import plan, steps


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
    with pytest.raises(UserError, match="fsdp 4, 1 clip.* none needs .* GB; .*--remat full"):
        choose(config, clip)
    monkeypatch.setattr(plan, "peak_bytes", lambda *_: None)  # the compiler itself found no room
    with pytest.raises(UserError, match="fsdp 4, 2 clip.* none needs more; .*--clips-per-device"):
        choose(few, 100 * clip)
    with pytest.raises(UserError, match="for parameters and their moments"):
        choose(config, params)


def test_as_little_as_fits_is_computed_again(monkeypatch):
    """The least of what is computed again goes first, and what cannot fit is not compiled."""
    monkeypatch.setattr(steps, "remats", lambda asked, platform: tuple(transformer.KEPT))
    monkeypatch.setattr(plan, "LEAST_FRAMES", 30)
    config = tiny.run_config(Path("x"), Path("y"), mesh=MeshConfig(data=4, fsdp=2))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=16))
    base = choose(config, None)[0]
    assert (base.remat, base.num_parts) == ("products", 1)
    params = plan.param_bytes(base)
    kept = {
        (remat, clips): plan.kept_bytes(dataclasses.replace(base, remat=remat), clips, 30)
        for remat in transformer.KEPT
        for clips in (1, 2)
    }
    most = [kept[remat, 2] for remat in transformer.KEPT]
    assert most == sorted(most, reverse=True)

    def peak(settings, batch_size, *_):
        return params + 2 * kept[settings.remat, 2 // settings.num_parts]

    monkeypatch.setattr(plan, "peak_bytes", peak)
    fitting = ("products", 1), ("products", 2), ("mlp", 2), ("attention", 2), ("full", 2)
    for remat, parts in fitting:
        device = int((params + 2 * kept[remat, 2 // parts]) / plan.USABLE) + 1
        found, _, said = choose(config, device)
        assert (found.remat, found.num_parts) == (remat, parts)
        assert f"remat {remat}" in said[-1]
        # Nothing was compiled that keeps more than there is room for.
        for line in said:
            clips = int(line.partition(" clip(s)")[0].split()[-1])
            tried = line.partition("remat ")[2].split(",")[0]
            assert params + kept[tried, clips] <= device
    with pytest.raises(UserError, match="remat full needs more than .* GB"):
        choose(config, int((params + kept["full", 1] / 2) / plan.USABLE))


def test_parts_of_few_frames_come_last_where_they_gather_parameters(monkeypatch):
    monkeypatch.setattr(steps, "remats", lambda asked, platform: ("products", "full"))
    monkeypatch.setattr(plan, "LEAST_FRAMES", 60)
    t5_config, _, _ = t5_files.load("embedded")

    def tried(**sizes):
        config = tiny.run_config(Path("x"), Path("y"), mesh=MeshConfig(**sizes))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=32))
        each = plan.candidates(config, t5_config, np.dtype("float32"), 30)
        return [(one.remat, one.num_parts) for one in each]

    parts = (
        [("products", 1), ("products", 2), ("products", 4)],
        [("full", 1), ("full", 2), ("full", 4)],
    )
    few = [("products", 4), ("full", 4)]  # a clip of 30 frames at once, of four
    assert tried(data=8, fsdp=1) == parts[0] + parts[1]
    assert tried(data=4, fsdp=2) == parts[0][:2] + parts[1][:2] + few


@pytest.mark.parametrize("remat", transformer.KEPT)
def test_the_backward_pass_keeps_what_is_counted(remat):
    """By the shapes of what it is given, beside parameters and what is small."""
    model = ModelConfig(codebook_size=32, width=64, num_heads=2, num_layers=3, text_width=8)
    settings = dataclasses.replace(
        choose(tiny.run_config(Path("x"), Path("y"), mesh=MeshConfig(tensor=1)), None)[0],
        model=model, remat=remat,
    )  # fmt: skip
    params = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
    text = transformer.TextStates(
        jax.ShapeDtypeStruct((4, 1, 64), jnp.float32),
        jax.ShapeDtypeStruct((4, 1), jnp.bool_),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    codes_BKT = jax.ShapeDtypeStruct((4, 4, 200), jnp.int32)

    def kept(params, codes_BKT, text):
        def trunk(params):
            return transformer.bind(model, params).trunk(codes_BKT, text, local=True, remat=remat)

        return jax.vjp(trunk, params)[1]

    shapes = jax.tree.leaves(jax.eval_shape(kept, params, codes_BKT, text))
    activations = sum(x.size * 4 for x in shapes if x.ndim >= 4 and x.shape[:3] == (3, 4, 200))
    least = plan.kept_bytes(settings, 4, 200)
    assert least <= activations <= 1.05 * least


def test_the_code_of_all_programs_stays_in_memory():
    first = dict(peak_bytes=5, argument_bytes=2, temp_bytes=4, code_bytes=10)
    other = dict(peak_bytes=7, argument_bytes=1, temp_bytes=1, code_bytes=20)
    assert plan.peak_of([first]) == 16 and plan.peak_of([first, other]) == 37


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
