"""The JAX decoder against PyTorch's, for every kind of codec, cut, padded and in batches."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
from constants import SHIPPED_GOLDEN
from random_codecs import RANDOM, SMALL, save_random

from magnet_jax.codec import seanet
from magnet_jax.codec.encodec import load_codec, load_decoder
from magnet_jax.config import ASSETS
from magnet_jax.convert.audiocraft import CODEC_FILE
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

GOLDEN_CODEC = SHIPPED_GOLDEN / "encodec_tiny"


def save_encodec_24khz(path):
    torch = import_torch()
    import encodec

    torch.manual_seed(0)
    model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in model.quantizer.vq.layers:
        torch.nn.init.normal_(layer._codebook.embed)
    torch.save(model.state_dict(), path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    for name, change in RANDOM.items():
        save_random(folder / name, SMALL | change)
    save_encodec_24khz(folder / "encodec_24khz-random.th")
    return {
        "embedded": "embedded",
        "golden": str(GOLDEN_CODEC / CODEC_FILE),
        "encodec_24khz": str(folder / "encodec_24khz-random.th"),
        **{name: str(folder / name) for name in RANDOM},
    }


FRAMES = 9  # of most tests, so that they share compiled programs
KINDS = ("embedded", "golden", "encodec_24khz", *RANDOM)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, sources):
    """A codec in PyTorch and its decoder, and the decoder's program."""
    source = sources[request.param]
    codec, decoder = load_codec(source), load_decoder(source)
    program = jax.jit(functools.partial(seanet.decode, config=decoder.config))
    return codec, decoder, functools.partial(program, decoder.params)


def random_codes(spec, batch, frames, seed=0):
    shape = (batch, spec.num_codebooks, frames)
    return np.random.default_rng(seed).integers(0, spec.codebook_size, shape)


def assert_close(wav, expected):
    """Equal up to float rounding, for audio of any level."""
    assert wav.shape == expected.shape and wav.dtype == np.float32
    np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def test_the_samples_are_pytorchs(pair):
    codec, decoder, decode = pair
    assert decoder.spec == codec.spec
    codes_BKT = random_codes(codec.spec, batch=3, frames=FRAMES)
    wav_BCN = codec.decode(codes_BKT)
    assert wav_BCN.std() > 1e-3
    assert_close(decode(codes_BKT), wav_BCN)


def test_a_length_means_cutting(pair):
    """Whatever the codes beyond it: one program, also for clips too short to be reflected."""
    codec, _, decode = pair
    codes_BKT = random_codes(codec.spec, batch=1, frames=FRAMES)
    for length in (5, 3, 2, 1):
        codes_BKT[..., length:] = codec.spec.codebook_size  # the mask id
        wav_BCN = np.asarray(decode(codes_BKT, length=jnp.int32(length)))
        samples = length * codec.hop
        assert_close(wav_BCN[..., :samples], codec.decode(codes_BKT[..., :length]))
        assert wav_BCN.shape[2] == FRAMES * codec.hop and not wav_BCN[..., samples:].any()


def test_pieces_change_nothing(pair):
    """At any length, to the sample: also where the last piece is not a whole one."""
    _, decoder, decode = pair
    frames = 2 * FRAMES + 3
    codes_BKT = random_codes(decoder.spec, batch=2, frames=frames)
    pieces = jax.jit(functools.partial(seanet.decode, config=decoder.config, piece=5))
    for length in (frames, 16, 6, 1):
        whole = np.asarray(decode(codes_BKT, length=jnp.int32(length)))
        assert_close(pieces(decoder.params, codes_BKT, length=jnp.int32(length)), whole)


def test_samples_hang_on_frames_within_reach(pair):
    _, decoder, _ = pair
    if decoder.config.norm_type == "time_group_norm":
        return  # on all of them
    frames, at = 2 * FRAMES + 1, FRAMES
    width = decoder.params["first"]["bias"].shape[0]
    x_BTC = jax.random.normal(jax.random.key(0), (1, frames, width))

    def own(x_BTC):
        samples = seanet._samples(decoder.params, x_BTC, decoder.config, None)
        return samples[:, at * decoder.config.hop : (at + 1) * decoder.config.hop].sum()

    felt = np.flatnonzero(np.abs(jax.jit(jax.grad(own))(x_BTC)).max((0, 2)))
    reach = seanet.reach(decoder.config)
    assert felt[0] < at <= felt[-1] and at - felt[0] <= reach and felt[-1] - at <= reach


def test_one_program_serves_every_length(sources):
    decoder, traces = load_decoder(sources["causal"]), []

    @jax.jit
    def decode(codes_BKT, length):
        traces.append(length)
        return seanet.decode(decoder.params, codes_BKT, config=decoder.config, length=length)

    codes_BKT = random_codes(decoder.spec, batch=1, frames=FRAMES)
    heard = [np.flatnonzero(decode(codes_BKT, length))[-1] for length in range(1, FRAMES + 1)]
    assert len(traces) == 1 and heard == sorted(set(heard))


def test_clips_do_not_depend_on_their_batch(pair):
    codec, _, decode = pair
    codes_BKT = random_codes(codec.spec, batch=3, frames=FRAMES)
    length = jnp.int32(FRAMES)
    alone = np.concatenate([decode(codes_KT[None], length=length) for codes_KT in codes_BKT])
    assert_close(decode(codes_BKT), alone)


@pytest.mark.parametrize("kind", ["embedded", "causal"])
def test_rows_added_to_the_lstm_change_nothing(sources, kind):
    decoder = load_decoder(sources[kind])
    codes_BKT = random_codes(decoder.spec, batch=3, frames=10)
    decode = jax.jit(functools.partial(seanet.decode, config=decoder.config, lstm_rows=8))
    alone = jax.jit(functools.partial(seanet.decode, config=decoder.config))
    np.testing.assert_allclose(
        decode(decoder.params, codes_BKT), alone(decoder.params, codes_BKT), atol=1e-6
    )


def test_a_clip_of_music():
    codec, decoder = load_codec("embedded"), load_decoder("embedded")
    wav, rate = soundfile.read(ASSETS / "clips" / "02_bach.flac", dtype="float32")
    codes_BKT = codec.encode(soxr.resample(wav, rate, 16000)[None, None, :32000])
    for piece in (None, 32):
        decode = jax.jit(functools.partial(seanet.decode, config=decoder.config, piece=piece))
        wav_BCN = decode(decoder.params, codes_BKT)
        np.testing.assert_allclose(wav_BCN, codec.decode(codes_BKT), atol=1e-5)


def test_the_references_waveform(sources):
    reference = np.load(GOLDEN_CODEC / "codec.npz")
    decoder = load_decoder(sources["golden"])
    wav_BCN = seanet.decode(decoder.params, reference["codes"], config=decoder.config)
    np.testing.assert_allclose(wav_BCN, reference["decoded"], atol=1e-5)


def test_fewer_codebooks_are_the_first_ones(sources):
    codec, decoder = (
        load(sources["causal"], num_codebooks=2) for load in (load_codec, load_decoder)
    )
    assert decoder.spec == codec.spec and decoder.params["codebooks"].shape[0] == 2
    codes_BKT = random_codes(codec.spec, batch=1, frames=6)
    wav_BCN = seanet.decode(decoder.params, codes_BKT, config=decoder.config)
    assert_close(wav_BCN, codec.decode(codes_BKT))
    with pytest.raises(UserError, match="num_codebooks 9 is too many"):
        load_decoder("embedded", num_codebooks=9)


def test_wrong_codes_are_refused():
    decoder = load_decoder("embedded")
    decode = functools.partial(seanet.decode, decoder.params, config=decoder.config)
    for shape in ((4, 5), (1, 3, 5), (1, 4, 0), (0, 4, 5)):
        with pytest.raises(ValueError, match=r"expected \[B, 4, T\]"):
            decode(np.zeros(shape, int))
    with pytest.raises(ValueError, match="integers"):
        decode(np.zeros((1, 4, 5), np.float32))


def test_settings_have_transformers_defaults():
    import_torch()
    from transformers import EncodecConfig

    theirs = EncodecConfig()
    for field in dataclasses.fields(SeanetConfig):
        value = getattr(theirs, field.name)
        assert field.default == (tuple(value) if isinstance(value, list) else value), field.name
    assert hash(SeanetConfig(upsampling_ratios=[4, 2])) == hash(
        SeanetConfig(upsampling_ratios=(4, 2))
    )
    assert (SeanetConfig().hop, SeanetConfig().bits_per_second) == (320, 750)


@pytest.mark.parametrize(
    "change",
    [
        {"pad_mode": "circular"},
        {"norm_type": "layer_norm"},
        {"num_lstm_layers": 0},
        {"num_filters": True},
        {"use_causal_conv": 1},
        {"upsampling_ratios": []},
        {"upsampling_ratios": [4, 0]},
        {"codebook_size": 1},
        {"compress": 64},
        {"trim_right_ratio": 1.5},
        {"trim_right_ratio": 0.5, "use_causal_conv": False},
    ],
)
def test_settings_that_cannot_be_computed_are_refused(change):
    with pytest.raises(UserError, match=list(change)[0]):
        SeanetConfig(**change)


def test_pytorch_is_not_imported():
    """Not by the codec that ships, nor for any transformers folder."""
    code = (
        "import sys; from magnet_jax.codec import encodec, seanet; "
        "d = encodec.load_decoder('embedded'); import numpy; "
        "seanet.decode(d.params, numpy.zeros((1, 4, 2), int), config=d.config); "
        "print({'torch', 'transformers', 'encodec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
