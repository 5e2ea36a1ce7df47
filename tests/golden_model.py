"""The golden MAGNeT as tests call it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from constants import SHIPPED_GOLDEN
from tiny import EMBEDDED_CODEC

from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.config import DataConfig, DecodeConfig, RunConfig, TextConfig
from magnet_jax.convert import lm_rules, t5_files
from magnet_jax.decode import sampling
from magnet_jax.model import t5, transformer

USUAL = 2.0  # seconds that the model was trained on; 100 frames
DECODING = DecodeConfig(steps=(3, 2, 2, 2))
TEXTS = ("a slow waltz on the piano", "", "a fiddle tune")


def read_text(path, with_text=True):
    """The text of an .npz file as the network takes it: states, mask, zero keys."""
    arrays = np.load(path)
    states_BSE, lengths_B = arrays["t5_hidden"], arrays["text_lengths"] * with_text
    width = states_BSE.shape[1]
    # With no text at all the reference attends over zeros alone, which gives zeros.
    zeros_B = (width - lengths_B) * with_text
    return states_BSE, np.arange(width) < lengths_B[:, None], zeros_B.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "local", "dtype"))
def magnet_logits(params, states, mask, zeros, codes, stage, *, config, local, dtype=jnp.float32):
    model = transformer.bind(config, params)
    text = model.read_text(states, mask, zeros, dtype=dtype)
    return model.head(model.trunk(codes, text, local=local), stage)


def load_golden(seconds=USUAL):
    """The golden model with a random text encoder of its width, and the golden codec."""
    golden = lm_rules.read_audiocraft(SHIPPED_GOLDEN / "magnet_tiny")
    config, _, tokenizer = t5_files.load("embedded")
    config = dataclasses.replace(config, d_model=golden.model.text_width, d_ff=16, num_layers=1)
    spec = dataclasses.replace(EMBEDDED_CODEC, sample_rate=32000, codebook_size=128)
    return Loaded(
        config=RunConfig(
            model=golden.model,
            text=TextConfig(max_tokens=128),
            data=DataConfig(segment_seconds=seconds),
        ),
        codec=spec,
        codec_source="",
        params={"lm": golden.params},
        t5_config=config,
        t5_params=t5.init(config, jax.random.key(0)),
        tokenizer=tokenizer,
        step=0,
        lineage={},
    )


def clips(loaded, texts=TEXTS, num_frames=100, decoding=DECODING, seed=1, weight=None, **settings):
    if weight is not None:
        settings["rescorer"] = settings["rescorer"]._replace(weight=weight)
    return sampling.generate(
        loaded, texts, num_frames=num_frames, decoding=decoding, seed=seed, **settings
    )
