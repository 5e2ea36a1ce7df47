"""What was measured, in words, as JSON and as a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What all rows of a report share."""

    model: str
    parameters: int
    device: str
    dtype: str
    num_frames: int
    clip_seconds: float
    steps: tuple[int, ...]
    steps_cut_from: tuple[int, ...] | None  # the whole schedule, where it was cut
    peak: float  # FLOP/s of large matrix products through JAX
    peer_dtype: str | None
    peer_device: str | None
    peer_peak: float | None  # through PyTorch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One batch size; times in seconds a call, FLOPs a clip."""

    batch_size: int
    first_call: float  # with compilation
    tokens: float  # from texts to tokens
    codec: float
    flops: float
    peer_stages: tuple[float, ...] | None  # from text states to tokens
    peer_flops: float

    @property
    def latency(self) -> float:
        """From texts to audio."""
        return self.tokens + self.codec

    @property
    def rate(self) -> float:
        """FLOP/s of the transformer."""
        return self.batch_size * self.flops / self.tokens

    def figures(self) -> dict[str, Any]:
        """All that was measured, and what follows from it."""
        derived = ("latency", "rate", "peer_tokens", "peer_rate", "speedup")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def peer_tokens(self) -> float | None:
        return sum(self.peer_stages) if self.peer_stages else None

    @property
    def peer_rate(self) -> float | None:
        return self.peer_stages and self.batch_size * self.peer_flops / self.peer_tokens

    @property
    def speedup(self) -> float | None:
        """The peer's seconds to tokens over ours."""
        return self.peer_stages and self.peer_tokens / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of the parts of one call."""

    batch_size: int
    text: float
    stages: tuple[float, ...]
    rest: float  # between the last step and the tokens
    codec: float


def check_parent(option: str, path: Path | None) -> None:
    """Raises `UserError` for a file in no folder, before anything is measured for it."""
    if path and not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no such folder {path.parent}")


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def heading(facts: Facts) -> str:
    """What was measured on what."""
    lines = [
        f"model   {facts.model}: {facts.parameters / 1e6:,.0f} M parameters",
        f"clip    {facts.clip_seconds:.2f} s ({facts.num_frames} frames), steps "
        f"{_numbers(facts.steps)}",
        f"ours    JAX, {facts.dtype} on {facts.device}; large matrix products reach "
        f"{facts.peak / 1e9:,.0f} GFLOP/s",
    ]
    if facts.steps_cut_from:
        lines[1] += (
            f", cut from {_numbers(facts.steps_cut_from)} for ours and the peer alike: these are "
            "no times of whole clips"
        )
    if facts.peer_peak:
        lines.append(
            f"peer    PyTorch, {facts.peer_dtype} on {facts.peer_device}; large matrix products "
            f"reach {facts.peer_peak / 1e9:,.0f} GFLOP/s"
        )
    lines.append(
        "tokens are from text to tokens, latency that and the codec, timed apart, the fastest call "
        "counts; FLOPs of ours are the least that the tokens cost"
    )
    if facts.peer_peak:
        lines[-1] += "; those of the peer the reference's, its time from text states"
    return "\n".join(lines)


_COLUMNS = ("batch", "first call", "latency", "tokens", "clips/s", "audio s/s", "TFLOP/clip",
            "GFLOP/s", "of peak")  # fmt: skip
_PEER_COLUMNS = ("peer", "TFLOP/clip", "GFLOP/s", "of peak", "peer/ours")


def column_names(facts: Facts) -> str:
    return aligned(_COLUMNS + (_PEER_COLUMNS if facts.peer_peak else ()))


def line(row: Row, facts: Facts) -> str:
    """A row of the table under `column_names`."""
    per_second = row.batch_size / row.latency
    cells = [
        str(row.batch_size),
        f"{row.first_call:.2f} s",
        f"{row.latency:.3f} s",
        f"{row.tokens:.3f} s",
        f"{per_second:.3g}",
        f"{per_second * facts.clip_seconds:.3g}",
        f"{row.flops / 1e12:.3g}",
        f"{row.rate / 1e9:,.1f}",
        f"{row.rate / facts.peak:.1%}",
    ]
    if row.peer_stages:
        cells += [
            f"{row.peer_tokens:.3f} s",
            f"{row.peer_flops / 1e12:.3g}",
            f"{row.peer_rate / 1e9:,.1f}",
            f"{row.peer_rate / facts.peer_peak:.1%}",
            f"{row.speedup:.2f} x",
        ]
    return aligned(cells)


def aligned(cells: Sequence[str]) -> str:
    """Cells of a row in columns."""
    return "".join(f"{cell:>12}" for cell in cells)


def parts_table(parts: Parts, row: Row, facts: Facts) -> str:
    """Where the time of a call goes, and of the peer's where there is one."""
    lines = [f"parts of a call, batch {parts.batch_size}:"]
    compiling = max(row.first_call - row.tokens, 0.0)
    stages = [
        (f"stage {k}, {count} steps", seconds, row.peer_stages[k] if row.peer_stages else None)
        for k, (count, seconds) in enumerate(zip(facts.steps, parts.stages))
    ]
    for name, seconds, peer in (
        ("compilation, once", compiling, None),
        ("text encoder", parts.text, None),
        *stages,
        ("to the host", parts.rest, None),
        ("codec", parts.codec, None),
    ):
        beside = f"   peer {peer:9.3f} s   {peer / seconds:.2f} x" if peer is not None else ""
        lines.append(f"  {name:<20}{seconds:10.3f} s{beside}")
    if row.peer_stages and facts.steps_cut_from:
        lines.append(f"  the peer's whole schedule: about {peer_whole(row, facts):,.0f} s")
    return "\n".join(lines)


def peer_whole(row: Row, facts: Facts) -> float:
    """Seconds of the peer's whole schedule: all its steps of a stage do the same work."""
    parts = zip(row.peer_stages, facts.steps, facts.steps_cut_from)
    return sum(seconds / count * whole for seconds, count, whole in parts)


def vs_line(command: str, seconds: float, row: Row) -> str:
    return (
        f"{command}: {seconds:.3f} s, {seconds / row.latency:.2f} times ours from text to audio at "
        f"batch {row.batch_size}"
    )


def write_json(path: Path | None, content: Any) -> None:
    """Writes figures, where a file for them is asked for."""
    if path is not None:
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
