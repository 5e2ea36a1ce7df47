"""The shipped model: 10 M parameters, 10 s clips of `launch.recipe`'s music (docs/recipe.md).

python -m launch.train --config recipe --data data/tokens --text.source data/text \\
    --out runs/recipe

The schedule has no end: the run may be stopped, judged and continued at any step.
"""

from magnet_jax.config import (
    DataConfig,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
)

config = RunConfig(
    model=ModelConfig(
        codebook_size=1024, width=256, num_heads=4, num_layers=8, text_width=128, first_context=25
    ),
    text=TextConfig(max_tokens=64, finetune=True),
    data=DataConfig(segment_seconds=10.0, batch_size=8, word_dropout=0.1),
    optimizer=OptimizerConfig(
        schedule="inverse_sqrt",
        peak_lr=1.8e-3,
        warmup_steps=200,
        embed_lr_ratio=60.0,
        head_lr_ratio=6.0,
        weight_decay=0.01,
        ema_decay=0.998,
        ema_updates=1,
    ),
    stage_weights=(7.0, 1.0, 1.0, 1.0),
    init_codes="codec",
    decode=DecodeConfig(temperature=1.0),
    steps=40_000,
    log_every=20,
    eval_every=500,
    eval_batches=8,
    sample_every=2000,
    sample_prompts=(
        "A slow organ chorale in G minor",
        "A lively violin reel in D major",
        "A calm piece played on the harp",
    ),
    save_every=100,
    keep_every=2000,
)
