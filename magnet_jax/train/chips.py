"""What a chip can do, as its maker says."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    name: str
    peak_flops: float  # operations a second of dense bfloat16 products
    bandwidth: float  # bytes a second to its memory
    gib: int  # of memory
    # Cycles a second of what the TPU compiler counts: the peak over the operations a cycle of the
    # matrix units, which is 1.5 GHz for v5e. None for GPUs, whose compiler estimates nothing.
    clock: float | None
    kinds: tuple[str, ...]  # what `jax.Device.device_kind` of its devices begins with
    devices: int = 1  # that JAX sees in it

    @property
    def device_bytes(self) -> int:
        return self.gib * 2**30 // self.devices

    @property
    def device_flops(self) -> float:
        return self.peak_flops / self.devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 32, 1.05e9, ("TPU v4",), devices=2),
        Chip("v5e", 197e12, 819e9, 16, 1.5e9, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 2765e9, 95, 1.75e9, ("TPU v5p", "TPU v5")),
        Chip("v6e", 918e12, 1640e9, 32, 1.75e9, ("TPU v6",)),
        Chip("h100", 989e12, 3350e9, 80, None, ("NVIDIA H100",)),
        Chip("a100", 312e12, 1555e9, 40, None, ("NVIDIA A100",)),
        Chip("h200", 989e12, 4800e9, 141, None, ("NVIDIA H200",)),
    )
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device's chip: the one whose name its own begins with; else None."""
    kind = device.device_kind
    # The longest name counts: 'TPU v5' is v5p, and v5e is 'TPU v5 lite'.
    named = [
        (len(name), chip) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)
    ]
    return max(named, default=(0, None))[1]
