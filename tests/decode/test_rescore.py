"""Rescoring: what a second model gives for a candidate, and what that does to decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from constants import GOLDEN, SHIPPED_GOLDEN
from golden_model import TEXTS, clips, load_golden, magnet_logits, read_text

from magnet_jax import programs
from magnet_jax.config import DecodeConfig, RescoreConfig, SamplingMeshConfig
from magnet_jax.convert import lm_rules
from magnet_jax.decode import (
    parallel,
    placement,
    rescore,
    sampler,
    schedule,
    tokens_of_text,
)
from magnet_jax.errors import UserError
from magnet_jax.model import patterns, t5, teacher_forcing

MAGNET, MUSICGEN = GOLDEN / "magnet_tiny", GOLDEN / "musicgen_tiny"


@pytest.fixture(scope="module")
def loaded():
    return load_golden()


@pytest.fixture(scope="module")
def musicgen():
    """The golden MusicGen, with a text encoder unlike the MAGNeT's: other weights, other width."""
    golden = lm_rules.read_audiocraft(SHIPPED_GOLDEN / "musicgen_tiny")
    other = load_golden()
    width = 24
    text_proj = golden.params["text_proj"]
    lm = golden.params | {"text_proj": text_proj | {"kernel": text_proj["kernel"][:width]}}
    model = dataclasses.replace(golden.model, text_width=width)
    t5_config = dataclasses.replace(other.t5_config, d_model=width)
    return other._replace(
        config=dataclasses.replace(other.config, model=model),
        params={"lm": lm},
        t5_config=t5_config,
        t5_params=t5.init(t5_config, jax.random.key(3)),
    )


def score_of(monkeypatch, loaded, states, num_frames, *, guidance=1.0, length=None, local=True):
    """A model's probabilities, as decoding asks for them, of texts whose states are given."""
    states_BSE, mask_BS, zeros_B = states
    monkeypatch.setattr(t5, "encode", lambda *_, **__: states_BSE)
    served = dataclasses.replace(loaded.config.model, kind="magnet", delays=())
    config = dataclasses.replace(loaded.config, objective="magnet", model=served)
    partner = loaded._replace(config=config)
    rescorer = rescore.from_model(loaded, partner, guidance=guidance)
    text = tokens_of_text.Text(np.zeros(mask_BS.shape, np.int32), mask_BS, zeros_B)

    @jax.jit
    def probabilities(codes_BKT, hidden_BT, stage):
        score = rescorer.read(rescorer.params, text, num_frames=num_frames, length=length)
        return score(codes_BKT, hidden_BT, stage, local=local)

    return probabilities


def of_tokens(probs_BTV, token_BT):
    return np.take_along_axis(np.asarray(probs_BTV), token_BT[..., None], axis=-1)[..., 0]


def golden(name):
    """A golden model; its text encoder is not used."""
    other, found = load_golden(), lm_rules.read_audiocraft(GOLDEN / f"{name}_tiny")
    config = dataclasses.replace(other.config, model=found.model)
    return other._replace(config=config, params={"lm": found.params})


# --- probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "codes", "logits", "with_text"),
    [
        ("musicgen", "codes", "logits", True),
        ("musicgen", "codes", "null_logits", False),
        ("musicgen", "partial_codes", "partial_logits", True),
        ("hybrid", "partial_codes", "partial_logits", True),
    ],
)
def test_musicgen_gives_the_teacher_forced_probabilities(
    monkeypatch, kind, codes, logits, with_text
):
    """And a hybrid, which reads as one."""
    reference = np.load(MUSICGEN / "forward.npz")
    codes_BKT = reference[codes].astype(np.int32)
    probs_BKTV = jax.nn.softmax(reference[logits], axis=-1)
    mask_id = probs_BKTV.shape[-1]
    text = read_text(MUSICGEN / "forward.npz", with_text)
    loaded = golden("musicgen")
    model = dataclasses.replace(loaded.config.model, kind=kind)
    objective = "hybrid" if kind == "hybrid" else "magnet"
    config = dataclasses.replace(loaded.config, objective=objective, model=model)
    loaded = loaded._replace(config=config)
    score = score_of(monkeypatch, loaded, text, codes_BKT.shape[-1])
    compared = 0
    for stage, token_BT in enumerate(codes_BKT.swapaxes(0, 1)):
        there_BT = reference["valid"][:, stage] & (token_BT != mask_id)
        prob_BT = np.asarray(score(codes_BKT, there_BT, stage))
        expected_BT = of_tokens(probs_BKTV[:, stage], token_BT.clip(max=mask_id - 1))
        np.testing.assert_allclose(prob_BT[there_BT], expected_BT[there_BT], rtol=1e-3, atol=1e-6)
        compared += there_BT.sum()
    assert compared > 100


@pytest.mark.parametrize("num_frames", [60, 68])
def test_musicgen_is_guided_and_judges_the_last_frame_of_every_codebook(monkeypatch, num_frames):
    """Against one pass over as many steps as generation takes, with and without text; the same in
    a longer bucket, of whose frames 60 exist."""
    loaded, guidance = golden("musicgen"), 3.0
    model, params = loaded.config.model, loaded.params["lm"]
    text, null = (read_text(MUSICGEN / "forward.npz", with_text) for with_text in (True, False))
    codes_BKT = np.load(MUSICGEN / "forward.npz")["codes"].astype(np.int32)
    length = codes_BKT.shape[-1]
    steps_BKS = patterns.to_steps(codes_BKT, model.delays, model.mask_id)
    with_text, without = (
        teacher_forcing.step_logits(params, *one, steps_BKS, config=model) for one in (text, null)
    )
    logits_BKTV, valid_KT = patterns.to_frames(
        without + guidance * (with_text - without), model.delays, length, first=0
    )
    assert valid_KT.all()
    probs_BKTV = jax.nn.softmax(logits_BKTV, axis=-1)
    score = score_of(monkeypatch, loaded, text, num_frames, guidance=guidance, length=length)
    past = ((0, 0), (0, 0), (0, num_frames - length))
    padded_BKT = np.pad(codes_BKT, past, constant_values=model.mask_id)
    for stage, token_BT in enumerate(codes_BKT.swapaxes(0, 1)):
        prob_BT = score(padded_BKT, np.ones_like(padded_BKT[:, 0], bool), stage)
        assert np.isfinite(prob_BT).all()
        expected_BT = of_tokens(probs_BKTV[:, stage], token_BT)
        np.testing.assert_allclose(prob_BT[:, :length], expected_BT, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("stage", [0, 2])
def test_magnet_gives_what_it_predicts_of_hidden_tokens(monkeypatch, stage, padding):
    loaded, codes_BKT = golden("magnet"), np.load(MAGNET / "forward.npz")["codes"].astype(np.int32)
    model, text = loaded.config.model, read_text(MAGNET / "forward.npz")
    length, guidance = codes_BKT.shape[-1], 3.0
    codes_BKT[:, stage] %= model.mask_id  # (a few are mask ids)
    hidden_BT = np.random.default_rng(0).uniform(size=codes_BKT[:, stage].shape) < 0.5
    given_BKT = codes_BKT.copy()
    given_BKT[:, stage][hidden_BT] = model.mask_id
    with_text, without = (
        magnet_logits(loaded.params["lm"], *one, given_BKT, stage, config=model, local=stage > 0)
        for one in (text, read_text(MAGNET / "forward.npz", with_text=False))
    )
    probs_BTV = jax.nn.softmax(without + guidance * (with_text - without), axis=-1)
    score = score_of(
        monkeypatch, loaded, text, length + padding,
        guidance=guidance, length=length, local=stage > 0,
    )  # fmt: skip
    past = ((0, 0), (0, padding))
    prob_BT = score(
        np.pad(codes_BKT, ((0, 0), *past), constant_values=model.mask_id),
        np.pad(hidden_BT, past),
        stage,
    )
    assert np.isfinite(prob_BT).all()
    np.testing.assert_allclose(
        prob_BT[:, :length], of_tokens(probs_BTV, codes_BKT[:, stage]), rtol=1e-3, atol=1e-6
    )


# --- what decoding makes of them ---------------------------------------------------------------


NUM_SPANS, SPAN, VOCAB = 10, 3, 16


def table_network():
    """Logits that depend on the frame alone."""
    logits_TV = 3 * jax.random.normal(jax.random.key(2), (NUM_SPANS * SPAN, VOCAB))

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        return jnp.tile(logits_TV[None], (len(codes_BKT), 1, 1))

    def head(states_RMD, stage, *, guided):
        return states_RMD, None

    return parallel.Network(trunk, head), logits_TV


@functools.partial(
    jax.jit, static_argnames=("steps", "planted", "arrangement", "given", "span_score")
)
def decode_table(
    weight, *, planted, steps=(3, 2), arrangement="nonoverlap", given=0, span_score="max"
):  # fmt: skip
    """Greedily; `planted` gives the rescorer's probabilities, None is no rescorer."""
    network, _ = table_network()
    num_frames = NUM_SPANS * SPAN
    config = DecodeConfig(
        steps=steps, temperature=1.5, max_guidance=1, span_arrangement=arrangement,
        span_score=span_score, greedy=True,
    )  # fmt: skip
    rescoring = planted and parallel.Rescoring(planted, weight)
    return parallel.decode(
        network,
        tiny.rules(config, SPAN, VOCAB),
        tiny.task(np.zeros((1, 2, num_frames), np.int32), num_given=given, rescoring=rescoring),
        schedule.make_schedule(config),
    )


OTHER_BT = np.random.default_rng(9).uniform(size=(1, NUM_SPANS * SPAN)).astype(np.float32)


def by_frame(codes_BKT, hidden_BT, stage, *, local, other_BT=OTHER_BT):
    return jnp.asarray(other_BT)


def spans_hidden_again(decoded):
    return np.asarray(decoded.hidden_PBT[1, 0]).reshape(NUM_SPANS, SPAN).all(-1)


def test_spans_are_scored_by_the_convex_combination():
    """The weight is the rescorer's: 0 leaves it out, 1 leaves it alone."""
    own_T = jax.nn.softmax(table_network()[1]).max(-1)  # the first step has temperature 1
    seen = set()
    for weight in (0.0, 0.3, 1.0):
        hidden_S = spans_hidden_again(decode_table(weight, planted=by_frame))
        prob_T = (1 - weight) * own_T + weight * OTHER_BT[0]
        best_S = np.asarray(prob_T).reshape(NUM_SPANS, SPAN).max(-1)
        assert hidden_S.sum() == 7  # cos(pi / 4) of ten
        assert best_S[hidden_S].max() < best_S[~hidden_S].min()
        seen.add(tuple(hidden_S))
    assert len(seen) == 3


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_weight_0_is_no_rescorer_bit_for_bit(arrangement):
    without = decode_table(0.0, planted=None, arrangement=arrangement)
    for weight, same in ((0.0, True), (0.9, False)):
        found = decode_table(weight, planted=by_frame, arrangement=arrangement)
        assert (found.hidden_PBT == without.hidden_PBT).all() == same
        assert not same or (found.codes_BKT == without.codes_BKT).all()


def test_tokens_that_a_rescorer_favours_are_kept():
    """It likes three given tokens, each in a span that would be hidden again."""
    given_T = jnp.argmax(table_network()[1], axis=-1)
    hidden_S = spans_hidden_again(decode_table(0.0, planted=None))
    liked_S = np.flatnonzero(hidden_S)[[0, 3, 6]]
    liked_T = jnp.zeros(NUM_SPANS * SPAN, bool).at[liked_S * SPAN + 1].set(True)

    def planted(codes_BKT, hidden_BT, stage, *, local):
        row_BT = jax.lax.dynamic_index_in_dim(codes_BKT, stage, axis=1, keepdims=False)
        return jnp.where(liked_T[None] & (row_BT == given_T[None]), 1.0, 1e-3)

    np.testing.assert_array_equal(
        np.flatnonzero(~spans_hidden_again(decode_table(0.9, planted=planted))), liked_S
    )


@pytest.mark.parametrize(
    ("span_score", "at_given", "sure", "hidden"),
    [("max", 1.0, (0.1, 0.9), [5]), ("prod", 1e-9, (0.9, 0.1), [27, 28, 29])],
)
def test_given_frames_have_no_say_in_the_span_that_a_prompt_ends_in(
    span_score, at_given, sure, hidden
):
    """Of five given frames two are in the second span: they make it neither surer nor less so."""
    given, sure_T = 5, jnp.asarray(np.linspace(*sure, NUM_SPANS * SPAN), jnp.float32)

    def planted(codes_BKT, hidden_BT, stage, *, local):
        return jnp.where(jnp.arange(NUM_SPANS * SPAN) < given, at_given, sure_T)[None]

    found = decode_table(1.0, planted=planted, given=given, span_score=span_score, steps=(2, 1))
    np.testing.assert_array_equal(np.flatnonzero(found.hidden_PBT[1, 0]), hidden)


@pytest.mark.parametrize("span_score", ["max", "prod"])
def test_given_frames_have_a_say_at_weight_0_alone(span_score):
    """A prompt ends within span 1, of which the model would be sure by its given frames alone."""
    given, split = 5, lambda x_T: np.asarray(x_T, np.float64).reshape(NUM_SPANS, SPAN)
    own_T = jax.nn.softmax(table_network()[1]).max(-1)  # the first step has temperature 1
    of_span = {"max": lambda p_SF: p_SF.max(-1), "prod": lambda p_SF: np.log(p_SF).sum(-1)}
    said, no_say = split(np.arange(NUM_SPANS * SPAN) >= given), 0.0 if span_score == "max" else 1.0
    decided = 0
    for seed in range(20):
        other_T = np.random.default_rng(seed).uniform(size=NUM_SPANS * SPAN).astype(np.float32)
        planted = functools.partial(by_frame, other_BT=other_T[None])
        for weight in (0.0, 0.05, 0.5, 1.0):
            found = decode_table(weight, planted=planted, given=given, span_score=span_score)
            mixed_SF = split((1 - weight) * own_T + weight * other_T)
            silent_SF = np.where(said, mixed_SF, no_say)
            # cos(pi / 4) of nine spans: the six of which both are least sure
            heard, silent = (
                np.sort(1 + of_span[span_score](p_SF)[1:].argsort()[:6])
                for p_SF in (mixed_SF, silent_SF)
            )
            hidden_S = np.asarray(found.hidden_PBT[1, 0]).reshape(NUM_SPANS, SPAN).any(-1)
            np.testing.assert_array_equal(np.flatnonzero(hidden_S), silent if weight else heard)
            decided += (heard != silent).any()
    assert decided


def test_nothing_is_asked_after_the_last_step_of_a_codebook():
    asked = []

    def note(codes_BKT, hidden_BT, stage, *, local):
        asked.append(local)
        return jnp.asarray(OTHER_BT)

    decode_table(0.5, steps=(1, 1), planted=note)
    assert asked == []
    decode_table(0.5, steps=(1, 2), planted=note)
    assert set(asked) == {True}


# --- in the program ----------------------------------------------------------------------------


def read_planted(params, texts_B, *, num_frames, length):
    """A rescorer of one's own: sure of every third span, of which depends on the text."""
    span_T = jnp.arange(num_frames) // SPAN
    sure_BT = (span_T[None] + texts_B[:, None]) % params["every"] == 0
    return lambda codes_BKT, hidden_BT, stage, *, local: sure_BT.astype(jnp.float32)


PLANTED = sampler.Rescorer(
    read_planted,
    {"every": np.int32(3)},
    lambda texts, text_pad_len: np.array([len(text) for text in texts]),
)


def test_any_function_will_do(loaded):
    found = clips(loaded, rescorer=PLANTED, weight=1.0)
    for kept_T, text in zip(~found.hidden_PBT[1], TEXTS):
        kept_S = np.flatnonzero(kept_T[:99].reshape(-1, SPAN).all(-1))
        assert 5 < len(kept_S) <= 11
        assert ((kept_S + len(text)) % 3 == 0).all()


def test_a_rescorer_whose_numbers_are_nan_gives_no_clip(loaded):
    def read(*texts, num_frames, length):
        return lambda codes_BKT, hidden_BT, stage, *, local: jnp.full(hidden_BT.shape, np.nan)

    with pytest.raises(UserError, match="the model or its rescorer computes NaN"):
        clips(loaded, rescorer=PLANTED._replace(read=read), weight=0.5)


@pytest.mark.parametrize("kind", ["musicgen", "magnet"])
def test_one_program_serves_all_weights_and_a_clip_does_not_depend_on_its_neighbours(
    loaded, musicgen, kind
):
    partner, before = {"musicgen": musicgen, "magnet": loaded}[kind], programs.count()
    first, other, neighbours = (
        clips(
            loaded,
            texts,
            rescorer=rescore.from_model(partner, loaded, guidance=guidance),
            weight=weight,
        ).codes_BKT
        for weight, guidance, texts in (
            (0.3, 3.0, TEXTS),
            (1.0, 5.0, TEXTS),
            (0.3, 3.0, ("rain", "a choir", TEXTS[2])),
        )
    )
    assert programs.count() == before + 1
    assert (first[2] != other[2]).any()
    np.testing.assert_array_equal(first[2], neighbours[2])
    assert (first[0] != neighbours[0]).any()


def test_weight_0_makes_the_program_without_a_rescorer(loaded):
    without, before = clips(loaded), programs.count()
    with_it = clips(loaded, rescorer=PLANTED, weight=0.0)
    np.testing.assert_array_equal(with_it.codes_BKT, without.codes_BKT)
    assert programs.count() == before


@pytest.mark.parametrize("kind", ["musicgen", "near magnet"])
def test_clips_are_the_same_on_a_mesh(loaded, musicgen, kind):
    model = dataclasses.replace(loaded.config.model, first_context=9)
    near = loaded._replace(config=dataclasses.replace(loaded.config, model=model))
    partner = {"musicgen": musicgen, "near magnet": near}[kind]
    execution = placement.Execution(mesh=SamplingMeshConfig(data=2, guidance=2, frames=2))
    one, many = (
        clips(
            loaded,
            rescorer=rescore.from_model(partner, loaded, guidance=3.0, execution=execution),
            weight=0.7,
            execution=execution,
        )
        for execution in (placement.Execution(), execution)
    )
    np.testing.assert_array_equal(one.codes_BKT, many.codes_BKT)
    np.testing.assert_array_equal(one.hidden_PBT, many.hidden_PBT)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "model", "message"),
    [
        (
            {"sha256": "1" * 64, "source": "other"},
            {},
            "learnt the tokens of codec other .32000 Hz., the model those of embedded",
        ),
        (
            {"sha256": "1" * 64},
            {},
            "learnt the tokens of codec embedded .32000 Hz., the model those of embedded .32000 "
            "Hz., whose weights differ",
        ),
        (
            {"interleaved": True, "channels": 2},
            {},
            "learnt interleaved stereo, the model one stream",
        ),
        ({"frame_rate": 75.0}, {}, "has 75 frames a second, the model 50"),
        ({}, {"num_codebooks": 2, "delays": (0, 1)}, "has 2 codebooks, the model 4"),
        ({}, {"codebook_size": 64}, "has 64 tokens a codebook, the model 128"),
    ],
)
def test_a_rescorer_whose_tokens_mean_something_else_is_refused(
    loaded, musicgen, codec, model, message
):
    config = dataclasses.replace(
        musicgen.config, model=dataclasses.replace(musicgen.config.model, **model)
    )
    other = musicgen._replace(config=config, codec=dataclasses.replace(musicgen.codec, **codec))
    with pytest.raises(UserError, match=f"^rescorer DIR {message}"):
        rescore.from_model(other, loaded, name="DIR")


def test_weights_are_shares_and_musicgen_is_not_rescored(loaded, musicgen):
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="rescorer weight must lie between 0"):
            clips(loaded, rescorer=PLANTED, weight=weight)
    for guidance in (float("inf"), float("nan"), -1.0):
        with pytest.raises(UserError, match="rescorer guidance must"):
            RescoreConfig(guidance=guidance)
    with pytest.raises(UserError, match="kind musicgen has no spans to score"):
        clips(musicgen, decoding=musicgen.config.autoregressive, rescorer=PLANTED)
