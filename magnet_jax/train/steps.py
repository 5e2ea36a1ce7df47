"""The compiled steps of training: a state's start, one update, and the validation loss.

A step is a pure function of (state, batch, key, stage). What the programs depend on is one
hashable `Static`; two programs of each step are compiled, for stage 0 and for those above.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from magnet_jax.config import (
    KernelConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Remat,
    RunConfig,
)
from magnet_jax.errors import UserError
from magnet_jax.model import lora, sharding, t5, transformer
from magnet_jax.model.kernels import choose_kernels, with_kernels
from magnet_jax.train import hybrid_objective, objective, optimizer

RATE_BINS = 4  # masking rates by which the validation loss is split: quarters of [0, 1]
INPUTS = ("codes_BKT", "valid_BT", "text_ids_BS", "text_mask_BS", "seed_B")  # of a batch


class Static(NamedTuple):
    """What the programs of a run depend on, beside shapes."""

    model: ModelConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    t5: t5.T5Config
    train_text: bool
    condition_dropout: float
    dtype: jnp.dtype
    remat: Remat
    kernels: KernelConfig  # none of them 'auto'
    num_parts: int  # a batch is computed in so many, one after another
    mesh: Mesh


def make_static(
    config: RunConfig, t5_config: t5.T5Config, dtype: jnp.dtype, num_frames: int, mesh: Mesh
) -> Static:
    """The programs of a run, computing a batch whole.

    Raises `UserError` for a mesh that does not fit the model, and kernels that it has not.
    """
    sharding.check_mesh(config.model, mesh)
    if config.model.kind == "hybrid" and config.kernels != KernelConfig():
        raise UserError("the hybrid objective has one kernel of attention: leave out kernels")
    kernels = choose_kernels(
        config.kernels,
        mesh.devices.flat[0].platform,
        config.model,
        num_frames,
        dtype,
    )
    if "splash" in (kernels.full, kernels.local) and mesh.size > 1:
        raise UserError("attention kernel splash cannot be split over several devices")
    return Static(
        model=config.model,
        optimizer=config.optimizer,
        lora=config.lora,
        t5=t5_config,
        train_text=config.text.finetune,
        condition_dropout=config.condition_dropout,
        dtype=jnp.dtype(dtype),
        remat=config.remat,
        kernels=kernels,
        num_parts=1,
        mesh=mesh,
    )


def count_parts(batch_size: int, clips_per_device: int, mesh: Mesh) -> int:
    """The fewest parts of a batch of which a device computes at most `clips_per_device` clips.

    Raises `UserError` for a batch that the mesh cannot share.
    """
    rows = sharding.num_rows(mesh)
    if batch_size % rows:
        raise UserError(
            f"data.batch_size {batch_size} is not a multiple of the {rows} devices that share it "
            "(mesh.data x mesh.fsdp)"
        )
    share = batch_size // rows
    return next(n for n in range(1, share + 1) if not share % n and share // n <= clips_per_device)


# --- the state ----------------------------------------------------------------------------------


def init_state(static: Static, key: jax.Array, given: dict) -> dict:
    """Parameters, their average and the optimizer's moments at step 0. Traceable.

    Args:
      static: of the run.
      key: the run's.
      given: parameters to start from: 'text' of the text encoder and, of a run that begins with
        another model, 'lm'.

    Returns:
      'params', 'ema' and 'opt'. Parameters are what is trained: 'lm' and perhaps 'text', or
      adapters alone, 'lora'.
    """
    if static.lora.rank:
        params = {"lora": lora.init_adapters(static.lora, static.model, key)}
    else:
        params = {
            "lm": given["lm"] if "lm" in given else transformer.init_params(static.model, key)
        }
    if static.train_text:
        params["text"] = given["text"]
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer.make_optimizer(static.optimizer).init(params),
    }


def state_shardings(static: Static) -> tuple[dict, dict]:
    """(shapes with shardings, shardings) of a whole train state."""
    text = jax.eval_shape(functools.partial(t5.init, static.t5), jax.random.key(0))
    if static.lora.rank:
        params = {"lora": lora.adapter_shardings(static.model, static.lora, static.mesh)}
    else:
        params = {"lm": sharding.model_shardings(static.model, static.mesh)}
    if static.train_text:
        params["text"] = sharding.text_shardings(text, static.mesh)
    init = functools.partial(init_state, static)
    shapes = jax.eval_shape(init, jax.random.key(0), {"text": text})
    shardings = sharding.like_params(shapes, params, static.mesh)
    return sharding.abstract(shapes, shardings), shardings


def frozen_shardings(static: Static) -> tuple[dict, dict]:
    """(shapes with shardings, shardings) of what the steps need beside the state, and do not train.

    'text' where the text encoder is not trained, 'lm' where adapters are.
    """
    shapes, shardings = {}, {}
    if not static.train_text:
        shapes["text"] = jax.eval_shape(functools.partial(t5.init, static.t5), jax.random.key(0))
        shardings["text"] = sharding.text_shardings(shapes["text"], static.mesh)
    if static.lora.rank:
        init = functools.partial(transformer.init_params, static.model)
        shapes["lm"] = jax.eval_shape(init, jax.random.key(0))
        shardings["lm"] = sharding.model_shardings(static.model, static.mesh)
    return sharding.abstract(shapes, shardings), shardings


def merged(lora: LoraConfig, params: dict, frozen: dict) -> tuple[dict, dict]:
    """The transformer's and the text encoder's parameters, adapters added. Traceable."""
    if "lora" in params:
        lm = lora.merge_adapters(frozen["lm"], params["lora"], lora)
    else:
        lm = params["lm"]
    return lm, params["text"] if "text" in params else frozen["text"]


# --- the steps ----------------------------------------------------------------------------------


def _draw_noise(
    key: jax.Array, batch: dict, static: Static, condition_dropout: float
) -> objective.Noise | hybrid_objective.Noise:
    num_frames = batch["codes_BKT"].shape[-1]
    if static.model.kind == "hybrid":
        return hybrid_objective.draw_noise(
            key, batch["seed_B"], static.model, num_frames, condition_dropout
        )
    return objective.draw_noise(key, batch["seed_B"], num_frames, condition_dropout)


def _sums(
    params: dict,
    frozen: dict,
    batch: dict,
    noise: objective.Noise | hybrid_objective.Noise,
    stage: jax.Array,
    static: Static,
    local: bool,
) -> objective.Sums | hybrid_objective.Sums:
    lm, text = merged(static.lora, params, frozen)
    states_BSE = t5.encode(
        text, static.t5, batch["text_ids_BS"], batch["text_mask_BS"], dtype=static.dtype
    )
    if static.model.kind == "hybrid":
        sums = hybrid_objective.sums
    else:
        near = static.model.context(local) is not None
        attend = with_kernels(static.kernels, near=near)
        sums = functools.partial(objective.sums, attend=attend)
    return sums(
        lm,
        states_BSE,
        batch["text_mask_BS"],
        batch["codes_BKT"],
        batch["valid_BT"],
        noise,
        stage,
        config=static.model,
        local=local,
        dtype=static.dtype,
        remat=static.remat,
        sharding=sharding.batch_sharding(static.mesh),
    )


def _total(sums: objective.Sums | hybrid_objective.Sums, static: Static) -> objective.Sums:
    """The sums of what is minimised."""
    if isinstance(sums, hybrid_objective.Sums):
        return hybrid_objective.total(sums, static.model.num_codebooks)
    return sums


def means(sums: objective.Sums | hybrid_objective.Sums, static: Static) -> dict[str, jax.Array]:
    """Losses and accuracies: 'loss', 'accuracy', and those of the halves of a hybrid."""
    if isinstance(sums, hybrid_objective.Sums):
        return hybrid_objective.means(sums, static.model.num_codebooks)
    return objective.means(sums)


def _in_parts(batch: dict, static: Static) -> dict:
    """[B, ...] -> [M, B / M, ...], where no row leaves its device."""
    rows, parts = sharding.num_rows(static.mesh), static.num_parts

    def split(x: jax.Array) -> jax.Array:
        by_device = x.reshape(rows, parts, -1, *x.shape[1:])
        x = by_device.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, sharding.parts_sharding(static.mesh))

    return jax.tree.map(split, batch)


def batch_gradients(
    total_nll: Callable, params: dict, batch: dict, static: Static, shardings: dict
) -> tuple[dict, objective.Sums | hybrid_objective.Sums]:
    """Gradients of the whole batch's mean loss, split as `shardings`, and its sums.

    `total_nll` of (params, part of a batch) gives the sum of the part's losses, and its sums.

    The parts' gradients of sums are added up and divided once, by the tokens of all: exactly those
    of the batch computed whole, but for rounding, however unequal the parts are.
    """
    gradient = jax.grad(total_nll, has_aux=True)
    if static.num_parts == 1:
        gradients, sums = gradient(params, batch)
    else:

        def add(total: tuple, part: dict) -> tuple[tuple, None]:
            total = jax.tree.map(jnp.add, total, gradient(params, part))
            return (jax.lax.with_sharding_constraint(total[0], shardings), total[1]), None

        parts = _in_parts(batch, static)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), _ = jax.lax.scan(add, zeros, parts)
    tokens = jnp.maximum(_total(sums, static).tokens, 1.0)
    return jax.tree.map(lambda g: g / tokens, gradients), sums


@functools.partial(jax.jit, static_argnames=("static", "local"), donate_argnames="state")
def train_step(
    state: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    stage: jax.Array,
    *,
    static: Static,
    local: bool,
) -> tuple[dict, dict]:
    """One update.

    Args:
      state: from `init_state`, donated.
      frozen: the parameters that are not trained (`frozen_shardings`).
      batch: codes_BKT, valid_BT, text_ids_BS, text_mask_BS, seed_B.
      key: the run's key.
      stage: codebook to predict; `local` must be `stage > 0`.

    Returns:
      the new state and {'loss', 'accuracy', 'grad_norm'}, of a hybrid also both of each half
      (`hybrid_objective.means`), with D-Adaptation also 'd'; and for `watch.Window`, which sees by
      them that a step is not finite, 'sum_nll' and 'param_norm', of the new parameters.
    """

    def total_nll(
        params: dict, part: dict
    ) -> tuple[jax.Array, objective.Sums | hybrid_objective.Sums]:
        noise = _draw_noise(key, part, static, static.condition_dropout)
        sums_B = _sums(params, frozen, part, noise, stage, static, local)
        sums = jax.tree.map(jnp.sum, sums_B)
        return _total(sums, static).nll, sums

    shardings = state_shardings(static)[1]
    gradients, sums = batch_gradients(
        total_nll, state["params"], batch, static, shardings["params"]
    )
    updates, opt = optimizer.make_optimizer(static.optimizer).update(
        gradients, state["opt"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    if static.lora.rank:
        # The average of products a b is no product of averages, and is as large as the model. So
        # adapters are not averaged: what is trained is what is validated, sampled and exported.
        ema = params
    else:
        decay, every = static.optimizer.ema_decay, static.optimizer.ema_updates
        step = optimizer.steps_taken(opt)
        ema = optimizer.average(state["ema"], params, step, decay=decay, updates=every)
    metrics = means(sums, static) | {
        "grad_norm": optax.global_norm(gradients),
        "sum_nll": _total(sums, static).nll,
        "param_norm": optax.global_norm(params),
    }
    if (d := optimizer.step_size(opt)) is not None:
        metrics["d"] = d
    # What comes out lives where what came in did, whatever the compiler would rather do.
    state = {"params": params, "ema": ema, "opt": opt}
    return jax.lax.with_sharding_constraint(state, shardings), metrics


def lower(
    static: Static, batch_size: int, num_frames: int, text_tokens: int, stage: int
) -> jax.stages.Lowered:
    """`train_step`, traced with shapes in place of arrays: to compile it without any data."""
    shapes = {
        "codes_BKT": ((static.model.num_codebooks, num_frames), jnp.int32),
        "valid_BT": ((num_frames,), jnp.bool_),
        "text_ids_BS": ((text_tokens,), jnp.int32),
        "text_mask_BS": ((text_tokens,), jnp.bool_),
        "seed_B": ((), jnp.int32),
    }
    rows, whole = sharding.batch_sharding(static.mesh), sharding.replicated(static.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }
    key = jax.eval_shape(jax.random.key, 0)
    return train_step.lower(
        state_shardings(static)[0],
        frozen_shardings(static)[0],
        batch,
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        static=static,
        local=stage > 0,
    )


@functools.partial(jax.jit, static_argnames=("static", "local"))
def eval_step(
    params: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    stage: jax.Array,
    *,
    static: Static,
    local: bool,
) -> objective.Sums | hybrid_objective.Sums:
    """Sums [RATE_BINS] of one stage by masking rate, with every text given; else as in training."""

    def of_part(part: dict) -> objective.Sums | hybrid_objective.Sums:
        noise = _draw_noise(key, part, static, 0.0)
        sums_B = _sums(params, frozen, part, noise, stage, static, local)
        masking = noise.masking if isinstance(noise, hybrid_objective.Noise) else noise
        bin_B = jnp.clip((masking.rate_B * RATE_BINS).astype(jnp.int32), 0, RATE_BINS - 1)
        return jax.tree.map(lambda x: jnp.zeros(RATE_BINS).at[bin_B].add(x), sums_B)

    if static.num_parts == 1:
        return of_part(batch)
    sums_M = jax.lax.map(of_part, _in_parts(batch, static))
    return jax.tree.map(lambda x: x.sum(0), sums_M)
