"""A model of 2 M parameters on the shipped clips, for `make demo`: minutes on two CPU cores.

python -m launch.train --config demo --data demo/tokens --out demo/run
"""

from magnet_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
)

config = RunConfig(
    model=ModelConfig(codebook_size=1024, width=128, num_heads=4, num_layers=4, text_width=128),
    text=TextConfig(max_tokens=48, finetune=True),
    data=DataConfig(segment_seconds=3.0, batch_size=8),
    optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=30, schedule_steps=400, ema_updates=1),
    steps=400,
    log_every=20,
    eval_every=200,
    sample_every=200,
    sample_prompts=("A Bach chorale played on church organ, slow, in G minor",),
    save_every=100,
)
