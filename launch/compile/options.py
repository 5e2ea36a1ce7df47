"""The options of `launch.compile`, which are read before JAX is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from magnet_jax.arguments import RARE, Between
from magnet_jax.config import (
    ComputeDtype,
    Count,
    DecodeConfig,
    KernelConfig,
    MeshConfig,
    Preset,
    Remat,
    SamplingMeshConfig,
    Whole,
)

FRAME_RATE = 50  # frames a second of the published codecs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    topology: Annotated[str, tyro.conf.arg(metavar="CHIPS")]
    """What to compile for: v5e:2x2, v5p:2x2x1, v6e:4x8, h100:8, h100:4x8 (hosts x GPUs), cpu:1 and
    so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Target):
    """The program that turns the tokens of a batch of texts into audio."""

    model: Literal["small", "medium"] = "small"
    """Model to compile: small has 420 M parameters, medium has 1.8 B."""
    seconds: Annotated[float, Between(1, 600)] = 10.0
    """Length of a clip."""
    batch_size: Count = 1
    """Clips generated at once."""
    text_tokens: Count = 64
    """Positions that cross-attention sees."""
    preset: Preset | None = None
    """Decoding steps by name, as for launch.sample."""
    decode: DecodeConfig = DecodeConfig()
    """How a MAGNeT decodes."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of matrix products and their weights. auto is float32 on a CPU, else bfloat16."""
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    """How many of the topology's devices are used."""
    kernels: Annotated[KernelConfig, RARE] = KernelConfig()
    """How attention is computed."""
    tokens_only: bool = False
    """End the program in tokens, for PyTorch to decode, instead of in samples."""
    without: Annotated[tuple[str, ...], RARE] = ()
    """Savings to do without, to see what they are worth: fields of decode.magnet.Savings."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for everything that was found out, costs of one device and of a clip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Target):
    config: str = "music_small_10s"
    """A config of configs/."""
    mesh: MeshConfig = MeshConfig()
    """How many devices each mesh axis gets. Without --mesh.fsdp, steps are compiled to find the
    smallest fsdp and the fewest parts that fit."""
    batch_size: Count | None = None
    """Clips in a global batch. The config has a default."""
    clips_per_device: Whole = 0
    """Clips that a device computes at once. 0 is as many as fit, or all with --mesh.fsdp."""
    remat: Remat | None = None
    """What the backward pass computes again. The config has a default; auto is the least that fits,
    or with --mesh.fsdp the least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Step):
    """One training step of a config, in the average over its stages."""

    compute_dtype: ComputeDtype = "auto"
    """Precision of matrix products. auto is float32 on a CPU, else bfloat16."""
    stage: Whole | None = None
    """Compile the step of this codebook alone. That of 0 sees all frames unless the config has
    model.first_context; those above it see model.local_context, and share a program."""
    search: bool = False
    """Rank all that is left open of mesh, parts and --remat by the time of a step, on TPUs. This
    compiles for an hour or more, once: what was found out is kept."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for everything that was found out, costs of one device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Step):
    """What a run will take, without data: mesh, parameters, memory, hours and chip-hours.

    Without --mesh.fsdp the compiler is asked, which takes minutes, and says how much memory a step
    takes. Hours follow from the model's operations and from --mfu.
    """

    mfu: Annotated[float, Between(0, 1, above=True)] = 0.4
    """Share of the chips' peak that the run is expected to reach. The paper's sizes reach 0.35 to
    0.5 on current chips."""
