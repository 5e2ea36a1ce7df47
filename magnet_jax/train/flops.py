"""What training costs in floating-point operations.

Counted are the matrix products of the transformer, a multiplication and an addition as two
operations; norms, softmax, text encoder and codec are below a hundredth of them.
"""

from collections.abc import Sequence

from magnet_jax.config import ModelConfig


def training_flops(
    model: ModelConfig, num_frames: int, text_tokens: int, stage_weights: Sequence[float] = ()
) -> float:
    """Operations to train on a clip, on average over the stages; what is recomputed counts once.

    `stage_weights` say how often each stage is trained, as those of `RunConfig`; () is all alike.

    Backward costs twice forward. Attention of a stage with a restricted context sees near frames
    alone, and one stage's head is read, at every frame. A hybrid has a step more for every frame
    of delay, all heads for its prompt, and attention to it.
    """
    d, t, hybrid = model.width, num_frames, model.kind == "hybrid"
    macs = text_tokens * (model.text_width * d + model.num_layers * 2 * d * d)
    macs += t * d * model.codebook_size * (1 + model.num_codebooks * hybrid)
    t += (1 + max(model.delays)) if hybrid else 0
    weights = stage_weights or (1.0,) * model.num_codebooks
    for stage, weight in enumerate(weights):
        local = None if hybrid else model.context(stage > 0)
        near = t if local is None else min(2 * local + 1, t)
        layer = layer_macs(model, t, t, near, text_tokens, rows=1)
        macs += model.num_layers * layer * weight / sum(weights)
    return 3 * 2 * macs


def layer_macs(
    model: ModelConfig, num_frames: int, num_keys: int, near: int, text_tokens: int, rows: int
) -> int:
    """Multiplications of a layer for `num_frames` frames; the first of the rows alone has text.

    `num_keys` frames are projected to keys and values, of which a frame attends to `near`.
    """
    d = model.width
    row = (
        num_frames * (2 * d * d + 2 * near * d)
        + num_keys * 2 * d * d
        + num_frames * 2 * model.mlp_ratio * d * d
    )
    return rows * row + num_frames * (2 * d * d + 2 * text_tokens * d)
