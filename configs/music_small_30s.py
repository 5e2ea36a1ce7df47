"""MAGNeT small, text to music, 30 s (section 4): 420 M parameters, batch 192 clips.

python -m launch.train --config music_small_30s --data DATA --out RUN
"""

import dataclasses

from configs import music_small_10s
from magnet_jax.config import DecodeConfig, preset_steps

short = music_small_10s.config
config = dataclasses.replace(
    short,
    data=dataclasses.replace(short.data, segment_seconds=30.0, batch_size=192),
    decode=DecodeConfig(steps=preset_steps("paper-30s", 4)),
)
