"""The settings of a tokenization job, and which of them a folder is begun with."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.codec.encodec import interleaved_spec
from magnet_jax.config import EMBEDDED, CodecSpec
from magnet_jax.errors import UserError
from magnet_jax.io import bucket
from tokenization.intake.audio import Intake
from tokenization.source.settings import Source

Decibels = Annotated[float, Between(-60, 60)]


@dataclass(frozen=True, kw_only=True)
class IntakeLimits:
    """What is asked of a track."""

    min_seconds: Annotated[float, Between(0.1, 120)] = 1.0
    """Reject shorter tracks."""
    max_track_seconds: Annotated[float, Between(1, 10**6)] = 6 * 3600.0
    """Reject longer tracks, which are more likely damaged, or whole albums."""
    max_clipped: Annotated[float, Between(0, 1)] = 1.0
    """Reject tracks of which a larger share is clipped, that is in runs at full scale."""
    decode_timeout: Annotated[float, Between(1, 10**5)] = 60.0
    """Reject a file that its decoder makes no progress with for so many seconds."""

    def intake(self, sample_rate: int | None, channels: int) -> Intake:
        return Intake(
            sample_rate=sample_rate,
            channels=channels,
            min_seconds=self.min_seconds,
            max_track_seconds=self.max_track_seconds,
            max_clipped=self.max_clipped,
        )


@dataclass(frozen=True, kw_only=True)
class Job(IntakeLimits, Source):
    """Turns audio with captions into a data set of EnCodec tokens.

    Run the same command again to go on after an interruption.
    """

    out: str | Path
    """Folder of the data set, or gs://BUCKET/FOLDER."""
    codec: str = EMBEDDED
    """'embedded', folder or hub id of a transformers EncodecModel (facebook/encodec_32khz),
    encodec_24khz, encodec_48khz, or the path of one of those two's weights."""
    num_codebooks: int | None = None
    """Codebooks to keep, with --stereo of each side; by default those of the codec's largest
    bandwidth up to 6 kbit/s."""
    stereo: Literal["none", "interleave"] = "none"
    """interleave: a mono codec encodes left and right by themselves, and their codebooks alternate;
    mono files count as both sides. none: the codec's own channels."""
    max_reject_ratio: Annotated[float, Between(0, 1)] = 0.1
    """End with an error if a larger share of the audio files is rejected."""
    validation_percent: Annotated[float, Between(0, 99)] = 5.0
    """Share of the tracks, chosen by a hash of their files' names, that is kept for validation."""
    split_by_folder: bool = False
    """In place of that share: tracks below the source's folder train are to train on, those below
    valid for validation, and all others are left out."""
    max_record_seconds: Annotated[float, Between(1, 120)] = 120.0
    """Cut longer tracks into records of equal length; at most 120."""
    mix_ratio: Annotated[float, Between(0, 100)] = 0.0
    """Add so many mixes of two tracks, as a share of the tracks to train on, see docs/data.md."""
    mix_seed: Seed = 0
    """Of what is mixed, and how."""
    mix_snr: tuple[Decibels, Decibels] = (-5.0, 5.0)
    """Lowest and highest level of one track over the other, in dB."""
    tracks_per_shard: Annotated[int, Between(1, 10**6)] = 128
    """Tracks in a record file: the work lost by a kill, at most."""
    batch_size: Annotated[int, Between(1, 1024)] = 4
    """Tracks encoded at once; for each there are two processes that decode and resample."""
    window_seconds: Annotated[float, Between(1, 120)] = 10.0
    """Length of what is encoded at once of a track; memory goes with it, and with batch_size."""
    workers: Annotated[int, Between(1, 1024)] = 1
    """Processes that make shards, each with a codec of its own."""
    shard: str = "0/1"
    """I/N: make every N-th shard, from the I-th on, 0 <= I < N: for N machines that share --out.
    When all are done the same command without --shard completes the data set."""
    device: str = "cpu"
    """Torch device of the codec: cpu, cuda, cuda:1, ...; one kind for the whole folder. Of several
    workers, cuda gives each another GPU."""
    rescan: bool = False
    """Scan the source again, though DIR/manifest.jsonl says what it holds, and end with an error
    if it holds something else by now."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the codec's convolutions; bfloat16 is faster on GPUs, and changes some tokens."""


def check(job: Job) -> None:
    """Raises `UserError` for settings that do not fit."""
    check_fields(job, "--")
    low, high = job.mix_snr
    if low > high:
        raise UserError(f"--mix-snr {low:g} {high:g}: give the lower first")
    shard_of(job)
    if bucket.is_url(job.audio):
        url = bucket.url_of(job.audio)
        raise UserError(
            f"--audio {url}: audio is not read from a bucket; copy it (`gcloud storage rsync -r "
            f"{url} DIR`) or mount it (gcsfuse)"
        )


def shard_of(job: Job) -> tuple[int, int]:
    """I and N of --shard I/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", job.shard)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {job.shard}: give I/N with I below N, such as 0/8 to 7/8")
    return int(found[1]), int(found[2])


def spec_of(job: Job, codec: CodecSpec) -> CodecSpec:
    """What the tokens mean, of a codec by itself."""
    return interleaved_spec(codec) if job.stereo == "interleave" else codec


def begun_with(job: Job, audio: str, spec: CodecSpec) -> dict[str, Any]:
    """All that the records depend on, which is the same whenever a job goes on.

    audio: fingerprint of the source.
    """
    names = (
        "validation_percent", "min_seconds", "max_track_seconds", "max_clipped",
        "max_record_seconds", "tracks_per_shard", "precision", "batch_size", "window_seconds",
    )  # fmt: skip
    # A codec is its weights, not its path. A device's number only changes the speed, but its kind
    # rounds in its own way, and so do batches and windows.
    begun = {
        "audio": audio,
        **{f"codec {k}": v for k, v in asdict(spec).items() if k not in ("source", "interleaved")},
        **{f"--{name.replace('_', '-')}": getattr(job, name) for name in names},
        "--device": job.device.split(":")[0],
    }
    # Folders of earlier releases do not have these, so they are noted where they are used.
    if job.split_by_folder:
        begun["--split-by-folder"] = True
    if job.stereo != "none":
        begun["--stereo"] = job.stereo
    if job.mix_ratio > 0:
        begun |= {
            "--mix-ratio": job.mix_ratio,
            "--mix-seed": job.mix_seed,
            "--mix-snr": list(job.mix_snr),
        }
    return begun
