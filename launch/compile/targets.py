"""Hardware to compile for without having it: its devices by name.

JAX compiles for devices that are described instead of attached: TPUs by way of libtpu, GPUs by way
of JAX's CUDA plugin and a description of the chip (`assets/targets`). Neither looks for hardware.
"""

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.train.chips import CHIPS, Chip

KNOWN = (
    "v5e:1x1, v5e:2x2, v5e:4x8 and other rectangles; v6e the same; v4:2x2x1, v5p:2x2x1, "
    "v5p:4x4x4 and other boxes; h100:1, h100:8, h100:4x8 (hosts x GPUs); cpu:1"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for."""

    name: str
    platform: str
    """'tpu', 'gpu' or 'cpu', as `jax.Device.platform` has it."""
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    """None for a CPU, of which nothing is known."""


def load(name: str) -> Target:
    """The devices of a topology, none of which need be there.

    JAX itself is told to run on the CPU alone: it shall not look for the hardware.

    Args:
      name: chip and shape, one of `KNOWN`.

    Raises:
      UserError: the topology is unknown, or what compiles for it is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu:1":
        return Target(name=name, platform="cpu", devices=tuple(jax.devices("cpu")[:1]), chip=None)
    size = "[1-9][0-9]*"  # of 0, libtpu would die
    if re.fullmatch(f"(v5e|v6e):{size}x{size}|(v4|v5p):{size}x{size}x{size}", name):
        if max(map(int, name.split(":")[1].split("x"))) > 16:  # of more, libtpu would die
            raise UserError(f"{name}: a slice has at most 16 chips along an axis")
        platform, devices = "tpu", _tpu_devices(name)
    elif found := re.fullmatch(f"h100:(?:({size})x)?({size})", name):
        platform, devices = "gpu", _gpu_devices(name, int(found[1] or 1), int(found[2]))
    else:
        raise UserError(f"unknown topology {name!r}; there are {KNOWN}")
    return Target(
        name=name, platform=platform, devices=tuple(devices), chip=CHIPS[name.split(":")[0]]
    )


def _tpu_devices(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"{name}: libtpu, which knows TPUs, is not installed: pip install "
            '"magnet-jax[aot-tpu]", or libtpu==0.0.52'
        )
    for variable, value in {
        # Ask no metadata server, and be content with a host that is none of a TPU's.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # The lock is for processes that share a TPU; compiling takes none.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as error:  # jax.errors.JaxRuntimeError among them
        if "lockfile" in str(error):
            raise UserError(
                f"{name}: another process has libtpu loaded and ALLOW_MULTIPLE_LIBTPU_LOAD is off: "
                "unset it, or wait for the other"
            ) from error
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error


def _gpu_devices(name: str, hosts: int, devices: int) -> list[jax.Device]:
    description = ASSETS / "targets" / f"{name.split(':')[0]}.txtpb"
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=name.split(":")[0],
            target_config=description.read_text(),
            topology=f"1x{hosts}x{devices}",
        ).devices
    except NotImplementedError:
        raise UserError(
            f"{name}: compiling for GPUs needs JAX's CUDA plugin: pip install "
            '"magnet-jax[aot-gpu]", or "jax-cuda13-plugin[with-cuda]==0.10.2" and '
            "jax-cuda13-pjrt==0.10.2"
        ) from None
    except RuntimeError as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
