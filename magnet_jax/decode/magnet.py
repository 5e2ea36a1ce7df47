"""MAGNeT's transformer as parallel decoding wants it: rows with text, and the same without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from magnet_jax.config import KernelConfig, ModelConfig
from magnet_jax.decode import joint, parallel, tokens_of_text
from magnet_jax.decode.parallel import Network
from magnet_jax.decode.ring import Ring
from magnet_jax.decode.schedule import Schedule
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.model import transformer
from magnet_jax.model.kernels import with_kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Savings:
    """Work that decoding does not do because it changes nothing, each with its share of it.

    Shares are of the operations of a 10 s clip of the 420 M model; docs/performance.md has more.
    """

    null_text: bool = True
    """Rows without text skip cross-attention, which would add exact zeros; 7 %."""
    last_guidance: bool = True
    """Where the last step's guidance coefficient is 1, it has no rows without text; 3 %."""
    last_window: bool = True
    """A local stage's last step computes the frames that its one span can see, and one of an edit
    those that its regions can; 2 % of a clip."""


ALL_SAVINGS = Savings()
NO_SAVINGS = Savings(null_text=False, last_guidance=False, last_window=False)


def guided_network(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    num_frames: int,
    *,
    kernels: KernelConfig,
    length: jax.Array | int | None = None,
    ring: Ring | None = None,
    savings: Savings = ALL_SAVINGS,
    guidance_axis: str | None = None,
    frames_axis: str | None = None,
) -> Network:
    """The transformer as `parallel.decode` wants it.

    Args:
      num_frames: of a whole clip, or of the longest line of a ring's frames that is heard.
      kernels: from `kernels.choose_kernels`.
      length: frames that exist, all by default; of a ring, its frames.
      ring: how the clip is heard whose last frame leads to its first.
      savings: see `Savings`; of them `null_text` is the network's.
      guidance_axis: mesh axis of two devices, of which the second computes the rows without text.
      frames_axis: mesh axis over which the frames are split.
    """
    # One array for all uses: as constants they would be in the program once a use.
    position_TD = jnp.asarray(transformer.sinusoids(num_frames, config.width))

    def twice(x):
        return jnp.concatenate([x, x])

    # Rows without text are computed as such where attention has biases: there, no text adds
    # something. With norms of queries and keys alone its values are still zeros.
    null_rows, negative = transformer.with_null_rows(text), text.negative
    text = text._replace(negative=None)
    skips_null = savings.null_text and config.null_text_adds_nothing and negative is None

    def trunk(codes_BKT, *, stage, local, guided, first_B, frame_1T=None):
        rows_text = text
        if guided and guidance_axis is not None:
            rows_text = _of_device(text, negative, guidance_axis)
        elif guided:
            codes_BKT, rows_text = twice(codes_BKT), text if skips_null else null_rows
            first_B = None if first_B is None else twice(first_B)
        near = config.context(local) is not None  # a model may see everything at all stages
        attend = with_kernels(kernels, near=near)
        positions_BTD, num_frames = position_TD[None], codes_BKT.shape[-1]
        if ring is not None:
            positions_BTD = positions_BTD[:, :num_frames]
            rows_text = rows_text.at(frame_1T)
            if ring.around[local]:
                attend = functools.partial(attend, around=length)
        elif first_B is not None:
            frame_BT = first_B[:, None] + jnp.arange(num_frames)[None]
            positions_BTD = position_TD[frame_BT]
            rows_text = rows_text.at(frame_BT[: len(rows_text.mask_BS)])
            attend = functools.partial(attend, length=None if length is None else length - first_B)
        elif frames_axis is not None:
            share = num_frames // jax.lax.axis_size(frames_axis)
            first = jax.lax.axis_index(frames_axis) * share
            positions_BTD = jax.lax.dynamic_slice_in_dim(positions_BTD, first, share, axis=1)
            codes_BKT = jax.lax.dynamic_slice_in_dim(codes_BKT, first, share, axis=-1)
            rows_text = rows_text.at(first + jnp.arange(share)[None])
            whole = num_frames if length is None else length
            attend = functools.partial(attend, axis=frames_axis, length=whole)
        else:
            attend = functools.partial(attend, length=length)
        model = transformer.bind(config, params)
        how = {"local": local, "attend": attend, "positions_BTD": positions_BTD}
        return model.trunk(codes_BKT, rows_text, **how)

    def head(states_RMD, stage, *, guided):
        logits_RMV = transformer.bind(config, params).head(states_RMD, stage)
        if not guided:
            return logits_RMV, None
        if guidance_axis is not None:
            return tuple(jax.lax.all_gather(logits_RMV, guidance_axis))
        return tuple(jnp.split(logits_RMV, 2))

    return Network(trunk, head)


def _of_device(
    text: transformer.TextKeys, negative: transformer.TextKeys | None, guidance_axis: str
) -> transformer.TextKeys:
    """The texts on the first device of guidance, and what it leads away from on the second."""
    here = jax.lax.axis_index(guidance_axis) == 0
    if negative is not None:
        return jax.tree.map(functools.partial(jnp.where, here), text, negative)
    return text._replace(
        mask_BS=text.mask_BS & here, num_zero_keys_B=jnp.where(here, text.num_zero_keys_B, 0)
    )


def read_texts(
    config: ModelConfig,
    params: dict,
    text_states: TextStates,
    task: parallel.Task,
    rules: parallel.Rules,
    *,
    dtype: jnp.dtype,
) -> transformer.TextKeys:
    """What the network of a task needs of its texts."""
    num_frames = task.canvas.codes_BKT.shape[-1]
    if rules.windows is not None:  # whose texts are their own
        num_frames = rules.windows.size
    return tokens_of_text.read(
        transformer.bind(config, params), text_states, num_frames, dtype=dtype
    )


def network_of_task(
    config: ModelConfig,
    params: dict,
    text: transformer.TextKeys,
    task: parallel.Task,
    rules: parallel.Rules,
    **how,
) -> Network:
    """`guided_network`, whose other arguments are `how`, for what is decoded."""
    num_frames, length = task.canvas.codes_BKT.shape[-1], task.length
    if rules.ring is not None:
        num_frames, length = max(num_frames, rules.ring.window), task.end
    if rules.windows is not None:
        num_frames = rules.windows.size
    network = guided_network(
        config, params, text, num_frames, length=length, ring=rules.ring,
        frames_axis=rules.frames_axis, **how,
    )  # fmt: skip
    return network if rules.windows is None else joint.joined(network, rules.windows)


@transformer.exact_products
def generate(
    params: dict,
    text_states: TextStates,
    task: parallel.Task,
    schedule: tuple[Schedule, ...],
    *,
    config: ModelConfig,
    rules: parallel.Rules,
    kernels: KernelConfig,
    savings: Savings = ALL_SAVINGS,
    guidance_axis: str | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> parallel.Decoded:
    """From text encoder states to tokens; to be traced.

    A row without any token of text is generated unconditionally; of no rows at all, no clip has a
    text. The numbers of `schedule` may change without a new program. Of windows that share a canvas
    each has a row of text. For the other arguments see `guided_network` and `parallel.decode`.
    """
    text = read_texts(config, params, text_states, task, rules, dtype=dtype)
    network = network_of_task(
        config, params, text, task, rules, kernels=kernels, savings=savings,
        guidance_axis=guidance_axis,
    )  # fmt: skip
    return parallel.decode(network, rules, task, schedule)
