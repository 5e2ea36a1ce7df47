"""MAGNeT small, text to music, 10 s (section 4): 420 M parameters, batch 576 clips.

python -m launch.train --config music_small_10s --data.path DATA --out RUN
"""

from magnet_jax.config import DataConfig, RunConfig, TextConfig

config = RunConfig(
    text=TextConfig(source="t5-base"),
    data=DataConfig(segment_seconds=10.0, batch_size=576),
    sample_prompts=("90s rock song with electric guitar and heavy drums",),
    remat=True,
)
