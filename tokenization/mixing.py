"""Two tracks mixed into one: the augmentation of text to sound, which tokens do not allow.

After AudioGen (Kreuk et al. 2023, arXiv 2209.15352) as AudioCraft trains it, there in each batch.
Here it is done once, to whole tracks, before they are encoded. What is mixed, and how, is drawn
from the tracks and a seed alone; a decoder does it (`intake.mix`).
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from magnet_jax.errors import UserError
from tokenization.track import Mix, Track

LEVELS_DBFS = (-35.0, -15.0)  # AudioCraft's
MIN_OVERLAP = 0.5  # AudioCraft's


def draw(
    tracks: Sequence[Track], *, ratio: float, seed: int, snr: tuple[float, float]
) -> list[Track]:
    """`ratio` times as many mixed tracks as there are tracks, each of two of them.

    Raises `UserError` if there is one track alone.
    """
    count = round(ratio * len(tracks))
    if count == 0:
        return []
    if len(tracks) == 1:
        raise UserError("--mix-ratio: there is one track to train on, and a mix takes two")
    rng = np.random.default_rng(seed)
    first = rng.integers(len(tracks), size=count)
    second = (first + rng.integers(1, len(tracks), size=count)) % len(tracks)
    drawn = (rng.uniform(*snr, count), rng.uniform(0, 1, count), rng.uniform(*LEVELS_DBFS, count))
    return [
        mixed(number, tracks[i], tracks[j], snr=snr, shift=shift, level=level)
        for number, (i, j, snr, shift, level) in enumerate(
            zip(*(values.tolist() for values in (first, second, *drawn)))
        )
    ]


def mixed(number: int, *parts: Track, snr: float, shift: float, level: float) -> Track:
    """The track that two others are mixed into; its captions are those of both, pair by pair."""
    pairs = itertools.product(*(part.captions for part in parts))
    made_of = {"tracks": [part.track_id for part in parts], "snr": round(snr, 3)}
    return Track(
        path=" + ".join(part.path for part in parts),
        track_id=f"mix {number}: {' + '.join(part.track_id for part in parts)}",
        place=Mix(
            parts=tuple(part.part for part in parts),
            names=tuple(part.name for part in parts),
            snr=snr,
            shift=shift,
            level=level,
        ),
        captions=tuple(dict.fromkeys(a if a == b else f"{a} {b}" for a, b in pairs)),
        fields=json.dumps({"mixed": made_of}, sort_keys=True),
    )


def with_offset(track: Track, offset: float) -> Track:
    """A mixed track that also says how many seconds into it the shorter part begins."""
    made_of = json.loads(track.fields)["mixed"] | {"offset": round(offset, 3)}
    return replace(track, fields=json.dumps({"mixed": made_of}, sort_keys=True))


def is_heard(both: tuple[float, float], record: tuple[float, float]) -> bool:
    """Whether a record of a mix holds enough of both parts for the captions of both.

    Given where both sound and where the record lies, in seconds. `MIN_OVERLAP` of the shorter of
    the two will do, so that at least one record of every mix is kept.
    """
    overlap = min(both[1], record[1]) - max(both[0], record[0])
    shorter = min(both[1] - both[0], record[1] - record[0])
    return overlap >= MIN_OVERLAP * shorter - 1e-3  # half and half, and rounded
