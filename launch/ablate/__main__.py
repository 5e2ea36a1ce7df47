"""The command line of the ablations; see the package."""

import contextlib
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from launch import ablate
from launch import train as launch_train
from launch.ablate import report, studies
from launch.ablate.studies import Setting, Study
from launch.evaluate import __main__ as evaluate
from launch.evaluate import prompts
from magnet_jax import cli, errors
from magnet_jax.config import DecodeConfig, HybridConfig, RescoreConfig, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.evaluation import scores
from magnet_jax.io import bucket, files, machine
from magnet_jax.io.trees import flatten

CONFIG = "recipe_small"
LUFS = -14.0  # of every clip, real and generated
FIELD = "instrument"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    out: Path = Path("runs/ablations")
    """Folder of all studies: they share runs and cells that are alike."""
    prompts: Path = Path("data/recipe/test")
    """Folder of real clips with sidecars: captions to generate from, and the reference."""
    clips: int = 64
    """Clips a cell: so many prompts, from the beginning of the list."""
    probe: Path | None = Path("data/recipe/valid")
    """Folder of further real clips, for launch.evaluate's probes of the instrument; None for
    none."""
    probe_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """What the second probe hears them through; None is the codec of the tokens."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training and sampling, or of sampling alone; more may be added later."""
    seconds: float | None = None
    """Length of a clip, where models are trained in training too; None is the model's own."""
    batch_size: int = 8
    """Clips generated at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Common):
    data: Path = Path("data/tokens")
    """Folder that tokenization.job wrote."""
    text: str = "data/text"
    """Text encoder, as for --text.source of launch.train; it is trained along."""
    train_steps: int = 1000
    """Steps of each model; the learning rate has fallen to 0 after them."""
    train_options: str = ""
    """Further options of launch.train for all models, as --train-options="--model.width 64"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Common):
    checkpoint: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A MAGNeT or a hybrid, as for launch.sample."""
    step: int | None = None
    """Of a run: the checkpoint to use; None is the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Trained):
    """Trains with spans of 1, 3 and 5 frames, with restricted and with full context: Table 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(Given):
    """Samples with guidance 1 to 1, 3 to 3, 10 to 1 and 20 to 1: Table 6."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Given):
    """Samples with 5 to 100 steps of the first codebook, 1 to 20 of each other: Fig. 7."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescoring(Trained):
    """Trains a MAGNeT and a hybrid, and lets the hybrid's autoregressive half rescore: Table 3."""

    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(Trained):
    """Trains a hybrid, and lets it make beginnings of several lengths: Fig. 2c."""

    prompt_seconds: tuple[float, ...] | None = None
    """Of the beginnings, by default 0, 0.5, 1 and 2; the whole clip comes in addition."""


Command = (
    Annotated[Spans, tyro.conf.subcommand("spans", description=Spans.__doc__)]
    | Annotated[Guidance, tyro.conf.subcommand("guidance", description=Guidance.__doc__)]
    | Annotated[Steps, tyro.conf.subcommand("steps", description=Steps.__doc__)]
    | Annotated[Rescoring, tyro.conf.subcommand("rescoring", description=Rescoring.__doc__)]
    | Annotated[Hybrid, tyro.conf.subcommand("hybrid", description=Hybrid.__doc__)]
)


class Run(NamedTuple):
    """A model to train."""

    words: list[str]
    """Of launch.train."""
    config: RunConfig
    settings: dict[str, Any]
    """All that the model depends on."""

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def is_trained(self) -> bool:
        """Whether its last checkpoint is there."""
        return (self.folder / "checkpoints" / str(self.config.steps)).is_dir()


class Cell(NamedTuple):
    """A setting with a seed: clips and their scores."""

    setting: Setting
    seed: int
    folder: Path
    words: list[str]
    """Of launch.evaluate."""
    runs: list[Run]
    """What is trained for it."""
    settings: dict[str, Any]
    """All that its scores depend on."""

    @property
    def receipt(self) -> Path:
        """There when the cell is done."""
        return self.folder / "receipt.json"


def run(args: Common) -> dict[str, Any]:
    """Does what is left of a study; returns what `report.gather` then finds.

    Raises `UserError` for what cannot be had, before anything is trained or generated, and for
    runs and cells of other settings.
    """
    study, cells = plan(args)
    began = time.perf_counter()

    def say(cell: Cell, module: str, words: Sequence[str]) -> None:
        done = sum(cell.receipt.exists() for cell in cells)
        title = f"[{done} of {len(cells)} done, {time.perf_counter() - began:.0f} s]"
        command = shlex.join(["python", "-m", module, *words])
        print(f"\n{title} {cell.setting.label}, seed {cell.seed}\n  {command}", flush=True)

    def write() -> tuple[dict[str, Any], str]:
        with _held(args.out, args.out / study.name, wait=True):
            found = report.gather(args.out, study, args.seeds)
            return found, report.write(args.out, found)

    left, wait = [cell for cell in cells if not cell.receipt.exists()], False
    if left:  # (several processes would get in each other's way)
        with _held(args.out, args.out / "cache", wait=True):
            evaluate.prepare(_evaluation(left[0].words))
    while left:
        before = len(left)
        for cell in left:
            if make(cell, args.out, say, wait):
                write()
        left = [cell for cell in left if not cell.receipt.exists()]
        wait = len(left) == before  # (other processes are at all of them)
    found, table = write()
    print(f"\n{table}")
    print(", ".join(f"{args.out / study.name}.{suffix}" for suffix in ("json", "md", "png")))
    return found


def make(cell: Cell, out: Path, say: Callable[..., None], wait: bool) -> bool:
    """Trains what a cell needs, generates and scores; False where another process is at it.

    Args:
      cell: which.
      out: the folder of all studies.
      say: told of each command, as (cell, module, words), before it begins.
      wait: whether to wait for the other process.
    """
    with _held(out, cell.folder, wait) as mine:
        if not mine:
            return False
        if cell.receipt.exists():
            return True
        for each in cell.runs:
            if each.is_trained():
                continue
            with _held(out, each.folder, wait) as mine:
                if not mine:
                    return False
                if not each.is_trained():
                    say(cell, "launch.train", each.words)
                    _claim(each.folder, each.settings)
                    launch_train.main(each.words)
        say(cell, "launch.evaluate", cell.words)
        _claim(cell.folder, cell.settings)
        evaluate.run(_evaluation(cell.words), cell.words)
    return True


def _held(out: Path, folder: Path, wait: bool) -> contextlib.AbstractContextManager[bool]:
    """Keeps other processes from what is made in a folder; False where one is at it, unless it is
    to `wait`."""
    path = out / "locks" / f"{folder.parent.name}-{folder.name}"
    return files.held(path, f"waiting for the process that is at {folder}" if wait else None)


# --- what is to be done, and whether it can be ----------------------------------------------------


def plan(args: Common) -> tuple[Study, list[Cell]]:
    """The study and its cells, one seed after another.

    Raises `UserError` for all that can be known to fail.
    """
    _check(args)
    listed, reference = prompts.read(args.prompts), scores.find_audio(args.prompts)
    if not 2 <= args.clips <= len(listed):
        raise UserError(
            f"--clips {args.clips}: must lie between 2 and {len(listed)}, the prompts in "
            f"{args.prompts}"
        )
    common = {
        "clips": args.clips,
        "lufs": LUFS,
        "captions": _sha256(json.dumps([prompt[:2] for prompt in listed[: args.clips]])),
        "reference": scores.digest(reference),
        "probe": None,
        "probe_codec": None,
    }
    if args.probe is not None:
        captions = [prompt.text for prompt in listed[: args.clips]]
        clips, _ = evaluate.labelled_clips(args.probe, FIELD, reference, captions)
        common["probe"] = scores.digest(clips)
    study, seconds, codec, models = (_given if isinstance(args, Given) else _trained)(args)
    if args.probe is not None:
        from magnet_jax.codec.encodec import read_spec  # JAX is slow to load

        common["probe_codec"] = read_spec(args.probe_codec or codec).sha256
    common["seconds"] = seconds
    cells = []
    for seed in args.seeds:
        for setting in study.settings:
            folder = report.cell_folder(args.out, setting, seed)
            names = [name for name in (setting.model, setting.rescorer) if name is not None]
            runs = [models[name, seed] for name in names]
            options = list(setting.options)
            if setting.model is None:
                of, path = models[None].settings, args.checkpoint
                options += ["--step", str(of["step"])]
            else:
                of, path = runs[0].settings, runs[0].config.out
            if setting.rescorer is not None:
                options += ["--rescorer", runs[1].config.out]
            options += ["--batch-size", str(args.batch_size)]
            words = [
                "--checkpoint", path, "--prompts", str(args.prompts), "--limit", str(args.clips),
                "--reference", str(args.prompts), "--seconds", f"{seconds}",
                "--lufs", f"{LUFS:g}", "--seed", str(seed), "--resamples", "0",
                "--out", str(folder), "--cache", str(args.out / "cache"),
                f"--sample-options={shlex.join(options)}",
            ]  # fmt: skip
            if args.probe is not None:
                words += ["--probe", str(args.probe), "--probe-field", FIELD]
                words += ["--probe-codec", args.probe_codec or codec]
                words += ["--probe-round-trip", str(args.out / "probe-round-trip")]
            settings = common | {
                "model": of,
                "rescorer": runs[1].settings if setting.rescorer else None,
                "options": shlex.join(setting.options),
                "seed": seed,
            }
            cells.append(Cell(setting, seed, folder, words, runs, settings))
    _check_summary(args.out, study.name)
    for each in {each.folder: each for cell in cells for each in cell.runs}.values():
        _check_claim(each.folder, each.settings)
    for cell in cells:
        _check_claim(cell.folder, cell.settings)
        _evaluation(cell.words)
    return study, cells


def _check(args: Common) -> None:
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: give one at least, and each once")
    if not all(0 <= seed < 2**31 for seed in args.seeds):
        raise UserError("--seeds must lie between 0 and 2147483647")
    if args.seconds is not None and not 0 < args.seconds <= 600:
        raise UserError("--seconds must be positive, and at most 600")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if args.probe_codec is not None and args.probe is None:
        raise UserError("--probe-codec goes with --probe FOLDER")
    if bucket.is_url(args.out):
        raise UserError(f"--out {args.out}: needs a folder on disk; copy it from there")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the studies need a folder")
    if not args.prompts.is_dir():
        raise UserError(
            f"--prompts {args.prompts}: no such folder; tokenization.recipe makes one, see "
            "docs/recipe.md"
        )


def _evaluation(words: Sequence[str]) -> evaluate.Args:
    return cli.parse(evaluate.Args, words, prog="python -m launch.evaluate")


class _Prepared(NamedTuple):
    """What the two kinds of studies know of their models."""

    study: Study
    seconds: float
    codec: str
    """What the tokens are decoded with."""
    models: dict[Any, Run]
    """By name and seed; that of --checkpoint by None."""


def _trained(args: Trained) -> _Prepared:
    """The runs of a study that trains."""
    if args.train_steps < 1:
        raise UserError("--train-steps must be at least 1")
    seconds = args.seconds or launch_train.load_config(CONFIG).data.segment_seconds
    if isinstance(args, Spans):
        study = studies.spans()
    elif isinstance(args, Rescoring):
        if RescoreConfig(weight=args.rescorer_weight).weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to compare")
        study = studies.rescoring(args.rescorer_weight)
    else:
        beginnings = args.prompt_seconds
        if beginnings is None:
            beginnings = [s for s in studies.PROMPT_SECONDS if s < seconds]
        if len(set(beginnings)) < len(beginnings) or not all(0 <= s < seconds for s in beginnings):
            raise UserError(
                f"--prompt-seconds: give each once, from 0 to below the clip's {seconds:g} s, "
                "which comes in addition"
            )
        study = studies.hybrid(beginnings, seconds)
    configs = {}
    for seed in args.seeds:
        for name in study.models:
            words = _train_words(args, name, seed, seconds)
            configs[name, seed] = (words, launch_train.parse(words))
            config = configs[name, seed][1]
            kept = (config.out, config.seed, config.steps, config.data.segment_seconds)
            out = report.run_folder(args.out, name, seed)
            if kept != (str(out), seed, args.train_steps, seconds):
                raise UserError(
                    "--train-options: leave out --out, --seed, --steps and --data.segment-seconds, "
                    "which the study has options for"
                )
    from magnet_jax.checkpoints import run_folder
    from magnet_jax.codec import encodec
    from magnet_jax.train.setup import check_fit

    spec = records.read_codec_spec(args.data)
    found = encodec.read_spec(spec.source, spec.num_codebooks // spec.sides)
    if found.sha256 != spec.sha256:
        raise UserError(f"{args.data}: {spec.source} is no longer the codec that it was made with")
    text, parameters, tokenizer = t5_files.load(args.text)
    of = {"data": records.digest(args.data), "text": _hash(parameters, tokenizer.to_str())}
    # What a run may change when it goes on, but for what its clips and losses depend on.
    free = run_folder.MUTABLE - {"steps", "decode", "autoregressive", "eval_batches"}
    models = {}
    for key, (words, config) in configs.items():
        check_fit(config, spec, text)
        settings = {
            name: value
            for name, value in flatten(dataclasses.asdict(config), separator=".").items()
            if not {name, name.split(".")[0]} & (free | {"text.source"})
        }
        models[key] = Run(words, config, settings | of)
    return _Prepared(study, seconds, spec.source, models)


def _train_words(args: Trained, name: str, seed: int, seconds: float) -> list[str]:
    """Of launch.train."""
    count = args.train_steps
    return [
        "--config", CONFIG, "--data", str(args.data), "--text.source", args.text,
        "--out", str(report.run_folder(args.out, name, seed)), "--seed", str(seed),
        "--data.segment-seconds", f"{seconds}", "--steps", str(count),
        "--optimizer.schedule-steps", str(count),
        "--optimizer.warmup-steps", str(min(100, count // 10)),
        "--eval-every", str(count), "--save-every", str(max(1, count // 10)),
        *studies.MODELS[name], *shlex.split(args.train_options),
    ]  # fmt: skip


def _given(args: Given) -> _Prepared:
    """The model of a study that trains none."""
    from magnet_jax.checkpoints import pretrained  # JAX is slow to load

    model, own = pretrained.read_defaults(args.checkpoint)
    if not model.parallel:
        raise UserError(
            f"--checkpoint {args.checkpoint}: a model of kind {model.kind} has no such settings; "
            "name a MAGNeT or a hybrid"
        )
    loaded = pretrained.load(args.checkpoint, step=args.step)
    decode: DecodeConfig = own.decode if isinstance(own, HybridConfig) else own
    if isinstance(args, Guidance):
        study = studies.guidance(decode.steps)
    else:
        own_guidance = (decode.max_guidance, decode.min_guidance)
        study = studies.steps(model.num_codebooks, own_guidance)
    settings = {
        "step": loaded.step,
        "parameters": _hash(loaded.params, ""),
        "sampling": dataclasses.asdict(own),
    }
    seconds = args.seconds or loaded.config.data.segment_seconds
    run = Run([], loaded.config, settings)
    return _Prepared(study, seconds, loaded.codec_source, {None: run})


# --- settings, so that nothing is mixed -----------------------------------------------------------


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(parameters: Any, text: str) -> str:
    """Of a tree of arrays and a text."""
    import jax

    found = hashlib.sha256(text.encode())
    for path, leaf in jax.tree.leaves_with_path(parameters):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _claim_path(folder: Path) -> Path:
    """Beside a run or a cell: what it was begun with."""
    return folder.with_name(f"{folder.name}.json")


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(_claim_path(folder), json.dumps(settings, indent=2) + "\n")


def _check_claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises `UserError` if a run or a cell was begun with other settings."""
    path = _claim_path(folder)
    if not path.exists():
        if folder.exists():
            raise UserError(f"{folder}: was not made by launch.ablate; name another --out")
        return
    before, now = (
        flatten(values, separator=".")
        for values in (files.read_object(path, ""), json.loads(json.dumps(settings)))
    )
    changed = [
        f"{name} (was {before.get(name)!r:.40}, now {now.get(name)!r:.40})"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder}: was made with other settings: {'; '.join(changed[:3])}{more}; give these, "
            f"name another --out, or remove it and {path.name}"
        )


def _check_summary(out: Path, study: str) -> None:
    """Raises `UserError` for files of a study's name that no study wrote."""
    first, *others = (out / f"{study}.{suffix}" for suffix in ("json", "md", "png"))
    if first.exists():
        theirs = [first] if files.read_object(first, "").get("study") != study else []
    else:  # (which is written first)
        theirs = [path for path in others if path.exists()]
    if theirs:
        raise UserError(f"{theirs[0]}: was not made by launch.ablate; name another --out")


def main(words: Sequence[str]) -> None:
    """Does what the words ask for."""
    machine.keep_freed()
    run(cli.parse(Command, words, prog="python -m launch.ablate", description=ablate.__doc__))


if __name__ == "__main__":
    with errors.reported():
        main(sys.argv[1:])
