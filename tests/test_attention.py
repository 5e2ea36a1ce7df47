"""Block-local attention equals the dense mask; cross-attention sees exactly its own text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import attention


def heads(key, batch, length, num_heads=3, size=8):
    return jax.random.normal(jax.random.key(key), (batch, length, num_heads, size))


@pytest.mark.parametrize("num_frames", [1, 4, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("context", [1, 5, 7])
def test_local_attention_equals_the_dense_mask(num_frames, context):
    query, key, value = (heads(i, 2, num_frames) for i in range(3))
    fast = attention.local_attention(query, key, value, context)
    plain = attention.dense_local_attention(query, key, value, context)
    np.testing.assert_allclose(fast, plain, atol=2e-6)


@pytest.mark.parametrize("block", [8, 32, 500])
def test_gradients_of_local_attention_equal_the_dense_masks(block):
    qkv = tuple(heads(i, 1, 45) for i in range(3))
    weight = heads(9, 1, 45)
    fast = jax.grad(
        lambda *a: (weight * attention.local_attention(*a, 5, block=block)).sum(), argnums=(0, 1, 2)
    )(*qkv)
    plain = jax.grad(
        lambda *a: (weight * attention.dense_local_attention(*a, 5)).sum(), argnums=(0, 1, 2)
    )(*qkv)
    for one, other in zip(fast, plain):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_local_attention_never_holds_a_square_array():
    num_frames = 1500
    shape = jax.ShapeDtypeStruct((1, num_frames, 2, 8), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attention.local_attention(q, k, v, 5))
    memory = compiled.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_frames * num_frames * 4 / 2


def test_cross_attention_is_softmax_over_the_rows_own_tokens():
    query, key, value = heads(0, 2, 6), heads(1, 2, 5), heads(2, 2, 5)
    mask_BS = jnp.arange(5)[None] < jnp.array([[5], [2]])
    out = attention.cross_attention(query, key, value, mask_BS, jnp.zeros(2, jnp.int32))
    for row, length in enumerate((5, 2)):
        alone = attention.full_attention(
            query[row : row + 1], key[row : row + 1, :length], value[row : row + 1, :length]
        )
        np.testing.assert_allclose(out[row], alone[0], atol=1e-6)


def test_zero_keys_weigh_as_padding_does_in_the_reference():
    query, key, value = heads(0, 1, 6), heads(1, 1, 7), heads(2, 1, 7)
    is_token = jnp.arange(7)[None] < 4
    padded = attention.full_attention(
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
