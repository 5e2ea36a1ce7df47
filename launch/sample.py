"""Turns texts into WAV files with a trained model.

python -m launch.sample --checkpoint RUN --prompt "a slow waltz on the piano" --out wavs --seed 1
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from magnet_jax import cli, errors, prompts
from magnet_jax.arguments import RARE, Between, Count, Index, Seconds, Seed, check_fields
from magnet_jax.config import (
    PRESETS,
    AutoregressiveConfig,
    CodecSpec,
    DecodeConfig,
    HybridConfig,
    KernelConfig,
    LongConfig,
    Preset,
    PromptSeconds,
    RescoreConfig,
    RunConfig,
    SamplingConfig,
    SamplingMeshConfig,
    preset_steps,
)
from magnet_jax.errors import UserError
from magnet_jax.io import audio, bucket, machine
from magnet_jax.io.files import make_folder, replacing_file
from magnet_jax.prompts import Description, Fade, Prompt

if TYPE_CHECKING:
    from magnet_jax.api import Generator
    from magnet_jax.edit.bars import Bars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """What steers a clip beside one text."""

    blend: Annotated[
        tuple[tuple[float, str], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="SHARE TEXT", prefix_name=False),
    ] = ()
    """Another text and its share, as in 0.3 "a flute". The prompt has the rest. Give it again for
    more texts."""
    at: Annotated[
        tuple[tuple[float, str], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="SECONDS TEXT", prefix_name=False),
    ] = ()
    """A text that steers from some second on, as in 8 "a harp". Give it again for more of them.
    Before the first one it is the prompt that steers. Without one, the first must be at 0."""
    text_fade: Annotated[Fade, tyro.conf.arg(prefix_name=False)] = Prompt.fade
    """Seconds in which one text gives way to the next."""
    negative_prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", prefix_name=False)] = ""
    """What the clips are not to sound like."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="MODEL")]
    """The model: the folder of a training run, of an exported or imported model or of an AudioCraft
    checkpoint, on disk or gs://; a hub id; or the word demo for the model that ships."""
    out: Path
    """Folder for the WAV files. Each gets a JSON file beside it with every setting, and a
    file of its tokens, with which launch.edit edits it exactly."""
    prompt: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")
    ] = ()
    """Text of a clip. Give it again for more clips."""
    unconditional: Annotated[int, Between(0, 100_000)] = 0
    """Clips to generate without text, after those of the prompts."""
    steering: Steering = Steering()
    """More texts, for all clips of a prompt; the last one for those without as well."""
    seed: Seed = 0
    """Seed of the random numbers. Clip i depends on it, on i and on its text, on no other clip."""
    seconds: Seconds | None = None
    """Length of a clip. By default a clip is as long as those that the model was trained on. Longer
    clips are made in windows of that length."""
    long: LongConfig = LongConfig()
    """How a MAGNeT makes such longer clips."""
    extend_stride: float | None = None
    """Seconds by which the windows of a longer clip lie apart. By default it is 0.6 of a window, of
    joint windows half of one."""
    loop: bool = False
    """Make loops: clips whose end leads to their beginning, as long as their bars to the sample,
    with what music programs read of them."""
    bpm: Annotated[float | None, Between(20, 400)] = None
    """Of a loop, quarters a minute. They are its length; what is heard may have another tempo."""
    bars: Annotated[int | None, Between(1, 1024)] = None
    """Of a loop, how many. By default as many of 8, 4, 2 or 1 as the model hears at once."""
    beats_per_bar: Annotated[int, Between(1, 16)] = 4
    """Of a loop, quarters a bar."""
    start: Path | None = None
    """Sound file that a loop begins with. It sounds as its tokens do, and not as it was."""
    start_seconds: Seconds | None = None
    """How much of that file. By default it is half of the loop, or all that there is."""
    format: Literal["wav", "flac"] = "wav"
    """Kind of the sound files, of 16 bits."""
    step: Index | None = None
    """Checkpoint of a run to use. By default it is the newest."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of a run to use: ema are the averaged ones, which is the default, and raw are those
    of the last step."""
    preset: Preset | None = None
    """Decoding steps by name: paper is 20 10 10 10, paper-30s is 60 10 10 10, balanced is 20 5 5 5,
    in which the paper finds no loss, and draft is 20 1 1 1, which is 8 % worse. --decode.steps
    goes before it."""
    decode: DecodeConfig = DecodeConfig()
    """How a MAGNeT decodes. The defaults are the model's: --checkpoint MODEL --help shows them."""
    autoregressive: AutoregressiveConfig = AutoregressiveConfig()
    """How a MusicGen samples, and a hybrid for the beginning of a clip."""
    prompt_seconds: PromptSeconds | None = None
    """Seconds of a hybrid's clip that are generated one step after another, before the rest is
    decoded in parallel. 0 is none of the clip, its length or more is all of it. The model has a
    default of its own."""
    rescorer: Annotated[str | Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """Second model that takes part in choosing which spans are kept: a MusicGen, an AudioGen or
    another MAGNeT of the same codec. It is named as for --checkpoint."""
    rescorer_weight: float = RescoreConfig.weight
    """Share of the scores that is the rescorer's: 0 is no rescorer, 1 is the rescorer alone."""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer. 1 is none, and costs half as much as any other."""
    batch_size: Count = 8
    """Clips generated at once. It changes no clip but for rounding."""
    lufs: Annotated[float, Between(-70, 0)] | Literal["off"] = -14.0
    """Loudness of the files in LUFS. The word off keeps the level that the model gives."""
    codec: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the codec is, if it is no longer where the data set was made with it."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of low-rank adapters to add, as launch.export --adapter-only writes it."""
    codec_backend: Annotated[Literal["jax", "torch"], RARE] = "jax"
    """Decode audio in JAX, in one program with the tokens, or in PyTorch."""
    kernels: Annotated[KernelConfig, RARE] = KernelConfig()
    """How attention is computed."""
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    """How many devices are used."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of an AudioCraft checkpoint's text encoder, where the hub is out of reach."""


def _file_name(index: int, description: Description, seed: int) -> str:
    prompt = prompts.in_words(description)
    words = _slug(prompt) or ("clip" if prompt else "unconditional")
    return f"{index:03d}-{words}-seed{seed}"


def _slug(prompt: str) -> str:
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-")


def _loop_names(texts: Sequence[Description], seed: int, length: "Bars") -> list[str]:
    """Names such as a-lively-jig_128bpm_4bars; the seed is said where it is not 0."""
    bars = f"{float(length.seconds):g}s"
    if length.bars is not None:
        bars = f"{length.bpm:g}bpm_{length.bars}bar{'s' * (length.bars > 1)}"
    names: list[str] = []
    for text in texts:
        name = f"{_slug(prompts.in_words(text)) or 'loop'}_{bars}" + f"_seed{seed}" * (seed > 0)
        like = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{like + 1}" if like else name)
    return names


def is_made(path: Path, notes: Path, settings: dict, by: str = "launch.sample") -> bool:
    """Whether a sound file is there that was made so.

    Raises `UserError` if it was made otherwise, was changed since, or is somebody else's, as a JSON
    file may be too.
    """
    theirs = f"is there, and {by} did not make it; name another --out, or move it away"
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
        changed = [k for k, v in json.loads(json.dumps(settings)).items() if before.get(k) != v]
    except FileNotFoundError:  # the JSON has its name before the WAV has
        if path.exists():
            raise UserError(f"{path}: {theirs}") from None
        return False
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{notes}: {theirs}") from None
    if not path.exists():
        if not {"prompt", "seed", "checkpoint"} <= before.keys():
            raise UserError(f"{notes}: {theirs}")
        for other in map(path.with_suffix, (".wav", ".flac")):
            if other.exists():  # its JSON and tokens would be replaced
                raise UserError(f"{other}: is the same clip; name another --out, or remove it")
        return False
    if changed:
        raise UserError(
            f"{path}: was made with other settings ({', '.join(changed)}); name another --out, or "
            "remove it"
        )
    digest = before.get("sha256")
    if digest and digest != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{path}: was changed since it was made; name another --out, or move it")
    return True


def steered(text: str | None, more: Steering) -> Description:
    """A text, or None, with what else steers; raises `UserError` for what does not fit."""
    check_fields(more, "--")
    begins = bool(more.at) and more.at[0][0] == 0
    if text is None and (more.blend or (more.at and not begins)):
        raise UserError("--blend and --at need --prompt TEXT, for the rest and for the beginning")
    if text is not None and begins:
        raise UserError("--at 0 is what --prompt says: leave out one of both")
    if not more.at and more.text_fade != Prompt.fade:
        raise UserError("--text-fade needs --at: there is no other text to give way to")
    words: Any = text
    if more.blend:
        rest = 1 - math.fsum(share for share, _ in more.blend)
        if min(rest, *(share for share, _ in more.blend)) < -1e-9:
            raise UserError("--blend: shares must not be below 0, nor more than 1 in all")
        words = [(text, max(rest, 0.0)), *((other, share) for share, other in more.blend)]
    if more.at:
        words = [*([(0.0, words)] * (text is not None)), *more.at]
    prompt = Prompt(words, negative=more.negative_prompt, fade=more.text_fade)
    return prompt if words is None else prompts.simplified(prompt)


def check(args: Args) -> list[Description]:
    """The texts of the clips; raises `UserError` for what is wrong whatever the model is."""
    check_fields(args, "--")
    for prompt in args.prompt:
        if prompt.encode(errors="replace").decode() != prompt:
            raise UserError(f"--prompt {prompt!r}: not valid UTF-8")
        if not prompt.strip():
            raise UserError(
                "--prompt is empty: give a text, or --unconditional 1 for a clip without"
            )
    more = args.steering
    listed = [None] if not args.prompt and (more.at or more.blend) else args.prompt
    plain = Steering(negative_prompt=more.negative_prompt)
    texts = [steered(text, more) for text in listed]
    texts += [steered("", plain)] * args.unconditional
    if not texts:
        raise UserError("nothing to do: give --prompt TEXT, or --unconditional N")
    if bucket.is_url(args.out):
        raise UserError(f"--out {args.out}: sampling needs a folder on disk; copy it from there")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the WAVs need a folder")
    rescoring = (args.rescorer_weight, args.rescorer_guidance)
    if args.rescorer is None and rescoring != (RescoreConfig.weight, RescoreConfig.guidance):
        raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer MODEL")
    for name in ("bpm", "bars", "beats_per_bar", "start", "start_seconds"):
        if not args.loop and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')} is of a loop: give --loop as well")
    if args.start_seconds is not None and args.start is None:
        raise UserError("--start-seconds needs --start FILE")
    if args.loop and args.prompt_seconds is not None:
        raise UserError("--prompt-seconds has no effect on loops: leave it out")
    return texts


def length_of(args: Args, model: "Generator") -> "Bars | None":
    """How long the loops are; None of clips that are none."""
    if not args.loop:
        return None
    from magnet_jax.edit import bars

    if not hasattr(model, "loops"):
        raise UserError(
            f"--loop: a model of kind {model.kind} goes on from a beginning, which is all that it "
            "hears, and makes no loops: take a MAGNeT"
        )
    return bars.of(
        args.bpm, args.bars, args.seconds, beats_per_bar=args.beats_per_bar,
        most=model.max_duration,
    )  # fmt: skip


def _about_loop(args: Args, length: "Bars", model: "Generator") -> dict[str, Any]:
    """What the JSON files say of loops."""
    content = b"" if args.start is None else _read(args.start)
    return {
        "loop": {
            "bpm": length.bpm,
            "bars": length.bars,
            "beats_per_bar": length.beats_per_bar,
            "samples": length.samples(model.sample_rate),
            "start": args.start and str(args.start),
            "start_sha256": args.start and hashlib.sha256(content).hexdigest(),
            "start_seconds": args.start_seconds,
        },
        "seconds": float(length.seconds),
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--start {path}: cannot be read ({error.strerror})") from None


def decoding_of(args: Args, config: RunConfig, seconds: float) -> SamplingConfig:
    """How the clips are made; raises `UserError` for options that have no effect on this model."""
    kind = config.model.kind
    if kind != "hybrid" and args.prompt_seconds is not None:
        raise UserError(f"--prompt-seconds is for models of kind hybrid; this is a {kind}")
    for name, missing in (("decode", "musicgen"), ("autoregressive", "magnet")):
        if kind == missing and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name} is not for models of kind {kind}, and this is one")
    given = args.prompt_seconds
    prompt_seconds = min(config.prompt_seconds if given is None else given, seconds)
    for name, unused in (
        ("decode", prompt_seconds >= seconds),
        ("autoregressive", prompt_seconds == 0),
    ):
        changed = getattr(args, name) not in (getattr(config, name), getattr(Args, name))
        if kind == "hybrid" and unused and changed:
            raise UserError(
                f"--{name} has no effect with --prompt-seconds {prompt_seconds:g}: leave it out"
            )
    return dataclasses.replace(
        config,
        prompt_seconds=prompt_seconds,
        autoregressive=args.autoregressive,
        decode=config.decode if kind == "musicgen" else args.decode,
    ).sampling


def open_model(args: Args) -> tuple["Generator", dict[str, Any]]:
    """The model, ready to make the clips, and what their JSON files say of it."""
    # JAX is slow to load
    from magnet_jax import api, programs
    from magnet_jax.checkpoints import pretrained
    from magnet_jax.decode import long, placement, sampling
    from magnet_jax.model import precision

    programs.keep_on_disk()
    machine.keep_freed()
    loaded = pretrained.load(
        args.checkpoint,
        weights=args.weights,
        step=args.step,
        text_encoder=args.text_encoder,
        codec=args.codec,
        adapter=args.adapter,
    )
    about = _about(loaded, args.checkpoint)
    decoder = pretrained.load_decoder(loaded, str(args.checkpoint), args.codec_backend)
    execution = placement.Execution(
        kernels=args.kernels, mesh=args.mesh, say=functools.partial(print, flush=True)
    )
    model = api.of_kind(loaded, decoder, execution)
    model.duration = args.seconds or model.duration
    model.generation = decoding_of(args, loaded.config, min(model.duration, model.max_duration))
    if model.num_frames < 1:
        shortest = 1 / model.frame_rate
        raise UserError(f"--seconds {model.duration:g} is shorter than a frame, {shortest:g} s")
    model.longer = args.long
    model.extend_stride = long.stride_of_clip(
        loaded, model.num_frames, args.extend_stride, "--extend-stride", args.long
    )
    in_windows = model.extend_stride is not None and model.kind != "musicgen"
    if args.long != LongConfig() and not in_windows:
        raise UserError(
            f"--long is for clips of a MAGNeT of more than {model.max_duration:g} seconds: leave "
            "it out"
        )
    rescorer = None
    if args.rescorer is not None:
        if not isinstance(model, api.MAGNeT):
            raise UserError(f"--rescorer: a model of kind {model.kind} has no spans to score")
        model.set_rescorer(args.rescorer, args.rescorer_weight, guidance=args.rescorer_guidance)
        whole = getattr(model.generation, "prompt_seconds", 0) >= min(
            model.duration, model.max_duration
        )
        if args.rescorer_weight:
            sampling.check_rescored(model.generation, whole=whole)
        rescorer = _about(model.rescoring_model, args.rescorer) | {
            "weight": args.rescorer_weight,
            "guidance": args.rescorer_guidance,
        }
    return model, {
        "seconds": model.duration,
        "extend_stride": model.extend_stride,
        "long": dataclasses.asdict(args.long) if in_windows else None,
        **about,
        "adapter": args.adapter and str(args.adapter),
        "decode": dataclasses.asdict(model.generation),
        "rescorer": rescorer,
        "compute_dtype": precision.compute_dtype(loaded.config).name,
        "codec_backend": args.codec_backend,
        "kernels": dataclasses.asdict(args.kernels),
        "mesh": dataclasses.asdict(args.mesh),
        "codec": dataclasses.asdict(loaded.codec),
        "wanted_lufs": None if args.lufs == "off" else args.lufs,
        "sample_rate": model.sample_rate,
    }


def _about(loaded: Any, source: str | Path) -> dict[str, Any]:
    """Which model it is, for the JSON files."""
    from magnet_jax.checkpoints import pretrained

    return {
        "checkpoint": str(source),
        "step": loaded.step,
        "weights": loaded.lineage.get("weights"),
        "parameters": pretrained.fingerprint(loaded),
    }


def _write(
    wav: Path,
    notes: Path,
    wav_CN: np.ndarray,
    codes_KT: np.ndarray,
    settings: dict[str, Any],
    length: "Bars | None" = None,
) -> None:
    """Writes a clip, and beside its JSON file its tokens, with which launch.edit edits it.

    Of a loop `length` says how long it is.
    """
    from magnet_jax import looping
    from magnet_jax.edit import closing, kept

    rate, wanted, loudness = settings["sample_rate"], settings["wanted_lufs"], None
    if wanted is not None and length is None:
        wav_CN, loudness = audio.normalize_loudness(wav_CN, rate, wanted)
    elif wanted is not None:
        wav_CN, loudness = closing.levelled(wav_CN, rate, wanted)
    about = settings | {"reached_lufs": loudness}
    told = {name: settings[name] for name in ("seed", "sample", "parameters", "decode")}
    text = prompts.from_json(settings["prompt"])
    title = prompts.in_words(text)
    info = {"title": title, "software": "magnet_jax", "comment": json.dumps(told)}
    content = looping.encoded(wav, wav_CN, rate, length, info)
    about["sha256"] = hashlib.sha256(content).hexdigest()
    tokens = kept.encoded(
        content, codes_KT, CodecSpec(**settings["codec"]), text=text, seed=settings["seed"],
        settings=None if length is None else {"loop": settings["loop"]},
    )  # fmt: skip
    # All are whole before one has its name. The JSON has it before the WAV, as a WAV without one is
    # somebody else's.
    with (
        replacing_file(wav) as file,
        replacing_file(notes) as beside,
        replacing_file(notes.with_suffix(kept.SUFFIX)) as last,
    ):
        file.write_bytes(content)
        beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        last.write_bytes(tokens)


def sample(args: Args, names: Sequence[str] | None = None, notes: Path | None = None) -> list[Path]:
    """Writes one WAV and one JSON a clip and returns the WAVs' paths.

    Args:
      args: what to make.
      names: of the files, without suffix, one a clip; a batch whose files are there is then left
        as it is, so that a long list goes on where it was stopped.
      notes: folder for the JSON files; None is beside the WAVs.
    """
    texts = check(args)
    model, about = open_model(args)
    prompts.check_times(texts, model.duration)
    make_folder("--out", args.out)
    for note in model.notes(texts):
        print(note)
    length = length_of(args, model)
    start_BKP = None
    stems = names or [_file_name(i, text, args.seed) for i, text in enumerate(texts)]
    if length is not None:
        stems = names or _loop_names(texts, args.seed, length)
        about |= _about_loop(args, length, model)
        if args.start is not None:
            start_BKP = model.start_of(length, args.start, seconds=args.start_seconds)
    files = [args.out / f"{stem}.{args.format}" for stem in stems]
    jsons = [(notes or args.out) / f"{stem}.json" for stem in stems]
    settings = [
        {"prompt": prompts.as_json(text), "seed": args.seed, "sample": i, **about}
        for i, text in enumerate(texts)
    ]
    made = [is_made(*clip) for clip in zip(files, jsons, settings)]
    for first in range(0, len(texts), args.batch_size):
        batch = texts[first : first + args.batch_size]
        clips = range(first, first + len(batch))
        if names is not None and all(made[i] for i in clips):
            continue
        # A last, smaller batch is filled up: few shapes, few programs.
        filled = batch + [""] * (min(args.batch_size, len(texts)) - len(batch))
        started = time.perf_counter()
        numbers = {"seed": args.seed, "first_sample": first}
        if length is None:
            generated = model.clips(filled, num_frames=model.num_frames, **numbers)
            wav_BCN = generated.wav_BCN[..., : round(model.duration * model.sample_rate)]
            codes_BKT, what, each = generated.codes_BKT, "clip", f"{model.duration:g} s"
        else:
            loops = model.loops(filled, length, start_BKP=start_BKP, **numbers)
            wav_BCN, codes_BKT, what, each = loops.wav_BCN, loops.tokens_BKT, "loop", length.words
        took = time.perf_counter() - started
        for i, wav_CN, codes_KT in zip(clips, wav_BCN, codes_BKT):
            _write(files[i], jsons[i], wav_CN, codes_KT, settings[i], length)
            print(files[i])
        print(f"{len(batch)} {what}{'s' * (len(batch) > 1)} of {each} in {took:.1f} s")
    return files


def parse(words: list[str]) -> Args:
    """Reads the command line; the defaults of how tokens are chosen come from the model."""
    read = functools.partial(
        cli.parse, Args, words, prog="python -m launch.sample", description=__doc__
    )
    if not {"-h", "--help", "--help-all"} & set(words):
        read()  # A mistake is told before JAX is loaded.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint")
    first.add_argument("--preset")
    found = first.parse_known_args(words)[0]
    given: dict[str, Any] = {}
    if found.checkpoint:
        from magnet_jax.checkpoints import pretrained  # JAX is slow to load

        model, defaults = pretrained.read_defaults(found.checkpoint)
        if isinstance(defaults, HybridConfig):
            given = dict(vars(defaults))
        else:
            given = {"autoregressive" if model.kind == "musicgen" else "decode": defaults}
    if found.preset in PRESETS:
        if given.keys() == {"autoregressive"}:
            raise UserError("--preset is not for models of kind musicgen, and this is one")
        decode = given.get("decode", DecodeConfig())
        steps = preset_steps(found.preset, len(decode.steps))
        given["decode"] = dataclasses.replace(decode, steps=steps)
    return read(default=Args(checkpoint=tyro.MISSING, out=tyro.MISSING, **given))


if __name__ == "__main__":
    with errors.reported():
        sample(parse(sys.argv[1:]))
