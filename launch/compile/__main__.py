"""Compiles programs for hardware that is not there, and says what they cost.

python -m launch.compile decode --topology v5e:2x2 --model small --seconds 10
python -m launch.compile train --topology v5e:4x8 --config music_medium_30s

Needs no weights, and no TPU or GPU: pip install "magnet-jax[aot-tpu]" or "magnet-jax[aot-gpu]".
Memory, FLOPs, copies and collectives are those of the program; seconds are the TPU compiler's
estimate, good to about a third, which leaves out kernels, sorts and collectives.
"""

from typing import Annotated

import jax
import tyro

from launch.compile import decoding, training
from magnet_jax import cli
from magnet_jax.errors import reported

Command = (
    Annotated[decoding.Decode, tyro.conf.subcommand("decode")]
    | Annotated[training.Train, tyro.conf.subcommand("train")]
)


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(Command, argv, prog="python -m launch.compile", description=__doc__)
    {decoding.Decode: decoding.run, training.Train: training.run}[type(args)](args)


if __name__ == "__main__":
    # JAX would keep programs that only a machine with the devices can read back.
    jax.config.update("jax_enable_compilation_cache", False)
    with reported():
        main()
