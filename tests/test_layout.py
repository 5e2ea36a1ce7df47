"""Folders import downwards only, in the order that docs/architecture.md gives."""

import ast
import functools
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("magnet_jax", "tokenization", "launch")
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = {name: path for name, path in PATHS.items() if path.name != "__init__.py"}
# They import nothing of ours but each other; everything else may import them.
BASE = ("config", "errors", "arguments", "prompts", "cli", "programs")


@functools.cache
def imported(path):
    """The modules of ours that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def stated_order():
    """The folders of the library as the page lists them, and the API; the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    library = text.partition("\nmagnet_jax/ ")[2].partition("\ntokenization/ ")[0]
    return re.findall(r"(?m)^  (\w+)(?:/|\.py) ", library)


def folder(module):
    """'decode' of magnet_jax.decode.parallel, 'api' of magnet_jax.api, 'base' of what is below."""
    name = module.split(".")[1]
    return "base" if name in BASE else name


def test_the_page_lists_every_folder_of_the_library():
    library = {folder(name) for name in MODULES if name.startswith("magnet_jax.")}
    assert {"base", *stated_order()} == library


def test_folders_of_the_library_import_those_above_them():
    order = ["base", *stated_order()]
    upwards = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        if name.startswith("magnet_jax.")
        for other in imported(path)
        if other.startswith("magnet_jax.")
        and order.index(folder(other)) > order.index(folder(name))
    ]
    assert not upwards


def test_modules_import_each_other_in_no_circle():
    library = {name: path for name, path in MODULES.items() if name.startswith("magnet_jax.")}
    graph = {name: imported(path) - {name} for name, path in library.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_import_downwards():
    upwards = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path)
        if PACKAGES.index(other.partition(".")[0]) > PACKAGES.index(name.partition(".")[0])
    ]
    assert not upwards


def test_packages_are_empty_files():
    """Tokenization reads codecs without JAX: to import a module imports its package."""
    packages = [path for path in PATHS.values() if path.match("magnet_jax/*/__init__.py")]
    assert [path for path in packages if path.read_text()] == []
