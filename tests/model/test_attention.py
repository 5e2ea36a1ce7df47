"""Block-local attention equals the dense mask; cross-attention sees exactly its own text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.config import KernelConfig, ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.model import attention, kernels


def heads(key, batch, length, num_heads=3, size=8):
    return jax.random.normal(jax.random.key(key), (batch, length, num_heads, size))


def plain_attention(query_BTNH, key_BTNH, value_BTNH, context, length):
    """Softmax over the existing frames within the context, by way of a T x T mask."""
    frames = jnp.arange(query_BTNH.shape[1])
    near_TS = jnp.abs(frames[:, None] - frames[None, :]) <= (
        len(frames) if context is None else context
    )
    exists_BS = frames[None] < jnp.reshape(jnp.asarray(length), (-1, 1))
    visible = near_TS[None, None] & exists_BS[:, None, None]
    scores = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BTNH) * query_BTNH.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value_BTNH)


def assert_equal_where_frames_exist(found, expected, length, atol=3e-6):
    assert np.isfinite(found).all()
    for row, row_length in enumerate(np.broadcast_to(length, len(found))):
        np.testing.assert_allclose(found[row, :row_length], expected[row, :row_length], atol=atol)


@pytest.mark.parametrize("kernel", ["dense", "slices", "blocks"])
@pytest.mark.parametrize("num_frames", [1, 4, 31, 32, 33, 100])
@pytest.mark.parametrize("context", [None, 1, 5])
def test_kernels_equal_plain_attention(kernel, num_frames, context):
    qkv = tuple(heads(i, 2, num_frames) for i in range(3))
    found = kernels.attend(*qkv, context=context, kernel=kernel, block=16)
    expected = plain_attention(*qkv, context, num_frames)
    assert_equal_where_frames_exist(found, expected, num_frames)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("length", [500, [500, 341]])
def test_cudnn_equals_plain_attention(length):
    qkv = tuple(heads(i, 2, 500, 4, 64).astype(jnp.bfloat16) for i in range(3))
    found = kernels.attend(*qkv, context=None, kernel="cudnn", length=jnp.asarray(length))
    exact = tuple(x.astype(jnp.float32) for x in qkv)
    expected = plain_attention(*exact, None, length)
    assert_equal_where_frames_exist(found.astype(jnp.float32), expected, length, atol=2e-2)


@pytest.mark.parametrize("kernel", ["dense", "slices", "blocks"])
@pytest.mark.parametrize("context", [None, 5])
@pytest.mark.parametrize("length", [50, [70, 41]])
def test_frames_past_the_end_are_not_attended_to(kernel, context, length):
    """One compiled program for all lengths, a number for all rows or one for each."""
    qkv = tuple(heads(i, 2, 70) for i in range(3))
    run = jax.jit(
        lambda length: kernels.attend(*qkv, context=context, kernel=kernel, length=length, block=16)
    )
    found = run(jnp.asarray(length))
    expected = plain_attention(*qkv, context, length)
    assert_equal_where_frames_exist(found, expected, length)


@pytest.mark.parametrize("context", [None, 5])
@pytest.mark.parametrize("length", [130, [100, 130]])
def test_splash_attention_equals_plain_attention(context, length):
    """In interpret mode."""
    qkv = tuple(heads(i, 2, 130, size=64) for i in range(3))
    found = kernels.attend(
        *qkv, context=context, kernel="splash", length=jnp.asarray(length), interpret=True
    )
    expected = plain_attention(*qkv, context, length)
    assert_equal_where_frames_exist(found, expected, length, atol=2e-5)


@pytest.mark.parametrize("kernel", ["dense", "slices", "blocks"])
@pytest.mark.parametrize("context", [None, 5])
def test_frames_split_over_devices_attend_as_on_one(kernel, context):
    """Four devices: keys gathered without a context, the neighbours' edges exchanged with one."""
    qkv = tuple(heads(i, 2, 64) for i in range(3))
    mesh = jax.make_mesh((4,), ("frames",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec(None, "frames")
    found = jax.jit(
        jax.shard_map(
            lambda *qkv: kernels.attend(
                *qkv, context=context, kernel=kernel, axis="frames", length=60, block=16
            ),
            mesh=mesh,
            in_specs=(split, split, split),
            out_specs=split,
            check_vma=False,
        )
    )(*qkv)
    assert_equal_where_frames_exist(found, plain_attention(*qkv, context, 60), 60)


@pytest.mark.parametrize("block", [16, 500])
def test_gradients_of_local_attention_equal_plain_attentions(block):
    qkv = tuple(heads(i, 1, 45) for i in range(3))
    weight = heads(9, 1, 45)

    def total(attend):
        return jax.grad(lambda *qkv: (weight * attend(*qkv)).sum(), argnums=(0, 1, 2))(*qkv)

    fast = total(lambda *qkv: kernels.attend(*qkv, context=5, kernel="blocks", block=block))
    for one, other in zip(fast, total(lambda *qkv: plain_attention(*qkv, 5, 45))):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("context", [None, 5])
def test_attention_in_blocks_never_holds_a_square_array(context):
    num_frames = 1500
    shape = jax.ShapeDtypeStruct((1, num_frames, 2, 8), jnp.float32)
    compiled = jax.jit(
        lambda *qkv: kernels.attend(*qkv, context=context, kernel="blocks", block=32)
    )
    memory = compiled.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_frames * num_frames * 4 / 2


def test_kernels_go_by_platform_length_and_precision():
    def chosen(platform, num_frames, dtype, model=ModelConfig(), split=False, **asked):  # noqa: B008
        found = kernels.choose_kernels(
            KernelConfig(**asked), platform, model, num_frames, dtype, split=split
        )
        return found.full, found.local

    assert chosen("cpu", 500, jnp.float32) == ("dense", "blocks")
    assert chosen("cpu", 1500, jnp.float32) == ("blocks", "blocks")
    assert chosen("tpu", 500, jnp.bfloat16) == ("dense", "slices")
    assert chosen("tpu", 1500, jnp.bfloat16) == ("slices", "slices")
    assert chosen("gpu", 500, jnp.bfloat16) == ("cudnn", "blocks")
    assert chosen("gpu", 1500, jnp.float32) == ("blocks", "blocks")
    assert chosen("cpu", 500, jnp.float32, full="blocks", local="dense") == ("blocks", "dense")
    for platform, asked in (
        ("cpu", {"full": "cudnn"}),
        ("gpu", {"local": "splash"}),
        ("cpu", {"full": "splash"}),
    ):
        with pytest.raises(UserError, match="needs a"):
            chosen(platform, 500, jnp.float32, **asked)
    # cuDNN's kernel wants heads of a multiple of 8: others fall to the next best, or are refused.
    narrow = ModelConfig(width=96, num_heads=8)
    assert chosen("gpu", 500, jnp.bfloat16, model=narrow) == ("dense", "blocks")
    with pytest.raises(UserError, match="multiple of 8"):
        chosen("gpu", 500, jnp.bfloat16, model=narrow, full="cudnn")
    with pytest.raises(UserError, match="all frames on one device"):
        chosen("tpu", 500, jnp.bfloat16, split=True, full="splash")
    with pytest.raises(UserError, match="leaves 3 frames a device"):
        chosen("tpu", 3, jnp.bfloat16, split=True)
    with pytest.raises(UserError, match="JAX runs on METAL"):
        chosen("METAL", 500, jnp.float32)
    with pytest.raises(UserError, match="must be one of"):
        KernelConfig(full="flash")


def test_causal_attention_in_blocks_is_that_of_all_steps_at_once():
    qkv = tuple(heads(i, 2, 21) for i in range(3))
    scores = jnp.einsum("BTNH,BSNH->BNTS", *qkv[:2]) * 8**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(21, dtype=bool), scores, -jnp.inf), axis=-1)
    found = jax.jit(attention.causal_attention, static_argnames="block")(*qkv, block=8)
    np.testing.assert_allclose(found, jnp.einsum("BNTS,BSNH->BTNH", weights, qkv[2]), atol=3e-6)


def test_cross_attention_is_softmax_over_the_rows_own_tokens():
    query, key, value = heads(0, 2, 6), heads(1, 2, 5), heads(2, 2, 5)
    mask_BS = jnp.arange(5)[None] < jnp.array([[5], [2]])
    out = attention.cross_attention(query, key, value, mask_BS, jnp.zeros(2, jnp.int32))
    for row, length in enumerate((5, 2)):
        alone = attention.self_attention(
            query[row : row + 1], key[row : row + 1, :length], value[row : row + 1, :length]
        )
        np.testing.assert_allclose(out[row], alone[0], atol=1e-6)


def test_zero_keys_weigh_as_padding_does_in_the_reference():
    query, key, value = heads(0, 1, 6), heads(1, 1, 7), heads(2, 1, 7)
    is_token = jnp.arange(7)[None] < 4
    padded = attention.self_attention(
        query, key * is_token[..., None, None], value * is_token[..., None, None]
    )
    out = attention.cross_attention(query, key, value, is_token, jnp.array([3]))
    np.testing.assert_allclose(out, padded, atol=1e-6)


def test_a_row_without_text_gives_exact_zeros_and_finite_gradients():
    query, key, value = heads(0, 1, 6), heads(1, 1, 4), heads(2, 1, 4)

    def total(query, key, value):
        mask_BS = jnp.zeros((1, 4), bool)
        out = attention.cross_attention(query, key, value, mask_BS, jnp.zeros(1, jnp.int32))
        return jnp.abs(out).sum()

    value_, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, value)
    assert value_ == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_block_below_twice_the_context_is_refused():
    model = ModelConfig()
    with pytest.raises(UserError, match="below twice the 5 frames"):
        kernels.choose_kernels(KernelConfig(local_block=9), "cpu", model, 500, np.dtype("float32"))
    assert (
        kernels.choose_kernels(
            KernelConfig(local_block=10), "cpu", model, 500, np.dtype("float32")
        ).local_block
        == 10
    )


def test_a_blend_is_the_weighted_mean_of_attention_to_each_text():
    """Whatever the order, and with padding that has a key and value of its own."""
    query = heads(0, 2, 5)
    key, value = (jnp.stack([heads(i, 2, 4), heads(i + 1, 2, 4)], axis=1) for i in (1, 3))
    mask_BGS = np.array([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]], bool)
    zeros_BG = np.array([[2, 0], [0, 0]])
    weight_BTG = jax.nn.softmax(jax.random.normal(jax.random.key(9), (2, 5, 2)))
    for zero in (None, (heads(6, 1, 1), heads(7, 1, 1))):
        each = [
            attention.cross_attention(
                query, key[:, g], value[:, g], mask_BGS[:, g], zeros_BG[:, g], zero
            )
            for g in (0, 1)
        ]
        found = {}
        for order in ((0, 1), (1, 0)):
            arrays = (x[:, order] for x in (key, value, mask_BGS, zeros_BG))
            found[order] = attention.blended_attention(query, *arrays, weight_BTG[..., order], zero)
        expected = sum(weight_BTG[..., g, None, None] * each[g] for g in (0, 1))
        np.testing.assert_allclose(found[0, 1], expected, atol=1e-6)
        np.testing.assert_allclose(found[1, 0], found[0, 1], atol=1e-6)
        only = jnp.broadcast_to(jnp.array([1.0, 0.0]), weight_BTG.shape)
        alone = attention.blended_attention(query, key, value, mask_BGS, zeros_BG, only, zero)
        np.testing.assert_array_equal(alone, each[0])
        twice = (x[:, (0, 0)] for x in (key, value, mask_BGS, zeros_BG))
        same = attention.blended_attention(query, *twice, weight_BTG, zero)
        np.testing.assert_allclose(same, each[0], atol=1e-6)


@pytest.mark.parametrize("kernel", ["dense", "slices", "blocks"])
@pytest.mark.parametrize("length", [100, 71, 3])
def test_a_ring_is_attended_around(kernel, length):
    """As the same frames repeated in a line; one program for all lengths."""
    context, qkv = 5, tuple(heads(i, 2, 100) for i in range(3))
    place_S = (np.arange(length + 2 * context) - context) % length
    line = tuple(x[:, place_S] for x in qkv)
    expected = plain_attention(*line, context, len(place_S))[:, context : context + length]
    run = jax.jit(kernels.attend, static_argnames=("context", "kernel", "block"))
    found = run(*qkv, context=context, kernel=kernel, block=16, around=jnp.int32(length))
    assert_equal_where_frames_exist(found, expected, length)


@pytest.mark.parametrize("how", [{"context": None}, {"context": 5, "kernel": "splash"}])
def test_a_ring_needs_near_frames_and_a_kernel_that_goes_around(how):
    with pytest.raises(ValueError, match="ring"):
        kernels.attend(*(heads(i, 1, 8) for i in range(3)), around=8, **{"kernel": "dense"} | how)
