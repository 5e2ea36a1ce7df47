"""Clips of jobs as files of any format, and several of them as a ZIP."""

import re
import zipfile
from pathlib import Path

import soundfile

from magnet_jax import prompts
from magnet_jax.io import audio
from magnet_jax.io.files import replacing_file
from magnet_jax.serving import store
from magnet_jax.serving.engine import Engine
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import Job

TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}


def name_of(job: Job, index: int | None, suffix: str) -> str:
    """A name that says what is in a file, of letters, digits and dashes alone."""
    text = prompts.in_words(job.request.description or "") or job.kind
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "clip"
    number = "" if index is None else f"-{index}"
    loop = next((clip.loop for clip in job.clips if clip.loop), None)
    if loop and loop["bars"]:
        slug += f"-{loop['bpm']:g}bpm-{loop['bars']}bars".replace(".", "-")
    return f"{slug}-seed{job.seed}{number}.{suffix}"


def _gone() -> RequestError:
    return RequestError("the clip has expired", status=404, code="not_found")


def file_of(engine: Engine, job: Job, index: int, wanted: str) -> tuple[Path, int]:
    """A clip in a format, made of its WAV where it is asked for the first time; its sample rate."""
    wav = engine.audio_path(job, index)
    try:
        about = soundfile.info(wav)
    except soundfile.LibsndfileError:
        raise _gone() from None
    if wanted == "mp3" and any(clip.loop for clip in job.clips):
        raise RequestError("format: MP3 would add silence to a loop", param="format")
    path = wav.with_suffix(f".{wanted}")
    if not path.exists():
        encoding = dict(audio.ENCODINGS[wanted])
        if wanted == "flac" and about.subtype != "PCM_16":
            encoding["subtype"] = "PCM_24"
        samples_NC, rate = soundfile.read(wav, dtype="float64", always_2d=True)
        store.write(path, audio.encoded(Path(path.name), samples_NC.T, rate, **encoding))
    return path, about.samplerate


def zip_of(engine: Engine, job: Job, wanted: str) -> tuple[Path, int]:
    """All clips of a job with their settings and tokens."""
    found = [(clip, *file_of(engine, job, clip.index, wanted)) for clip in job.clips]
    folder = engine.files.job(job.id)
    path = folder / f"clips-{wanted}.zip"
    if not path.exists():
        with (
            store.written(),
            replacing_file(path) as partial,
            zipfile.ZipFile(partial, "w") as file,
        ):
            for clip, sound, _ in found:
                name = Path(name_of(job, clip.index, wanted))
                file.write(sound, name.name)
                for suffix in (".json", ".tokens.npz"):
                    beside = folder / f"{clip.index}{suffix}"
                    if beside.exists():
                        file.write(beside, f"{name.stem}{suffix}")
    return path, found[0][2]
