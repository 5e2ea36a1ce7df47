"""What came out of a study: its numbers, its table and its picture, from the cells' receipts."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ablate.studies import Setting, Study
from launch.evaluate.receipt import COLUMNS
from magnet_jax.errors import UserError
from magnet_jax.io.files import read_object, replacing_file

_FORMAT = "magnet_jax ablation 1"
_LISTENER = "musicnn"
# Scores by their names in receipts, and those of the paper that are not here.
TITLES = COLUMNS | {"validation": "validation loss"}
_UNLIKE = ("fad", "kl")  # of which the reference's own mean something else


def cell_folder(out: Path, setting: Setting, seed: int) -> Path:
    """Where a setting's clips and receipt of one seed lie."""
    return out / "cells" / f"{setting.cell}-seed{seed}"


def run_folder(out: Path, model: str, seed: int) -> Path:
    """Where a model of `studies.MODELS` is trained with a seed."""
    return out / "runs" / f"{model}-seed{seed}"


def check_own(out: Path, study: str) -> None:
    """Raises `UserError` for files of a study's name that no study wrote."""
    first, *others = (out / f"{study}.{suffix}" for suffix in ("json", "md", "png"))
    if first.exists():
        theirs = [first] if read_object(first, "").get("study") != study else []
    else:  # which is written first
        theirs = [path for path in others if path.exists()]
    if theirs:
        raise UserError(f"{theirs[0]}: was not made by launch.ablate; name another --out")


def gather(out: Path, study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """All numbers of a study, as far as they are there.

    Args:
      out: the folder of all studies.
      study: whose cells.
      seeds: which of them.

    Returns:
      'rows', of which each has 'scores', {seed: {score: value}}, with their 'mean' and 'sd'; and
      'reference', the same of real audio. A standard deviation is that of a sample, over seeds;
      where there is one seed alone, it is left out.

    Raises:
      UserError: a receipt that is damaged.
    """
    rows, real = [], {}
    for setting in study.settings:
        found = {}
        for seed in seeds:
            path = cell_folder(out, setting, seed) / "receipt.json"
            if not path.exists():
                continue
            scores = _scores(path)
            real.setdefault(str(seed), scores["reference"])
            found[str(seed)] = scores["generated"]
            if setting.model is not None:
                loss = validation_loss(run_folder(out, setting.model, seed))
                found[str(seed)] |= {} if loss is None else {"validation": loss}
        rows.append(
            {"setting": setting.label, "line": setting.line, "place": setting.place,
             "cells": setting.cell, **_summary(found), "paper": dict(setting.paper)}
        )  # fmt: skip
    return {
        "format": _FORMAT,
        "study": study.name,
        "title": study.title,
        "axis": study.axis,
        "seeds": list(seeds),
        "rows": rows,
        "reference": _summary(real),
        "paper": study.paper,
    }


def _scores(receipt: Path) -> dict[str, dict[str, float]]:
    """The values of a receipt, of the generated clips and of the reference."""
    rows = read_object(receipt, "").get("scores")
    try:
        return {
            name: {
                key: float(rows[name][_LISTENER][key]["value"])
                for key in TITLES
                if key in rows[name][_LISTENER]
            }
            for name in ("generated", "reference")
        }
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{receipt}: not a receipt of launch.evaluate; remove it") from None


def validation_loss(run: Path) -> float | None:
    """The last one that a run has logged; None where there is none."""
    from magnet_jax.train import watch  # JAX is slow to load

    if not (run / "metrics.jsonl").exists():
        return None
    lines = watch.read_scalars(run)
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    return losses[-1] if losses else None


def _summary(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Scores by seed with their mean and standard deviation."""
    names = [name for name in TITLES if any(name in scores for scores in found.values())]
    values = {name: [scores[name] for scores in found.values() if name in scores] for name in names}
    return {
        "scores": dict(found),
        "mean": {name: statistics.fmean(row) for name, row in values.items()},
        "sd": {name: statistics.stdev(row) for name, row in values.items() if len(row) > 1},
    }


def write(out: Path, found: Mapping[str, Any]) -> str:
    """Writes OUT/STUDY.json, .md and .png, and returns the table."""
    text = table(found)
    for suffix, content in (("json", json.dumps(found, indent=2) + "\n"), ("md", text)):
        with replacing_file(out / f"{found['study']}.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    with replacing_file(out / f"{found['study']}.png") as temporary:
        draw(temporary, found)
    return text


# --- the table ------------------------------------------------------------------------------------


def _named(found: Mapping[str, Any], kind: str) -> list[str]:
    """Scores that any row has: 'mean' for ours, 'paper' for the paper's."""
    return [name for name in TITLES if any(name in row[kind] for row in found["rows"])]


def table(found: Mapping[str, Any]) -> str:
    """What `gather` found, in Markdown."""
    names, papers = _named(found, "mean"), _named(found, "paper")
    lines = [
        [found["axis"], "seeds", *(TITLES[name] for name in names)]
        + [f"paper's {TITLES[name]}" for name in papers]
    ]
    for row in (*found["rows"], {"setting": "real audio", "paper": {}, **found["reference"]}):
        cells = [row["setting"], str(len(row["scores"]))]
        cells += [_cell(name, row["mean"].get(name), row["sd"].get(name)) for name in names]
        cells += [f"{row['paper'][name]:g}" if name in row["paper"] else "" for name in papers]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    rows = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in lines
    ]
    many = len(found["seeds"]) > 1
    notes = [
        f"Seeds {' '.join(map(str, found['seeds']))}; "
        f"{'mean ± standard deviation over the seeds' if many else 'one seed'}. Less is better of "
        "FAD, KL and the validation loss, more of all else. Real audio: FAD of one half to the "
        "other, KL of each clip to another one.",
        f"The paper's: {found['paper']}",
    ]
    if papers:
        notes[1] += (
            " Other data, another size and other listeners (VGGish, PaSST and CLAP), so that only "
            "the order compares."
        )
    return "\n\n".join([f"# {found['title']}", "\n".join(rows), *notes]) + "\n"


def _cell(name: str, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    shown = f"{mean:.{4 if name == 'validation' else 3}g}"  # losses differ by hundredths
    return shown if sd is None else f"{shown} ± {sd:.2g}"


# --- the picture ----------------------------------------------------------------------------------


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """A panel a score, against what is varied, and beside them the paper's; a PNG."""
    from matplotlib.figure import Figure

    panels = [("mean", name) for name in _named(found, "mean")]
    if len({row["line"] for row in found["rows"]}) == 1:
        # Of models that differ in kind, losses do not compare.
        panels = [panel for panel in panels if panel[1] != "validation"]
    panels += [("paper", name) for name in _named(found, "paper")]
    columns = min(4, max(1, len(panels)))
    count = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4 * columns, 3.3 * count), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for (kind, name), axes in zip(panels, grid.flat):
        _panel(axes, found, kind, name)
    if panels and any(row["line"] for row in found["rows"]):
        grid.flat[0].legend(fontsize="small")
    figure.suptitle(found["title"])
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, found: Mapping[str, Any], kind: str, name: str) -> None:
    rows = found["rows"]
    labels = [row["place"] for row in rows if isinstance(row["place"], str)]
    places = [labels.index(row["place"]) if labels else row["place"] for row in rows]
    style = "o" if labels else "o-"
    for number, line in enumerate(dict.fromkeys(row["line"] for row in rows)):
        own = [
            (place, row)
            for place, row in zip(places, rows)
            if row["line"] == line and name in row[kind]
        ]
        if not own:
            continue
        how = {"fmt": style, "color": f"C{number}", "label": line, "capsize": 3}
        if kind == "paper":
            how["mfc"] = "white"
        bars = [row["sd"].get(name, 0) if kind == "mean" else 0 for _, row in own]
        axes.errorbar([place for place, _ in own], [row[kind][name] for _, row in own], bars, **how)
        for place, row in own if kind == "mean" else ():
            seeds = [scores[name] for scores in row["scores"].values() if name in scores]
            axes.plot([place] * len(seeds), seeds, ".", color=f"C{number}", alpha=0.35, ms=5)
    title = TITLES[name]
    if kind == "paper":
        title = f"{title} in the paper\n(other data, size and listeners)"
        axes.set_facecolor("0.95")
    elif name in found["reference"]["mean"] and name not in _UNLIKE:
        axes.axhline(found["reference"]["mean"][name], color="gray", ls=":")
        title += " (dotted: real audio)"
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(found["axis"], fontsize="small")
    axes.grid(alpha=0.3)
    if labels:
        axes.set_xticks(range(len(labels)), labels, fontsize="small")
        axes.margins(x=0.15)
        return
    if 0 < 20 * min(places) < max(places):
        axes.set_xscale("log")
    axes.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
    axes.set_xticks([], minor=True)
