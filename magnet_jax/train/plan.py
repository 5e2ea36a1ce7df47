"""How much memory of a device a training step takes, and the mesh and parts with which it fits.

State is counted from its shapes and shardings. Activations follow from what the backward pass
keeps of a layer; the estimate is held against compiled programs in the tests. Where the mesh is
left open and memory is not ample, the compiler itself is asked.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magnet_jax.config import RunConfig
from magnet_jax.errors import UserError
from magnet_jax.io import machine
from magnet_jax.model import attention, patterns, sharding, t5
from magnet_jax.train import chips, distributed, steps
from magnet_jax.train.steps import StepSettings

USABLE = 0.9  # share of a device's memory; the rest is the compiler's and the runtime's
AMPLE = 0.5  # share up to which the estimate is believed without asking the compiler


class Memory(NamedTuple):
    """Bytes on one device."""

    state: int  # parameters, average, optimizer
    frozen: int  # parameters that are not trained
    gradients: int  # and, where the batch is computed in parts, their sum
    gathered: int  # of parameters split over fsdp: two layers, the embeddings and a head, whole
    a_clip: int  # activations of a clip
    device: int | None  # all there is; None: unknown

    def total(self, clips: int) -> int:
        """Of a step that computes `clips` clips at once."""
        return sum(self[:4]) + clips * self.a_clip


def tree_bytes(tree: Any, *, tile: int = 1) -> int:
    """Bytes on one device of arrays, or of shapes with shardings.

    `tile`: what the device rounds one axis up to, that which suits best: 128 on TPUs.
    """

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        padding = min((-(-n // tile) * tile / n for n in shape), default=1.0)
        return int(math.prod(shape) * padding) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _keys_with_scores(settings: StepSettings, num_frames: int) -> int:
    """Keys for which a frame's scores are kept, at the stage that sees most."""
    model, kernels = settings.model, settings.kernels
    near = model.first_context and model.local_context  # (then no stage attends to everything)
    if model.kind == "hybrid" or (kernels.local if near else kernels.full) in ("cudnn", "splash"):
        return 0  # a fused kernel leaves none behind; a hybrid makes them anew
    if not near or kernels.local == "dense":
        return num_frames
    context = model.widest_context
    return min(num_frames, max(kernels.local_block, 2 * context) + 2 * context)


def activation_bytes(settings: StepSettings, num_frames: int, text_tokens: int) -> int:
    """What the forward pass of a clip leaves for the backward pass, and what a layer needs."""
    if settings.model.kind == "hybrid":
        num_frames = patterns.num_steps(num_frames, settings.model.delays)
    model, size = settings.model, jnp.dtype(settings.dtype).itemsize
    tensor = settings.mesh.shape["tensor"]
    t, d, f = num_frames, model.width, model.mlp_ratio * model.width
    n = model.num_heads // tensor
    width_each = d // tensor  # of heads, all of a device's
    scores = n * t * _keys_with_scores(settings, t) * (4 + size)
    cross = n * t * text_tokens * (4 + size)
    kept_by_name = 2 * t * width_each * size  # attended, self and cross
    products = t * size * (4 * width_each + 3 * d + 2 * f // tensor)
    whole = (
        t * d * (3 * (size + 4) + 6 * size)  # norms and the residual stream
        + t * width_each * size * 6
        + t * f // tensor * 4 * size  # MLP: before and after GELU, and the erf between
        + scores
        + cross
    )
    kept = {"none": whole, "products": products, "attention": kept_by_name, "full": 0}[
        settings.remat
    ]
    carried = t * d * size
    layers = model.num_layers * (kept + carried)
    # The layer that is computed again, and its gradients; then logits with theirs.
    working = 0 if settings.remat == "none" else whole
    logits = 3 * t * model.codebook_size * 4
    if model.kind == "hybrid":  # scores of a block of queries, as they are made anew
        working += 2 * n * attention.HYBRID_BLOCK * t * (4 + size)
    text = model.num_layers * text_tokens * width_each * 2 * size * 2
    return int(layers + working + max(whole, logits) + text)


def memory(settings: StepSettings, num_frames: int, text_tokens: int, device: int | None) -> Memory:
    """What a training step takes of each device of the mesh, of `device` bytes."""
    state, _ = steps.state_shardings(settings)
    frozen, _ = steps.frozen_shardings(settings)
    tile = 128 if settings.mesh.devices.flat[0].platform == "tpu" else 1
    params = tree_bytes(state["params"], tile=tile)
    # Adapters are merged into a second copy of the transformer, whose gradients come before theirs.
    merged = 2 * tree_bytes(frozen["lm"], tile=tile) if settings.lora.rank else 0
    gathered = 0
    if settings.mesh.shape["fsdp"] > 1:
        model, size = settings.model, jnp.dtype(settings.dtype).itemsize
        d = model.width
        layer = (8 + 2 * model.mlp_ratio) * d * d // settings.mesh.shape["tensor"]
        tables = model.num_codebooks * (model.codebook_size + 1) * d
        gathered = 2 * layer * (size + 4) + 2 * tables * 4
    return Memory(
        state=tree_bytes(state, tile=tile),
        frozen=tree_bytes(frozen, tile=tile),
        gradients=2 * params + merged,  # and updates, or the sum over parts
        gathered=gathered,
        a_clip=activation_bytes(settings, num_frames, text_tokens),
        device=device,
    )


def device_memory() -> int | None:
    """Bytes that each of this process's devices has; None where nothing tells.

    CPU devices share the machine's.
    """
    local = jax.local_devices()
    device = local[0]
    if device.platform == "cpu":
        shared = machine.memory_bytes()
        return None if shared is None else shared // len(local)
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = chips.chip_of(device)
    return None if chip is None else chip.device_bytes


def clips_that_fit(planned: Memory, share: int, asked: int) -> int:
    """How many of its `share` clips of a batch a device computes at once.

    Args:
      planned: from `memory`.
      share: clips of a batch that are a device's.
      asked: `RunConfig.clips_per_device`; 0 takes as many as fit.

    Raises:
      UserError: not even one fits, or not those asked for; says what would help.
    """
    wanted = min(asked or 1, share)
    if planned.device is not None and planned.total(wanted) > USABLE * planned.device:
        fixed = sum(planned[:4])
        most = int((USABLE * planned.device - fixed) // planned.a_clip)
        if fixed > USABLE * planned.device:
            remedy = "split the parameters over more devices (--mesh.fsdp)"
        elif most >= 1:
            remedy = f"--clips-per-device {most} would fit, or 0 for as many as do"
        else:
            remedy = "recompute more (--remat full) or take a shorter --data.segment-seconds"
        raise UserError(
            f"a step with {wanted} clip(s) a device takes {planned.total(wanted) / 1e9:.1f} GB of "
            f"its {planned.device / 1e9:.1f}: state {planned.state / 1e9:.1f}, gradients "
            f"{planned.gradients / 1e9:.1f}, frozen and gathered parameters "
            f"{(planned.frozen + planned.gathered) / 1e9:.1f}, and {planned.a_clip / 1e9:.2f} a "
            f"clip; {remedy}"
        )
    if asked or planned.device is None:
        return min(asked, share) or share
    room = USABLE * planned.device - sum(planned[:4])
    return min(share, int(room // planned.a_clip))


def num_parts(settings: StepSettings, batch_size: int, asked: int, planned: Memory) -> int:
    """In how many parts a batch is computed.

    Raises `UserError` for a batch that the mesh cannot share, and where no clip fits.
    """
    steps.count_parts(batch_size, batch_size, settings.mesh)  # checks that it can be shared
    share = batch_size // sharding.num_rows(settings.mesh)
    return steps.count_parts(batch_size, clips_that_fit(planned, share, asked), settings.mesh)


def peak_bytes(
    settings: StepSettings, batch_size: int, num_frames: int, text_tokens: int
) -> int | None:
    """Memory that the compiled steps take of a device; None where the compiler finds no room.

    Compiles the step of the first codebook and that of the others.
    """
    peaks = []
    for stage in (0, 1):
        lowered = steps.lower(settings, batch_size, num_frames, text_tokens, stage)
        try:
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        live = found.argument_size_in_bytes + found.temp_size_in_bytes
        peaks.append(max(found.peak_memory_in_bytes, live))
    return max(peaks)


def _parts_to_try(
    settings: StepSettings, batch_size: int, asked: int, planned: Memory
) -> list[int]:
    """In how many parts a batch may be computed, fewest first: none where the state has no room."""
    fixed = planned.state + planned.frozen
    if planned.device is not None and fixed > USABLE * planned.device:
        return []
    most = steps.count_parts(batch_size, asked or 1, settings.mesh)
    if asked:
        return [most]
    try:
        fewest = num_parts(settings, batch_size, 0, planned)
    except UserError:  # the estimate has room for no clip; the compiler may have
        fewest = most
    share = batch_size // sharding.num_rows(settings.mesh)
    return [parts for parts in range(fewest, most + 1) if share % parts == 0]


def choose(
    config: RunConfig,
    t5_config: t5.T5Config,
    dtype: jnp.dtype,
    num_frames: int,
    device: int | None,
    devices: list[jax.Device] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[StepSettings, Memory]:
    """The programs of a run, on the smallest `mesh.fsdp` and in the fewest parts that fit.

    Where the config settles the mesh, and wherever memory is ample, the estimate decides. Else
    the steps are compiled, and have to fit as the compiler measures them. All processes of a run
    call this together, with the same arguments.

    Args:
      config: of the run.
      t5_config: of its text encoder.
      dtype: of activations.
      num_frames: frames of a clip.
      device: bytes that each device has; None where nothing tells.
      devices: of the run; all there are by default.
      say: gets a line before something is compiled.

    Raises:
      UserError: mesh, model and batch do not go together, or no mesh has room for a step.
    """
    batch, asked, tokens = config.data.batch_size, config.clips_per_device, config.text.max_tokens
    choices = sharding.mesh_choices(config.mesh, len(devices or jax.devices()))
    for choice in choices:
        if choice.fsdp > 1 and config.model.width % choice.fsdp and len(choices) > 1:
            continue
        mesh = sharding.make_mesh(choice, devices)
        settings = steps.make_settings(config, t5_config, dtype, num_frames, mesh)
        planned = memory(settings, num_frames, tokens, device)
        if len(choices) == 1:
            return dataclasses.replace(
                settings, num_parts=num_parts(settings, batch, asked, planned)
            ), planned
        for parts in _parts_to_try(settings, batch, asked, planned):
            settings = dataclasses.replace(settings, num_parts=parts)
            clips = batch // sharding.num_rows(mesh) // parts
            if device is None or planned.total(clips) <= AMPLE * device:
                return settings, planned
            say(
                f"asking the compiler whether a step has room with mesh.fsdp {choice.fsdp} and "
                f"{clips} clip(s) a device at once, which may take minutes"
            )
            peak = peak_bytes(settings, batch, num_frames, tokens)
            if not distributed.agree(peak is None or peak > USABLE * device):
                return settings, planned
    raise UserError(
        f"no mesh of these {mesh.size} devices has room for a step: by the estimate one clip at "
        f"once takes {planned.total(1) / 1e9:.1f} GB of the {device / 1e9:.1f} of a device, with "
        f"mesh.fsdp {mesh.shape['fsdp']}; recompute more (--remat full), take a shorter "
        "--data.segment-seconds, split the model (--mesh.tensor) or take more devices"
    )
