"""The optimizer of the paper (section 4): clipped AdamW, linear warm-up, cosine decay."""

import optax

from magnet_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step number to learning rate; the first step already learns a little."""
    cosine = optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.schedule_steps,
        end_value=config.peak_lr * config.final_lr_ratio,
    )
    return lambda count: cosine(count + 1)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients are clipped by their global norm; weights decay towards 0 apart from them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
