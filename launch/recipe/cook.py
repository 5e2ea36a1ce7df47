"""A captioned data set to train on, made from nothing: old scores, played by a synthesizer.

python -m launch.recipe --out data/recipe --hours 20 --seed 0

Scores of music21's corpus (`tunes`) x instruments x tempi become clips of 16 kHz mono FLAC, each
with a sidecar .json of captions and the .notes that are played, in three folders: train, valid and
test, no tune in two of them. `--part solo` makes melodies alone. Clip number N of a split depends
on part, seed and N alone, so more hours add clips and change none.
The same command goes on where it was stopped. See docs/recipe.md.
"""

import hashlib
import json
import os
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
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from launch.recipe import tunes
from launch.recipe.clips import (
    LEAST_SECONDS,
    LEVEL,
    LEVEL_SPREAD_DB,
    NUM_CAPTIONS,
    SELECTIONS,
    SPEEDS,
    SPLITS,
    Clip,
    Instrument,
    Repertoire,
    draw_clip,
    split_of,
)
from launch.recipe.tunes import Tune
from magnet_jax import cli
from magnet_jax.arguments import Between, Count, Seed, check_fields
from magnet_jax.errors import UserError, end_with_parent
from magnet_jax.io import audio, ledger
from magnet_jax.io.files import held, not_half_written, replacing_file

_RENDER_RATE = 44_100  # the sound font's own; it does not filter when it plays at another
_RENDER_SECONDS = 600  # a clip takes a few
_RENDER_SLACK = 0.5  # seconds
_PEAK = 0.95
_FADE = 0.03
_FLUID_R3 = "74594e8f4250680adf590507a306655a299935343583256f3b722c48a1bc1cb0"  # SHA-256
_FLOOR = 1e-3  # of the level, below which the end counts as silence
_CARD = Path(__file__).with_name("card.md")

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
    part: Literal["all", "solo"] = "all"
    """Of the music: all, or melodies alone, which are easier to learn."""
    seed: Seed = 0
    """Of everything that is drawn."""
    max_seconds: Annotated[float, Between(2 * LEAST_SECONDS, 120)] = 20.0
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


def plan(
    tunes: Sequence[Tune], groups: Sequence[str], recipe: Recipe
) -> tuple[list[Clip], dict[str, set[str]]]:
    """All clips, and each split's groups of tunes."""
    selection = SELECTIONS[recipe.part]
    splits = defaultdict(list)
    members = defaultdict(set)
    for tune, group in zip(tunes, groups, strict=True):
        if not (tune.is_melody or selection.voices_captions):
            continue
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
            clip = draw_clip(repertoire, selection, split, number, recipe.seed, recipe.max_seconds)
            wanted -= clip.seconds
            clips.append(clip)
    return clips, members


def render(clip: Clip, recipe: Recipe) -> None:
    """Writes a clip, its sidecar and its notes, unless they are there; the audio comes last.

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
    mono, first = _finished(mono, clip)
    about = json.dumps(clip.about, indent=1, ensure_ascii=False) + "\n"
    notes = _notes(clip, first / 16_000, len(mono) / 16_000)
    for suffix, text in ((".json", about), (".notes", notes)):
        with replacing_file(path.with_suffix(suffix)) as temporary:
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


def _notes(clip: Clip, first: float, seconds: float) -> str:
    """A line for each note: start and end in seconds of the audio, which begins at `first`, and
    MIDI pitch, with tabs between.
    """
    found = [
        (max(0.0, start - first), min(seconds, end - first), pitch)
        for part in clip.parts
        for start, end, pitch, _ in part
    ]
    return "".join(f"{s:.4f}\t{e:.4f}\t{pitch}\n" for s, e, pitch in sorted(found) if s < e)


def _finished(mono: np.ndarray, clip: Clip) -> tuple[np.ndarray, int]:
    """Cut to what sounds, faded, and brought to the clip's level; and how many samples were cut
    from the beginning. `UserError` for silence.
    """
    mono = mono[: round(16_000 * clip.seconds)]
    loud = float(np.sqrt(np.mean(np.square(mono)))) if len(mono) else 0.0
    if not loud > 1e-5:
        raise UserError(f"--soundfont: program {clip.instrument.program} of {clip.name} is silent")
    sounding = np.flatnonzero(np.abs(mono) > _FLOOR * loud)
    # (a hundredth of a second before the first sound)
    first = max(0, int(sounding[0]) - 160)
    mono = mono[first : sounding[-1] + 1].copy()
    fade = min(len(mono), round(16_000 * _FADE))
    mono[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    gain = clip.level / float(np.sqrt(np.mean(np.square(mono))))
    return mono * min(gain, _PEAK / float(np.abs(mono).max())), first


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
    fixed = ("part", "seed", "max_seconds", "valid_percent", "test_percent")
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
    rights = "The sound font FluidR3 GM is by Frank Wen (2000-2002, 2008), under the MIT licence."
    if font != _FLUID_R3:
        rights = f"{recipe.soundfont.name} is under whatever licence its makers gave it."
    card = _CARD.read_text(encoding="utf-8").format(
        hours=total,
        count=len(clips),
        shortest=min(seconds.values()),
        longest=max(seconds.values()),
        part=SELECTIONS[recipe.part].about,
        captions=NUM_CAPTIONS,
        command=_command(recipe),
        versions=", ".join(f"{name} {version(name)}" for name in ("music21", "pretty_midi")),
        soundfont=recipe.soundfont.name,
        soundfont_hash=font,
        soundfont_rights=rights,
        splits="\n".join(rows),
        instruments="\n".join(f"| {name} | {played[name]} | {voices[name]} |" for name in played),
        speeds=", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in SPEEDS.items()),
        level=LEVEL,
        spread=LEVEL_SPREAD_DB,
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
