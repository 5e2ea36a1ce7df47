"""The command line of the benchmarks; see the package."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from launch import benchmark
from launch.benchmark import (
    autoregressive,
    compiling,
    decoding,
    editing,
    importing,
    loading,
    savings,
    tokenizing,
    tradeoff,
    training,
)
from magnet_jax import cli, errors
from magnet_jax.io import machine

Command = (
    Annotated[loading.Args, tyro.conf.subcommand("loader", description=loading.Args.__doc__)]
    | Annotated[decoding.Args, tyro.conf.subcommand("decode", description=decoding.Args.__doc__)]
    | Annotated[
        autoregressive.Args,
        tyro.conf.subcommand("autoregressive", description=autoregressive.Args.__doc__),
    ]
    | Annotated[training.Args, tyro.conf.subcommand("train", description=training.Args.__doc__)]
    | Annotated[compiling.Args, tyro.conf.subcommand("compile", description=compiling.Args.__doc__)]
    | Annotated[
        tokenizing.Args, tyro.conf.subcommand("tokenize", description=tokenizing.Args.__doc__)
    ]
    | Annotated[savings.Args, tyro.conf.subcommand("savings", description=savings.Args.__doc__)]
    | Annotated[tradeoff.Args, tyro.conf.subcommand("tradeoff", description=tradeoff.Args.__doc__)]
    | Annotated[importing.Args, tyro.conf.subcommand("import", description=importing.Args.__doc__)]
    | Annotated[editing.Args, tyro.conf.subcommand("editing", description=editing.Args.__doc__)]
)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the words (None: of the process) ask for."""
    machine.keep_freed()  # as training, sampling and tokenization do
    args = cli.parse(
        Command, words, prog="python -m launch.benchmark", description=benchmark.__doc__
    )
    measure = {
        loading.Args: loading.measure,
        decoding.Args: decoding.measure,
        autoregressive.Args: autoregressive.measure,
        training.Args: training.measure,
        compiling.Args: compiling.measure,
        tokenizing.Args: tokenizing.measure,
        savings.Args: savings.measure,
        tradeoff.Args: tradeoff.measure,
        importing.Args: importing.measure,
        editing.Args: editing.measure,
    }
    measure[type(args)](args)


if __name__ == "__main__":
    with errors.reported():
        main()
