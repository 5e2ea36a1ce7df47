"""The tokenization job against the bare codec, and against itself with several workers."""

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from launch.benchmark import report
from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import EMBEDDED
from magnet_jax.errors import UserError
from magnet_jax.evaluation.scores import Listening, read_mono
from magnet_jax.io import machine
from magnet_jax.io.files import replacing_file
from tokenization import encode
from tokenization.maker import Maker
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.units import plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds of audio a second: the codec alone on full batches, and the whole job on files."""

    codec: str = EMBEDDED
    """As in tokenization.job."""
    tracks: int = 8
    """Files to make and tokenize: FLAC, 44.1 kHz, stereo, noise that swells."""
    track_minutes: float = 3.0
    batch_size: int = Job.batch_size
    window_seconds: float = Job.window_seconds
    workers: int = 1
    """More than 1 also times the job with so many, start-up included, against one."""
    cores_per_worker: int | None = None
    """CPU cores that each of these workers may use (Linux); None leaves all to all."""
    whole: Path | None = None
    """Folder of audio: also compares its files, end to end, encoded in windows and at once."""
    whole_minutes: float = 10.0
    """Of that audio, from its start again where it is shorter."""
    json: Path | None = None
    """File for the figures."""


def measure(args: Args) -> None:
    if args.tracks < 1 or not 0.1 <= args.track_minutes <= 600 or args.workers < 1:
        raise UserError("--tracks and --workers must be positive, --track-minutes 0.1 to 600")
    if args.batch_size < 1 or not 0.1 <= args.window_seconds <= 600:
        raise UserError("--batch-size must be positive, --window-seconds 0.1 to 600")
    if not 0.1 <= args.whole_minutes <= 600:
        raise UserError("--whole-minutes must lie between 0.1 and 600")
    if args.whole is None and args.whole_minutes != Args.whole_minutes:
        raise UserError("--whole-minutes goes with --whole FOLDER")
    if args.cores_per_worker is not None and args.workers == 1:
        raise UserError("--cores-per-worker goes with --workers of 2 or more")
    report.check_parent("--json", args.json)
    if args.cores_per_worker is not None:
        if not hasattr(os, "sched_setaffinity"):
            raise UserError("--cores-per-worker: for Linux alone; leave it out")
        here = len(os.sched_getaffinity(0))
        if not 1 <= args.cores_per_worker <= here // args.workers:
            raise UserError(
                f"--cores-per-worker {args.cores_per_worker}: {args.workers} workers share "
                f"{here} cores here"
            )
    with tempfile.TemporaryDirectory() as folder:
        audio = Path(folder) / "audio"
        audio.mkdir()
        for i in range(args.tracks):
            _write_track(audio / f"{i:03d}", args.track_minutes * 60, i)
        settings = Job(
            audio=audio,
            out=Path(folder) / "one",
            codec=args.codec,
            batch_size=args.batch_size,
            window_seconds=args.window_seconds,
            tracks_per_shard=max(args.tracks // (2 * args.workers), 1),
            validation_percent=0,
        )
        seconds = args.tracks * args.track_minutes * 60
        bare = [bare_rate(args)]
        units = plan(settings, scan(settings))
        (settings.out / "units").mkdir(parents=True)
        with Maker(settings, settings.device) as make:
            started = time.perf_counter()
            for unit in units:
                make(unit, lambda files, seconds: None)
            job = seconds / (time.perf_counter() - started)
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
    print(f"codec alone  {max(bare):8.1f} s of audio a second, {args.batch_size} rows of "
          f"{args.window_seconds:g} s")  # fmt: skip
    print(f"job          {job:8.1f} s of audio a second, files read and written")
    print(f"share        {found['share']:8.1%}")
    print(f"memory       {found['peak_bytes'] / 2**30:8.2f} GiB at most, a decoder "
          f"{found['decoder_peak_bytes'] / 2**30:.2f}")  # fmt: skip
    if args.workers > 1:
        print(f"{args.workers} workers    {found['workers_speedup']:8.2f} times as fast as one")
    if args.whole is not None:
        shares = ", ".join(f"{share:.2%}" for share in found["equal_tokens"])
        print(f"windows      {shares} of the tokens, by codebook, are those of the whole track")
    if args.json is not None:
        with replacing_file(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


def bare_rate(args: Args) -> float:
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


def equal_tokens(args: Args, folder: Path) -> list[float]:
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
