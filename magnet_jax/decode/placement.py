"""How sampling runs on the hardware: kernels and a mesh."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax import programs
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import encodec
from magnet_jax.config import KernelConfig, ModelConfig, SamplingMeshConfig
from magnet_jax.decode.magnet import ALL_SAVINGS, Savings
from magnet_jax.decode.segments import Between
from magnet_jax.errors import UserError
from magnet_jax.model import precision

AXES = ("data", "guidance", "frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How sampling runs on the hardware. It changes nothing but the rounding of floats."""

    kernels: KernelConfig = KernelConfig()
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    savings: Savings = ALL_SAVINGS
    say: programs.Say | None = None
    """Takes a line when a program is compiled, and one when it is done."""
    between: Between | None = None
    """Has a MAGNeT's clips made in segments, and is called after each; it may raise, and the clips
    are left. Other kinds of models, and meshes, have no segments, and call nothing."""


def place(decoder: encodec.Decoder, execution: Execution) -> encodec.Decoder:
    """The decoder with its parameters on all devices, as `prepare` does with the model's."""
    mesh = sampling_mesh(execution.mesh)
    if mesh.size == 1:
        return decoder
    return decoder._replace(params=jax.device_put(decoder.params, NamedSharding(mesh, P())))


def sampling_mesh(config: SamplingMeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of these devices (this machine's), or all of them.

    Raises `UserError` if there are not as many.
    """
    devices = jax.devices() if devices is None else devices
    others = config.guidance * config.frames
    data = max(len(devices) // others, 1) if config.data == -1 else config.data
    if data * others > len(devices):
        raise UserError(
            f"mesh data={data} guidance={config.guidance} frames={config.frames} needs "
            f"{data * others} devices; there are {len(devices)}"
        )
    grid = np.asarray(devices[: data * others]).reshape(data, config.guidance, config.frames)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def prepare(loaded: Loaded, execution: Execution = Execution()) -> Loaded:
    """The model as it is sampled from: weights in the precision of the products, on all devices.

    Nothing needs it; without, weights are rounded at every step and sent at every call.

    Raises `UserError` where the model cannot be run so.
    """
    check_execution(loaded.config.model, execution)
    return on_devices(loaded, execution)


def on_devices(loaded: Loaded, execution: Execution) -> Loaded:
    """`prepare` for a model that may be another's rescorer, which runs where that one does."""
    dtype, mesh = precision.compute_dtype(loaded.config), sampling_mesh(execution.mesh)
    place = NamedSharding(mesh, P()) if mesh.size > 1 else mesh.devices.item()
    params = jax.device_put(loaded.params, place)
    t5_params = jax.device_put(loaded.t5_params, place)
    if dtype != jnp.float32:
        params = params | {"lm": precision.round_weights(params["lm"], dtype)}
        t5_params = precision.round_weights(t5_params, dtype)
    return loaded._replace(params=params, t5_params=t5_params)


def check_execution(model: ModelConfig, execution: Execution) -> None:
    """Raises `UserError` for what a model of kind musicgen or hybrid does not have."""
    mesh = dataclasses.replace(execution.mesh, data=1)
    asked = (mesh, execution.kernels)
    if model.autoregressive and asked != (SamplingMeshConfig(), KernelConfig()):
        raise UserError(
            f"a model of kind {model.kind} has one kernel of attention, and splits a batch alone: "
            "leave out kernels, mesh.guidance and mesh.frames"
        )
