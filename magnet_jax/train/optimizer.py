"""The optimizers of the paper (section 4) and AudioCraft's: AdamW, and Adam with D-Adaptation.

Gradients are clipped by their global norm in front of both, and the learning rate warms up
linearly before its schedule.
"""

import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magnet_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step number to learning rate; the first step already learns a little.

    The inverse square root is fairseq's, also AudioCraft's: continuous at the end of the warm-up.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    if config.schedule == "cosine":
        schedule = optax.schedules.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=config.schedule_steps,
            end_value=peak * config.final_lr_ratio,
        )
    else:

        def schedule(count):
            step = jnp.asarray(count, jnp.float32)
            after = jnp.sqrt(warmup / step) if config.schedule == "inverse_sqrt" else 1.0
            return peak * jnp.where(step < warmup, step / max(warmup, 1), after)

    return lambda count: schedule(count + 1)


def ends_at(config: OptimizerConfig) -> float:
    """The step from which on the learning rate is 0; infinity where it never is."""
    ends = config.schedule == "cosine" and config.final_lr_ratio == 0
    return config.schedule_steps if ends else math.inf


class DAdamState(NamedTuple):
    """What `dadam` remembers; of the three trees each has the parameters' structure, in float32."""

    count: jax.Array  # steps taken
    d: jax.Array  # the estimated step size, one for all parameters
    g_sq: jax.Array  # average of the squared step sizes times |gradient|^2, in Adam's metric
    mu: Any  # first moment of the steps: of gradients times the step size that each was taken with
    nu: Any  # second moment of the gradients
    s: Any  # as mu, with the decay b2


def dadam(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    d0: float,
    growth_rate: float = 0.0,
) -> optax.GradientTransformation:
    """Adam whose step size is found while it runs (Defazio & Mishchenko 2023), as in AudioCraft.

    The step size is d * learning rate. d is a lower bound on how far the weights began from the
    optimum, by what the gradients have said so far; it never falls. It is the earlier estimator,
    |s|^2 against the sum of |gradient|^2, without correction of Adam's bias;
    `optax.contrib.dadapt_adamw` has a later one, whose d takes another course.

    A step whose learning rate is zero, or before which no gradient was other than zero, changes
    nothing, so that a warm-up may begin at zero.

    Args:
      learning_rate: step number to the factor of d; near 1 after the warm-up.
      b1, b2, eps: Adam's.
      weight_decay: decoupled: weights shrink by this times the step size, whatever the gradients.
      d0: first d.
      growth_rate: d grows by at most this factor a step; 0 sets no limit.
    """

    def init(params: Any) -> DAdamState:
        def zeros():
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)

        zero = jnp.zeros((), jnp.float32)
        d = jnp.full((), d0, jnp.float32)
        return DAdamState(jnp.zeros((), jnp.int32), d, zero, zeros(), zeros(), zeros())

    def update(gradients: Any, state: DAdamState, params: Any) -> tuple[Any, DAdamState]:
        rate = jnp.asarray(learning_rate(state.count), jnp.float32)
        step = state.d * rate
        g = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * step * g, state.mu, g)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, g)
        s = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * step * g, state.s, g)
        scale = jax.tree.map(lambda v: jnp.sqrt(v) + eps, nu)

        # One d for all parameters: the sums run over every tree whole, and every device.
        g_norm = _sum(jax.tree.map(lambda g, scale: g * g / scale, g, scale))
        s_norm = _sum(jax.tree.map(lambda s, scale: s * s / scale, s, scale))
        s_l1 = _sum(jax.tree.map(jnp.abs, s))
        g_sq = b2 * state.g_sq + (1 - b2) * step**2 * g_norm
        learns = (rate > 0) & (s_l1 > 0)
        estimate = (s_norm / (1 - b2) - g_sq) / jnp.where(s_l1 > 0, s_l1, 1.0)
        if growth_rate:
            estimate = jnp.minimum(estimate, state.d * growth_rate)
        d = jnp.maximum(state.d, estimate)

        updates = jax.tree.map(
            lambda m, scale, p: jnp.where(learns, -m / scale - weight_decay * step * p, 0.0).astype(
                p.dtype
            ),
            mu,
            scale,
            params,
        )
        new = DAdamState(state.count, d, g_sq, mu, nu, s)
        new = jax.tree.map(lambda new, old: jnp.where(learns, new, old), new, state)
        return updates, new._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def _sum(tree: Any) -> jax.Array:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients are clipped by their global norm; weights decay towards 0 apart from them."""
    adam = dict(b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    if config.name == "dadam":
        steps = dadam(learning_rate(config), **adam, d0=config.d0, growth_rate=config.growth_rate)
    else:
        steps = optax.adamw(learning_rate(config), **adam)
    chained = [optax.clip_by_global_norm(config.clip_norm), steps]
    ratios = {"embed": config.embed_lr_ratio, "heads": config.head_lr_ratio}
    if set(ratios.values()) != {1.0}:  # (its state, though empty, is in the checkpoints)
        chained.append(optax.stateless(lambda updates, _: _scaled(updates, ratios)))
    return optax.chain(*chained)


def _scaled(updates: dict, ratios: Mapping[str, float]) -> dict:
    """The steps of parameters of the transformer multiplied, by their names."""
    lm = updates["lm"]
    return updates | {"lm": lm | {name: lm[name] * ratio for name, ratio in ratios.items()}}


def _find(opt_state: Any, kind: type | types.UnionType) -> Any:
    """The state of that kind within an optimizer's; None where there is none."""
    is_kind = lambda node: isinstance(node, kind)  # noqa: E731
    return next(filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind)), None)


def step_size(opt_state: Any) -> jax.Array | None:
    """d of D-Adaptation, which multiplies the learning rate; None of another optimizer's state."""
    found = _find(opt_state, DAdamState)
    return None if found is None else found.d


def steps_taken(opt_state: Any) -> jax.Array:
    """How many updates an optimizer has made."""
    return _find(opt_state, DAdamState | optax.ScaleByAdamState).count


def average(ema: Any, params: Any, step: jax.Array, decay: float, updates: int) -> Any:
    """The averaged weights after step `step`, counted from 1, by AudioCraft's law.

    Every `updates` steps the weights enter the average, and those of earlier updates lose the
    factor `decay`. All shares add up to 1: the first update replaces the start.
    """
    number = step // updates  # of this update, from 1
    share = (1 - decay) / -jnp.expm1(number * math.log(max(decay, 1e-30)))
    share = jnp.where(number == 1, 1.0, share)  # exactly, whatever is rounded above
    share = jnp.where(step % updates == 0, share, 0.0)
    return optax.incremental_update(params, ema, share)
