"""Makes an AudioCraft checkpoint of full size with random weights, text encoder beside it.

python -m launch.make.random_checkpoint --out random

It sounds of nothing, but imports, samples and exports like a published one: a way to try an
installation, its speed and its memory without a download.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from magnet_jax import cli
from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.config import CodecSpec, DataConfig, ModelConfig, RunConfig
from magnet_jax.convert import audiocraft, codec_rules, lm_rules
from magnet_jax.errors import reported
from magnet_jax.io import files

# The published models' sizes (section 4 and Appendix A of the paper).
SIZES = {
    "small": {"width": 1024, "num_layers": 24, "num_heads": 16},
    "medium": {"width": 1536, "num_layers": 48, "num_heads": 24},
}
# The published EnCodec of 32 kHz, 4 codebooks at 50 frames a second.
CODEC_SETTINGS = {
    "audio_channels": 1,
    "chunk_length_s": None,
    "codebook_dim": 128,
    "codebook_size": 2048,
    "compress": 2,
    "dilation_growth_rate": 2,
    "hidden_size": 128,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "norm_type": "weight_norm",
    "normalize": False,
    "num_filters": 64,
    "num_lstm_layers": 2,
    "num_residual_layers": 1,
    "pad_mode": "constant",
    "residual_kernel_size": 3,
    "sampling_rate": 32_000,
    "trim_right_ratio": 1.0,
    "upsampling_ratios": [8, 5, 4, 4],
    "use_causal_conv": False,
    "use_conv_shortcut": False,
}
NUM_CODEBOOKS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Makes a checkpoint with random weights."""

    out: Path
    """Folder to write, new or empty: state_dict.bin, compression_state_dict.bin, text_encoder/."""
    size: Literal["small", "medium"] = "small"
    """420 M or 1.8 B parameters."""
    kind: Literal["magnet", "musicgen"] = "magnet"
    seconds: Annotated[int, Between(1, 600)] = 10
    """Length of its clips."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the language model's tensors; published ones are float16."""
    seed: Seed = 0


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> dict:
    """Tensors of variance 1 / fan-in, norms' scales of 1."""
    rng = np.random.default_rng(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name and name.endswith("weight"):
            return np.ones(shape, dtype)
        scale = np.float32(np.prod(shape[1:]) ** -0.5)
        return (rng.standard_normal(shape, np.float32) * scale).astype(dtype)

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def write_codec(folder: Path, seed: int) -> None:
    """Writes `compression_state_dict.bin`: an EnCodec of 32 kHz with random weights."""
    layout = codec_rules.codec_layout(CODEC_SETTINGS, NUM_CODEBOOKS)
    audiocraft.write_weights(
        folder / audiocraft.CODEC_FILE,
        random_tensors({there: shape for _, there, shape in layout}, seed, "float32"),
        codec_rules.make_codec_xp_cfg(CODEC_SETTINGS, NUM_CODEBOOKS),
    )


def make_text_encoder(seed: int) -> tuple:
    """Config, parameters and tokenizer of a random encoder as large as t5-base.

    But for the vocabulary, which is the shipped tokenizer's.
    """
    import jax  # which is slow to load

    from magnet_jax.convert import t5_files
    from magnet_jax.model import t5

    shipped, _, tokenizer = t5_files.load("embedded")
    config = dataclasses.replace(t5_files.PUBLISHED["t5-base"], vocab_size=shipped.vocab_size)
    return config, t5.init(config, jax.random.key(seed)), tokenizer


def make(args: Args) -> None:
    check_fields(args, "--")
    files.check_new_folder("--out", args.out)
    from magnet_jax.convert import t5_files

    codec = CodecSpec(
        source="facebook/encodec_32khz",
        sha256="",
        sample_rate=CODEC_SETTINGS["sampling_rate"],
        channels=1,
        frame_rate=50.0,
        num_codebooks=NUM_CODEBOOKS,
        codebook_size=CODEC_SETTINGS["codebook_size"],
    )
    delays = tuple(range(NUM_CODEBOOKS)) if args.kind == "musicgen" else ()
    model = ModelConfig(kind=args.kind, delays=delays, **SIZES[args.size])
    config = RunConfig(model=model, data=DataConfig(segment_seconds=args.seconds))
    with files.replacing(args.out) as folder:
        audiocraft.write_weights(
            folder / audiocraft.LM_FILE,
            random_tensors(lm_rules.audiocraft_shapes(model), args.seed, args.dtype),
            lm_rules.make_xp_cfg(config, codec, "t5-base"),
            args.dtype,
        )
        write_codec(folder, args.seed)
        t5_files.save(folder / "text_encoder", *make_text_encoder(args.seed))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with reported():
        make(cli.parse(Args, prog="python -m launch.make.random_checkpoint", description=__doc__))
