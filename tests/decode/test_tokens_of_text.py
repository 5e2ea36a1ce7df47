"""Descriptions as programs take them: blends, texts over time and negative ones, in every model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from magnet_jax.config import AutoregressiveConfig, EditConfig, SamplingMeshConfig
from magnet_jax.decode import long, magnet, rescore, sampling, tokens_of_text
from magnet_jax.decode.magnet import NO_SAVINGS
from magnet_jax.decode.placement import Execution
from magnet_jax.decode.tokens_of_text import tokenize_texts
from magnet_jax.errors import UserError
from magnet_jax.model import transformer
from magnet_jax.model.kernels import choose_kernels
from magnet_jax.prompts import Prompt

FRAMES = 60
OVER_TIME = Prompt([(0, "a jig"), (0.6, "a harp")], fade=0)


@functools.cache
def loaded(kind="magnet"):
    found = tiny.loaded_model(kind, greedy=True)
    greedy = AutoregressiveConfig(greedy=True)
    return found._replace(config=dataclasses.replace(found.config, autoregressive=greedy))


def generate(texts, kind="magnet", **how):
    model = loaded(kind)
    how = {"decoding": model.config.sampling, "num_frames": FRAMES, "seed": 1} | how
    return sampling.generate(model, texts, **how).codes_BKT


def logits(texts, *, local=False, first=0, frames=FRAMES):
    """Of some frames of a clip at stage 0 or 1, with text and without or with the negative one."""
    model = loaded()
    config, text = model.config.model, tokenize_texts(model, texts)
    codes_BKT = np.random.default_rng(0).integers(0, 1025, (1, 4, FRAMES))
    codes_BKT = np.repeat(codes_BKT, len(texts), 0)[..., first : first + frames]
    kernels = choose_kernels(model.config.kernels, "cpu", config, FRAMES, jnp.float32)
    first_B = jnp.full(len(texts), first) if frames < FRAMES else None

    @jax.jit
    def run(params, t5_params, text, codes_BKT):
        states = tokens_of_text.encode(t5_params, model.t5_config, text, dtype=jnp.float32)
        bound = transformer.bind(config, params)
        keys = tokens_of_text.read(bound, states, FRAMES, dtype=jnp.float32)
        network = magnet.guided_network(config, params, keys, FRAMES, kernels=kernels)
        how = {"local": local, "guided": True, "first_B": first_B}
        found = network.trunk(codes_BKT, stage=int(local), **how)
        return network.head(found, int(local), guided=True)

    return run(model.params["lm"], model.t5_params, text, codes_BKT)


def test_what_is_one_text_is_tokenized_as_one():
    """And so takes the program that it always took, bit for bit."""
    usual = tokenize_texts(loaded(), ["a jig", "", "a harp"], 20)
    assert usual.shares is None and usual.negative is None
    found = tokenize_texts(
        loaded(),
        [
            Prompt([("a jig", 1), ("a harp", 0)], negative=""),
            Prompt(None, negative=[(0, ""), (3, "")]),
            Prompt([(0, "a harp"), (1, [("a harp", 0.5), ("a harp", 0.5)])]),
        ],
        20,
    )
    assert jax.tree.structure(found) == jax.tree.structure(usual)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(usual)):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_descriptions_come_in_few_shapes():
    blend = Prompt([("a", 1), ("b", 1), ("c", 2)], negative="d")
    text = tokenize_texts(loaded(), [blend, "a", OVER_TIME])
    assert text.any and text.ids_BS.shape == text.negative.mask_BS.shape == (3, 4, 16)
    assert text.num_zero_keys_B.shape == (3, 4)
    assert text.shares.weight_BPG.shape == text.negative.shares.weight_BPG.shape == (3, 2, 4)
    np.testing.assert_array_equal(text.shares.weight_BPG[0], [[0.25, 0.25, 0.5, 0]] * 2)
    np.testing.assert_array_equal(text.shares.weight_BPG[1], [[1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(text.shares.knot_BP[2], [29, 30])
    assert not text.negative.mask_BS[1:].any() and text.negative.mask_BS[0, 0].any()
    # One text each needs no shares.
    text = tokenize_texts(loaded(), [Prompt("a", negative="b"), "c"])
    assert text.shares is None and text.ids_BS.shape == text.negative.ids_BS.shape == (2, 16)
    others = tokenize_texts(loaded(), [Prompt([("x", 0.1), ("y", 3)])])
    same = tokenize_texts(loaded(), [Prompt([("z", 2), ("w", 1)])])
    assert jax.tree.map(np.shape, others) == jax.tree.map(np.shape, same)  # one program
    notes = tokens_of_text.notes_on_cut_texts(
        loaded(), [Prompt([(0, "a"), (1, "waltz " * 40)], negative="jig " * 40)]
    )
    assert [note.split(": ")[1][:4] for note in notes] == ["walt", "jig "]


def test_guidance_leads_away_from_the_negative_text():
    """Whose rows are those of that text; where there is none they are rows without text."""
    found = logits([Prompt("a jig", negative="a harp"), "a waltz"])
    jig, waltz, harp = logits(["a jig", "a waltz", "a harp"])[0]
    null = logits(["a jig"])[1][0]
    for one, other in zip((*found[0], *found[1]), (jig, waltz, harp, null)):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert abs(jig - harp).max() > 1e-3 < abs(harp - null).max()


def test_frames_are_steered_by_the_text_of_their_time():
    """At a local stage those that cannot see the change are as if there were none."""
    reach, change = 2 * 3, 30
    jig, harp = logits(["a jig", "a harp"], local=True)[0]
    for text in (OVER_TIME, dataclasses.replace(OVER_TIME, negative="a drum")):
        found = logits(["a waltz", text], local=True)[0][1]
        np.testing.assert_allclose(found[: change - reach], jig[: change - reach], atol=1e-5)
        np.testing.assert_allclose(found[change + reach :], harp[change + reach :], atol=1e-5)
        assert abs(found - jig)[change - reach : change].max() > 1e-4  # (so the test bites)
    # On a line that begins at another frame of a ring, each place has its frame's shares.
    model = loaded()
    tokens = tokenize_texts(model, [OVER_TIME, "a waltz"])
    states = tokens_of_text.encode(model.t5_params, model.t5_config, tokens, dtype=jnp.float32)
    bound = transformer.bind(model.config.model, model.params["lm"])
    keys = tokens_of_text.read(bound, states, FRAMES, dtype=jnp.float32)
    place_1W = (np.arange(FRAMES) + 40)[None] % FRAMES
    shares_WG = keys.at(jnp.asarray(place_1W)).weight_BTG[0]
    np.testing.assert_array_equal(shares_WG[:, 0], place_1W[0] < change)
    # Of a part of the clip, likewise.
    part = logits(["a waltz", text], local=True, first=20, frames=30)[0][1]
    np.testing.assert_allclose(part[reach:-reach], found[20 + reach : 50 - reach], atol=1e-5)


def test_windows_of_longer_clips_have_their_part_of_the_whole():
    two = Prompt([(0, "a"), (0.5, "b"), (0.8, "c")], negative=[(0, "d"), (0.7, "e")], fade=0.2)
    text = tokenize_texts(loaded(), ["a waltz", two])
    clip_R, first_R = np.array([0, 1, 1]), np.array([10, 0, 25], np.int32)
    windows = long.texts_of_windows(text, clip_R, first_R)
    assert jax.tree.structure(windows) == jax.tree.structure(text)

    def shares(text, row, frames):
        knot_P, weight_PG = (x[row] for x in text.shares)
        return np.stack([np.interp(frames, knot_P, weight_P) for weight_P in weight_PG.T])

    for one, whole in ((windows, text), (windows.negative, text.negative)):
        for row, (clip, first) in enumerate(zip(clip_R, first_R)):
            np.testing.assert_array_equal(one.ids_BS[row], whole.ids_BS[clip])
            np.testing.assert_allclose(
                shares(one, row, np.arange(30)), shares(whole, clip, first + np.arange(30)),
                atol=1e-6,
            )  # fmt: skip


RICH = [
    dataclasses.replace(OVER_TIME, negative="a drum"),
    "a waltz",
    Prompt([("a jig", 0.7), ("a harp", 0.3)]),
    Prompt(None, negative="a jig"),
]


def test_clips_do_not_depend_on_their_neighbours_nor_on_the_devices():
    """Nor on what is left out because it changes nothing."""
    expected = generate(RICH)
    np.testing.assert_array_equal(generate([RICH[1]], first_sample=1)[0], expected[1])
    assert len({row.tobytes() for row in expected}) == 4
    mesh = SamplingMeshConfig(data=2, guidance=2, frames=2)
    in_segments = Execution(between=lambda progress: None)
    for execution in (Execution(mesh=mesh), Execution(savings=NO_SAVINGS), in_segments):
        # (Programs round in ways of their own: on some CPUs a token that is as likely as another
        # falls the other way. What hangs on a neighbour changes whole clips.)
        assert (generate(RICH, execution=execution) != expected).mean() < 0.005


def test_loops_have_texts_that_come_round_again():
    ring = {"editing": EditConfig(ring=True)}
    found = generate(RICH, **ring)
    np.testing.assert_array_equal(generate([RICH[1]], first_sample=1, **ring)[0], found[1])
    turned = Prompt([(0, "a harp"), (0.6, "a jig")], negative="a drum", fade=0)
    assert (generate([turned, *RICH[1:]], **ring)[0] != found[0]).any()
    other = rescore.from_model(loaded(), loaded())
    with pytest.raises(UserError, match="leave out the rescorer, or give each loop one text"):
        generate([OVER_TIME], rescorer=other, **ring)


@pytest.mark.parametrize("kind", ["musicgen", "hybrid"])
def test_what_is_made_one_step_after_another_knows_the_frame(kind):
    """Up to the change it is what the first text makes, of each codebook; then it is not."""
    how = {}
    if kind == "hybrid":
        decoding = dataclasses.replace(loaded(kind).config.sampling, prompt_seconds=1.0)
        how = {"decoding": decoding}
    first = generate(["a jig", "a jig"], kind, **how)[0]
    found = generate([OVER_TIME, "a jig"], kind, **how)
    np.testing.assert_array_equal(found[1], generate(["a jig"], kind, first_sample=1, **how)[0])
    for codebook, delay in enumerate(loaded(kind).config.model.delays):
        np.testing.assert_array_equal(
            found[0, codebook, : 30 - delay], first[codebook, : 30 - delay]
        )
    assert (found[0] != first).any()
    negative = generate([Prompt("a jig", negative="a harp"), "a jig"], kind, **how)
    np.testing.assert_array_equal(negative[1], found[1])
    assert (negative[0] != first).any()


@pytest.mark.parametrize("kind", ["musicgen", "magnet"])
def test_rescorers_read_the_same_texts(kind):
    partner = loaded()
    rescorer = rescore.from_model(loaded(kind), partner, guidance=3.0)
    codes_BKT = np.random.default_rng(0).integers(0, 1024, (2, 4, FRAMES))
    hidden_BT = np.ones((2, FRAMES), bool)

    def probabilities(texts):
        run = jax.jit(
            lambda params, text: rescorer.read(params, text, num_frames=FRAMES, length=None)(
                codes_BKT, hidden_BT, jnp.int32(0), local=False
            )
        )
        return run(rescorer.params, rescorer.tokenize(texts, None))

    usual = probabilities(["a jig", "a waltz"])
    found = probabilities([dataclasses.replace(OVER_TIME, negative="a drum"), "a waltz"])
    np.testing.assert_allclose(found[1], usual[1], rtol=1e-4)
    assert (abs(found[0] - usual[0]) > 1e-5 * usual[0]).any()
    if kind == "musicgen":
        found = probabilities([OVER_TIME, "a waltz"])
        np.testing.assert_allclose(found[0, :30], usual[0, :30], rtol=1e-4)
        assert (abs(found[0] - usual[0]) > 1e-5 * usual[0])[30:].any()
