"""What the device does for jobs: batches of clips of texts, and edits one at a time.

Here requests become calls of `api.MAGNeT` and of `decode.sampling`, and what comes out becomes
files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from magnet_jax import programs, prompts
from magnet_jax.api import MAGNeT, MusicGen
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import (
    CodecSpec,
    DecodeConfig,
    EditConfig,
    LongConfig,
    SamplingConfig,
    SamplingMeshConfig,
    decode_of,
    preset_steps,
    replaced,
    with_decode,
)
from magnet_jax.decode import long, sampling, segments, tokens_of_text
from magnet_jax.decode.segments import Between
from magnet_jax.edit import closing, kept
from magnet_jax.editing import Edit
from magnet_jax.io import audio
from magnet_jax.looping import Loops
from magnet_jax.looping import encoded as encoded_loop
from magnet_jax.prompts import Description
from magnet_jax.serving import requests, store
from magnet_jax.serving.errors import RequestError
from magnet_jax.serving.jobs import Clip, Job

Model = MAGNeT | MusicGen
LONG = "long"  # begins the key of a row that stands for all clips of a job, made in windows


class Row(NamedTuple):
    """A clip of a text that is to be made."""

    job: Job
    index: int
    key: tuple  # rows of one key are made by one program
    decoding: SamplingConfig
    num_frames: int
    text: Description

    @property
    def steps(self) -> int:
        how = decode_of(self.decoding)
        return sum(how.steps) if isinstance(how, DecodeConfig) else self.num_frames


class Made(NamedTuple):
    """What the device made of a row."""

    wav_CN: np.ndarray
    codes_KT: np.ndarray


def decoding_of(model: Model, request: requests.Request) -> SamplingConfig:
    """How a request is decoded; `UserError` for what the model does not have."""
    default = model.loaded.config.sampling
    how = decode_of(default)
    guidance = request.guidance or [None]
    given: dict[str, Any] = {"top_k": request.top_k, "top_p": request.top_p or None}
    if request.top_p:
        given["top_k"] = 0
    elif request.top_p == 0:  # AudioCraft's way to say so
        given["top_p"] = 1.0
    given["temperature"] = request.temperature or None
    if request.temperature == 0:
        given["greedy"] = True
    if not isinstance(how, DecodeConfig):
        for name in ("preset", "steps"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name}: a {model.kind} has no steps to choose", param=name)
        if len(guidance) > 1:
            raise RequestError(f"guidance: a {model.kind} takes one number", param="guidance")
        return replaced(how, **given, guidance=guidance[0])
    steps = request.steps and tuple(request.steps)
    if request.preset is not None:
        steps = preset_steps(request.preset, len(how.steps))
    if steps and len(steps) != len(how.steps):
        raise RequestError(
            f"steps: give one number a codebook, {len(how.steps)}, not {len(steps)}", param="steps"
        )
    ends = {"max_guidance": guidance[0], "min_guidance": guidance[1] if len(guidance) > 1 else None}
    return with_decode(default, replaced(how, **given, **ends, steps=steps or None))


def rows_of(job: Job, model: Model) -> list[Row]:
    """The clips that a job asks for; raises `UserError` for what cannot be made."""
    request = job.request
    seconds = model.max_duration if request.seconds is None else request.seconds
    num_frames = round(seconds * model.frame_rate)
    if num_frames < 1:
        raise RequestError(f"seconds: {seconds:g} is shorter than a frame", param="seconds")
    decoding = decoding_of(model, request)
    how: Any = decoding
    description = request.description or ""
    prompts.check_times([description], seconds)
    if model.kind == "magnet":
        how = sampling.shared(decoding) if _has_own(model) else decoding
        model_span = decoding.span_length or model.loaded.config.model.span_length
        if num_frames < model_span:
            raise RequestError(f"seconds: {seconds:g} is shorter than a span", param="seconds")
    if num_frames > sampling.segment_frames(model.loaded.config, model.loaded.codec):
        return [Row(job, 0, (LONG, job.id), decoding, num_frames, description)]
    text = tokens_of_text.tokenize_texts(model.loaded, [description])
    shapes = tuple(x.shape[1:] for x in jax.tree.leaves(text))
    width = shapes, jax.tree.structure(text), text.any
    alone = job.id if request.deterministic else None
    rows = []
    for index in range(request.n):
        key = ("generate", num_frames, how, width, alone and f"{alone}-{index}")
        rows.append(Row(job, index, key, decoding, num_frames, description))
    return rows


def parts(model: Model, row: Row, between: Between) -> Iterator[long.Part]:
    """The clips of a job that are longer than a window, a call of the network's program at a time.

    The first part is what there is before any.
    """
    batch = sampling.make_batch(
        model.loaded, [row.text] * row.job.request.n, num_frames=row.num_frames,
        decoding=row.decoding, seed=row.job.seed, rescorer=getattr(model, "rescorer", None),
    )  # fmt: skip
    how = LongConfig(mode=row.job.request.windows)
    execution = dataclasses.replace(model.execution, between=between)
    return long.windows(model.loaded, batch, how, execution=execution)


def _has_own(model: Model) -> bool:
    """Whether clips of one program may have their own temperature and guidance."""
    return model.kind == "magnet" and model.execution.mesh == SamplingMeshConfig()


def padded(count: int) -> int:
    """How many clips are made for `count`: 1, 2, 4, 8, ..."""
    return 1 << (count - 1).bit_length()


def generate(model: Model, rows: Sequence[Row], between: Between) -> list[Made]:
    """Makes clips in one batch."""
    filled = [*rows, *[rows[-1]] * (padded(len(rows)) - len(rows))]
    one = rows[0]
    how: Any = {"decoding": one.decoding}
    if _has_own(model):
        how = {"decoding": [row.decoding for row in filled]}
    if isinstance(model, MAGNeT):
        how["rescorer"] = model.rescorer
    made = sampling.generate(
        model.loaded,
        [row.text for row in filled],
        num_frames=one.num_frames,
        seed=[row.job.seed for row in filled],
        first_sample=[row.index for row in filled],
        decoder=model.decoder,
        execution=dataclasses.replace(model.execution, between=between),
        **how,
    )
    length = round(one.num_frames * model.sample_rate / model.frame_rate)
    return [
        Made(wav_CN[:, :length], codes_KT)
        for wav_CN, codes_KT in zip(made.wav_BCN[: len(rows)], made.codes_BKT)
    ]


def first_heard(model: Model) -> int:
    """How many codebooks, from the first one on, make a sound: a tonal stream alone makes none."""
    sounds_K = np.asarray(model.decoder.params["codebooks"]).any((1, 2))
    return (int(sounds_K.argmax()) + 1) * model.loaded.codec.sides


def preview(model: Model, codes_KT: jax.Array, num_frames: int) -> np.ndarray:
    """What the first codebooks alone sound like, [C, N]."""
    decoder = model.decoder
    count = len(codes_KT) // model.loaded.codec.sides
    params = decoder.params | {"codebooks": decoder.params["codebooks"][:count]}
    how = {"config": decoder.config, "frames": None, "platform": jax.default_backend()}
    wav_1CN = programs.call(
        segments.finish, params, codes_KT[None], np.int32(num_frames), what="a preview", **how
    )
    return np.asarray(wav_1CN)[0, :, : round(num_frames * model.sample_rate / model.frame_rate)]


class Editor(NamedTuple):
    """What makes edits and loops, and where it finds what they are of."""

    model: MAGNeT
    files: store.Store

    def path(self, file: str | None, clip: requests.Result | None) -> Path:
        if file is not None:
            return self.files.upload(file) / "audio.wav"
        return self.files.clip(clip.id, clip.index)

    def run(self, job: Job, between: Between) -> Edit | Loops:
        """Makes an edit, or loops."""
        request, model = job.request, self.model
        old = model.editing, model.generation, model.execution
        names = ("edge", "fade", "side", "context")
        how = {name: getattr(request, name, None) for name in names}
        model.editing = replaced(EditConfig(), **how)
        model.generation = decoding_of(model, request)
        model.execution = dataclasses.replace(model.execution, between=between)
        try:
            if isinstance(request, requests.Loop):
                return self._loops(request, job.seed)
            return self._edit(request, job.seed)
        finally:
            model.editing, model.generation, model.execution = old

    def _loops(self, request: requests.Loop, seed: int) -> Loops:
        start = None
        if request.start_file is not None or request.start_job is not None:
            start = self.path(request.start_file, request.start_job)
        return self.model.generate_loop(
            [request.description or ""] * request.n, bpm=request.bpm, bars=request.bars,
            seconds=request.seconds, beats_per_bar=request.beats_per_bar, start=start,
            start_seconds=request.start_seconds, seed=seed,
        )  # fmt: skip

    def _edit(self, request: requests.Source, seed: int) -> Edit:
        model, source = self.model, self.path(request.file, request.job)
        description = request.description
        how = {"descriptions": None if description is None else [description], "seed": seed}
        match request:
            case requests.Inpaint():
                codebooks = request.codebooks and tuple(request.codebooks)
                more = {"regions": request.regions, "codebooks": codebooks}
                return model.generate_inpainting(source, **more, **how)
            case requests.Extend():
                ends = {"before": request.before, "after": request.after}
                return model.generate_extension(source, **ends, **how)
            case requests.Between():
                then = self.path(request.then_file, request.then_job)
                return model.generate_between(source, then, request.seconds, **how)
            case requests.Restyle():
                names = ("strength", "how", "original")
                more = {name: getattr(request, name) for name in names}
                return model.generate_restyle(source, **more, **how)
            case requests.Vary():
                more = {"n": request.n, "variation": request.variation}
                return model.generate_variations(source, **more, **how)
            case requests.Repair():
                more = {"worst": request.worst, "rounds": request.rounds}
                return model.repair(source, **more, **how)
        raise AssertionError(request)


def about_model(model: Model, name: str) -> dict[str, Any]:
    """Which model made a clip, for its JSON file."""
    return {
        "checkpoint": name,
        "parameters": pretrained.fingerprint(model.loaded),
        "codec": dataclasses.asdict(model.loaded.codec),
        "sample_rate": model.sample_rate,
    }


def keep_clip(folder: Path, row: Row, made: Made, about: dict[str, Any], spec: CodecSpec) -> Clip:
    """Writes a clip of a text, its tokens and its settings."""
    request, wav_CN, loudness = row.job.request, made.wav_CN, None
    if request.lufs is not None:
        wav_CN, loudness = audio.normalize_loudness(wav_CN, spec.sample_rate, request.lufs)
    path = folder / f"{row.index}.wav"
    content = audio.encoded(path, wav_CN, spec.sample_rate, **audio.WAV)
    store.write(path, content)
    tokens = kept.encoded(content, made.codes_KT, spec, text=row.text, seed=row.job.seed)
    store.write(path.with_suffix(kept.SUFFIX), tokens)
    note = {
        "prompt": prompts.as_json(row.text),
        "seed": row.job.seed,
        "sample": row.index,
        "decode": dataclasses.asdict(row.decoding),
        "reached_lufs": loudness,
    }
    _note(path, row.job, about | note, content)
    seconds = wav_CN.shape[1] / spec.sample_rate
    return Clip(index=row.index, seed=row.job.seed, number=row.index, seconds=round(seconds, 6))


def edited_text(job: Job, edit: Edit, number: int) -> Description:
    """The text that a clip was edited with."""
    own = edit.clips[number].text  # an extension's is as late already as what is before it
    given = job.request.description
    return own if given is None else prompts.completed(given, own)


def keep_edit(
    folder: Path, job: Job, edit: Edit, number: int, about: dict, spec: CodecSpec
) -> Clip:
    """Writes a clip of an edit, its tokens where the samples are theirs, and its settings."""
    path = folder / f"{number}.wav"
    with store.written():
        folder.mkdir(parents=True, exist_ok=True)
        edit.write(path, number)
        content = path.read_bytes()
    clip = edit.clips[number]
    changed = [[a / edit.sample_rate, b / edit.sample_rate] for a, b in edit.changed[number]]
    text = edited_text(job, edit, number)
    if clip.own:
        tokens = kept.encoded(content, edit.tokens_BKT[number], spec, text=text, seed=job.seed)
        store.write(path.with_suffix(kept.SUFFIX), tokens)
    note = {"prompt": prompts.as_json(text), "seed": job.seed, "sample": number, "changed": changed}
    _note(path, job, about | note | {"sample_rate": edit.sample_rate}, content)
    seconds = edit.wav_BCN.shape[-1] / edit.sample_rate
    return Clip(
        index=number, seed=job.seed, number=number, seconds=round(seconds, 6), changed=changed,
        has_tokens=clip.own,
    )  # fmt: skip


def keep_loop(
    folder: Path, job: Job, loops: Loops, number: int, about: dict[str, Any], spec: CodecSpec
) -> Clip:
    """Writes a loop as WAV and as FLAC, with what music programs read, its tokens and settings."""
    request, length, loudness = job.request, loops.length, None
    wav_CN, rate, text = loops.wav_BCN[number], loops.sample_rate, loops.texts[number]
    if request.lufs is not None:
        wav_CN, loudness = closing.levelled(wav_CN, rate, request.lufs)
    told = json.dumps({"seed": job.seed, "sample": number})
    info = {"title": prompts.in_words(text), "software": "magnet_jax", "comment": told}
    path = folder / f"{number}.wav"
    for suffix in (".flac", ".wav"):
        content = encoded_loop(path.with_suffix(suffix), wav_CN, rate, length, info)
        store.write(path.with_suffix(suffix), content)
    loop = {
        "bpm": length.bpm,
        "bars": length.bars,
        "beats_per_bar": length.beats_per_bar,
        "samples": length.samples(rate),
    }
    codes_KT, settings = loops.tokens_BKT[number], {"loop": loop}
    tokens = kept.encoded(content, codes_KT, spec, text=text, seed=job.seed, settings=settings)
    store.write(path.with_suffix(kept.SUFFIX), tokens)
    note = {"prompt": prompts.as_json(text), "seed": job.seed, "sample": number}
    note["reached_lufs"] = loudness
    _note(path, job, about | note | settings, content)
    seconds = round(wav_CN.shape[-1] / rate, 6)
    return Clip(index=number, seed=job.seed, number=number, seconds=seconds, loop=loop)


def _note(path: Path, job: Job, about: dict[str, Any], content: Any) -> None:
    request = job.request.model_dump(mode="json", by_alias=True) | {"seed": job.seed}
    about = about | {"kind": job.kind, "request": request}
    about["sha256"] = hashlib.sha256(content).hexdigest()
    store.write(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")


def confidence(model: MAGNeT, codes_KT: np.ndarray, text: Description) -> list[float]:
    """How sure the model is of each frame, in nats."""
    log_KT = model.confidence(codes_KT[None], [text])[0]
    return [round(float(x), 3) for x in log_KT.mean(0)]
