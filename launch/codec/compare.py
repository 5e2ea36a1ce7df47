"""How near codecs come to held-out audio, beside Opus and the original, as a table.

python -m launch.codec.compare --audio data/recipe/test --codecs embedded runs/codec/codec
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import soxr
from tqdm import tqdm

from magnet_jax import cli, errors
from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.codec.encodec import Codec, load_codec
from magnet_jax.errors import UserError
from magnet_jax.evaluation import metrics
from magnet_jax.evaluation.scores import Listening, audio_below, read_mono
from magnet_jax.io.audio import write_wav
from magnet_jax.io.files import replacing_file

# (window, hop) in samples
_RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))
_RANGE_DB = 60.0  # below a clip's loudest bin, where the logarithm stops
_DRAWS = 1000
Kbps = Annotated[float, Between(0.5, 256)]  # that FFmpeg hands on to libopus for one channel
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # that libopus takes

# What makes a signal [N] of one, and the kbit/s that it takes.
Version = Callable[[np.ndarray], tuple[np.ndarray, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Encodes and decodes clips with codecs and with Opus, and compares them with the original."""

    audio: Path
    """Folder of audio that no codec was trained on."""
    codecs: tuple[str, ...] = ("embedded",)
    """What tokenization.job takes as --codec; all of one sample rate."""
    opus_kbps: tuple[Kbps, ...] = (6.0, 8.0, 12.0)
    """Bit rates asked of Opus; what it took is measured."""
    clips: Annotated[int, Between(1, 10**9)] = 100
    """How many files, spread over the folder."""
    seconds: Annotated[float, Between(0.5, 600)] = 10.0
    """From the beginning of each."""
    seed: Seed = 0
    """Of the bootstrap."""
    out: Path | None = None
    """Folder, new or of an earlier comparison, for each clip in each version, as VERSION/CLIP.wav
    with the clip's path in --audio, and for comparison.json with all numbers."""


def spectral_distance(made: np.ndarray, real: np.ndarray) -> float:
    """Multi-resolution distance of two signals [N]: 0 for the same.

    Yamamoto et al. 2020 (arXiv 1910.11480): for each resolution the spectral convergence plus the
    mean distance of log magnitudes (natural), which end 60 dB below the original's loudest bin.
    """
    total = 0.0
    for size, hop in _RESOLUTIONS:
        a, b = (_magnitudes(wav, size, hop) for wav in (made, real))
        floor = max(1e-8, float(b.max()) * 10 ** (-_RANGE_DB / 20))
        convergence = float(np.linalg.norm(a - b) / max(1e-8, np.linalg.norm(b)))
        logs = np.abs(np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor)))
        total += convergence + float(logs.mean())
    return total / len(_RESOLUTIONS)


def _magnitudes(wav: np.ndarray, size: int, hop: int) -> np.ndarray:
    padded = np.pad(wav, (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(size + 1)[:-1]))


def snr_db(made: np.ndarray, real: np.ndarray) -> float:
    """Signal over error in dB."""
    error = float(np.square(made - real).sum())
    return 10 * math.log10(max(1e-12, float(np.square(real).sum())) / max(1e-10, error))


def through_opus(wav: np.ndarray, rate: int, kbps: float) -> tuple[np.ndarray, float]:
    """Audio [N] encoded and decoded by libopus, in place, and the kbit/s that it took."""
    if rate not in _OPUS_RATES:
        decoded, kbps = through_opus(soxr.resample(wav, rate, 48_000, "VHQ"), 48_000, kbps)
        return _aligned(soxr.resample(decoded, 48_000, rate, "VHQ"), wav), kbps
    buffer = io.BytesIO()
    count = 0
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=rate, layout="mono")
        stream.bit_rate = round(1000 * kbps)
        stream.options = {"application": "audio", "vbr": "on"}
        frame = av.AudioFrame.from_ndarray(wav[None].astype(np.float32), "flt", "mono")
        frame.sample_rate, frame.pts = rate, 0
        context = stream.codec_context
        size = context.frame_size or rate // 50
        resampler = av.AudioResampler("flt", "mono", rate, frame_size=size)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            for packet in stream.encode(part):
                count += packet.size
                container.mux(packet)
    buffer.seek(0)
    with av.open(buffer) as container:
        resampler = av.AudioResampler("fltp", "mono", 48_000)
        frames = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
        frames += resampler.resample(None)
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    decoded = soxr.resample(decoded, 48_000, rate, "VHQ")
    return _aligned(decoded, wav), 8 * count * rate / len(wav) / 1000


def _aligned(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """`made`, moved to where it correlates most with `real`, and as long."""
    size = 2 ** math.ceil(math.log2(len(made) + len(real)))
    product = np.fft.irfft(np.fft.rfft(made, size) * np.conj(np.fft.rfft(real, size)))
    delay = int(np.argmax(product))
    delay = delay - size if delay > size // 2 else delay
    moved = made[delay:] if delay >= 0 else np.pad(made, (-delay, 0))
    return np.pad(moved, (0, max(0, len(real) - len(moved))))[: len(real)]


def _through_codec(codec: Codec) -> Version:
    spec = codec.spec
    kbps = spec.frame_rate * spec.num_codebooks * math.log2(spec.codebook_size) / 1000

    def there_and_back(wav: np.ndarray) -> tuple[np.ndarray, float]:
        padded = np.pad(wav, (0, -len(wav) % codec.hop))
        return codec.decode(codec.encode(padded[None, None]))[0, 0, : len(wav)], kbps

    return there_and_back


def compare(settings: Comparison) -> list[dict[str, Any]]:
    """A row of numbers for each version; raises `UserError` for audio or codecs that do not fit."""
    _check(settings)
    codecs = {source: load_codec(source) for source in settings.codecs}
    rates = {codec.spec.sample_rate for codec in codecs.values()}
    if len(rates) > 1 or any(codec.spec.channels != 1 for codec in codecs.values()):
        raise UserError("--codecs: must be mono and of one sample rate")
    rate = rates.pop()
    paths = _spread(settings)
    versions: dict[str, Version] = {
        "original, 16 bit": lambda wav: (np.round(wav * 2**15) / 2**15, 16 * rate / 1000)
    }
    versions |= {source: _through_codec(codec) for source, codec in codecs.items()}
    for kbps in settings.opus_kbps:
        name = f"Opus, {kbps:g} kbit/s asked"
        versions[name] = lambda wav, kbps=kbps: through_opus(wav, rate, kbps)
    folders = dict(zip(versions, _folders(settings), strict=True))
    clips = _clip_ids(paths, settings.audio)
    if settings.out is not None:
        _write_rows(settings.out, [])  # so that what a kill leaves is known as ours
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in versions}
    for path in tqdm(paths, unit="clip"):
        wav = read_mono(path, rate, Listening(seconds=settings.seconds))
        for name, version in versions.items():
            made, kbps = version(wav)
            found[name].append((spectral_distance(made, wav), snr_db(made, wav), kbps))
            if settings.out is not None:
                write_wav(settings.out / folders[name] / f"{clips[path]}.wav", made[None], rate)
    rows = _rows(found, settings.codecs[0], settings.seed)
    if settings.out is not None:
        _write_rows(settings.out, rows)
    return rows


def _rows(
    found: Mapping[str, list[tuple[float, float, float]]], first: str, seed: int
) -> list[dict[str, Any]]:
    """Means over clips, with where 95 % of the means of bootstrap draws lie.

    Args:
      found: of each version each clip's distance, SNR and kbit/s.
      first: the version that the others are held against, clip by clip.
      seed: of the draws.
    """
    drawn = {"resamples": _DRAWS, "seed": seed}
    of_first = np.array(found[first])[:, 0]
    rows = []
    for name, values in found.items():
        distances, ratios, kbps = np.array(values).T
        distance = metrics.mean(distances, **drawn)
        difference = metrics.mean(distances - of_first, **drawn)
        rows.append(
            {
                "version": name,
                "kbps": float(kbps.mean()),
                "spectral_distance": distance.value,
                "spectral_distance_95": [distance.low, distance.high],
                "minus_first": difference.value,
                "minus_first_95": [difference.low, difference.high],
                "snr_db": float(ratios.mean()),
                "clips": len(values),
            }
        )
    return rows


def _check(settings: Comparison) -> None:
    """Raises `UserError` for what can be known to fail before anything is encoded."""
    check_fields(settings, "--")
    if not settings.codecs:
        raise UserError("--codecs: name at least one")
    for option, names in (
        ("--codecs", settings.codecs),
        ("--opus-kbps", [f"{kbps:g}" for kbps in settings.opus_kbps]),
    ):
        if len(set(names)) < len(names):
            raise UserError(f"{option}: name each once")
    if settings.out is None or not settings.out.exists():
        return
    if not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a file, and the clips need a folder")
    rows = settings.out / "comparison.json"
    if any(settings.out.iterdir()) and not rows.is_file():
        raise UserError(f"--out {settings.out}: holds other files; name a new folder")


def _write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    with replacing_file(out / "comparison.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n")


def _folders(settings: Comparison) -> list[str]:
    """Of the versions, in their order."""
    codecs = [
        re.sub(r"[^A-Za-z0-9._]+", "-", source).strip("-.") or "codec" for source in settings.codecs
    ]
    found: list[str] = []
    for name in ("original", *codecs, *(f"opus-{kbps:g}" for kbps in settings.opus_kbps)):
        taken = (f"{name}-{number}" for number in count(2))
        found.append(next(n for n in chain([name], taken) if n not in found))
    return found


def _clip_ids(paths: Sequence[Path], audio: Path) -> dict[Path, Path]:
    """Each clip's path in --audio, with its suffix only where another clip's differs in that."""
    bare = {path: path.with_suffix("") for path in paths}
    shared = Counter(bare.values())
    return {
        path: (path if shared[stem] > 1 else stem).relative_to(audio) for path, stem in bare.items()
    }


def _spread(settings: Comparison) -> list[Path]:
    try:
        paths = audio_below(settings.audio)
    except UserError as error:
        raise UserError(f"--audio {error}") from None
    places = np.unique(np.linspace(0, len(paths) - 1, settings.clips).astype(int))
    return [paths[i] for i in places]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown; differences are to the first codec, clip by clip."""
    lines = [
        "| version | kbit/s | spectral distance (95 % interval) | difference | SNR (dB) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["version"], f"{row['kbps']:.3g}"]
        for name in ("spectral_distance", "minus_first"):
            low, high = row[f"{name}_95"]
            cells.append(f"{row[name]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {' | '.join([*cells, format(row['snr_db'], '.1f')])} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    print(table(compare(cli.parse(Comparison, words, prog="python -m launch.codec.compare"))))


if __name__ == "__main__":
    with errors.reported():
        main()
