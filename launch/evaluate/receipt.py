"""The receipt of an evaluation, which has everything that the scores depend on, and its table."""

import dataclasses
import importlib.metadata
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.evaluate import prompts
from launch.evaluate.clips import Labelled, Row
from launch.evaluate.settings import FORMAT, Args, words_of
from magnet_jax.data import records
from magnet_jax.evaluation import scores
from magnet_jax.evaluation.embedders import Embedder

# The columns of the table, as far as there is anything in them.
COLUMNS = {
    "fad": "FAD",
    "kl": "KL",
    "clap": "CLAP",
    "tag_auc": "tag AUC",
    "tag_top5": "tags in 5",
    "probe": "probe",
    "probe_codec": "probe, codec",
}
NOTE_COLUMNS = {
    "distance": "tune distance",
    "entropy": "entropy",
    "in_key": "in key",
    "note_seconds": "note, s",
    "notes": "notes/s",
    "speed": "of real",
    "steps": "steps",
    "leaps": "leaps",
    "voices": "voices",
    "attacks": "attacks/s",
    "note_f1": "note F1",
    "written_f1": "F1, written",
}
_LIBRARIES = ("magnet-jax", "jax", "numpy", "soxr", "torch", "transformers")


def receipt(
    args: Args,
    *,
    networks: Iterable[Embedder],
    transcriber: str | None,
    model: Mapping[str, Any] | None,
    listed: list[prompts.Prompt] | None,
    labelled: Labelled | None,
    probe_codec: str | None,
    rows: Mapping[str, Row],
    reference: Mapping[str, Path],
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What was asked for, of which clips, models and libraries, and the scores that were found."""
    sets = {name: row.files for name, row in rows.items()} | {"reference": reference}
    sets["probe"] = {} if labelled is None else labelled.files
    return {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", "launch.evaluate", *words_of(args)]),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "settings": dataclasses.asdict(args.listening)
        | {"resamples": args.resamples, "seed": args.seed},
        "embedders": {
            network.name: {
                "weights": network.weights,
                "sha256": network.sha256,
                "sample_rate": network.sample_rate,
                "pieces": network.pieces,
            }
            for network in networks
        },
        "transcriber": transcriber,
        "model": model,
        "data": args.data and records.digest(args.data),
        "prompts": args.prompts and {"path": str(args.prompts), "sha256": prompts.digest(listed)},
        "probe": labelled
        and {
            "field": args.probe_field,
            "labels": sorted(set(labelled.labels.values())),
            "codec": probe_codec,
        },
        "clips_with_captions": len(rows["generated"].captions),
        "clips_with_reference": len(rows["generated"].pairs),
        "sets": {name: _described(files) for name, files in sets.items() if files},
        "scores": found,
    }


def _described(files: Mapping[str, Path]) -> dict[str, Any]:
    rates, channels, lengths = zip(*map(scores.describe, files.values()), strict=True)
    return {
        "path": os.path.commonpath([path.parent for path in files.values()]),
        "sha256": scores.digest(files),
        "clips": len(files),
        "sample_rates": sorted(set(rates)),
        "channels": sorted(set(channels)),
        "seconds": [min(lengths), max(lengths)],
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The scores as lines for people: each with its interval where there is one.

    Of the notes, which have many columns, the distance alone has it.
    """
    lines = []
    for network in next(iter(found.values())):
        names = NOTE_COLUMNS if network == "notes" else COLUMNS
        rows = {name: row[network] for name, row in found.items() if network in row}
        columns = [key for key in names if any(key in row for row in rows.values())]
        cells = [[network, *(names[key] for key in columns)]]
        for name, row in rows.items():
            shown = (_cell(row.get(k), network != "notes" or k == "distance") for k in columns)
            cells.append([name, *shown])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
    return "\n".join(lines)


def _cell(score: Mapping[str, float | None] | None, with_interval: bool) -> str:
    if score is None:
        return "-"
    ends = (score["low"], score["high"]) if with_interval else ()
    # What is zero but for rounding reads as 0.
    value, *ends = (
        f"{round(number, 4) + 0.0:.3g}" for number in (score["value"], *ends) if number is not None
    )
    return f"{value} [{', '.join(ends)}]" if ends else value
