"""The command line of the ablations; see the package."""

import sys
from collections.abc import Sequence
from typing import Any

from launch import ablate
from launch.ablate.settings import Command, Common
from magnet_jax import cli, errors
from magnet_jax.io import machine


def run(args: Common) -> dict[str, Any]:
    """Does what is left of a study; returns what `report.gather` then finds.

    Raises `UserError` for what cannot be had, before anything is trained or generated, and for
    runs and cells of other settings.
    """
    from launch.ablate import report, work  # JAX is slow to load
    from launch.ablate.plan import plan
    from launch.evaluate import stages

    study, pieces, evaluation = plan(args)

    def write() -> tuple[dict[str, Any], str]:
        with work.held(args.out, args.out / study.name, wait=True):
            found = report.gather(args.out, study, args.seeds)
            return found, report.write(args.out, found)

    if not all(piece.is_made for piece in pieces):
        # What all cells share of the real clips; several processes would get in each other's way.
        with work.held(args.out, args.out / "cache", wait=True):
            stages.prepare(evaluation)
    work.make_all(pieces, args.out, write)
    found, table = write()
    print(f"\n{table}")
    print(", ".join(f"{args.out / study.name}.{suffix}" for suffix in ("json", "md", "png")))
    return found


def main(words: Sequence[str]) -> None:
    """Does what the words ask for."""
    machine.keep_freed()
    run(cli.parse(Command, words, prog="python -m launch.ablate", description=ablate.__doc__))


if __name__ == "__main__":
    with errors.reported():
        main(sys.argv[1:])
