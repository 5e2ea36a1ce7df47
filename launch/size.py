"""How large the code is: lines by folder, and the functions that are too long or take too much.

python -m launch.size
"""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("magnet_jax", "tokenization", "launch", "configs", "tests")
MOST_ARGUMENTS = 10
MOST_LINES = 80


def functions(path: Path) -> list[tuple[str, int, int]]:
    """Name, arguments (without self) and lines of every function of a file, nested ones too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            names = [a.arg for a in args.posonlyargs + args.args + args.kwonlyargs]
            count = len([name for name in names if name not in ("self", "cls")])
            found.append((node.name, count, node.end_lineno - node.lineno + 1))
    return found


def main() -> None:
    lines, exceeding = Counter(), []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT)
            count = len(path.read_text(encoding="utf-8").splitlines())
            for part in place.parents:
                lines[part.as_posix()] += count
            if folder != "tests":
                exceeding += [(place, *function) for function in functions(path)]
    for place in sorted(lines):
        if place != ".":
            print(f"{lines[place]:7,}  {place}")
    print(f"{lines['.']:7,}  in all")
    for what, at, most in (("arguments", 2, MOST_ARGUMENTS), ("lines", 3, MOST_LINES)):
        beyond = sorted((one for one in exceeding if one[at] > most), key=lambda one: -one[at])
        print(f"\n{len(beyond)} functions of more than {most} {what}")
        for one in beyond:
            print(f"{one[at]:7}  {one[0].as_posix()}: {one[1]}")


if __name__ == "__main__":
    main()
