"""What steers a clip: a text, a blend of texts, texts over time, and what it is not to be.

"a slow waltz"
[("funk", 0.7), ("metal", 0.3)]
[(0, "a piano"), (8, [("a harp", 0.5), ("a flute", 0.5)])]
Prompt("a slow waltz", negative="a piano")
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Annotated, Any, NamedTuple

import numpy as np

from magnet_jax.arguments import MOST_CLIPS, Between, check, shown
from magnet_jax.errors import UserError

MOST_TEXTS = 64  # of a clip
MOST_SECTIONS = 64  # likewise: each one is a column of a table of shares
_MARGIN = 0.1  # seconds by which a cut is generous: a frame of any codec

Words = str | Sequence[tuple[str, float]] | Sequence[tuple[float, Any]] | None
Fade = Annotated[float, Between(0, 60)]
_KINDS = "a text, a list of (text, weight), a list of (seconds, text) or a Prompt"


class Section(NamedTuple):
    """What a clip is to sound like from some second on: texts, with weights of sum 1."""

    start: float
    parts: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a clip is to sound like, and what not."""

    text: Words = None
    """A text; texts with weights; or seconds with one or the other. None is no text, and in an edit
    the text that is kept with the clip."""
    negative: Words = ""
    """Likewise, what guidance leads away from in place of no text."""
    fade: Fade = 1.0
    """Seconds in which one text gives way to the next."""
    start: float = 0.0
    """Second of the texts at which the clip begins."""

    def __post_init__(self):
        for name in ("text", "negative"):
            value = getattr(self, name)
            if value is not None or name == "negative":
                sections(value, name)
                object.__setattr__(self, name, _frozen(value))
        object.__setattr__(self, "fade", check(Fade, self.fade, "fade"))
        object.__setattr__(self, "start", check(float, self.start, "start"))

    @property
    def sections(self) -> tuple[Section, ...]:
        return sections("" if self.text is None else self.text)

    @property
    def negatives(self) -> tuple[Section, ...]:
        return sections(self.negative)


Description = str | Prompt


# --- reading what users give ---------------------------------------------------------------------


def sections(value: Any, name: str = "text") -> tuple[Section, ...]:
    """Whatever a text may be, as sections of which none is like the one before it.

    Raises `UserError`, which calls it `name`.
    """
    if not _is_timeline(value):
        return (Section(0.0, _parts(value, name)),)
    found: list[Section] = []
    times = [_number(time, f"the times of {name}") for time, _ in value]
    if times[0] != 0 or any(a >= b for a, b in itertools.pairwise(times)):
        given = ", ".join(f"{time:g}" for time in times)
        raise UserError(f"the times of {name} must begin at 0 and rise, in seconds, not {given}")
    for time, (_, text) in zip(times, value):
        parts = _parts(text, name)
        if not found or found[-1].parts != parts:
            found.append(Section(time, parts))
    _check_count(texts_in(found), name)
    if len(found) > MOST_SECTIONS:
        count = f"{len(found)} sections, and a clip takes {MOST_SECTIONS} at most"
        raise UserError(f"{name} has {count}")
    return tuple(found)


def _parts(value: Any, name: str) -> tuple[tuple[str, float], ...]:
    """A text or a blend: texts and weights of sum 1, each text once and none of weight 0."""
    if isinstance(value, str):
        return ((_valid(value, name), 1.0),)
    if not _is_pairs(value) or not all(isinstance(text, str) for text, _ in value):
        raise UserError(f"{name} must be {_KINDS}, not {shown(value)}")
    weights: dict[str, float] = {}
    for text, weight in value:
        weight = _number(weight, f"the weights of {name}")
        if weight < 0:
            raise UserError(
                f"the weights of {name} must not be below 0, as {weight:g} of {shown(text)} is: "
                "what a clip is not to be is its negative text"
            )
        weights[_valid(text, name)] = weights.get(text, 0.0) + weight
    total = math.fsum(weights.values())
    if not 0 < total < math.inf:
        raise UserError(f"the weights of {name} must have a sum above 0, not {total:g}")
    _check_count(weights, name)
    return tuple((text, weight / total) for text, weight in weights.items() if weight)


def _check_count(texts: Iterable[str], name: str) -> None:
    count = len(list(texts))
    if count > MOST_TEXTS:
        raise UserError(f"{name} has {count} texts, and a clip takes {MOST_TEXTS} at most")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _number(value: Any, name: str) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise UserError(f"{name} must be numbers, not {shown(value)}")
    return float(value)


def _is_pairs(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)


def _is_timeline(value: Any) -> bool:
    return _is_pairs(value) and all(_is_number(time) for time, _ in value)


def _is_blend(value: Any) -> bool:
    return _is_pairs(value) and all(
        isinstance(text, str) and _is_number(weight) for text, weight in value
    )


def _valid(text: str, name: str) -> str:
    if text != text.encode(errors="replace").decode():
        raise UserError(f"{name} hold {shown(text)}, which is not valid Unicode")
    return str(text)


def _frozen(value: Any) -> Any:
    """Lists as tuples, and numbers as Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return float(value) if _is_number(value) else value


def as_descriptions(value: Any, name: str) -> list[Description] | None:
    """Descriptions as a list, of which '' stands for no text; one by itself is a list of one.

    Raises `UserError`, which calls them `name`.
    """
    if value is None:
        return None
    single = isinstance(value, str | Prompt) or _is_timeline(value) or _is_blend(value)
    values = [value] if single else value
    unlike = isinstance(values, bytes | Mapping | Set) or getattr(values, "ndim", 1) != 1
    if unlike or not isinstance(values, Iterable):
        raise UserError(f"{name} must be a text or a list of texts, not {shown(value)}")
    items = list(itertools.islice(values, MOST_CLIPS + 1))
    if not items:
        raise UserError(f"{name} are empty: give at least one, or use generate_unconditional")
    if len(items) > MOST_CLIPS:
        raise UserError(f"{name} are more than {MOST_CLIPS}: generate them in several calls")
    return [_as_description(item, name) for item in items]


def _as_description(item: Any, name: str) -> Description:
    if item is None:
        return ""
    if isinstance(item, str):
        return _valid(item, name)
    if isinstance(item, Prompt):
        return item
    sections(item, name)
    return Prompt(item)


Descriptions = Annotated[Any, as_descriptions]


def check_times(descriptions: Iterable[Description], seconds: float) -> None:
    """Raises `UserError` for a text that begins after a clip of `seconds` has ended."""
    for one in descriptions:
        if isinstance(one, Prompt):
            last = max(one.sections[-1].start, one.negatives[-1].start)
            if last - one.start >= seconds:
                raise UserError(
                    f"a text begins at {last:g} s, and the clip ends at {one.start + seconds:g} s: "
                    "give an earlier time, or ask for more seconds"
                )


def completed(description: Description, own: Description) -> Description:
    """A prompt that says no text of its own, with that of the clip."""
    if isinstance(description, str) or description.text is not None:
        return description
    if isinstance(own, str):
        return dataclasses.replace(description, text=own)
    negative = description.negative if any(texts_in(description.negatives)) else own.negative
    return dataclasses.replace(own, negative=negative)


# --- what programs are given ---------------------------------------------------------------------


def simplified(description: Description) -> Description:
    """A prompt that is one text from beginning to end as that text."""
    if isinstance(description, str):
        return description
    found, negatives = description.sections, description.negatives
    if any(texts_in(negatives)) or len(found) > 1 or len(found[0].parts) > 1:
        return description
    return found[0].parts[0][0]


def texts_in(found: Iterable[Section]) -> list[str]:
    """The texts of sections, each once, in the order of their first appearance."""
    return list(dict.fromkeys(text for section in found for text, _ in section.parts))


def changes(description: Description) -> bool:
    """Whether there is more than one text or blend over time."""
    if isinstance(description, str):
        return False
    return len(description.sections) > 1 or len(description.negatives) > 1


def in_words(description: Description) -> str:
    """The texts of a description in a row, without what it is not to be."""
    if isinstance(description, str):
        return description
    return ", ".join(filter(None, texts_in(description.sections)))


def all_texts(description: Description) -> list[str]:
    """Every text of a description, negative ones included."""
    if isinstance(description, str):
        return [description]
    return texts_in([*description.sections, *description.negatives])


def shares(
    found: Sequence[Section], texts: Sequence[str], *, fade: float, start: float, frame_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each text's share over time, as numbers [P] of frames and the shares [P, G] there.

    Between these frames shares are linear, before and after them constant. A text's share in a
    frame is its share of the `fade` around it, so of the frame itself where that is shorter.
    """
    width = max(fade * frame_rate, 1.0)
    # Frame t is about t + 0.5.
    edges = np.array([(section.start - start) * frame_rate - 0.5 for section in found])
    changes = edges[1:]
    knot_P = np.unique(np.concatenate([changes - width / 2, changes + width / 2]))
    knot_P = knot_P if len(knot_P) else np.zeros(1)
    low = np.concatenate([[-np.inf], changes])
    high = np.concatenate([changes, [np.inf]])
    overlap_PC = np.minimum(knot_P[:, None] + width / 2, high[None]) - np.maximum(
        knot_P[:, None] - width / 2, low[None]
    )
    held_PC = np.round(overlap_PC.clip(0) / width, 9)
    weight_CG = np.zeros((len(found), len(texts)))
    for section, weight_G in zip(found, weight_CG):
        for text, weight in section.parts:
            weight_G[texts.index(text)] += weight
    return knot_P, held_PC @ weight_CG


def within(
    description: Description, start: float, stop: float, period: float | None = None
) -> Description:
    """What steers the seconds [start, stop) of a clip, as the description of a clip of their own.

    With a `period` the clip is a ring of so many seconds: its texts come round again, before its
    beginning as well. Shares are those of the whole, to the frame; texts that cannot be heard are
    left out.
    """
    if isinstance(description, str):
        return description
    margin = description.fade / 2 + _MARGIN
    first, last = description.start + start, description.start + stop
    turns = [0]
    if period is not None:
        turns = range(
            math.floor((first - margin) / period), math.floor((last + margin) / period) + 1
        )
    moved = turns[0] * (period or 0.0)
    first, last = first - moved, last - moved

    def cut(value: Words) -> Words:
        found = sections(value)
        if len(found) == 1:
            return value
        found = [
            one._replace(start=one.start + t * (period or 0) - moved)
            for t in turns
            for one in found
        ]
        ends = [*(one.start for one in found[1:]), math.inf]
        kept = [
            one
            for one, end in zip(found, ends)
            if end > first - margin and one.start < last + margin
        ]
        return tuple((one.start * (i > 0), one.parts) for i, one in enumerate(kept))

    text = None if description.text is None else cut(description.text)
    cut_one = dataclasses.replace(
        description, text=text, negative=cut(description.negative), start=first
    )
    return simplified(cut_one)


def later(description: Description, seconds: float) -> Description:
    """The description of a clip that begins so much earlier: its first text comes in with that."""
    if isinstance(description, str):
        return description

    def moved(value: Words) -> Words:
        if not _is_timeline(value):
            return value
        return tuple((time + seconds * (i > 0), text) for i, (time, text) in enumerate(value))

    return dataclasses.replace(
        description, text=moved(description.text), negative=moved(description.negative)
    )


def as_json(description: Description) -> Any:
    """A description as JSON holds it: a text, or what `Prompt(**...)` takes."""
    return description if isinstance(description, str) else dataclasses.asdict(description)


def from_json(value: Any) -> Description:
    """What `as_json` gave; raises `UserError` or `TypeError` for anything else."""
    return value if isinstance(value, str) else Prompt(**value)
