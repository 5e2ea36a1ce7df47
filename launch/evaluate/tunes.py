"""The stage of --notes: whether clips have tunes, beside real clips and ruins of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.evaluate import prompts
from launch.evaluate.clips import Row
from launch.evaluate.settings import Args
from magnet_jax.evaluation import notes, scores, transcriber, tunes
from magnet_jax.evaluation.notes import Notes
from magnet_jax.evaluation.transcriber import Transcriber
from magnet_jax.evaluation.tunes import Played, Wanted


class Real(NamedTuple):
    """The transcriber, and all that is known of the real clips."""

    transcriber: Transcriber
    files: dict[str, Path]
    played: dict[str, Played]
    ruins: dict[str, dict[str, Played]]
    """What is heard in each of `tunes.RUINS`."""
    written: dict[str, Notes | None]
    """The notes beside the clips."""


def hear_real(args: Args, reference: dict[str, Path]) -> Real:
    """Hears the real clips and their ruins, or finds them in --cache.

    Raises `UserError` for .notes that are none.
    """
    network = transcriber.load()
    written = {name: tunes.written_notes(path) for name, path in reference.items()}
    if not reference:
        return Real(network, {}, {}, {}, {})

    def hear(ruin: str | None) -> dict[str, Played]:
        return tunes.hear(
            network, reference, args.listening, ruin=ruin, seed=args.seed, cache=args.cache,
            what=ruin or "reference",
        )  # fmt: skip

    ruins = {ruin: hear(ruin) for ruin in tunes.RUINS}
    return Real(network, reference, hear(None), ruins, written)


def score(
    args: Args, real: Real, rows: Mapping[str, Row], real_captions: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The scores of notes of each row, of the reference and of its ruins."""
    settings = scores.Settings(resamples=args.resamples, seed=args.seed)
    names = list(real.files)
    itself = Row(real.files, real_captions, {name: name for name in names})
    order = np.random.default_rng(args.seed).permutation(len(names))
    others = {names[i]: names[j] for i, j in zip(order, np.roll(order, 1))}
    known = {
        key: held._replace(real=real.played[others[key]].notes if len(names) > 1 else None)
        for key, held in _wanted(itself, real)
    }
    about_real = tunes.values_of(real.played, known) if names else None
    real_speeds = [known[name].speed for name in real.played]

    def values_of(row: Row, played: Mapping[str, Played]) -> dict[str, np.ndarray]:
        wanted = dict(_wanted(row, real))
        values = tunes.values_of(played, wanted)
        speeds = [wanted[name].speed for name in played]
        return tunes.add_speed(values, speeds, about_real, real_speeds) if names else values

    heard: dict[tuple[Path, ...], dict[str, Played]] = {}  # shuffled captions are of the same clips
    values = {}
    for name, row in rows.items():
        key = tuple(row.files.values())
        if key not in heard:
            heard[key] = tunes.hear(real.transcriber, row.files, args.listening, what=name)
        values[name] = values_of(row, heard[key])
    if not names:
        return {name: tunes.score(found, None, settings) for name, found in values.items()}
    about_real = tunes.add_speed(about_real, real_speeds, about_real, real_speeds)
    values |= {ruin: values_of(itself, played) for ruin, played in real.ruins.items()}
    found = {name: tunes.score(row, about_real, settings) for name, row in values.items()}
    return found | {"reference": tunes.score_reference(about_real, settings)}


def _wanted(row: Row, real: Real) -> Iterator[tuple[str, Wanted]]:
    """What each clip of a row is held against: its caption, and the real clip that it pairs with.

    Without a word for the speed in the caption, one among the real clip's keywords is taken.
    """
    for name in row.files:
        caption, pair = row.captions.get(name, ""), row.pairs.get(name)
        keywords = () if pair is None else prompts.fields(real.files[pair]).get("keywords")
        words = " ".join(map(str, keywords)) if isinstance(keywords, list) else ""
        yield (
            name,
            Wanted(
                key=notes.key_in(caption),
                speed=notes.speed_in(caption) or notes.speed_in(words),
                real=None if pair is None else real.played[pair].notes,
                written=None if pair is None else real.written[pair],
            ),
        )
