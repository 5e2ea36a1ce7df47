"""The recipe's model with a tonal first stream, for tunes (docs/recipe.md).

python -m launch.train --config recipe_tonal --data data/tokens-tonal --text.source data/text \\
    --out runs/tonal-model

A token of the first stream lasts as long as its note, so it mostly follows from its neighbours. A
small model learns that sooner if it sees near frames alone. And spans are kept in random order,
because keeping the surest first gives one held note.
"""

import dataclasses

from configs import recipe
from magnet_jax.config import DecodeConfig

config = dataclasses.replace(
    recipe.config,
    model=dataclasses.replace(recipe.config.model, num_codebooks=5, first_context=10),
    stage_weights=(5.0, 3.0, 0.7, 0.7, 0.6),
    decode=DecodeConfig(
        steps=(40, 10, 5, 5, 5),
        temperature=1.0,
        order="random",
        max_guidance=3.0,
        min_guidance=3.0,
    ),
    sample_prompts=(
        "A slow melody in G minor played on the cello",
        "A fast reel in D major played on the violin",
        "A moderate melody in C major played on the flute",
    ),
)
