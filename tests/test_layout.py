"""Modules import downwards only, in the order that the README's Layout gives."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("magnet_jax", "tokenization", "launch")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


@functools.cache
def imported(path):
    """The modules of ours that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def stated_order():
    """The names in the README's Layout, the lowest first."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Layout")[2]
    text = text.partition("before it in this list:")[2].partition("\n\n")[0]
    library, compiling, evaluation = text.split(";")
    names = re.findall(r"\w+", library) + re.findall(r"\w+", compiling.rpartition(",")[2])
    names += [f"evaluation.{name}" for name in re.findall(r"\w+", evaluation.partition("/`:")[2])]
    return [f"magnet_jax.{name}" for name in names]


def test_the_readme_lists_every_module_of_the_library_once():
    order = stated_order()
    library = [name for name in MODULES if name.startswith("magnet_jax.")]
    assert sorted(order) == sorted(library)


def test_modules_of_the_library_import_those_before_them():
    order = stated_order()
    upwards = [
        f"{name} imports {other}"
        for i, name in enumerate(order)
        for other in order[i:]
        if other in imported(MODULES[name])
    ]
    assert not upwards


def test_packages_import_downwards():
    upwards = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path)
        if (package := other.partition(".")[0]) in PACKAGES
        and PACKAGES.index(package) > PACKAGES.index(name.partition(".")[0])
    ]
    assert not upwards
