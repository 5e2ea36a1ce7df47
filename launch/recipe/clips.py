"""Clips as they are drawn: a tune, an excerpt, an instrument, a key, a speed and words for it.

What they are drawn from is a selection of the music: melodies alone, to begin with, or all of it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launch.recipe.tunes import Note, Tune
from magnet_jax.errors import UserError

SPLITS = ("train", "valid", "test")
LEAST_SECONDS = 6.0
LEVEL = 0.1  # root mean square
LEVEL_SPREAD_DB = 3.0
_TAIL = 1.5  # seconds kept at most of what rings after the last note
_MAJOR_KEYS = ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
_MINOR_KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "G sharp", "A", "B flat",
               "B")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """A sound of General MIDI and what is sensible to play on it."""

    name: str
    names: Sequence[str]
    """As captions call it."""
    played: str
    """How captions say that a piece is played."""
    program: int
    """General MIDI, from 0."""
    low: int
    high: int
    """Range, as MIDI pitches."""
    several_voices: float
    """Share of its clips that have several voices."""
    speeds: Sequence[str] = ("slow", "moderate", "fast")
    room: float = 0.3
    """Size of the room whose reverberation is added, 0 to 1."""


INSTRUMENTS = (
    Instrument(name="piano", names=("piano",), played="played on the piano", program=0,
               low=28, high=96, several_voices=0.6),
    Instrument(name="harpsichord", names=("harpsichord",), played="played on the harpsichord",
               program=6, low=29, high=89, several_voices=0.5),
    Instrument(name="organ", names=("church organ", "pipe organ", "organ"),
               played="played on the church organ", program=19, low=36, high=93,
               several_voices=0.7, room=0.8),
    Instrument(name="guitar", names=("guitar", "classical guitar"), played="played on the guitar",
               program=24, low=40, high=84, several_voices=0.3),
    Instrument(name="violin", names=("violin",), played="played on the violin", program=40,
               low=55, high=96, several_voices=0.0),
    Instrument(name="cello", names=("cello",), played="played on the cello", program=42,
               low=36, high=72, several_voices=0.0),
    Instrument(name="strings", names=("strings", "string ensemble", "string orchestra"),
               played="played by strings", program=48, low=36, high=93, several_voices=0.8,
               room=0.6),
    Instrument(name="harp", names=("harp",), played="played on the harp", program=46,
               low=28, high=96, several_voices=0.4),
    Instrument(name="choir", names=("choir",), played="sung by a choir", program=52,
               low=38, high=81, several_voices=0.9, speeds=("slow", "moderate"), room=0.8),
    Instrument(name="flute", names=("flute",), played="played on the flute", program=73,
               low=60, high=94, several_voices=0.0),
    Instrument(name="synth", names=("synth", "synthesizer"), played="played on a synthesizer",
               program=81, low=36, high=93, several_voices=0.4),
)  # fmt: skip
# What a listener calls slow or fast: how many notes begin in a second.
SPEEDS = {"slow": (1.2, 2.0), "moderate": (2.6, 3.6), "fast": (5.0, 7.5)}
_MOST_BPM = 240.0  # quarter notes
_MOODS = {
    ("slow", True): ("sad", "melancholy", "solemn"),
    ("slow", False): ("calm", "peaceful", "gentle"),
    ("moderate", True): ("wistful", "serious", "thoughtful"),
    ("moderate", False): ("graceful", "warm", "pleasant"),
    ("fast", True): ("restless", "driving", "dramatic"),
    ("fast", False): ("lively", "cheerful", "joyful"),
}
_CAPTIONS = (
    "a {speed} {instrument} piece in {key}, {mood}",
    "a {mood} {form} {played}, {speed}, in {key}",
    "{instrument} playing a {speed} {form} in {key}",
    "{speed} and {mood} {genre} music for {instrument}",
    "a {form} for {instrument} in {key}, {speed} tempo",
    "{mood} {instrument} music, {speed}",
    "a {speed} {form} {played}, {mood}",
    "a {mood} piece in {key} {played}",
)
_MELODY_CAPTIONS = (
    "solo {instrument}, a {speed} and {mood} {form}",
    "a {speed} melody {played}, in {key}",
)
_VOICES_CAPTIONS = (
    "a {mood} {form} in several voices {played}, {speed}",
    "{speed} {genre} music in {key} with rich harmony, {played}",
)
# All of these name the instrument, the key and the speed.
_SOLO_CAPTIONS = (
    "a {speed} {instrument} melody in {key}",
    "a {speed} and {mood} melody in {key} {played}",
    "a {mood} {form} in {key} {played}, {speed}",
    "solo {instrument}, a {speed} {form} in {key}",
    "{instrument} playing a {speed} {form} in {key}",
    "{speed} and {mood} music for solo {instrument} in {key}",
    "a {mood} tune for {instrument} in {key}, {speed} tempo",
    "{speed} {instrument} solo in {key}, {mood}",
)
NUM_CAPTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A part of the music, what plays it, and the words for it."""

    about: str
    """For the data card."""
    instruments: Sequence[Instrument]
    shifts: range
    """Semitones that a tune is moved by, before octaves."""
    melody_captions: Sequence[str]
    """Templates for one voice."""
    voices_captions: Sequence[str] = ()
    """Templates for several; without any, tunes are melodies alone."""


SELECTIONS = {
    "all": Selection(
        about="Melodies and music of several voices, for all instruments.",
        instruments=INSTRUMENTS,
        shifts=range(-3, 4),
        melody_captions=(*_CAPTIONS, *_MELODY_CAPTIONS),
        voices_captions=(*_CAPTIONS, *_VOICES_CAPTIONS),
    ),
    "solo": Selection(
        about=(
            "Melodies alone, in all twelve keys, for instruments that sound clear by themselves. "
            "Every caption names the instrument, the key and the speed."
        ),
        instruments=tuple(
            replace(instrument, several_voices=0.0)
            for instrument in INSTRUMENTS
            if instrument.name in ("piano", "guitar", "violin", "cello", "harp", "flute", "synth")
        ),
        shifts=range(-5, 7),
        melody_captions=_SOLO_CAPTIONS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip that has been drawn: all that rendering needs."""

    split: str
    number: int
    tune: str
    instrument: Instrument
    parts: Sequence[Sequence[tuple[float, float, int, int]]]
    """Of each voice the notes: start and end in seconds, MIDI pitch, velocity."""
    level: float
    seconds: float
    """At most."""
    about: dict[str, Any]
    """The sidecar's fields."""

    @property
    def name(self) -> str:
        """Its path below --out, without suffix."""
        tune = re.sub(r"[^A-Za-z0-9]+", "-", self.tune).strip("-")
        return f"{self.split}/{self.number:06d}_{self.instrument.name}_{tune}"


class Repertoire:
    """The tunes of one split, to be drawn from: melodies, and music of several voices."""

    def __init__(self, tunes: Sequence[Tune]):
        self._tunes: dict[bool, list[Tune]] = {True: [], False: []}
        for tune in tunes:
            self._tunes[tune.is_melody].append(tune)
        # (a long movement has more to give than a dance tune)
        self._shares = {
            kind: np.cumsum([min(tune.length, 400.0) for tune in found])
            for kind, found in self._tunes.items()
        }

    def draw(self, rng: np.random.Generator, melody: bool) -> Tune:
        """A tune of the kind, of the other one if there is none."""
        melody = melody if self._tunes[melody] else not melody
        shares = self._shares[melody]
        place = np.searchsorted(shares, rng.uniform(0, shares[-1]), side="right")
        return self._tunes[melody][min(int(place), len(shares) - 1)]


def split_of(name: str, valid_percent: float, test_percent: float) -> str:
    """The split of a group of tunes, by a hash of its name."""
    draw = 100 * int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if draw < test_percent:
        return "test"
    return "valid" if draw < test_percent + valid_percent else "train"


def draw_clip(
    repertoire: Repertoire,
    selection: Selection,
    split: str,
    number: int,
    seed: int,
    max_seconds: float,
) -> Clip:
    """Clip `number` of a split: tune, excerpt, instrument, key, speed, words, all drawn.

    Every run of as many clips as the selection has instruments has each of them once. Raises
    `UserError` where no tune of the split suits the instrument.
    """
    place = SPLITS.index(split)
    cycle, turn = divmod(number, len(selection.instruments))
    order = np.random.default_rng([seed, place, 0, cycle]).permutation(len(selection.instruments))
    instrument = selection.instruments[order[turn]]
    rng = np.random.default_rng([seed, place, 1, number])
    melody = bool(rng.random() >= instrument.several_voices)
    for _ in range(1000):
        tune = repertoire.draw(rng, melody)
        semitones = int(rng.integers(selection.shifts.start, selection.shifts.stop))
        shift = _fit(tune, instrument, semitones)
        if shift is None:
            continue
        speed = str(rng.choice(list(instrument.speeds)))
        excerpt = _excerpt(tune, rng, SPEEDS[speed], max_seconds)
        if excerpt is None:
            continue
        voices, bpm, seconds = excerpt
        played = [_play(voice, bpm, shift, rng) for voice in voices if voice]
        key = (_MINOR_KEYS if tune.minor else _MAJOR_KEYS)[(tune.tonic + shift) % 12]
        key += " minor" if tune.minor else " major"
        mood = str(rng.choice(list(_MOODS[speed, tune.minor])))
        templates = selection.melody_captions if len(played) == 1 else selection.voices_captions
        about = {
            "title": tune.title,
            "artist": tune.composer,
            "description": _captions(rng, templates, tune, instrument, key, speed, mood),
            "genre": tune.genre,
            "instrument": instrument.name,
            "bpm": round(bpm / tune.beat),
            "speed": speed,
            "key": key,
            "time_signature": tune.time_signature,
            "keywords": [speed, mood, tune.form],
            "tune": tune.id,
        }
        level = LEVEL * 10 ** (rng.uniform(-LEVEL_SPREAD_DB, LEVEL_SPREAD_DB) / 20)
        return Clip(
            split=split, number=number, tune=tune.id, instrument=instrument, parts=played,
            level=float(level), seconds=seconds,
            about={name: value for name, value in about.items() if value is not None},
        )  # fmt: skip
    raise UserError(f"no tune of the {split} split suits the {instrument.name}: its share is small")


def _fit(tune: Tune, instrument: Instrument, semitones: int) -> int | None:
    """Semitones to move a tune by, octaves on top of `semitones`; None if it does not fit at all.

    Of several octaves that fit the one in which the tune lies nearest the middle of the range.
    """
    pitches = [note.pitch for part in tune.parts for note in part]
    low, high = min(pitches), max(pitches)
    shifts = [semitones + 12 * octave for octave in range(-4, 5)]
    shifts = [s for s in shifts if instrument.low <= low + s and high + s <= instrument.high]
    middle = (instrument.low + instrument.high) / 2
    return min(shifts, key=lambda s: abs(np.mean(pitches) + s - middle), default=None)


def _excerpt(
    tune: Tune, rng: np.random.Generator, speed: tuple[float, float], max_seconds: float
) -> tuple[list[list[Note]], float, float] | None:
    """Notes from the beginning of a bar on, quarter notes a minute, and the seconds they take.

    None if the tempo would be absurd, or the excerpt too short.
    """
    onsets = np.unique([note.start for part in tune.parts for note in part])
    bpm = 60 * rng.uniform(*speed) * (onsets[-1] - onsets[0]) / (len(onsets) - 1)
    length = max_seconds * bpm / 60  # in quarter notes
    # (what follows a late start must still fill the clip)
    starts = [bar for bar in tune.bars if bar + length <= tune.length] or [tune.bars[0]]
    begin = starts[rng.integers(len(starts))]
    end = begin + length
    # the last notes have time to ring
    last = end - 0.8 * bpm / 60
    parts = [
        [
            note._replace(start=note.start - begin, length=min(note.length, end - note.start))
            for note in part
            if begin <= note.start < last
        ]
        for part in tune.parts
    ]
    found = [note for part in parts for note in part]
    if not found:
        return None
    first = min(note.start for note in found)
    parts = [[note._replace(start=note.start - first) for note in part] for part in parts]
    seconds = (max(note.start + note.length for note in found) - first) * 60 / bpm + _TAIL
    rate = len({note.start for note in found}) / seconds
    # (a movement's slow bars are not what its mean says)
    steady = speed[0] * 0.6 <= rate <= speed[1] * 1.4
    if bpm > _MOST_BPM or seconds < LEAST_SECONDS or not steady:
        return None
    return parts, float(bpm), min(seconds, max_seconds)


def _play(
    part: Sequence[Note], bpm: float, shift: int, rng: np.random.Generator
) -> list[tuple[float, float, int, int]]:
    """Notes as a player would give them: not quite even in time and strength."""
    second = 60 / bpm
    late = np.clip(rng.normal(0, 0.006, len(part)), -0.015, 0.015)
    accents = rng.normal(0, 5, len(part))
    played = []
    for note, delay, accent in zip(part, late, accents):
        start = max(0.0, note.start * second + float(delay))
        end = start + max(0.06, 0.95 * note.length * second)
        velocity = int(np.clip(66 + 24 * note.strength + accent, 30, 115))
        played.append((round(start, 4), round(end, 4), note.pitch + shift, velocity))
    return played


def _captions(
    rng: np.random.Generator,
    templates: Sequence[str],
    tune: Tune,
    instrument: Instrument,
    key: str,
    speed: str,
    mood: str,
) -> list[str]:
    """Several captions, each in other words; all of them name the instrument."""
    found = []
    for i in rng.permutation(len(templates))[:NUM_CAPTIONS]:
        text = _filled(
            templates[i],
            speed=speed,
            instrument=str(rng.choice(list(instrument.names))),
            played=instrument.played,
            form=tune.form,
            genre=tune.genre,
            key=key,
            mood=mood,
        )
        found.append(text)
    return found


def _filled(template: str, **words: str) -> str:
    """A template as a sentence: articles are right (an air, an Irish tune), and a choir sings."""
    text = template.format(**words)
    text = re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)
    text = text.replace("choir playing", "choir singing")
    return text[0].upper() + text[1:]
