"""How likely a model holds the tokens of a clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.decode import likelihood
from magnet_jax.decode.sampler import Rescorer

V, K = 8, 3


@pytest.mark.parametrize(("num_frames", "span", "groups"), [(60, 3, 4), (50, 3, 4), (7, 1, 2)])
def test_each_frame_is_hidden_once_and_its_neighbours_are_not(num_frames, span, groups):
    hidden_GT = likelihood.interleaved(num_frames, span, groups)[:, 0]
    assert hidden_GT.shape == (groups, num_frames)
    np.testing.assert_array_equal(hidden_GT.sum(0), 1)
    group_T = hidden_GT.argmax(0)
    same_T = group_T[1:] == group_T[:-1]
    np.testing.assert_array_equal(same_T, np.arange(1, num_frames) % span != 0)


def test_one_group_hides_everything():
    assert likelihood.interleaved(10, 3, 1).all()


def chances(table_KNV, codes_KT, stage):
    """Probabilities [T, V]: of what lies to the left, the codebooks together, and of the frame."""
    seen_T = codes_KT.sum(0)
    return jax.nn.softmax(table_KNV[stage, seen_T + jnp.roll(seen_T, 1)], axis=-1)


def read(params, texts, *, num_frames, length):
    assert length is None

    def probabilities(codes_BKT, hidden_BT, stage, *, local):
        token_BT = codes_BKT[:, stage]
        seen_BKT = codes_BKT.at[:, stage].set(jnp.where(hidden_BT, V, token_BT))
        probs_BTV = jax.vmap(lambda codes_KT: chances(params, codes_KT, stage))(seen_BKT)
        probs_BTV = probs_BTV * texts[:, None, None]
        return jnp.take_along_axis(probs_BTV, token_BT[..., None], axis=-1)[..., 0]

    return probabilities


def tokenize(texts, text_pad_len):
    return np.array([1 / len(text) for text in texts], np.float32)


@pytest.mark.parametrize("above", ["hidden", "shown"])
def test_values_are_those_of_one_pass_a_group(above):
    rng = np.random.default_rng(0)
    table_KNV = jnp.asarray(3 * rng.normal(size=(K, 2 * K * V + 1, V)), jnp.float32)
    codes_BKT = rng.integers(0, V, (2, K, 31))
    hidden_G1T = likelihood.interleaved(31, 3, 4)
    hidden_G1T[3] = False  # of what is never hidden nothing is said
    found_BKT = likelihood.log_probabilities(
        Rescorer(read, table_KNV, tokenize), ["a", "four"], codes_BKT, hidden_G1T, mask_id=V,
        above=above,
    )  # fmt: skip
    expected_BKT = np.zeros(codes_BKT.shape)
    for b, share in enumerate((1, 1 / 4)):
        for k in range(K):
            for hidden_T in hidden_G1T[:, 0]:
                seen_KT = codes_BKT[b].copy()
                seen_KT[k, hidden_T] = V
                if above == "hidden":
                    seen_KT[k + 1 :] = V
                else:
                    seen_KT[k + 1 :, hidden_T] = V
                probs_TV = np.asarray(chances(table_KNV, jnp.asarray(seen_KT), k))
                prob_T = share * probs_TV[np.arange(31), codes_BKT[b, k]]
                expected_BKT[b, k, hidden_T] = np.log(prob_T)[hidden_T]
    np.testing.assert_allclose(found_BKT, expected_BKT, rtol=1e-4, atol=1e-5)
