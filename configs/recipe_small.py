"""The recipe's model at a quarter of its size, on 5 s: what `launch.ablate` trains and compares.

python -m launch.train --config recipe_small --data data/tokens --text.source data/text \\
    --out runs/small

launch.ablate ends the schedule at its own number of steps, so that equal budgets end alike.
"""

import dataclasses

from configs import recipe

config = dataclasses.replace(
    recipe.config,
    model=dataclasses.replace(recipe.config.model, width=128, num_layers=4),
    data=dataclasses.replace(recipe.config.data, segment_seconds=5.0),
    optimizer=dataclasses.replace(
        recipe.config.optimizer,
        schedule="cosine",
        warmup_steps=100,
        schedule_steps=1000,
        ema_decay=0.99,
    ),
    stage_weights=(),  # (Table 2's restricted context is of the codebooks above the first)
    steps=1000,
    eval_every=1000,
    sample_every=0,
    sample_prompts=(),
    keep_last=1,
    keep_every=0,
)
