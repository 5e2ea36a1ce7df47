"""The command line of the benchmarks; see the package."""

import importlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from launch import benchmark
from launch.benchmark.options import (
    Autoregressive,
    Decode,
    Editing,
    Loader,
    Long,
    Loops,
    Serving,
    Texts,
    Tokenize,
    Tradeoff,
    Train,
)
from magnet_jax import cli, errors
from magnet_jax.io import machine

MODULES = {
    Loader: "loading",
    Decode: "decoding",
    Autoregressive: "autoregressive",
    Train: "training",
    Tokenize: "tokenizing",
    Tradeoff: "tradeoff",
    Editing: "editing",
    Serving: "serving",
    Texts: "steering",
    Loops: "loops",
    Long: "long",
}
Command = (
    Annotated[Loader, tyro.conf.subcommand("loader")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Autoregressive, tyro.conf.subcommand("autoregressive")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Tradeoff, tyro.conf.subcommand("tradeoff")]
    | Annotated[Editing, tyro.conf.subcommand("editing")]
    | Annotated[Serving, tyro.conf.subcommand("serving")]
    | Annotated[Texts, tyro.conf.subcommand("text")]
    | Annotated[Loops, tyro.conf.subcommand("loops")]
    | Annotated[Long, tyro.conf.subcommand("long")]
)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the words (None: of the process) ask for."""
    machine.keep_freed()  # as training, sampling and tokenization do
    args = cli.parse(
        Command, words, prog="python -m launch.benchmark", description=benchmark.__doc__
    )
    importlib.import_module(f"launch.benchmark.{MODULES[type(args)]}").measure(args)


if __name__ == "__main__":
    with errors.reported():
        main()
