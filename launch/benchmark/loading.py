"""How much faster the loader is than the train step that it feeds."""

import dataclasses
import time

import jax
import numpy as np

from launch.benchmark.options import Loader
from launch.train import load_config
from magnet_jax.arguments import check_fields
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline, records
from magnet_jax.decode import sampling
from magnet_jax.model import precision, sharding
from magnet_jax.train import steps
from magnet_jax.train.setup import Setup, check_fit, first_state, frozen_params, to_devices


def measure(args: Loader) -> None:
    check_fields(args, "--")
    config = load_config(args.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(args.data)))
    spec = records.read_codec_spec(args.data)
    t5_config, t5_params, tokenizer = t5_files.load(config.text.source)
    check_fit(config, spec, t5_config)
    frames = sampling.segment_frames(config, spec)
    batches = pipeline.make_train_iterator(
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
    settings = steps.make_settings(config, t5_config, precision.compute_dtype(config), frames, mesh)
    t5_params = jax.tree.map(np.asarray, t5_params)
    setup = Setup(spec, t5_config, t5_params, tokenizer, None, frames, settings)
    state = first_state(setup, jax.random.key(config.seed))
    frozen = frozen_params(setup)
    batch = to_devices(batch, mesh)
    # As in training, each codebook has its turn; the first round compiles both programs.
    num_codebooks = config.model.num_codebooks
    for step in range(num_codebooks + args.steps):
        if step == num_codebooks:
            jax.block_until_ready(state)
            started = time.perf_counter()
        stage = step % num_codebooks
        state, _ = steps.train_step(
            state, frozen, batch, jax.random.key(0), stage, settings=settings, local=stage > 0
        )
    jax.block_until_ready(state)
    trained = args.steps * config.data.batch_size * frames / (time.perf_counter() - started)
    print(f"loader      {loaded:12,.0f} frames/s")
    print(f"train step  {trained:12,.0f} frames/s")
    print(f"ratio       {loaded / trained:12.1f}")
