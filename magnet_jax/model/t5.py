"""The T5 text encoder in JAX (Raffel et al. 2020, arXiv 1910.10683), and its tokenizer.

Parameters are a plain dict, layers stacked on axis 0 (E width, N heads, H head size, F MLP width,
L layers):

    embed [vocabulary,E]; relative_bias [buckets,N]; norm_final/scale [E];
    blocks/{norm_attn/scale [L,E], attn/{query,key,value [L,E,N,H], out [L,N,H,E]},
            norm_mlp/scale [L,E], mlp/{up [L,E,F], down [L,F,E]} and, gated, mlp/gate [L,E,F]}
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from magnet_jax.arguments import check_fields
from magnet_jax.config import Count, Positive, require
from magnet_jax.io.trees import unflatten

Params = dict[str, Any]

END = "</s>"
PAD = "<pad>"
UNKNOWN = "<unk>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The encoder's part of a transformers T5 config.json; its names, its defaults."""

    d_model: Count
    d_kv: Count
    d_ff: Count
    num_layers: Count
    num_heads: Count
    vocab_size: Count
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128
    layer_norm_epsilon: Positive = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"

    def __post_init__(self):
        check_fields(self, "T5 ")
        buckets, most = self.relative_attention_num_buckets, self.relative_attention_max_distance
        require(
            (buckets % 4 == 0, "T5 relative_attention_num_buckets must be a multiple of 4"),
            (
                most > buckets // 4,  # distances with a bucket of their own
                f"T5 relative_attention_max_distance must be above {buckets // 4}, a quarter of "
                f"relative_attention_num_buckets, not {most}",
            ),
        )

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"


class Weight(NamedTuple):
    """One leaf of the params and what transformers calls it."""

    path: str  # 'blocks/attn/query'
    name: str  # with '{}' for the layer if the leaf is stacked
    shape: tuple[int, ...]  # of one layer, here
    file_shape: tuple[int, ...]  # of one layer, in the file; linear maps are [out, in] there
    std: float | None  # initial standard deviation; None: ones

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def weights(config: T5Config) -> list[Weight]:
    """The one table behind `init` and the files (t5_files.py); scales as in transformers' T5."""
    e, n, h, f = config.d_model, config.num_heads, config.d_kv, config.d_ff
    attention, mlp = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."

    def norm(path: str, name: str) -> Weight:
        return Weight(path, name, (e,), (e,), None)

    def project(kind: str, std: float) -> Weight:
        name = f"{attention}SelfAttention.{kind[0]}.weight"
        return Weight(f"blocks/attn/{kind}", name, (e, n, h), (n * h, e), std)

    def mlp_in(kind: str, file_kind: str) -> Weight:
        name = f"{mlp}DenseReluDense.{file_kind}.weight"
        return Weight(f"blocks/mlp/{kind}", name, (e, f), (f, e), e**-0.5)

    embed, buckets = (config.vocab_size, e), (config.relative_attention_num_buckets, n)
    bias_name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    out_name = f"{attention}SelfAttention.o.weight"
    down_name = f"{mlp}DenseReluDense.wo.weight"
    return [
        Weight("embed", "shared.weight", embed, embed, 1.0),
        Weight("relative_bias", bias_name, buckets, buckets, e**-0.5),
        norm("blocks/norm_attn/scale", f"{attention}layer_norm.weight"),
        project("query", (e * h) ** -0.5),
        project("key", e**-0.5),
        project("value", e**-0.5),
        Weight("blocks/attn/out", out_name, (n, h, e), (e, n * h), (n * h) ** -0.5),
        norm("blocks/norm_mlp/scale", f"{mlp}layer_norm.weight"),
        *([mlp_in("gate", "wi_0"), mlp_in("up", "wi_1")] if config.gated else [mlp_in("up", "wi")]),
        Weight("blocks/mlp/down", down_name, (f, e), (e, f), f**-0.5),
        norm("norm_final/scale", "encoder.final_layer_norm.weight"),
    ]


def init(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters with T5's initial scales; see the module's docstring for shapes."""
    leaves = {}
    table = weights(config)
    for weight, key_of_weight in zip(table, jax.random.split(key, len(table))):
        shape = (config.num_layers, *weight.shape) if weight.stacked else weight.shape
        if weight.std is None:
            leaves[weight.path] = jnp.ones(shape, jnp.float32)
        else:
            leaves[weight.path] = weight.std * jax.random.normal(key_of_weight, shape, jnp.float32)
    return unflatten(leaves)


def _relative_buckets(config: T5Config, length: int) -> np.ndarray:
    """Bucket of each key's distance from each query, [S,S]: exact when near, logarithmic beyond.

    Half of the buckets are for keys after the query, half for the others.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    distance_SS = np.arange(length)[None, :] - np.arange(length)[:, None]
    far_SS = np.maximum(np.abs(distance_SS), exact).astype(np.float32)
    # float32 throughout, as in transformers: a distance at a bucket's edge must fall alike
    share_SS = np.log(far_SS / np.float32(exact)) / np.float32(
        np.log(config.relative_attention_max_distance / exact)
    )
    far_bucket_SS = exact + (share_SS * np.float32(half - exact)).astype(np.int32)
    near_SS = np.abs(distance_SS) < exact
    bucket_SS = np.where(near_SS, np.abs(distance_SS), np.minimum(far_bucket_SS, half - 1))
    return bucket_SS + half * (distance_SS > 0)


def encode(
    params: Params,
    config: T5Config,
    text_ids_BS: jax.Array,
    text_mask_BS: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """States of the last layer, float32 `[B,S,E]`; zero where the mask is False.

    A row is a function of its own unmasked tokens: padding, however long, changes nothing.

    Args:
      params: as in the module's docstring.
      text_ids_BS: token ids.
      text_mask_BS: True where there is a token; a row may be all False (no text).
      dtype: precision of the matrix products; norms, softmax and the residual stay float32.
    """
    # float32 means float32: accelerators would otherwise round the factors.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    text_mask_BS = jnp.asarray(text_mask_BS, bool)

    def product(equation: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *(f.astype(dtype) for f in factors), precision=precision)

    def norm(x_BSE: jax.Array, scale_E: jax.Array) -> jax.Array:
        power_BS1 = jnp.mean(jnp.square(x_BSE), axis=-1, keepdims=True)
        return x_BSE * jax.lax.rsqrt(power_BS1 + config.layer_norm_epsilon) * scale_E[None, None]

    buckets_SS = _relative_buckets(config, text_ids_BS.shape[1])
    bias_SSN = jnp.take(params["relative_bias"], buckets_SS, axis=0)
    bias_NSS = jnp.transpose(bias_SSN, (2, 0, 1)).astype(jnp.float32)
    # A finite number, so that a row without any token gives numbers, not NaN.
    bias_BNSS = jnp.where(text_mask_BS[:, None, None, :], bias_NSS[None], -1e9)

    def block(x_BSE: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        attn, mlp = layer["attn"], layer["mlp"]
        h_BSE = norm(x_BSE, layer["norm_attn"]["scale"])
        query_BSNH = product("BSE,ENH->BSNH", h_BSE, attn["query"])
        key_BSNH = product("BSE,ENH->BSNH", h_BSE, attn["key"])
        value_BSNH = product("BSE,ENH->BSNH", h_BSE, attn["value"])
        # T5 does not divide by the root of the head size: the initial scale of query does.
        scores_BNSS = product("BQNH,BSNH->BNQS", query_BSNH, key_BSNH).astype(jnp.float32)
        weights_BNSS = jax.nn.softmax(scores_BNSS + bias_BNSS, axis=-1)
        attended_BSNH = product("BNQS,BSNH->BQNH", weights_BNSS, value_BSNH)
        x_BSE = x_BSE + product("BSNH,NHE->BSE", attended_BSNH, attn["out"])

        h_BSE = norm(x_BSE, layer["norm_mlp"]["scale"])
        up_BSF = product("BSE,EF->BSF", h_BSE, mlp["up"])
        if config.gated:
            gate_BSF = product("BSE,EF->BSF", h_BSE, mlp["gate"])
            hidden_BSF = jax.nn.gelu(gate_BSF, approximate=True) * up_BSF
        else:
            hidden_BSF = jax.nn.relu(up_BSF)
        return x_BSE + product("BSF,FE->BSE", hidden_BSF, mlp["down"]), None

    x_BSE = jnp.take(params["embed"], text_ids_BS, axis=0).astype(jnp.float32)
    x_BSE, _ = jax.lax.scan(block, x_BSE, params["blocks"])
    states_BSE = norm(x_BSE, params["norm_final"]["scale"])
    return jnp.where(text_mask_BS[:, :, None], states_BSE, 0.0)


def tokenize(tokenizer: Tokenizer, text: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[S]` int32 and mask `[S]` bool of a text, S = max_tokens, closed by `</s>` as T5 does.

    A longer text is cut, its last token still `</s>`; a shorter one is padded, mask False. An empty
    text has an all-False mask: to the model it is no text (as AudioCraft's T5 conditioner has it).
    """
    ids_S = np.full(max_tokens, tokenizer.token_to_id(PAD), np.int32)
    mask_S = np.zeros(max_tokens, bool)
    if text.strip():
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: max_tokens - 1]
        ids.append(tokenizer.token_to_id(END))
        ids_S[: len(ids)] = ids
        mask_S[: len(ids)] = True
    return ids_S, mask_S
