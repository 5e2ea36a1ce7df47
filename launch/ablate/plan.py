"""From what is asked for to the runs and cells that it takes."""

import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import train as launch_train
from launch.ablate import report, studies
from launch.ablate.settings import (
    Common,
    Given,
    Guidance,
    Hybrid,
    Rescoring,
    Spans,
    Trained,
    checked,
)
from launch.ablate.studies import Setting, Study
from launch.ablate.work import Piece, claim
from launch.evaluate import clips, prompts, stages
from launch.evaluate import settings as evaluate
from magnet_jax import programs
from magnet_jax.checkpoints import pretrained, run_folder
from magnet_jax.codec import encodec
from magnet_jax.config import RescoreConfig, RunConfig, decode_of, with_hybrid_objective
from magnet_jax.convert import t5_files
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.evaluation import scores
from magnet_jax.io.trees import flatten
from magnet_jax.train import loop
from magnet_jax.train.setup import check_fit

CONFIG = "recipe_small"
LUFS = -14.0  # of every clip, real and generated
FIELD = "instrument"
# Options of launch.train that a study sets itself.
OURS = {"--out", "--seed", "--steps", "--data", "--data.segment-seconds", "--text.source",
        "--objective", "--model.kind", "--model.span-length"}  # fmt: skip


class Model(NamedTuple):
    """What a cell samples."""

    source: str
    """As for launch.sample."""
    settings: Mapping[str, Any]
    """All that it depends on."""
    run: tuple[Piece, ...]
    """Its training; () of a given one."""


class Prepared(NamedTuple):
    """What the two kinds of studies know of their models."""

    study: Study
    seconds: float
    codec: str
    """What the tokens are decoded with."""
    models: dict[Any, Model]
    """By name and seed; that of --checkpoint by None."""


def plan(args: Common) -> tuple[Study, list[Piece], evaluate.Args]:
    """The study, its runs and cells, one seed after another, and a cell's evaluation.

    Raises `UserError` for all that can be known to fail, and for runs and cells of other settings.
    """
    args = checked(args)
    listed = prompts.read(args.prompts)
    if args.clips > len(listed):
        raise UserError(
            f"--clips {args.clips}: must lie between 2 and {len(listed)}, the prompts in "
            f"{args.prompts}"
        )
    heard = _what_is_heard(args, listed[: args.clips])
    prepared = (_given if isinstance(args, Given) else _trained)(args)
    heard["seconds"] = prepared.seconds
    if args.probe is not None:
        codec = args.probe_codec or prepared.codec
        heard["probe_codec"] = encodec.read_spec(codec).sha256
    report.check_own(args.out, prepared.study.name)
    pieces: dict[Path, Piece] = {}  # which settings may share
    for seed in args.seeds:
        for setting in prepared.study.settings:
            cell, evaluation = _cell(args, prepared, setting, seed, heard)
            for piece in (*cell.needs, cell):
                pieces.setdefault(piece.folder, piece)
    for piece in pieces.values():
        if piece.folder.exists() or piece.claim.exists():
            claim(piece)  # which refuses what was begun with other settings
    return prepared.study, [*pieces.values()], evaluation


def _what_is_heard(args: Common, listed: Sequence[prompts.Prompt]) -> dict[str, Any]:
    """What the scores of all cells depend on."""
    reference = scores.find_audio(args.prompts)
    probe = None
    if args.probe is not None:
        captions = [prompt.text for prompt in listed]
        probe = clips.labelled(args.probe, FIELD, reference, captions).sha256
    return {
        "clips": args.clips,
        "lufs": LUFS,
        "captions": prompts.digest(listed),
        "reference": scores.digest(reference),
        "probe": probe,
        "probe_codec": None,
    }


def _cell(
    args: Common, prepared: Prepared, setting: Setting, seed: int, heard: Mapping[str, Any]
) -> tuple[Piece, evaluate.Args]:
    """A setting with a seed: clips and their scores; and what launch.evaluate is asked for."""
    key = None if setting.model is None else (setting.model, seed)
    model, needs, options = prepared.models[key], prepared.models[key].run, [*setting.options]
    rescorer = None
    if setting.rescorer is not None:
        rescorer = prepared.models[setting.rescorer, seed]
        needs += rescorer.run
        options += ["--rescorer", rescorer.source]
    elif key is None:
        options += ["--step", str(model.settings["step"])]
    folder = report.cell_folder(args.out, setting, seed)
    evaluation = evaluate.Args(
        checkpoint=model.source,
        prompts=args.prompts,
        limit=args.clips,
        reference=args.prompts,
        seconds=prepared.seconds,
        lufs=LUFS,
        seed=seed,
        resamples=0,
        out=folder,
        cache=args.out / "cache",
        sample_options=shlex.join([*options, "--batch-size", str(args.batch_size)]),
        probe=args.probe,
        probe_codec=args.probe and (args.probe_codec or prepared.codec),
        probe_round_trip=args.probe and args.out / "probe-round-trip",
    )
    settings = heard | {
        "model": model.settings,
        "rescorer": rescorer and rescorer.settings,
        "options": shlex.join(setting.options),
        "seed": seed,
    }
    command = shlex.join(["python", "-m", "launch.evaluate", *evaluate.words_of(evaluation)])
    label = f"clips and scores: {setting.label}, seed {seed}\n  {command}"
    cell = Piece(
        label, folder, "receipt.json", settings, needs, functools.partial(stages.run, evaluation)
    )
    return cell, evaluation


# --- a study that trains --------------------------------------------------------------------------


def _trained(args: Trained) -> Prepared:
    """The models of a study that trains them."""
    seconds = args.seconds or launch_train.load_config(CONFIG).data.segment_seconds
    study, base = _study_of_trained(args, seconds), _base(args, seconds)
    spec = records.read_codec_spec(args.data)
    found = encodec.read_spec(spec.source, spec.num_codebooks // spec.sides)
    if found.sha256 != spec.sha256:
        raise UserError(f"{args.data}: {spec.source} is no longer the codec that it was made with")
    text, parameters, tokenizer = t5_files.load(args.text)
    of = {"data": records.digest(args.data), "text": _hash(parameters, tokenizer.to_str())}
    models = {}
    for seed in args.seeds:
        for name in study.models:
            folder = report.run_folder(args.out, name, seed)
            config = _changed(dataclasses.replace(base, out=str(folder), seed=seed), name)
            check_fit(config, spec, text)
            settings = _settings_of(config) | of
            run = Piece(
                f"training: {name}, seed {seed}",
                folder,
                f"checkpoints/{config.steps}",
                settings,
                (),
                functools.partial(_train, config),
            )
            models[name, seed] = Model(str(folder), settings, (run,))
    return Prepared(study, seconds, spec.source, models)


def _study_of_trained(args: Trained, seconds: float) -> Study:
    if isinstance(args, Spans):
        return studies.spans()
    if isinstance(args, Rescoring):
        if RescoreConfig(weight=args.rescorer_weight).weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to compare")
        return studies.rescoring(args.rescorer_weight)
    assert isinstance(args, Hybrid)
    beginnings = args.prompt_seconds
    if beginnings is None:
        beginnings = [s for s in studies.PROMPT_SECONDS if s < seconds]
    if len(set(beginnings)) < len(beginnings) or not all(0 <= s < seconds for s in beginnings):
        raise UserError(
            f"--prompt-seconds: give each once, from 0 to below the clip's {seconds:g} s, "
            "which comes in addition"
        )
    return studies.hybrid(beginnings, seconds)


def _base(args: Trained, seconds: float) -> RunConfig:
    """What all runs of a study have in common."""
    further = shlex.split(args.train_options)
    names = {word.split("=")[0].replace("_", "-") for word in further}
    if given := sorted(names & OURS):
        raise UserError(
            f"--train-options: leave out {', '.join(given)}, which the study has options for or "
            "varies"
        )
    count = args.train_steps
    asked = {
        "optimizer.schedule-steps": count,
        "optimizer.warmup-steps": min(100, count // 10),
        "eval-every": count,
        "save-every": max(1, count // 10),
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    config = launch_train.parse(["--config", CONFIG, *words, *further])
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(args.data), segment_seconds=seconds),
        text=dataclasses.replace(config.text, source=args.text),
        steps=count,
    )


def _changed(config: RunConfig, name: str) -> RunConfig:
    """The run of a model of `studies.MODELS`."""
    if name == studies.HYBRID:
        return with_hybrid_objective(config)
    model = dataclasses.replace(config.model, **studies.MODELS[name])
    return dataclasses.replace(config, model=model)


def _settings_of(config: RunConfig) -> dict[str, Any]:
    """All settings of a run but those that its clips and losses do not depend on."""
    free = run_folder.MUTABLE - {"steps", "decode", "autoregressive", "eval_batches"}
    return {
        name: value
        for name, value in flatten(dataclasses.asdict(config), separator=".").items()
        if not {name, name.split(".")[0]} & (free | {"text.source"})
    }


def _train(config: RunConfig) -> None:
    programs.keep_on_disk()
    loop.train(config)


def _hash(parameters: Any, text: str) -> str:
    """Of a tree of arrays and a text."""
    found = hashlib.sha256(text.encode())
    for path, leaf in jax.tree.leaves_with_path(parameters):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


# --- a study of a given model ---------------------------------------------------------------------


def _given(args: Given) -> Prepared:
    """The model of a study that trains none."""
    model, own = pretrained.read_defaults(args.checkpoint)
    if not model.parallel:
        raise UserError(
            f"--checkpoint {args.checkpoint}: a model of kind {model.kind} has no such settings; "
            "name a MAGNeT or a hybrid"
        )
    loaded = pretrained.load(args.checkpoint, step=args.step)
    decode = decode_of(own)
    if isinstance(args, Guidance):
        study = studies.guidance(decode.steps)
    else:
        own_guidance = (decode.max_guidance, decode.min_guidance)
        study = studies.steps(model.num_codebooks, own_guidance)
    settings = {
        "step": loaded.step,
        "parameters": pretrained.fingerprint(loaded),
        "sampling": dataclasses.asdict(own),
    }
    seconds = args.seconds or loaded.config.data.segment_seconds
    models = {None: Model(args.checkpoint, settings, ())}
    return Prepared(study, seconds, loaded.codec_source, models)
