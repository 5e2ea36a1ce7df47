"""Where arrays live: the mesh, the table of logical axes, and the shardings of a train state.

The mesh has the axes ("data", "fsdp", "tensor"). A batch is split over data and fsdp; parameters,
optimizer moments and averages over fsdp and tensor. The same tree of shardings serves
initialisation, the step and checkpoint restoration.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax.config import MeshConfig, ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.model import transformer

AXES = ("data", "fsdp", "tensor")
LOGICAL_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": None, "layers": None}


def mesh_choices(config: MeshConfig, num_devices: int) -> list[MeshConfig]:
    """The meshes that a config allows, the smallest fsdp first: one, unless it leaves fsdp open."""
    if config.fsdp:
        return [config]
    if config.tensor < 1 or num_devices % config.tensor:
        return [dataclasses.replace(config, fsdp=1)]
    rest = num_devices // config.tensor
    if config.data != -1:  # then fsdp is what is left
        return [dataclasses.replace(config, fsdp=max(rest // max(config.data, 1), 1))]
    sizes = [size for size in range(1, rest + 1) if rest % size == 0]
    return [dataclasses.replace(config, fsdp=size) for size in sizes]


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices; one axis may be -1 and takes what the others leave.

    An open fsdp is the smallest that the other axes allow; `plan.choose` looks at memory.
    """
    devices = jax.devices() if devices is None else devices
    config = mesh_choices(config, len(devices))[0]
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {sizes}: axes must be positive, and at most one of them -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        given = f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
        if -1 in (config.data, config.fsdp, config.tensor):
            remedy = "the other axes must divide that number"
        else:
            remedy = "their product must be that number; -1 for data takes what the others leave"
        raise UserError(f"{given} does not fit {len(devices)} devices: {remedy}")
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(sizes: list[int], devices: list) -> np.ndarray:
    """Devices in the mesh's shape, neighbours in the mesh being neighbours in the network.

    Slices of TPUs see each other over the data centre's network alone. The data axis crosses it,
    and fsdp only as far as data has fewer rows than there are slices. Beside TPUs the order of
    the devices is kept, in which those of a host stand together.

    Raises `UserError` where an axis would have to be split unevenly over slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} cannot be split over {slices} slices: "
            "make mesh.data a multiple of the slices"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // over_data, fsdp // over_fsdp, tensor),
        (over_data, over_fsdp, 1),
        devices,
        allow_split_physical_axes=True,
    )


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises `UserError` for a mesh that cannot split the model's parameters evenly."""
    for axis, what, size in (
        ("fsdp", "model.width", config.width),
        ("tensor", "model.num_heads", config.num_heads),
        ("tensor", "the width of the MLP", config.mlp_ratio * config.width),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"mesh.{axis} {mesh.shape[axis]} does not divide {what} {size}")
    # Every process reads its own rows of a batch, which all devices of such a group share.
    for group in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        if len({device.process_index for device in group}) > 1:
            raise UserError(
                f"mesh.tensor {mesh.shape['tensor']} would reach over the devices of one process: "
                "use a smaller one, and --mesh.fsdp for the rest"
            )


def num_rows(mesh: Mesh) -> int:
    """How many ways a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over the data and fsdp axes."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def parts_sharding(mesh: Mesh) -> NamedSharding:
    """Parts of a batch [M, B / M], of which every device has its rows."""
    return NamedSharding(mesh, P(None, ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def model_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Shardings of the transformer's parameter tree, from the logical axes its module names."""

    def resolve(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        axes = [LOGICAL_AXES[name] if name else None for name in variable.out_sharding]
        assert len(axes) == len(shape)  # Flax has named the layers' axis
        return NamedSharding(mesh, P(*axes))

    state = nnx.state(transformer.abstract(config), nnx.Param)
    resolved = jax.tree.map(resolve, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(resolved)


def text_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a text encoder's parameters: over fsdp, on the last axis that it divides."""

    def resolve(leaf: Any) -> NamedSharding:
        axes = [None] * leaf.ndim
        for axis in reversed(range(leaf.ndim)):
            if leaf.shape[axis] % mesh.shape["fsdp"] == 0 and leaf.ndim > 1:
                axes[axis] = "fsdp"
                break
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(resolve, tree)


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes and where they live, for restoring a checkpoint and compiling ahead of time."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def like_params(tree: Any, param_shardings: dict, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameter tree among replicated scalars.

    Every subtree of `tree` with the parameters' structure gets their shardings: the moments and
    averages of an optax state, whatever transformations are chained.
    """
    structure = jax.tree.structure(param_shardings)
    is_copy = lambda node: jax.tree.structure(node) == structure  # noqa: E731
    return jax.tree.map(
        lambda node: param_shardings if is_copy(node) else replicated(mesh), tree, is_leaf=is_copy
    )
