"""What MAGNeT learns: hide spans of one codebook and all codebooks above it, predict the spans."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import ModelConfig, Remat
from magnet_jax.model import transformer
from magnet_jax.model.attention import self_attention
from magnet_jax.train.masking import masking_rate, span_mask


class Corrupted(NamedTuple):
    input_BKT: jax.Array  # token ids with V where hidden or padding
    target_BT: jax.Array  # the stage's true tokens
    mask_BT: jax.Array  # True where the loss counts: hidden and not padding


class Noise(NamedTuple):
    """The random numbers of one training step, a row each; nothing else in it is random."""

    rate_B: jax.Array
    starts_BT: jax.Array
    drop_text_B: jax.Array


def stage_of_step(seed: int, step: int, num_codebooks: int, weights: Sequence[float] = ()) -> int:
    """The codebook that step `step` trains, the same on every host.

    Uniform over all, as in the paper, or as often as `weights` say, a number a codebook.
    """
    rng = np.random.default_rng([seed, step])
    if not weights:  # apart from weights that are all alike, so that older runs resume exactly
        return int(rng.integers(num_codebooks))
    return int(rng.choice(num_codebooks, p=np.asarray(weights) / np.sum(weights)))


def draw_noise(
    key: jax.Array, seed_B: jax.Array, num_frames: int, condition_dropout: float
) -> Noise:
    """Draws each row's randomness from (key, its own seed): neighbours and hosts change nothing.

    Args:
      key: the run's key.
      seed_B: one integer a clip, new at every visit of the clip.
      num_frames: T.
      condition_dropout: probability that a row is trained without its text.
    """

    def row(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rate_key, start_key, drop_key = jax.random.split(jax.random.fold_in(key, seed), 3)
        return (
            masking_rate(jax.random.uniform(rate_key)),
            jax.random.uniform(start_key, (num_frames,)),
            jax.random.bernoulli(drop_key, condition_dropout),
        )

    return Noise(*jax.vmap(row)(seed_B))


def hide(
    codes_BKT: jax.Array,
    mask_BT: jax.Array,
    valid_BT: jax.Array,
    stage: jax.Array | int,
    mask_id: int,
    given_BKT: jax.Array | bool = False,
) -> Corrupted:
    """Hides `mask_BT` in codebook `stage` and everything in the codebooks above it (section 2).

    Padding is hidden in every codebook and left out of the loss. AudioCraft does so with
    `tokens.padding_with_special_token`, which its MAGNeT configs leave off: there, the tokens of
    silence after a clip are learnt like others. What is `given_BKT` and no padding is not hidden.
    """
    codebook_1K1 = jnp.arange(codes_BKT.shape[1])[None, :, None]
    hidden_BKT = (codebook_1K1 > stage) | ((codebook_1K1 == stage) & mask_BT[:, None])
    hidden_BKT = hidden_BKT & ~jnp.asarray(given_BKT)
    hidden_BKT = hidden_BKT | ~valid_BT[:, None]
    return Corrupted(
        input_BKT=jnp.where(hidden_BKT, mask_id, codes_BKT),
        target_BT=jax.lax.dynamic_index_in_dim(codes_BKT, stage, axis=1, keepdims=False),
        mask_BT=mask_BT & valid_BT,
    )


class Sums(NamedTuple):
    """What a batch adds to the loss, [B] or totals; sums, so that parts of a batch add up."""

    nll: jax.Array  # negative log-likelihood of the masked tokens, nats
    hits: jax.Array  # masked tokens that were the most probable
    tokens: jax.Array  # masked tokens


def score(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array) -> Sums:
    """Each row's sums over its masked tokens, float32."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    nll_BT = -jnp.take_along_axis(log_probs_BTV, target_BT[..., None], axis=-1)[..., 0]
    hit_BT = (logits_BTV.argmax(-1) == target_BT) & mask_BT
    return Sums(
        jnp.where(mask_BT, nll_BT, 0.0).sum(1),
        hit_BT.sum(1).astype(jnp.float32),
        mask_BT.sum(1).astype(jnp.float32),
    )


def means(sums: Sums) -> dict[str, jax.Array]:
    """Mean cross-entropy a masked token in nats, and share of them predicted exactly."""
    tokens = jnp.maximum(sums.tokens.sum(), 1.0)
    return {"loss": sums.nll.sum() / tokens, "accuracy": sums.hits.sum() / tokens}


@transformer.exact_products
def sums(
    params: dict,
    states_BSE: jax.Array,
    text_mask_BS: jax.Array,
    codes_BKT: jax.Array,
    valid_BT: jax.Array,
    noise: Noise,
    stage: jax.Array,
    *,
    config: ModelConfig,
    local: bool,
    dtype: jnp.dtype = jnp.float32,
    attend: Callable[..., jax.Array] = self_attention,
    remat: Remat = "none",
    sharding: jax.sharding.Sharding | None = None,
) -> Sums:
    """Each row's share of the training loss of one stage (sections 2 and 3.1).

    Args:
      params: the transformer's parameters.
      states_BSE, text_mask_BS: text encoder states and which of them are tokens.
      codes_BKT, valid_BT: true tokens, and which frames are not padding.
      noise: from `draw_noise`.
      stage: codebook to predict, traced; `local` must be `stage > 0`.
      attend, remat, sharding: see `Transformer.trunk`.
    """
    mask_BT = span_mask(noise.starts_BT, noise.rate_B, config.span_length)
    corrupted = hide(codes_BKT, mask_BT, valid_BT, stage, config.mask_id)
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS & ~noise.drop_text_B[:, None], dtype=dtype)
    states_BTD = model.trunk(
        corrupted.input_BKT,
        text,
        local=local,
        attend=attend,
        remat=remat,
        sharding=sharding,
    )
    return score(model.head(states_BTD, stage), corrupted.target_BT, corrupted.mask_BT)
