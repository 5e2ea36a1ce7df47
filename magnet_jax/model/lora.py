"""Low-rank adapters (LoRA).

An adapter of a weight W is a pair of factors, with axes of W's in between (Hu et al. 2021,
section 4.1): W + alpha / rank * a b. A tree of adapters has such a pair in place of every adapted
weight, layers stacked on axis 0:

    blocks/{attn, cross_attn}/{query, key, value}/{a [L, D, r], b [L, r, N, H]}
    blocks/{attn, cross_attn}/out/{a [L, N, H, r], b [L, r, D]}
    blocks/mlp/up/{a [L, D, r], b [L, r, F]}     blocks/mlp/down/{a [L, F, r], b [L, r, D]}
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax.config import LoraConfig, ModelConfig
from magnet_jax.io.trees import flatten, unflatten
from magnet_jax.model import sharding, transformer


class Projection(NamedTuple):
    """A weight that can be adapted, here and in AudioCraft; axes as letters (transformer.py)."""

    target: str  # of `LoraConfig.targets`
    path: str
    module: str  # in an AudioCraft layer
    axes_in: str
    axes_out: str


# AudioCraft keeps query, key and value as rows of one in_proj_weight. An adapter of that would
# share `a` among the three, so each has its own here, by the names that PyTorch uses elsewhere.
_ATTENTION = (
    ("query", "q_proj", "D", "NH"),
    ("key", "k_proj", "D", "NH"),
    ("value", "v_proj", "D", "NH"),
    ("out", "out_proj", "NH", "D"),
)


PROJECTIONS: tuple[Projection, ...] = (
    *(Projection("self", f"blocks/attn/{n}", f"self_attn.{m}", *io) for n, m, *io in _ATTENTION),
    *(
        Projection("cross", f"blocks/cross_attn/{n}", f"cross_attention.{m}", *io)
        for n, m, *io in _ATTENTION
    ),
    Projection("mlp", "blocks/mlp/up", "linear1", "D", "F"),
    Projection("mlp", "blocks/mlp/down", "linear2", "F", "D"),
)


def _adapted(config: LoraConfig) -> list[Projection]:
    return [p for p in PROJECTIONS if config.rank and p.target in config.targets]


def adapter_shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path ('blocks/attn/query/a') and shape of every factor; none where the rank is 0."""
    weights, shapes = transformer.param_shapes(model), {}
    for p in _adapted(config):
        layers, *axes = weights[p.path]
        split = len(p.axes_in)
        shapes[f"{p.path}/a"] = (layers, *axes[:split], config.rank)
        shapes[f"{p.path}/b"] = (layers, config.rank, *axes[split:])
    return shapes


def init_adapters(config: LoraConfig, model: ModelConfig, key: jax.Array) -> dict:
    """Fresh adapters, float32, which change nothing: a is random and b zero. Traceable.

    a is uniform within +-1 / sqrt(fan-in), as in the paper's code: Kaiming's with
    a = sqrt(5). What a weight gets does not depend on which others are adapted.
    """
    shapes, flat = adapter_shapes(config, model), {}
    for index, p in enumerate(PROJECTIONS):
        if f"{p.path}/a" not in shapes:
            continue
        shape = shapes[f"{p.path}/a"]
        bound = 1 / math.sqrt(math.prod(shape[1:-1]))
        flat[f"{p.path}/a"] = jax.random.uniform(
            jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound
        )
        flat[f"{p.path}/b"] = jnp.zeros(shapes[f"{p.path}/b"], jnp.float32)
    return unflatten(flat)


def merge_adapters(params: Mapping, adapters: Mapping, config: LoraConfig) -> dict:
    """The transformer's parameters with the adapters added: W + alpha / rank * a b. Traceable.

    Computed in float32 on any device; each weight keeps its dtype. What is not adapted is passed
    on as it is, which is everything where there are no adapters.
    """
    flat, factors = flatten(params), flatten(adapters)
    for p in PROJECTIONS:
        if f"{p.path}/a" not in factors:
            continue
        a, b = factors.pop(f"{p.path}/a"), factors.pop(f"{p.path}/b")
        if a.shape[-1] != config.rank:
            raise ValueError(f"{p.path}: an adapter of rank {a.shape[-1]}, not {config.rank}")
        product = jnp.einsum(
            f"L{p.axes_in}r,Lr{p.axes_out}->L{p.axes_in}{p.axes_out}",
            a,
            b,
            # Accelerators would shorten the factors to bfloat16 or TF32, and an export would
            # then differ from what was trained. It costs little: r is small.
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        weight = flat[p.path]
        flat[p.path] = (weight + config.scale * product).astype(weight.dtype)
    if factors:
        raise ValueError(f"no adapters of a transformer: {', '.join(factors)}")
    return unflatten(flat)


def adapter_shardings(model: ModelConfig, config: LoraConfig, mesh: Mesh) -> dict:
    """Shardings of a tree of adapters: a as the weight's input axes are, b as its output axes.

    The rank is never split, so that `merge_adapters` makes every shard of a weight where it lies.
    """
    weights, flat = flatten(sharding.model_shardings(model, mesh)), {}
    for p in _adapted(config):
        layers, *axes = weights[p.path].spec
        split = len(p.axes_in)
        flat[f"{p.path}/a"] = NamedSharding(mesh, P(layers, *axes[:split], None))
        flat[f"{p.path}/b"] = NamedSharding(mesh, P(layers, None, *axes[split:]))
    return unflatten(flat)
