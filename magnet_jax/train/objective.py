"""What MAGNeT learns: hide spans of one codebook and all codebooks above it, predict the spans."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.model import transformer
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


class LossAux(NamedTuple):
    """What a loss is made of, [B] or totals. They are sums, so that parts of a batch add up."""

    nll: jax.Array  # negative log-likelihood of the predicted tokens, nats
    hits: jax.Array  # predicted tokens that were the most probable
    tokens: jax.Array  # predicted tokens

    def metrics(self) -> dict[str, jax.Array]:
        """Mean cross-entropy of a predicted token in nats, and the share predicted exactly."""
        tokens = jnp.maximum(self.tokens.sum(), 1.0)
        return {"loss": self.nll.sum() / tokens, "accuracy": self.hits.sum() / tokens}


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

    A clip has another seed at every visit.
    """

    def row(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rate_key, start_key, drop_key = jax.random.split(jax.random.fold_in(key, seed), 3)
        return (
            masking_rate(jax.random.uniform(rate_key)),
            jax.random.uniform(start_key, (num_frames,)),
            jax.random.bernoulli(drop_key, condition_dropout),
        )

    return Noise(*jax.vmap(row)(seed_B))


def corrupt(
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


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array) -> LossAux:
    """Each row's cross-entropy over its masked tokens, float32 [B]."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    nll_BT = -jnp.take_along_axis(log_probs_BTV, target_BT[..., None], axis=-1)[..., 0]
    hit_BT = (logits_BTV.argmax(-1) == target_BT) & mask_BT
    return LossAux(
        jnp.where(mask_BT, nll_BT, 0.0).sum(1),
        hit_BT.sum(1).astype(jnp.float32),
        mask_BT.sum(1).astype(jnp.float32),
    )


@transformer.exact_products
def loss_fn(
    params: dict,
    states_BSE: jax.Array,
    batch: dict[str, jax.Array],
    noise: Noise,
    stage: jax.Array | int,
    *,
    config: ModelConfig,
    local: bool,
    dtype: jnp.dtype = jnp.float32,
    **trunk: Any,
) -> tuple[jax.Array, LossAux]:
    """The training loss of one stage (sections 2 and 3.1), summed over a batch.

    Args:
      params, states_BSE: of the transformer, and from the text encoder.
      batch: text_mask_BS, which states are tokens; codes_BKT, true tokens; valid_BT, which frames
        are not padding.
      noise: from `draw_noise`.
      stage: codebook to predict, traced; `local` must be `stage > 0`.
      trunk: attend, remat, form, sharding, see `Transformer.trunk`.

    Returns:
      the sum of the cross-entropies in nats, and each row's share of it.
    """
    mask_BT = span_mask(noise.starts_BT, noise.rate_B, config.span_length)
    corrupted = corrupt(batch["codes_BKT"], mask_BT, batch["valid_BT"], stage, config.mask_id)
    model = transformer.bind(config, params)
    text_mask_BS = batch["text_mask_BS"] & ~noise.drop_text_B[:, None]
    text = model.project_text(states_BSE, text_mask_BS, dtype=dtype)
    states_BTD = model.trunk(corrupted.input_BKT, text, local=local, **trunk)
    logits_BTV = model.head(states_BTD, stage)
    aux = cross_entropy(logits_BTV, corrupted.target_BT, corrupted.mask_BT)
    return aux.nll.sum(), aux
