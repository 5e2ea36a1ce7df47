"""All commands of the project: magnet-jax NAME OPTIONS is python -m launch.NAME OPTIONS.

magnet-jax sample --checkpoint demo --prompt "A calm melody on the harp" --out wavs
magnet-jax sample --help
"""

import ast
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from magnet_jax import errors
from magnet_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, str]:
    """What each command does, by its name: the first lines of the modules that are commands.

    Those of launch/ are named without it. Files are read and not imported, which is quick.
    """
    found = {}
    for path in sorted([*ROOT.glob("launch/**/*.py"), *ROOT.glob("tokenization/*.py")]):
        for module in re.findall(r'prog="python -m ([\w.]+)', path.read_text(encoding="utf-8")):
            place = ROOT.joinpath(*module.split("."))
            files = (place.with_suffix(".py"), place / "__init__.py", place / "__main__.py", path)
            docs = (
                ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
                for file in files
                if file.exists()
            )
            line = next(filter(None, docs), "").partition("\n")[0]
            found[module.removeprefix("launch.")] = line.partition(": python -m")[0].rstrip(".")
    return dict(sorted(found.items()))


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    with errors.reported():
        known = commands()
        if words[:1] in (["--version"], ["version"]):
            print(version("magnet-jax"))
            return
        if not words or words[0] in ("-h", "--help", "help"):
            print(__doc__)
            width = max(map(len, known))
            print(*(f"  {name:{width}}  {what}" for name, what in known.items()), sep="\n")
            return
        name = words[0]
        if name not in known:
            from magnet_jax import cli  # tyro is slower to load than all else here

            near = cli.did_you_mean(name, known) or " magnet-jax alone lists them"
            raise UserError(f"unknown command {name}:{near}")
    module = name if name.startswith("tokenization.") else f"launch.{name}"
    sys.argv = [f"magnet-jax {name}", *words[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
