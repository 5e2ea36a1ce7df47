"""Puts a stream of tokens that tell notes apart before a codec's own; see docs/recipe.md.

python -m launch.codec.tonal --audio data/recipe/train --codec magnet_jax/assets/demo/codec \
    --size 512 --out runs/tonal
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from tqdm import tqdm

from launch.codec.training import Clips
from magnet_jax import cli, errors
from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.codec import tonal
from magnet_jax.codec.encodec import read_base, write_tonal
from magnet_jax.codec.tonal import Spectrum, Tonal
from magnet_jax.errors import UserError
from magnet_jax.io.files import check_new_folder, replacing

_RUN_SECONDS = 4.0  # of frames that are drawn together: to open and to seek takes most of the time
_BELOW_NYQUIST = 15 / 16  # where the highest band may lie
_MOST_ROUNDS = 50
_SETTLED = 5e-4  # of the distances, by which a round must lower them


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Fits the tonal stream of a codec: centroids of log spectra, by k-means."""

    audio: Path
    """Folder of .flac and .wav files at the codec's rate, mono, as launch.codec.train takes."""
    codec: str = "embedded"
    """As in tokenization.job; its own codebooks follow the stream, in place of an older stream."""
    out: Path
    """New folder for the codec of one codebook more, which all that take --codec take."""
    size: Annotated[int, Between(2, 2**15)] = 512
    """Entries of the stream, the first of which is silence."""
    hours: Annotated[float, Between(0, 1000, above=True)] = 1.0
    """Of audio that is looked at, drawn from all there is in runs of 4 s."""
    seed: Seed = 0
    """Of what is drawn."""
    spectrum: Spectrum = field(default_factory=Spectrum)


class Frames(NamedTuple):
    """Drawn frames: what is heard in each, and whether the one before it is drawn too."""

    levels_NM: np.ndarray  # float32
    follows_N: np.ndarray


def draw_frames(settings: Fitting, clips: Clips, sample_rate: int, hop: int) -> Frames:
    """Runs of frames, all of the audio equally likely, each as it is heard in the whole clip."""
    run = math.ceil(_RUN_SECONDS * sample_rate / hop)
    runs = [
        (i, first, min(run, count - first))
        for i, count in enumerate(-(-samples // hop) for samples in clips.frames)
        for first in range(0, count, run)
    ]
    wanted = math.ceil(settings.hours * 3600 * sample_rate / hop / run)
    order = np.random.default_rng([settings.seed, 0]).permutation(len(runs))[:wanted]
    before, after = tonal.reach(settings.spectrum, sample_rate, hop)
    levels, follows = [], []
    for i, first, count in tqdm([runs[j] for j in sorted(order)], desc="listening", mininterval=10):
        begin, end = max(0, first - before), first + count + after
        wav = clips.read(i, begin * hop, min(end * hop, clips.frames[i]) - begin * hop)
        if not np.isfinite(wav).all():
            raise UserError(f"--audio {clips.paths[i]}: holds NaN or infinity")
        heard_TM = tonal.levels(wav[None].astype(np.float64), settings.spectrum, sample_rate, hop)
        levels.append(heard_TM[0, first - begin :][:count].astype(np.float32))
        follows.append(np.arange(count) > 0)
    return Frames(np.concatenate(levels), np.concatenate(follows))


def fit(levels_NM: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Centroids [C, M] (float32) of frames by Lloyd's rounds; the first is silence, and stays.

    They begin as frames drawn far from one another (k-means++). One that no frame is nearest to
    moves to the frame that is furthest from its own.
    """
    rng = np.random.default_rng([seed, 1])
    centroids_CM = _begin(levels_NM, size, rng)
    before = math.inf
    for _ in tqdm(range(_MOST_ROUNDS), desc="fitting", mininterval=10):
        labels_N = tonal.nearest(levels_NM, centroids_CM)
        distances_N = np.square(levels_NM - centroids_CM[labels_N]).sum(1)
        total = float(distances_N.sum(dtype=np.float64))
        if total > (1 - _SETTLED) * before:
            break
        before = total
        counts_C = np.bincount(labels_N, minlength=size)
        order_N = np.argsort(labels_N, kind="stable")
        starts_C = np.cumsum(counts_C) - counts_C
        used_C = counts_C > 0
        sums = np.add.reduceat(levels_NM[order_N].astype(np.float64), starts_C[used_C])
        centroids_CM[used_C] = sums / counts_C[used_C, None]
        centroids_CM[0], used_C[0] = 0, True
        dead = np.flatnonzero(~used_C)
        furthest = np.argsort(-distances_N, kind="stable")[: len(dead)]
        centroids_CM[dead[: len(furthest)]] = levels_NM[furthest]
    return centroids_CM


def _begin(levels_NM: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Silence, and frames drawn by their squared distance to the nearest that is drawn."""
    centroids_CM = np.zeros((size, levels_NM.shape[1]), np.float32)
    squares_N = np.square(levels_NM).sum(1)
    distances_N = squares_N.copy()
    for c in range(1, size):
        sums_N = np.cumsum(distances_N, dtype=np.float64)
        drawn = int(np.searchsorted(sums_N, rng.random() * sums_N[-1], side="right"))
        centroids_CM[c] = levels_NM[min(drawn, len(levels_NM) - 1)]
        new_N = squares_N - 2 * (levels_NM @ centroids_CM[c]) + np.square(centroids_CM[c]).sum()
        np.minimum(distances_N, np.maximum(new_N, 0), out=distances_N)
    return centroids_CM


def report(labels_N: np.ndarray, follows_N: np.ndarray, size: int) -> dict[str, float]:
    """What the stream is like on the frames that it was fitted to."""
    counts_C = np.bincount(labels_N, minlength=size)
    shares = counts_C[counts_C > 0] / len(labels_N)
    same = labels_N[1:][follows_N[1:]] == labels_N[:-1][follows_N[1:]]
    return {
        "frames": len(labels_N),
        "entropy_bits": float(-(shares * np.log2(shares)).sum()),
        "entries_used": float((counts_C > 0).mean()),
        "same_as_before": float(same.mean()) if len(same) else math.nan,
    }


def fit_codec(settings: Fitting) -> dict[str, float]:
    """Fits the stream and writes the codec; `report`'s numbers. `UserError` for what cannot be."""
    check_fields(settings, "--")
    check_new_folder("--out", settings.out)
    base = read_base(settings.codec)
    rate, hop, most = base.config.sampling_rate, base.config.hop, base.config.codebook_size
    if settings.size > most:
        raise UserError(
            f"--size {settings.size}: codec {settings.codec} has codebooks of {most} entries"
        )
    highest = min(settings.spectrum.highest_hz, _BELOW_NYQUIST * rate / 2)
    spectrum = dataclasses.replace(settings.spectrum, highest_hz=highest)
    tonal.check_rate(spectrum, rate, "--spectrum")
    settings = dataclasses.replace(settings, spectrum=spectrum)
    frames = draw_frames(settings, Clips("--audio", settings.audio, rate, hop / rate), rate, hop)
    if settings.size > len(frames.follows_N):
        raise UserError(
            f"--size {settings.size}: more than the {len(frames.follows_N)} frames of --audio "
            f"{settings.audio} that --hours {settings.hours:g} takes"
        )
    centroids_CM = fit(frames.levels_NM, settings.size, settings.seed)
    with replacing(settings.out) as partial:
        write_tonal(base, Tonal(spectrum, centroids_CM), partial)
    labels_N = tonal.nearest(frames.levels_NM, centroids_CM)
    return report(labels_N, frames.follows_N, settings.size)


def table(settings: Fitting, found: dict[str, float]) -> str:
    """The numbers in Markdown."""
    most = math.log2(settings.size)
    rows = [
        ("frames looked at", f"{found['frames']}"),
        ("entropy of the stream", f"{found['entropy_bits']:.2f} of {most:.2f} bits"),
        ("entries used", f"{100 * found['entries_used']:.1f} % of {settings.size}"),
        ("same as the frame before", f"{100 * found['same_as_before']:.1f} %"),
    ]
    lines = ["| the tonal stream | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def main(words: Sequence[str] | None = None) -> None:
    settings = cli.parse(Fitting, words, prog="python -m launch.codec.tonal")
    print(table(settings, fit_codec(settings)))
    print(f"{settings.out}: for --codec")


if __name__ == "__main__":
    with errors.reported():
        main()
