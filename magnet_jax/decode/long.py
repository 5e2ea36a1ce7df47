"""Clips that are longer than what a model hears at once: windows of that length (docs/long.md).

A MAGNeT makes them in one of three modes (`config.LongConfig`). What they share:

- A clip's random numbers go by its frames, and a clip begins with the clip of one window.
- Whole windows are made, and what reaches beyond the clip's end is cut off. So a longer clip begins
  with the shorter one, in all modes but `joint`, whose windows all depend on each other.
- Tokens are all there before one becomes a sample: audio has no seams.

A MusicGen goes on from window to window, as AudioCraft's does.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.config import EditConfig, LongConfig, ModelConfig
from magnet_jax.decode import canvas, sampling
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.joint import Windows
from magnet_jax.decode.placement import Execution
from magnet_jax.decode.sampling import Batch, segment_frames
from magnet_jax.decode.tokens_of_text import Text
from magnet_jax.errors import UserError

STRIDES = {"sliding": 0.6, "joint": 0.5}  # of a window
HOLE = 0.4  # of a window: what is between anchors
GAP = 1 / 3  # of what an anchor hears of the first window: frames behind it, which are thrown away
ROWS = 32  # windows that are made at once, unless more clips are asked for
USUAL = LongConfig()
_SAMPLES = 2**16  # by which the numbers of a MusicGen's windows lie apart


class Part(NamedTuple):
    """What there is of clips after some of their windows; the arrays change as there is more."""

    codes_BKT: np.ndarray  # int32, as long as the clips; anything where nothing is made yet
    made_BT: np.ndarray  # True at frames that are there, and stay as they are
    done: int  # calls of the network's program,
    total: int  # and of how many


class Window(NamedTuple):
    """A window of a clip; in frames of the clip."""

    first: int
    begin: int  # [begin, end) is made in it
    end: int


class Round(NamedTuple):
    """Windows that are made at once."""

    windows: Sequence[Window]
    editing: EditConfig | None  # how they are decoded
    lead: int = 0  # frames at each window's start that are the last ones of the first window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of windows, in frames."""

    size: int
    stride: int
    lead: int
    gap: int


def windows(
    loaded: Loaded,
    batch: Batch,
    how: LongConfig = USUAL,
    stride: float | None = None,
    execution: Execution = Execution(),
) -> Iterator[Part]:
    """Makes clips longer than a window, and yields what there is of them at first and after each
    call of the network's program.

    Args:
      loaded: the model.
      batch: whole clips, from `sampling.make_batch`; of their canvas a beginning may be given.
      how: of a MAGNeT.
      stride: seconds by which windows lie apart, see `window_stride`.
      execution: how to run on the hardware.

    Raises:
      UserError: what is asked for does not go together.
    """
    seconds = window_stride(loaded, stride, "extend_stride", how)
    if loaded.config.model.kind == "musicgen":
        yield from _one_after_another(loaded, batch, seconds, execution)
        return
    num_frames = _whole(loaded, batch, batch.num_frames)[1]
    batch = dataclasses.replace(batch, canvas=canvas.resized(batch.canvas, num_frames))
    shape = shape_of(loaded, batch, how, seconds)
    made = _joint if how.mode == "joint" else _in_rounds
    for part in made(loaded, batch, how, shape, execution):
        codes_BKT, made_BT = part.codes_BKT[..., :num_frames], part.made_BT[:, :num_frames]
        yield part._replace(codes_BKT=codes_BKT, made_BT=made_BT)


def window_stride(
    loaded: Loaded, seconds: float | None, name: str, how: LongConfig = USUAL
) -> float:
    """Seconds by which windows lie apart; by default 0.6 of a window, and half of one in `joint`.

    Anchors are as far apart as leaves a hole of 0.4 of a window between them. Raises `UserError`,
    which calls the number `name`, for what no windows can be apart.
    """
    window, rate = loaded.config.data.segment_seconds, loaded.codec.frame_rate
    least, most, default = 0.0, window, STRIDES.get(how.mode, 0.0) * window
    if how.mode == "anchors" and loaded.config.model.kind != "musicgen":
        least = (1 - how.lead * (1 + GAP)) * window
        most, default = least + window, least + HOLE * window
    if seconds is None:
        return default
    frames, last = round((seconds - least) * rate), round(window * rate)
    # Sliding windows may have nothing in common. A MusicGen's go on from something, at least.
    if seconds == window and how.mode == "sliding" and loaded.config.model.parallel:
        return seconds
    if not least < seconds < most or not 1 <= frames < last:
        raise UserError(
            f"{name} must lie between {least:g} and {most:g} seconds for windows of {window:g} "
            f"seconds, not {seconds:g}"
        )
    return seconds


def stride_of_clip(
    loaded: Loaded, num_frames: int, seconds: float | None, name: str, how: LongConfig
) -> float | None:
    """`window_stride` of a clip that is made in windows; None of any other clip.

    Raises `UserError`, which calls the number `name`, where it would have no effect.
    """
    if num_frames > _window(loaded):
        return window_stride(loaded, seconds, name, how)
    if seconds is not None:
        raise UserError(
            f"{name} is for clips of more than {loaded.config.data.segment_seconds:g} seconds: "
            "leave it out"
        )
    return None


def texts_of_windows(text: Text, clip_R: np.ndarray, first_R: np.ndarray) -> Text:
    """The texts of windows, from those of whole clips.

    Args:
      text: of the clips.
      clip_R: of each window, the number of its clip in the batch.
      first_R: and the frame of the clip at which it begins.
    """
    windows = jax.tree.map(lambda x: x[clip_R], text)

    def moved(text: Text) -> Text:
        knot_RP = text.shares.knot_BP - first_R[:, None]
        return text._replace(shares=text.shares._replace(knot_BP=knot_RP.astype(np.float32)))

    if text.shares is None:
        return windows
    negative = windows.negative and moved(windows.negative)
    return moved(windows)._replace(negative=negative)


def _rescored(batch: Batch, clip_R: np.ndarray, first_R: np.ndarray) -> Any:
    """The rescorer's texts of windows."""
    texts = batch.rescorer_texts
    if isinstance(texts, Text):
        return texts_of_windows(texts, clip_R, first_R)
    # What functions of others take of texts is no matter of time.
    return jax.tree.map(lambda x: x[clip_R], texts)


# --- how windows lie ------------------------------------------------------------------------------


def _window(loaded: Loaded) -> int:
    return segment_frames(loaded.config, loaded.codec)


def _whole(loaded: Loaded, batch: Batch, num_frames: int) -> tuple[ModelConfig, int]:
    """The model, and what is left of so many frames, where clips are cut to whole spans."""
    given = canvas.resized(batch.canvas, num_frames)
    batch = dataclasses.replace(batch, canvas=given)
    return sampling.model_for(loaded.config.model, batch)[:2]


def shape_of(loaded: Loaded, batch: Batch, how: LongConfig, stride: float | None = None) -> Shape:
    """Windows that begin at whole spans, so that all share a grid."""
    model, size = _whole(loaded, batch, _window(loaded))
    span, stride = model.span_length, window_stride(loaded, stride, "extend_stride", how)

    def frames(seconds: float) -> int:
        return max(round(seconds * loaded.codec.frame_rate / span), 1) * span

    lead = how.lead * loaded.config.data.segment_seconds
    lead, gap = (frames(lead), frames(GAP * lead)) if how.mode == "anchors" and lead else (0, 0)
    least, most = 1, size
    if how.mode == "anchors":  # a hole has two sides
        least, most = size - lead - gap + 1, 2 * size - lead - gap - 2 * span
    alone = how.mode == "sliding" and stride == loaded.config.data.segment_seconds
    apart = size if alone else min(max(frames(stride), least), most)
    return Shape(size=size, stride=apart, lead=lead, gap=gap)


def plan(
    how: LongConfig, shape: Shape, known: int, num_frames: int, *, prompts: bool = False
) -> list[Round]:
    """How clips are made of which `known` frames are given at the start.

    `prompts` is whether the model, a hybrid, has learnt to go on from a beginning as it is.
    """
    law, size = EditConfig(anneal=how.anneal, steps=how.steps), shape.size
    going_on = None if prompts else law
    heard = size - shape.stride if how.mode == "sliding" else round(HOLE * size)
    first = max(0, known - heard)
    rounds = [Round([Window(first, known, first + size)], None)]
    end = first + size
    if how.mode == "sliding":
        while end < num_frames:
            rounds.append(Round([Window(end - heard, end, end - heard + size)], going_on))
            end += size - heard
        return rounds
    anchors, holes = [], []
    while end < num_frames:
        first += shape.stride
        begin = first + shape.lead + shape.gap
        anchors.append(Window(first, begin, first + size))
        holes.append(Window((end + begin - size) // 2, end, begin))
        end = first + size
    if anchors:
        rounds.append(Round(anchors, going_on if shape.lead else None, shape.lead))
        rounds.append(Round(holes, law))
    return rounds


# --- how they are made ----------------------------------------------------------------------------


def _in_rounds(
    loaded: Loaded, batch: Batch, how: LongConfig, shape: Shape, execution: Execution
) -> Iterator[Part]:
    """The modes whose windows are those of a plan: each is made given what is there, for good."""
    prompts = loaded.config.model.autoregressive
    rounds = plan(how, shape, batch.num_given, batch.num_frames, prompts=prompts)
    total = max(window.first for round_ in rounds for window in round_.windows) + shape.size
    there = canvas.resized(batch.canvas, total)
    there = Canvas(there.codes_BKT.copy(), there.given_BKT.copy())
    calls = [(round_, rows) for round_ in rounds for rows in _calls(round_, len(there.codes_BKT))]
    yield Part(there.codes_BKT, there.given_BKT.all(1), 0, len(calls))
    for done, (round_, rows) in enumerate(calls, 1):
        begun = rounds[0].windows[0].end
        lead_BKT = there.codes_BKT[..., begun - round_.lead : begun]
        part = _rows(batch, round_, rows, there, lead_BKT, shape.size)
        new_RKT = sampling.run(loaded, part, execution).codes_BKT
        for (clip, window), new_KT in zip(rows, new_RKT):
            own = slice(window.begin - window.first, window.end - window.first)
            there.codes_BKT[clip, :, window.begin : window.end] = new_KT[:, own]
            there.given_BKT[clip, :, window.begin : window.end] = True
        yield Part(there.codes_BKT, there.given_BKT.all(1), done, len(calls))


def _calls(round_: Round, count: int) -> list[list[tuple[int, Window]]]:
    """The windows of so many clips, each with the number of its clip: a list for each call.

    All calls have as many, the last one of them several times.
    """
    rows = [(clip, window) for clip in range(count) for window in round_.windows]
    calls = -(-len(rows) // max(ROWS, count))
    size = -(-len(rows) // calls)
    rows += rows[-1:] * (calls * size - len(rows))
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _rows(
    batch: Batch,
    round_: Round,
    rows: list[tuple[int, Window]],
    there: Canvas,
    lead_BKT: np.ndarray,
    size: int,
) -> Batch:
    """The windows of a call as clips of a batch, of which what is there is given."""
    clip_R = np.array([clip for clip, _ in rows])
    first_R = np.array([window.first for _, window in rows], np.int32)
    codes, given = [], []
    for clip, window in rows:
        within = slice(window.first, window.first + size)
        codes.append(there.codes_BKT[clip, :, within].copy())
        given.append(there.given_BKT[clip, :, within].copy())
        if round_.lead:
            codes[-1][:, : round_.lead] = lead_BKT[clip]
            given[-1][:] = np.arange(size) < round_.lead
    return dataclasses.replace(
        _clips(batch, clip_R),
        text=texts_of_windows(batch.text, clip_R, first_R),
        rescorer_texts=_rescored(batch, clip_R, first_R),
        origin_B=first_R,
        canvas=Canvas(np.stack(codes), np.stack(given)),
        editing=round_.editing,
    )


def _clips(batch: Batch, clip_R: np.ndarray) -> Batch:
    """A batch of some of the clips, but for their texts and canvases."""
    return dataclasses.replace(
        batch,
        sample_B=batch.sample_B[clip_R],
        seed=np.broadcast_to(batch.seed, len(batch.sample_B))[clip_R],
        own=tuple(batch.own[clip] for clip in clip_R) if batch.own else (),
    )


def _joint(
    loaded: Loaded, batch: Batch, how: LongConfig, shape: Shape, execution: Execution
) -> Iterator[Part]:
    """All windows at once, in one program: those of so many clips as make `ROWS` of them."""
    if loaded.config.model.autoregressive or batch.rescorer is not None:
        raise UserError("joint windows are for a MAGNeT, without a rescorer: take mode sliding")
    if execution.mesh.frames > 1:
        raise UserError("joint windows cannot be split by frames: leave out mesh.frames")
    windows = joint_windows(loaded, batch, shape)
    whole = canvas.resized(batch.canvas, windows.num_frames)
    codes_BKT, made_BT = whole.codes_BKT.copy(), whole.given_BKT.all(1)
    count = len(codes_BKT)
    size = min(max(ROWS // windows.count, 1), count)
    groups = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    yield Part(codes_BKT, made_BT, 0, len(groups))
    for done, clip_G in enumerate(groups, 1):
        clip_R = np.repeat(clip_G, windows.count)
        first_R = np.tile(windows.starts_N, len(clip_G)).astype(np.int32)
        part = dataclasses.replace(
            _clips(batch, clip_G),
            text=texts_of_windows(batch.text, clip_R, first_R),
            canvas=Canvas(*(x[clip_G] for x in whole)),
            windows=windows,
        )
        codes_BKT[clip_G] = sampling.run(loaded, part, execution).codes_BKT
        made_BT[clip_G] = True
        yield Part(codes_BKT, made_BT, done, len(groups))


def joint_windows(loaded: Loaded, batch: Batch, shape: Shape) -> Windows:
    """Windows of whole spans that cover the clips."""
    model = _whole(loaded, batch, shape.size)[0]
    size = sampling.decoded_frames(model, batch.decode, shape.size)[1]
    count = 1 + max(0, -(-(batch.num_frames - size) // shape.stride))
    return Windows(size=size, stride=shape.stride, count=count)


def _one_after_another(
    loaded: Loaded, batch: Batch, stride_seconds: float, execution: Execution
) -> Iterator[Part]:
    """A MusicGen's windows, the last of which is as long as the rest of the clips."""
    rate, window, num_frames = loaded.codec.frame_rate, _window(loaded), batch.num_frames
    if batch.num_given >= window:
        raise UserError(
            f"a prompt of {batch.num_given / rate:g} s leaves nothing to generate of "
            f"{window / rate:g} s"
        )
    if max(batch.sample_B) >= _SAMPLES:
        raise UserError(f"clips longer than a window are numbered up to {_SAMPLES - 1}")
    stride = max(1, round(stride_seconds * rate))
    total = 1 + -(-(num_frames - window) // stride)
    codes_BKT = batch.canvas.codes_BKT.copy()
    known, made_BT = batch.num_given, batch.canvas.given_BKT.all(1)
    yield Part(codes_BKT, made_BT, 0, total)
    for number in range(total):
        start = number * stride
        end = min(start + window, num_frames)
        clip_B = np.arange(len(codes_BKT))
        first_B = np.full(len(clip_B), start, np.int32)
        part = dataclasses.replace(
            batch,
            text=texts_of_windows(batch.text, clip_B, first_B),
            # each window has random numbers of its own
            sample_B=batch.sample_B + number * _SAMPLES,
            canvas=canvas.beginning_with(codes_BKT[..., start:known], end - start),
        )
        codes_BKT[..., start:end] = sampling.run(loaded, part, execution).codes_BKT
        known = end
        made_BT[:, :known] = True
        yield Part(codes_BKT, made_BT, number + 1, total)
