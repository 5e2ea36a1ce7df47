"""Turns texts into WAV files with a trained model.

python -m launch.sample --checkpoint RUN --prompt "a slow waltz on the piano" --out wavs --seed 1
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from magnet_jax import cli, errors
from magnet_jax.arguments import Between, Count, Index, Seconds, Seed, check_fields
from magnet_jax.config import (
    PRESETS,
    AutoregressiveConfig,
    DecodeConfig,
    HybridConfig,
    KernelConfig,
    Preset,
    PromptSeconds,
    RescoreConfig,
    RunConfig,
    SamplingMeshConfig,
    preset_steps,
)
from magnet_jax.decode import placement, tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.io import bucket, machine
from magnet_jax.io.files import replacing_file
from magnet_jax.model import precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="MODEL")]
    """Folder of a training run, of an exported or imported model, or of an AudioCraft checkpoint,
    on disk or gs://; or a hub id; or demo, which ships."""
    out: Path
    """Folder for the WAV files; each gets a JSON file beside it with every setting."""
    prompt: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")
    ] = ()
    """Text of a clip; give it again for more clips."""
    unconditional: Annotated[int, Between(0, 100_000)] = 0
    """Clips to generate without text, after those of the prompts."""
    seed: Seed = 0
    """Clip i depends on the seed, on i and on its text: not on the other clips."""
    seconds: Seconds | None = None
    """Length of a clip; by default what the model was trained on. Longer clips of a MusicGen are
    generated in windows of that length, which overlap."""
    extend_stride: float | None = None
    """Of a MusicGen's clip longer than that: seconds by which the windows lie apart; None is 0.6
    of a window."""
    step: Index | None = None
    """Checkpoint to use; by default the newest."""
    weights: Literal["ema", "raw"] | None = None
    """Of a run: averaged weights (the default), or those of the last step."""
    preset: Preset | None = None
    """Decoding steps by name: paper (20 10 10 10, 50 passes), paper-30s (60 10 10 10, 90),
    balanced (20 5 5 5, 35; the paper finds no loss), draft (20 1 1 1, 23; 8 % worse).
    --decode.steps goes before it."""
    decode: DecodeConfig = DecodeConfig()
    """Schedule and sampling; the defaults are the model's: --checkpoint MODEL --help shows them."""
    autoregressive: AutoregressiveConfig = AutoregressiveConfig()
    """The same for a MusicGen, and for the beginning of a hybrid's clip."""
    prompt_seconds: PromptSeconds | None = None
    """Of a hybrid: seconds of a clip that are generated one step after another, before the rest is
    in parallel (docs/hybrid.md); 0 is none, the clip's length or more is all of it, None the
    model's own."""
    rescorer: Annotated[str | Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """A second model that takes part in choosing which spans are kept (docs/rescoring.md): a
    MusicGen, an AudioGen or another MAGNeT of the same codec, as for --checkpoint."""
    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores: 0 is no rescorer, 1 the rescorer alone. (The w of the
    paper's Figure 4; its equation 5 calls the other share w.)"""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""
    batch_size: Count = 8
    """Clips generated at once; it changes no clip but for rounding."""
    lufs: Annotated[float, Between(-70, 0)] | None = -14.0
    """Loudness of the files in LUFS; None keeps the model's own."""
    codec: str | None = None
    """Where the codec is, if it is no longer where the data set was made with it."""
    adapter: Path | None = None
    """Folder of low-rank adapters to add (launch.export --adapter-only)."""
    codec_backend: Literal["jax", "torch"] = "jax"
    """Decode audio in JAX, in one program with the tokens, or in PyTorch."""
    kernels: KernelConfig = KernelConfig()
    """How attention is computed."""
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    """How many devices are used."""
    text_encoder: str | None = None
    """Of an AudioCraft checkpoint: folder of its text encoder, where the hub is out of reach."""


def _file_name(index: int, prompt: str, seed: int) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    words = words or ("clip" if prompt else "unconditional")
    return f"{index:03d}-{words}-seed{seed}"


def _is_made(path: Path, notes: Path, settings: dict) -> bool:
    """Whether a WAV is there that was made so.

    Raises `UserError` if it was made otherwise, was changed since, or is somebody else's, as a JSON
    file may be too.
    """
    theirs = "is there, and launch.sample did not make it; name another --out, or move it away"
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
        before.get("kernels", {}).pop("products", None)  # (earlier releases had it)
        partners = (before.get("rescorer"), settings.get("rescorer"))
        for old, new in ((before, settings), partners):
            if old and new:  # (earlier releases did not say)
                old.setdefault("parameters", new["parameters"])
        changed = [k for k, v in json.loads(json.dumps(settings)).items() if before.get(k) != v]
    except FileNotFoundError:  # (the JSON is there before the WAV is)
        if path.exists():
            raise UserError(f"{path}: {theirs}") from None
        return False
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{notes}: {theirs}") from None
    if not path.exists():
        if not {"prompt", "seed", "checkpoint"} <= before.keys():
            raise UserError(f"{notes}: {theirs}")
        return False
    if changed:
        raise UserError(
            f"{path}: was made with other settings ({', '.join(changed)}); name another --out, or "
            "remove it"
        )
    digest = before.get("sha256")  # (earlier releases did not say)
    if digest and digest != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{path}: was changed since it was made; name another --out, or move it")
    return True


def sample(args: Args, names: Sequence[str] | None = None, notes: Path | None = None) -> list[Path]:
    """Writes one WAV and one JSON a clip and returns the WAVs' paths.

    Args:
      args: what to make.
      names: of the files, without suffix, one a clip; a batch whose files are there is then left
        as it is, so that a long list goes on where it was stopped.
      notes: folder for the JSON files; None is beside the WAVs.
    """
    check_fields(args, "--")
    for prompt in args.prompt:
        if prompt.encode(errors="replace").decode() != prompt:
            raise UserError(f"--prompt {prompt!r}: not valid UTF-8")
        if not prompt.strip():
            raise UserError(
                "--prompt is empty: give a text, or --unconditional 1 for a clip without"
            )
    texts = [*args.prompt, *[""] * args.unconditional]
    if not texts:
        raise UserError("nothing to do: give --prompt TEXT, or --unconditional N")
    if bucket.is_url(args.out):
        raise UserError(f"--out {args.out}: sampling needs a folder on disk; copy it from there")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the WAVs need a folder")
    rescoring = RescoreConfig(weight=args.rescorer_weight, guidance=args.rescorer_guidance)
    if args.rescorer is None and rescoring != RescoreConfig():
        raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer MODEL")
    # JAX is slow to load
    from magnet_jax import programs
    from magnet_jax.checkpoints import pretrained
    from magnet_jax.decode import rescore, sampling
    from magnet_jax.io import audio

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
    fingerprint = pretrained.fingerprint(loaded)
    decoder = pretrained.load_decoder(loaded, str(args.checkpoint), args.codec_backend)
    execution = placement.Execution(
        kernels=args.kernels, mesh=args.mesh, say=functools.partial(print, flush=True)
    )
    loaded = placement.prepare(loaded, execution)
    if args.codec_backend == "jax":
        decoder = placement.place(decoder, execution)
    config, spec = loaded.config, loaded.codec
    kind = config.model.kind
    if kind != "hybrid" and args.prompt_seconds is not None:
        raise UserError(f"--prompt-seconds is for models of kind hybrid; this is a {kind}")
    for name, missing in (("decode", "musicgen"), ("autoregressive", "magnet")):
        if kind == missing and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name} is not for models of kind {kind}, and this is one")
    decoding = args.autoregressive if kind == "musicgen" else args.decode
    seconds = args.seconds or config.data.segment_seconds
    if kind == "hybrid":
        prompt_seconds = args.prompt_seconds
        if prompt_seconds is None:
            prompt_seconds = config.prompt_seconds
        decoding = HybridConfig(
            prompt_seconds=min(prompt_seconds, seconds),  # (which is what the JSON is to say)
            autoregressive=args.autoregressive,
            decode=args.decode,
        )
    num_frames = round(seconds * spec.frame_rate)
    if num_frames < 1:
        raise UserError(f"--seconds {seconds:g} is shorter than a frame, {1 / spec.frame_rate:g} s")
    stride = None
    if kind != "musicgen" or num_frames <= sampling.segment_frames(config, spec):
        if args.extend_stride is not None:
            raise UserError(
                "--extend-stride is for a MusicGen's clips of more than "
                f"{config.data.segment_seconds:g} seconds: leave it out"
            )
    else:  # (one window does not hold the clip)
        stride = sampling.window_stride(loaded, args.extend_stride, "--extend-stride")
    second, rescorer = None, None
    if args.rescorer is not None:
        if config.model.parallel and rescoring.weight:
            whole = kind == "hybrid" and decoding.prompt_seconds >= seconds
            sampling.check_rescored(decoding, whole=whole)
        second = rescore.load(args.rescorer)
        rescorer = rescore.from_model(
            second,
            loaded,
            guidance=rescoring.guidance,
            weight=rescoring.weight,
            execution=execution,
            name=str(args.rescorer),
        )

    if kind == "hybrid":
        _check_effects(args, config, decoding, seconds)
    for note in tokens_of_text.notes_on_cut_texts(loaded, texts):
        print(note)
    if stride is None and seconds > 1.5 * config.data.segment_seconds:
        print(
            f"note: {seconds:g} s are asked of a model that was trained on clips of "
            f"{config.data.segment_seconds:g} s: it takes them, but has not learnt such lengths"
        )
    for note in tokens_of_text.notes_on_cut_texts(second, texts) if second else ():
        print(f"rescorer: {note}")
    common = {
        "seconds": seconds,
        "extend_stride": stride,
        "checkpoint": str(args.checkpoint),
        "adapter": args.adapter and str(args.adapter),
        "step": loaded.step,
        "weights": loaded.lineage.get("weights"),
        "parameters": fingerprint,
        "decode": dataclasses.asdict(decoding),
        "rescorer": second
        and {
            "checkpoint": str(args.rescorer),
            "step": second.step,
            "weights": second.lineage.get("weights"),
            "parameters": pretrained.fingerprint(second),
            **dataclasses.asdict(rescoring),
        },
        "compute_dtype": precision.compute_dtype(config).name,
        "codec_backend": args.codec_backend,
        "kernels": dataclasses.asdict(args.kernels),
        "mesh": dataclasses.asdict(args.mesh),
        "codec": dataclasses.asdict(spec),
        "wanted_lufs": args.lufs,
        "sample_rate": spec.sample_rate,
    }
    generate = sampling.generate
    if stride is None:
        generate = functools.partial(generate, rescorer=rescorer)
    else:
        generate = functools.partial(sampling.generate_in_windows, stride_seconds=stride)
    stems = names or [_file_name(i, text, args.seed) for i, text in enumerate(texts)]
    files = [args.out / f"{stem}.wav" for stem in stems]
    jsons = [(notes or args.out) / f"{stem}.json" for stem in stems]
    settings = [
        {"prompt": text, "seed": args.seed, "sample": i, **common} for i, text in enumerate(texts)
    ]
    made = [_is_made(*clip) for clip in zip(files, jsons, settings)]
    written = []
    for first in range(0, len(texts), args.batch_size):
        # A last, smaller batch is filled up: few shapes, few programs.
        batch = texts[first : first + args.batch_size]
        if names is not None and all(made[first : first + len(batch)]):
            written += files[first : first + len(batch)]
            continue
        filled = batch + [""] * (min(args.batch_size, len(texts)) - len(batch))
        started = time.perf_counter()
        generated = generate(
            loaded,
            filled,
            num_frames=num_frames,
            decoding=decoding,
            seed=args.seed,
            first_sample=first,
            decoder=decoder,
            execution=execution,
        )
        took = time.perf_counter() - started
        for i, wav_CN in enumerate(generated.wav_BCN[: len(batch)], start=first):
            wav_CN, loudness = wav_CN[:, : round(seconds * spec.sample_rate)], None
            if args.lufs is not None:
                wav_CN, loudness = audio.normalize_loudness(wav_CN, spec.sample_rate, args.lufs)
            content = audio.encoded(files[i], wav_CN, spec.sample_rate, **audio.WAV)
            digest = hashlib.sha256(content).hexdigest()
            about = settings[i] | {"reached_lufs": loudness, "sha256": digest}
            # Both are whole before either has its name; the JSON has it first, as a WAV without
            # one is somebody else's.
            with replacing_file(files[i]) as wav, replacing_file(jsons[i]) as beside:
                wav.write_bytes(content)
                beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            written.append(files[i])
            print(files[i])
        print(f"{len(batch)} clip{'s' * (len(batch) > 1)} of {seconds:g} s in {took:.1f} s")
    return written


def _check_effects(args: Args, config: RunConfig, decoding: HybridConfig, seconds: float) -> None:
    """Raises `UserError` for settings of the half of a hybrid that makes nothing of a clip."""
    for name, is_unused in (
        ("decode", decoding.prompt_seconds >= seconds),
        ("autoregressive", not decoding.prompt_seconds),
    ):
        if is_unused and getattr(args, name) not in (getattr(config, name), getattr(Args, name)):
            raise UserError(
                f"--{name} has no effect with --prompt-seconds "
                f"{decoding.prompt_seconds:g}: leave it out"
            )


def parse(args: list[str]) -> Args:
    """Reads the command line; the defaults of how tokens are chosen come from the model."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint")
    first.add_argument("--preset")
    found = first.parse_known_args(args)[0]
    given = {}
    if found.checkpoint:
        from magnet_jax.checkpoints import pretrained  # JAX is slow to load

        model, defaults = pretrained.read_defaults(found.checkpoint)
        if isinstance(defaults, HybridConfig):
            given = {
                "prompt_seconds": defaults.prompt_seconds,
                "autoregressive": defaults.autoregressive,
                "decode": defaults.decode,
            }
        else:
            given = {"autoregressive" if model.kind == "musicgen" else "decode": defaults}
    if found.preset in PRESETS:
        if given.keys() == {"autoregressive"}:
            raise UserError("--preset is not for models of kind musicgen, and this is one")
        decode = given.get("decode", DecodeConfig())
        steps = preset_steps(found.preset, len(decode.steps))
        given["decode"] = dataclasses.replace(decode, steps=steps)
    missing = {"checkpoint": tyro.MISSING, "out": tyro.MISSING}
    return cli.parse(
        Args,
        args,
        default=Args(**missing, **given),
        prog="python -m launch.sample",
        description=__doc__,
    )


if __name__ == "__main__":
    with errors.reported():
        sample(parse(sys.argv[1:]))
