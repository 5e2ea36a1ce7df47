"""Public-domain scores of music21's corpus as plain notes, and which of them are the same tune.

Parsing takes minutes, so each file of the corpus is read once and kept as JSON. What a file says
about rights decides whether it is taken at all (`rights_reserved`).
"""

import dataclasses
import importlib.util
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A part of the corpus whose music is out of copyright."""

    files: str
    """Glob pattern below the corpus."""
    source: str
    """What it is, for the data card."""
    form: str
    """What its pieces are called where neither title nor file says."""
    genre: str
    composer: str | None = None


COLLECTIONS = (
    Collection(
        files="bach/bwv*.mxl",
        source="J. S. Bach (1685-1750), chorales and other pieces",
        form="chorale",
        genre="sacred",
        composer="Johann Sebastian Bach",
    ),
    Collection(
        files="monteverdi/*.mxl",
        source="Claudio Monteverdi (1567-1643), madrigals",
        form="madrigal",
        genre="renaissance",
        composer="Claudio Monteverdi",
    ),
    Collection(
        files="haydn/*/*.mxl",
        source="Joseph Haydn (1732-1809), string quartets",
        form="quartet movement",
        genre="classical",
        composer="Joseph Haydn",
    ),
    Collection(
        files="mozart/*/*.mxl",
        source="Wolfgang Amadeus Mozart (1756-1791), string quartets and a sonata",
        form="quartet movement",
        genre="classical",
        composer="Wolfgang Amadeus Mozart",
    ),
    Collection(
        files="beethoven/**/*.mxl",
        source="Ludwig van Beethoven (1770-1827), string quartets",
        form="quartet movement",
        genre="classical",
        composer="Ludwig van Beethoven",
    ),
    Collection(
        files="airdsAirs/*.abc",
        source="James Aird, A Selection of Scotch, English, Irish and Foreign Airs (1778-1801)",
        form="air",
        genre="folk",
    ),
    Collection(
        files="ryansMammoth/*.abc",
        source="Ryan's Mammoth Collection (1883), dance tunes",
        form="dance tune",
        genre="folk",
    ),
    Collection(
        files="oneills1850/*.abc",
        source="O'Neill's Music of Ireland (1903)",
        form="Irish tune",
        genre="folk",
    ),
    Collection(
        files="miscFolk/*.abc",
        source="American fife tunes, and the Northumbrian Minstrelsy (1882)",
        form="folk tune",
        genre="folk",
    ),
)
# Looked for in titles and in ABC's R: fields; the first that fits.
_FORMS = (
    "slip jig", "jig", "reel", "hornpipe", "strathspey", "clog", "polka", "waltz", "quickstep",
    "march", "minuet", "gavotte", "air", "lullaby", "lament",
)  # fmt: skip
_RESERVED = re.compile(
    r"rights[^.<\n]{0,40}reserved|all rights|rights to|licen[cs](?:e|ing)|creative commons"
    r"|cc[- ]by|ed[il][zl][!i]on|electronic (?:edition|format|version)|permission|copyright|©"
    r"|\(c\) *\d{4}",
    re.IGNORECASE,
)
# The notice in the chorales is of printed pages, which are not in the corpus.
_HARMLESS = re.compile(
    r"PDF ©\s?\d{4} Margaret Greentree(?:[^©]{0,400}?used by permission)?", re.IGNORECASE
)
_PHRASE = 10  # intervals in a piece of melody that is compared
_COMMON = 12  # tunes that share a piece of melody which then says nothing: scales, arpeggios
_SAME = 0.25  # share of the shorter tune's melody
VERSION = 2  # of the notes kept; raise it when `_tune` changes, or what is a claim of rights


class Note(NamedTuple):
    start: float
    """In quarter notes from the beginning."""
    length: float
    pitch: int
    """MIDI number."""
    strength: float
    """Of its beat, from 0 to 1 on the first of a bar."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """A piece of music, ties joined; repeats are not taken, so first endings are left out."""

    id: str
    title: str
    form: str
    genre: str
    composer: str | None
    tonic: int
    """Pitch class, 0 is C."""
    minor: bool
    time_signature: str
    beat: float
    """Its length in quarter notes."""
    bars: Sequence[float]
    """Where bars begin, in quarter notes."""
    parts: Sequence[Sequence[Note]]

    @property
    def is_melody(self) -> bool:
        """Whether no two notes sound at once."""
        if len(self.parts) > 1:
            return False
        notes = self.parts[0]
        return all(a.start + a.length <= b.start + 1e-3 for a, b in zip(notes, notes[1:]))

    @property
    def length(self) -> float:
        """In quarter notes."""
        return max(note.start + note.length for part in self.parts for note in part)


def corpus_folder() -> Path:
    """Where music21 keeps its corpus; `UserError` without music21. Does not import it."""
    found = importlib.util.find_spec("music21")
    if found is None or found.origin is None:
        raise UserError('music21 is not installed: pip install -e ".[recipe]"')
    return Path(found.origin).parent / "corpus"


def corpus_files(corpus: Path) -> dict[str, Collection]:
    """The files of all collections by name below the corpus."""
    found = {}
    for collection in COLLECTIONS:
        for name in sorted(p.relative_to(corpus).as_posix() for p in corpus.glob(collection.files)):
            found[name] = collection
    if not found:
        raise UserError(f"{corpus}: holds no scores; music21 may have come without its corpus")
    return found


def rights_reserved(path: Path) -> str | None:
    """What a score says about rights in it; None where it says nothing."""
    if path.suffix == ".mxl":
        with zipfile.ZipFile(path) as archive:
            data = b"\n".join(
                archive.read(name) for name in archive.namelist() if "META-INF" not in name
            )
    else:
        data = path.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "replace")
    found = _RESERVED.search(_HARMLESS.sub("", text))
    return None if found is None else " ".join(found[0].split())


def read_file(corpus: Path, name: str, collection: Collection, cache: Path) -> None:
    """Reads one file of the corpus, unless it is kept already, and keeps what `load` gives back."""
    kept = _kept(cache, name)
    if kept.exists() and json.loads(kept.read_text())["version"] == VERSION:
        return
    skipped, tunes = [], []
    if notice := rights_reserved(corpus / name):
        skipped.append(f"{name}: rights ({notice})")
    else:
        import music21

        try:
            parsed = music21.converter.parse(corpus / name, forceSource=True)
        except Exception as error:  # music21's parsers raise what they please
            skipped.append(f"{name}: cannot be parsed ({type(error).__name__})")
        else:
            is_opus = isinstance(parsed, music21.stream.Opus)
            rhythms = _rhythms(corpus / name)
            for i, score in enumerate(parsed.scores if is_opus else [parsed]):
                tune_id = name.rpartition(".")[0] + (f"#{i}" if is_opus else "")
                rhythm = rhythms[i] if i < len(rhythms) else ""
                try:
                    tunes.append(_tune(score, tune_id, rhythm, collection))
                except Exception as error:  # whatever music21 cannot make sense of
                    skipped.append(f"{tune_id}: {type(error).__name__}")
    record = {
        "version": VERSION,
        "skipped": skipped,
        "tunes": [dataclasses.asdict(t) for t in tunes],
    }
    with replacing_file(kept) as path:
        path.write_text(json.dumps(record, separators=(",", ":")))


def load(cache: Path, names: Sequence[str]) -> tuple[list[Tune], list[str]]:
    """All tunes that `read_file` kept of these files, and what it left out and why."""
    tunes, skipped = [], []
    for name in names:
        record = json.loads(_kept(cache, name).read_text())
        skipped += record["skipped"]
        for fields in record["tunes"]:
            parts = [[Note(*note) for note in part] for part in fields.pop("parts")]
            tunes.append(Tune(**fields, parts=parts))
    return tunes, skipped


def _kept(cache: Path, name: str) -> Path:
    return cache / (name.replace("/", "__") + ".json")


def _rhythms(path: Path) -> list[str]:
    """The R: fields of an ABC file's tunes, which music21 drops; '' for tunes without."""
    if path.suffix != ".abc":
        return []
    tunes = re.split(r"^X:", path.read_text(errors="replace"), flags=re.MULTILINE)[1:]
    found = [re.search(r"^R:(.*)", tune, re.MULTILINE) for tune in tunes]
    return [match[1].strip() if match else "" for match in found]


def _tune(score: Any, tune_id: str, rhythm: str, collection: Collection) -> Tune:
    """A tune of music21's score; raises whatever music21 does, and ValueError without music."""
    streams = list(score.parts) or [score]
    signatures = streams[0].recurse().getElementsByClass("TimeSignature")
    ratio, beat, bar = "4/4", 1.0, 4.0
    if signatures:
        ratio, beat = signatures[0].ratioString, float(signatures[0].beatDuration.quarterLength)
        bar = float(signatures[0].barDuration.quarterLength)
    measures = streams[0].getElementsByClass("Measure")
    bars = np.array(sorted({round(float(m.offset), 4) for m in measures}) or [0.0])
    endings = _first_endings(streams[0])
    parts = []
    for stream in streams:
        notes: dict[tuple[float, int], Note] = {}
        open_ties: dict[int, Note] = {}  # by pitch
        for element in stream.flatten().notes:
            start, length = float(element.offset), float(element.quarterLength)
            moved = _moved(start, endings)
            # (without length: grace notes)
            if length <= 0 or "ChordSymbol" in element.classes or moved is None:
                continue
            begun = start - bars[max(0, np.searchsorted(bars, start + 1e-3) - 1)]
            strength = _strength(begun, beat, bar)
            for single in element.notes if "Chord" in element.classes else [element]:
                note = Note(moved, length, single.pitch.midi, strength)
                first = open_ties.pop(note.pitch, None)
                # (some files mark only where ties begin)
                if first and abs(first.start + first.length - note.start) < 1e-3:
                    note = first._replace(length=first.length + note.length)
                if single.tie and single.tie.type in ("start", "continue"):
                    open_ties[note.pitch] = note
                notes[note.start, note.pitch] = note
        if notes:
            rounded = (
                n._replace(start=round(n.start, 4), length=round(n.length, 4))
                for n in notes.values()
            )
            parts.append(sorted(rounded, key=lambda n: (n.start, n.pitch)))
    if sum(map(len, parts)) < 16:
        raise ValueError("fewer than 16 notes")
    moved = {_moved(float(start), endings) for start in bars} - {None}
    key = score.analyze("key")
    metadata = score.metadata
    title = (metadata and metadata.title) or tune_id.rpartition("/")[2]
    return Tune(
        id=tune_id,
        title=title,
        form=_form(f"{title} {rhythm} {tune_id}", collection, len(parts)),
        genre=collection.genre,
        composer=collection.composer,
        tonic=key.tonic.pitchClass,
        minor=key.mode == "minor",
        time_signature=ratio,
        beat=beat,
        bars=sorted(round(start, 4) for start in moved),
        parts=parts,
    )


def _first_endings(stream: Any) -> list[tuple[float, float]]:
    """Where first endings lie, which lead back to what is not repeated here."""
    spans = []
    for bracket in stream.recurse().getElementsByClass("RepeatBracket"):
        if 1 in bracket.numberRange:
            for measure in bracket.getSpannedElements():
                start = float(measure.offset)
                spans.append((start, start + float(measure.duration.quarterLength)))
    return sorted(set(spans))


def _moved(start: float, cuts: Sequence[tuple[float, float]]) -> float | None:
    """Where a time is after these spans have been cut out; None within one."""
    for begin, end in cuts:
        if begin - 1e-3 <= start < end - 1e-3:
            return None
    return start - sum(end - begin for begin, end in cuts if end <= start + 1e-3)


def _strength(begun: float, beat: float, bar: float) -> float:
    """How much a beat is stressed, so far into its bar: 1 the first, an eighth the least."""
    for unit, strength in ((bar, 1.0), (beat, 0.5), (beat / 2, 0.25)):
        if abs(begun / unit - round(begun / unit)) < 1e-3:
            return strength
    return 0.125


def _form(text: str, collection: Collection, num_parts: int) -> str:
    if collection.composer:
        if collection.form == "chorale" and num_parts != 4:
            return "piece"
        return collection.form
    for form in _FORMS:
        if re.search(rf"\b{form}\b|{form}$", text.lower().replace("_", " ")):
            return form
    return collection.form


def group(tunes: Sequence[Tune]) -> list[str]:
    """For each tune the name of those that are the same: the first of their ids.

    The same are folk tunes with one title, quartets' movements, and those of which one has a
    quarter of the other's melody, in any key and rhythm.
    """
    leaders = list(range(len(tunes)))

    def leader(i: int) -> int:
        while leaders[i] != i:
            leaders[i] = leaders[leaders[i]]
            i = leaders[i]
        return i

    def join(i: int, j: int) -> None:
        i, j = sorted((leader(i), leader(j)))
        leaders[j] = i

    named: dict[str, int] = {}
    for i, tune in enumerate(tunes):
        for name in _names(tune):
            join(i, named.setdefault(name, i))

    phrases = [_phrases(tune) for tune in tunes]
    owners = defaultdict(list)
    for i, own in enumerate(phrases):
        for phrase in own:
            owners[phrase].append(i)
    shared = Counter()
    for who in owners.values():
        if len(who) <= _COMMON:
            shared.update((i, j) for n, i in enumerate(who) for j in who[n + 1 :])
    for (i, j), count in shared.items():
        if count >= max(2, _SAME * min(len(phrases[i]), len(phrases[j]))):
            join(i, j)
    ids = sorted(range(len(tunes)), key=lambda i: tunes[i].id)
    first: dict[int, str] = {}
    for i in ids:
        first.setdefault(leader(i), tunes[i].id)
    return [first[leader(i)] for i in range(len(tunes))]


def _names(tune: Tune) -> Iterator[str]:
    folder, stem = os.path.split(tune.id)
    if stem.startswith("movement"):
        yield folder
    elif tune.composer is None:
        words = re.sub(r"\s+-+\s.*|[^a-z0-9 ]", "", tune.title.lower().replace("-", " ")).split()
        words = [w for w in words if w not in ("the", "a", "an", "or", *_FORMS)]
        if sum(map(len, words)) >= 6:
            yield "title " + " ".join(words)


def _phrases(tune: Tune) -> set[tuple[int, ...]]:
    """Every run of intervals in the upper part's melody; repeated notes count once."""
    top: dict[float, int] = {}
    for note in tune.parts[0]:
        top[note.start] = max(note.pitch, top.get(note.start, 0))
    pitches = [top[start] for start in sorted(top)]
    steps = [b - a for a, b in zip(pitches, pitches[1:]) if a != b]
    return {tuple(steps[i : i + _PHRASE]) for i in range(len(steps) - _PHRASE + 1)}
