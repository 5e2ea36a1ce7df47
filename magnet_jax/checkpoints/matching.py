"""Parameters of one model that fit another, wholly or in part."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.io.trees import flatten, unflatten


class _Fit(NamedTuple):
    """Names by how given shapes meet wanted ones."""

    matched: list[str]
    missing: list[str]
    misshapen: dict[str, str]  # with both shapes
    unexpected: list[str]


def _compare(wanted: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> _Fit:
    matched = [name for name in wanted if name in given and (*wanted[name],) == (*given[name],)]
    missing = [name for name in wanted if name not in given]
    misshapen = {
        name: f"{name} {[*given[name]]}, not {[*wanted[name]]}"
        for name in wanted
        if name in given and (*wanted[name],) != (*given[name],)
    }
    return _Fit(matched, missing, misshapen, [name for name in given if name not in wanted])


def misfit(wanted: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> str:
    """What keeps two sets of names and shapes from being the same; '' where they are."""
    return _problems(_compare(wanted, given))


def _problems(fit: _Fit) -> str:
    kinds = (
        ("missing", fit.missing),
        ("misshapen", [*fit.misshapen.values()]),
        ("unexpected", fit.unexpected),
    )
    return "; ".join(f"{len(names)} {kind}: {files.few(names)}" for kind, names in kinds if names)


def match_params(
    wanted: Mapping, given: Mapping, partial: bool, where: str = "parameters"
) -> tuple[dict, list[str]]:
    """Finds for every parameter of a model the one that is given, by path and shape.

    Args:
      wanted: the model's tree; leaves are shapes, or have one (arrays, `jax.ShapeDtypeStruct`).
        `lm_rules.lm_shapes` serves too.
      given: a tree of arrays.
      partial: let parameters be missing, unexpected, or of another shape.
      where: what to call `given` in messages.

    Returns:
      The tree of `wanted` with the given arrays, None where there is none that fits (for
      `fill_params`), and lines to print that say what matched and what did not.

    Raises:
      UserError: not an exact match and not `partial`, or nothing matches at all.
    """
    given_flat = flatten(given)
    shapes = {path: tuple(getattr(leaf, "shape", leaf)) for path, leaf in flatten(wanted).items()}
    fit = _compare(shapes, {path: np.shape(leaf) for path, leaf in given_flat.items()})
    if (problems := _problems(fit)) and not partial:
        raise UserError(
            f"{where}: not the parameters of this model: {problems}; --init-partial takes what "
            "matches and leaves the rest as it is initialised"
        )
    if not fit.matched:
        raise UserError(f"{where}: not one parameter of this model: {problems}")
    lines = [f"{where}: {len(fit.matched)} of {len(shapes)} parameters matched"]
    for path, shape in shapes.items():
        if path in fit.misshapen:
            lines.append(f"  fresh    {path} {[*shape]} (given as {[*np.shape(given_flat[path])]})")
        elif path in given_flat:
            lines.append(f"  matched  {path} {[*shape]}")
        else:
            lines.append(f"  fresh    {path} {[*shape]} (not given)")
    for path in fit.unexpected:
        lines.append(f"  unused   {path} {[*np.shape(given_flat[path])]}")
    matched = set(fit.matched)
    tree = unflatten({path: given_flat[path] if path in matched else None for path in shapes})
    return tree, lines


def fill_params(matched: Mapping, fresh: Mapping) -> dict:
    """What `match_params` found, in the dtypes of `fresh`, whose own values fill the gaps."""
    flat = flatten(matched)
    return unflatten(
        {
            path: leaf if flat[path] is None else jnp.asarray(flat[path], leaf.dtype)
            for path, leaf in flatten(fresh).items()
        }
    )
