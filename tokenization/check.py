"""What a source of audio holds, as a table, without encoding any of it.

python -m tokenization.check SOURCE                     reads all of it
python -m tokenization.check SOURCE --fast              headers only
python -m tokenization.check SOURCE --json FILE --picture FILE.png

What would be rejected is what tokenization.job rejects with the same settings.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from magnet_jax import cli
from magnet_jax.arguments import Between, check_fields
from magnet_jax.errors import UserError, reported
from magnet_jax.io.files import check_new_file, replacing_file
from tokenization.intake import decoder
from tokenization.intake.audio import (
    CLIPPED,
    SILENCE_DBFS,
    Facts,
    RejectedError,
)
from tokenization.settings import IntakeLimits, Job
from tokenization.source.manifest import Manifest
from tokenization.source.scan import describe_ignored, scan
from tokenization.source.settings import Source
from tokenization.track import Reject, Track, rejected

_MOST = 8  # kinds that a row names
_MOST_REJECTS = 20  # files named below the table


@dataclass(frozen=True, kw_only=True)
class Check(IntakeLimits, Source):
    """Tells what a source of audio holds, and what tokenization would reject."""

    audio: tyro.conf.Positional[Path]
    """Folder, manifest, table, tar or saved data set: what tokenization.job takes as --audio."""
    fast: bool = False
    """Read headers only: no levels, and less is found to be wrong."""
    workers: Annotated[int, Between(1, 256)] = 2
    """Processes that read."""
    json: Path | None = None
    """File for all numbers, with every reject."""
    picture: Path | None = None
    """File for the distributions of duration and level, .png, .pdf or .svg."""
    channels: Annotated[int, Between(1, 8)] = 1
    """Of the codec that tokenization.job is to use; most have 1, encodec_48khz has 2."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there is in a source."""

    facts: list[Facts]
    """Of the tracks that are fit, in their order."""
    words: list[int]
    """Words of their captions."""
    rejects: list[Reject]
    ignored: dict[str, int]
    fast: bool


def check(settings: Check) -> Found:
    """Reads a source; raises `UserError` if it cannot be listed."""
    check_fields(settings, "--")
    check_new_file("--json", settings.json, [".json"])
    check_new_file("--picture", settings.picture, [".png", ".pdf", ".svg"])
    for option, path in (("--json", settings.json), ("--picture", settings.picture)):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: no such folder {path.absolute().parent}")
    manifest = scan(settings)
    found = Found(
        facts=[], words=[], rejects=list(manifest.rejects), ignored=manifest.ignored,
        fast=settings.fast,
    )  # fmt: skip
    for track, future in _read(settings, manifest):
        try:
            facts = future.result()
        except RejectedError as error:
            found.rejects.append(rejected(track, error))
        else:
            found.facts.append(facts)
            found.words.append(len(track.caption.split()))
    return found


def _read(settings: Check, manifest: Manifest) -> Iterator[tuple[Track, "Future[Facts]"]]:
    """Each track with what becomes its facts, in order, with a progress bar."""
    intake = settings.intake(None, settings.channels)
    waiting: deque = deque()
    with (
        decoder.readers(settings.workers, settings.decode_timeout) as submit,
        tqdm(total=len(manifest.tracks), desc="reading", unit="file", smoothing=0.1) as bar,
    ):
        for track in manifest.tracks:
            read = decoder.read_header if settings.fast else decoder.measure
            waiting.append((track, submit(read, track.part, intake)))
            if len(waiting) > 4 * settings.workers:
                yield waiting.popleft()
                bar.update()
        while waiting:
            yield waiting.popleft()
            bar.update()


def summarise(found: Found) -> dict[str, Any]:
    """The numbers of the table; None where nothing was read that tells."""
    seconds = [f.seconds for f in found.facts if f.seconds is not None]
    reasons = Counter(reject.reason for reject in found.rejects)
    unread = None if found.fast else 0
    return {
        "files": len(found.facts) + len(found.rejects),
        "fit": len(found.facts),
        "hours": sum(seconds) / 3600,
        "unknown_length": len(found.facts) - len(seconds),
        "seconds": _spread(seconds),
        "sample_rates": _counted(f.sample_rate for f in found.facts),
        "channels": _counted(f.channels for f in found.facts),
        "formats": _counted(f.format for f in found.facts),
        "missing_captions": reasons["no caption"],
        "caption_words": _spread(found.words),
        "level": _spread([f.level for f in found.facts if f.level is not None]),
        "silent": reasons["silent"] or unread,
        "clipped": unread if found.fast else sum(f.clipped > CLIPPED for f in found.facts),
        "truncated": reasons["cut off"],
        "duplicates": reasons["duplicate"],
        "rejected": len(found.rejects),
        "reasons": dict(reasons.most_common()),
        "ignored": found.ignored,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _counted(values: Iterator[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's names and values."""
    unknown = summary["unknown_length"]
    hours = f"{summary['hours']:.3g} h" + (f" and {unknown} of unknown length" if unknown else "")
    fast = summary["clipped"] is None
    not_read = "not read (--fast)"
    return [
        ("files", f"{summary['files']}: {summary['fit']} fit, {summary['rejected']} rejected"),
        ("length", f"{hours}; a track {_described(summary['seconds'], '.1f', ' s')}"),
        ("sample rates", _kinds(summary["sample_rates"], "{} Hz")),
        ("channels", _kinds(summary["channels"])),
        ("formats", _kinds(summary["formats"])),
        ("captions", f"{_described(summary['caption_words'], 'g', ' words')}"),
        ("no caption", str(summary["missing_captions"])),
        ("level", not_read if fast else _described(summary["level"], ".1f", " dBFS (RMS)")),
        ("silent", not_read if fast else f"{summary['silent']} (below {SILENCE_DBFS:g} dBFS)"),
        (
            "clipped",
            not_read if fast else f"{summary['clipped']} (more than {CLIPPED:.1%} of the samples)",
        ),
        ("truncated", f"{summary['truncated']}" + (" by their headers" if fast else "")),
        ("duplicates", str(summary["duplicates"])),
        ("rejected", _kinds(summary["reasons"])),
        ("other files", describe_ignored(summary["ignored"])),
    ]


def _described(spread: dict[str, float] | None, form: str, unit: str) -> str:
    if spread is None:
        return "none"
    values = " / ".join(f"{value:{form}}" for value in spread.values())
    return f"{values}{unit} (least / median / most)"


def _kinds(counts: dict[str, int], form: str = "{}") -> str:
    kinds = [f"{form.format(name)} x {count}" for name, count in counts.items()]
    rest = sum(list(counts.values())[_MOST:])
    return ", ".join(kinds[:_MOST] + ([f"others x {rest}"] if rest else [])) or "none"


def draw(path: Path, found: Found) -> None:
    """The distributions of duration and level."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    durations, levels = figure.subplots(1, 2)
    seconds = [f.seconds for f in found.facts if f.seconds]
    if seconds:
        edges = np.geomspace(min(seconds) * 0.9, max(seconds) * 1.1, 40)
        durations.hist(seconds, edges)
        durations.set_xscale("log")
        durations.xaxis.set_major_formatter("{x:g}")
        durations.xaxis.set_minor_formatter("{x:g}" if edges[-1] < 10 * edges[0] else "")
    durations.set(xlabel="duration (s)", ylabel="tracks", title=f"{sum(seconds) / 3600:.3g} h")
    values = [f.level for f in found.facts if f.level is not None]
    levels.hist(values, np.arange(SILENCE_DBFS, 3, 1.5))
    clipped = sum((f.clipped or 0) > CLIPPED for f in found.facts)
    title = "not read (--fast)" if found.fast else f"{clipped} of {len(values)} clipped"
    levels.set(xlabel="level (dBFS, RMS)", ylabel="tracks", title=title)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def run(settings: Check) -> str:
    """Checks a source, writes the files that are asked for, and returns the table."""
    found = check(settings)
    summary = summarise(found)
    if settings.json:
        rejects = [dataclasses.asdict(reject) for reject in found.rejects]
        with replacing_file(settings.json) as temporary:
            temporary.write_text(json.dumps(summary | {"rejects": rejects}, indent=2) + "\n")
    if settings.picture:
        draw(settings.picture, found)
    table = rows(summary)
    width = max(len(name) for name, _ in table)
    lines = [str(settings.audio), *(f"  {name:{width}}  {value}" for name, value in table)]
    listed = sorted(found.rejects, key=lambda reject: reject.path)
    lines += [f"  {one.path}: {one.reason} ({one.detail})" for one in listed[:_MOST_REJECTS]]
    if len(listed) > _MOST_REJECTS and not settings.json:
        lines.append(f"  and {len(listed) - _MOST_REJECTS} more: --json FILE names each")
    total = len(found.facts) + len(listed)
    if len(listed) > Job.max_reject_ratio * total:
        share = math.ceil(100 * len(listed) / total) / 100
        lines.append(
            f"tokenization.job stops where more than {Job.max_reject_ratio:.0%} are rejected: mend "
            f"them, or give it --max-reject-ratio {share:g}"
        )
    return "\n".join(lines)


def main() -> None:
    with reported():
        print(run(cli.parse(Check, prog="python -m tokenization.check")))


if __name__ == "__main__":
    main()
