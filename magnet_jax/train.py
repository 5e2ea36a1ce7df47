"""Training: one linear story from a config to a folder of checkpoints, resumed exactly.

A step is a pure function of (parameters, batch, stage): the batch follows from the seed and the
data position, the stage from (seed, step), all noise from (seed, each clip's own seed). So a run
that was killed and resumed is the run that never was.
"""

import dataclasses
import functools
import json
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tokenizers import Tokenizer
from tqdm import tqdm

from magnet_jax import (
    api,
    audio,
    checkpoint,
    codec,
    data,
    objective,
    optimizer,
    records,
    sharding,
    t5,
    transformer,
)
from magnet_jax.config import CodecSpec, RunConfig
from magnet_jax.errors import UserError


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """Precision of the matrix products on this machine."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def segment_frames(config: RunConfig, spec: CodecSpec) -> int:
    """Frames of a training crop."""
    return round(config.data.segment_seconds * spec.frame_rate)


def check_fit(config: RunConfig, spec: CodecSpec, t5_config: t5.T5Config) -> None:
    """Raises `UserError` where data set, model and text encoder do not go together."""
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
    if segment_frames(config, spec) < model.span_length:
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


def _loss(params, frozen_text, batch, key, stage, *, config, t5_config, local, dropout, dtype):
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
    )


@functools.partial(
    jax.jit, static_argnames=("config", "t5_config", "local", "dtype"), donate_argnames="state"
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
        dropout=config.condition_dropout, dtype=dtype,
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
    return {"params": params, "ema": ema, "opt": opt}, metrics


@functools.partial(jax.jit, static_argnames=("config", "t5_config", "local", "dtype"))
def eval_step(params, frozen_text, batch, key, stage, *, config, t5_config, local, dtype):
    """The loss of one stage with every text given; otherwise as in training."""
    value, _ = _loss(
        params, frozen_text, batch, key, stage, config=config, t5_config=t5_config,
        local=local, dropout=0.0, dtype=dtype,
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


def write_samples(
    config: RunConfig,
    spec: CodecSpec,
    decoder: codec.Codec,
    state: dict,
    frozen_text: dict | None,
    t5_config: t5.T5Config,
    tokenizer: Tokenizer,
    step: int,
    dtype: jnp.dtype,
) -> Path:
    """Samples the run's prompts from the averaged weights, always with the same seed."""
    generated = api.generate_codes(
        state["ema"]["lm"],
        state["ema"].get("text", frozen_text),
        config.sample_prompts,
        config=config.model,
        t5_config=t5_config,
        tokenizer=tokenizer,
        max_tokens=config.text.max_tokens,
        num_frames=segment_frames(config, spec),
        decoding=config.decode,
        seed=config.seed,
        dtype=dtype,
    )
    folder = Path(config.out) / "samples" / f"step_{step:07d}"
    for i, wav_CN in enumerate(decoder.decode(generated.codes_BKT)):
        wav_CN, _ = audio.normalize_loudness(wav_CN, spec.sample_rate, target_lufs=-14.0)
        audio.write_wav(folder / f"{i:02d}.wav", wav_CN, spec.sample_rate)
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


def train(config: RunConfig) -> None:
    """Trains to `config.steps`, from the newest checkpoint of `config.out` if it has one.

    SIGTERM and Ctrl-C save a checkpoint at the next step and end the run.

    Raises:
      UserError: settings, data, model and folder do not go together, or the loss is not finite.
    """
    if not config.out:
        raise UserError("no folder for the run: give --out DIR")
    spec = records.read_codec_spec(config.data.path)
    t5_config, t5_params, tokenizer = t5.load(config.text.source)
    check_fit(config, spec, t5_config)
    mesh = sharding.make_mesh(config.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % rows:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not a multiple of {rows} devices"
        )
    checkpoint.prepare_run(config, spec)

    dtype = compute_dtype(config)
    key = jax.random.key(config.seed)
    frames = segment_frames(config, spec)
    per_batch = dict(
        frames=frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=tokenizer,
        max_tokens=config.text.max_tokens,
    )
    batches = data.make_train_iterator(config.data, **per_batch, seed=config.seed)
    held_out = []
    if config.eval_every and records.has_split(config.data.path, "validation"):
        held_out = [
            to_devices(batch, mesh)
            for batch in data.validation_batches(
                config.data, **per_batch, num_batches=config.eval_batches
            )
        ]
    elif config.eval_every:
        tqdm.write(f"{config.data.path} has no validation split: no validation loss is computed")
    decoder = None
    if config.sample_every and config.sample_prompts:
        decoder = codec.load_codec(
            checkpoint.codec_source(Path(config.out), spec), num_codebooks=spec.num_codebooks
        )
        codec.check_same_codec(spec, decoder.spec, config.data.path)

    abstract, shardings = state_shardings(config, t5_params, mesh)
    manager = checkpoint.open_manager(config)
    step = manager.latest_step() or 0
    if step:
        state = checkpoint.restore(manager, step, **abstract, data=None)
        batches.set_state(state.pop("data"))
    else:
        state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)(t5_params)
    frozen_text = None
    if not config.text.finetune:
        frozen_text = jax.device_put(t5_params, sharding.replicated(mesh))
    static = dict(config=static_part(config), t5_config=t5_config, dtype=dtype)

    tqdm.write(
        f"{transformer.count_params(state['params']['lm']) / 1e6:.1f} M parameters, "
        f"{config.data.batch_size} clips of {frames} frames a step, {dtype} on "
        f"{mesh.size} {jax.devices()[0].device_kind} device(s)"
        + (f", resumed at step {step}" if step else "")
    )
    interrupted = []
    handlers = {
        number: signal.signal(number, lambda number, _: interrupted.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    scalars = Scalars(Path(config.out), step)
    lr = optimizer.learning_rate(config.optimizer)
    losses, waited = defaultdict(list), 0.0
    bar = tqdm(total=config.steps, initial=step, unit="step", desc="train", smoothing=0.1)
    started = time.perf_counter()
    try:
        while step < config.steps and not interrupted:
            before = time.perf_counter()
            batch = to_devices(next(batches), mesh)
            position = batches.get_state()
            waited += time.perf_counter() - before
            stage = objective.stage_of_step(config.seed, step, config.model.num_codebooks)
            state, metrics = train_step(
                state, frozen_text, batch, key, stage, local=stage > 0, **static
            )
            step += 1
            bar.update()
            losses[stage].append(metrics["loss"])
            logging = step % config.log_every == 0 or step == config.steps
            saving = manager.should_save(step)
            if (logging or saving) and not np.isfinite(metrics["loss"]):  # waits for the step
                raise UserError(
                    f"the loss of step {step} is {metrics['loss']}; nothing of it was saved: start "
                    "again from the last checkpoint, or anew with a lower --optimizer.peak-lr"
                )
            if logging:
                seconds = time.perf_counter() - started
                count = sum(map(len, losses.values()))
                means = {k: np.mean(jax.device_get(values)) for k, values in losses.items()}
                mean = np.mean(list(means.values()))
                speed = count * config.data.batch_size * frames / seconds
                scalars.log(
                    step,
                    {f"train/loss_{codebook}": value for codebook, value in sorted(means.items())}
                    | {
                        "train/loss": mean,
                        "train/grad_norm": metrics["grad_norm"],
                        "train/accuracy": metrics["accuracy"],
                        "train/learning_rate": lr(step - 1),
                        "speed/frames_per_second": speed,
                        "speed/wait_for_data_share": waited / seconds,
                    },
                )
                bar.set_postfix(loss=f"{mean:.3f}", frames_per_s=f"{speed:,.0f}")
                losses.clear()
                waited = 0.0
                started = time.perf_counter()
            if saving:
                checkpoint.save(manager, step, state, position)
            aside = time.perf_counter()
            if held_out and step % config.eval_every == 0:
                values = validation_loss(state["ema"], frozen_text, held_out, key, **static)
                by_codebook = {f"validation/loss_{k}": value for k, value in enumerate(values)}
                scalars.log(step, by_codebook | {"validation/loss": np.mean(values)})
                tqdm.write(f"step {step}: validation loss {np.mean(values):.4f}")
            if decoder and step % config.sample_every == 0:
                folder = write_samples(
                    config, spec, decoder, state, frozen_text, t5_config, tokenizer, step, dtype
                )
                tqdm.write(f"step {step}: samples in {folder}")
            started += time.perf_counter() - aside  # evaluation is not training time
        checkpoint.save(manager, step, state, batches.get_state(), force=True)
    finally:
        manager.close()  # waits for the last save
        scalars.close()
        bar.close()
        batches.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupted:
        tqdm.write(f"stopped and saved at step {step}; the same command goes on from there")
        raise SystemExit(128 + interrupted[0])


def static_part(config: RunConfig) -> RunConfig:
    """The config without names that no compiled step depends on."""
    return dataclasses.replace(config, out="", sample_prompts=())
