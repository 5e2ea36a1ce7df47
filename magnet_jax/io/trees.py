"""Nested dicts, whose leaves are named by paths such as 'blocks/attn/query'."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping, prefix: str = "", separator: str = "/") -> dict[str, Any]:
    """A nested dict as {'blocks/attn/query': leaf}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}{separator}", separator)
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any], separator: str = "/") -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
