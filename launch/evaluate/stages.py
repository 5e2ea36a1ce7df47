"""The evaluation, stage by stage: each takes what those before it gave, and nothing else."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch import sample
from launch.evaluate import clips, picture, prompts
from launch.evaluate.clips import Labelled, Row
from launch.evaluate.receipt import receipt, table
from launch.evaluate.settings import Args, checked
from magnet_jax.errors import UserError
from magnet_jax.evaluation import probe, scores
from magnet_jax.evaluation.embedders import Embedder, load
from magnet_jax.evaluation.scores import Clips
from magnet_jax.io.files import held, replacing_file

if TYPE_CHECKING:
    from launch.evaluate.tunes import Real
    from magnet_jax.codec.encodec import Codec


class Inputs(NamedTuple):
    """What is there before anything is generated or heard."""

    listed: list[prompts.Prompt] | None
    """--prompts."""
    reference: dict[str, Path]
    """{} without --reference."""
    generated: Row | None
    """--generated."""
    labelled: Labelled | None
    """--probe."""


class Heard(NamedTuple):
    """A network, and what it makes of the real clips."""

    network: Embedder
    reference: Clips | None
    probes: dict[str, probe.Probe]
    """Fitted to the clips of --probe, by the names of their scores."""


class Ready(NamedTuple):
    """All that can be known to fail has been done; clips may be generated."""

    inputs: Inputs
    sampler: sample.Args | None
    """What makes the clips; None with --generated."""
    heard: list[Heard]
    probe_codec: str | None
    """The hash of --probe-codec."""
    codec: "Codec | None"
    """The model's, for --baselines."""
    tunes: "Real | None"
    """For --notes."""


def run(args: Args) -> dict[str, Any]:
    """Scores, prints the table, writes the receipt and returns it.

    Raises `UserError` for what cannot be had.
    """
    args = checked(args)
    ready = make_ready(args)
    inputs = ready.inputs
    row, model = inputs.generated, None
    if ready.sampler is not None:
        row, model = generate(args, ready.sampler, inputs)
    if args.picture is not None:
        picture.draw(args.picture, row, inputs.reference, args.listening)
    real_captions = clips.captions_of_reference(row, inputs.reference)
    rows = {"generated": row}
    if ready.codec is not None:
        rows |= baseline_rows(args, ready.codec, row, inputs.reference, real_captions)
    found = score(args, ready, rows, real_captions)
    written = receipt(
        args,
        networks=[heard.network for heard in ready.heard],
        transcriber=ready.tunes and ready.tunes.transcriber.sha256,
        model=model,
        listed=inputs.listed,
        labelled=inputs.labelled,
        probe_codec=ready.probe_codec,
        rows=rows,
        reference=inputs.reference,
        found=found,
    )
    with replacing_file(args.out / "receipt.json") as temporary:
        temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    if inputs.reference:
        print("(reference: FAD of one half to the other, KL of each clip to another one)")
        if args.notes:
            print("(notes: tune distance of two draws of real clips, F1 of each with another one)")
    print(args.out / "receipt.json")
    return written


def prepare(args: Args) -> None:
    """Makes what is kept of real clips, in --cache and --probe-round-trip, for later calls of
    `run`.

    The model need not be there yet. Raises `UserError` for what cannot be had.
    """
    args = checked(args)
    inputs = read_inputs(args)
    hear_real(args, inputs)
    hear_tunes(args, inputs)


def make_ready(args: Args) -> Ready:
    """All that comes before hours of sampling.

    Raises `UserError` for whatever is missing or does not fit.
    """
    inputs = read_inputs(args)
    sampler = None if args.checkpoint is None else make_sampler(args, inputs.listed)
    codec = baseline_codec(args, sampler, inputs.listed) if args.baselines else None
    heard, probe_codec = hear_real(args, inputs)
    return Ready(inputs, sampler, heard, probe_codec, codec, hear_tunes(args, inputs))


def read_inputs(args: Args) -> Inputs:
    """The lists and clips that are named; raises `UserError` where they are none."""
    listed = None if args.prompts is None else prompts.read(args.prompts, args.limit)
    reference = {} if args.reference is None else scores.find_audio(args.reference)
    generated = None if args.generated is None else clips.match(args.generated, listed, reference)
    labelled = None
    if args.probe is not None:
        captions = (
            [prompt.text for prompt in listed] if generated is None else generated.captions.values()
        )
        labelled = clips.labelled(args.probe, args.probe_field, reference, captions)
    return Inputs(listed, reference, generated, labelled)


def make_sampler(args: Args, listed: list[prompts.Prompt]) -> sample.Args:
    """What launch.sample is asked for.

    Raises `UserError` for --sample-options that set what the evaluation itself decides.
    """
    ours = {
        "checkpoint": args.checkpoint,
        "out": args.out / "generated",
        "seed": args.seed,
        "lufs": "off" if args.lufs is None else args.lufs,
        "seconds": args.seconds,
    }
    try:
        further = shlex.split(args.sample_options)
    except ValueError as error:
        raise UserError(f"--sample-options: cannot be read as options ({error})") from None
    words = [word for name, value in ours.items() for word in (f"--{name}", str(value))]
    parsed = sample.parse([*words, *further])
    ours |= {"prompt": (), "unconditional": 0}
    given = [f"--{name}" for name, value in ours.items() if getattr(parsed, name) != value]
    if given:
        raise UserError(
            f"--sample-options: leave out {', '.join(given)}: the clips are those of --prompts, "
            "and launch.evaluate has options of its own for the rest"
        )
    return dataclasses.replace(parsed, prompt=tuple(prompt.text for prompt in listed))


# --- real clips -----------------------------------------------------------------------------------


def hear_real(args: Args, inputs: Inputs) -> tuple[list[Heard], str | None]:
    """What each network makes of the real clips; and the hash of --probe-codec."""
    networks = [load(name, getattr(args.weights, name)) for name in args.embedders]
    decoded, probe_codec = {}, None
    if args.probe_codec is not None:
        decoded, probe_codec = round_trip_of_probe(args, inputs.labelled)
    heard = []
    for network in networks:
        real = None
        if inputs.reference:
            real = scores.embed(
                network, inputs.reference, args.listening, cache=args.cache, what="reference"
            )
        probes = {}
        if inputs.labelled is not None:
            probes = fit_probes(args, network, inputs.labelled, decoded)
        heard.append(Heard(network, real, probes))
    return heard, probe_codec


def hear_tunes(args: Args, inputs: Inputs) -> "Real | None":
    """What the transcriber makes of the real clips; None without --notes."""
    if not args.notes:
        return None
    from launch.evaluate import tunes  # which imports JAX, slowly

    return tunes.hear_real(args, inputs.reference)


def round_trip_of_probe(args: Args, labelled: Labelled) -> tuple[dict[str, Path], str]:
    """The clips of --probe as --probe-codec plays them, and the codec's hash."""
    from launch.evaluate import baselines  # which imports JAX, slowly
    from magnet_jax.codec.encodec import load_codec

    codec = load_codec(args.probe_codec)
    folder = args.probe_round_trip or args.out / "probe-round-trip"
    # Evaluations of other lengths and codecs share the place: each way has a folder of its own.
    about = baselines.about_round_trip(codec, labelled.sha256, args.listening)
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    with held(folder / f"{name}.lock", f"waiting for the process that is at {folder}"):
        written = baselines.begin(folder / name, folder, list(labelled.files), about)
        baselines.codec_round_trip(codec, labelled.files, args.listening, written)
    return written, codec.spec.sha256


def fit_probes(
    args: Args, network: Embedder, labelled: Labelled, decoded: dict[str, Path]
) -> dict[str, probe.Probe]:
    """Classifiers of what a network makes of the clips of --probe, by the names of their scores.

    Raises `UserError` where the clips are too few for the network.
    """
    heard = scores.embed(network, labelled.files, args.listening, cache=args.cache, what="probe")
    rows = {name: row.embeddings_PE for name, row in heard.embedded.items()}
    try:
        fitted = {"probe": probe.fit(rows, labelled.labels)}
    except ValueError as error:
        raise UserError(
            f"--probe {args.probe}: {error} ({network.name} makes a row of each piece of a clip): "
            "add clips"
        ) from None
    if decoded:
        # What the codec made was brought to its length and loudness before.
        heard = scores.embed(network, decoded, cache=args.cache, what="probe, codec")
        rows = {
            name: np.concatenate([rows[name], row.embeddings_PE])
            for name, row in heard.embedded.items()
        }
        fitted["probe_codec"] = probe.fit(rows, labelled.labels)
    return fitted


# --- clips that are made --------------------------------------------------------------------------


def generate(args: Args, sampler: sample.Args, inputs: Inputs) -> tuple[Row, dict[str, Any]]:
    """Makes the clips, or those of them that are not there; also returns what made them."""
    names = [prompt.id for prompt in inputs.listed]
    sample.sample(sampler, names, args.settings)
    lines = "".join(f"{json.dumps({'id': p.id, 'caption': p.text})}\n" for p in inputs.listed)
    with replacing_file(args.out / "prompts.jsonl") as temporary:
        temporary.write_text(lines, encoding="utf-8")
    made = json.loads((args.settings / f"{names[0]}.json").read_text())
    for name in ("prompt", "sample", "reached_lufs", "sha256"):
        made.pop(name, None)
    return clips.match(args.out / "generated", inputs.listed, inputs.reference), made


def baseline_codec(args: Args, sampler: sample.Args, listed: list[prompts.Prompt]) -> "Codec":
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


def baseline_rows(
    args: Args,
    codec: "Codec",
    made: Row,
    reference: dict[str, Path],
    real_captions: dict[str, str],
) -> dict[str, Row]:
    """What a model's clips are held against."""
    from launch.evaluate import baselines

    about = baselines.about_round_trip(codec, scores.digest(reference), args.listening)
    decoded = baselines.begin(args.out / "codec-round-trip", args.settings, list(reference), about)
    baselines.codec_round_trip(codec, reference, args.listening, decoded)
    num_frames = round(args.seconds * codec.spec.frame_rate)
    about = baselines.about_unigrams(args.data, num_frames, args.seed)
    drawn = baselines.begin(args.out / "unigram-tokens", args.settings, list(made.files), about)
    baselines.unigram_tokens(codec, args.data, drawn, num_frames=num_frames, seed=args.seed)
    others = _shuffled(list(made.captions), args.seed)
    shuffled = Row(
        made.files,
        {name: made.captions[other] for name, other in others.items()},
        {name: made.pairs[other] for name, other in others.items() if other in made.pairs},
    )
    return {
        "shuffled captions": shuffled,
        "unigram tokens": Row(drawn, made.captions, made.pairs),
        "codec round trip": Row(decoded, real_captions, {name: name for name in reference}),
    }


def _shuffled(names: list[str], seed: int) -> dict[str, str]:
    """Another one for each, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[i]: names[j] for i, j in zip(order, np.roll(order, 1))}


# --- scores ---------------------------------------------------------------------------------------


def score(
    args: Args, ready: Ready, rows: Mapping[str, Row], real_captions: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The scores of each row, and of the reference, by the names of networks; and 'notes'."""
    settings = scores.Settings(resamples=args.resamples, seed=args.seed)
    found: dict[str, dict[str, Any]] = {name: {} for name in rows}
    for network, reference, probes in ready.heard:
        embedded: dict[tuple[Path, ...], Clips] = {}  # shuffled captions are of the same clips
        for name, row in rows.items():
            key = tuple(row.files.values())
            if key not in embedded:
                embedded[key] = scores.embed(network, row.files, args.listening, what=name)
            found[name][network.name] = scores.score(
                network,
                embedded[key],
                captions=row.captions,
                reference=reference,
                pairs=row.pairs,
                probes=probes,
                settings=settings,
            )
        if reference is not None:
            found.setdefault("reference", {})[network.name] = scores.score_reference(
                network, reference, captions=real_captions, probes=probes, settings=settings
            )
    if ready.tunes is not None:
        from launch.evaluate import tunes

        for name, row in tunes.score(args, ready.tunes, rows, real_captions).items():
            found.setdefault(name, {})["notes"] = row
    return found
