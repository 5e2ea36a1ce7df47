"""Clips longer than the window: what each mode costs, its seams, and how far they drift.

Beside them stand windows that know nothing of each other, laid end to end.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from launch.benchmark import report
from launch.benchmark.options import Long, balanced
from launch.compile import hlo
from magnet_jax import programs
from magnet_jax.codec import decoding
from magnet_jax.config import LongConfig
from magnet_jax.decode import long, sampling
from magnet_jax.evaluation import metrics, tagger

if TYPE_CHECKING:
    from magnet_jax.api import MAGNeT

SIDE = 0.02  # seconds to both sides of a seam
APART = "apart"  # windows that know nothing of each other
WAYS = {
    "sliding": LongConfig(),
    "sliding, rate": LongConfig(anneal="rate", steps="auto"),
    "anchors": LongConfig(mode="anchors"),
    "anchors, lead 0": LongConfig(mode="anchors", lead=0),
    "joint": LongConfig(mode="joint"),
}


class Piece(NamedTuple):
    """A clip, and where it was put together."""

    codes_KT: np.ndarray
    seams: list[int]  # frames
    flops: float
    cpu_seconds: float  # of its tokens, compilation included


def borders(model: "MAGNeT", how: LongConfig, num_frames: int) -> list[int]:
    """The frames at which windows begin and end, but for the ends of the clip."""
    batch = sampling.make_batch(
        model.loaded, [""], num_frames=num_frames, decoding=model.generation, seed=0
    )
    shape = long.shape_of(model.loaded, batch, how)
    if how.mode == "joint":
        windows = long.joint_windows(model.loaded, batch, shape)
        found = {start + end for start in windows.starts_N for end in (0, windows.size)}
    else:
        rounds = long.plan(how, shape, 0, num_frames)
        windows = [window for round_ in rounds for window in round_.windows]
        found = {frame for window in windows for frame in (window.begin, window.end)}
    return sorted(int(frame) for frame in found if 0 < frame < num_frames)


def made(model: "MAGNeT", way: str, text: str, args: Long, number: int) -> Piece:
    """Clip `number` of a text."""
    num_frames = round(args.seconds * model.frame_rate)
    window = sampling.segment_frames(model.loaded.config, model.loaded.codec)
    before, started = _flops(), time.process_time()
    if way == APART:
        asked = {"num_frames": window, "decoding": model.generation, "seed": args.seed}
        parts = []
        for place in range(-(-num_frames // window)):
            # other numbers, other windows
            batch = sampling.make_batch(
                model.loaded, [text], first_sample=number + place * 2**16, **asked
            )
            parts.append(sampling.run(model.loaded, batch, model.execution).codes_BKT[0])
        codes_KT = np.concatenate(parts, axis=-1)[:, :num_frames]
        seams = list(range(window, num_frames, window))
    else:
        model.longer = WAYS[way]
        *_, last = model.parts([text], num_frames=num_frames, seed=args.seed, first_sample=number)
        codes_KT, seams = last.codes_BKT[0], borders(model, WAYS[way], num_frames)
    took = time.process_time() - started
    return Piece(codes_KT, seams, _flops() - before, took)


@functools.cache
def _flops_of(compiled: Any) -> float:
    return hlo.work(compiled.as_text()).flops


def _flops() -> float:
    """Operations of all programs that have run, by their compiled texts."""
    return sum(_flops_of(compiled) * calls for compiled, calls in programs.calls())


def unlike(wav_N: np.ndarray, rate: int, step: float) -> np.ndarray:
    """How unlike the 20 ms after each multiple of `step` seconds are those before it, in dB.

    The root mean square over frequencies of the difference of log spectra; [times], of which the
    first and the last that lie within the clip are left out.
    """
    size = round(SIDE * rate)
    times = np.arange(1, int(len(wav_N) / rate / step)) * step * rate
    window_S = np.hanning(size + 2)[1:-1]

    def spectrum(first: int) -> np.ndarray:
        power_F = np.square(np.abs(np.fft.rfft(window_S * wav_N[first : first + size])))
        return 10 * np.log10(power_F + 1e-6)

    firsts = [round(t) for t in times]
    return np.array([
        np.sqrt(np.square(spectrum(t) - spectrum(t - size)).mean()) for t in firsts
    ])  # fmt: skip


def seams(wav_N: np.ndarray, piece: Piece, rate: int, frame_rate: float) -> dict[str, float]:
    """How unlike the sides of seams are, against those of all other frames of the clip."""
    unlike_T = unlike(wav_N, rate, 1 / frame_rate)
    here = np.array([frame - 1 for frame in piece.seams if frame <= len(unlike_T)])
    others = np.delete(unlike_T, here)
    limit = np.median(others) + 2 * others.std()
    return {
        "seams": len(here),
        "beyond": float((unlike_T[here] > limit).mean()),
        "others_beyond": float((others > limit).mean()),
        "sigmas": float(((unlike_T[here] - np.median(others)) / others.std()).mean()),
    }


def chroma(wav_N: np.ndarray, rate: int) -> np.ndarray:
    """Power by pitch class [12], of sum 1."""
    size = 4096
    cut = len(wav_N) // size * size
    power_TF = np.square(np.abs(np.fft.rfft(wav_N[:cut].reshape(-1, size) * np.hanning(size))))
    frequency_F = np.fft.rfftfreq(size, 1 / rate)
    heard_F = (frequency_F > 60) & (frequency_F < 4000)
    pitch_F = np.round(12 * np.log2(frequency_F[heard_F] / 440)).astype(int) % 12
    power_12 = np.bincount(pitch_F, power_TF.sum(0)[heard_F], minlength=12)
    return power_12 / max(power_12.sum(), 1e-12)


def drift(wav_N: np.ndarray, rate: int, window: int, heard: tagger.Tagger) -> dict[str, float]:
    """How far the last window of a clip is from the first one."""
    ends = wav_N[:window], wav_N[-window:]
    tones = [chroma(end_N, rate) for end_N in ends]
    levels = [10 * np.log10(np.square(end_N).mean() + 1e-10) for end_N in ends]
    rows = [soxr.resample(end_N, rate, tagger.SAMPLE_RATE) for end_N in ends]
    rows = [tagger.tag(heard, row_N).embeddings_PE.mean(0) for row_N in rows]
    return {
        "key": 1 - metrics.cosine(*tones),
        "level": abs(float(levels[1] - levels[0])),
        "tagger": 1 - metrics.cosine(*rows),
    }


COLUMNS = {
    "flops": ("GFLOP", 1e-9, 0),
    "cpu_seconds": ("CPU s, the first with compilation", 1, 0),
    "sigmas": ("seams, sigmas", 1, 2),
    "beyond": ("seams beyond, %", 100, 0),
    "others_beyond": ("other frames, %", 100, 1),
    "key": ("key", 1, 3),
    "level": ("level, dB", 1, 1),
    "tagger": ("tagger", 1, 3),
    "kinds": ("unlike tokens, first", 1, 2),
    "kinds_last": ("last", 1, 2),
}


def table(found: dict[str, list[dict[str, float]]], seed: int) -> str:
    """Means over clips with their intervals of 95 %, a row for each way."""
    lines = [
        "| | " + " | ".join(name for name, *_ in COLUMNS.values()) + " |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for way, rows in found.items():
        cells = []
        for column, (_, factor, digits) in COLUMNS.items():
            values = [factor * row[column] for row in rows]
            score = metrics.mean(values, resamples=1000, seed=seed)
            if column in ("flops", "cpu_seconds"):  # the first call compiles
                shown = f"{min(values):.{digits}f}"
            else:
                shown = (
                    f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f})"
                )
            cells.append(shown)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds(codes_KT: np.ndarray) -> float:
    """How many unlike tokens codebook 1 has for each frame."""
    return len(set(codes_KT[0].tolist())) / codes_KT.shape[-1]


def measure(args: Long) -> None:
    """Measures a clip after another, each made in all ways, and prints the table as it grows."""
    from magnet_jax import api  # its parts are slow to load

    model = api.MAGNeT.get_pretrained(args.checkpoint)
    args = dataclasses.replace(args, steps=balanced(args.steps, model.generation))
    model.generation = dataclasses.replace(model.generation, steps=args.steps)
    window = sampling.segment_frames(model.loaded.config, model.loaded.codec)
    samples, heard = round(window * model.sample_rate / model.frame_rate), tagger.load()
    ways: Sequence[str] = [*args.ways, APART]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in tqdm(range(args.clips), "clips", leave=False):
        text = args.prompt[number % len(args.prompt)]
        for way in tqdm(ways, "ways", leave=False):
            piece = made(model, way, text, args, number)
            wav_CN = decoding.decode_audio(model.decoder, piece.codes_KT[None])[0]
            wav_N = wav_CN.mean(0)
            found[way].append(
                {"flops": piece.flops, "cpu_seconds": piece.cpu_seconds}
                | seams(wav_N, piece, model.sample_rate, model.frame_rate)
                | drift(wav_N, model.sample_rate, samples, heard)
                | {"kinds": kinds(piece.codes_KT[:, :window])}
                | {"kinds_last": kinds(piece.codes_KT[:, -window:])}
            )
        print(f"\n{number + 1} clips of {args.seconds:g} s, steps {args.steps}", flush=True)
        print(table(found, args.seed), flush=True)
        report.write_json(args.json, {"clips": number + 1, "seconds": args.seconds, "ways": found})
