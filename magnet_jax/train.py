"""Training: one linear story from a config to a folder of checkpoints, resumed exactly.

A step is a pure function of (parameters, batch, stage): the batch follows from the seed and the
data position, the stage from (seed, step), all noise from (seed, each clip's own seed). So a run
that was killed and resumed is the run that never was.
"""

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tokenizers import Tokenizer
from tqdm import tqdm

from magnet_jax import (
    audio,
    checkpoint,
    codec,
    data,
    objective,
    optimizer,
    pretrained,
    records,
    sampling,
    sharding,
    t5,
    transformer,
)
from magnet_jax.config import CodecSpec, KernelConfig, RunConfig
from magnet_jax.errors import UserError


def check_fit(config: RunConfig, spec: CodecSpec, t5_config: t5.T5Config) -> None:
    """Raises `UserError` where data set, model and text encoder do not go together."""
    if config.model.kind != "magnet":
        raise UserError(f"a model of kind {config.model.kind} can be sampled from, not trained")
    model = config.model
    if spec.codebook_size != model.codebook_size or spec.num_codebooks < model.num_codebooks:
        raise UserError(
            f"{config.data.path} holds {spec.num_codebooks} codebooks of {spec.codebook_size} "
            f"(codec {spec.source}), the model wants {model.num_codebooks} of "
            f"{model.codebook_size}: set --model.num-codebooks and --model.codebook-size, or "
            "tokenize with the model's codec"
        )
    if t5_config.d_model != model.text_width:
        raise UserError(
            f"text encoder {config.text.source} is {t5_config.d_model} wide, model.text_width is "
            f"{model.text_width}: set --model.text-width {t5_config.d_model}"
        )
    if sampling.segment_frames(config, spec) < model.span_length:
        raise UserError(
            f"data.segment_seconds {config.data.segment_seconds} is shorter than one span of "
            f"{model.span_length} frames at {spec.frame_rate} Hz"
        )


def init_state(config: RunConfig, t5_params: dict) -> dict:
    """Parameters, their average and the optimizer's moments at step 0."""
    params = {"lm": transformer.init_params(config.model, jax.random.key(config.seed))}
    if config.text.finetune:
        params["text"] = t5_params
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer.make_optimizer(config.optimizer).init(params),
    }


def state_shardings(config: RunConfig, t5_params: dict, mesh: Mesh) -> tuple[Any, Any]:
    """(shapes with shardings, shardings) of a whole train state."""
    shapes = jax.eval_shape(functools.partial(init_state, config), t5_params)
    params = {"lm": sharding.model_shardings(config.model, mesh)}
    if config.text.finetune:
        params["text"] = jax.tree.map(lambda _: sharding.replicated(mesh), t5_params)
    shardings = sharding.like_params(shapes, params, mesh)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
    return abstract, shardings


def _loss(
    params, frozen_text, batch, key, stage, *, config, t5_config, local, dropout, dtype, mesh
):
    text_params = params.get("text", frozen_text)
    states_BSE = t5.encode(
        text_params, t5_config, batch["text_ids_BS"], batch["text_mask_BS"], dtype=dtype
    )
    noise = objective.draw_noise(key, batch["seed_B"], batch["codes_BKT"].shape[-1], dropout)
    return objective.loss(
        params["lm"],
        states_BSE,
        batch["text_mask_BS"],
        batch["codes_BKT"],
        batch["valid_BT"],
        noise,
        stage,
        config=config.model,
        local=local,
        dtype=dtype,
        remat=config.remat,
        sharding=sharding.batch_sharding(mesh),
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "t5_config", "local", "dtype", "mesh"),
    donate_argnames="state",
)
def train_step(
    state: dict,
    frozen_text: dict | None,
    batch: dict,
    key: jax.Array,
    stage: jax.Array,
    *,
    config: RunConfig,
    t5_config: t5.T5Config,
    local: bool,
    dtype: jnp.dtype,
    mesh: Mesh,
) -> tuple[dict, dict]:
    """One update; two programs are compiled, for stage 0 and for the stages above.

    Args:
      state: {'params', 'ema', 'opt'}, donated.
      frozen_text: the text encoder's parameters where they are not trained, else None.
      batch: codes_BKT, valid_BT, text_ids_BS, text_mask_BS, seed_B.
      key: the run's key.
      stage: codebook to predict; `local` must be `stage > 0`.

    Returns:
      the new state and {'loss', 'accuracy', 'grad_norm'}.
    """
    loss = functools.partial(
        _loss, config=config, t5_config=t5_config, local=local,
        dropout=config.condition_dropout, dtype=dtype, mesh=mesh,
    )  # fmt: skip
    value, gradients = jax.value_and_grad(loss, has_aux=True)(
        state["params"], frozen_text, batch, key, stage
    )
    updates, opt = optimizer.make_optimizer(config.optimizer).update(
        gradients, state["opt"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    ema = optax.incremental_update(params, state["ema"], 1 - config.optimizer.ema_decay)
    metrics = {"loss": value[0], "grad_norm": optax.global_norm(gradients), **value[1]}
    # What comes out lives where what came in did, whatever the compiler would rather do.
    _, shardings = state_shardings(config, state["params"].get("text", {}), mesh)
    state = {"params": params, "ema": ema, "opt": opt}
    return jax.lax.with_sharding_constraint(state, shardings), metrics


@functools.partial(jax.jit, static_argnames=("config", "t5_config", "local", "dtype", "mesh"))
def eval_step(params, frozen_text, batch, key, stage, *, config, t5_config, local, dtype, mesh):
    """The loss of one stage with every text given; otherwise as in training."""
    value, _ = _loss(
        params, frozen_text, batch, key, stage, config=config, t5_config=t5_config,
        local=local, dropout=0.0, dtype=dtype, mesh=mesh,
    )  # fmt: skip
    return value


def to_devices(batch: dict, mesh: Mesh) -> dict:
    """This host's rows as global arrays, split over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), rows)
        for name, rows in batch.items()
        if name in ("codes_BKT", "valid_BT", "text_ids_BS", "text_mask_BS", "seed_B")
    }


def validation_loss(
    params: dict, frozen_text: dict | None, batches: list[dict], key: jax.Array, **static: Any
) -> list[float]:
    """Mean loss of each codebook over the same batches and the same masks every time."""
    num_codebooks = static["config"].model.num_codebooks
    return [
        float(
            np.mean(
                [
                    eval_step(params, frozen_text, batch, key, stage, local=stage > 0, **static)
                    for batch in batches
                ]
            )
        )
        for stage in range(num_codebooks)
    ]


class Setup(NamedTuple):
    """What a run works with, beside its config."""

    spec: CodecSpec
    t5_config: t5.T5Config
    t5_params: dict
    tokenizer: Tokenizer
    mesh: Mesh
    frames: int  # T of a batch
    dtype: jnp.dtype

    def static(self, config: RunConfig) -> dict:
        """Static arguments of the compiled steps, without names that no program depends on."""
        config = dataclasses.replace(config, out="", sample_prompts=())
        return dict(config=config, t5_config=self.t5_config, dtype=self.dtype, mesh=self.mesh)


def set_up(config: RunConfig) -> Setup:
    """Checks that settings, data and model go together, and prepares the run's folder."""
    if jax.process_count() > 1:
        raise UserError("several processes are not supported yet: run one with all its devices")
    if not config.out:
        raise UserError("no folder for the run: give --out DIR")
    run = Path(config.out)
    spec = records.read_codec_spec(config.data.path)
    begun = checkpoint.has_begun(run)
    t5_config, t5_params, tokenizer = t5.load(str(run / "text") if begun else config.text.source)
    check_fit(config, spec, t5_config)
    mesh = sharding.make_mesh(config.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % rows:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not a multiple of {rows} devices"
        )
    # Codebooks beyond the model's are neither learnt nor decoded.
    spec = dataclasses.replace(spec, num_codebooks=config.model.num_codebooks)
    checkpoint.prepare_run(config, spec)
    frames, dtype = sampling.segment_frames(config, spec), sampling.compute_dtype(config)
    return Setup(spec, t5_config, t5_params, tokenizer, mesh, frames, dtype)


def open_data(config: RunConfig, setup: Setup) -> tuple[Any, list[dict]]:
    """The endless training batches, and all validation batches, on the devices."""
    keywords = dict(
        frames=setup.frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=setup.tokenizer,
        max_tokens=config.text.max_tokens,
    )
    batches = data.make_train_iterator(config.data, **keywords, seed=config.seed)
    if not config.eval_every:
        return batches, []
    if not records.has_split(config.data.path, "validation"):
        tqdm.write(f"{config.data.path} has no validation split: no validation loss is computed")
        return batches, []
    held_out = data.validation_batches(config.data, **keywords, num_batches=config.eval_batches)
    return batches, [to_devices(batch, setup.mesh) for batch in held_out]


def open_decoder(config: RunConfig, spec: CodecSpec) -> codec.Codec | None:
    """The codec that makes sample audio, where samples are wanted."""
    if not (config.sample_every and config.sample_prompts):
        return None
    source = checkpoint.codec_source(Path(config.out), spec)
    decoder = codec.load_codec(source, num_codebooks=spec.num_codebooks)
    codec.check_same_codec(spec, decoder.spec, config.data.path)
    return decoder


def write_samples(
    config: RunConfig, setup: Setup, decoder: codec.Codec, ema: dict, frozen_text: Any, step: int
) -> Path:
    """Samples the run's prompts from the averaged weights, always with the same seed."""
    model = pretrained.Loaded(
        config=config,
        codec=setup.spec,
        codec_source=setup.spec.source,
        params=ema,
        t5_config=setup.t5_config,
        t5_params=ema.get("text", frozen_text),
        tokenizer=setup.tokenizer,
        step=step,
        lineage={},
    )
    generated = sampling.generate(
        model,
        config.sample_prompts,
        # Plain XLA: fused kernels cannot be split over the mesh that holds the parameters.
        execution=sampling.Execution(kernels=KernelConfig(full="blocks", local="blocks")),
        num_frames=setup.frames,
        decoding=config.decode,
        seed=config.seed,
    )
    folder = Path(config.out) / "samples" / f"step_{step:07d}"
    for i, wav_CN in enumerate(decoder.decode(generated.codes_BKT)):
        wav_CN, _ = audio.normalize_loudness(wav_CN, setup.spec.sample_rate, target_lufs=-14.0)
        audio.write_wav(folder / f"{i:02d}.wav", wav_CN, setup.spec.sample_rate)
    (folder / "prompts.txt").write_text("".join(f"{p}\n" for p in config.sample_prompts))
    return folder


class Scalars:
    """Numbers over steps, for TensorBoard and as lines of JSON in RUN/metrics.jsonl."""

    def __init__(self, run: Path, step: int):
        """What was logged after `step`, by a process killed before it saved, is forgotten."""
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_scalars(run) if line["step"] <= step]
            records.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def close(self) -> None:
        self.writer.close()


def read_scalars(run: Path) -> list[dict[str, float]]:
    """The lines of RUN/metrics.jsonl, each with its "step"; a line cut by a kill is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Window:
    """What happened since the last line of scalars."""

    def __init__(self):
        self.losses = defaultdict(list)  # of each codebook, still on the devices
        self.waited = 0.0  # seconds for data
        self.started = time.perf_counter()

    def scalars(self, frames_per_step: int) -> dict[str, float]:
        """Mean losses and speeds; waits for the steps to finish."""
        means = {k: np.mean(jax.device_get(losses)) for k, losses in sorted(self.losses.items())}
        seconds = time.perf_counter() - self.started
        steps = sum(map(len, self.losses.values()))
        return {f"train/loss_{codebook}": mean for codebook, mean in means.items()} | {
            "train/loss": np.mean(list(means.values())),
            "speed/frames_per_second": steps * frames_per_step / seconds,
            "speed/wait_for_data_share": self.waited / seconds,
        }


def check_finite(grad_norm: jax.Array, step: int) -> None:
    """Raises `UserError` where training has diverged; waits for the step."""
    if not np.isfinite(grad_norm):
        raise UserError(
            f"the gradient norm of step {step} is {grad_norm}; nothing of it was saved: start "
            "again from the last checkpoint, or anew with a lower --optimizer.peak-lr"
        )


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

    SIGTERM and Ctrl-C save a checkpoint at the next step and end the run.

    Raises:
      UserError: settings, data, model and folder do not go together, or the loss is not finite.
    """
    with catching_signals() as caught:
        step = _train(config, caught)
    if caught:
        tqdm.write(f"stopped and saved at step {step}; the same command goes on from there")
        raise SystemExit(128 + caught[0])


def _train(config: RunConfig, caught: list[int]) -> int:
    """`train`, until `caught` is not empty; the last step, saved."""
    setup = set_up(config)
    batches, held_out = open_data(config, setup)
    decoder = open_decoder(config, setup.spec)
    abstract, shardings = state_shardings(config, setup.t5_params, setup.mesh)
    frozen_text = None
    if not config.text.finetune:
        frozen_text = jax.device_put(setup.t5_params, sharding.replicated(setup.mesh))
    key, static = jax.random.key(config.seed), setup.static(config)
    learning_rate = optimizer.learning_rate(config.optimizer)
    data_set = records.digest(config.data.path)

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        manager = stack.enter_context(checkpoint.open_manager(config))  # waits for the last save
        step = manager.latest_step() or 0
        if step:
            state = checkpoint.restore(manager, step, **abstract, data=None)
            position = state.pop("data")
            if position.pop("data_set") != data_set:
                raise UserError(
                    f"{config.data.path} is not the data set that {config.out} was trained on up "
                    f"to step {step}: go on with that one, or begin another run"
                )
            batches.set_state(position)
        else:
            init = jax.jit(functools.partial(init_state, config), out_shardings=shardings)
            state = init(setup.t5_params)
        tqdm.write(
            f"{transformer.count_params(state['params']['lm']) / 1e6:.1f} M parameters, "
            f"{config.data.batch_size} clips of {setup.frames} frames a step, {setup.dtype} on "
            f"{setup.mesh.size} {jax.devices()[0].device_kind} device(s)"
            + (f", resumed at step {step}" if step else "")
        )
        scalars = stack.enter_context(contextlib.closing(Scalars(Path(config.out), step)))
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=step, unit="step", desc="train", smoothing=0.1)
        )
        window, saved = Window(), step
        while step < config.steps and not caught:
            before = time.perf_counter()
            batch = to_devices(next(batches), setup.mesh)
            position = batches.get_state() | {"data_set": data_set}
            window.waited += time.perf_counter() - before
            stage = objective.stage_of_step(config.seed, step, config.model.num_codebooks)
            state, metrics = train_step(
                state, frozen_text, batch, key, stage, local=stage > 0, **static
            )
            window.losses[stage].append(metrics.pop("loss"))
            step += 1
            bar.update()
            last = step == config.steps or bool(caught)
            logging, saving = step % config.log_every == 0, manager.should_save(step)
            if logging or saving or last:
                check_finite(metrics["grad_norm"], step)
            if logging or last:
                values = window.scalars(config.data.batch_size * setup.frames)
                metrics["learning_rate"] = learning_rate(step - 1)
                scalars.log(step, values | {f"train/{k}": v for k, v in metrics.items()})
                bar.set_postfix(
                    loss=f"{values['train/loss']:.3f}",
                    frames_per_s=f"{values['speed/frames_per_second']:,.0f}",
                )
                window = Window()
            if saving or last:
                checkpoint.save(manager, step, state, position)
                saved = step
            if caught:
                break
            aside = time.perf_counter()
            if held_out and step % config.eval_every == 0:
                losses = validation_loss(state["ema"], frozen_text, held_out, key, **static)
                by_codebook = {f"validation/loss_{k}": loss for k, loss in enumerate(losses)}
                scalars.log(step, by_codebook | {"validation/loss": np.mean(losses)})
                tqdm.write(f"step {step}: validation loss {np.mean(losses):.4f}")
            if decoder and step % config.sample_every == 0:
                folder = write_samples(config, setup, decoder, state["ema"], frozen_text, step)
                tqdm.write(f"step {step}: samples in {folder}")
            window.started += time.perf_counter() - aside  # evaluation is not training time
        if caught and saved < step:
            # The signal came after the step's own saving was decided.
            check_finite(metrics["grad_norm"], step)
            checkpoint.save(manager, step, state, position)
    return step
