"""The precision of weights and of their products."""

import jax
import jax.numpy as jnp

from magnet_jax.config import RunConfig


def compute_dtype(config: RunConfig, platform: str | None = None) -> jnp.dtype:
    """Precision of the matrix products on a platform; None is this machine's."""
    if config.compute_dtype == "auto":
        platform = platform or jax.default_backend()
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def round_weights(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters, of the transformer or of T5, with factors of products rounded once for all.

    Norms, biases and embeddings, which are no such factors, keep their precision.
    """

    def rounded(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        keep = name == "embed" or name.endswith(("/scale", "bias"))
        return leaf if keep else leaf.astype(dtype)

    return jax.tree.map_with_path(rounded, params)
