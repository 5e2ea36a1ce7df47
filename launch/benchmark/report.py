"""What was measured, in words, as JSON and as a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescoring:
    """What a second model costs; times in seconds a call."""

    batch_size: int
    passes: int  # of the rescorer
    without: float  # from texts to tokens
    rescored: float  # the same with the rescorer
    alone: float  # the rescorer's passes and its text encoder, in a program of their own

    @property
    def extra(self) -> float:
        return self.rescored - self.without

    @property
    def ratio(self) -> float:
        """The extra time over the rescorer's own."""
        return self.extra / self.alone


def option(name: str) -> str:
    """A field as the command line spells it."""
    return "--" + name.replace("_", "-")


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
        "counts; "
        "FLOPs of ours are the least that the tokens cost"
        + (
            "; those of the peer the reference's, its time from text states"
            if facts.peer_peak
            else ""
        )
    )
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


def rescoring_line(found: Rescoring) -> str:
    return (
        f"rescoring, batch {found.batch_size}: {found.rescored:.3f} s to tokens, "
        f"{found.extra:.3f} s more than without; the rescorer's {found.passes} passes alone take "
        f"{found.alone:.3f} s: {found.ratio:.2f} of them"
    )


def vs_line(command: str, seconds: float, row: Row) -> str:
    return (
        f"{command}: {seconds:.3f} s, {seconds / row.latency:.2f} times ours from text to audio at "
        f"batch {row.batch_size}"
    )


def write_json(
    path: Path,
    facts: Facts,
    rows: Sequence[Row],
    programs: int,
    parts: Parts | None,
    rescored: Rescoring | None,
    vs_seconds: float | None,
) -> None:
    """Everything that was measured, and what follows from it."""
    derived = ("latency", "rate", "peer_tokens", "peer_rate", "speedup")
    content = {
        "facts": dataclasses.asdict(facts),
        "rows": [
            dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in rows
        ],
        "programs": programs,
        "parts": parts and dataclasses.asdict(parts),
        "rescoring": rescored
        and dataclasses.asdict(rescored) | {"extra": rescored.extra, "ratio": rescored.ratio},
        "vs_seconds": vs_seconds,
    }
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def draw(path: Path, facts: Facts, rows: Sequence[Row]) -> None:
    """Latency and throughput against the batch size, as in the paper's Figure 2.

    Both are from text to tokens, which is what the peer does too.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    series = [("this package", "o-", [row.tokens for row in rows])]
    if facts.peer_peak:
        series.append(("PyTorch, the reference's way", "s--", [row.peer_tokens for row in rows]))
    sizes = [row.batch_size for row in rows]
    for label, style, seconds in series:
        latency.plot(sizes, seconds, style, label=label)
        throughput.plot(sizes, [b / s for b, s in zip(sizes, seconds)], style, label=label)
    latency.set_ylabel("latency (s)")
    throughput.set_ylabel("throughput (clips/s)")
    for axes in (latency, throughput):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=map(str, sizes))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size (clips)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{facts.clip_seconds:.1f} s clips, steps {_numbers(facts.steps)}, {facts.device}",
        fontsize="medium",
    )
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
