"""The transformer: summed codebook embeddings, pre-norm blocks, one head a codebook (section 4).

`Transformer` holds the parameters (float32) and says how they may be sharded. Training, decoding
and checkpoints handle them as a plain nested dict, which `init_params` makes and `bind` puts back
into a module. Parameter shapes, layers stacked on axis 0:

    embed [K, V+1, D]      text_proj/{kernel [E, D], bias [D]}      heads [K, D, V]
    blocks/{attn, cross_attn}/{query, key, value} [L, D, N, H]      blocks/*/out [L, N, H, D]
    blocks/mlp/{up [L, D, F], down [L, F, D]}
    blocks/norm_{attn, cross_attn, mlp}/{scale, bias} [L, D]        norm_final/{scale, bias} [D]

and, where the config says so, biases and norms of queries and keys:

    blocks/{attn, cross_attn}/{query, key, value}_bias [L, N, H]    blocks/*/out_bias [L, D]
    blocks/{attn, cross_attn}/norm_{query, key}/{scale, bias} [L, D]
    blocks/mlp/{up_bias [L, F], down_bias [L, D]}                   heads_bias [K, V]
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from magnet_jax.config import ModelConfig, Remat
from magnet_jax.io.trees import flatten
from magnet_jax.model import forms
from magnet_jax.model.attention import (
    ATTENDED,
    STATISTICS,
    blended_attention,
    cached_attention,
    cross_attention,
    self_attention,
)
from magnet_jax.model.forms import Forms

# Names of what a layer makes, for the backward pass to keep: queries, keys and values; the sums to
# which attention adds; the MLP before its GELU. Attention and norms name what is theirs.
PROJECTED, SUM, HIDDEN = "projected", "sum", "hidden"
CUDNN = "dot_product_attention_fwd"
Attend = Callable[..., tuple[jax.Array, Any]]  # of query, key and value; see `Block`
# What is kept, the most first; everything else of a layer is computed again.
KEPT = {
    "products": (PROJECTED, ATTENDED, SUM, HIDDEN, STATISTICS),
    "mlp": (PROJECTED, ATTENDED, SUM, STATISTICS),
    "attention": (ATTENDED, STATISTICS),
    "full": (),
}


def _keeps(remat: Remat) -> Callable[..., Any]:
    """The policy for `jax.checkpoint`. cuDNN's attention, which names nothing, is known by name."""
    by_name = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
    if ATTENDED not in KEPT[remat]:
        return by_name
    is_cudnn = lambda primitive, *_, **__: primitive.name.startswith(CUDNN)  # noqa: E731
    return jax.checkpoint_policies.save_from_both_policies(by_name, is_cudnn)


class TextKeys(NamedTuple):
    """What cross-attention needs of the texts: computed once, used at every step of decoding."""

    key_LBSNH: jax.Array
    value_LBSNH: jax.Array
    mask_BS: jax.Array
    num_zero_keys_B: jax.Array
    weight_BTG: jax.Array | None = None
    """Where rows have G texts each, how much each counts in each frame. Then there are [L, B, G, S]
    keys, a mask [B, G, S], and zero keys [B, G]."""
    negative: Optional["TextKeys"] = None
    """What guidance leads away from in place of no text, in the same shapes."""

    def at(self, frame_BT: jax.Array) -> "TextKeys":
        """The same for other frames than all, of each row or (B = 1) of all rows."""
        if self.weight_BTG is None:
            return self
        frame_BT1 = jnp.broadcast_to(frame_BT, (len(self.mask_BS), frame_BT.shape[1]))[..., None]
        weight_BTG = jnp.take_along_axis(self.weight_BTG, frame_BT1, axis=1, mode="clip")
        return self._replace(weight_BTG=weight_BTG)


class TextStates(NamedTuple):
    """What a layer of training needs of the texts, whose keys and values it projects itself."""

    states_BSD: jax.Array
    mask_BS: jax.Array
    num_zero_keys_B: jax.Array


def with_null_rows(text: TextKeys) -> TextKeys:
    """The rows of `text`, then as many of its negative one, or without text.

    Those without have keys, of which none counts.
    """
    negative = text.negative
    if negative is None:
        negative = text._replace(
            mask_BS=jnp.zeros_like(text.mask_BS),
            num_zero_keys_B=jnp.zeros_like(text.num_zero_keys_B),
        )
    (keys, rows), (more_keys, more_rows) = ((x[:2], x[2:5]) for x in (text, negative))
    return TextKeys(
        *(jnp.concatenate(both, axis=1) for both in zip(keys, more_keys)),
        *jax.tree.map(lambda *both: jnp.concatenate(both), rows, more_rows),
    )


class Cache(NamedTuple):
    """Keys and values of the C steps that an autoregressive model has seen, or will see.

    Heads come before steps: so a step's queries read them as they lie.
    """

    key_LBNCH: jax.Array
    value_LBNCH: jax.Array


def sinusoids(num_frames: int, width: int) -> np.ndarray:
    """Positions as cosines then sines of t / 10000^(i / (D/2 - 1)). float32 [T, D]."""
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / (half - 1))
    phases = np.arange(num_frames)[:, None] * frequencies[None, :]
    return np.concatenate([np.cos(phases), np.sin(phases)], axis=1).astype(np.float32)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by erf as in PyTorch."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def exact(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """A context in which float32 products keep their precision; of other dtypes it changes nothing.

    Accelerators would round the factors.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def exact_products(run: Callable) -> Callable:
    """Runs a traced function, which has a keyword `dtype`, within `exact(dtype)`."""

    @functools.wraps(run)
    def wrapped(*args: Any, dtype: jnp.dtype = jnp.float32, **keywords: Any) -> Any:
        with exact(dtype):
            return run(*args, dtype=dtype, **keywords)

    return wrapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_BTD: jax.Array, kernel: jax.Array, num_axes: int = 1) -> jax.Array:
    """Contracts the last `num_axes` axes of `x_BTD` with the first ones of `kernel`.

    The gradient of the kernel goes by platform. It sums over clips and frames. XLA for CPUs copies
    both factors of such a sum unless clips and frames are one axis. On TPUs joining the axes is
    itself a copy.
    """
    return jnp.tensordot(x_BTD, kernel, num_axes)


def _product_forward(x_BTD, kernel, num_axes):
    return product(x_BTD, kernel, num_axes), (x_BTD, kernel)


def _product_backward(num_axes, factors, grad_BTF):
    x_BTD, kernel = factors
    axes_out = tuple(range(2, grad_BTF.ndim)), tuple(range(num_axes, kernel.ndim))

    def of_rows(x_BTD, grad_BTF):
        rows = x_BTD.shape[0] * x_BTD.shape[1]
        return (x_BTD.reshape(rows, -1).T @ grad_BTF.reshape(rows, -1)).reshape(kernel.shape)

    def of_axes(x_BTD, grad_BTF):
        return jnp.tensordot(x_BTD, grad_BTF, ((0, 1), (0, 1)))

    grad_kernel = jax.lax.platform_dependent(x_BTD, grad_BTF, cpu=of_rows, default=of_axes)
    return jnp.tensordot(grad_BTF, kernel, axes_out), grad_kernel


product.defvjp(_product_forward, _product_backward)


def _gaussian(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, axes: tuple, depth: jax.Array | None = None
) -> nnx.Param:
    """Truncated normal of variance 1 / fan_in, cut at three deviations.

    This is AudioCraft's `weight_init: gaussian`. With `depth`, the number of a layer from 1, the
    variance is divided by twice that, which is its `depthwise_init: current`.
    """
    std = 1 / math.sqrt(fan_in) if depth is None else 1 / jnp.sqrt(2.0 * fan_in * depth)
    value = std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes)


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform within 1 / sqrt(fan_in) of zero, as a torch.nn.Linear begins.

    AudioCraft leaves two kinds of weights as they begin: those of query, key and value, which it
    keeps outside of any Linear, and the projection of the text.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _bias(shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    """Zeros at first: AudioCraft's `zero_bias_init`, and its own law for query, key and value."""
    return nnx.Param(jnp.zeros(shape), out_sharding=axes)


def _biased(x_BTD: jax.Array, bias: nnx.Param) -> jax.Array:
    return x_BTD + bias[...][None, None].astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width), out_sharding=("embed",))
        self.bias = nnx.Param(jnp.zeros(width), out_sharding=("embed",))

    def __call__(self, x_BTD: jax.Array, norm: Callable[..., jax.Array] = forms.norm) -> jax.Array:
        return norm(x_BTD, self.scale[...], self.bias[...])


class Attention(nnx.Module):
    """The four projections of one attention layer; `normed` adds norms of queries and keys."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, depth: jax.Array, *, normed: bool):
        d, n, h = config.width, config.num_heads, config.head_size
        self.biased, self.normed = config.attention_bias, normed

        def projection() -> nnx.Param:
            kernel_DNH = _uniform(rngs.params(), (d, n, h), d)
            return nnx.Param(kernel_DNH, out_sharding=("embed", "heads", None))

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = _gaussian(rngs.params(), (n, h, d), d, ("heads", None, "embed"), depth)
        if self.biased:
            self.query_bias = _bias((n, h), ("heads", None))
            self.key_bias = _bias((n, h), ("heads", None))
            self.value_bias = _bias((n, h), ("heads", None))
            self.out_bias = _bias((d,), ("embed",))
        if normed:
            self.norm_query, self.norm_key = LayerNorm(d), LayerNorm(d)

    def to_query(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, N, H]."""
        query_BTNH = product(x_BTD, self.query[...].astype(x_BTD.dtype))
        query_BTNH = _biased(query_BTNH, self.query_bias) if self.biased else query_BTNH
        return _over_heads(self.norm_query, query_BTNH) if self.normed else query_BTNH

    def to_key_value(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> two of [B, S, N, H]."""
        key_BSNH = product(x_BSD, self.key[...].astype(x_BSD.dtype))
        value_BSNH = product(x_BSD, self.value[...].astype(x_BSD.dtype))
        return self._with_bias_and_norm(key_BSNH, value_BSNH)

    def key_value_of_zeros(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array] | None:
        """Key and value [1, 1, N, H] of a position that is zeros; None where they are zeros too."""
        if not (self.biased or self.normed):
            return None
        zeros_11NH = jnp.zeros((1, 1, *self.key.shape[-2:]), dtype)
        return self._with_bias_and_norm(zeros_11NH, zeros_11NH)

    def _with_bias_and_norm(self, key_BSNH, value_BSNH) -> tuple[jax.Array, jax.Array]:
        if self.biased:
            key_BSNH = _biased(key_BSNH, self.key_bias)
            value_BSNH = _biased(value_BSNH, self.value_bias)
        return _over_heads(self.norm_key, key_BSNH) if self.normed else key_BSNH, value_BSNH

    def to_out(self, x_BTNH: jax.Array) -> jax.Array:
        """[B, T, N, H] -> [B, T, D]."""
        x_BTD = product(x_BTNH, self.out[...].astype(x_BTNH.dtype), 2)
        return _biased(x_BTD, self.out_bias) if self.biased else x_BTD


def _over_heads(norm: LayerNorm, x_BTNH: jax.Array) -> jax.Array:
    """A norm over all heads at once."""
    b, t, n, h = x_BTNH.shape
    return norm(x_BTNH.reshape(b, t, n * h)).reshape(b, t, n, h)


class Mlp(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, depth: jax.Array):
        d, f = config.width, config.mlp_ratio * config.width
        self.biased = config.mlp_bias
        self.up = _gaussian(rngs.params(), (d, f), d, ("embed", "mlp"), depth)
        self.down = _gaussian(rngs.params(), (f, d), f, ("mlp", "embed"), depth)
        if self.biased:
            self.up_bias, self.down_bias = _bias((f,), ("mlp",)), _bias((d,), ("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        hidden_BTF = product(x_BTD, self.up[...].astype(dtype))
        hidden_BTF = _biased(hidden_BTF, self.up_bias) if self.biased else hidden_BTF
        hidden_BTF = checkpoint_name(hidden_BTF, HIDDEN)
        x_BTD = product(gelu(hidden_BTF), self.down[...].astype(dtype))
        return _biased(x_BTD, self.down_bias) if self.biased else x_BTD


class Block(nnx.Module):
    """One layer; `depth` is its number from 1, which only its first weights depend on."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, depth: jax.Array):
        self.norm_attn = LayerNorm(config.width)
        self.norm_cross_attn = LayerNorm(config.width)
        self.norm_mlp = LayerNorm(config.width)
        self.attn = Attention(config, rngs, depth, normed=config.query_key_norm)
        self.cross_attn = Attention(config, rngs, depth, normed=config.cross_query_key_norm)
        self.mlp = Mlp(config, rngs, depth)

    def __call__(
        self, x_BTD: jax.Array, text: TextKeys, attend: Attend, form: Forms = forms.PLAIN
    ) -> tuple[jax.Array, Any]:
        """`text` is this layer's; `attend` takes query, key and value of the frames.

        What `attend` returns beside the attended values is passed on.
        """
        h_BTD = self.norm_attn(x_BTD, form.norm)
        qkv_BTNH = self.attn.to_query(h_BTD), *self.attn.to_key_value(h_BTD)
        attended, kept = attend(*checkpoint_name(qkv_BTNH, PROJECTED))
        x_BTD = checkpoint_name(x_BTD + self.attn.to_out(attended), SUM)
        x_BTD = checkpoint_name(self._read(x_BTD, text, form), SUM)
        return x_BTD + self.mlp(self.norm_mlp(x_BTD, form.norm)), kept

    def _read(self, x_BTD: jax.Array, text: TextKeys, form: Forms) -> jax.Array:
        """Adds cross-attention. Rows beyond those of `text` have none.

        To those it would add exact zeros, unless it has biases: see `with_null_rows`.
        """
        num_texts = text.mask_BS.shape[0]
        num_without = x_BTD.shape[0] - num_texts
        if num_without and self.cross_attn.biased:
            raise ValueError(f"{num_without} rows have no row of text, not even an empty one")
        if not num_texts:
            return x_BTD
        h_BTD = self.norm_cross_attn(x_BTD[:num_texts], form.norm)
        query_BTNH = checkpoint_name(self.cross_attn.to_query(h_BTD), PROJECTED)
        zero_11NH = self.cross_attn.key_value_of_zeros(x_BTD.dtype)
        *keys, weight_BTG, _ = text
        if weight_BTG is None:
            attended = cross_attention(query_BTNH, *keys, zero_11NH)
        else:
            attended = blended_attention(query_BTNH, *keys, weight_BTG, zero_11NH)
        added_BTD = self.cross_attn.to_out(attended)
        return x_BTD + jnp.pad(added_BTD, ((0, num_without), (0, 0), (0, 0)))


class Transformer(nnx.Module):
    """The network of MAGNeT and of MusicGen, which differ in what a frame attends to.

    MAGNeT (`trunk`): at stage 0 everything, or `first_context` frames to both sides; at the stages
    above `local_context` frames to both sides (or, if that is 0, everything too). MusicGen
    (`extend`): the steps before it. A hybrid: this for the first steps, that for the others.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        k, v, d, e = config.num_codebooks, config.codebook_size, config.width, config.text_width
        self.config = config

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs, depth: jax.Array) -> Block:
            return Block(config, rngs, depth)

        self.embed = _gaussian(rngs.params(), (k, v + 1, d), d, (None, "vocab", "embed"))
        uniform = lambda key, shape, _: _uniform(key, shape, e)  # noqa: E731
        self.text_proj = nnx.Linear(
            e, d, rngs=rngs, kernel_init=uniform, bias_init=uniform,
            kernel_metadata={"out_sharding": (None, "embed")},
            bias_metadata={"out_sharding": ("embed",)},
        )  # fmt: skip
        self.blocks = stack(rngs, jnp.arange(1, config.num_layers + 1))
        self.norm_final = LayerNorm(d)
        self.heads = _gaussian(rngs.params(), (k, d, v), d, (None, "embed", "vocab"))
        if config.head_bias:
            self.heads_bias = _bias((k, v), (None, "vocab"))

    def read_text(
        self,
        states_BSE: jax.Array,
        text_mask_BS: jax.Array,
        num_zero_keys_B: jax.Array | None = None,
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> TextKeys:
        """Projects T5 states to every layer's cross-attention keys and values.

        `text_mask_BS` is True at the tokens of the text; a row without any is unconditional. For
        `num_zero_keys_B` see `cross_attention`; None is zero of them.
        """
        text = self.project_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=dtype)
        project = jax.vmap(lambda attn: attn.to_key_value(text.states_BSD))
        return TextKeys(*project(self.blocks.cross_attn), *text[1:])

    def project_text(
        self,
        states_BSE: jax.Array,
        text_mask_BS: jax.Array,
        num_zero_keys_B: jax.Array | None = None,
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> TextStates:
        """T5 states for layers to read; arguments as of `read_text`."""
        text_BSD = states_BSE.astype(dtype) @ self.text_proj.kernel[...].astype(dtype)
        text_BSD = _biased(text_BSD, self.text_proj.bias) * text_mask_BS[..., None].astype(dtype)
        if num_zero_keys_B is None:
            num_zero_keys_B = jnp.zeros(states_BSE.shape[0], jnp.int32)
        return TextStates(text_BSD, text_mask_BS, num_zero_keys_B)

    def trunk(
        self,
        codes_BKT: jax.Array,
        text: TextKeys | TextStates,
        *,
        local: bool,
        attend: Callable[..., jax.Array] = self_attention,
        positions_BTD: jax.Array | np.ndarray | None = None,
        past: Cache | None = None,
        remat: Remat = "none",
        form: Forms = forms.PLAIN,
        sharding: jax.sharding.Sharding | None = None,
    ) -> jax.Array:
        """Everything below the heads: final-norm states [B, T, D].

        Args:
          codes_BKT: token ids 0..V, V where masked.
          text: from `read_text` or `project_text`, for the first rows; rows beyond those have no
            text (of a model with biases in attention: for all rows). Its dtype is the precision of
            the products.
          local: True for stages above 0.
          attend: `self_attention`, or that function with some of its arguments.
          positions_BTD: rows of `sinusoids`, where the codes are not a clip from its start.
          past: keys and values of earlier steps, whose layer's `attend` is given as well.
          remat: what the backward pass recomputes, see `RunConfig.remat`.
          form: see forms.py.
          sharding: where activations [B, T, D] live; without it XLA would let them follow the
            parameters, and a batch split over fsdp would not stay split.
        """
        context = self.config.context(local)
        has_keys = isinstance(text, TextKeys)
        keys_LBSNH, of_texts = (text[:2], text[2:]) if has_keys else (None, text[1:])
        # The layers' gradients of it are added up, which bfloat16 would round each time.
        states_BSD = None if has_keys else text.states_BSD.astype(jnp.float32)
        if positions_BTD is None:
            positions_BTD = sinusoids(codes_BKT.shape[-1], self.config.width)[None]

        def pin(x_BTD):
            if sharding is None:
                return x_BTD
            return jax.lax.with_sharding_constraint(x_BTD, sharding)

        def layer(x_BTD, inputs):
            block, keys_BSNH, past_BNCH = inputs
            if keys_BSNH is None:
                keys_BSNH = block.cross_attn.to_key_value(pin(states_BSD.astype(x_BTD.dtype)))

            def attend_frames(*qkv):
                given = () if past_BNCH is None else (past_BNCH,)
                return attend(*qkv, *given, context=context), None

            own = TextKeys(*keys_BSNH, *of_texts)
            x_BTD, _ = block(pin(x_BTD), own, attend_frames, form)
            return pin(x_BTD), None

        if remat != "none":
            layer = jax.checkpoint(layer, policy=_keeps(remat))
        x_BTD = pin(self._embed(codes_BKT, positions_BTD, text[0].dtype, form))
        unroll = self.config.num_layers if form.written_out else 1
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (self.blocks, keys_LBSNH, past), unroll=unroll)
        return self.norm_final(x_BTD, form.norm)

    def layers_apart(self, text: TextKeys) -> list[Any]:
        """Every layer's parameters and keys and values of the text, as `extend` takes them.

        A loop over layers copies a layer's weights out of the stack before it multiplies by them,
        on CPUs. Where a step is a few rows, that is most of the time; this copies them once.
        """
        stacked = (self.blocks, text.key_LBSNH, text.value_LBSNH)
        apart = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.config.num_layers)]
        return jax.lax.optimization_barrier(apart)

    def extend(
        self,
        codes_BKT: jax.Array,
        text: TextKeys,
        cache: Cache,
        first: jax.Array | int,
        apart: list[Any] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Everything below the heads for T more steps of an autoregressive model.

        Args:
          codes_BKT: what the steps hold (patterns.py): token ids 0..V, V for none.
          text: as for `trunk`.
          cache: from `empty_cache`, filled by earlier calls.
          first: number of the first of these steps; may be traced.
          apart: from `layers_apart`: layers are then written out, and not a loop.

        Returns final-norm states [B, T, D], which predict the next steps, and the cache with these.
        """
        capacity = cache.key_LBNCH.shape[3]
        text = text.at(first + jnp.arange(codes_BKT.shape[-1])[None])
        positions_TD = jax.lax.dynamic_slice_in_dim(
            jnp.asarray(sinusoids(capacity, self.config.width)), first, codes_BKT.shape[-1]
        )

        def layer(x_BTD, inputs):
            block, text_key, text_value, past = inputs

            def attend(*qkv_BTNH):
                new = Cache(*(jnp.swapaxes(x_BTNH, 1, 2) for x_BTNH in qkv_BTNH[1:]))
                return cached_attention(*qkv_BTNH, past, first), new

            own = text._replace(key_LBSNH=text_key, value_LBSNH=text_value)
            return block(x_BTD, own, attend)

        x_BTD = self._embed(codes_BKT, positions_TD[None], text.key_LBSNH.dtype)
        if apart is None:
            inputs = (self.blocks, text.key_LBSNH, text.value_LBSNH, cache)
            x_BTD, new = jax.lax.scan(layer, x_BTD, inputs)
        else:
            each = []
            for i, own in enumerate(apart):
                x_BTD, new = layer(x_BTD, (*own, jax.tree.map(lambda x, i=i: x[i], cache)))
                each.append(new)
            new = jax.tree.map(lambda *x: jnp.stack(x), *each)
        # The layers read the cache; what is new is written once, in place, for all of them.
        cache = Cache(
            *(jax.lax.dynamic_update_slice_in_dim(x, y, first, 3) for x, y in zip(cache, new))
        )
        return self.norm_final(x_BTD), cache

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
        """A cache for `capacity` steps of `batch` rows."""
        c = self.config
        shape = (c.num_layers, batch, c.num_heads, capacity, c.head_size)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def _embed(
        self,
        codes_BKT: jax.Array,
        positions_BTD: jax.Array | np.ndarray,
        dtype: jnp.dtype,
        form: Forms = forms.PLAIN,
    ) -> jax.Array:
        return (form.embed(self.embed[...], codes_BKT, dtype) + positions_BTD).astype(dtype)

    def all_heads(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of every codebook, float32 [B, K, T, V]."""
        heads_KDV = self.heads[...].astype(x_BTD.dtype)
        logits_BKTV = jnp.einsum(
            "BTD,KDV->BKTV", x_BTD, heads_KDV, preferred_element_type=jnp.float32
        )
        if self.config.head_bias:
            logits_BKTV = logits_BKTV + self.heads_bias[...][None, :, None]
        return logits_BKTV

    def head(self, x_BTD: jax.Array, stage: jax.Array | int) -> jax.Array:
        """Logits of codebook `stage` alone, float32 [B, T, V]."""
        kernel_DV = jax.lax.dynamic_index_in_dim(self.heads[...], stage, keepdims=False)
        logits_BTV = jnp.einsum(
            "BTD,DV->BTV", x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32
        )
        if self.config.head_bias:
            bias_V = jax.lax.dynamic_index_in_dim(self.heads_bias[...], stage, keepdims=False)
            logits_BTV = logits_BTV + bias_V[None, None]
        return logits_BTV


def with_code_vectors(params: dict, vectors_KVE: np.ndarray, key: jax.Array) -> dict:
    """Fresh parameters, whose tokens begin as a codec's vectors in their embeddings and heads.

    Vectors are taken from their codebook's mean, brought to one size (elements of mean square 1),
    and projected at random to the model's width, lengths kept on average: an embedding of E
    numbers is sqrt(E) long, where a position is sqrt(D / 2). Heads are as long as random ones, 1.
    Codebooks beyond those of `params` are left out, entries that are zeros stay so, and the id for
    'masked' keeps its embedding.
    """
    width = params["embed"].shape[-1]
    vectors_KVE = vectors_KVE[: len(params["embed"])]
    num_codebooks, size, code_width = vectors_KVE.shape
    used_KV1 = vectors_KVE.any(2, keepdims=True)
    count_K11 = np.maximum(used_KV1.sum(1, keepdims=True), 1)
    mean_K1E = vectors_KVE.sum(1, keepdims=True) / count_K11
    vectors_KVE = np.where(used_KV1, vectors_KVE - mean_K1E, 0)
    size_K11 = np.sqrt(np.square(vectors_KVE).sum((1, 2), keepdims=True) / count_K11 / code_width)
    vectors_KVE = vectors_KVE / np.where(size_K11 > 0, size_K11, 1)  # (0: all alike)
    shape = (num_codebooks, code_width, width)
    projection_KED = jax.random.normal(key, shape) / math.sqrt(width)
    embed_KVD = jnp.einsum("KVE,KED->KVD", vectors_KVE, projection_KED)
    heads_KDV = jnp.swapaxes(embed_KVD, 1, 2) / math.sqrt(code_width)
    return params | {
        "embed": params["embed"].at[:, :size].set(embed_KVD),  # (the last one is 'masked')
        "heads": heads_KDV,
    }


def with_first_codebooks(params: dict, fresh: dict, count: int, own: int) -> dict:
    """Parameters of K codebooks, of which the last `own` become those behind `count` new ones.

    What belongs to the new first ones is taken of `fresh`, parameters of that model. What has
    another width there stays as it is.
    """
    more = {
        name: np.concatenate([np.asarray(fresh[name])[:count], params[name][-own:]])
        for name in ("embed", "heads", "heads_bias")
        if name in params and np.shape(fresh.get(name))[1:] == np.shape(params[name])[1:]
    }
    return params | more


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict (shapes in the module's docstring)."""
    with nnx.use_eager_sharding(False):
        model = Transformer(config, nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def abstract(config: ModelConfig) -> Transformer:
    """The module with shapes instead of arrays; its metadata name the logical axes."""
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path ('blocks/attn/query') and shape of every parameter."""
    params = nnx.to_pure_dict(nnx.state(abstract(config), nnx.Param))
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def bind(config: ModelConfig, params: dict) -> Transformer:
    """A `Transformer` over `params`; cheap, and made anew inside every traced function."""
    graph, state = nnx.split(abstract(config))
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    with nnx.use_eager_sharding(False):
        return nnx.merge(graph, state)


def count_params(params: dict) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
