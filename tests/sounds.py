"""Small audio files for the tests, and embedders that need no network to hear them."""

import json

import av
import numpy as np
import soundfile

from magnet_jax.evaluation.embedders import Embedded, Embedder

RATE = 16000


def tone(seconds, rate=RATE, channels=1, frequency=440.0):
    t = np.arange(round(seconds * rate)) / rate
    wav = 0.3 * np.sin(2 * np.pi * frequency * t) * (1 + np.sin(7 * t)) / 2
    return np.repeat(wav[:, None], channels, axis=1).astype(np.float32)


def plucked(pitches, seconds=0.4, rate=RATE):
    """A string for each MIDI pitch, one after another; float32 [N]."""
    t = np.arange(round(seconds * rate)) / rate
    sounds = []
    for pitch in pitches:
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        partials = [np.sin(2 * np.pi * hertz * k * t) / k**2 for k in range(1, 7)]
        sounds.append(0.3 * np.sum(partials, 0) * np.minimum(1, t / 0.005) * np.exp(-3 * t))
    return np.concatenate(sounds).astype(np.float32)


def put(path, wav, rate=RATE, caption="a tone", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, **how)
    if caption is not None:
        path.with_suffix(".json").write_text(json.dumps({"description": caption, "bpm": 90}))
    return path


def album(folder, count=8, seconds=1.1):
    for i in range(count):
        put(folder / f"{i:02d}.wav", tone(seconds + 0.1 * (i % 3), frequency=200 + 50 * i))
    return folder


def cut_file(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_with_ffmpeg(path, wav, rate, codec, caption="a tone", picture=False, quality=None, **how):
    """A file of a format that libsndfile does not write; mono. quality: of a variable bit rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", **how) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if quality is None:
            stream.bit_rate = 128_000
        else:
            stream.options = {"flags": "+qscale", "global_quality": str(118 * quality)}
        if picture:
            video = container.add_stream("mpeg4", rate=10, width=32, height=32)
            image = np.zeros((32, 32, 3), np.uint8)
            for _ in range(int(10 * len(wav) / rate) + 20):
                container.mux(video.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav.T), "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        convert = av.AudioResampler(
            stream.codec_context.format, frame_size=stream.codec_context.frame_size or 1024
        )
        for part in (*convert.resample(frame), *convert.resample(None), None):
            container.mux(stream.encode(part))
    if caption is not None:
        path.with_suffix(".json").write_text(json.dumps({"description": caption}))
    return path


def pitch_embedder():
    """Hears how high a tone is, in Hz, and nothing else."""

    def embed(wav_N):
        pieces = np.array_split(wav_N, 4)
        pitch = [np.count_nonzero(np.diff(np.sign(piece))) / len(piece) for piece in pieces]
        return Embedded(np.array(pitch)[:, None] * RATE / 2, None)

    return Embedder("toy", RATE, embed, "", "hash", "")


def loudness_embedder(name):
    """Two numbers a piece and two labels: enough to tell clips apart, in no time."""

    def embed(wav_N):
        rows = [[piece.std(), np.abs(np.diff(piece)).mean()] for piece in np.array_split(wav_N, 3)]
        return Embedded(np.array(rows), 5 * np.log(np.array(rows) + 1e-6))

    return Embedder(name, RATE, embed, "", "hash", "a third", tags=("piano", "slow"))


def content(out):
    """Every file that must not depend on how often the job was killed."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }
