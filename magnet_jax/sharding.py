"""Where arrays live: the mesh, the table of logical axes, and the shardings of a train state.

The mesh has the axes ("data", "fsdp", "tensor"). A batch is split over data and fsdp; parameters,
optimizer moments and averages over fsdp and tensor. The same tree of shardings serves
initialisation, the step and checkpoint restoration.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax import transformer
from magnet_jax.config import MeshConfig, ModelConfig
from magnet_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
LOGICAL_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": None, "layers": None}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices; one axis may be -1 and takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {sizes}: axes must be positive, and at most one of them -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit "
            f"{len(devices)} devices; set mesh.data to -1"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over the data and fsdp axes."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def model_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Shardings of the transformer's parameter tree, from the logical axes its module names."""

    def resolve(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        axes = [LOGICAL_AXES[name] if name else None for name in variable.out_sharding]
        # An axis that the mesh does not divide is kept whole: small models on many devices.
        axes = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        ]
        return NamedSharding(mesh, P(*axes))

    state = nnx.state(transformer.abstract(config), nnx.Param)
    resolved = jax.tree.map(resolve, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(resolved)


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
