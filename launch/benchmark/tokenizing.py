"""The tokenization job against the bare codec, and against itself with several workers."""

import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile

from launch.benchmark import report
from launch.benchmark.options import Tokenize
from magnet_jax.arguments import Between, check_fields
from magnet_jax.codec.encodec import load_codec
from magnet_jax.errors import UserError
from magnet_jax.evaluation.scores import Listening, read_mono
from magnet_jax.io import machine
from tokenization import encode
from tokenization.maker import Maker
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.units import plan

Minutes = Annotated[float, Between(0.1, 600)]


def measure(args: Tokenize) -> None:
    """Measures, prints, and writes what `args` asks for."""
    check(args)
    with tempfile.TemporaryDirectory() as folder:
        settings = make_job(args, Path(folder))
        bare = [bare_rate(args)]
        job = job_rate(args, settings)
        bare.append(bare_rate(args))  # before and after: the machine may have others on it
        found = {
            "codec_seconds_a_second": max(bare),
            "job_seconds_a_second": job,
            "share": job / max(bare),
            "peak_bytes": machine.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)),
            "decoder_peak_bytes": machine.peak_bytes(resource.getrusage(resource.RUSAGE_CHILDREN)),
        }
        if args.workers > 1:
            one, several = (
                _time_command(settings, Path(folder) / name, workers, args.cores_per_worker)
                for name, workers in (("alone", 1), ("together", args.workers))
            )
            found["workers_speedup"] = one / several
        if args.whole is not None:
            found["equal_tokens"] = equal_tokens(args, args.whole)
    print(lines(args, found))
    report.write_json(args.json, found)


def lines(args: Tokenize, found: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    memory, decoder = (found[name] / 2**30 for name in ("peak_bytes", "decoder_peak_bytes"))
    shown = [
        f"codec alone  {found['codec_seconds_a_second']:8.1f} s of audio a second, "
        f"{args.batch_size} rows of {args.window_seconds:g} s",
        f"job          {found['job_seconds_a_second']:8.1f} s of audio a second, files read and "
        "written",
        f"share        {found['share']:8.1%}",
        f"memory       {memory:8.2f} GiB at most, a decoder {decoder:.2f}",
    ]
    if "workers_speedup" in found:
        speedup = found["workers_speedup"]
        shown.append(f"{args.workers} workers    {speedup:8.2f} times as fast as one")
    if "equal_tokens" in found:
        shares = ", ".join(f"{share:.2%}" for share in found["equal_tokens"])
        shown.append(
            f"windows      {shares} of the tokens, by codebook, are those of the whole track"
        )
    return "\n".join(shown)


def check(args: Tokenize) -> None:
    """Raises `UserError` for what does not fit, before anything is made."""
    check_fields(args, "--")
    if args.whole is None and args.whole_minutes != Tokenize.whole_minutes:
        raise UserError("--whole-minutes goes with --whole FOLDER")
    report.check_parent("--json", args.json)
    if args.cores_per_worker is None:
        return
    if args.workers == 1:
        raise UserError("--cores-per-worker goes with --workers of 2 or more")
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--cores-per-worker: for Linux alone; leave it out")
    here = len(os.sched_getaffinity(0))
    if args.cores_per_worker > here // args.workers:
        raise UserError(
            f"--cores-per-worker {args.cores_per_worker}: {args.workers} workers share "
            f"{here} cores here"
        )


def make_job(args: Tokenize, folder: Path) -> Job:
    """The job to measure, and its audio."""
    audio = folder / "audio"
    audio.mkdir()
    for i in range(args.tracks):
        _write_track(audio / f"{i:03d}", args.track_minutes * 60, i)
    return Job(
        audio=audio,
        out=folder / "one",
        codec=args.codec,
        batch_size=args.batch_size,
        window_seconds=args.window_seconds,
        tracks_per_shard=max(args.tracks // (2 * args.workers), 1),
        validation_percent=0,
    )


def job_rate(args: Tokenize, settings: Job) -> float:
    """Seconds of audio a second of the whole job, in this process."""
    units = plan(settings, scan(settings))
    (settings.out / "units").mkdir(parents=True)
    with Maker(settings, settings.device) as make:
        started = time.perf_counter()
        for unit in units:
            make(unit, lambda files, seconds: None)
        took = time.perf_counter() - started
    return args.tracks * args.track_minutes * 60 / took


def bare_rate(args: Tokenize) -> float:
    """Seconds of audio a second of the codec's own `encode`."""
    codec = load_codec(args.codec)
    shape = (
        args.batch_size,
        codec.spec.channels,
        int(args.window_seconds * codec.spec.sample_rate),
    )
    wav_BCN = np.random.default_rng(0).standard_normal(shape).astype(np.float32) / 8
    codec.encode(wav_BCN)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        codec.encode(wav_BCN)
        times.append(time.perf_counter() - started)
    return args.batch_size * args.window_seconds / min(times)


def equal_tokens(args: Tokenize, folder: Path) -> list[float]:
    """Share of the tokens of one long track that windows give as the whole does, a codebook."""
    codec = load_codec(args.codec)
    rate, samples = codec.spec.sample_rate, int(args.whole_minutes * 60 * codec.spec.sample_rate)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac", ".mp3"))
    parts = []
    for path in files:
        wav_N = read_mono(path, rate, Listening())
        parts.append(np.broadcast_to(wav_N, (codec.spec.channels, len(wav_N))))
    if not parts or not sum(part.shape[1] for part in parts):
        raise UserError(f"{folder}: no audio in it (--whole wants .wav, .flac or .mp3)")
    wav_CN = np.concatenate(parts, axis=1)
    wav_CN = np.tile(wav_CN, -(-samples // wav_CN.shape[1]))[:, : samples - samples % codec.hop]
    frames = round(args.window_seconds * codec.spec.frame_rate)
    one, *_ = encode.encode(
        codec, [encode.Source(0, [wav_CN])], window_frames=frames, batch_size=1, rejected=UserError
    )
    whole_KT = codec.encode(wav_CN[None])[0]
    return (one.codes_KT == whole_KT).mean(1).tolist()


def _write_track(path: Path, seconds: float, seed: int) -> None:
    rate, rng = 44_100, np.random.default_rng(seed)
    with soundfile.SoundFile(path.with_suffix(".flac"), "w", rate, 2, "PCM_16") as file:
        for second in range(int(seconds)):
            swell = 0.1 + 0.1 * np.sin(second)
            file.write(rng.standard_normal((rate, 2)).clip(-3, 3) * swell)
    path.with_suffix(".json").write_text('{"description": "noise that swells"}')


def _time_command(settings: Job, out: Path, workers: int, cores_per_worker: int | None) -> float:
    confine = None
    if cores_per_worker is not None:
        cores = sorted(os.sched_getaffinity(0))[: workers * cores_per_worker]
        confine = functools.partial(os.sched_setaffinity, 0, cores)
    started = time.perf_counter()
    words = ["--audio", settings.audio, "--out", out, "--codec", settings.codec]
    words += ["--batch-size", settings.batch_size, "--window-seconds", settings.window_seconds]
    words += ["--tracks-per-shard", settings.tracks_per_shard, "--workers", workers]
    subprocess.run(
        [sys.executable, "-m", "tokenization.job", *map(str, words)], check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=confine,
    )  # fmt: skip
    return time.perf_counter() - started
