"""The smallest data sets and runs that exercise everything."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr

from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import encodec
from magnet_jax.config import (
    ASSETS,
    CodecSpec,
    DataConfig,
    DecodeConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
    with_hybrid_objective,
)
from magnet_jax.convert import lm_rules, t5_files
from magnet_jax.data import records
from magnet_jax.decode import autoregressive, choose, parallel, schedule
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.spans import Spans
from magnet_jax.io import files, trees
from magnet_jax.model import lora, patterns, sharding, teacher_forcing, transformer
from magnet_jax.train import loop

SECONDS = 2.0
TINY = ModelConfig(
    num_codebooks=2, codebook_size=8, width=12, num_heads=3, num_layers=2, mlp_ratio=2, text_width=5
)
# What the embedded codec's hash is does not matter here, except to the export, which computes it.
EMBEDDED_CODEC = CodecSpec(
    source="embedded",
    sha256="0" * 64,
    sample_rate=16000,
    channels=1,
    frame_rate=50.0,
    num_codebooks=4,
    codebook_size=1024,
)
PUBLISHED_CODEC = dataclasses.replace(
    EMBEDDED_CODEC, source="facebook/encodec_32khz", sample_rate=32000, codebook_size=2048
)


def write_clips(directory: Path, count: int) -> list[dict]:
    """A data set of the first two seconds (after the first) of shipped clips; its examples."""
    encoder = encodec.load_codec("embedded")
    rate = encoder.spec.sample_rate
    examples = []
    for path in sorted((ASSETS / "clips").glob("*.flac"))[:count]:
        wav, source_rate = soundfile.read(path, dtype="float32")
        wav = soxr.resample(wav, source_rate, rate)[rate : round((1 + SECONDS) * rate)]
        info = json.loads(path.with_suffix(".json").read_text())
        examples.append(
            {
                "codes": np.asarray(encoder.encode(wav[None, None])[0], np.int16),
                "caption": info.pop("description"),
                "info": json.dumps(info),
                "track_id": path.stem,
                "source_path": path.name,
                "start": 1.0,
                "duration": SECONDS,
            }
        )
    write_data_set(directory, {"train": examples}, encoder.spec)
    return examples


def write_noise(directory: Path, counts: dict[str, int], frames: int = 60) -> None:
    """A data set of random tokens of the shipped codec's kind: fast, and good for nothing else."""
    spec = encodec.read_spec("embedded")
    rng = np.random.default_rng(0)
    splits = {
        split: [
            {
                "codes": rng.integers(0, spec.codebook_size, (4, frames)).astype(np.int16),
                "caption": f"noise number {i}, {split}",
                "info": "{}",
                "track_id": f"{split}{i}",
                "source_path": f"{split}{i}.wav",
                "start": 0.0,
                "duration": frames / spec.frame_rate,
            }
            for i in range(count)
        ]
        for split, count in counts.items()
    }
    write_data_set(directory, splits, spec)


def write_data_set(directory: Path, splits: dict[str, list[dict]], spec) -> None:
    directory.mkdir(parents=True)
    shards = {
        split: [records.write_shard(directory / f".{split}", spec.num_codebooks, examples)]
        for split, examples in splits.items()
    }
    records.finalise(directory, shards, spec, {})


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Lets runs take one of the fake devices, as processes started by tests have one."""
    make_mesh = sharding.make_mesh
    patch.setattr(
        sharding,
        "make_mesh",
        lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]),
    )


def run_config(data: Path, out: Path, **changes) -> RunConfig:
    """A run of the smallest model."""
    settings = dict(
        model=ModelConfig(codebook_size=1024, width=16, num_heads=2, num_layers=2, text_width=128),
        text=TextConfig(max_tokens=16, finetune=True),
        data=DataConfig(path=str(data), segment_seconds=0.6, batch_size=8),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=2, schedule_steps=60),
        decode=DecodeConfig(steps=(2, 1, 1, 1)),
        out=str(out),
        steps=30,
        log_every=5,
        eval_every=0,
        sample_every=0,
        save_every=5,
        keep_last=2,
    )
    return RunConfig(**(settings | changes))


def loaded_model(kind: str = "magnet", **decode) -> Loaded:
    """A random model of the shipped codec, which hears two seconds at once."""
    model = ModelConfig(
        codebook_size=1024, width=16, num_heads=2, num_layers=2, text_width=128, local_context=3
    )
    if kind == "musicgen":
        model = dataclasses.replace(model, kind=kind, delays=(0, 1, 2, 3))
    config = RunConfig(
        model=model,
        text=TextConfig(max_tokens=16),
        data=DataConfig(segment_seconds=SECONDS),
        decode=DecodeConfig(**{"steps": (3, 1, 1, 1)} | decode),
    )
    if kind == "hybrid":
        config = with_hybrid_objective(config)
    params = {"lm": transformer.init_params(config.model, jax.random.key(0))}
    text = t5_files.load("embedded")
    return Loaded(config, encodec.read_spec("embedded"), "embedded", params, *text, 0, {})


def teacher_forced(params: dict, *text, codes_BKT: jax.Array, config: ModelConfig):
    """What a MusicGen predicts for each code from the steps before it, logits [B, K, T, V].

    And valid [K, T]: False at the last frames of delayed codebooks, which would need steps past the
    end.
    """
    num_frames = codes_BKT.shape[-1]
    steps_BKS = patterns.to_steps(codes_BKT, config.delays, config.mask_id, num_frames)
    logits_BKSV = teacher_forcing.step_logits(params, *text, steps_BKS, config=config)
    return patterns.to_frames(logits_BKSV, config.delays, num_frames, first=0)


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest model, made once for all files and workers; its tokens lie beside it.

    For tests that change nothing in it.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    with files.held(folder.with_suffix(".lock"), f"waiting for {folder}"):
        if not folder.exists():
            with files.replacing(folder) as partial, pytest.MonkeyPatch.context() as patch:
                use_one_device(patch)
                write_noise(partial / "tokens", {"train": 8})
                loop.train(run_config(partial / "tokens", partial / "run", steps=2))
    return folder / "run"


def random_params(model: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = lm_rules.lm_shapes(model)
    return trees.unflatten(
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )


def random_adapters(config: LoraConfig, seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(config, TINY)
    return trees.unflatten(
        {path: 0.3 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


@functools.partial(jax.jit, static_argnames=("config", "num_frames", "choice"))
def one_after_another(
    params, states_BSE, text_mask_BS, num_zero_keys_B, keys_B, prompt_BKP, sampling, *, config,
    num_frames, choice,
):  # fmt: skip
    """Tokens [B, K, T] of a MusicGen, said plainly: what `hybrid.generate` is held to."""
    model = transformer.bind(config, params)
    text = model.read_text(states_BSE, text_mask_BS, num_zero_keys_B, dtype=jnp.float32)
    if not config.null_text_adds_nothing:
        text = transformer.with_null_rows(text)
    batch, num_codebooks, num_prompt = prompt_BKP.shape
    left = (batch, num_codebooks, num_frames - num_prompt)
    known_BKT = jnp.concatenate([prompt_BKP, jnp.full(left, autoregressive.UNKNOWN)], axis=-1)
    steps_BKS, _ = autoregressive.advance(
        config, params, text, keys_B, patterns.to_steps(known_BKT, config.delays, config.mask_id),
        sampling, guided=True,
        beginning=autoregressive.Beginning(
            num_given=num_prompt, num_frames=num_frames, whole=True, choice=choice, guided=True
        ),
    )  # fmt: skip
    return patterns.to_frames(steps_BKS, config.delays, num_frames, first=1)[0]


def task(codes_BKT, *, num_given=0, samples=None, seed=0, limit=0.0, **more) -> parallel.Task:
    """Clips to decode that begin with given frames, of all codebooks or of each."""
    batch, num_codebooks, num_frames = codes_BKT.shape
    given_K = np.broadcast_to(num_given, num_codebooks)
    given_BKT = np.tile(np.arange(num_frames) < given_K[:, None], (batch, 1, 1))
    keys_B = choose.sample_keys(seed, jnp.arange(batch) if samples is None else samples)
    return parallel.Task(Canvas(codes_BKT, given_BKT), keys_B, limit, **more)


def rules(decoding: DecodeConfig, span_length: int, mask_id: int, *, any_text=True, **more):
    """How settings decode."""
    spans = Spans(
        length=span_length, arrangement=decoding.span_arrangement, score=decoding.span_score
    )
    choice, _ = choose.choice_of(decoding.greedy, decoding.top_k, decoding.top_p)
    guided = schedule.guided_steps(decoding, any_text)
    defaults = {"mask_id": mask_id, "spans": spans, "choice": choice, "guided": guided}
    return parallel.Rules(**defaults | more)


def newest_step(run: Path) -> int:
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)
