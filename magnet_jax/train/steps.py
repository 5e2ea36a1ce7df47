"""The compiled steps of training: a state's start, one update, and the validation loss.

A step is a pure function of (state, batch, key, stage). What its programs depend on beside shapes
is one hashable `StepSettings`. Two programs of each step are compiled: for stage 0 and for those
above.
"""

import dataclasses
import functools
from collections.abc import Callable

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
from magnet_jax.model.forms import Forms, choose_forms
from magnet_jax.model.kernels import choose_kernels, with_kernels
from magnet_jax.train import hybrid_objective, objective, optimizer

RATE_BINS = 4  # masking rates by which the validation loss is split: quarters of [0, 1]
INPUTS = ("codes_BKT", "valid_BT", "text_ids_BS", "text_mask_BS", "seed_B")  # of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the compiled steps of a run depend on, beside shapes."""

    model: ModelConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    t5: t5.T5Config
    train_text: bool
    condition_dropout: float
    dtype: jnp.dtype
    remat: Remat  # not 'auto'
    kernels: KernelConfig  # none of them 'auto'
    form: Forms
    num_parts: int  # a batch is computed in so many, one after another
    mesh: Mesh


Noise = objective.Noise | hybrid_objective.Noise
LossAux = objective.LossAux | hybrid_objective.LossAux


def remats(asked: Remat, platform: str) -> tuple[Remat, ...]:
    """What may be computed again on a platform, the least first."""
    if asked != "auto":
        return (asked,)
    if platform == "cpu":
        return ("none",)
    # On TPUs it is quicker to compute a norm again than to read what it made from memory.
    return tuple(transformer.KEPT) if platform == "tpu" else ("none", *transformer.KEPT)


def make_settings(
    config: RunConfig, t5_config: t5.T5Config, dtype: jnp.dtype, num_frames: int, mesh: Mesh
) -> StepSettings:
    """The settings of a run's steps, which compute a batch whole, and again as little as may be.

    Raises `UserError` for a mesh that does not fit the model, and kernels that it has not.
    """
    sharding.check_mesh(config.model, mesh)
    if config.model.kind == "hybrid" and config.kernels != KernelConfig():
        raise UserError("the hybrid objective has one kernel of attention: leave out kernels")
    platform = mesh.devices.flat[0].platform
    kernels = choose_kernels(
        config.kernels, platform, config.model, num_frames, dtype, trained=True
    )
    if "splash" in (kernels.full, kernels.local) and mesh.size > 1:
        raise UserError("attention kernel splash cannot be split over several devices")
    return StepSettings(
        model=config.model,
        optimizer=config.optimizer,
        lora=config.lora,
        t5=t5_config,
        train_text=config.text.finetune,
        condition_dropout=config.condition_dropout,
        dtype=jnp.dtype(dtype),
        remat=remats(config.remat, platform)[0],
        kernels=kernels,
        form=choose_forms(platform),
        num_parts=1,
        mesh=mesh,
    )


# --- the state ----------------------------------------------------------------------------------


def init_state(settings: StepSettings, key: jax.Array, given: dict) -> dict:
    """'params', their average 'ema' and the optimizer's moments 'opt' at step 0. Traceable.

    Parameters are what is trained: 'lm' and perhaps 'text', or adapters alone, 'lora'. `given` are
    those to start from: 'text' and, of a run that begins with another model, 'lm'.
    """
    if settings.lora.rank:
        params = {"lora": lora.init_adapters(settings.lora, settings.model, key)}
    elif "lm" in given:
        params = {"lm": given["lm"]}
    else:
        params = {"lm": transformer.init_params(settings.model, key)}
    if settings.train_text:
        params["text"] = given["text"]
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer.make_optimizer(settings.optimizer).init(params),
    }


def state_shardings(settings: StepSettings) -> tuple[dict, dict]:
    """(shapes with shardings, shardings) of a whole train state."""
    text = jax.eval_shape(functools.partial(t5.init, settings.t5), jax.random.key(0))
    if settings.lora.rank:
        params = {"lora": lora.adapter_shardings(settings.model, settings.lora, settings.mesh)}
    else:
        params = {"lm": sharding.model_shardings(settings.model, settings.mesh)}
    if settings.train_text:
        params["text"] = sharding.text_shardings(text, settings.mesh)
    init = functools.partial(init_state, settings)
    shapes = jax.eval_shape(init, jax.random.key(0), {"text": text})
    shardings = sharding.like_params(shapes, params, settings.mesh)
    return sharding.abstract(shapes, shardings), shardings


def frozen_shardings(settings: StepSettings) -> tuple[dict, dict]:
    """(shapes with shardings, shardings) of what the steps need beside the state, and do not train.

    'text' where the text encoder is not trained, 'lm' where adapters are.
    """
    shapes, shardings = {}, {}
    if not settings.train_text:
        shapes["text"] = jax.eval_shape(functools.partial(t5.init, settings.t5), jax.random.key(0))
        shardings["text"] = sharding.text_shardings(shapes["text"], settings.mesh)
    if settings.lora.rank:
        init = functools.partial(transformer.init_params, settings.model)
        shapes["lm"] = jax.eval_shape(init, jax.random.key(0))
        shardings["lm"] = sharding.model_shardings(settings.model, settings.mesh)
    return sharding.abstract(shapes, shardings), shardings


def network_params(adapters: LoraConfig, params: dict, frozen: dict) -> tuple[dict, dict]:
    """Parameters of the transformer, adapters merged into it, and of the text encoder."""
    if "lora" in params:
        lm = lora.merge_adapters(frozen["lm"], params["lora"], adapters)
    else:
        lm = params["lm"]
    return lm, params["text"] if "text" in params else frozen["text"]


# --- the steps ----------------------------------------------------------------------------------


def draw_noise(
    key: jax.Array, batch: dict, settings: StepSettings, condition_dropout: float
) -> Noise:
    """The random numbers of a step, as the model's objective wants them."""
    seed_B, num_frames = batch["seed_B"], batch["codes_BKT"].shape[-1]
    if settings.model.kind == "hybrid":
        return hybrid_objective.draw_noise(
            key, seed_B, settings.model, num_frames, condition_dropout
        )
    return objective.draw_noise(key, seed_B, num_frames, condition_dropout)


def loss_fn(
    params: dict,
    frozen: dict,
    batch: dict,
    noise: Noise,
    stage: jax.Array,
    *,
    settings: StepSettings,
    local: bool,
) -> tuple[jax.Array, LossAux]:
    """The sum of a batch's losses in nats, and each row's share; arguments as of `train_step`."""
    lm, text = network_params(settings.lora, params, frozen)
    states_BSE = t5.encode(
        text, settings.t5, batch["text_ids_BS"], batch["text_mask_BS"], dtype=settings.dtype
    )
    if settings.model.kind == "hybrid":
        of_model = hybrid_objective.loss_fn
    else:
        near = settings.model.context(local) is not None
        attend = with_kernels(settings.kernels, near=near, mesh=settings.mesh)
        of_model = functools.partial(objective.loss_fn, attend=attend)
    return of_model(
        lm, states_BSE, batch, noise, stage, config=settings.model, local=local,
        dtype=settings.dtype, remat=settings.remat, form=settings.form,
        sharding=sharding.batch_sharding(settings.mesh),
    )  # fmt: skip


def _in_parts(batch: dict, settings: StepSettings) -> dict:
    """[B, ...] -> [M, B / M, ...], where no row leaves its device."""
    rows, parts = sharding.num_rows(settings.mesh), settings.num_parts

    def split(x: jax.Array) -> jax.Array:
        by_device = x.reshape(rows, parts, -1, *x.shape[1:])
        x = by_device.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, sharding.parts_sharding(settings.mesh))

    return jax.tree.map(split, batch)


def batch_gradients(
    loss_fn: Callable, params: dict, batch: dict, settings: StepSettings, shardings: dict
) -> tuple[dict, LossAux]:
    """Gradients of the whole batch's mean loss, split as `shardings`, and its sums.

    `loss_fn` of (params, part of a batch) gives the sum of the part's losses, and each row's. The
    gradients of sums are added up and divided once, by the tokens of all parts: those of the batch
    computed whole, but for rounding, however unequal the parts are.
    """

    def gradient(params: dict, part: dict) -> tuple[dict, LossAux]:
        # Gradients of our own are traced when the loss has been.
        with transformer.exact(settings.dtype):
            gradients, aux_B = jax.grad(loss_fn, has_aux=True)(params, part)
        return gradients, jax.tree.map(jnp.sum, aux_B)

    if settings.num_parts == 1:
        gradients, aux = gradient(params, batch)
    else:

        def add(total: tuple, part: dict) -> tuple[tuple, None]:
            total = jax.tree.map(jnp.add, total, gradient(params, part))
            return (jax.lax.with_sharding_constraint(total[0], shardings), total[1]), None

        parts = _in_parts(batch, settings)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, aux), _ = jax.lax.scan(add, zeros, parts)
    tokens = jnp.maximum(aux.tokens, 1.0)
    return jax.tree.map(lambda g: g / tokens, gradients), aux


@functools.partial(jax.jit, static_argnames=("settings", "local"), donate_argnames="state")
def train_step(
    state: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    stage: jax.Array,
    *,
    settings: StepSettings,
    local: bool,
) -> tuple[dict, dict]:
    """One update.

    Args:
      state: from `init_state`, donated.
      frozen: the parameters that are not trained (`frozen_shardings`).
      batch: `INPUTS`.
      key: the run's key.
      stage: codebook to predict; `local` must be `stage > 0`.

    Returns:
      the new state and {'loss', 'accuracy', 'grad_norm'}, of a hybrid also those of both halves,
      with D-Adaptation 'd'; for `watch.Window.check_finite` 'sum_nll' and the new 'param_norm'.
    """

    def part_loss(params: dict, part: dict) -> tuple[jax.Array, LossAux]:
        noise = draw_noise(key, part, settings, settings.condition_dropout)
        return loss_fn(params, frozen, part, noise, stage, settings=settings, local=local)

    shardings = state_shardings(settings)[1]
    gradients, aux = batch_gradients(
        part_loss, state["params"], batch, settings, shardings["params"]
    )
    updates, opt = optimizer.make_optimizer(settings.optimizer).update(
        gradients, state["opt"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    if settings.lora.rank:
        # The average of products a b is no product of averages, and is as large as the model. So
        # adapters are not averaged: what is trained is what is validated, sampled and exported.
        ema = params
    else:
        decay, every = settings.optimizer.ema_decay, settings.optimizer.ema_updates
        step = optimizer.steps_taken(opt)
        ema = optimizer.average(state["ema"], params, step, decay=decay, updates=every)
    metrics = aux.metrics() | {
        "grad_norm": optax.global_norm(gradients),
        "sum_nll": aux.nll,
        "param_norm": optax.global_norm(params),
    }
    if (d := optimizer.step_size(opt)) is not None:
        metrics["d"] = d
    # What comes out lives where what came in did, whatever the compiler would rather do.
    state = {"params": params, "ema": ema, "opt": opt}
    return jax.lax.with_sharding_constraint(state, shardings), metrics


@functools.partial(jax.jit, static_argnames=("settings", "local"))
def eval_step(
    params: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    stage: jax.Array,
    *,
    settings: StepSettings,
    local: bool,
) -> LossAux:
    """Sums [RATE_BINS] of one stage by masking rate, with every text given; else as in training."""
    # Layers are written out for the backward pass, which there is none of.
    form = settings.form._replace(written_out=False)
    settings = dataclasses.replace(settings, form=form)

    def of_part(part: dict) -> LossAux:
        noise = draw_noise(key, part, settings, 0.0)
        _, aux_B = loss_fn(params, frozen, part, noise, stage, settings=settings, local=local)
        bin_B = jnp.clip((noise.rate_B * RATE_BINS).astype(jnp.int32), 0, RATE_BINS - 1)
        return jax.tree.map(lambda x: jnp.zeros(RATE_BINS).at[bin_B].add(x), aux_B)

    if settings.num_parts == 1:
        return of_part(batch)
    aux_M = jax.lax.map(of_part, _in_parts(batch, settings))
    return jax.tree.map(lambda x: x.sum(0), aux_M)
