"""How tokens are chosen from probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.decode import choose


def test_a_nucleus_of_everything_keeps_everything():
    logits = 20 * jax.random.normal(jax.random.key(0), (50, 300))
    probs = jnp.concatenate([jax.nn.softmax(logits), jax.nn.one_hot(jnp.arange(3), 300)])
    np.testing.assert_allclose(choose.nucleus(probs, 1.0), probs, rtol=1e-5, atol=1e-7)


def test_top_k_keeps_the_k_most_probable():
    probs = jax.nn.softmax(5 * jax.random.normal(jax.random.key(0), (20, 300)))
    for k in (1, 2, 17, 250, 300, 1000):
        kept = np.asarray(jax.jit(choose.top_k_tokens)(probs, k))
        np.testing.assert_array_equal((kept > 0).sum(-1), min(k, 300))
        for row, kept_row in zip(np.asarray(probs), kept):
            best = np.argsort(-row)[:k]
            np.testing.assert_allclose(kept_row[best], row[best] / row[best].sum(), rtol=1e-5)


def test_settings_say_how_tokens_are_chosen():
    assert choose.choice_of(True, 5, 0.5)[0] == "greedy"
    assert choose.choice_of(False, 5, 0.5) == ("top_k", 5.0)
    assert choose.choice_of(False, 0, 0.5) == ("top_p", 0.5)


def replayed(one_RV, other_RV, said_R, fresh):
    """What the second of two distributions a row makes of tokens of the first."""
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(len(said_R)))
    token_R = jax.jit(choose.replay)(
        jnp.concatenate([keys_R, keys_R]), jnp.concatenate([one_RV, other_RV]),
        jnp.concatenate([said_R, said_R]), fresh,
    )  # fmt: skip
    assert token_R.dtype == jnp.int32
    np.testing.assert_array_equal(token_R[: len(said_R)], said_R)
    return np.asarray(token_R[len(said_R) :])


def test_a_replay_under_the_same_text_says_the_same():
    """Even where no one would have: any token of any distribution."""
    probs_RV = jax.nn.softmax(5 * jax.random.normal(jax.random.key(0), (3000, 64)))
    said_R = jax.random.randint(jax.random.key(1), (3000,), 0, 64)
    np.testing.assert_array_equal(replayed(probs_RV, probs_RV, said_R, 0.0), said_R)
    assert (replayed(probs_RV, probs_RV, said_R, 1.0) != said_R).mean() > 0.9
    changed = (replayed(probs_RV, probs_RV, said_R, 0.25) != said_R).mean()
    assert 0.2 < changed < 0.28


@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_a_replay_under_another_text_follows_that(fresh):
    """20000 tokens of one distribution become those of another, as few as may be changed."""
    one_V, other_V = jnp.array([0.5, 0.3, 0.15, 0.05]), jnp.array([0.4, 0.2, 0.1, 0.3])
    said_R = jax.random.categorical(jax.random.key(2), jnp.log(one_V), shape=(20_000,))
    rows = (jnp.broadcast_to(x, (20_000, 4)) for x in (one_V, other_V))
    token_R = replayed(*rows, said_R, fresh)
    found_V = np.bincount(token_R, minlength=4) / 20_000
    np.testing.assert_allclose(found_V, other_V, atol=0.015)
    by_chance = float((one_V * other_V).sum())
    agree = (token_R == said_R).mean()
    assert agree == pytest.approx(by_chance, abs=0.015) if fresh == 1 else agree > by_chance + 0.1
