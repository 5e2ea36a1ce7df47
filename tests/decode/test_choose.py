"""How tokens are chosen from probabilities."""

import jax
import jax.numpy as jnp
import numpy as np

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
