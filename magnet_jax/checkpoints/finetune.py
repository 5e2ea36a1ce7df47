"""The folder of an adapter (lora.py), and parameters that fit a model only in part."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from magnet_jax.config import LoraConfig, ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.io.trees import flatten, unflatten
from magnet_jax.model import lora

# --- the adapter folder -------------------------------------------------------------------------

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
LINEAGE = "lineage.json"  # ours, which PEFT does not read
FORMAT, FORMAT_VERSION = "magnet_jax_adapter", 1
_EXPECTED = "expected the folder of a LoRA adapter"

# Settings of PEFT that change what an adapter computes, with the only value that fits, which is
# also PEFT's default. Empty values are as good as each other.
_FITTING: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
}
# What an adapter depends on; the number of heads shows in no shape of the files.
_MODEL_FIELDS = ("kind", "width", "num_heads", "num_layers", "mlp_ratio")
_CONTEXTS = ("first_context", "local_context")  # earlier releases did not say them


class Adapter(NamedTuple):
    """What an adapter folder holds."""

    adapters: dict  # NumPy, float32
    config: LoraConfig  # its targets in the order of `LoraTarget`
    lineage: dict[str, Any]  # {} where another program wrote the folder


def _name(p: lora.Projection, layer: int) -> str:
    return f"base_model.model.transformer.layers.{layer}.{p.module}"


def _peft_shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of the folder: lora_A [r, in] and lora_B [out, r]."""
    ours, shapes = lora.adapter_shapes(config, model), {}
    for p in lora._adapted(config):
        for layer in range(model.num_layers):
            fan_in = math.prod(ours[f"{p.path}/a"][1:-1])
            fan_out = math.prod(ours[f"{p.path}/b"][2:])
            shapes[f"{_name(p, layer)}.lora_A.weight"] = (config.rank, fan_in)
            shapes[f"{_name(p, layer)}.lora_B.weight"] = (fan_out, config.rank)
    return shapes


def _to_peft(adapters: Mapping, config: LoraConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    flat, tensors = flatten(adapters), {}
    for p in lora._adapted(config):
        a_LIr = np.asarray(flat[f"{p.path}/a"], np.float32).reshape(
            model.num_layers, -1, config.rank
        )
        b_LrO = np.asarray(flat[f"{p.path}/b"], np.float32).reshape(
            model.num_layers, config.rank, -1
        )
        for layer, (a_Ir, b_rO) in enumerate(zip(a_LIr, b_LrO)):
            tensors[f"{_name(p, layer)}.lora_A.weight"] = np.ascontiguousarray(a_Ir.T)
            tensors[f"{_name(p, layer)}.lora_B.weight"] = np.ascontiguousarray(b_rO.T)
    return tensors


def _from_peft(tensors: Mapping, config: LoraConfig, model: ModelConfig) -> dict:
    shapes, flat = lora.adapter_shapes(config, model), {}
    for p in lora._adapted(config):
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            layers = [
                tensors[f"{_name(p, layer)}.{theirs}.weight"].astype(np.float32).T
                for layer in range(model.num_layers)
            ]
            path = f"{p.path}/{ours}"
            flat[path] = np.stack(layers).reshape(shapes[path])
    return unflatten(flat)


def save_adapter(
    folder: Path,
    adapters: Mapping,
    config: LoraConfig,
    model: ModelConfig,
    lineage: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are float32 in PyTorch's orientation, one pair a layer and projection:
    `base_model.model.transformer.layers.0.self_attn.q_proj.lora_A.weight` [r, in] and `.lora_B.`
    [out, r]. `lineage.json` beside them says what the adapter was made for and from. The folder
    appears whole or not at all, and one that it replaces is lost at no moment.

    Args:
      folder: is made; may be there where it is empty.
      adapters: of every weight that `config` names.
      config: of the adapters; its rank is not 0.
      model: whose weights they adapt.
      lineage: where the adapter comes from; its 'base' names the adapted model in PEFT's config.
      overwrite: replace an earlier adapter.

    Raises:
      UserError: adapters that do not fit, a folder that is in use or cannot be written.
    """
    if not config.rank:
        raise UserError(f"{folder}: lora.rank is 0, so there is no adapter to write")
    folder = Path(folder).absolute()
    shapes = {path: np.shape(leaf) for path, leaf in flatten(adapters).items()}
    if problems := _problems(_compare(lora.adapter_shapes(config, model), shapes)):
        raise UserError(f"{folder}: adapters do not fit the model: {problems}")
    peft_config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": lineage.get("base"),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": [p.module for p in lora._adapted(config)],
        "init_lora_weights": True,
        "inference_mode": True,
        **_FITTING,
    }
    made_for = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {name: getattr(model, name) for name in (*_MODEL_FIELDS, *_CONTEXTS)},
        "lineage": dict(lineage),
    }
    with files.replacing(folder) as partial:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            if not (folder / ADAPTER_CONFIG).is_file():
                raise UserError(f"{folder}: exists and is no adapter; give another folder")
            if not overwrite:
                raise UserError(f"{folder}: holds an adapter; overwrite it or give another folder")
            files.check_holds_only(folder, {ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE})
        tensors = _to_peft(adapters, config, model)
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for name, content in ((LINEAGE, made_for), (ADAPTER_CONFIG, peft_config)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        # safetensors makes files that nobody else may read.
        shutil.copymode(partial / ADAPTER_CONFIG, partial / ADAPTER_WEIGHTS)


def load_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """The inverse of `save_adapter`; also reads what PEFT wrote under the same names.

    Raises `UserError` for files that are missing or damaged, settings of PEFT that this project
    lacks, another rank than the config's, and tensors that `model` has not or in another shape.
    """
    folder = Path(folder)
    config = _read_peft_config(folder / ADAPTER_CONFIG)
    lineage = _read_lineage(folder / LINEAGE, model)
    path = folder / ADAPTER_WEIGHTS
    tensors = files.read_tensors(path)
    ranks = {a.shape[0] for name, a in tensors.items() if ".lora_A." in name and a.ndim == 2}
    if len(ranks) == 1 and ranks != {config.rank}:
        raise UserError(
            f"{path}: adapters of rank {ranks.pop()}, but {ADAPTER_CONFIG} says r {config.rank}"
        )
    found = {name: array.shape for name, array in tensors.items()}
    if problems := _problems(_compare(_peft_shapes(config, model), found)):
        raise UserError(f"{path}: does not fit the model: {problems}")
    # (JAX's check counts bfloat16, which PEFT may have written, among them)
    if wrong := [n for n, a in tensors.items() if not jnp.issubdtype(a.dtype, jnp.floating)]:
        raise UserError(f"{path}: not floating point: {files.few(wrong)}")
    return Adapter(_from_peft(tensors, config, model), config, lineage)


def _read_peft_config(path: Path) -> LoraConfig:
    values = files.read_object(path, _EXPECTED)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA, not {values.get('peft_type')}")
    problems = []
    for name, fitting in _FITTING.items():
        value = values.get(name, fitting)
        if value != fitting and (value or fitting):
            problems.append(f"{name} must be {json.dumps(fitting)}, not {json.dumps(value)}")
    # (PEFT's switches for other ways to compute an adapter, which become more over time)
    others = [n for n, value in values.items() if n.startswith("use_") and value]
    problems += [f"{n} must be false" for n in others if n not in _FITTING]
    # PiSSA, OLoRA, LoftQ and CorDA change the weights that they start from.
    start = values.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        problems.append(f"init_lora_weights {start} adapts other weights than the model's")
    rank, alpha, modules = (values.get(n) for n in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        problems.append(f"r must be a whole number above 0, not {rank}")
    if type(alpha) not in (int, float):
        problems.append(f"lora_alpha must be a number, not {alpha}")
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        problems.append(f"target_modules must be a list of names, not {modules}")
    else:
        # As PEFT reads them: a name stands for every module whose path ends in it.
        matches = {
            m: [p for p in lora.PROJECTIONS if f".{p.module}".endswith(f".{m}")] for m in modules
        }
        if unknown := [m for m, found in matches.items() if not found]:
            problems.append(f"target_modules has unknown names: {files.few(unknown)}")
        named = {p for found in matches.values() for p in found}
        targets = tuple(dict.fromkeys(p.target for p in lora.PROJECTIONS if p in named))
        absent = [p.module for p in lora.PROJECTIONS if p.target in targets and p not in named]
        if absent:
            problems.append(f"target_modules lacks {files.few(absent)}, which go with the others")
    if problems:
        raise UserError(f"{path}: not an adapter that can be read: {'; '.join(problems)}")
    try:
        return LoraConfig(rank=rank, alpha=float(alpha), targets=targets)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_lineage(path: Path, model: ModelConfig) -> dict[str, Any]:
    if not path.exists():
        return {}
    values = files.read_object(path, _EXPECTED)
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: not of format {FORMAT} {FORMAT_VERSION}, which this release reads"
        )
    made_for, lineage = values.get("model"), values.get("lineage")
    if not isinstance(made_for, dict) or not isinstance(lineage, dict):
        raise UserError(f"{path}: model and lineage must be objects")
    names = (*_MODEL_FIELDS, *(name for name in _CONTEXTS if name in made_for))
    own = {name: getattr(model, name) for name in names}
    other = {name: made_for.get(name) for name in names}
    if differing := [
        f"{name} {other[name]}, not {own[name]}" for name in own if own[name] != other[name]
    ]:
        raise UserError(f"{path}: the adapter is for another model: {'; '.join(differing)}")
    return lineage


# --- parameters that fit in part ----------------------------------------------------------------


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


def _problems(fit: _Fit) -> str:
    """What keeps two sets of names and shapes from being the same; '' where they are."""
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
