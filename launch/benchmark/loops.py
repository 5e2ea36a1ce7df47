"""How well loops close, beside clips of the same texts and length that are played twice."""

import dataclasses
import json
import time
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from launch.benchmark.options import Loops, balanced
from launch.compile import hlo
from magnet_jax.config import EditConfig
from magnet_jax.decode import canvas, likelihood, placement, rescore, sampler, sampling
from magnet_jax.decode.tokens_of_text import tokenize_texts
from magnet_jax.edit.bars import Bars
from magnet_jax.evaluation import metrics
from magnet_jax.io.files import replacing_file

if TYPE_CHECKING:
    from magnet_jax.api import MAGNeT

INSTRUMENTS = ("piano", "harpsichord", "organ", "guitar", "violin", "cello", "strings", "harp",
               "flute", "synth")  # fmt: skip
SPEEDS = ("slow and calm", "moderate", "fast and lively")
BATCH = 10
BESIDE = 0.02  # seconds on either side of a place whose spectra are compared
SEAM_FRAMES = 6  # in the middle of which the seam is, two spans


def prompts(count: int) -> list[str]:
    """Texts in the manner of the demo model's."""
    texts = [f"A {speed} melody played on the {name}" for name in INSTRUMENTS for speed in SPEEDS]
    return [texts[i % len(texts)] for i in range(count)]


# --- sound ---------------------------------------------------------------------------------------


def distances(wav_N: np.ndarray, sample_rate: int) -> tuple[float, np.ndarray]:
    """Log-spectral distance in dB between 20 ms before and after the seam of a clip played twice.

    And that of every other place of the clip, 10 ms apart.
    """
    beside, count = round(BESIDE * sample_rate), len(wav_N)
    twice_N, window = np.tile(wav_N, 2), np.hanning(beside)

    def spectrum(first: int) -> np.ndarray:
        power = np.abs(np.fft.rfft(twice_N[first : first + beside] * window))
        return 20 * np.log10(power + 1e-4)

    def distance(place: int) -> float:
        return float(np.sqrt(np.square(spectrum(place - beside) - spectrum(place)).mean()))

    places = range(beside, count - beside + 1, beside // 2)
    return distance(count), np.array([distance(place) for place in places])


def step(wav_N: np.ndarray) -> float:
    """Second difference over the seam, over the largest but 0.1 % of the clip's own."""
    bends_N = np.abs(np.diff(np.r_[wav_N, wav_N[:2]], 2))
    return float(bends_N[-2:].max() / max(np.quantile(bends_N[:-2], 0.999), 1e-9))


def heard(wav_BCN: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
    """Of each clip how its seam sounds beside the rest of it."""
    found: dict[str, list[float]] = {"deviations": [], "within": [], "step": []}
    for wav_CN in wav_BCN:
        seam, own = distances(wav_CN.mean(0), sample_rate)
        away = (seam - np.median(own)) / own.std()
        found["deviations"].append(away)
        found["within"].append(float(away <= 2))
        found["step"].append(step(wav_CN.mean(0)))
    return {name: np.array(values) for name, values in found.items()}


# --- tokens --------------------------------------------------------------------------------------


def nats(model: "MAGNeT", texts: list[str], codes_BKT: np.ndarray) -> dict[str, np.ndarray]:
    """Nats a token [B] of codebook 1 at the seam of clips played twice, and in their middle.

    The model itself reads them, a span hidden at a time.
    """
    config, num_frames = model.loaded.config.model, codes_BKT.shape[-1]
    span, half = config.span_length, num_frames // 2
    reader = rescore.from_model(model.loaded, model.loaded)
    turned_BKT = np.roll(codes_BKT, half, axis=-1)  # the seam is at `half`
    group_G1T = likelihood.interleaved(num_frames, span, 4)
    frame_T = np.arange(num_frames)
    found = {}
    for name, line_BKT, place in (("seam", turned_BKT, half), ("middle", codes_BKT, half)):
        near_T = np.abs(frame_T - place + 0.5) < SEAM_FRAMES / 2
        hidden_G1T = group_G1T & near_T
        log_BKT = likelihood.log_probabilities(
            reader, texts, line_BKT, hidden_G1T, mask_id=config.mask_id
        )
        found[name] = -log_BKT[:, 0].sum(-1) / near_T.sum()
    return found


# --- cost ----------------------------------------------------------------------------------------


def cost(model: "MAGNeT", text: str, num_frames: int, seed: int) -> dict[str, Any]:
    """FLOPs and CPU seconds from a text to the tokens of a loop, and of plain clips."""
    window = sampling.segment_frames(model.loaded.config, model.loaded.codec)
    found, calls = {}, {}
    cases = {"loop": (num_frames, EditConfig(ring=True)), "clip": (num_frames, None)}
    for name, (frames, editing) in (cases | {"whole": (window, None)}).items():
        config = model.loaded.config.model
        batch = sampling.Batch(
            text=tokenize_texts(model.loaded, [text], None),
            sample_B=np.arange(1),
            seed=seed,
            canvas=canvas.blank(1, config.num_codebooks, frames),
            decoding=model.generation,
            editing=editing,
        )
        inputs, made_for = sampling.make_program(
            model.loaded, batch, placement.Execution(), platform=jax.default_backend(), mesh=None
        )
        compiled = sampler.sample.lower(inputs, sampler=made_for).compile()
        found[name] = {"flops": hlo.work(compiled.as_text()).flops, "seconds": np.inf}
        calls[name] = lambda run=compiled, given=inputs: jax.block_until_ready(run(given))
    for _ in range(3):  # turn by turn, as others may use the machine
        for name, call in calls.items():
            found[name]["seconds"] = min(found[name]["seconds"], _cpu_seconds(call))
    return found


def _cpu_seconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


# --- all -----------------------------------------------------------------------------------------


def made(model: "MAGNeT", args: Loops, length: Bars) -> dict[str, dict[str, np.ndarray]]:
    """What was measured of each clip, of loops and of plain clips."""
    rate, num_frames = model.sample_rate, length.frames(model.frame_rate)
    parts: dict[str, list[dict[str, np.ndarray]]] = {"loops": [], "clips": []}
    texts = prompts(args.clips)
    for first in tqdm(range(0, args.clips, BATCH), "clips", leave=False):
        some = texts[first : first + BATCH]
        how = {"seed": args.seed, "first_sample": first}
        loops = model.loops(some, length, **how)
        plain = model.clips(some, num_frames=num_frames, **how)
        plain_BCN = plain.wav_BCN[..., : length.samples(rate)]
        for name, codes_BKT, wav_BCN in (
            ("loops", loops.tokens_BKT, loops.wav_BCN), ("clips", plain.codes_BKT, plain_BCN),
        ):  # fmt: skip
            parts[name].append(heard(wav_BCN, rate) | nats(model, some, codes_BKT))
    return {
        name: {key: np.concatenate([one[key] for one in some]) for key in some[0]}
        for name, some in parts.items()
    }


def measure(args: Loops) -> None:
    """Prints the figures."""
    from magnet_jax import api  # its parts are slow to load
    from magnet_jax.edit import bars

    model = api.MAGNeT.get_pretrained(args.checkpoint)
    args = dataclasses.replace(args, steps=balanced(args.steps, model.generation))
    model.generation = dataclasses.replace(model.generation, steps=args.steps)
    length = bars.of(args.bpm, args.bars, None, most=model.max_duration)
    print(f"{args.checkpoint}; {args.clips} of {length.words}; steps {args.steps}", flush=True)
    found = made(model, args, length)

    def score(values_C: np.ndarray) -> metrics.Score:
        return metrics.mean(values_C, resamples=1000, seed=args.seed)

    report: dict[str, Any] = {"arguments": dataclasses.asdict(args), "seconds": length.seconds}
    print("| | loops | clips played twice | difference |")
    print("| --- | --- | --- | --- |")
    for name, words in WORDS.items():
        rows = [found[kind][name] for kind in ("loops", "clips")]
        scores = [score(row) for row in (*rows, rows[0] - rows[1])]
        report[name] = dict(zip(("loops", "clips", "difference"), scores, strict=True))
        print(f"| {words} | {' | '.join(map(shown, scores))} |", flush=True)
    report["cost"] = cost(model, prompts(1)[0], length.frames(model.frame_rate), args.seed)
    for name, row in report["cost"].items():
        print(f"{name:8} {row['flops'] / 1e9:8.1f} GFLOP {row['seconds']:7.2f} CPU seconds")
    if args.json is not None:
        with replacing_file(args.json) as file:
            file.write_text(json.dumps(report, indent=2, default=_plain) + "\n", encoding="utf-8")


WORDS = {
    "deviations": "log-spectral distance at the seam, deviations above the clip's median",
    "within": "clips within two deviations",
    "step": "second difference at the seam, over the clip's 99.9th percentile",
    "seam": "nats a token of codebook 1, seam",
    "middle": "the same, middle of the clip",
}


def shown(score: metrics.Score) -> str:
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Fraction) else str(value)
