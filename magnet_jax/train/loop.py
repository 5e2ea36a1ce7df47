"""Training: one linear story from a config to a folder of checkpoints, resumed exactly.

A step is a pure function of (state, batch, stage): the batch follows from the seed and the
data position, the stage from (seed, step), all noise from (seed, each clip's own seed). So a run
that was killed and resumed is the run that never was, on however many processes and devices.

Several processes run this same program (distributed.py): each reads its share of every batch, all
save and restore together, the first alone writes everything else.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tqdm import tqdm

from magnet_jax.checkpoints import matching, pretrained, run_folder
from magnet_jax.codec import encodec
from magnet_jax.config import CodecSpec, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline, records
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io import audio, bucket, lock
from magnet_jax.io.files import replacing_file
from magnet_jax.model import sharding, t5, transformer
from magnet_jax.train import distributed, objective, optimizer, plan, steps, watch
from magnet_jax.train.steps import Static


def check_data_fits(config: RunConfig, spec: CodecSpec) -> None:
    """Raises `UserError` where data set and model do not go together."""
    if not config.model.parallel:
        raise UserError(
            f"a model of kind {config.model.kind} can be sampled from, and trained further as a "
            "hybrid alone: give --objective hybrid"
        )
    model = config.model
    if spec.interleaved and spec.num_codebooks != model.num_codebooks:
        raise UserError(pipeline.not_all_of_stereo(config.data.path, spec, model.num_codebooks))
    if spec.codebook_size != model.codebook_size or spec.num_codebooks < model.num_codebooks:
        raise UserError(
            f"{config.data.path} holds {spec.num_codebooks} codebooks of {spec.codebook_size} "
            f"(codec {spec.source}), the model wants {model.num_codebooks} of "
            f"{model.codebook_size}: set --model.num-codebooks and --model.codebook-size, or "
            "tokenize with the model's codec"
        )
    if sampling.segment_frames(config, spec) < model.span_length:
        raise UserError(
            f"data.segment_seconds {config.data.segment_seconds} is shorter than one span of "
            f"{model.span_length} frames at {spec.frame_rate} Hz"
        )


def check_fit(config: RunConfig, spec: CodecSpec, t5_config: t5.T5Config) -> None:
    """Raises `UserError` where data set, model and text encoder do not go together."""
    check_data_fits(config, spec)
    model = config.model
    if t5_config.d_model != model.text_width:
        raise UserError(
            f"text encoder {config.text.source} is {t5_config.d_model} wide, model.text_width is "
            f"{model.text_width}: set --model.text-width {t5_config.d_model}"
        )


class Setup(NamedTuple):
    """What a run works with, beside its config; parameters are NumPy arrays."""

    spec: CodecSpec
    t5_config: t5.T5Config
    t5_params: dict
    tokenizer: Tokenizer
    lm: dict | None  # transformer to begin with, or to train adapters for
    frames: int  # T of a batch
    static: Static
    run: Path = Path()  # the run's folder
    mirror: bucket.Mirror | None = None  # what brings `run` to a bucket, if it belongs there


def _text_and_lm(
    config: RunConfig, run: Path, spec: CodecSpec, begun: bool
) -> tuple[tuple, dict | None]:
    """The text encoder, its tokenizer, and the transformer that the run starts from."""
    if begun:
        base = run_folder.read_base(run) if config.lora.rank else None
        return t5_files.load(str(run / "text")), base
    if not config.init_from:
        return t5_files.load(config.text.source), None
    loaded = pretrained.load(config.init_from)
    if loaded.codec.interleaved != spec.interleaved and not config.init_partial:
        raise UserError(
            f"{config.data.path} holds {spec.layout}, but {config.init_from} learnt "
            f"{loaded.codec.layout}: tokenize in the same way (--stereo), or give --init-partial "
            "to learn new tokens"
        )
    if loaded.codec.sha256 != spec.sha256 and not config.init_partial:
        raise UserError(
            f"{config.data.path} was tokenized with {spec.source}, but {config.init_from} learnt "
            f"the tokens of {loaded.codec.source}: tokenize with that codec, or give "
            "--init-partial to learn new tokens"
        )
    for name in ("local_context", "first_context", "span_length"):
        here, there = (getattr(model, name) for model in (config.model, loaded.config.model))
        if here != there:
            distributed.say_first(f"model.{name} is {here}; {config.init_from} learnt with {there}")
    wanted = jax.eval_shape(
        functools.partial(transformer.init_params, config.model), jax.random.key(0)
    )
    matched, lines = matching.match_params(
        wanted, loaded.params["lm"], config.init_partial, where=config.init_from
    )
    for line in lines if config.init_partial else lines[:1]:
        distributed.say_first(line)
    if any(leaf is None for leaf in jax.tree.leaves(matched, is_leaf=lambda x: x is None)):
        fresh = transformer.init_params(config.model, jax.random.key(config.seed))
        matched = matching.fill_params(matched, fresh)
    lm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), matched)
    return (loaded.t5_config, loaded.t5_params, loaded.tokenizer), lm


def _begun_with_codec(config: RunConfig, spec: CodecSpec) -> dict:
    """A new transformer with the codec's vectors."""
    found, vectors_KVE = encodec.codebook_vectors(spec.source, spec.num_codebooks, spec.interleaved)
    encodec.check_same_codec(spec, found, config.data.path)
    keys = jax.random.split(jax.random.key(config.seed))
    fresh = transformer.init_params(config.model, keys[0])
    return jax.tree.map(np.asarray, transformer.with_code_vectors(fresh, vectors_KVE, keys[1]))


def set_up(config: RunConfig) -> Setup:
    """Checks that settings, data, model and devices go together, and prepares the run's folder.

    Raises `UserError`, in all processes if in one.
    """
    if not config.data.path:
        raise UserError("no data: give --data.path DIR, a folder that tokenization.job wrote")
    if bucket.is_url(config.data.path):
        raise UserError(
            f"--data.path {config.data.path}: records cannot be read from a bucket; copy them to "
            f"every host (mkdir -p DIR && gcloud storage rsync -r {config.data.path} DIR) and give "
            "that folder"
        )
    mirror = distributed.all_do(lambda: open_mirror(config.out))
    run = mirror.folder if mirror else Path(config.out)
    begun = distributed.first_tells(lambda: run_folder.has_begun(config.out))

    def check() -> Setup:
        spec = records.read_codec_spec(config.data.path)
        if not config.init_from:
            check_data_fits(config, spec)  # before a text encoder is fetched
        text, lm = _text_and_lm(config, run, spec, begun)
        check_fit(config, spec, text[0])
        if config.init_codes == "codec" and not begun:
            lm = _begun_with_codec(config, spec)
        # Codebooks beyond the model's are neither learnt nor decoded.
        spec = dataclasses.replace(spec, num_codebooks=config.model.num_codebooks)
        frames, dtype = sampling.segment_frames(config, spec), sampling.compute_dtype(config)
        mesh = sharding.make_mesh(config.mesh)
        static = steps.make_static(config, text[0], dtype, frames, mesh)
        t5_params = jax.tree.map(np.asarray, text[1])
        return Setup(spec, text[0], t5_params, text[2], lm, frames, static, run, mirror)

    setup = distributed.all_do(check)
    # All must choose the same mesh and parts; devices may differ in what is free on them.
    device = distributed.broadcast_json(plan.device_memory())
    static, _ = plan.choose(
        config,
        setup.t5_config,
        setup.static.dtype,
        setup.frames,
        device,
        say=distributed.say_first,
    )
    setup = setup._replace(static=static)
    base = setup.lm if config.lora.rank else None
    text = (setup.t5_config, setup.t5_params, setup.tokenizer)
    distributed.first_does(lambda: run_folder.prepare_run(run, config, setup.spec, text, base))
    if jax.process_count() > 1 and mirror is None:
        distributed.check_shared(run)
    push(setup)
    return setup


def open_mirror(out: str) -> bucket.Mirror | None:
    """What stands for a run's folder in a bucket; None for one that is none.

    Raises `UserError` where the bucket cannot be read or written.
    """
    if not bucket.is_url(out):
        return None
    bucket.check(out, f"checkpoints/.check-{jax.process_index()}")
    return bucket.Mirror(out, run_folder.UNREAD)


def push(setup: Setup) -> None:
    """Brings what the first process has written to the run's bucket, if it has one.

    Raises `UserError`, in all processes, where the bucket cannot be written.
    """
    if setup.mirror:
        distributed.first_does(setup.mirror.push)


def to_devices(batch: dict, mesh: Mesh) -> dict:
    """This process's rows as global arrays, split over the mesh."""
    where, count = sharding.batch_sharding(mesh), jax.process_count()
    return {
        name: jax.make_array_from_process_local_data(
            where, batch[name], (count * len(batch[name]), *batch[name].shape[1:])
        )
        for name in steps.INPUTS
    }


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, as global ones."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part]),
        tree,
        shardings,
    )


def first_state(setup: Setup, key: jax.Array) -> dict:
    """The state at step 0, made where it lives."""
    static = setup.static
    given, where = {}, {}
    if static.train_text:
        given["text"] = setup.t5_params
        where["text"] = sharding.text_shardings(setup.t5_params, static.mesh)
    if setup.lm is not None and not static.lora.rank:
        given["lm"] = setup.lm
        where["lm"] = sharding.model_shardings(static.model, static.mesh)
    init = functools.partial(steps.init_state, static)
    shardings = steps.state_shardings(static)[1]
    return jax.jit(init, out_shardings=shardings)(key, place(given, where))


def open_data(config: RunConfig, setup: Setup) -> tuple[Any, list[dict]]:
    """The endless training batches, and all validation batches, on the devices."""
    keywords = dict(
        frames=setup.frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=setup.tokenizer,
        max_tokens=config.text.max_tokens,
    )
    batches = pipeline.make_train_iterator(config.data, **keywords, seed=config.seed)
    if not config.eval_every:
        return batches, []
    if not records.has_split(config.data.path, "validation"):
        if config.keep_best:
            raise UserError(f"keep_best: {config.data.path} has no validation split to judge by")
        distributed.say_first(
            f"{config.data.path} has no validation split: no validation loss is computed"
        )
        return batches, []
    held_out = pipeline.validation_batches(config.data, **keywords, num_batches=config.eval_batches)
    return batches, [to_devices(batch, setup.static.mesh) for batch in held_out]


def validate(
    params: dict, frozen: dict, batches: list[dict], key: jax.Array, static: Static
) -> dict[str, float]:
    """Validation losses over the same batches and the same masks every time."""
    sums_S = []
    for stage in range(static.model.num_codebooks):
        sums = [
            steps.eval_step(params, frozen, b, key, stage, static=static, local=stage > 0)
            for b in batches
        ]
        sums_S.append(jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(sums)))
    return watch.validation_scalars(sums_S, static.model.num_codebooks)


def open_decoder(config: RunConfig, run: Path, spec: CodecSpec) -> encodec.Codec | None:
    """The codec that makes sample audio, where samples are wanted."""
    if not (config.sample_every and config.sample_prompts):
        return None
    source = run_folder.codec_source(run, spec)
    decoder = encodec.load_codec(
        source, num_codebooks=spec.num_codebooks, interleaved=spec.interleaved
    )
    encodec.check_same_codec(spec, decoder.spec, config.data.path)
    return decoder


def write_samples(
    config: RunConfig, setup: Setup, decoder: encodec.Codec, params: tuple[dict, dict], step: int
) -> list[Path]:
    """Samples the run's prompts, always with the same seed; `params` are lm's and text's."""
    model = pretrained.Loaded(
        config=config,
        codec=setup.spec,
        codec_source=setup.spec.source,
        params={"lm": params[0]},
        t5_config=setup.t5_config,
        t5_params=params[1],
        tokenizer=setup.tokenizer,
        step=step,
        lineage={},
    )
    generated = sampling.generate(
        sampling.prepare(model),
        config.sample_prompts,
        num_frames=setup.frames,
        decoding=config.sampling,
        seed=config.seed,
    )
    folder, wavs = setup.run / "samples" / f"step_{step:07d}", []
    for i, wav_CN in enumerate(decoder.decode(generated.codes_BKT)):
        wav_CN, _ = audio.normalize_loudness(wav_CN, setup.spec.sample_rate, target_lufs=-14.0)
        wavs.append(folder / f"{i:02d}.wav")
        audio.write_wav(wavs[-1], wav_CN, setup.spec.sample_rate)
    with replacing_file(folder / "prompts.txt") as temporary:
        temporary.write_text("".join(f"{p}\n" for p in config.sample_prompts), encoding="utf-8")
    return wavs


def whole(tree: Any) -> Any:
    """Global arrays as NumPy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT in a list; a second one does what it always does."""
    caught: list[int] = []
    handlers = {}

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        for each, handler in handlers.items():
            signal.signal(each, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(config: RunConfig) -> None:
    """Trains to `config.steps`, from the newest checkpoint of `config.out` if it has one.

    SIGTERM and Ctrl-C, of any process, save a checkpoint within two steps and end the run with
    status 128 + the signal, which schedulers requeue.

    Raises:
      UserError: settings, data, model and folder do not go together, a checkpoint cannot be
        written, or the loss is not finite.
    """
    distributed.start(config.distributed, say=lambda line: tqdm.write(line))
    if not config.out:
        raise UserError("no folder for the run: give --out DIR")
    with held(config.out) as check_held:
        setup = set_up(config)  # until then there is nothing to save
        with catching_signals() as caught:
            step = _train(config, setup, caught, check_held)
        push(setup)
    if step < config.steps:
        distributed.say_first(
            f"stopped and saved at step {step}; the same command goes on from there"
        )
        raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))
    distributed.say_first(
        f"done, saved at step {step}; to hear it: python -m launch.sample --checkpoint "
        f'{config.out} --prompt "TEXT" --out wavs'
    )


@contextlib.contextmanager
def held(out: str) -> Iterator[Callable[[], None]]:
    """Holds a run's folder for all processes of this run, and gives what checks that it still does.

    Raises `UserError`, in all processes, where another run has it; so does the check.
    """
    with contextlib.ExitStack() as stack:
        locks = []
        distributed.first_does(
            lambda: locks.append(stack.enter_context(lock.held(out, tqdm.write)))
        )
        yield lambda: distributed.first_does(lambda: locks[0].check())


def _restored(
    config: RunConfig, setup: Setup, manager: Any, step: int, data_set: str
) -> tuple[dict, dict]:
    """The state and the data position of a checkpoint."""
    abstract, _ = steps.state_shardings(setup.static)
    state = run_folder.restore(manager, step, **abstract, data=None)
    position = state.pop("data")
    replicated = sharding.replicated(setup.static.mesh)
    all_finite = functools.partial(jax.tree.map, lambda x: jnp.isfinite(x).all())
    flags = jax.device_get(jax.jit(all_finite, out_shardings=replicated)(state))
    for path, is_finite in jax.tree.leaves_with_path(flags):
        if not is_finite:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{manager.directory / str(step)}: the tensor {name} holds NaN or infinity; move "
                "that folder away to go on from an earlier step, or begin anew"
            )
    if position.pop("data_set") != data_set:
        raise UserError(
            f"{config.data.path} is not the data set that {config.out} was trained on up "
            f"to step {step}: go on with that one, or begin another run"
        )
    return state, position


def _describe(setup: Setup, config: RunConfig, state: dict, step: int) -> str:
    static = setup.static
    mesh = ", ".join(f"{name} {size}" for name, size in static.mesh.shape.items() if size > 1)
    parts = f" in {static.num_parts} parts" if static.num_parts > 1 else ""
    trained = transformer.count_params(state["params"])
    return (
        f"{trained / 1e6:.3g} M trained parameters, {config.data.batch_size} clips of "
        f"{setup.frames} frames a step{parts}, {static.dtype} on {static.mesh.size} "
        f"{jax.devices()[0].device_kind} device(s){f' ({mesh})' if mesh else ''}"
        + (f", resumed at step {step}" if step else "")
    )


def _train(
    config: RunConfig, setup: Setup, caught: list[int], check_held: Callable[[], None]
) -> int:
    """`train`, until any process has caught something; the last step, saved."""
    static, first = setup.static, distributed.is_first()
    batches, held_out = distributed.all_do(lambda: open_data(config, setup))
    decoder = distributed.all_do(
        lambda: open_decoder(config, setup.run, setup.spec) if first else None
    )
    sampled = bool(config.sample_every and config.sample_prompts)
    frozen = {"text": setup.t5_params, "lm": setup.lm}
    where = steps.frozen_shardings(static)[1]
    frozen = place({name: frozen[name] for name in where}, where)
    # Made on all devices: one process's key would not go with the others' arrays.
    replicated = sharding.replicated(static.mesh)
    key = jax.jit(functools.partial(jax.random.key, config.seed), out_shardings=replicated)()
    merge = jax.jit(functools.partial(steps.merged, static.lora))
    learning_rate = optimizer.learning_rate(config.optimizer)
    data_set = records.digest(config.data.path)

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        manager = run_folder.open_manager(config)
        stack.enter_context(run_folder.closing(manager))  # waits for the last save
        step = saved = manager.latest_step() or 0
        if step:
            state, position = _restored(config, setup, manager, step, data_set)
            batches.set_state(position)
        else:
            state = first_state(setup, key)
        distributed.say_first(_describe(setup, config, state, step))
        if learning_rate(config.steps - 1) == 0 and config.steps > config.optimizer.schedule_steps:
            distributed.say_first(
                f"note: the learning rate is 0 from step {config.optimizer.schedule_steps} on, and "
                "the run has more: see --optimizer.schedule-steps"
            )
        if config.steps < config.optimizer.ema_updates and not config.lora.rank:
            distributed.say_first(
                f"note: the averaged weights are the first ones until step "
                f"{config.optimizer.ema_updates}: sample this run with --weights raw, or train "
                "with --optimizer.ema-updates 1"
            )
        if step >= config.steps:
            distributed.say_first(f"{config.out} is complete: --steps {config.steps} are done")
        scalars = None
        if first:
            scalars = stack.enter_context(
                contextlib.closing(watch.Scalars(config, setup.run, step))
            )
        profile = stack.enter_context(contextlib.closing(watch.Profile(config, setup.run)))
        bar = stack.enter_context(
            tqdm(
                total=config.steps, initial=step, unit="step", desc="train", smoothing=0.1,
                disable=not first,
            )
        )  # fmt: skip
        window = watch.Window()
        # Votes of several processes are read a step late, so that no step waits for them.
        votes, late = deque(), jax.process_count() > 1
        stopping = False
        while step < config.steps and not stopping:
            before = time.perf_counter()
            batch = to_devices(next(batches), static.mesh)
            position = batches.get_state() | {"data_set": data_set}
            window.waited += time.perf_counter() - before
            stage = objective.stage_of_step(
                config.seed, step, config.model.num_codebooks, config.stage_weights
            )
            profile.before(step + 1)
            state, metrics = steps.train_step(
                state, frozen, batch, key, stage, static=static, local=stage > 0
            )
            step += 1
            profile.after(step, metrics)
            window.add(stage, metrics)
            bar.update()
            votes.append(distributed.vote(bool(caught)))
            stopping = len(votes) > late and bool(votes.popleft())
            last = step == config.steps or stopping
            logging, saving = step % config.log_every == 0, manager.should_save(step)
            validating = bool(held_out) and step % config.eval_every == 0
            sampling_now = sampled and step % config.sample_every == 0 and not stopping
            if logging or saving or last or validating or sampling_now:
                window.check_finite(step, saved)
            if logging or last:
                values = window.scalars(
                    static, config.data.batch_size, setup.frames, config.text.max_tokens
                )
                metrics["learning_rate"] = learning_rate(step - 1)
                values |= {f"train/{name}": value for name, value in metrics.items()}
                if scalars:
                    scalars.log(step, values)
                bar.set_postfix(
                    loss=f"{values['train/loss']:.3f}",
                    frames_per_s=f"{values['speed/frames_per_second']:,.0f}",
                )
                window = watch.Window()
            aside = time.perf_counter()
            loss = float("inf") if config.keep_best else None
            if validating:
                values = validate(state["ema"], frozen, held_out, key, static)
                if not np.isfinite(values["validation/loss"]):
                    found = values["validation/loss"]
                    raise UserError(
                        watch.diverged(f"the validation loss of step {step} is {found}", saved)
                    )
                loss = values["validation/loss"] if config.keep_best else None
                if scalars:
                    scalars.log(step, values)
                distributed.say_first(
                    f"step {step}: validation loss {values['validation/loss']:.4f}"
                )
            if saving or last:
                if scalars:
                    scalars.flush()
                check_held()
                push(setup)  # first: a checkpoint's run is whole up to its step
                run_folder.save(manager, step, state, position, loss)
                saved = step
            if sampling_now:
                params = whole(merge(state["ema"], frozen))
                if decoder:
                    wavs = write_samples(config, setup, decoder, params, step)
                    scalars.log_audio(step, wavs, config.sample_prompts)
                    tqdm.write(
                        f"step {step}: samples in {config.out}/samples/{wavs[0].parent.name}"
                    )
            window.started += time.perf_counter() - aside  # evaluation is not training time
    return step
