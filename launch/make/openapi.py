"""Writes the API's description, which is under version control.

python -m launch.make.openapi
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from magnet_jax import cli, errors
from magnet_jax.io.files import replacing_file

OUT = Path(__file__).parents[2] / "docs" / "openapi.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = OUT
    """The file to write."""


def description() -> str:
    """The API as JSON; no model has a say in it."""
    from magnet_jax.serving import http  # JAX is slow to load
    from magnet_jax.serving.access import Access
    from magnet_jax.serving.limits import Limits

    app = http.create_app(SimpleNamespace(limits=Limits()), Access())
    return json.dumps(app.openapi(), indent=1, sort_keys=True) + "\n"


def main(args: Args) -> None:
    with replacing_file(args.out) as file:
        file.write_text(description(), encoding="utf-8")


if __name__ == "__main__":
    with errors.reported():
        main(cli.parse(Args, prog="python -m launch.make.openapi", description=__doc__))
