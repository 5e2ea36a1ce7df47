"""What is computed again, the mesh and the parts of a batch, with which a step fits its devices.

The compiler is asked how much memory the steps take.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magnet_jax.checkpoints import run_folder
from magnet_jax.config import KernelConfig, MeshConfig, Remat, RunConfig, from_json, to_json
from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.model import sharding, t5
from magnet_jax.train import chips, distributed, steps
from magnet_jax.train.steps import StepSettings

USABLE = 0.9  # share of a device's memory; the rest is the compiler's and the runtime's
# Frames of a part on a device. Of fewer, where parameters are split, it takes a v5e or an H100
# longer to gather weights and to add up their gradients (8 bytes each, at 90 and 450 GB/s) than to
# multiply by them (6 operations a frame).
LEAST_FRAMES = 3000


def device_memory() -> int | None:
    """Bytes that each of this process's devices has; None where nothing tells, as of CPUs."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = chips.chip_of(device)
    return limit or (chip and chip.device_bytes)


def tree_bytes(tree: Any) -> int:
    """Bytes on one device of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def param_bytes(settings: StepSettings) -> int:
    """Bytes on one device of parameters, average and optimizer, and of what is not trained."""
    return tree_bytes((steps.state_shardings(settings)[0], steps.frozen_shardings(settings)[0]))


def lower(
    settings: StepSettings, batch_size: int, num_frames: int, text_tokens: int, stage: int
) -> jax.stages.Lowered:
    """`steps.train_step`, traced with shapes in place of arrays: to compile it without any data."""
    shapes = {
        "codes_BKT": ((settings.model.num_codebooks, num_frames), jnp.int32),
        "valid_BT": ((num_frames,), jnp.bool_),
        "text_ids_BS": ((text_tokens,), jnp.int32),
        "text_mask_BS": ((text_tokens,), jnp.bool_),
        "seed_B": ((), jnp.int32),
    }
    rows, whole = sharding.batch_sharding(settings.mesh), sharding.replicated(settings.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }
    key = jax.eval_shape(jax.random.key, 0)
    return steps.train_step.lower(
        steps.state_shardings(settings)[0],
        steps.frozen_shardings(settings)[0],
        batch,
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        settings=settings,
        local=stage > 0,
    )


def peak_bytes(
    settings: StepSettings, batch_size: int, num_frames: int, text_tokens: int
) -> int | None:
    """Memory that the compiled steps take of a device; None where the compiler finds no room.

    Compiles the step of the first codebook and that of the others.
    """
    programs = []
    for stage in (0, 1):
        lowered = lower(settings, batch_size, num_frames, text_tokens, stage)
        try:
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        programs.append(
            {
                "peak_bytes": found.peak_memory_in_bytes,
                "argument_bytes": found.argument_size_in_bytes,
                "temp_bytes": found.temp_size_in_bytes,
                "code_bytes": found.generated_code_size_in_bytes,
            }
        )
    return peak_of(programs)


def peak_of(programs: Sequence[Mapping[str, Any]]) -> int:
    """What programs that take turns take of a device's memory, by the compiler's figures in bytes.

    The code of all stays there; a TPU's, with layers written out, is a gigabyte.
    """
    peaks = (max(one["peak_bytes"], one["argument_bytes"] + one["temp_bytes"]) for one in programs)
    return max(peaks) + sum(one["code_bytes"] for one in programs)


def parts_to_try(batch_size: int, clips_per_device: int, mesh: jax.sharding.Mesh) -> list[int]:
    """In how many equal parts a batch, of all devices, may be computed, fewest first.

    Raises `UserError` for a batch that the mesh cannot share.
    """
    rows = sharding.num_rows(mesh)
    if batch_size % rows:
        raise UserError(
            f"data.batch_size {batch_size} is not a multiple of the {rows} devices that share it "
            "(mesh.data x mesh.fsdp)"
        )
    share = batch_size // rows
    parts = [n for n in range(1, share + 1) if share % n == 0]
    return [next(n for n in parts if share // n <= clips_per_device)] if clips_per_device else parts


def kept_bytes(settings: StepSettings, clips: int, num_frames: int) -> int:
    """The least that a device keeps of `clips` for the backward pass: what `remat` says it does."""
    model, tensor = settings.model, settings.mesh.shape["tensor"]
    # In widths of the model, of a layer: its input and two sums; queries, keys and values; what is
    # attended; the MLP.
    whole, split = {
        "none": (3, 4 + 2 + model.mlp_ratio),  # and more, which the compiler knows
        "products": (3, 4 + 2 + model.mlp_ratio),
        "mlp": (3, 4 + 2),
        "attention": (1, 2),
        "full": (1, 0),
    }[settings.remat]
    numbers = clips * num_frames * model.width * model.num_layers
    return int(numbers * (whole + split / tensor)) * settings.dtype.itemsize


def candidates(
    config: RunConfig,
    t5_config: t5.T5Config,
    dtype: jnp.dtype,
    num_frames: int,
    devices: list[jax.Device] | None = None,
) -> Iterator[StepSettings]:
    """All that a config leaves open: least computed again, then smallest fsdp, then fewest parts.

    Parts of fewer than `LEAST_FRAMES` come last, where they would gather parameters.

    Raises `UserError` where mesh, model and batch do not go together.
    """
    all_devices = devices or jax.devices()
    choices, batch = sharding.mesh_choices(config.mesh, len(all_devices)), config.data.batch_size
    each, later = steps.remats(config.remat, all_devices[0].platform), []
    for remat, choice in itertools.product(each, choices):
        if choice.fsdp > 1 and config.model.width % choice.fsdp and len(choices) > 1:
            continue
        mesh = sharding.make_mesh(choice, devices)
        settings = steps.make_settings(config, t5_config, dtype, num_frames, mesh)
        for parts in parts_to_try(batch, config.clips_per_device, mesh):
            frames = batch // sharding.num_rows(mesh) // parts * num_frames
            found = dataclasses.replace(settings, remat=remat, num_parts=parts)
            if mesh.shape["fsdp"] > 1 and parts > 1 and frames < LEAST_FRAMES:
                later.append(found)
            else:
                yield found
    yield from later


def choose(
    config: RunConfig,
    t5_config: t5.T5Config,
    dtype: jnp.dtype,
    num_frames: int,
    device: int | None,
    devices: list[jax.Device] | None = None,
    say: Callable[[str], None] = print,
    first: RunConfig | None = None,
) -> tuple[StepSettings, int | None]:
    """A run's settings, the first of its `candidates` that fit, and its peak.

    The steps are compiled, and have to fit as the compiler measures them. All processes of a run
    call this together, with the same arguments. `device` is the bytes that each device has; None
    asks nobody, takes the first choice and gives no peak. `say` gets a line before a compilation.
    The candidates of `first` go before all others.

    Raises `UserError` where mesh, model and batch do not go together, or no mesh has room.
    """
    batch, text_tokens, tried = config.data.batch_size, config.text.max_tokens, ""
    each = (
        candidates(one, t5_config, dtype, num_frames, devices) for one in (first, config) if one
    )
    for settings in itertools.chain.from_iterable(each):
        if device is None:
            return settings, None
        clips = batch // sharding.num_rows(settings.mesh) // settings.num_parts
        tried = (
            f"mesh.fsdp {settings.mesh.shape['fsdp']}, {clips} clip(s) a device at once and "
            f"remat {settings.remat}"
        )
        fixed = param_bytes(settings)
        if fixed > USABLE * device:
            tried += f" needs {fixed / 1e9:.1f} GB for parameters and their moments"
            continue
        if (least := fixed + kept_bytes(settings, clips, num_frames)) > USABLE * device:
            tried += f" needs more than {least / 1e9:.1f} GB"
            continue
        say(f"compiling a step with {tried}, to see whether it fits: this may take minutes")
        peak = peak_bytes(settings, batch, num_frames, text_tokens)
        if not distributed.agree(peak is None or peak > USABLE * device):
            return settings, peak
        tried += f" needs {'more' if peak is None else f'{peak / 1e9:.1f} GB'}"
    raise UserError(
        f"no mesh of these {settings.mesh.size} devices has room for a step: of the "
        f"{device / 1e9:.1f} GB of a device, {tried}; recompute more (--remat full), take a "
        "shorter --data.segment-seconds, fewer --clips-per-device, split the parameters "
        "(--mesh.fsdp, --mesh.tensor) or take more devices"
    )


# --- what a run has chosen ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The settings of `RunConfig` that say how a step is computed, as asked for or as chosen."""

    mesh: MeshConfig
    remat: Remat
    clips_per_device: int
    kernels: KernelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for on what devices, and what was chosen."""

    devices: int
    device_kind: str
    asked: Layout
    chosen: Layout


def _asked(config: RunConfig) -> Layout:
    return Layout(
        mesh=config.mesh,
        remat=config.remat,
        clips_per_device=config.clips_per_device,
        kernels=config.kernels,
    )


def choice(config: RunConfig, settings: StepSettings) -> Choice:
    """What was chosen on these devices for what a config asks."""
    devices, asked = jax.devices(), _asked(config)
    share = config.data.batch_size // sharding.num_rows(settings.mesh)
    chosen = dataclasses.replace(
        asked,
        mesh=MeshConfig(**settings.mesh.shape),
        remat=settings.remat,
        clips_per_device=share // settings.num_parts,
    )
    kind = devices[0].device_kind
    return Choice(devices=len(devices), device_kind=kind, asked=asked, chosen=chosen)


def write_choice(run: Path, made: Choice) -> None:
    """Keeps in a run's folder what was chosen, for `read_choice` to find when the run goes on."""
    files.write_text(run / run_folder.STEP, to_json(made))


def read_choice(run: Path) -> Choice | None:
    """What was chosen when a run was last begun or taken up; None where that is not known.

    Raises `UserError` for a damaged file.
    """
    path = run / run_folder.STEP
    if not path.exists():
        return None
    try:
        return from_json(Choice, path)
    except UserError as error:
        raise UserError(f"{error}; remove it, and mesh and parts are chosen anew") from None


def as_before(config: RunConfig, before: Choice | None) -> RunConfig | None:
    """A config with what was chosen before; None where devices, or what is asked, are others."""
    devices = jax.devices()
    here = len(devices), devices[0].device_kind, _asked(config)
    if before is None or here != (before.devices, before.device_kind, before.asked):
        return None
    return dataclasses.replace(config, **vars(before.chosen))


def changed(before: Choice | None, now: Choice) -> str:
    """What to say where a run goes on with other choices than before; '' where it does not."""
    if before is None or before.chosen == now.chosen:
        return ""
    was = before.chosen
    return (
        "note: the run goes on with another mesh, parts or remat than before, and so not with the "
        f"same bits; before: {mesh_options(vars(was.mesh)) or 'one device'}, --remat {was.remat} "
        f"--clips-per-device {was.clips_per_device}"
    )


def mesh_options(sizes: Mapping[str, int]) -> str:
    """A mesh as it is asked for on a command line; '' for one device."""
    return " ".join(f"--mesh.{name} {size}" for name, size in sizes.items() if size > 1)
