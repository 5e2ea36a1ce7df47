"""MAGNeT large (AudioCraft: medium), text to music, 30 s: 1.8 G parameters, batch 192 clips.

python -m launch.train --config music_medium_30s --data DATA --out RUN

D-Adaptation as the paper has it; AudioCraft's grid trains this one with AdamW at 1e-4
(--optimizer.name adamw --optimizer.peak-lr 1e-4).
"""

import dataclasses

from configs import music_medium_10s, music_small_30s

config = dataclasses.replace(music_small_30s.config, model=music_medium_10s.config.model)
