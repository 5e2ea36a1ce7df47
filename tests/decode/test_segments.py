"""The program in segments makes the clips of the whole one; clips with settings of their own."""

import dataclasses

import numpy as np
import pytest
from tiny import loaded_model

from magnet_jax.codec import encodec
from magnet_jax.config import DecodeConfig, EditConfig
from magnet_jax.decode import canvas, placement, sampling

TEXTS = ["a calm harp", "", "a fiddle tune"]


def generate(loaded, between=None, **how):
    execution = placement.Execution(between=between)
    defaults = {"num_frames": 55, "decoding": loaded.config.decode, "seed": 3}
    return sampling.generate(loaded, TEXTS, execution=execution, **defaults | how)


@pytest.fixture(scope="module")
def loaded():
    return loaded_model(steps=(7, 3, 1, 1))


def test_segments_make_the_same_clips(loaded):
    decoder = encodec.load_decoder("embedded")
    seen = []
    whole = generate(loaded, decoder=decoder)
    made = generate(loaded, seen.append, decoder=decoder)
    np.testing.assert_array_equal(made.codes_BKT, whole.codes_BKT)
    np.testing.assert_array_equal(made.hidden_PBT, whole.hidden_PBT)
    np.testing.assert_array_equal(made.wav_BCN, whole.wav_BCN)
    # Five steps of the first codebook, its last two, and those of the others together.
    assert [(p.done, p.total, p.codebook) for p in seen] == [(5, 12, 0), (7, 12, 0), (12, 12, 3)]


def test_segments_of_edits_and_of_other_arrangements(loaded):
    rng = np.random.default_rng(0)
    given = canvas.Canvas(
        rng.integers(0, 1024, (3, 4, 100)).astype(np.int32), np.ones((3, 4, 100), bool)
    )
    given.given_BKT[:, 1:, 30:50] = False
    decode = loaded.config.decode
    for how in (
        {"given": given, "editing": EditConfig(), "num_frames": 100},
        {"decoding": dataclasses.replace(decode, span_arrangement="stride1", min_guidance=2.0)},
    ):
        whole, made = generate(loaded, **how), generate(loaded, lambda progress: None, **how)
        np.testing.assert_array_equal(made.codes_BKT, whole.codes_BKT)
        np.testing.assert_array_equal(made.hidden_PBT, whole.hidden_PBT)


def test_a_listener_stops_a_clip(loaded):
    class StopError(Exception):
        pass

    def stop(progress):
        raise StopError

    with pytest.raises(StopError):
        generate(loaded, stop)


def test_clips_have_settings_of_their_own(loaded):
    decode = loaded.config.decode
    own = [
        dataclasses.replace(decode, temperature=1.0, top_p=0.5),
        dataclasses.replace(decode, anneal_temperature=False),
        dataclasses.replace(decode, max_guidance=3.0),
    ]
    how = {"seed": [5, 6, 5], "first_sample": [2, 0, 1], "decoding": own}
    made = [generate(loaded, between, **how).codes_BKT for between in (None, lambda progress: None)]
    for i in range(3):
        alone = sampling.generate(
            loaded, [TEXTS[i]], num_frames=55, decoding=own[i], seed=how["seed"][i],
            first_sample=how["first_sample"][i],
        )  # fmt: skip
        for codes_BKT in made:
            np.testing.assert_array_equal(codes_BKT[i], alone.codes_BKT[0])


def test_clips_of_one_program_share_what_it_is_made_for(loaded):
    assert sampling.shared(DecodeConfig(top_p=0.5)) == sampling.shared(DecodeConfig(temperature=1))
    for other in ({"steps": (2, 1, 1, 1)}, {"greedy": True}, {"min_guidance": 2.0}, {"top_k": 5}):
        decode = loaded.config.decode
        with pytest.raises(ValueError, match="shared alike"):
            generate(loaded, decoding=[decode, decode, dataclasses.replace(decode, **other)])
