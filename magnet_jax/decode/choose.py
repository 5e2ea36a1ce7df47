"""How a token is chosen from probabilities, and the random numbers for it."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Choice = Literal["greedy", "top_k", "top_p"]


def _most_probable(
    probs_V: jax.Array, measure: Callable[[jax.Array], jax.Array], limit: jax.Array | float
) -> jax.Array:
    """Keeps the tokens for which the set of strictly more probable ones measures at most `limit`.

    That set grows as a threshold falls, and the lowest threshold that still fits is found by
    bisection over the bits of a float, exactly and without a sort. Renormalised; float32 [..., V].
    """
    high = jnp.full(probs_V.shape[:-1], np.float32(1).view(np.int32))  # above it: within the limit
    low = jnp.full_like(high, -1)  # above it: beyond

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        within = measure(jnp.where(probs_V > threshold, probs_V, 0.0)) <= limit
        return jnp.where(within, low, middle), jnp.where(within, middle, high)

    _, high = jax.lax.fori_loop(0, 30, halve, (low, high))
    # Where even the whole is within the limit, the search ends below the bits of 0.
    threshold = jax.lax.bitcast_convert_type(jnp.maximum(high, 0), jnp.float32)[..., None]
    kept_V = jnp.where(probs_V >= threshold, probs_V, 0.0)
    return kept_V / kept_V.sum(-1, keepdims=True)


def nucleus(probs_V: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The nucleus: a token stays while the mass of the more probable ones is at most `top_p`."""
    return _most_probable(probs_V, lambda above_V: above_V.sum(-1), top_p)


def top_k_tokens(probs_V: jax.Array, top_k: jax.Array | float) -> jax.Array:
    """The k most probable tokens, and those as probable as the last of them."""
    return _most_probable(probs_V, lambda above_V: (above_V > 0).sum(-1), top_k - 1)


def choice_of(greedy: bool, top_k: int, top_p: float) -> tuple[Choice, float]:
    """How settings choose tokens, and the number that limits the choice."""
    if greedy:
        return "greedy", 0.0
    return ("top_k", float(top_k)) if top_k else ("top_p", top_p)


def guide(
    logits: jax.Array, without: jax.Array | None, coefficient: jax.Array | float
) -> jax.Array:
    """Classifier-free guidance (equation 6): logits with text, away from those without, if any."""
    return logits if without is None else without + coefficient * (logits - without)


def choose_token(
    keys_B: jax.Array, probs_BV: jax.Array, choice: Choice, limit: jax.Array | float
) -> jax.Array:
    """A token for each place, int32 [B] (or [B, ...], if the probabilities are [B, ..., V]).

    'greedy' takes the most probable, 'top_k' and 'top_p' sample among the most probable ones, of
    which `limit` is the number or the mass. `keys_B` has one random key a row.

    Where the network's numbers overflowed, all probabilities are NaN, and the mask id V is given in
    place of a token: it stays in the clip, and whoever reads the clip sees it.
    """
    overflown_B = jnp.isnan(probs_BV[..., 0])
    if choice == "greedy":
        token_B = probs_BV.argmax(-1)
    else:
        kept_BV = {"top_k": top_k_tokens, "top_p": nucleus}[choice](probs_BV, limit)
        token_B = jax.vmap(jax.random.categorical)(keys_B, jnp.log(kept_BV))
    return jnp.where(overflown_B, probs_BV.shape[-1], token_B).astype(jnp.int32)


def replay(
    keys_R: jax.Array, probs_RV: jax.Array, said_R: jax.Array, fresh: jax.Array | float
) -> jax.Array:
    """What a clip would have said under another text, had chance been the same; int32 [R].

    The first half of the rows has the clip's own text, the second the other one. A token is the
    most probable after Gumbel noise is added. Of the first half the token is known, so noise is
    drawn that makes it the most probable; the second half gets the same. Where both texts give the
    same probabilities, the token stays. (Counterfactuals by Gumbel-max, as in DICE, arXiv
    2410.08207, for models that mask.)

    Args:
      keys_R: one key a row; the halves have the same.
      probs_RV: probabilities.
      said_R: the known tokens, twice.
      fresh: share of the second half's tokens whose noise is drawn anew.
    """
    half = len(probs_RV) // 2
    log_RV = jnp.log(jnp.maximum(probs_RV, 1e-30))

    def noise(key, log_V, said):
        key, other = jax.random.split(key)
        # The largest of all sums is Gumbel's too; the others lie below it.
        largest = jax.random.gumbel(key)
        sums_V = log_V + jax.random.gumbel(other, log_V.shape)
        below_V = largest - jax.nn.softplus(largest - sums_V)
        return below_V.at[said].set(largest) - log_V

    noise_HV = jax.vmap(noise)(keys_R[:half], log_RV[:half], said_R[:half])
    keys_H2 = jax.vmap(jax.random.split)(jax.vmap(jax.random.fold_in, (0, None))(keys_R[half:], 1))
    anew_H = jax.vmap(jax.random.uniform)(keys_H2[:, 0]) < fresh
    new_HV = jax.vmap(lambda key: jax.random.gumbel(key, log_RV.shape[1:]))(keys_H2[:, 1])
    noise_HV = jnp.where(anew_H[:, None], new_HV, noise_HV)
    token_H = (log_RV[half:] + noise_HV).argmax(-1)
    overflown_R = jnp.isnan(probs_RV[:, 0])
    token_R = jnp.concatenate([said_R[:half], token_H])
    return jnp.where(overflown_R, probs_RV.shape[-1], token_R).astype(jnp.int32)


def sample_keys(seed: jax.Array | int, sample_B: jax.Array) -> jax.Array:
    """One key a sample, from (seed, number of the sample): batching changes nothing.

    The seed is one for all, or [B].
    """
    seed_B = jnp.broadcast_to(seed, sample_B.shape)
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seed_B), sample_B)


def frame_keys(
    keys_B: jax.Array, stage: jax.Array, step: jax.Array, frame_BM: jax.Array
) -> jax.Array:
    """One key [B, M] a frame: no frame's token depends on which others are drawn, or how."""
    fold = jax.random.fold_in
    own = lambda key, frame_M: jax.vmap(fold, (None, 0))(fold(fold(key, stage), step), frame_M)  # noqa: E731
    return jax.vmap(own)(keys_B, frame_BM)
