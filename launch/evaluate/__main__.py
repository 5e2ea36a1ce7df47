"""The command line of the evaluation; see the package."""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import platformdirs
import tyro

from launch import evaluate, sample
from launch.evaluate import prompts
from magnet_jax import cli, errors
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.evaluation import probe, scores
from magnet_jax.evaluation.embedders import DEFAULT_WEIGHTS, Embedder, Name, load
from magnet_jax.evaluation.scores import Clips, Listening
from magnet_jax.io import bucket
from magnet_jax.io.files import held, read_object, replacing_file

if TYPE_CHECKING:
    from magnet_jax.codec.encodec import Codec

_FORMAT = "magnet_jax evaluation 1"
# The columns of the table, as far as there is anything in them.
COLUMNS = {
    "fad": "FAD",
    "kl": "KL",
    "clap": "CLAP",
    "tag_auc": "tag AUC",
    "tag_top5": "tags in 5",
    "probe": "probe",
    "probe_codec": "probe, codec",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Where an embedder's weights are: a folder, a file or a hub id, as docs/evaluation.md says."""

    musicnn: str = DEFAULT_WEIGHTS["musicnn"]
    vggish: str = DEFAULT_WEIGHTS["vggish"]
    passt: str = DEFAULT_WEIGHTS["passt"]
    clap: str = DEFAULT_WEIGHTS["clap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """Folder for receipt.json and for what is generated."""
    generated: Path | None = None
    """Folder of generated audio, a file a clip, named by its id."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Model that generates the clips instead, from --prompts; as for launch.sample."""
    prompts: Path | None = None
    """Ids and captions: .csv (MusicCaps, AudioCaps and others), .jsonl, .txt, or a folder of
    clips with sidecars. Of a --generated folder the captions may also lie beside its clips."""
    limit: int | None = None
    """Only so many prompts, from the beginning of the list."""
    reference: Path | None = None
    """Folder of real audio, for FAD and KL: for KL, clips of the same ids."""
    embedders: tuple[Name, ...] = ("musicnn",)
    """Networks to listen with: musicnn ships, docs/evaluation.md has the others."""
    weights: Weights = Weights()
    """Where the embedders' weights are."""
    probe: Path | None = None
    """Folder of further real clips with sidecars: a small classifier learns --probe-field from
    them, and is asked whether it hears what the captions name."""
    probe_field: str = "instrument"
    """Of the .json files in --probe."""
    probe_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """Fit a second classifier to the clips of --probe and to what this codec makes of them, which
    does not take a codec's sound for another instrument; as for tokenization.job."""
    probe_round_trip: Path | None = None
    """Folder for what that codec makes of them, which any evaluations may share; by default
    OUT/probe-round-trip."""
    lufs: float | None = None
    """Bring every clip, real and generated, to this loudness first, such as -14."""
    seconds: float | None = None
    """Listen to only so much of each clip; also the length that is generated. With --checkpoint
    by default what the model was trained on, else all."""
    seed: int = 0
    """Of the clips that are generated, and of everything drawn for the scores."""
    resamples: int = 200
    """Draws behind each interval (95 %); 0 for none."""
    baselines: bool = False
    """Score beside the model: shuffled captions, its codec alone, unigram tokens of --data."""
    data: Path | None = None
    """Folder that tokenization.job wrote, for --baselines."""
    sample_options: str = ""
    """Further options of launch.sample, as --sample-options="--preset draft --batch-size 4"."""
    cache: Path = Path(platformdirs.user_cache_dir("magnet_jax")) / "evaluation"
    """Folder in which what embedders make of real clips is kept."""


class _Row(NamedTuple):
    """A line of the table: clips, and what they are held against."""

    files: dict[str, Path]
    captions: dict[str, str]
    pairs: dict[str, str]
    """Ids of their reference clips."""


def run(args: Args, words: Sequence[str]) -> dict[str, Any]:
    """Scores, prints the table, writes the receipt and returns it; `words` are kept in it.

    Raises `UserError` for what cannot be had.
    """
    args = _checked(args)
    listed, reference, generated = _inputs(args)
    sampler = None if args.checkpoint is None else _sampler(args, listed)
    listening, labelled = _real_clips(args, listed, reference, generated)
    # Whatever is missing is to be said before hours of sampling.
    networks = [load(name, getattr(args.weights, name)) for name in args.embedders]
    settings = scores.Settings(resamples=args.resamples, seed=args.seed)

    model = None
    heard_real = [
        _listen_to_real(args, network, listening, reference, labelled) for network in networks
    ]
    codec = _baseline_codec(args, sampler, listed) if args.baselines else None
    if sampler is not None:
        model = _generate(args, sampler, listed)
        generated = _match(args.out / "generated", listed, reference)
    rows = {"generated": generated}
    both = generated.pairs.keys() & generated.captions.keys()
    real_captions = {generated.pairs[name]: generated.captions[name] for name in both}
    for name, path in reference.items():
        if name not in real_captions and (text := prompts.sidecar(path)):
            real_captions[name] = text
    if args.baselines:
        rows |= _baselines(args, codec, model["seconds"], generated, reference, real_captions)

    found: dict[str, dict[str, Any]] = {name: {} for name in rows}
    for network, (real, fitted) in zip(networks, heard_real):
        heard: dict[tuple[Path, ...], Clips] = {}  # shuffled captions are of the same clips
        for name, row in rows.items():
            key = tuple(row.files.values())
            if key not in heard:
                heard[key] = scores.embed(network, row.files, listening, what=name)
            found[name][network.name] = scores.score(
                network,
                heard[key],
                captions=row.captions,
                reference=real,
                pairs=row.pairs,
                probes=fitted,
                settings=settings,
            )
        if real is not None:
            found.setdefault("reference", {})[network.name] = scores.score_reference(
                network, real, captions=real_captions, probes=fitted, settings=settings
            )
    sets = {name: row.files for name, row in rows.items()}
    sets |= {"reference": reference, "probe": {} if labelled is None else labelled.files}
    receipt = {
        "format": _FORMAT,
        "command": shlex.join(["python", "-m", "launch.evaluate", *words]),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("magnet-jax", "jax", "numpy", "soxr", "torch", "transformers")
        },
        "settings": dataclasses.asdict(listening) | dataclasses.asdict(settings),
        "embedders": {
            network.name: {
                "weights": network.weights,
                "sha256": network.sha256,
                "sample_rate": network.sample_rate,
                "pieces": network.pieces,
            }
            for network in networks
        },
        "model": model,
        "data": args.data and records.digest(args.data),
        "prompts": args.prompts and {"path": str(args.prompts), "sha256": _hash(listed)},
        "probe": labelled
        and {
            "field": args.probe_field,
            "labels": sorted(set(labelled.labels.values())),
            "codec": labelled.codec_sha256,
        },
        "clips_with_captions": len(generated.captions),
        "clips_with_reference": len(generated.pairs),
        "sets": {name: _described(files) for name, files in sets.items() if files},
        "scores": found,
    }
    with replacing_file(args.out / "receipt.json") as temporary:
        temporary.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    if reference:
        print("(reference: FAD of one half to the other, KL of each clip to another one)")
    print(args.out / "receipt.json")
    return receipt


def prepare(args: Args) -> None:
    """Makes what is kept of real clips, in --cache and --probe-round-trip, for later calls of
    `run`.

    Raises `UserError` for what cannot be had.
    """
    args = _checked(args)
    listed, reference, generated = _inputs(args)
    listening, labelled = _real_clips(args, listed, reference, generated)
    for name in args.embedders:
        network = load(name, getattr(args.weights, name))
        _listen_to_real(args, network, listening, reference, labelled)


def _checked(args: Args) -> Args:
    """The arguments, with the model's length where none is given."""
    if (args.generated is None) == (args.checkpoint is None):
        raise UserError("give --generated FOLDER, or --checkpoint MODEL and --prompts LIST")
    if args.checkpoint is not None and args.prompts is None:
        raise UserError("--checkpoint generates from a list: give --prompts FILE")
    if args.baselines and None in (args.checkpoint, args.reference, args.data):
        raise UserError(
            "--baselines needs --checkpoint MODEL, --reference FOLDER and --data TOKENS"
        )
    if args.probe_codec is not None and args.probe is None:
        raise UserError("--probe-codec goes with --probe FOLDER")
    if args.probe_round_trip is not None and args.probe_codec is None:
        raise UserError("--probe-round-trip goes with --probe-codec CODEC")
    if args.data is not None and not args.baselines:
        raise UserError("--data is for --baselines")
    if args.limit is not None and (args.limit < 1 or args.prompts is None):
        raise UserError("--limit must be at least 1, and goes with --prompts")
    if args.probe is None and args.probe_field != Args.probe_field:
        raise UserError("--probe-field goes with --probe FOLDER")
    if args.checkpoint is None and args.sample_options:
        raise UserError("--sample-options is for clips that are generated: give --checkpoint MODEL")
    for name, source in dataclasses.asdict(args.weights).items():
        if name not in args.embedders and source != DEFAULT_WEIGHTS[name]:
            raise UserError(f"--weights.{name} goes with --embedders {name}")
    if not args.embedders or len(set(args.embedders)) < len(args.embedders):
        raise UserError("--embedders: name each once, and one at least")
    if args.lufs is not None and not -70 <= args.lufs <= 0:
        raise UserError("--lufs must lie between -70 and 0")
    if args.seconds is not None and not 0 < args.seconds <= 600:
        raise UserError("--seconds must be positive, and at most 600")
    if not 0 <= args.seed < 2**31:
        raise UserError("--seed must lie between 0 and 2147483647")
    if args.resamples < 0:
        raise UserError("--resamples must not be negative")
    for option in ("out", "generated", "reference", "prompts", "probe", "probe_round_trip"):
        if (path := getattr(args, option)) is not None and bucket.is_url(path):
            option = option.replace("_", "-")
            raise UserError(
                f"--{option} {path}: needs a file or folder on disk; copy it from there"
            )
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the receipt needs a folder")
    _check_own(args)
    if args.seconds is None and args.checkpoint is not None:
        from magnet_jax.checkpoints import pretrained  # JAX is slow to load

        seconds = pretrained.read_settings(args.checkpoint).data.segment_seconds
        return dataclasses.replace(args, seconds=seconds)
    return args


def _check_own(args: Args) -> None:
    """Raises `UserError` for files that would be replaced and that no evaluation wrote."""
    receipt, listed = args.out / "receipt.json", args.out / "prompts.jsonl"
    if receipt.exists() and read_object(receipt, "").get("format") != _FORMAT:
        raise UserError(f"{receipt}: is there, and no evaluation wrote it; name another --out")
    if args.checkpoint is None or not listed.exists():
        return
    is_cut = args.limit is not None and listed.resolve() == args.prompts.resolve()
    if is_cut or not (args.out / "settings").is_dir():
        raise UserError(f"{listed}: would be replaced by the list that is used; name another --out")


def _inputs(args: Args) -> tuple[list[prompts.Prompt] | None, dict[str, Path], _Row | None]:
    """The list of prompts, the reference ({} without) and the clips of --generated."""
    listed = None if args.prompts is None else prompts.read(args.prompts, args.limit)
    reference = {} if args.reference is None else scores.find_audio(args.reference)
    generated = None if args.generated is None else _match(args.generated, listed, reference)
    return listed, reference, generated


class _Labelled(NamedTuple):
    """Clips to fit a probe to."""

    files: dict[str, Path]
    labels: dict[str, str]
    decoded: dict[str, Path]
    """The same clips as --probe-codec plays them; {} without one."""
    codec_sha256: str | None


def labelled_clips(
    folder: Path, field: str, reference: Mapping[str, Path], captions: Iterable[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """The clips of --probe whose sidecars have the field, and what they have there.

    Raises `UserError` for fewer than two labels, for labels that none of the generated clips'
    captions names, and for clips that are in the reference as well.
    """
    files = scores.find_audio(folder)
    labels = {}
    for name, path in files.items():
        value = prompts.fields(path).get(field)
        if isinstance(value, str) and value.strip():
            labels[name] = value.strip()
    if len(set(labels.values())) < 2:
        raise UserError(
            f"--probe {folder}: needs clips of two labels at least, under {field!r} in the .json "
            "beside each"
        )
    known = sorted(set(labels.values()))
    if not any(probe.named_label(known, caption) for caption in captions):
        raise UserError(
            f"--probe {folder}: no caption names a label of its clips, such as {known[0]!r}; name "
            "another --probe-field, or leave out --probe"
        )
    files = {name: files[name] for name in labels}
    both = set(scores.hashes(files).values()) & set(scores.hashes(reference).values())
    if both:
        raise UserError(
            f"--probe {folder}: {len(both)} of its clips are in --reference as well, which "
            "would tell nothing: name other clips"
        )
    return files, labels


def _labelled(
    args: Args, reference: Mapping[str, Path], listening: Listening, captions: Iterable[str]
) -> _Labelled:
    """`labelled_clips`, and the same as --probe-codec plays them."""
    files, labels = labelled_clips(args.probe, args.probe_field, reference, captions)
    if args.probe_codec is None:
        return _Labelled(files, labels, {}, None)
    from launch.evaluate import baselines  # (which imports JAX, slowly)
    from magnet_jax.codec.encodec import load_codec

    codec = load_codec(args.probe_codec)
    folder = args.probe_round_trip or args.out / "probe-round-trip"
    # (a folder for each way to make them: evaluations of other lengths and codecs share the place)
    about = baselines.about_round_trip(codec, files, listening)
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    with held(folder / f"{name}.lock", f"waiting for the process that is at {folder}"):
        decoded = baselines.codec_round_trip(
            codec, files, listening, out=folder / name, notes=folder
        )
    return _Labelled(files, labels, decoded, codec.spec.sha256)


def _real_clips(
    args: Args,
    listed: list[prompts.Prompt] | None,
    reference: Mapping[str, Path],
    generated: _Row | None,
) -> tuple[Listening, _Labelled | None]:
    """How clips are heard, and what probes are fitted to; of `_inputs`."""
    listening = Listening(lufs=args.lufs, seconds=args.seconds)
    if args.probe is None:
        return listening, None
    if generated is None:
        captions = [prompt.text for prompt in listed]
    else:
        captions = generated.captions.values()
    return listening, _labelled(args, reference, listening, captions)


def _listen_to_real(
    args: Args,
    network: Embedder,
    listening: Listening,
    reference: dict[str, Path],
    labelled: _Labelled | None,
) -> tuple[Clips | None, dict[str, probe.Probe]]:
    """What a network makes of the reference, and the probes by their names in the scores.

    Raises `UserError` where the clips of --probe are too few for the network.
    """
    real = None
    if reference:
        real = scores.embed(network, reference, listening, cache=args.cache, what="reference")
    if labelled is None:
        return real, {}
    clips = scores.embed(network, labelled.files, listening, cache=args.cache, what="probe")
    rows = {name: row.embeddings_PE for name, row in clips.embedded.items()}
    try:
        fitted = {"probe": probe.fit(rows, labelled.labels)}
    except ValueError as error:
        raise UserError(
            f"--probe {args.probe}: {error} ({network.name} makes a row of each piece of a clip): "
            "add clips"
        ) from None
    if labelled.decoded:
        # (what the codec made was brought to its length and loudness before)
        clips = scores.embed(network, labelled.decoded, cache=args.cache, what="probe, codec")
        rows = {
            name: np.concatenate([rows[name], row.embeddings_PE])
            for name, row in clips.embedded.items()
        }
        fitted["probe_codec"] = probe.fit(rows, labelled.labels)
    return real, fitted


def _sampler(args: Args, listed: list[prompts.Prompt]) -> sample.Args:
    """What launch.sample is asked for.

    Raises `UserError` for --sample-options that set what the evaluation itself decides.
    """
    words = ["--checkpoint", args.checkpoint, "--out", str(args.out / "generated")]
    words += ["--seed", str(args.seed), "--lufs", "off" if args.lufs is None else str(args.lufs)]
    words += [] if args.seconds is None else ["--seconds", str(args.seconds)]
    try:
        further = shlex.split(args.sample_options)
    except ValueError as error:
        raise UserError(f"--sample-options: cannot be read as options ({error})") from None
    parsed = sample.parse([*words, *further])
    ours = {
        "checkpoint": args.checkpoint,
        "out": args.out / "generated",
        "seed": args.seed,
        "lufs": "off" if args.lufs is None else args.lufs,
        "seconds": args.seconds,
        "prompt": (),
        "unconditional": 0,
    }
    given = [f"--{name}" for name, value in ours.items() if getattr(parsed, name) != value]
    if given:
        raise UserError(
            f"--sample-options: leave out {', '.join(given)}: the clips are those of --prompts, "
            "and launch.evaluate has options of its own for the rest"
        )
    return dataclasses.replace(parsed, prompt=tuple(prompt.text for prompt in listed))


def _generate(args: Args, sampler: sample.Args, listed: list[prompts.Prompt]) -> dict[str, Any]:
    """Makes the clips, or those of them that are not there; returns what made them."""
    # (fadtk takes whatever lies in the folder for audio, so the settings lie beside it)
    notes = args.out / "settings"
    names = [prompt.id for prompt in listed]
    sample.sample(sampler, names, notes)
    lines = "".join(f"{json.dumps({'id': p.id, 'caption': p.text})}\n" for p in listed)
    with replacing_file(args.out / "prompts.jsonl") as temporary:
        temporary.write_text(lines, encoding="utf-8")
    made = json.loads((notes / f"{names[0]}.json").read_text())
    for name in ("prompt", "sample", "reached_lufs", "sha256"):
        made.pop(name, None)
    return made


def _match(
    folder: Path,
    listed: list[prompts.Prompt] | None,
    reference: Mapping[str, Path],
) -> _Row:
    """The generated clips with their captions and reference clips: by the list, or by sidecars.

    Raises `UserError` if there is nothing to hold any of them against.
    """
    files = scores.find_audio(folder)
    if listed is not None:
        made, real = _by_name(files), _by_name(reference)
        there = [prompt for prompt in listed if prompt.id in made]
        if not there:
            raise UserError(
                f"{folder}: none of its clips is called as --prompts has them, such as "
                f"{listed[0].id}"
            )
        if len(there) < len(listed):
            missing = next(prompt.id for prompt in listed if prompt.id not in made)
            print(
                f"note: {folder} has {len(there)} of the {len(listed)} clips that --prompts lists, "
                f"and not {missing}: only these are scored"
            )
        pairs = {}
        for prompt in there:
            name = next((name for name in (prompt.id, *prompt.names) if name in real), None)
            if name is not None:
                pairs[prompt.id] = real[name]
        captions = {prompt.id: prompt.text for prompt in there}
        row = _Row({prompt.id: files[made[prompt.id]] for prompt in there}, captions, pairs)
        _say_pairs(row, reference)
        return row
    real = _by_name(reference)
    pairs = {name: real[name] for name in files if name in real}
    captions = {}
    for name, path in files.items():
        text = prompts.sidecar(path) or (name in pairs and prompts.sidecar(reference[pairs[name]]))
        if text:
            captions[name] = text
    if not captions and not reference:
        raise UserError(
            f"{folder}: no captions beside its clips; give --prompts FILE or --reference FOLDER"
        )
    row = _Row(files, captions, pairs)
    _say_pairs(row, reference)
    return row


def _by_name(files: Mapping[str, Path]) -> dict[str, str]:
    """Ids of clips by themselves, and by their last part where that is of one clip alone."""
    names = collections.Counter(path.stem for path in files.values())
    alone = {path.stem: name for name, path in files.items() if names[path.stem] == 1}
    return alone | {name: name for name in files}


def _say_pairs(row: _Row, reference: Mapping[str, Path]) -> None:
    if reference and len(row.pairs) < len(row.files):
        print(
            f"note: {len(row.pairs)} of the {len(row.files)} clips have a reference clip of their "
            "name: KL is of these"
        )


def _baseline_codec(args: Args, sampler: sample.Args, listed: list[prompts.Prompt]) -> "Codec":
    """The model's codec; raises `UserError` for --data of another one, and for too few prompts."""
    from launch.evaluate import baselines
    from magnet_jax.checkpoints import pretrained  # JAX is slow to load

    if len(listed) < 2:
        raise UserError("--baselines shuffles captions: give two prompts at least")
    loaded = pretrained.load(
        args.checkpoint,
        weights=sampler.weights,
        step=sampler.step,
        text_encoder=sampler.text_encoder,
        codec=sampler.codec,
    )
    codec = pretrained.load_decoder(loaded, args.checkpoint, "torch")  # which encodes as well
    baselines.check_data(args.data, codec.spec)
    return codec


def _baselines(
    args: Args,
    codec: "Codec",
    seconds: float,
    generated: _Row,
    reference: dict[str, Path],
    real_captions: dict[str, str],
) -> dict[str, _Row]:
    from launch.evaluate import baselines

    notes = args.out / "settings"
    decoded = baselines.codec_round_trip(
        codec,
        reference,
        Listening(lufs=args.lufs, seconds=args.seconds),
        out=args.out / "codec-round-trip",
        notes=notes,
    )
    drawn = baselines.unigram_tokens(
        codec,
        args.data,
        list(generated.files),
        num_frames=round(seconds * codec.spec.frame_rate),
        seed=args.seed,
        out=args.out / "unigram-tokens",
        notes=notes,
    )
    others = _shuffled(list(generated.captions), args.seed)
    return {
        "shuffled captions": _Row(
            generated.files,
            {name: generated.captions[other] for name, other in others.items()},
            {
                name: generated.pairs[other]
                for name, other in others.items()
                if other in generated.pairs
            },
        ),
        "unigram tokens": _Row(drawn, generated.captions, generated.pairs),
        "codec round trip": _Row(decoded, real_captions, {name: name for name in reference}),
    }


def _shuffled(names: list[str], seed: int) -> dict[str, str]:
    """Another one for each, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[i]: names[j] for i, j in zip(order, np.roll(order, 1))}


def _described(files: Mapping[str, Path]) -> dict[str, Any]:
    rates, channels, lengths = zip(*map(scores.describe, files.values()), strict=True)
    return {
        "path": os.path.commonpath([path.parent for path in files.values()]),
        "sha256": scores.digest(files),
        "clips": len(files),
        "sample_rates": sorted(set(rates)),
        "channels": sorted(set(channels)),
        "seconds": [min(lengths), max(lengths)],
    }


def _hash(listed: list[prompts.Prompt]) -> str:
    return hashlib.sha256(json.dumps([prompt[:2] for prompt in listed]).encode()).hexdigest()


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The scores as lines for people: each with its interval where there is one."""
    lines = []
    for network in next(iter(found.values())):
        columns = [key for key in COLUMNS if any(key in row[network] for row in found.values())]
        cells = [[network, *(COLUMNS[key] for key in columns)]]
        for name, row in found.items():
            cells.append([name, *(_cell(row[network].get(key)) for key in columns)])
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
    return "\n".join(lines)


def _cell(score: Mapping[str, float | None] | None) -> str:
    if score is None:
        return "-"
    # (what is zero but for rounding reads as 0)
    value, *ends = (
        f"{round(number, 4) + 0.0:.3g}"
        for number in (score["value"], score["low"], score["high"])
        if number is not None
    )
    return f"{value} [{', '.join(ends)}]" if ends else value


def main(words: Sequence[str]) -> None:
    """Does what the words ask for."""
    args = cli.parse(Args, words, prog="python -m launch.evaluate", description=evaluate.__doc__)
    run(args, words)


if __name__ == "__main__":
    with errors.reported():
        main(sys.argv[1:])
