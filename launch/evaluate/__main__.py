"""The command line of the evaluation; see the package."""

import sys
from collections.abc import Sequence

from launch import evaluate
from launch.evaluate import settings, stages
from magnet_jax import cli, errors


def main(words: Sequence[str]) -> None:
    """Does what the words ask for."""
    stages.run(
        cli.parse(
            settings.Args, words, prog="python -m launch.evaluate", description=evaluate.__doc__
        )
    )


if __name__ == "__main__":
    with errors.reported():
        main(sys.argv[1:])
