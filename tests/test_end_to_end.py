"""It learns and decodes, together: captions to the clips they belong to."""

import dataclasses

import numpy as np
import tiny

from magnet_jax.checkpoints import pretrained
from magnet_jax.config import (
    AutoregressiveConfig,
    DataConfig,
    DecodeConfig,
    HybridConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    with_hybrid_objective,
)
from magnet_jax.decode import sampling
from magnet_jax.train import loop

SMALLER = ModelConfig(
    num_codebooks=2, codebook_size=1024, width=64, num_heads=4, num_layers=2, text_width=128
)


def learning(tokens, steps, *, batch_size, peak_lr):
    """Settings to learn a few clips by heart, with a small text encoder."""
    return {
        "text": TextConfig(max_tokens=32, finetune=True),
        "data": DataConfig(
            path=str(tokens),
            segment_seconds=tiny.SECONDS,
            batch_size=batch_size,
            merge_text_p=0.0,
            word_dropout=0.0,
        ),
        "optimizer": OptimizerConfig(
            peak_lr=peak_lr,
            warmup_steps=20,
            schedule_steps=steps,
            weight_decay=0.01,
            ema_decay=0.98,
            ema_updates=1,
        ),
        "condition_dropout": 0.1,
        "steps": steps,
        "log_every": 80,
        "save_every": steps,
    }


def test_a_model_that_knows_four_clips_gives_each_for_its_caption(tmp_path, monkeypatch):
    tiny.use_one_device(monkeypatch)
    examples = tiny.write_clips(tmp_path / "tokens", 4)
    captions = [example["caption"] for example in examples]
    assert len(set(captions)) == 4
    steps, decoding = 240, DecodeConfig(steps=(10, 4), greedy=True, max_guidance=3.0)
    config = dataclasses.replace(
        tiny.run_config(tmp_path / "tokens", tmp_path / "run", decode=decoding, model=SMALLER),
        **learning(tmp_path / "tokens", steps, batch_size=8, peak_lr=5e-3),
    )
    loop.train(config)

    truth_BKT = np.stack([example["codes"][:2] for example in examples])
    codes_BKT = sampling.generate(
        pretrained.load(tmp_path / "run"),
        captions,
        num_frames=truth_BKT.shape[-1],
        decoding=decoding,
        seed=0,
    ).codes_BKT
    agreement = (codes_BKT[:, None, 0] == truth_BKT[None, :, 0]).mean(-1)
    print(agreement.round(2))
    assert (np.diag(agreement) >= 0.8).all()
    assert (agreement[~np.eye(4, dtype=bool)] <= 0.3).all()


def test_a_hybrid_begins_from_text_alone_and_completes_the_clip(tmp_path, monkeypatch):
    """Half a second one step after another, the rest in parallel: two clips, two codebooks."""
    tiny.use_one_device(monkeypatch)
    examples = tiny.write_clips(tmp_path / "tokens", 2)
    steps, decoding = 240, DecodeConfig(steps=(10, 4), greedy=True, max_guidance=3.0)
    config = dataclasses.replace(
        tiny.run_config(tmp_path / "tokens", tmp_path / "run", decode=decoding, model=SMALLER),
        **learning(tmp_path / "tokens", steps, batch_size=4, peak_lr=5e-3),
    )
    loop.train(with_hybrid_objective(config))

    truth_BKT = np.stack([example["codes"][:2] for example in examples])
    codes_BKT = sampling.generate(
        pretrained.load(tmp_path / "run"),
        [example["caption"] for example in examples],
        num_frames=truth_BKT.shape[-1],
        decoding=HybridConfig(
            prompt_seconds=0.5, autoregressive=AutoregressiveConfig(greedy=True), decode=decoding
        ),
        seed=0,
    ).codes_BKT
    agreement = (codes_BKT[:, None] == truth_BKT[None]).mean((-1, -2))
    print(agreement.round(2))
    assert (np.diag(agreement) >= 0.8).all()
    assert (agreement[~np.eye(2, dtype=bool)] <= 0.3).all()
