"""MAGNeT large (AudioCraft: medium), text to music, 10 s: 1.8 G parameters, batch 576 clips.

python -m launch.train --config music_medium_10s --data DATA --out RUN

The paper's 1.5 G do not count cross-attention. Its width, heads and layers are AudioCraft's.
"""

import dataclasses

from configs import music_small_10s
from magnet_jax.config import ModelConfig

config = dataclasses.replace(
    music_small_10s.config, model=ModelConfig(width=1536, num_heads=24, num_layers=48)
)
