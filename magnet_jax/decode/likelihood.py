"""How likely a model holds the tokens of a clip, each given others: what decoding would be sure of.

The scores within decoding are no measure of a clip: they are taken at some temperature, guided, at
some step. Here tokens are hidden in groups, a group at a time, and read at temperature 1, without
guidance. It is a rescorer that reads, so every kind of model can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax import programs
from magnet_jax.decode.sampler import Rescorer
from magnet_jax.prompts import Description

LEAST = 1e-30  # probability whose logarithm stands for 0


def interleaved(num_frames: int, span: int, groups: int) -> np.ndarray:
    """Masks [G, 1, T] that together hide each span of a clip once, none beside its neighbour."""
    group_T = np.arange(num_frames) // span % groups
    return (group_T == np.arange(groups)[:, None])[:, None]


@functools.partial(jax.jit, static_argnames=("read", "mask_id", "above"))
def _log_probabilities(params, texts, codes_BKT, hidden_GBT, *, read, mask_id, above):
    batch, num_codebooks, num_frames = codes_BKT.shape
    probabilities = read(params, texts, num_frames=num_frames, length=None)

    def of_codebook(stage: jax.Array, *, local: bool) -> jax.Array:
        above_K = jnp.arange(num_codebooks) > stage

        def add(total_BT: jax.Array, hidden_BT: jax.Array) -> tuple[jax.Array, None]:
            hidden_BT = jnp.broadcast_to(hidden_BT, (batch, num_frames))
            unseen_BKT = above_K[None, :, None] & (hidden_BT[:, None] | (above == "hidden"))
            seen_BKT = jnp.where(unseen_BKT, mask_id, codes_BKT)
            prob_BT = probabilities(seen_BKT, hidden_BT, stage, local=local)
            log_BT = jnp.log(jnp.maximum(prob_BT, LEAST))
            return total_BT + jnp.where(hidden_BT, log_BT, 0.0), None

        return jax.lax.scan(add, jnp.zeros((batch, num_frames)), hidden_GBT)[0]

    first_BT = of_codebook(jnp.int32(0), local=False)
    others = jax.lax.map(functools.partial(of_codebook, local=True), jnp.arange(1, num_codebooks))
    return jnp.concatenate([first_BT[None], others]).swapaxes(0, 1)


def log_probabilities(
    reader: Rescorer,
    texts: list[Description],
    codes_BKT: np.ndarray,
    hidden_GBT: np.ndarray,
    *,
    mask_id: int,
    above: str = "hidden",
) -> np.ndarray:
    """Log-probabilities [B, K, T] in nats of a clip's tokens where they are hidden; 0 elsewhere.

    Args:
      reader: from `rescore.from_model`, without guidance.
      texts: of the clips.
      codes_BKT: their tokens.
      hidden_GBT: of each codebook in turn, what is hidden together; B may be 1. No frame is hidden
        twice.
      mask_id: V.
      above: whether codebooks above the one that is read are hidden everywhere, as in training, or
        'shown' where nothing is hidden.
    """
    log_BKT = programs.call(
        _log_probabilities,
        reader.params,
        reader.tokenize(texts, None),
        np.asarray(codes_BKT, np.int32),
        hidden_GBT,
        what=f"the likelihood of {len(texts)} clip{'s' * (len(texts) > 1)}",
        read=reader.read,
        mask_id=mask_id,
        above=above,
    )
    return np.asarray(log_BKT)
