"""Edits a sound file: what is asked for is made anew, every other sample stays as it was.

python -m launch.edit inpaint --checkpoint demo --audio song.wav --region 2:4.5 --out new.wav
"""

import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from launch.sample import Steering, is_made, steered
from magnet_jax import cli, prompts
from magnet_jax.arguments import RARE, Between, Count, Index, Seconds, Seed, check_fields
from magnet_jax.config import CodecSpec, EditConfig, Share
from magnet_jax.errors import UserError, reported
from magnet_jax.io.files import PICTURES, check_new_file, make_folder, replacing_file
from magnet_jax.prompts import Description

if TYPE_CHECKING:
    from magnet_jax.api import MAGNeT
    from magnet_jax.editing import Clip, Edit

Added = Annotated[float, Between(0, 3600)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all edits have in common."""

    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="MODEL")]
    """The model, named as for launch.sample: a folder, a hub id or the word demo."""
    audio: Path
    """The sound file. It is never changed."""
    out: Path
    """The file to write, of a kind that holds the samples exactly: .wav, or .flac or .aiff."""
    prompt: str | None = None
    """Text for what is made anew. By default it is the text that is kept with a clip of
    launch.sample, and no text for any other file."""
    steering: Steering = Steering()
    """More texts."""
    seed: Seed = 0
    """Seed of the random numbers."""
    edge: Literal["outside", "inside"] = EditConfig.edge
    """outside makes all of a region new, and changes a little around it as well. inside changes no
    sample outside a region, and makes a little less of it new."""
    fade: Annotated[float, Between(0, 10)] = EditConfig.fade
    """Seconds of the cross-fades between an edit and a file that was not made here."""
    side: Literal["fade", "keep"] = EditConfig.side
    """What becomes of a file's difference between left and right where the codec is mono: fade
    takes it away within a region, keep leaves it."""
    picture: Path | None = None
    """PNG, PDF or SVG file for spectrograms before and after, and how sure the model is."""
    codec: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the codec is, if it is no longer where the data set was made with it."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of a run to use, as for launch.sample."""
    step: Index | None = None
    """Checkpoint of a run to use. By default it is the newest."""
    above: Annotated[Literal["hidden", "shown"], RARE] = EditConfig.above
    """Whether the codebooks above the one that is predicted are hidden everywhere, as in training,
    or shown where they are known."""
    anneal: Annotated[Literal["rate", "count"], RARE] = EditConfig.anneal
    """Whether guidance and temperature go by how much of the clip is hidden, or begin as for a
    whole clip."""
    steps: Annotated[Literal["auto", "all"], RARE] = EditConfig.steps
    """Whether there are fewer decoding steps where less is hidden."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(Options):
    """Makes regions of a file anew."""

    region: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="BEGIN:END")
    ] = ()
    """A region in seconds, such as 2:4.5, or 7: up to the end. Give it again for more of them."""
    codebooks: tuple[int, ...] = ()
    """Codebooks that are made anew, counted from 0, with those above them. By default all are."""
    mask: Path | None = None
    """In place of regions, a NumPy file of bool [T] or [K, T], True where a token is made anew. Or
    a sound file, which is not silent there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extend(Options):
    """Makes a file longer."""

    before: Added = 0.0
    """Seconds to add before it."""
    after: Added = 0.0
    """Seconds to add behind it."""
    context: Annotated[float, Between(0, 1e6, above=True)] = EditConfig.context
    """Seconds of the file that the model hears meanwhile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Between_(Options):
    """Joins two files by music that goes on from one and leads to the other."""

    then: Path
    """The second sound file, of the same rate, channels and kind of samples."""
    seconds: Seconds
    """Seconds of music between both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restyle(Options):
    """Gives a file another style, that of --prompt."""

    strength: Share = 0.5
    """How much changes, from 0 to 1: first what is above the lower codebooks, then these too."""
    how: Literal["spans", "replay"] = "spans"
    """spans keeps lower codebooks, or every few spans of the first one. replay says the file again
    under the new text, with the chance that would have made it under the original text."""
    original: str | None = None
    """For replay, the text that the file has now. By default it is the one that is kept with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vary(Options):
    """Makes siblings of a file; those after the first are named NAME-2.wav and so on."""

    variation: Share = 0.3
    """Share of the spans that are made anew."""
    count: Annotated[Count, Between(1, 100)] = 4
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair(Options):
    """Makes the spans anew that the model finds least likely, if that makes the file likelier."""

    worst: Share = 0.1
    """Share of the spans."""
    rounds: Annotated[Count, Between(1, 100)] = 1
    """How often."""


Command = (
    Annotated[Inpaint, tyro.conf.subcommand("inpaint")]
    | Annotated[Extend, tyro.conf.subcommand("extend")]
    | Annotated[Between_, tyro.conf.subcommand("between")]
    | Annotated[Restyle, tyro.conf.subcommand("restyle")]
    | Annotated[Vary, tyro.conf.subcommand("vary")]
    | Annotated[Repair, tyro.conf.subcommand("repair")]
)


def region_of(text: str) -> tuple[float, float | None]:
    """Seconds of BEGIN:END, of which the end may be left out."""
    begin, colon, end = text.partition(":")
    try:
        seconds = float(begin or 0), float(end) if end else None
        if colon and np.isfinite([s for s in seconds if s is not None]).all():
            return seconds
    except ValueError:
        pass
    raise UserError(f"--region {text}: must be BEGIN:END in seconds, such as 2:4.5 or 7:")


def mask_of(path: Path, model: "MAGNeT") -> np.ndarray:
    """A mask of tokens, of a NumPy file or of where a sound file is not silent."""
    from magnet_jax.io import exact

    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"--mask {path}: cannot be read as a NumPy array ({error})") from None
    source = exact.read(path)
    loud_N = np.abs(source.as_float()).max(1) > 1e-3
    places_N = np.flatnonzero(loud_N) * model.frame_rate / source.sample_rate
    mask_T = np.zeros(int(np.ceil(len(loud_N) * model.frame_rate / source.sample_rate)), bool)
    mask_T[places_N.astype(int)] = True
    return mask_T


def check(args: Options) -> None:
    """Raises `UserError` for what is wrong whatever the model is."""
    check_fields(args, "--")
    check_new_file("--picture", args.picture, PICTURES)
    if isinstance(args, Inpaint) and bool(args.region) == (args.mask is not None):
        raise UserError("nothing to do: give --region BEGIN:END, or --mask FILE, and not both")
    for text in getattr(args, "region", ()):
        region_of(text)
    if isinstance(args, Extend) and not (args.before or args.after):
        raise UserError("nothing to do: give --before SECONDS or --after SECONDS")
    description_of(args)
    if isinstance(args, Restyle) and (args.prompt, args.steering.at) == (None, ()):
        raise UserError("give --prompt TEXT, the new style")


def description_of(args: Options) -> Description | None:
    """The text for what is made anew; None is the one that is kept with the clip."""
    said = args.prompt is not None or args.steering != Steering()
    return steered(args.prompt, args.steering) if said else None


def text_of(args: Options, clip: "Clip") -> Description:
    """The text that a clip was edited with."""
    given = description_of(args)
    return clip.text if given is None else prompts.completed(given, clip.text)


def files_of(args: Options) -> list[Path]:
    """The files to be written; each gets a JSON file of its name, and perhaps one of tokens."""
    numbers = range(2, getattr(args, "count", 1) + 1)
    return [args.out, *(args.out.with_stem(f"{args.out.stem}-{n}") for n in numbers)]


def settings_of(args: Options) -> dict[str, Any]:
    """What an edit is made from, for the JSON files."""
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(args).items()
        if name not in ("picture", "codec", "steering")  # which change nothing, or are the prompt
    }
    description = description_of(args)
    values["prompt"] = None if description is None else prompts.as_json(description)
    hashes = {}
    for name in ("audio", "then", "mask"):
        if (path := getattr(args, name, None)) is not None:
            try:
                hashes[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"--{name} {path}: cannot be read ({error.strerror})") from None
    return {"edit": type(args).__name__.lower().strip("_"), **values, **hashes}


def check_out(args: Options, settings: dict[str, Any]) -> None:
    """Raises `UserError` where a file that this edit did not make would be replaced."""
    from magnet_jax.edit import kept
    from magnet_jax.io import exact

    exact.check_name(exact.read(args.audio), args.out)
    make_folder("--out", args.out.parent)
    sources = [path for path in (args.audio, getattr(args, "then", None)) if path is not None]
    names = {source.with_suffix("").resolve() for source in sources}
    for path in files_of(args):
        if path.with_suffix("").resolve() in names:
            raise UserError(
                f"--out {path}: is the file that is edited, or has its name; name another one"
            )
    for path in files_of(args):
        made = is_made(path, path.with_suffix(".json"), settings, by="launch.edit")
        tokens = path.with_suffix(kept.SUFFIX)
        if not made and tokens.exists():
            raise UserError(f"{tokens}: is there; name another --out, or move it away")


def edited(args: Options, model: "MAGNeT") -> "Edit":
    """What is asked for."""
    # Without a bar: a program that reports its progress would not be kept on disk.
    how = {"descriptions": description_of(args), "seed": args.seed}
    match args:
        case Inpaint():
            return model.generate_inpainting(
                args.audio,
                regions=[region_of(text) for text in args.region] or None,
                codebooks=args.codebooks or None,
                mask=args.mask and mask_of(args.mask, model),
                **how,
            )
        case Extend():
            return model.generate_extension(args.audio, before=args.before, after=args.after, **how)
        case Between_():
            return model.generate_between(args.audio, args.then, args.seconds, **how)
        case Restyle():
            return model.generate_restyle(
                args.audio, strength=args.strength, how=args.how, original=args.original, **how
            )
        case Vary():
            return model.generate_variations(
                args.audio, n=args.count, variation=args.variation, **how
            )
        case Repair():
            return model.repair(args.audio, worst=args.worst, rounds=args.rounds, **how)


def open_model(args: Options) -> "MAGNeT":
    # JAX is slow to load
    from magnet_jax import api, programs
    from magnet_jax.checkpoints import pretrained
    from magnet_jax.decode import placement

    programs.keep_on_disk()
    loaded = pretrained.load(
        args.checkpoint, weights=args.weights, step=args.step, codec=args.codec
    )
    decoder = pretrained.load_decoder(loaded, str(args.checkpoint), "jax")
    execution = placement.Execution(say=functools.partial(print, flush=True))
    model = api.of_kind(loaded, decoder, execution)
    if not isinstance(args, Extend):
        model.check_parallel(type(args).__name__.lower().strip("_"))
    model.set_edit_params(
        args.edge, args.fade, args.side, getattr(args, "context", None),
        above=args.above, anneal=args.anneal, steps=args.steps,
    )  # fmt: skip
    return model


def write(
    path: Path, edit: "Edit", number: int, text: Description, model: dict[str, Any], settings: dict
) -> None:
    """A clip, its tokens, and how it was made; `model` says by which parameters and codec."""
    from magnet_jax.edit import kept

    about = settings | model | {"sample_rate": edit.sample_rate, "changed": edit.changed[number]}

    def note() -> None:
        with replacing_file(path.with_suffix(".json")) as file:
            file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    note()  # first, as a sound file without one is somebody else's
    edit.write(path, number)
    clip = edit.clips[number]
    if clip.own:
        kept.save(
            path, edit.tokens_BKT[number], CodecSpec(**model["codec"]), text=text,
            seed=settings["seed"], settings=settings,
        )  # fmt: skip
    about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    note()
    ranges = ", ".join(
        f"{a / edit.sample_rate:.3f} to {b / edit.sample_rate:.3f} s"
        for a, b in edit.changed[number]
    )
    print(f"{path}: {'changed ' + ranges if ranges else 'nothing changed'}")


def main(args: Options) -> None:
    check(args)
    settings = settings_of(args)
    check_out(args, settings)
    model = open_model(args)
    from magnet_jax.checkpoints import pretrained  # JAX is slow to load

    edit = edited(args, model)
    about = {
        "parameters": pretrained.fingerprint(model.loaded),
        "codec": dataclasses.asdict(model.loaded.codec),
    }
    for number, path in enumerate(files_of(args)):
        write(path, edit, number, text_of(args, edit.clips[number]), about, settings)
    if args.picture is not None:
        from magnet_jax.edit import picture

        clip = edit.clips[0]
        before_CN = np.pad(clip.source.as_float().T, ((0, 0), (edit.before, 0)))
        picture.draw(
            args.picture,
            before_CN,
            edit.as_float(0),
            edit.sample_rate,
            edit.changed[0],
            confidence_KT=(
                model.confidence(edit.tokens_BKT[:1], [text_of(args, clip)])[0]
                if model.is_parallel
                else None
            ),
            frame_rate=model.frame_rate,
        )
        print(args.picture)


def parse(words: list[str]) -> Any:
    return cli.parse(Command, words, prog="python -m launch.edit", description=__doc__)


if __name__ == "__main__":
    with reported():
        main(parse(sys.argv[1:]))
