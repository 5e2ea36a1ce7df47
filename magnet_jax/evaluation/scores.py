"""From folders of audio to scores: a clip is a file, named by its id.

Generated clips are compared with the reference as sets (FAD), one by one where the reference has a
clip for them (KL), and with their captions (CLAP score, tag agreement). The reference is scored
likewise: FAD between its halves, KL between each clip and another, its clips and their captions.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from magnet_jax.errors import UserError
from magnet_jax.evaluation import metrics
from magnet_jax.evaluation.embedders import Embedded, Embedder
from magnet_jax.evaluation.probe import Probe, hear, named_label
from magnet_jax.io import audio
from magnet_jax.io.files import replacing_file
from magnet_jax.io.formats import SUFFIXES, RejectedError, open_sound, read_whole

TOP_TAGS = 5  # that are asked whether they hold what a caption names
_BESIDE = (".json", ".txt", ".notes")  # of clips
_FORMAT = 1  # of cached embeddings; files of others are not read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """How a file becomes the samples that embedders get, after which it is mono at their rate."""

    lufs: float | None = None
    """Integrated loudness that every clip is brought to; None leaves levels alone."""
    seconds: float | None = None
    """Only so much from each clip's beginning; None is all of it."""


class Clips(NamedTuple):
    """A set of clips: their files and, of an embedder, what it makes of each."""

    files: dict[str, Path]
    embedded: dict[str, Embedded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the scores themselves."""

    resamples: int = 200
    """Draws behind each interval; 0 for none."""
    seed: int = 0
    """Of the draws, and of what splits and shuffles the reference."""


def find_audio(folder: Path) -> dict[str, Path]:
    """The audio files below a folder by their ids: paths in it without suffix, in order.

    Raises `UserError` if there is none, or two have one id.
    """
    files: dict[str, Path] = {}
    for path in audio_below(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{path}: {files[name].name} has the same id")
        files[name] = path
    return files


def audio_below(folder: Path) -> list[Path]:
    """The audio files in a folder and its subfolders, in order; says what else lies there.

    As in tokenization, names that begin with a dot are passed over, and linked folders are not
    entered. Raises `UserError` if there is no audio.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found, others = [], Counter()
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(above, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            elif path.suffix.lower() not in _BESIDE:
                others[path.suffix.lower() or "without a suffix"] += 1
    if not found:
        raise UserError(f"{folder}: no audio in it (.wav, .flac, .mp3 and others: docs/data.md)")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"note: {folder}: left out what is no audio: {kinds}")
    return sorted(found)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """A file that cannot be read is a `UserError`."""
    try:
        yield
    except RejectedError as error:
        raise UserError(f"{path}: cannot be read ({error.reason}: {error.detail})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def describe(path: Path) -> tuple[int, int, float]:
    """Sample rate, channels and seconds of a file; raises `UserError` as `read_mono` does."""
    with _refusing(path), open_sound(str(path)) as sound:
        frames = sound.frames
        if frames is None:
            frames = sum(len(block) for block in sound.read(0, None))
        return sound.sample_rate, sound.channels, frames / sound.sample_rate


def read_mono(path: Path, sample_rate: int, listening: Listening) -> np.ndarray:
    """A file as embedders get it: cut, levelled, mixed and resampled, in this order; float32 [N].

    Raises `UserError` for a file that tokenization would not read, or not to its end.
    """
    with _refusing(path):
        wav_CN, rate = read_whole(str(path), listening.seconds)
    if not np.isfinite(wav_CN).all():
        raise UserError(f"{path}: holds NaN or infinite samples")
    if listening.lufs is not None:
        wav_CN, _ = audio.normalize_loudness(wav_CN, rate, listening.lufs)
    mono_N = wav_CN.mean(0)
    return (
        soxr.resample(mono_N, rate, sample_rate, quality="VHQ") if rate != sample_rate else mono_N
    )


def digest(files: Mapping[str, Path]) -> str:
    """Tells one set of clips from another: a hash of all ids and contents."""
    return digest_of(hashes(files))


def digest_of(found: Mapping[str, str]) -> str:
    """The same, of what `hashes` gave."""
    text = "".join(f"{name}\n{found[name]}\n" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file's content."""
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def embed(
    embedder: Embedder,
    files: dict[str, Path],
    listening: Listening = Listening(),
    *,
    cache: Path | None = None,
    what: str = "clips",
) -> Clips:
    """What an embedder makes of each clip.

    Args:
      embedder, files, listening: what, of what, and how.
      cache: folder that results are kept in, under the hash of all they depend on.
      what: names the clips for the progress bar.
    """
    path = None
    if cache is not None:
        key = [_FORMAT, digest(files), embedder.name, embedder.sha256, embedder.pieces]
        key += list(dataclasses.astuple(listening))
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        path = cache / f"{embedder.name}-{name[:32]}.npz"
        if path.exists():
            return Clips(files, _read_cache(path))
    bar = tqdm(files.items(), desc=f"{embedder.name}: {what}", unit="clip", leave=False, delay=2)
    embedded = {
        name: embedder.embed(read_mono(file, embedder.sample_rate, listening)) for name, file in bar
    }
    if path is not None:
        _write_cache(path, embedded)
    return Clips(files, embedded)


def _write_cache(path: Path, embedded: dict[str, Embedded]) -> None:
    rows = list(embedded.values())
    arrays = {
        "names": np.array(list(embedded)),
        "counts": np.array([len(row.embeddings_PE) for row in rows]),
        "embeddings": np.concatenate([row.embeddings_PE for row in rows]),
    }
    if rows[0].logits_PL is not None:
        arrays["logits"] = np.concatenate([row.logits_PL for row in rows])
    write_kept(path, **arrays)


def _read_cache(path: Path) -> dict[str, Embedded]:
    with reading_kept(path) as held:
        ends = np.cumsum(held["counts"])[:-1]
        embeddings = np.split(held["embeddings"], ends)
        logits = [None] * len(embeddings)
        if "logits" in held:
            logits = np.split(held["logits"], ends)
        names = held["names"].tolist()
    return {name: Embedded(*row) for name, row in zip(names, zip(embeddings, logits))}


def write_kept(path: Path, **arrays: np.ndarray) -> None:
    """Keeps what was heard of a set of clips."""
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@contextmanager
def reading_kept(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Reads what `write_kept` wrote; a damaged file is a `UserError`."""
    try:
        with np.load(path) as held:
            yield held
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); remove it") from None


# --- scores ---------------------------------------------------------------------------------------


def score(
    embedder: Embedder,
    clips: Clips,
    *,
    captions: Mapping[str, str],
    reference: Clips | None,
    pairs: Mapping[str, str],
    probes: Mapping[str, Probe] = {},
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """All that an embedder can say of generated clips.

    Args:
      embedder, clips, reference: generated and real clips, with the embedder's rows.
      captions: of clips by their ids; those without are left out of what needs one.
      pairs: id of a generated clip to id of its reference clip, for KL.
      probes: fitted to the embedder's rows of other clips, by the names of their scores.
      settings: of the intervals.

    Returns:
      'clips' and, as far as it applies, 'fad', 'kl', 'clap', 'tag_auc', 'tag_top5' and the probes'
      names, each a dict of value, low, high and the number of clips behind it.
    """
    found: dict[str, Any] = {"clips": len(clips.embedded)}
    drawn = {"resamples": settings.resamples, "seed": settings.seed}

    def put(name: str, count: int, result: metrics.Score) -> None:
        found[name] = {**result._asdict(), "clips": count}

    rows = [row.embeddings_PE for row in clips.embedded.values()]
    if reference is not None and _enough(clips) and _enough(reference):
        put("fad", len(rows), metrics.fad(rows, _gaussian(reference), **drawn))
    if reference is not None and _has_labels(clips):
        divergences = [
            metrics.label_divergence(_labels(reference, pairs[name]), _labels(clips, name))
            for name in clips.embedded
            if name in pairs
        ]
        if divergences:
            put("kl", len(divergences), metrics.mean(divergences, **drawn))
    named = [name for name in clips.embedded if name in captions]
    if named and embedder.embed_texts is not None:
        texts_NE = embedder.embed_texts([captions[name] for name in named])
        similar = [
            metrics.cosine(clips.embedded[name].embeddings_PE.mean(0), text_E)
            for name, text_E in zip(named, texts_NE)
        ]
        put("clap", len(similar), metrics.mean(similar, **drawn))
    if named and embedder.tags:
        tags_NL = np.stack([metrics.named_tags(captions[name], embedder.tags) for name in named])
        values_NL = np.stack([_probabilities(clips.embedded[name]) for name in named])
        if (tags_NL.any(0) & ~tags_NL.all(0)).any():
            put("tag_auc", len(named), metrics.tag_auc(values_NL, tags_NL, **drawn))
        hits = [
            metrics.tag_hits(values_L, tags_L, TOP_TAGS)
            for values_L, tags_L in zip(values_NL, tags_NL)
            if tags_L.any()
        ]
        if hits:
            put(f"tag_top{TOP_TAGS}", len(hits), metrics.mean(hits, **drawn))
    for key, probe in probes.items():
        labels = {name: named_label(probe.labels, captions[name]) for name in named}
        right = [
            hear(probe, clips.embedded[name].embeddings_PE) == label
            for name, label in labels.items()
            if label is not None
        ]
        if right:
            put(key, len(right), metrics.mean(right, **drawn))
    return found


def score_reference(
    embedder: Embedder,
    reference: Clips,
    *,
    captions: Mapping[str, str],
    probes: Mapping[str, Probe] = {},
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """The reference scored as if it were generated; see `score` for what is returned.

    'fad' is that of one random half to the other: of half as many clips, it is an upper bound of
    what the whole would give. 'kl' is that of each clip to another one of the set: what unrelated
    clips of the kind give.
    """
    names = list(reference.embedded)
    order = np.random.default_rng(settings.seed).permutation(len(names))
    halves = [
        Clips(reference.files, {names[i]: reference.embedded[names[i]] for i in half})
        for half in np.array_split(order, 2)
    ]
    found = score(
        embedder, reference, captions=captions, reference=None, pairs={}, probes=probes,
        settings=settings,
    )  # fmt: skip
    if all(map(_enough, halves)):
        between = score(
            embedder, halves[0], captions={}, reference=halves[1], pairs={}, settings=settings
        )
        found["fad"] = between["fad"]
    if len(names) > 1:
        others = {names[i]: names[j] for i, j in zip(order, np.roll(order, 1))}
        between = score(
            embedder, reference, captions={}, reference=reference, pairs=others, settings=settings
        )
        if "kl" in between:
            found["kl"] = between["kl"]
    return found


def _enough(clips: Clips) -> bool:
    """Whether there are rows enough for a covariance."""
    return sum(len(row.embeddings_PE) for row in clips.embedded.values()) > 1


def _has_labels(clips: Clips) -> bool:
    """Whether the embedder is a classifier."""
    return all(row.logits_PL is not None for row in clips.embedded.values())


def _gaussian(clips: Clips) -> metrics.Gaussian:
    return metrics.gaussian(np.concatenate([row.embeddings_PE for row in clips.embedded.values()]))


def _labels(clips: Clips, name: str) -> np.ndarray:
    return metrics.label_distribution(clips.embedded[name].logits_PL)


def _probabilities(row: Embedded) -> np.ndarray:
    return (1 / (1 + np.exp(-row.logits_PL.astype(np.float64)))).mean(0)
