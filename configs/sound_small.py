"""MAGNeT small, text to sound, 10 s (Appendix G): 420 M parameters, batch 128 clips.

python -m launch.train --config sound_small --data DATA --out RUN

The data set's codec has 16 kHz and codebooks of 2048, as AudioGen's. From the paper are the text
encoder (Table 5) and how sounds are sampled (Appendix G). What it leaves open is AudioCraft's.
That sounds are mixed in pairs is tokenization.job's part: docs/data.md, "Text to sound".
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
    model=ModelConfig(text_width=1024),
    text=TextConfig(source="t5-large"),
    # AudioCraft's: batch (after mixing), and texts as they are.
    data=DataConfig(segment_seconds=10.0, batch_size=128, merge_text_p=0.0, word_dropout=0.0),
    # AudioCraft's: learning rate, warm-up, schedule.
    optimizer=OptimizerConfig(schedule="inverse_sqrt", peak_lr=5e-4, warmup_steps=3000),
    decode=DecodeConfig(temperature=3.5, top_p=0.8, max_guidance=20.0),
    condition_dropout=0.1,  # AudioCraft's; section 4 has 0.3 for music
    steps=200_000,  # AudioCraft's; section 4 has 1 M
    sample_prompts=("A dog barks while rain falls on a tin roof",),
)
