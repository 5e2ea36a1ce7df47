"""The forms in which parts of the network are computed, plain ones and those of training on TPUs.

All are equal up to rounding, and tests hold the others to the plain ones: values and gradients.
`choose_forms` is the one place that chooses. docs/training.md says what they gain.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from magnet_jax.model.attention import STATISTICS

EPSILON = 1e-5


class Forms(NamedTuple):
    norm: Callable[..., jax.Array]  # of (x_BTD, scale_D, bias_D)
    embed: Callable[..., jax.Array]  # of (table_KVD, codes_BKT, dtype); float32 [B, T, D]
    # Layers one after another: what they keep stays where it was made, in no loop's stacks.
    written_out: bool


def choose_forms(platform: str) -> Forms:
    """Those of training on a platform: 'cpu', 'gpu' or 'tpu'."""
    return FOR_TPU if platform == "tpu" else PLAIN


def norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Layer norm, in float32."""
    x = x_BTD.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
    return (x * scale_D[None, None] + bias_D[None, None]).astype(x_BTD.dtype)


def norm_in_one_pass(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`norm`, with both of a frame's statistics from one reading, and kept.

    XLA then sums while it makes `x_BTD`. Rounding grows with the squared mean over the variance.
    """
    x = x_BTD.astype(jnp.float32)
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + EPSILON)
    mean, scale = checkpoint_name((mean, scale), STATISTICS)
    return ((x - mean) * scale * scale_D[None, None] + bias_D[None, None]).astype(x_BTD.dtype)


def embed(table_KVD: jax.Array, codes_BKT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The sum of the codebooks' vectors of a frame; `dtype` is that of products."""
    codebooks_1K1 = jnp.arange(len(table_KVD))[None, :, None]
    return table_KVD[codebooks_1K1, codes_BKT].sum(1)


def embed_by_products(table_KVD: jax.Array, codes_BKT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`embed` as products with rows of one 1, whose factors are rounded to `dtype`.

    Gathers, and the addition of their gradients row by row, are slow on TPUs. These rows are made
    within the products and are never in memory.
    """
    ids_11V = jnp.arange(table_KVD.shape[1])[None, None]
    parts = (
        jnp.einsum(
            "BTV,VD->BTD", (codes_BT[..., None] == ids_11V).astype(dtype), table_VD.astype(dtype),
            preferred_element_type=jnp.float32,
        )
        for table_VD, codes_BT in zip(table_KVD, jnp.moveaxis(codes_BKT, 1, 0))
    )  # fmt: skip
    return sum(parts)


PLAIN = Forms(norm, embed, written_out=False)
FOR_TPU = Forms(norm_in_one_pass, embed_by_products, written_out=True)
