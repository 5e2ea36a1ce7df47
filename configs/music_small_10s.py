"""MAGNeT small, text to music, 10 s (section 4): 420 M parameters, batch 576 clips.

python -m launch.train --config music_small_10s --data DATA --out RUN

The paper's hyper-parameters are the defaults, but for D-Adaptation. The data set's codec is
facebook/encodec_32khz.
"""

from magnet_jax.config import DataConfig, OptimizerConfig, RunConfig, TextConfig

config = RunConfig(
    text=TextConfig(source="t5-base"),
    data=DataConfig(segment_seconds=10.0, batch_size=576),
    optimizer=OptimizerConfig(name="dadam", peak_lr=1.0),
    sample_prompts=("90s rock song with electric guitar and heavy drums",),
)
