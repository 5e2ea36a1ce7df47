"""Edits through the Python API: what was asked for is new, every other sample is what it was."""

import dataclasses

import numpy as np
import pytest
import soundfile
import sounds
import tiny

from magnet_jax import HybridMAGNeT, MAGNeT, MusicGen, programs
from magnet_jax.codec import decoding, encodec
from magnet_jax.config import SamplingMeshConfig
from magnet_jax.decode import canvas, sampling
from magnet_jax.decode.placement import Execution
from magnet_jax.edit import kept
from magnet_jax.editing import Drafts
from magnet_jax.errors import UserError

RATE, FRAMES = 16_000, 75  # of the clips, the codec's rate


def make(kind="magnet", execution=Execution(), **decode):
    of_kind = {"magnet": MAGNeT, "hybrid": HybridMAGNeT, "musicgen": MusicGen}[kind]
    return of_kind(tiny.loaded_model(kind, **decode), encodec.load_decoder("embedded"), execution)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(autouse=True)
def as_it_was(request):
    """The module's model with its own settings."""
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        model.generation, model.editing = model.loaded.config.sampling, type(model).editing
        model.duration, model.rescorer = model.max_duration, None


@pytest.fixture(scope="module")
def own(model):
    """Two clips that the model made of random tokens, audio and tokens."""
    tokens_BKT = np.random.default_rng(0).integers(0, 1024, (2, 4, FRAMES)).astype(np.int32)
    return model.generate_audio(tokens_BKT), tokens_BKT


def upload(seconds=1.5, rate=22_050, channels=1, dtype=np.float32):
    """Samples [C, N] that no tokens made."""
    wav_NC = sounds.tone(seconds, rate, channels)
    wav_NC += 0.02 * np.random.default_rng(1).normal(size=wav_NC.shape).astype(np.float32)
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (wav_NC.T * scale).astype(dtype)


def assert_changed_alone(edit, before_BCN, within=None, changes=True):
    """Samples outside `changed` are as they were, and within it some are not."""
    assert edit.wav_BCN.dtype == before_BCN.dtype and edit.wav_BCN.shape == before_BCN.shape
    for wav_CN, before_CN, changed in zip(edit.wav_BCN, before_BCN, edit.changed, strict=True):
        outside_N = np.ones(wav_CN.shape[-1], bool)
        for first, end in changed:
            assert 0 <= first < end <= len(outside_N)
            outside_N[first:end] = False
        assert wav_CN[:, outside_N].tobytes() == before_CN[:, outside_N].tobytes()
        assert (wav_CN != before_CN).any() == changes == bool(changed)
        if within is not None:
            assert not outside_N.all() and outside_N[: within[0]].all()
            assert outside_N[within[1] :].all()


def seconds(samples, rate=RATE):
    return round(samples * rate)


# --- inpainting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_region_of_own_clips_is_new_and_nothing_else(model, own, dtype):
    wav_BCN, tokens_BKT = own
    if dtype is np.int16:
        wav_BCN = np.rint(wav_BCN.clip(-1, 1) * 32767).astype(np.int16)
    edit = model.generate_inpainting(
        wav_BCN, RATE, [(0.4, 0.7)], ["a waltz", ""], tokens=tokens_BKT
    )
    guard = (0.4 - 0.2, 0.7 + 0.2)
    assert_changed_alone(edit, wav_BCN, within=[seconds(s) for s in guard])
    same_BKT = edit.tokens_BKT == tokens_BKT
    assert same_BKT[..., :20].all() and same_BKT[..., 35:].all()
    assert not same_BKT[..., 20:35].all((1, 2)).any()
    assert edit.sample_rate == RATE and edit.before == 0


@pytest.mark.parametrize(
    ("dtype", "rate", "channels", "edge"),
    [
        (np.int16, 22_050, 2, "outside"),
        (np.float32, 16_000, 1, "outside"),
        (np.int32, 48_000, 1, "inside"),
        (np.float64, 8_000, 2, "inside"),
    ],
)
def test_a_region_of_an_upload_is_new_and_nothing_else(model, dtype, rate, channels, edge):
    wav_CN = upload(1.5, rate, channels, dtype)
    model.set_edit_params(edge=edge, fade=0.02)
    edit = model.generate_inpainting(wav_CN, rate, [(0.3, 0.8), (1.2, None)], "a harp")
    around = 0.03 if edge == "outside" else 0
    assert_changed_alone(edit, wav_CN[None], within=[seconds(0.3 - around, rate), wav_CN.shape[1]])
    if edge == "inside":
        for first, end in edit.changed[0]:
            assert first >= seconds(0.3, rate) and (
                end <= seconds(0.8, rate) or first >= seconds(1.2, rate)
            )
    assert edit.sample_rate == rate


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_file_is_written_as_it_was_read(model, tmp_path, subtype):
    path = tmp_path / "in.wav"
    soundfile.write(path, upload(1.0, channels=2).T, 22_050, subtype=subtype)
    edit = model.generate_inpainting(path, regions=[(0, 0.2)])
    edit.write(tmp_path / "out.wav")
    numbers = "float32" if subtype == "FLOAT" else "int32"
    before_NC, _ = soundfile.read(path, dtype=numbers, always_2d=True)
    after_NC, rate = soundfile.read(tmp_path / "out.wav", dtype=numbers, always_2d=True)
    assert rate == 22_050 and soundfile.info(tmp_path / "out.wav").subtype == subtype
    ((first, end),) = edit.changed[0]
    assert first == 0
    np.testing.assert_array_equal(after_NC[end:], before_NC[end:])
    assert (after_NC[:end] != before_NC[:end]).any()
    shown = after_NC.T >> 16 if subtype == "PCM_16" else after_NC.T
    np.testing.assert_array_equal(edit.wav_BCN[0], shown)
    scale = 1 if subtype == "FLOAT" else 2.0**31
    np.testing.assert_allclose(edit.as_float(), after_NC.T / scale, atol=1e-9)


def test_a_clip_is_edited_again_and_again(model, own, tmp_path):
    """The tokens that are kept of an edit are still those of what is heard."""
    path = tmp_path / "0.wav"
    soundfile.write(path, own[0][0].T, RATE, subtype="PCM_16")
    kept.save(path, own[1][0], model.loaded.codec, text="a jig")
    for number in range(4):
        edit = model.generate_inpainting(path, regions=[(0.3 * number, 0.3 * number + 0.1)])
        (clip,) = edit.clips
        assert clip.own and clip.text == "a jig"
        before_N, _ = soundfile.read(path, dtype="int16")
        path = tmp_path / f"{number + 1}.wav"
        edit.write(path)
        kept.save(path, edit.tokens_BKT[0], model.loaded.codec, text=clip.text)
        after_N, _ = soundfile.read(path, dtype="int16")
        ((first, end),) = edit.changed[0]
        np.testing.assert_array_equal(after_N[:first], before_N[:first])
        np.testing.assert_array_equal(after_N[end:], before_N[end:])


def test_one_program_edits_any_region(model, own):
    wav_BCN, tokens_BKT = own
    edit = model.generate_inpainting(wav_BCN, RATE, [(0.12, 0.3)], "a jig", tokens=tokens_BKT)
    count, seconds = programs.count(), programs.seconds()
    for begin in (0.0, 0.66, 1.32):
        again = model.generate_inpainting(
            wav_BCN, RATE, [(begin, begin + 0.18)], "a jig", tokens=tokens_BKT
        )
        assert (again.tokens_BKT != edit.tokens_BKT).any()
    assert (programs.count(), programs.seconds()) == (count, seconds)


@pytest.mark.parametrize(
    ("arrangement", "mesh"), [("nonoverlap", {"data": 2, "guidance": 2}), ("stride1", {})]
)
def test_a_clip_is_edited_alike_in_any_batch(own, arrangement, mesh):
    """And by several devices, of which two have a clip each."""
    wav_BCN, tokens_BKT = own
    args = RATE, [(0.4, 0.7)], "a waltz"
    execution = Execution(mesh=SamplingMeshConfig(**mesh))
    both = make(execution=execution, span_arrangement=arrangement).generate_inpainting(
        wav_BCN, *args, tokens=tokens_BKT
    )
    alone = make(span_arrangement=arrangement).generate_inpainting(
        wav_BCN[:1], *args, tokens=tokens_BKT[:1]
    )
    assert_changed_alone(both, wav_BCN)
    np.testing.assert_array_equal(both.tokens_BKT[:1], alone.tokens_BKT)
    assert both.changed[:1] == alone.changed


def test_an_edit_hears_the_window_around_it(model):
    """A clip may be longer than what the model hears, and what is new in it as well."""
    wav_CN = upload(5.0, RATE)
    edit = model.generate_inpainting(wav_CN, RATE, [(3.9, 4.2)])
    assert_changed_alone(edit, wav_CN[None], within=(seconds(3.8), seconds(4.3)))
    far = model.generate_inpainting(wav_CN, RATE, [(0, 0.4), (4, 4.4)])
    assert_changed_alone(far, wav_CN[None])
    assert len(far.changed[0]) == 2
    tokens_BKT = np.random.default_rng(2).integers(0, 1024, (1, 4, 250)).astype(np.int32)
    wav_BCN = model.generate_audio(tokens_BKT)
    whole = model.generate_restyle(wav_BCN, RATE, "x", strength=0.5, tokens=tokens_BKT)
    differs_KT = whole.tokens_BKT[0] != tokens_BKT[0]
    assert not differs_KT[0].any() and (differs_KT[1:].mean(1) > 0.9).all()


def test_a_clip_that_fits_the_window_is_edited_so_beside_one_that_does_not(model):
    """Each region is computed in as many parts as it needs itself."""
    wav_BCN, regions = np.stack([upload(4.0, RATE)] * 2), [[(1.9, 2.2)], [(0, 0.4), (3.4, 3.8)]]
    both = model.generate_inpainting(wav_BCN, RATE, regions)
    alone = model.generate_inpainting(wav_BCN[0], RATE, regions[0])
    np.testing.assert_array_equal(both.tokens_BKT[:1], alone.tokens_BKT)
    assert both.changed[0] == alone.changed[0] and len(both.changed[1]) == 2


def test_a_mask_and_codebooks_free_what_lies_above(model, own):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    mask_KT = np.zeros((4, FRAMES), bool)
    mask_KT[2, 30:40] = True
    edit = model.generate_inpainting(wav_BCN, RATE, mask=mask_KT, tokens=tokens_BKT)
    differs_KT = edit.tokens_BKT[0] != tokens_BKT[0]
    assert not differs_KT[:2].any() and differs_KT[2:, 30:40].any(1).all()
    assert not differs_KT[:, :30].any() and not differs_KT[:, 40:].any()
    again = model.generate_inpainting(wav_BCN, RATE, [(0.6, 0.8)], tokens=tokens_BKT, codebooks=[2])
    np.testing.assert_array_equal(again.tokens_BKT, edit.tokens_BKT)
    whole = model.generate_inpainting(wav_BCN, RATE, mask=np.ones(FRAMES, bool), tokens=tokens_BKT)
    assert (whole.tokens_BKT != tokens_BKT).mean() > 0.9


def test_each_clip_has_regions_of_its_own(model, own):
    """Or none; and it comes out as it does by itself."""
    wav_BCN, tokens_BKT = (np.concatenate([x, x[:1]]) for x in own)
    regions = [[(0, 0.12)], [(0.6, 0.72), (1.2, 1.32)], []]
    model.set_generation_params(decoding_steps=(12, 2, 1, 1))  # more of them for the second
    edit = model.generate_inpainting(wav_BCN, RATE, regions, tokens=tokens_BKT)
    assert [len(changed) for changed in edit.changed] == [1, 2, 0]
    np.testing.assert_array_equal(edit.wav_BCN[2], wav_BCN[2])
    alone = model.generate_inpainting(wav_BCN[:1], RATE, regions[0], tokens=tokens_BKT[:1])
    assert_changed_alone(alone, wav_BCN[:1])
    np.testing.assert_array_equal(alone.tokens_BKT[0], edit.tokens_BKT[0])
    np.testing.assert_array_equal(alone.wav_BCN[0], edit.wav_BCN[0])


@pytest.mark.parametrize("edge", ["outside", "inside"])
def test_regions_that_touch_are_one(model, edge):
    wav_CN = upload(1.5)
    model.set_edit_params(edge=edge)
    parts, whole = (
        model.generate_inpainting(wav_CN, 22_050, regions)
        for regions in ([(0.8, 1.2), (0.2, 0.6), (0.5, 0.8)], [(0.2, 1.2)])
    )
    np.testing.assert_array_equal(parts.tokens_BKT, whole.tokens_BKT)
    np.testing.assert_array_equal(parts.wav_BCN, whole.wav_BCN)
    assert parts.changed == whole.changed and len(whole.changed[0]) == 1


def test_a_region_lies_within_the_samples(model):
    """The last frame of a clip may be longer than the clip, and nothing is there to be edited."""
    wav_CN = upload(1.483)
    for region in ((1.2, 1.5), (1.49, None)):
        with pytest.raises(UserError, match="the clip is 1.48"):
            model.generate_inpainting(wav_CN, 22_050, [region])
    edit = model.generate_inpainting(wav_CN, 22_050, [(1.2, None)])
    assert_changed_alone(edit, wav_CN[None], within=(seconds(1.16, 22_050), wav_CN.shape[1]))


def test_how_it_is_decoded_can_be_set(own):
    """Each setting makes another edit, and none touches anything else."""
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    model = make()  # to which it counts what it sees
    model.loaded.params["lm"] = tiny.random_params(model.loaded.config.model)
    model.set_generation_params(decoding_steps=(12, 6, 1, 1), temperature=1.0)

    def edited(**settings):
        model.set_edit_params(**settings)
        edit = model.generate_inpainting(wav_BCN, RATE, [(0.4, 0.7)], "a", tokens=tokens_BKT)
        assert_changed_alone(edit, wav_BCN)
        return edit.tokens_BKT

    expected_BKT = edited()
    for settings in ({"above": "shown"}, {"anneal": "count"}, {"steps": "all"}):
        assert (edited(**settings) != expected_BKT).any()
    np.testing.assert_array_equal(edited(), expected_BKT)


def test_a_rescorer_takes_part(model, own):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    model.set_generation_params(decoding_steps=(8, 1, 1, 1))
    model.set_edit_params(steps="all")
    edits = []
    for weight in (None, 0, 1):
        if weight is not None:
            model.set_rescorer(make("musicgen"), weight)
        edits.append(
            model.generate_inpainting(wav_BCN, RATE, [(0.2, 1.2)], tokens=tokens_BKT).tokens_BKT
        )
    np.testing.assert_array_equal(edits[0], edits[1])
    assert (edits[0] != edits[2]).any()


def test_a_hybrid_begins_with_what_lies_before(own):
    """Its edits know both sides, and none is made one step after another."""
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    hybrid = make("hybrid", greedy=True)
    hybrid.set_prompt_params(1.0)
    # Of a fresh model what is far away would hardly count.
    hybrid.loaded.params["lm"] = tiny.random_params(hybrid.loaded.config.model)
    args = RATE, [(0.6, 0.78)], "a jig"
    edit = hybrid.generate_inpainting(wav_BCN, *args, tokens=tokens_BKT)
    assert_changed_alone(edit, wav_BCN)
    for heard in (slice(20, 30), slice(39, 75)):  # before and behind
        other_BKT = tokens_BKT.copy()
        other_BKT[..., heard] = (other_BKT[..., heard] + 500) % 1024
        other_BCN = hybrid.generate_audio(other_BKT)
        other = hybrid.generate_inpainting(other_BCN, *args, tokens=other_BKT)
        assert (other.tokens_BKT[..., 30:39] != edit.tokens_BKT[..., 30:39]).any()
    # A region at the beginning leaves it nothing to begin with.
    assert_changed_alone(
        hybrid.generate_inpainting(wav_BCN, RATE, [(0, 0.3)], tokens=tokens_BKT), wav_BCN
    )
    same = hybrid.repair(wav_BCN, RATE, worst=0.001, tokens=tokens_BKT)
    assert_changed_alone(same, wav_BCN, changes=False)


# --- nothing to do --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("generate_inpainting", {"regions": []}),
        ("generate_restyle", {"strength": 0}),
        ("generate_variations", {"variation": 0, "n": 2}),
        ("repair", {"worst": 0}),
        ("repair", {"worst": 0.001}),
    ],
)
def test_nothing_free_is_the_clip_itself(model, own, method, how):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    edit = getattr(model, method)(wav_BCN, RATE, tokens=tokens_BKT, **how)
    count = how.get("n", 1)
    assert_changed_alone(edit, np.repeat(wav_BCN, count, axis=0), changes=False)
    np.testing.assert_array_equal(edit.tokens_BKT, np.repeat(tokens_BKT, count, axis=0))


# --- longer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["own", "upload"])
@pytest.mark.parametrize(("before", "after"), [(0.4, 0.0), (0.0, 1.6), (0.3, 0.5)])
def test_a_clip_is_made_longer_to_the_sample(model, own, source, before, after):
    rate, how = (RATE, {"tokens": own[1]}) if source == "own" else (22_050, {})
    wav_BCN = own[0] if source == "own" else np.stack([upload(1.49), -upload(1.49)])
    edit = model.generate_extension(wav_BCN, rate, before=before, after=after, **how)
    lead, count = round(before * rate), wav_BCN.shape[-1]
    # Added seconds begin where the last frame ends.
    end = lead + count + (round((1.5 + after) * rate) - count if after else 0)
    assert edit.wav_BCN.shape[-1] == end and edit.before == lead
    assert edit.tokens_BKT.shape[-1] == round((before + 1.5 + after) * 50)
    for wav_CN, old_CN, changed in zip(edit.wav_BCN, wav_BCN, edit.changed):
        old_N = np.zeros(end, bool)
        old_N[lead : lead + count] = True
        for first, last in changed:
            old_N[first:last] = False
            assert np.abs(wav_CN[:, first:last]).max() > 1e-3
        assert old_N.sum() > 0.8 * count
        np.testing.assert_array_equal(wav_CN[:, old_N], old_CN[:, old_N[lead : lead + count]])
        assert bool(changed)
        assert (changed[0][0] == 0) == bool(before) and (changed[-1][1] == end) == bool(after)


@pytest.mark.parametrize("source", ["own", "upload"])
def test_a_musicgen_goes_on_from_a_clip(own, source):
    """By more than it hears at once, and all else is as it was."""
    musicgen = make("musicgen")
    rate, how = (RATE, {"tokens": own[1]}) if source == "own" else (22_050, {})
    wav_BCN = own[0] if source == "own" else np.stack([upload(1.5), -upload(1.5)])
    edit = musicgen.generate_extension(wav_BCN, rate, "a jig", after=1.6, **how)
    count, old_BKT = wav_BCN.shape[-1], edit.tokens_BKT[..., :FRAMES]
    assert edit.tokens_BKT.shape == (2, 4, 155) and edit.wav_BCN.shape[-1] == round(3.1 * rate)
    np.testing.assert_array_equal(old_BKT, own[1] if how else old_BKT)
    for changed in edit.changed:
        ((first, end),) = changed
        assert 0.9 * count < first <= count and end == edit.wav_BCN.shape[-1]
        np.testing.assert_array_equal(edit.wav_BCN[..., :first], wav_BCN[..., :first])
    # It goes on as it always does from these tokens.
    expected_BKT = sampling.generate(
        musicgen.loaded, ["a jig", "a jig"], num_frames=100, decoding=musicgen.generation, seed=0,
        given=canvas.beginning_with(old_BKT, 100),
    ).codes_BKT  # fmt: skip
    np.testing.assert_array_equal(edit.tokens_BKT[..., :100], expected_BKT)


def test_two_clips_are_joined(model):
    first_CN, second_CN = upload(0.9), -upload(0.8)
    edit = model.generate_between(first_CN, second_CN, 0.5, 22_050, "a bridge")
    wav_CN = edit.wav_BCN[0]
    joined = wav_CN.shape[1] - second_CN.shape[1]
    assert joined == round((45 + 25) / 50 * 22_050)
    ((begin, end),) = edit.changed[0]
    assert begin < first_CN.shape[1] and joined < end
    assert max(first_CN.shape[1] - begin, end - joined) < 0.05 * 22_050
    np.testing.assert_array_equal(wav_CN[:, :begin], first_CN[:, :begin])
    np.testing.assert_array_equal(wav_CN[:, end:], second_CN[:, end - joined :])
    assert np.abs(wav_CN[:, first_CN.shape[1] : joined]).max() > 1e-3


# --- other versions -------------------------------------------------------------------------------


def test_variations_are_siblings(model, own, monkeypatch):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    decode, calls = decoding.decode_audio, []
    monkeypatch.setattr(decoding, "decode_audio", lambda *args: calls.append(1) or decode(*args))
    edit = model.generate_variations(wav_BCN, RATE, 3, variation=0.2, tokens=tokens_BKT)
    assert len(calls) == 1  # for all of them
    assert_changed_alone(edit, np.repeat(wav_BCN, 3, axis=0))
    differs_BKT = edit.tokens_BKT != tokens_BKT
    assert 0.1 < differs_BKT[:, 0].mean() < 0.22
    assert (differs_BKT[:, 3].mean(-1) >= differs_BKT[:, 0].mean(-1)).all()
    assert (differs_BKT[0] != differs_BKT[1]).any() and (differs_BKT[1] != differs_BKT[2]).any()


def test_strength_goes_from_a_touch_to_another_clip(model, own):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    shares = []
    for strength in (0.2, 0.6, 0.8, 1):
        edit = model.generate_restyle(
            wav_BCN, RATE, "a harpsichord", strength=strength, tokens=tokens_BKT
        )
        differs_KT = (edit.tokens_BKT != tokens_BKT)[0]
        shares.append(differs_KT.mean())
        assert (differs_KT[:1].any()) == (strength > 0.7)
    assert shares == sorted(shares) and shares[-1] > 0.95


def test_a_clip_is_replayed_under_another_text(model, own):
    wav_BCN, tokens_BKT = own

    def replayed(text, strength):
        edit = model.generate_restyle(
            wav_BCN, RATE, text, strength=strength, how="replay", original="a jig",
            tokens=tokens_BKT,
        )  # fmt: skip
        return (edit.tokens_BKT != tokens_BKT).mean()

    assert replayed("a jig", 0) == 0
    assert 0 < replayed("a slow dirge on an organ", 0) < 0.95
    assert replayed("a jig", 1) > 0.9


# --- how sure the model is ------------------------------------------------------------------------


def test_a_repair_never_lowers_the_likelihood(model, own):
    wav_BCN, tokens_BKT = own
    model.set_generation_params(use_sampling=False)
    edit = model.repair(wav_BCN, RATE, worst=0.2, rounds=2, tokens=tokens_BKT)
    before, after = (model.confidence(x).mean((1, 2)) for x in (tokens_BKT, edit.tokens_BKT))
    assert (after >= before).all() and (after > before).any()
    assert ((after > before) == [bool(changed) for changed in edit.changed]).all()
    # What makes a clip less likely is not kept.
    model.set_generation_params(temperature=100.0, top_p=0.0, anneal_temp=False)
    worse = model.repair(edit.wav_BCN, RATE, worst=0.2, tokens=edit.tokens_BKT)
    assert (model.confidence(worse.tokens_BKT).mean((1, 2)) >= after).all()


def test_confidence_is_of_each_token(model, own):
    log_BKT = model.confidence(own[1], ["a jig", ""])
    assert log_BKT.shape == own[1].shape and log_BKT.dtype == np.float32
    assert (log_BKT < 0).all()
    np.testing.assert_allclose(model.confidence(own[1][1:])[0], log_BKT[1], atol=1e-4)
    # Of what is longer than the model hears, each part is read.
    long_KT = np.concatenate([own[1][0]] * 3, axis=-1)
    assert (model.confidence(long_KT) < 0).all()


def test_drafts_are_refined_to_what_would_have_been_made(model):
    # Of spans and a length of one's own, of which the last span is cut.
    model.set_generation_params(decoding_steps=(4, 3, 3, 3), span_len=5, duration=1.02)
    drafts = model.draft(["a waltz", "a jig"], 2, seed=5)
    expected_BCN, expected_BKT = model.generate(
        ["a waltz", "a waltz", "a jig", "a jig"], return_tokens=True, seed=5
    )
    assert drafts.wav_BCN.shape == expected_BCN.shape
    wav_BCN, tokens_BKT = model.refine(drafts, [2, 1])
    np.testing.assert_array_equal(tokens_BKT, expected_BKT[[2, 1]])
    assert wav_BCN.shape == (2, 1, expected_BCN.shape[-1])
    np.testing.assert_array_equal(drafts.tokens_BKT[:, 0, :51], expected_BKT[:, 0, :51])
    assert (drafts.tokens_BKT[:, 1:, :51] != expected_BKT[:, 1:, :51]).any()


# --- one line for what is wrong -------------------------------------------------------------------

WAV = upload(1.5, RATE)


@pytest.mark.parametrize(
    ("method", "args", "how", "message"),
    [
        ("generate_inpainting", [], {}, "give regions, such as"),
        ("generate_inpainting", [[(0, 1)]], {"mask": np.ones(75, bool)}, "regions.*mask, and not"),
        ("generate_inpainting", [[(1, 2)]], {}, "region 1:2: the clip is 1.5 s long"),
        ("generate_inpainting", [[(-1, 1)]], {}, "region -1:1: the clip is"),
        ("generate_inpainting", [[(float("nan"), 1)]], {}, "region nan:1: the clip is"),
        ("generate_inpainting", [[(1, 0.5)]], {}, "region 1:0.5: must end after it begins"),
        ("generate_inpainting", [(0.5, 1)], {}, r"regions must be \(begin, end\)"),
        ("generate_inpainting", ["0:1"], {}, r"regions must be \(begin, end\)"),
        ("generate_inpainting", [[[(0, 1)], [(0, 1)]]], {}, "regions"),
        ("generate_inpainting", [[(0, 1)], ["a", "b"]], {}, "descriptions"),
        ("generate_inpainting", [[(0, 1)], 3], {}, "descriptions must be"),
        ("generate_inpainting", [[(0, 1)]], {"codebooks": [4]}, "codebooks must be some of 0 to 3"),
        ("generate_inpainting", [[(0, 1)]], {"codebooks": []}, "codebooks must be some of"),
        ("generate_inpainting", [[(0, 1)]], {"codebooks": ["a"]}, "codebooks must"),
        ("generate_inpainting", [[(0, 1)]], {"codebooks": 1}, "codebooks must"),
        ("generate_inpainting", [], {"mask": np.ones(74, bool)}, r"mask must be bool \[75\]"),
        ("generate_inpainting", [], {"mask": np.ones(75)}, r"mask must be bool .* not float64"),
        ("generate_inpainting", [], {"mask": np.zeros(75, bool)}, "mask is True nowhere"),
        ("generate_inpainting", [], {"mask": np.ones(75, bool), "codebooks": [1]}, "codebooks"),
        ("generate_inpainting", [[(0, 1)]], {"seed": -1}, "seed must lie"),
        ("generate_inpainting", [[(0, 1)]], {"tokens": np.zeros((2, 4, 75), int)}, "tokens"),
        ("generate_inpainting", [[(0, 1)]], {"tokens": np.full((4, 75), 1024)}, "tokens: codes"),
        ("generate_inpainting", [[(0, 1)]], {"tokens": np.zeros((3, 75), int)}, "tokens: codes"),
        ("generate_inpainting", [[(0, 1)]], {"tokens": np.zeros((4, 75))}, "tokens must be whole"),
        ("generate_inpainting", [[(0, 1)]], {"tokens": np.zeros((4, 75), int)}, "is not the sound"),
        (
            "generate_inpainting",
            [[(0, 1)]],
            {"tokens": np.zeros((4, 20), int)},
            "tokens of 0.4 s",
        ),
        ("generate_extension", [], {}, "give seconds to add: before, after or both"),
        ("generate_extension", [], {"after": -1}, "after must lie"),
        ("generate_extension", [], {"before": 1e-4}, "before and after are shorter than a frame"),
        ("generate_restyle", [], {"strength": 2}, "strength must lie"),
        ("generate_restyle", [], {"how": "magic"}, "how must be"),
        ("generate_restyle", [], {"original": "a jig"}, "original is for how='replay'"),
        ("generate_variations", [0], {}, "n must"),
        ("generate_variations", [], {"variation": "much"}, "variation must"),
        ("repair", [], {"worst": 1.5}, "worst must lie"),
        ("repair", [], {"rounds": 0}, "rounds must"),
        ("repair", [], {"best": 1}, "repair: .*best"),
    ],
)
def test_a_line_for_what_is_wrong(model, method, args, how, message):
    with pytest.raises(UserError, match=message) as error:
        getattr(model, method)(WAV, RATE, *args, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (WAV, None, "give audio_sample_rate"),
        (WAV, 0, "audio_sample_rate must"),
        (WAV[:, :1], 44_100, "audio: is shorter than a sample at 16000 Hz"),
        (WAV.T, RATE, "audio has 24000 channels of 1 samples"),
        (WAV[0], RATE, r"audio must be a file, or samples \[B, C, N\]"),
        (WAV[:, :0], RATE, "audio must be a file, or samples"),
        (WAV.astype(np.int64), RATE, "audio must be a file, or samples .* not int64"),
        (np.full_like(WAV, np.nan), RATE, "audio holds NaN"),
        (["a", "b"], RATE, "audio must be an array of numbers"),
        ("there/is/none.wav", None, "none.wav: cannot be read"),
        ("there/is/none.wav", RATE, "audio_sample_rate is of arrays"),
        (7.0, RATE, "audio must be a file"),
    ],
)
def test_a_line_for_what_is_no_audio(model, audio, rate, message):
    with pytest.raises(UserError, match=message) as error:
        model.generate_inpainting(audio, rate, [(0, 1)])
    assert "\n" not in str(error.value)


def test_a_line_for_the_rest(model, own, tmp_path):
    wav_BCN, tokens_BKT = own

    def says(message):
        return pytest.raises(UserError, match=message)

    with says("two clips|not of 2"):
        model.generate_variations(wav_BCN, RATE, tokens=tokens_BKT)
    with says("as many clips"):
        model.generate_between(wav_BCN, wav_BCN[:1], 1, RATE)
    with says("must have the same rate"):
        model.generate_between(wav_BCN, wav_BCN.astype(np.float64), 1, RATE)
    with says("tokens must be whole numbers"):
        model.confidence(np.ones((4, 75)))
    with says("2 clips need as many descriptions"):
        model.confidence(tokens_BKT, ["a", "b", "c"])
    model.set_edit_params("inside")
    with says("region 0.5:0.7: too short for edge='inside', which needs up to"):
        model.generate_inpainting(wav_BCN, RATE, [(0.5, 0.7)], tokens=tokens_BKT)
    edit = model.generate_inpainting(wav_BCN, RATE, [], tokens=tokens_BKT)
    for name in ("none", "a.mp3"):
        with says("cannot hold FLOAT samples exactly: the name must end in .wav or .aiff"):
            edit.write(tmp_path / name)
    with says("edge must be"):
        model.set_edit_params("beside")
    with says("fade must lie"):
        model.set_edit_params(fade=-1)
    with says("drafts must come from draft"):
        model.refine(tokens_BKT, [0])
    drafts = Drafts(wav_BCN, tokens_BKT, ["", ""], 0)
    for picks in ([2], [-1], []):
        with says("picks must be some of 0 to 1"):
            model.refine(drafts, picks)
    with says("picks must"):
        model.refine(drafts, ["a"])
    path = tmp_path / "clip.wav"
    soundfile.write(path, wav_BCN[0].T, RATE)
    other = dataclasses.replace(model.loaded.codec, sha256="ab" * 32)
    kept.save(path, tokens_BKT[0], other)
    with says("clip.tokens.npz: holds 4 codebooks of codec abab"):
        model.generate_inpainting(path, regions=[(0, 1)])


def test_models_that_cannot_edit_say_so(own):
    wav_BCN, tokens_BKT = (x[:1] for x in own)
    hybrid = make("hybrid")
    with pytest.raises(UserError, match="replay is for a MAGNeT"):
        hybrid.generate_restyle(wav_BCN, RATE, "a jig", how="replay", tokens=tokens_BKT)
    with pytest.raises(UserError, match="drafts are made by a MAGNeT"):
        hybrid.draft("a jig")
    musicgen = make("musicgen")
    for name, args in (
        ("generate_inpainting", (wav_BCN, RATE, [(0, 1)])),
        ("generate_between", (wav_BCN, wav_BCN, 1, RATE)),
        ("generate_restyle", (wav_BCN, RATE, "a jig")),
        ("generate_variations", (wav_BCN, RATE)),
        ("repair", (wav_BCN, RATE)),
        ("confidence", (tokens_BKT,)),
        ("generate_extension", (wav_BCN, RATE)),
    ):
        how = {"before": 1} if name == "generate_extension" else {}
        message = "of kind musicgen makes what comes behind a clip alone .*; take a MAGNeT"
        with pytest.raises(UserError, match=message) as error:
            getattr(musicgen, name)(*args, **how)
        assert str(error.value).startswith("before:" if how else f"{name}:")
    with pytest.raises(UserError, match="drafts are made by a MAGNeT"):
        musicgen.draft("a jig")
    norming = make()
    norming.decoder = norming.decoder._replace(
        config=dataclasses.replace(norming.decoder.config, norm_type="time_group_norm")
    )
    with pytest.raises(UserError, match="codec .* norms over the whole clip: no exact edits"):
        norming.generate_inpainting(wav_BCN, RATE, [(0, 1)], tokens=tokens_BKT)
