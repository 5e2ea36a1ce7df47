"""What a run begins with."""

import dataclasses

import numpy as np
import pytest
import tiny
from tonal_codec import put_tonal

from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import encodec
from magnet_jax.codec.tonal import Spectrum
from magnet_jax.config import ASSETS, LoraConfig, TextConfig
from magnet_jax.errors import UserError
from magnet_jax.train import setup

TEXT = TextConfig(max_tokens=16)  # which is not trained


@pytest.fixture
def run(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory)


def tonal_tokens(folder, source):
    """A data set of random tokens of a codec with a tonal stream."""
    spec = encodec.read_spec(put_tonal(folder / "codec", source))
    codes_KT = np.random.default_rng(0).integers(0, 25, (5, 60)).astype(np.int16)
    example = {
        "codes": codes_KT, "caption": "noise", "info": "{}", "track_id": "0",
        "source_path": "0.wav", "start": 0.0, "duration": 60 / spec.frame_rate,
    }  # fmt: skip
    tiny.write_data_set(folder / "tokens", {"train": [example]}, spec)
    return folder / "tokens"


def begun(folder, run, source, count=5, **changes):
    """The transformer that a run with a tonal stream starts from, begun with another run."""
    data = tonal_tokens(folder, source)
    config = tiny.run_config(data, folder / "run", init_from=str(run), **changes)
    model = dataclasses.replace(config.model, num_codebooks=count)
    decode = dataclasses.replace(config.decode, steps=(2, *[1] * (count - 1)))
    return setup.set_up(dataclasses.replace(config, model=model, decode=decode)).lm


def test_what_a_model_knows_of_a_codec_stays_where_a_tonal_stream_is_put_before_it(tmp_path, run):
    lm, given = begun(tmp_path, run, "embedded"), pretrained.load(str(run)).params["lm"]
    for name in ("embed", "heads"):
        np.testing.assert_array_equal(lm[name][1:], given[name])
    tiny.assert_same_bits(lm["blocks"]["mlp"], given["blocks"]["mlp"])
    # The stream's entries are as long as other tokens, E numbers of mean square 1, and no others.
    lengths = np.square(lm["embed"][0, :1024]).sum(1)
    assert 30 < lengths[:25].mean() < 130 and not lengths[25:].any()


def test_another_tonal_stream_takes_the_place_of_the_one_that_a_model_knows(
    tmp_path, run, monkeypatch
):
    known, loaded = begun(tmp_path / "one", run, "embedded"), pretrained.load(str(run))
    known["embed"][0] = known["heads"][0] = 7
    model = dataclasses.replace(loaded.config.model, num_codebooks=5)
    decode = dataclasses.replace(loaded.config.decode, steps=(2, 1, 1, 1, 1))
    source = put_tonal(tmp_path / "old", spectrum=Spectrum(bands=60))
    tonal = loaded._replace(
        config=dataclasses.replace(loaded.config, model=model, decode=decode),
        codec=encodec.read_spec(source), codec_source=source, params={"lm": known},
    )  # fmt: skip
    monkeypatch.setattr(pretrained, "load", lambda *args, **how: tonal)
    lm = begun(tmp_path / "two", run, "embedded")
    for name in ("embed", "heads"):
        assert lm[name].shape == known[name].shape and not (lm[name][0] == 7).any()
        np.testing.assert_array_equal(lm[name][1:], known[name][1:])


def test_a_tonal_stream_before_another_codec_helps_nobody(tmp_path, run):
    with pytest.raises(UserError, match="learnt the tokens of"):
        begun(tmp_path, run, str(ASSETS / "demo" / "codec"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 4}, "behind a tonal stream: give --model.num-codebooks 5, and as many"),
        ({"count": 4, "init_partial": True}, "behind a tonal stream: give --model.num-codebooks 5"),
        (
            {"lora": LoraConfig(rank=2), "text": TEXT},
            "--lora.rank: adapters cannot learn the new",
        ),
    ],
)
def test_a_tonal_stream_wants_room_and_training(tmp_path, run, changes, message):
    with pytest.raises(UserError, match=message):
        begun(tmp_path, run, "embedded", **changes)


@pytest.mark.parametrize(("steps", "is_said"), [(60, False), (61, True)])
def test_steps_that_would_teach_nothing_are_said(tmp_path, run, capsys, steps, is_said):
    begun(tmp_path, run, "embedded", steps=steps)
    note = "the learning rate is 0 from step 60 on, and --steps are 61"
    assert (note in capsys.readouterr().out) == is_said
