"""Compiles programs for hardware that is not there, and says what they cost.

python -m launch.compile decode --topology v5e:2x2 --model small --seconds 10
python -m launch.compile train --topology v5e:4x8 --config music_medium_30s
python -m launch.compile train --topology v5e:4x8 --config music_medium_30s --search
python -m launch.compile plan --topology v5e:4x8 --config music_medium_30s

It needs no weights, and no TPU or GPU: pip install "magnet-jax[aot-tpu]" or "magnet-jax[aot-gpu]".
Memory, FLOPs, copies and collectives are those of the program. Seconds are the TPU compiler's
estimate, good to about a third, which leaves out kernels, sorts and collectives.
"""

import importlib
import os
from typing import Annotated

import tyro

from launch.compile.options import Decode, Plan, Train
from magnet_jax import cli
from magnet_jax.arguments import check_fields
from magnet_jax.errors import reported

Command = (
    Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)
MODULES = {Decode: "decoding", Train: "training", Plan: "planning"}


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(Command, argv, prog="python -m launch.compile", description=__doc__)
    check_fields(args, "--")
    module = "search" if getattr(args, "search", False) else MODULES[type(args)]
    importlib.import_module(f"launch.compile.{module}").run(args)


if __name__ == "__main__":
    # JAX would keep programs that only a machine with the devices can read back.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with reported():
        main()
