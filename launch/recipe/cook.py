"""A captioned data set to train on, made from nothing: old scores, played by a synthesizer.

python -m launch.recipe --out data/recipe --hours 20 --seed 0

Scores of music21's corpus (`tunes`) x instruments x tempi become clips of 16 kHz mono FLAC, each
with a sidecar .json of captions, in three folders: train, valid and test, no tune in two of them.
Clip number N of a split depends on the seed and N alone, so more hours add clips and change none.
The same command goes on where it was stopped. See docs/recipe.md.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from launch.recipe import tunes
from launch.recipe.tunes import Note, Tune
from magnet_jax import cli
from magnet_jax.arguments import Between, Count, Seed, check_fields
from magnet_jax.errors import UserError, end_with_parent
from magnet_jax.io import audio, ledger
from magnet_jax.io.files import held, not_half_written, replacing_file

SPLITS = ("train", "valid", "test")
_RENDER_RATE = 44_100  # the sound font's own; it does not filter when it plays at another
_RENDER_SECONDS = 600  # a clip takes a few
_RENDER_SLACK = 0.5  # seconds
_LEAST_SECONDS = 6.0
_LEVEL = 0.1  # root mean square
_LEVEL_SPREAD_DB = 3.0
_PEAK = 0.95
_TAIL = 1.5  # seconds kept at most of what rings after the last note
_FADE = 0.03
_FLUID_R3 = "74594e8f4250680adf590507a306655a299935343583256f3b722c48a1bc1cb0"  # SHA-256
_FLOOR = 1e-3  # of the level, below which the end counts as silence
_MAJOR_KEYS = ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
_MINOR_KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "G sharp", "A", "B flat",
               "B")  # fmt: skip

Percent = Annotated[float, Between(0, 40)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Renders captioned clips of public-domain music.

    Run the same command again to go on after an interruption, or with more hours to add to it.
    """

    out: Path
    """Folder for the clips."""
    hours: Annotated[float, Between(0, 1000, above=True)] = 20.0
    """Of audio, all splits together."""
    seed: Seed = 0
    """Of everything that is drawn."""
    max_seconds: Annotated[float, Between(2 * _LEAST_SECONDS, 120)] = 20.0
    """Longest clip."""
    valid_percent: Percent = 5.0
    """Share of the tunes, and of the hours, kept for validation."""
    test_percent: Percent = 5.0
    """Share of the tunes, and of the hours, kept for tests."""
    workers: Count = 2
    """Processes that read scores and render."""
    soundfont: Path = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
    """General MIDI sound font; Debian's package fluid-soundfont-gm has this one."""
    synthesizer: str = "fluidsynth"
    """Program that renders, called with FluidSynth's options."""
    scores: Path | None = None
    """Folder that keeps the scores as read; by default scores within --out."""


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
_NUM_CAPTIONS = 3
_CARD = Path(__file__).with_name("card.md")


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
    repertoire: Repertoire, split: str, number: int, seed: int, max_seconds: float
) -> Clip:
    """Clip `number` of a split: tune, excerpt, instrument, key, speed, words, all drawn.

    Every run of as many clips as there are instruments has each of them once. Raises `UserError`
    where no tune of the split suits the instrument.
    """
    place = SPLITS.index(split)
    cycle, turn = divmod(number, len(INSTRUMENTS))
    order = np.random.default_rng([seed, place, 0, cycle]).permutation(len(INSTRUMENTS))
    instrument = INSTRUMENTS[order[turn]]
    rng = np.random.default_rng([seed, place, 1, number])
    melody = bool(rng.random() >= instrument.several_voices)
    for _ in range(1000):
        tune = repertoire.draw(rng, melody)
        shift = _fit(tune, instrument, int(rng.integers(-3, 4)))
        if shift is None:
            continue
        speed = str(rng.choice(list(instrument.speeds)))
        excerpt = _excerpt(tune, rng, SPEEDS[speed], max_seconds)
        if excerpt is None:
            continue
        parts, bpm, seconds = excerpt
        played = [_play(part, bpm, shift, rng) for part in parts if part]
        key = (_MINOR_KEYS if tune.minor else _MAJOR_KEYS)[(tune.tonic + shift) % 12]
        key += " minor" if tune.minor else " major"
        mood = str(rng.choice(list(_MOODS[speed, tune.minor])))
        about = {
            "title": tune.title,
            "artist": tune.composer,
            "description": _captions(rng, tune, instrument, key, speed, mood, len(played) == 1),
            "genre": tune.genre,
            "instrument": instrument.name,
            "bpm": round(bpm / tune.beat),
            "key": key,
            "time_signature": tune.time_signature,
            "keywords": [speed, mood, tune.form],
            "tune": tune.id,
        }
        level = _LEVEL * 10 ** (rng.uniform(-_LEVEL_SPREAD_DB, _LEVEL_SPREAD_DB) / 20)
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
    if bpm > _MOST_BPM or seconds < _LEAST_SECONDS or not steady:
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
    tune: Tune,
    instrument: Instrument,
    key: str,
    speed: str,
    mood: str,
    melody: bool,
) -> list[str]:
    """Several captions, each in other words; all of them name the instrument."""
    templates = [*_CAPTIONS, *(_MELODY_CAPTIONS if melody else _VOICES_CAPTIONS)]
    found = []
    for i in rng.permutation(len(templates))[:_NUM_CAPTIONS]:
        text = templates[i].format(
            speed=speed,
            instrument=str(rng.choice(list(instrument.names))),
            played=instrument.played,
            form=tune.form,
            genre=tune.genre,
            key=key,
            mood=mood,
        )
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
        text = text.replace("choir playing", "choir singing")
        found.append(text[0].upper() + text[1:])
    return found


def plan(
    tunes: Sequence[Tune], groups: Sequence[str], recipe: Recipe
) -> tuple[list[Clip], dict[str, set[str]]]:
    """All clips, and each split's groups of tunes."""
    splits = defaultdict(list)
    members = defaultdict(set)
    for tune, group in zip(tunes, groups, strict=True):
        split = split_of(group, recipe.valid_percent, recipe.test_percent)
        splits[split].append(tune)
        members[split].add(group)
    shares = {"valid": recipe.valid_percent / 100, "test": recipe.test_percent / 100}
    shares["train"] = 1 - sum(shares.values())
    clips = []
    for split in SPLITS:
        wanted = 3600 * recipe.hours * shares[split]
        if wanted and not splits[split]:
            raise UserError(f"of {len(tunes)} tunes none fell to {split}: raise its percentage")
        repertoire = Repertoire(splits[split])
        for number in count():
            if wanted <= 0:
                break
            clip = draw_clip(repertoire, split, number, recipe.seed, recipe.max_seconds)
            wanted -= clip.seconds
            clips.append(clip)
    return clips, members


def render(clip: Clip, recipe: Recipe) -> None:
    """Writes a clip and its sidecar, unless they are there; the audio comes last.

    Raises `UserError` where the synthesizer fails.
    """
    path = recipe.out / f"{clip.name}.flac"
    if path.exists():
        return
    with not_half_written(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "clip.mid"), Path(folder, "clip.wav")
        _write_midi(midi, clip)
        _synthesize(midi, wav, clip.instrument, recipe)
        sound, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    lasts = max((end for part in clip.parts for _, end, _, _ in part), default=0.0)
    if len(sound) / rate < lasts - _RENDER_SLACK:  # FluidSynth says nothing of a full disk
        raise UserError(
            f"--synthesizer {recipe.synthesizer}: wrote {len(sound) / rate:.1f} s of the "
            f"{lasts:.1f} s of {clip.name}; is there room in {tempfile.gettempdir()}?"
        )
    mono = soxr.resample(sound.mean(1), rate, 16_000, "VHQ")
    mono = _finished(mono, clip)
    with replacing_file(path.with_suffix(".json")) as temporary:
        text = json.dumps(clip.about, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
    audio.write(path, mono[None], 16_000, format="FLAC", subtype="PCM_16")


def _write_midi(path: Path, clip: Clip) -> None:
    import pretty_midi

    midi = pretty_midi.PrettyMIDI(resolution=960)
    for part in clip.parts:
        voice = pretty_midi.Instrument(program=clip.instrument.program)
        for start, end, pitch, velocity in part:
            voice.notes.append(pretty_midi.Note(velocity, pitch, start, end))
        midi.instruments.append(voice)
    midi.write(str(path))


def _synthesize(midi: Path, wav: Path, instrument: Instrument, recipe: Recipe) -> None:
    command = [
        recipe.synthesizer, "-ni", "-q", "-r", str(_RENDER_RATE), "-g", "0.4", "-R", "1", "-C", "0",
        "-O", "float", "-o", "synth.dynamic-sample-loading=1",
        "-o", f"synth.reverb.room-size={instrument.room}", "-o", "synth.reverb.level=0.7",
        "-F", str(wav), str(recipe.soundfont), str(midi),
    ]  # fmt: skip
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_RENDER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--synthesizer {recipe.synthesizer}: did not end within {_RENDER_SECONDS:g} s"
        ) from None
    if result.returncode or not wav.exists():
        said = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"--synthesizer {recipe.synthesizer}: failed ({said})")


def _finished(mono: np.ndarray, clip: Clip) -> np.ndarray:
    """Cut to what sounds, faded, and brought to the clip's level; `UserError` for silence."""
    mono = mono[: round(16_000 * clip.seconds)]
    loud = float(np.sqrt(np.mean(np.square(mono)))) if len(mono) else 0.0
    if not loud > 1e-5:
        raise UserError(f"--soundfont: program {clip.instrument.program} of {clip.name} is silent")
    sounding = np.flatnonzero(np.abs(mono) > _FLOOR * loud)
    # (a hundredth of a second before the first sound)
    mono = mono[max(0, sounding[0] - 160) : sounding[-1] + 1].copy()
    fade = min(len(mono), round(16_000 * _FADE))
    mono[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    gain = clip.level / float(np.sqrt(np.mean(np.square(mono))))
    return mono * min(gain, _PEAK / float(np.abs(mono).max()))


def cook(recipe: Recipe) -> str:
    """Makes the data set and returns a summary; raises `UserError` for what is in the way."""
    _check(recipe)
    corpus = tunes.corpus_folder()
    files = tunes.corpus_files(corpus)
    kept = recipe.scores or recipe.out / "scores"
    with _held(recipe.out):
        _begin(recipe)
        jobs = [(corpus, name, collection, kept) for name, collection in files.items()]
        _each(tunes.read_file, jobs, recipe.workers, "scores")
        music, skipped = tunes.load(kept, list(files))
        if len(skipped) > len(music):
            raise UserError(
                f"{corpus}: most scores cannot be read, such as {skipped[0]}; is this the music21 "
                "that the extra recipe names?"
            )
        groups = tunes.group(music)
        clips, members = plan(music, groups, recipe)
        known = {f"{clip.name}.flac" for clip in clips}
        more = {f"{p.parent.name}/{p.name}" for p in recipe.out.glob("*/*.flac")} - known
        if more:
            raise UserError(
                f"--out {recipe.out}: holds {len(more)} clips beyond --hours {recipe.hours:g}, "
                f"such as {min(more)}; give at least the hours that it was made with"
            )
        _each(render, [(clip, recipe) for clip in clips], recipe.workers, "clips")
        return _write_card(recipe, clips, members, len(music), skipped)


def _check(recipe: Recipe) -> None:
    check_fields(recipe, "--")
    if shutil.which(recipe.synthesizer) is None:
        raise UserError(f"--synthesizer {recipe.synthesizer}: not found: apt install fluidsynth")
    if not recipe.soundfont.is_file():
        raise UserError(
            f"--soundfont {recipe.soundfont}: no such file: apt install fluid-soundfont-gm"
        )


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Makes the folder, holds it for this process, and clears what a kill left half written."""
    with held(out / ".lock") as mine:
        if not mine:
            raise UserError(f"--out {out}: another process is writing there")
        for path in (*out.glob(".*.tmp"), *out.glob("*/.*.tmp")):
            path.unlink()
        yield


def _begin(recipe: Recipe) -> None:
    """Notes what the folder is begun with, or checks that it was begun with the same."""
    fixed = ("seed", "max_seconds", "valid_percent", "test_percent")
    begun = {name: getattr(recipe, name) for name in fixed}
    begun |= {"soundfont": _hash(recipe.soundfont), "notes": tunes.VERSION}
    path = recipe.out / "recipe.json"
    others = [p.name for p in recipe.out.iterdir() if p.name not in (".lock", "scores")]
    if others and not path.exists():
        raise UserError(f"--out {recipe.out}: holds other files ({min(others)}); name another")
    ledger.claim(path, begun)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _each(do: Callable[..., None], jobs: Sequence[Iterable[Any]], workers: int, unit: str) -> None:
    """Does all jobs, `workers` at once; the first error ends it."""
    if workers == 1:
        for job in tqdm(jobs, unit=unit, desc=unit):
            do(*job)
        return
    # (spawn: a forked child could inherit a lock that another thread holds)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        try:
            results = [pool.submit(do, *job) for job in jobs]
            for result in tqdm(results, unit=unit, desc=unit):
                result.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _command(recipe: Recipe) -> str:
    """What was asked for: hours and seed, and what else changes clips, if not its default."""
    words = ["python", "-m", "launch.recipe"]
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        always = field.name in ("hours", "seed")
        if field.name in ("out", "scores", "workers", "synthesizer"):
            continue
        if always or value != field.default:
            text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
            words += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join(words)


def _write_card(
    recipe: Recipe,
    clips: Sequence[Clip],
    members: dict[str, set[str]],
    num_tunes: int,
    skipped: Sequence[str],
) -> str:
    """Writes README.md and returns the summary."""
    seconds = {c.name: soundfile.info(recipe.out / f"{c.name}.flac").duration for c in clips}
    rows = []
    for split in SPLITS:
        own = [clip for clip in clips if clip.split == split]
        hours = sum(seconds[clip.name] for clip in own) / 3600
        used = len({clip.tune for clip in own})
        rows.append(f"| {split} | {len(own)} | {hours:.2f} | {used} | {len(members[split])} |")
    played = Counter(clip.instrument.name for clip in clips)
    voices = Counter(clip.instrument.name for clip in clips if len(clip.parts) > 1)
    files = tunes.corpus_files(tunes.corpus_folder())
    withheld = {line.split(":")[0] for line in skipped if ": rights (" in line}
    collections = []
    for collection in tunes.COLLECTIONS:
        names = {name for name, owner in files.items() if owner is collection} - withheld
        stems = {name.rpartition(".")[0] for name in names}
        share = sum(clip.tune.partition("#")[0] in stems for clip in clips)
        collections.append(f"| {collection.source} | {len(names)} | {share} |")
    total = sum(seconds.values()) / 3600
    font = _hash(recipe.soundfont)
    rights = "FluidR3 GM is under the MIT licence."
    if font != _FLUID_R3:
        rights = f"{recipe.soundfont.name} is under whatever licence its makers gave it."
    card = _CARD.read_text(encoding="utf-8").format(
        hours=total,
        count=len(clips),
        shortest=min(seconds.values()),
        longest=max(seconds.values()),
        captions=_NUM_CAPTIONS,
        command=_command(recipe),
        versions=", ".join(f"{name} {version(name)}" for name in ("music21", "pretty_midi")),
        soundfont=recipe.soundfont.name,
        soundfont_hash=font,
        soundfont_rights=rights,
        splits="\n".join(rows),
        instruments="\n".join(f"| {name} | {played[name]} | {voices[name]} |" for name in played),
        speeds=", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in SPEEDS.items()),
        level=_LEVEL,
        spread=_LEVEL_SPREAD_DB,
        collections="\n".join(collections),
        tunes=num_tunes,
        reserved=len(withheld),
        broken=len(skipped) - len(withheld),
    )
    with replacing_file(recipe.out / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return f"{recipe.out}: {len(clips)} clips, {total:.2f} h; see {recipe.out / 'README.md'}"


def main(words: Sequence[str] | None = None) -> None:
    print(cook(cli.parse(Recipe, words, prog="python -m launch.recipe")))
