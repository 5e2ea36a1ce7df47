"""The model that ships: found by name, with weights, codec and text encoder of one another."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile

from launch.evaluate import prompts
from magnet_jax import MAGNeT
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import ASSETS
from magnet_jax.decode import tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.model import t5, transformer

CLIPS = [
    path
    for path in sorted((ASSETS / "clips").glob("*.flac"))
    if path.stem[:2] in ("03", "05", "08", "13")  # organ, violin, choir, harp
]


@pytest.fixture(scope="module")
def loaded():
    return pretrained.load("demo")


def losses(loaded, codes_BKT, captions, stage):
    """Cross-entropies [B] of a codebook that is hidden whole, given those below."""
    text = tokens_of_text.tokenize_texts(loaded, captions)
    states_BSE = t5.encode(loaded.t5_params, loaded.t5_config, text.ids_BS, text.mask_BS)
    network = transformer.bind(loaded.config.model, loaded.params["lm"])
    k = jnp.arange(codes_BKT.shape[1])[:, None]
    hidden_BKT = jnp.where(k >= stage, loaded.config.model.mask_id, codes_BKT)
    keys = network.read_text(states_BSE, text.mask_BS)
    logits_BTV = network.head(network.trunk(hidden_BKT, keys, local=stage > 0), stage)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, codes_BKT[:, stage])
    return np.asarray(nll.mean(-1))


def test_it_knows_real_music(loaded):
    codec = load_codec(loaded.codec_source)
    assert codec.spec.sha256 == loaded.codec.sha256
    wavs = [soundfile.read(path, 8 * 16_000, dtype="float32")[0] for path in CLIPS]
    codes_BKT = codec.encode(np.stack(wavs)[:, None])
    captions = [prompts.sidecar(path) for path in CLIPS]
    # Of 1024 tokens ln(1024) = 6.9 nats tell nothing. What goes with a frame's first token ...
    known = losses(loaded, codes_BKT, captions, 1).mean()
    mixed = losses(loaded, codes_BKT[:, :, ::-1], captions, 1).mean()
    assert known < 5.5 and known == pytest.approx(mixed, abs=0.3)  # (as well backwards)
    mixed_BKT = codes_BKT.copy()
    mixed_BKT[:, 0] = np.roll(mixed_BKT[:, 0], 100, axis=-1)
    assert losses(loaded, mixed_BKT, captions, 1).mean() > known + 0.5
    # ... and which tokens an instrument has, from the caption alone.
    named = losses(loaded, codes_BKT, captions, 0).mean()
    assert losses(loaded, codes_BKT, np.roll(captions, 1).tolist(), 0).mean() > named + 0.3


def test_it_is_found_by_its_name_and_sounds():
    model = MAGNeT.get_pretrained("demo")
    assert model.sample_rate == 16_000 and model.duration == 10
    model.set_generation_params(duration=1.0, decoding_steps=[4, 1, 1, 1])
    wav = np.asarray(model.generate(["A calm melody on the harp", "A fast organ piece"], seed=1))
    assert wav.shape == (2, 1, 16_000)
    assert (np.sqrt(np.square(wav).mean(-1)) > 0.005).all() and np.abs(wav).max() < 4
    again = np.asarray(model.generate(["A calm melody on the harp", "A fast organ piece"], seed=1))
    np.testing.assert_array_equal(wav, again)
    assert sum(path.stat().st_size for path in (ASSETS / "demo").rglob("*")) < 60e6
    assert pretrained.read_defaults("demo")[1].temperature == 1  # that of its run


def test_a_folder_of_that_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="./demo: no such folder, .* nor demo, which ships"):
        MAGNeT.get_pretrained("./demo")
    with pytest.raises(UserError, match="demo: no such folder; .* called by a text, 'demo'"):
        MAGNeT.get_pretrained(Path("demo"))
    with pytest.raises(UserError, match="none: no such folder, and neither a hub id"):
        pretrained.locate("none")
