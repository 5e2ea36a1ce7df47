"""A run's folder: its config, its codec and text encoder, and its checkpoints.

RUN/config.json              the resolved RunConfig
RUN/codec.json, RUN/codec/   what tokens mean; a copy of the codec if it came from a folder
RUN/text/                    the text encoder as the run started with it, and its tokenizer
RUN/base.safetensors         the transformer that adapters are trained for
RUN/step.json                the mesh, parts and recomputation of its steps (train/plan.py)
RUN/checkpoints/STEP/        parameters, their average (ema), optimizer, data position
RUN/tensorboard/, RUN/samples/

RUN may be in a bucket (bucket.py): its checkpoints are written there, and all else in a local
folder that stands for it, `run` below.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from safetensors.numpy import save_file

from magnet_jax.checkpoints import items
from magnet_jax.config import CodecSpec, LoraConfig, ModelConfig, RunConfig, from_json, to_json
from magnet_jax.convert import t5_files
from magnet_jax.data import records
from magnet_jax.errors import UserError, silenced
from magnet_jax.io import bucket, files, lock, trees
from magnet_jax.model import lora, t5, transformer

# Settings that may change when a run goes on: what is trained is the same without them. Each
# setting is here or in tests/checkpoints/test_run_folder.py.
MUTABLE = {"out", "steps", "log_every", "eval_every", "eval_batches", "sample_every",
           "sample_prompts", "save_every", "keep_last", "keep_every", "keep_best", "remat",
           "clips_per_device", "kernels", "mesh", "distributed", "profile", "wandb", "decode",
           "autoregressive", "prompt_seconds", "data.path", "data.num_threads",
           "data.prefetch"}  # fmt: skip

BASE, STEP = "base.safetensors", "step.json"
BEGUN = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is not whole yet
LOGGERS = ("absl", "gcsfs", "google")  # what these log, with traces, they raise as well
OWN_NAMES = {"config.json", "codec.json", "codec", "text", "checkpoints", "metrics.jsonl",
             "tensorboard", "wandb", "samples", "profile", BASE, STEP, lock.NAME}  # fmt: skip
# What no run, sampling or export reads; nor are checkpoints fetched from a bucket.
UNREAD = {"checkpoints", "tensorboard", "wandb", "samples", "profile", lock.NAME}


def changed_settings(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two configs differ, those in `MUTABLE` left out."""
    names = []
    for field in dataclasses.fields(old):
        name = prefix + field.name
        before, after = getattr(old, field.name), getattr(new, field.name)
        if name in MUTABLE or before == after:
            continue
        if dataclasses.is_dataclass(before):
            names += changed_settings(before, after, name + ".")
        else:
            names.append(f"{name} (was {before!r}, now {after!r})")
    return names


def _names(folder: str) -> set[str]:
    """What lies in a folder or a bucket's; nothing where there is none."""
    if bucket.is_url(folder):
        return bucket.names(folder)
    return {path.name for path in Path(folder).glob("*")}


def has_begun(out: str) -> bool:
    """Whether a run's folder holds a checkpoint; until then its settings may still change."""
    if "config.json" not in _names(out):
        return False
    steps = [name for name in _names(f"{out}/checkpoints") if name.isdigit()]
    if bucket.is_url(out):  # where a folder cannot take its name when it is whole
        whole = ocp.path.atomicity.COMMIT_SUCCESS_FILE
        return any(whole in bucket.names(f"{out}/checkpoints/{step}") for step in steps)
    return bool(steps)


def check_place(out: str) -> None:
    """Raises `UserError` where a folder holds something else than a run, or the beginnings of one.

    Until a run has begun, its folder may hold what another would have left.
    """
    if has_begun(out):
        return
    names = _names(out)
    if records.COMPLETE in names:
        raise UserError(
            f"--out {out}: is a data set, and a run needs a folder of its own; give a new --out"
        )
    if foreign := sorted(n for n in names - OWN_NAMES if not files.is_left_over(n)):
        raise UserError(
            f"{out} is not empty and holds no run ({foreign[0]}); give an empty or new --out"
        )


def check_begun(run: Path, config: RunConfig, codec: CodecSpec) -> None:
    """Raises `UserError` where a run that has begun is not the one that is to go on.

    For the arguments see `prepare_run`.
    """
    out, path = config.out, config.data.path
    if changes := changed_settings(from_json(RunConfig, run / "config.json"), config):
        raise UserError(
            f"{out} holds a run with other settings: {'; '.join(changes)}; "
            "give these values, or another --out"
        )
    known = from_json(CodecSpec, run / "codec.json")
    if known.interleaved != codec.interleaved:
        raise UserError(
            f"{path} holds {codec.layout}, but the run {out} learns {known.layout}; tokenize again "
            "in the same way (--stereo)"
        )
    if known.sha256 != codec.sha256:
        raise UserError(
            f"{path} was tokenized with {codec.source}, but the run {out} learns the tokens of "
            f"{known.source}; tokenize again with that codec"
        )
    step = max(int(name) for name in _names(f"{out}/checkpoints") if name.isdigit())
    position = _checkpoints(out) / str(step) / "data" / "metadata"  # as Orbax writes `JsonSave`
    if position.exists():
        check_data_set(config, step, json.loads(position.read_text()).get("data_set"))


def check_data_set(config: RunConfig, step: int, data_set: str) -> None:
    """Raises `UserError` unless the data set, a `records.digest`, is the one at hand."""
    if data_set != records.digest(config.data.path):
        raise UserError(
            f"{config.data.path} is not the data set that {config.out} was trained on up "
            f"to step {step}: go on with that one, or begin another run"
        )


def prepare_run(
    run: Path, config: RunConfig, codec: CodecSpec, text: tuple, base: dict | None = None
) -> None:
    """Writes what a run's folder holds beside checkpoints, or checks that it belongs to this run.

    May be killed anywhere and called again.

    Args:
      run: `config.out`, or what stands for it.
      config: the run's.
      codec: what its tokens mean; a copy of a codec's file or folder is kept.
      text: config, parameters and tokenizer of the text encoder.
      base: the transformer's parameters where adapters are trained.

    Raises:
      UserError: the folder holds another run, other tokens, or something else altogether.
    """
    out = config.out
    if has_begun(out):
        check_begun(run, config, codec)
    else:
        check_place(out)
        run.mkdir(parents=True, exist_ok=True)
        with files.not_half_written(run / "text"):
            t5_files.save(run / "text", *text)
        if Path(codec.source).is_dir():
            shutil.copytree(codec.source, run / "codec", dirs_exist_ok=True)
        elif Path(codec.source).is_file():  # its name tells which model it is for
            (run / "codec").mkdir(exist_ok=True)
            shutil.copy(codec.source, run / "codec" / Path(codec.source).name)
        if base is not None:
            tensors = {path: np.asarray(leaf) for path, leaf in trees.flatten(base).items()}
            with files.replacing_file(run / BASE) as writing:
                save_file(tensors, writing)
        files.write_text(run / "codec.json", to_json(codec))
    files.write_text(run / "config.json", to_json(config))


def read_base(run: Path) -> dict:
    """The transformer's parameters that a run trains adapters for, NumPy."""
    return trees.unflatten(files.read_tensors(run / BASE))


def _checkpoints(out: str | Path) -> epath.Path:
    """Where a run's checkpoints lie, for Orbax."""
    if bucket.is_url(out):
        bucket.prepare()
        return epath.Path(out) / "checkpoints"
    return epath.Path(Path(out).absolute()) / "checkpoints"


def _manager(out: str | Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = items.registry(options.multiprocessing_options, bucket.is_url(out))
    return ocp.CheckpointManager(_checkpoints(out), options=options, handler_registry=handlers)


def open_manager(config: RunConfig) -> ocp.CheckpointManager:
    """The run's checkpoints; saving is asynchronous and atomic.

    Raises `UserError` where they lie in a bucket that cannot be had.
    """
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(config.keep_last)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    best = {}
    if config.keep_best:
        loss = lambda metrics: metrics["loss"]  # noqa: E731
        kept.append(policies.BestN(get_metric_fn=loss, reverse=True, n=config.keep_best))
        # Without these Orbax writes no metrics, and a resumed run has forgotten which was best.
        best = dict(best_fn=loss, best_mode="min")
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.FixedIntervalPolicy(config.save_every),
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
        **best,
    )
    with bucket.explained(config.out) if bucket.is_url(config.out) else contextlib.nullcontext():
        return _manager(config.out, options)


def save(
    manager: ocp.CheckpointManager, step: int, state: dict, data: dict, loss: float | None = None
) -> None:
    """Begins to save a step, whatever the interval says; the manager's `close` waits for it.

    Each entry of `state` is an item by itself, so that inference reads only the one it needs.

    Args:
      loss: validation loss, where the run keeps its best checkpoints.

    Raises:
      UserError: this checkpoint or the one before it cannot be written.
    """
    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
    metrics = None if loss is None else {"loss": loss}
    with writing(manager):
        manager.save(
            step,
            args=ocp.args.Composite(**trees, data=ocp.args.JsonSave(data)),
            metrics=metrics,
            force=True,
        )


@contextlib.contextmanager
def writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what keeps a checkpoint from being written into one line; Orbax has many types."""
    try:
        yield
    except Exception as error:
        whole = manager.all_steps()
        if bucket.is_url(manager.directory):
            cause, remedy = bucket.reason(error), ""
        elif isinstance(error, OSError | ValueError | RuntimeError):
            cause, remedy = " ".join(str(error).split()), "make room or give access, and "
            if len(cause) > 240:  # TensorStore says first what it was at, and last what is wrong
                cause = f"{cause[:80]} ... {cause[-140:]}"
            # Orbax has forgotten those that the new one would have replaced.
            whole = [int(name) for name in _names(os.fspath(manager.directory)) if name.isdigit()]
        else:
            raise
        steps = ", ".join(map(str, sorted(whole))) or "none"
        raise UserError(
            f"{manager.directory}: a checkpoint cannot be written: {cause}; whole ones are of "
            f"steps: {steps}; {remedy}the same command goes on"
        ) from error


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Waits for the last save at the end, unless something else has gone wrong meanwhile.

    Raises `UserError` where that save has failed.
    """
    with silenced(*LOGGERS):
        try:
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to show
                    manager.close()
                raise
            with writing(manager):
                manager.wait_until_finished()
            manager.close()
        except lock.LostError:
            raise  # what is begun there is the other's
        except BaseException:
            if jax.process_index() == 0 and not bucket.is_url(manager.directory):
                for begun in Path(manager.directory).glob(f"*{BEGUN}*"):
                    shutil.rmtree(begun, ignore_errors=True)  # a full disk needs the room
            raise


def restore(manager: ocp.CheckpointManager, step: int, **abstract: Any) -> dict:
    """Reads the named items of a checkpoint onto the shardings of their abstract trees.

    Raises:
      UserError: the checkpoint is damaged or of another model.
    """
    args = {
        name: ocp.args.JsonRestore()
        if tree is None
        else ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in abstract.items()
    }
    try:
        with silenced(*LOGGERS):
            return dict(manager.restore(step, args=ocp.args.Composite(**args)).items())
    except (MemoryError, PermissionError, KeyboardInterrupt):
        raise
    except Exception as error:  # Orbax and its stores raise a great many types
        if bucket.is_url(manager.directory):
            bucket.names(os.fspath(manager.directory))  # out of reach is not damaged
        others = [str(other) for other in manager.all_steps() if other != step]
        remedy = f"; move that folder away to go on from step {others[-1]}" if others else ""
        raise UserError(
            f"{manager.directory / str(step)}: damaged or of another model "
            f"({type(error).__name__}), or of an earlier release, whose export of it can be loaded"
            f"{remedy}"
        ) from error


def abstract_params(
    model: ModelConfig, trained_t5: t5.T5Config | None, adapters: LoraConfig = LoraConfig()
) -> dict:
    """Shapes of a run's trained parameters: adapters alone, where it trains such."""

    def init() -> dict:
        key = jax.random.key(0)
        if adapters.rank:
            return {"lora": lora.init_adapters(adapters, model, key)}
        params = {"lm": transformer.init_params(model, key)}
        if trained_t5 is not None:
            params["text"] = t5.init(trained_t5, key)
        return params

    return jax.eval_shape(init)


def codec_source(run: Path, codec: CodecSpec) -> str:
    """Where a run's codec is to be loaded from: the run's own copy if it has one."""
    copied = run / "codec"
    weights = copied / Path(codec.source).name
    if weights.is_file():
        return str(weights)
    return str(copied) if copied.is_dir() else codec.source


def read_params(
    out: str | Path,
    config: RunConfig,
    trained_t5: t5.T5Config | None,
    *,
    weights: str,
    step: int | None,
) -> tuple[dict, int]:
    """A run's trained parameters for one device, and their step.

    Args:
      out: its folder, or that in a bucket.
      config: the run's.
      trained_t5: the text encoder's config where it was trained along.
      weights: 'ema' for the averaged parameters, 'raw' for the trained ones.
      step: the checkpoint; None is the newest.

    Raises:
      UserError: no such checkpoint, or a damaged one.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(config.model, trained_t5, config.lora),
    )
    if "checkpoints" not in _names(os.fspath(out)):
        raise UserError(f"{out}: the run has no checkpoint yet")
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:  # each reads for itself
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    with _manager(out, options) as manager:
        steps = manager.all_steps()
        if not steps:
            raise UserError(f"{out}: the run has no checkpoint yet")
        step = max(steps) if step is None else step
        if step not in steps:
            raise UserError(f"{out}: no checkpoint of step {step}; there are {sorted(steps)}")
        item = {"ema": "ema", "raw": "params"}[weights]
        params = restore(manager, step, **{item: shapes})[item]
        folder = manager.directory / str(step) / item
    files.finite(folder, {name: np.asarray(x) for name, x in trees.flatten(params).items()})
    return params, step
