"""What is measured: a checkpoint, or a model of a published size with random weights."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from launch.make import random_checkpoint
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import decoding
from magnet_jax.codec.encodec import Decoder, read_spec
from magnet_jax.config import DataConfig, DecodeConfig, ModelConfig, RunConfig, TextConfig
from magnet_jax.convert.audiocraft import CODEC_FILE
from magnet_jax.decode import rescore, sampling, tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.model import precision, t5, transformer

SEED = 0
SEGMENT_SECONDS = 10.0  # of the model with random weights, as of the published ones
TEXTS = (
    "A lively fiddle tune with acoustic guitar and upright bass, recorded live at a dance",
    "Slow ambient pads with a soft piano melody and distant rain",
    "An energetic rock song with distorted guitars and a driving drum beat",
    "A string quartet plays a sad and thoughtful piece in a minor key",
)


def texts(batch: int) -> list[str]:
    """One a clip."""
    return [TEXTS[i % len(TEXTS)] for i in range(batch)]


_encode = jax.jit(t5.encode, static_argnames=("config", "dtype"))


def text_states(loaded: pretrained.Loaded, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Text encoder states cut to the longest text, and the texts' lengths."""
    text = tokens_of_text.tokenize_texts(loaded, texts)
    lengths_B = text.mask_BS.sum(-1)
    states_BSE = _encode(
        loaded.t5_params, loaded.t5_config, text.ids_BS, text.mask_BS,
        dtype=precision.compute_dtype(loaded.config),
    )  # fmt: skip
    return np.array(states_BSE)[:, : lengths_B.max()], lengths_B


@contextlib.contextmanager
def opened(
    checkpoint: str | Path | None, size: str | None, kind: str = "magnet"
) -> Iterator[tuple[str, pretrained.Loaded]]:
    """A model's name in words, and the model; `kind` is that of one with random weights.

    Raises `UserError` unless either a checkpoint or a size is given, or if nothing is there.
    """
    if (checkpoint is None) == (size is None):
        raise UserError("give either --checkpoint DIR or --model small|medium")
    if checkpoint is not None:
        yield str(checkpoint), pretrained.load(checkpoint)
        return
    # A codec is loaded from a file; it lives as long as the model does.
    with tempfile.TemporaryDirectory() as folder:
        name = f"{size}, random weights, text encoder of t5-base's size, EnCodec of 32 kHz"
        yield name, random_model(size, Path(folder), kind)


def random_model(size: str, codec_folder: Path, kind: str = "magnet") -> pretrained.Loaded:
    """A model in memory, all parts of a published one's size; its codec is written to a folder."""
    random_checkpoint.write_codec(codec_folder, SEED)
    codec_source = str(codec_folder / CODEC_FILE)
    codec = read_spec(codec_source, random_checkpoint.NUM_CODEBOOKS)
    delays = () if kind == "magnet" else tuple(range(random_checkpoint.NUM_CODEBOOKS))
    config = RunConfig(
        model=ModelConfig(kind=kind, delays=delays, **random_checkpoint.SIZES[size]),
        objective="hybrid" if kind == "hybrid" else "magnet",
        text=TextConfig(max_tokens=pretrained.MAX_TOKENS),
        data=DataConfig(segment_seconds=SEGMENT_SECONDS),
    )
    t5_config, t5_params, tokenizer = random_checkpoint.make_text_encoder(SEED)
    init = jax.jit(transformer.init_params, static_argnames="config")
    return pretrained.Loaded(
        config=config,
        codec=codec,
        codec_source=codec_source,
        params={"lm": init(config=config.model, key=jax.random.key(SEED))},
        t5_config=t5_config,
        t5_params=t5_params,
        tokenizer=tokenizer,
        step=0,
        lineage={},
    )


def clip_frames(loaded: pretrained.Loaded, seconds: float | None) -> int:
    """Frames of a clip (None: of training), cut to whole spans; `UserError` below one of them."""
    frames = sampling.segment_frames(loaded.config, loaded.codec)
    if seconds is not None:
        frames = round(seconds * loaded.codec.frame_rate)
    span = loaded.config.decode.span_length or loaded.config.model.span_length
    if frames < span:
        raise UserError(f"--seconds {seconds}: shorter than one span of {span} frames")
    return frames // span * span


def open_rescorer(
    source: str | Path, loaded: pretrained.Loaded, guidance: float, weight: float
) -> sampling.Rescorer:
    """The second model; raises `UserError` where there is none that fits."""
    return rescore.from_model(
        rescore.load(source), loaded, guidance=guidance, weight=weight, name=str(source)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every call of a measurement shares."""

    loaded: pretrained.Loaded
    decoder: Decoder
    num_frames: int
    decoding: DecodeConfig

    def tokens(
        self,
        batch: int,
        repeat: int,
        on_step: Callable | None = None,
        rescorer: sampling.Rescorer | None = None,
    ) -> np.ndarray:
        """From texts to tokens, as users have it, with settings that differ a repeat."""
        # Other numbers, not other shapes: no new program.
        temperature = self.decoding.temperature * (1 + repeat / 64)
        return sampling.generate(
            self.loaded,
            texts(batch),
            num_frames=self.num_frames,
            decoding=dataclasses.replace(self.decoding, temperature=temperature),
            seed=repeat,
            rescorer=rescorer,
            on_step=on_step,
        ).codes_BKT

    def audio(self, codes_BKT: np.ndarray) -> np.ndarray:
        return decoding.decode_audio(self.decoder, codes_BKT)

    def text_states(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Text encoder states cut to the longest text, and the texts' lengths."""
        return text_states(self.loaded, texts(batch))
