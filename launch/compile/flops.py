"""What a generated clip costs in floating-point operations: by the reference's law, and at least.

Both count what `magnet_jax.train.flops` counts.
"""

import math
from collections.abc import Sequence

from magnet_jax.config import ModelConfig
from magnet_jax.train.flops import layer_macs


def reference_flops(
    model: ModelConfig, num_frames: int, text_tokens: int, steps: Sequence[int]
) -> float:
    """Operations a clip as the published implementation runs it.

    Every step computes two rows, with text and without, through everything: attention over all
    frames at all stages (that of the stages above 0 is masked, not skipped), keys and values of
    the text in every layer for both rows, and the heads of all codebooks.

    Args:
      model: sizes.
      num_frames: T.
      text_tokens: S, the positions that cross-attention sees.
      steps: decoding steps of each codebook.
    """
    d, t, s = model.width, num_frames, text_tokens
    layer = (
        t * (4 * d * d + 2 * t * d)  # self-attention: four projections, scores and values
        + t * (2 * d * d + 2 * s * d)  # cross-attention: query and output
        + s * 2 * d * d  # its keys and values
        + t * 2 * model.mlp_ratio * d * d
    )
    heads = t * model.num_codebooks * model.codebook_size * d
    return 2 * 2 * sum(steps) * (model.num_layers * layer + heads)


def floor_flops(
    model: ModelConfig, num_frames: int, text_tokens: int, steps: Sequence[int]
) -> float:
    """Operations a clip with all that does not change its tokens left out.

    - The row without text needs no cross-attention, which would add zeros.
    - Keys and values of the text are computed once a clip.
    - A stage whose context is restricted attends over so many frames to both sides, and no others.
    - Only the head of the stage, and only at the hidden frames, is read.
    - The last step of several has guidance 1 (as the defaults have it): no row without text.
    - That step hides one span. Above stage 0 each layer computes no more frames than that span
      can see through the layers above it.
    """
    d, t = model.width, num_frames
    macs = model.num_layers * text_tokens * 2 * d * d
    for stage, count in enumerate(steps):
        context = model.context(stage > 0)
        near = t if context is None else min(2 * context + 1, t)  # keys that a frame attends to
        step = model.num_layers * layer_macs(model, t, t, near, text_tokens, rows=2)
        last = step
        if count > 1:
            widths = [t] * model.num_layers
            if context is not None and stage > 0:
                widths = [
                    min(t, model.span_length + 2 * context * above)
                    for above in reversed(range(model.num_layers))
                ]
            keys = [t if context is None else min(t, width + 2 * context) for width in widths]
            last = sum(
                layer_macs(model, width, key, near, text_tokens, rows=1)
                for width, key in zip(widths, keys)
            )
        macs += (count - 1) * step + last
        hidden = [_hidden_frames(model, t, step, count) for step in range(count)]
        rows_frames = 2 * sum(hidden) - (hidden[-1] if count > 1 else 0)
        macs += rows_frames * d * model.codebook_size
    return 2 * macs


def _hidden_frames(model: ModelConfig, num_frames: int, step: int, count: int) -> int:
    """Frames hidden at a step of `count`: whole spans, at least one (section 3.3)."""
    rate = math.cos(math.pi / 2 * step / (count - 1)) if count > 1 else 1.0
    return max(int(rate * (num_frames // model.span_length)), 1) * model.span_length
