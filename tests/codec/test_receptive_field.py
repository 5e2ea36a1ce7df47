import dataclasses

import matplotlib.image
import numpy as np
import pytest
import soundfile
import soxr
from random_codecs import RANDOM, SMALL, save_random
from refusals import refused

from launch.codec import receptive_field as command
from launch.codec.receptive_field import main
from magnet_jax.codec import receptive_field as field_module
from magnet_jax.codec.encodec import load_codec
from magnet_jax.codec.receptive_field import (
    convolution_frames,
    convolutions,
    energy_within,
    hears_what_it_should,
    impulse_response,
    lasting_frames,
    receptive_field,
    restricted_context,
)
from magnet_jax.config import ASSETS
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.io.torch_env import import_torch

# The published 32 kHz codec of the paper, in what decides its field.
PAPERS = SeanetConfig(
    num_filters=64, sampling_rate=32_000, upsampling_ratios=(8, 5, 4, 4), use_causal_conv=False
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The codecs are small: threads would only wait for one another."""
    torch = import_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def embedded():
    return load_codec("embedded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    for name, change in RANDOM.items():
        save_random(folder / name, SMALL | change)
    return folder


def tiny(**changes):
    """One stage of ratio 2, whose convolutions have one tap but for what the changes say."""
    ones = dict(kernel_size=1, last_kernel_size=1, residual_kernel_size=1, upsampling_ratios=(2,))
    return SeanetConfig(**(ones | dict(use_causal_conv=False) | changes))


@pytest.mark.parametrize(
    "config,expected",
    [
        # Stride 1 has two taps, as every stride S has 2S: a sample and the one before.
        (tiny(upsampling_ratios=(1,)), (1, 0)),
        # Stride 2, four taps, frame t at samples 2t - 1 ... 2t + 2.
        (tiny(), (1, 2)),
        (tiny(use_causal_conv=True), (2, 1)),
        (tiny(kernel_size=3), (2, 3)),
        (tiny(kernel_size=3, use_causal_conv=True), (4, 1)),
        # After the stride a tap is two samples away from the next.
        (tiny(last_kernel_size=3), (3, 4)),
        # Dilations 1 and 3.
        (
            tiny(residual_kernel_size=3, num_residual_layers=2, dilation_growth_rate=3),
            (1 + 4, 2 + 4),
        ),
        # Encoders take the ratios from the last on: 3, then 2.
        (tiny(upsampling_ratios=(2, 3)), (2 + 3 * 1, 3 + 3 * 2)),
    ],
)
def test_fields_counted_by_hand(config, expected):
    assert convolutions(config) == expected


def test_the_papers_context():
    """About 160 ms, by the paper's count; a context of 100 ms to each side."""
    field = convolutions(PAPERS)
    assert 0.155 < (field.before + 1 + field.after) / PAPERS.sampling_rate < 0.175
    assert convolution_frames(PAPERS) == (4, 4)
    assert restricted_context(PAPERS)[0] == 5


def test_the_shipped_codecs_context(embedded):
    assert convolutions(embedded.config) == (1203, 1514)
    assert convolution_frames(embedded.config) == (4, 4)
    context, exact = restricted_context(embedded.config)
    assert context == 5 and exact == pytest.approx(4.258, abs=1e-3)


def test_causal_codecs_hear_no_later_frame():
    config = SeanetConfig()  # encodec_24khz
    assert convolutions(config).after == config.hop - 1
    assert convolution_frames(config) == (8, 0)
    assert restricted_context(config)[0] == 8


@pytest.mark.parametrize(
    "name,background",
    [("causal", "silence"), ("constant", "constant"), ("replicate", "noise")],
)
def test_the_measured_support_is_the_exact_one(folder, name, background):
    codec = load_codec(str(folder / name))
    response = impulse_response(codec, background=background, frames=24, impulses=codec.hop)
    assert hears_what_it_should(response, codec.config)
    # one tap more or less somewhere would be noticed
    for change in ({"last_kernel_size": 9}, {"kernel_size": 6}, {"residual_kernel_size": 4}):
        other = dataclasses.replace(codec.config, **change)
        assert not hears_what_it_should(response, other), change


def test_the_lstm_hears_further_back_but_not_ahead(embedded):
    response = impulse_response(embedded, background="silence", frames=40, impulses=4)
    assert hears_what_it_should(response, embedded.config)
    without = np.flatnonzero(response.convolutions_PT.any(0)) - response.frames
    heard_T = response.whole_PT.max(0) > 1e-9 * response.whole_PT.max()
    whole = np.flatnonzero(heard_T) - response.frames
    # An impulse changes frames before its own only as far as frames hear ahead.
    assert without.min() == whole.min() == -4
    assert without.max() == 4 and whole.max() > 20
    within, within_whole = map(energy_within, (response.convolutions_PT, response.whole_PT))
    assert within[4] == pytest.approx(1, abs=1e-12)
    assert within_whole[4] < 0.99 < within_whole[10]
    assert (np.diff(within_whole) >= 0).all() and within_whole[-1] == pytest.approx(1)
    assert 4 < lasting_frames(response, 1e-2) < lasting_frames(response, 1e-4)
    assert lasting_frames(response, 1e-12) is None


def test_energies_of_a_known_response():
    magnitudes_PT = np.sqrt([[0, 1, 4, 2, 1], [0, 0, 8, 0, 0]])
    np.testing.assert_allclose(energy_within(magnitudes_PT), [12 / 16, 15 / 16, 1])
    response = field_module.Response(
        frames=2, places_P=np.array([0, 1]), convolutions_PT=magnitudes_PT, whole_PT=magnitudes_PT
    )
    # Of the first impulse, 3/8 come later than its frame, 1/8 more than one frame later.
    assert lasting_frames(response, 0.2) == 1 and lasting_frames(response, 0.4) == 0
    assert lasting_frames(response, 0.1) is None
    with pytest.raises(ValueError, match="share must lie"):
        lasting_frames(response, 0.0)


def test_windows_that_overlap_by_the_field(embedded):
    """Without the LSTM nothing is missing; with it, tokens hardly ever differ."""
    wav, rate = soundfile.read(ASSETS / "clips" / "06_ryansMammoth.flac", dtype="float32")
    wav = soxr.resample(wav, rate, embedded.spec.sample_rate)[: 300 * embedded.hop][None, None]
    start, frames = 200, 60

    def differing(encode, before, after):
        """Largest difference between a window and the whole, its overlap left out."""
        first, last = start - before, start + frames + after
        window_T = encode(wav[..., first * embedded.hop : last * embedded.hop])[0]
        whole_T = encode(wav)[0][:, start : start + frames]
        return np.abs(window_T[:, before : before + frames] - whole_T).max()

    def convolved(wav):
        torch = import_torch()
        with torch.inference_mode():
            x = torch.from_numpy(wav)
            for layer in embedded.encoder.layers:
                x = x if type(layer).__name__ == "EncodecLSTM" else layer(x)
            return x.numpy()

    before, after = convolution_frames(embedded.config)
    assert differing(convolved, before, after) < 1e-4
    assert differing(convolved, before - 1, after) > 1e-2
    assert differing(convolved, before, after - 1) > 1e-2
    field = receptive_field(embedded)
    assert field.after == after and 5 * before < field.before < 128
    assert differing(embedded.encode, *field) == 0
    assert differing(embedded.encode, before, after) > 0


def test_the_command_draws_what_it_found(folder, tmp_path):
    args = command.Args(codec=str(folder / "causal"), frames=40, impulses=7, share=1e-3)
    codec = load_codec(args.codec)
    found = command.measure(args, codec)
    config = SeanetConfig(**{k: v for k, v in SMALL.items() if k != "target_bandwidths"})
    field = convolutions(config)
    assert found.samples == (field.before, 29) and found.confirmed
    assert found.lstm_frames >= found.frames.before
    place = command._places(found, codec.hop)
    changed = command._in_order(found.response.convolutions_PT)
    assert len(place) == 81 * 7 and (np.diff(place) > 0).all()
    # causal: no impulse behind a frame's end is heard, and the loudest lie within a few frames
    assert not changed[place > 0.5].any() and changed[abs(place) < 0.5].all()
    heard = place[np.flatnonzero(changed)]
    assert heard.min() * 30 >= -field.before - 14.5
    command.draw(args, codec, found, tmp_path / "field.png")
    assert matplotlib.image.imread(tmp_path / "field.png").std() > 0.05


def test_the_table_states_the_rule(capsys):
    main(["--impulses", "2", "--frames", "20"])
    text = capsys.readouterr().out
    assert "2718 samples (169.9 ms)" in text and "the same, for impulses at 2 places" in text
    assert "restricted context  5 frames (100 ms) to each side" in text
    assert "more than 10 frames before" in text


@pytest.mark.parametrize(
    "words,complaint",
    [
        (["--codec", "nowhere"], "codec nowhere: no such folder"),
        (["--codec", "{}/like_48khz"], "norms over the whole clip"),
        (["--frames", "9"], "frames must be at least 10"),
        (["--impulses", "0"], "impulses must lie between 1 and 320"),
        (["--share", "1"], "--share must lie between 0 and 1"),
        (["--background", "music"], "silence"),
        (["--picture", "field.gif"], "must end in .png or .pdf or .svg"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder, words, complaint):
    words = [word.format(folder) for word in words]
    with refused(words, complaint):
        main(words)
