"""MAGNeT large (AudioCraft: medium), text to sound, 10 s: 1.8 G parameters, batch 128 clips.

python -m launch.train --config sound_medium --data DATA --out RUN
"""

import dataclasses

from configs import music_medium_10s, sound_small

config = dataclasses.replace(
    sound_small.config,
    model=dataclasses.replace(music_medium_10s.config.model, text_width=1024),
)
