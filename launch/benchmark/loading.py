"""How much faster the loader is than the train step that it feeds."""

import dataclasses
import functools
import time
from pathlib import Path

import jax

from launch.train import load_config
from magnet_jax import data, records, sampling, sharding, t5, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Frames a second: the loader alone, and a train step alone on batches in memory."""

    data: Path
    """A data set of `python -m tokenization.job`."""
    config: str = "demo"
    """Config of the train step."""
    batches: int = 200
    """Batches to load."""
    steps: int = 20
    """Steps to run, after those that compile."""


def measure(args: Args) -> None:
    config = load_config(args.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(args.data)))
    spec = records.read_codec_spec(args.data)
    t5_config, t5_params, tokenizer = t5.load(config.text.source)
    train.check_fit(config, spec, t5_config)
    frames = sampling.segment_frames(config, spec)
    batches = data.make_train_iterator(
        config.data,
        frames=frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=tokenizer,
        max_tokens=config.text.max_tokens,
        seed=config.seed,
    )
    next(batches)
    started = time.perf_counter()
    for _ in range(args.batches):
        batch = next(batches)
    loaded = args.batches * config.data.batch_size * frames / (time.perf_counter() - started)

    mesh = sharding.make_mesh(config.mesh)
    _, shardings = train.state_shardings(config, t5_params, mesh)
    init = functools.partial(train.init_state, config)
    state = jax.jit(init, out_shardings=shardings)(t5_params)
    frozen_text = None if config.text.finetune else t5_params
    batch = train.to_devices(batch, mesh)
    static = dict(
        config=config, t5_config=t5_config, dtype=sampling.compute_dtype(config), mesh=mesh
    )
    # As in training, each codebook has its turn; the first round compiles both programs.
    num_codebooks = config.model.num_codebooks
    for step in range(num_codebooks + args.steps):
        if step == num_codebooks:
            jax.block_until_ready(state)
            started = time.perf_counter()
        stage = step % num_codebooks
        state, _ = train.train_step(
            state, frozen_text, batch, jax.random.key(0), stage, local=stage > 0, **static
        )
    jax.block_until_ready(state)
    trained = args.steps * config.data.batch_size * frames / (time.perf_counter() - started)
    print(f"loader      {loaded:12,.0f} frames/s")
    print(f"train step  {trained:12,.0f} frames/s")
    print(f"ratio       {loaded / trained:12.1f}")
