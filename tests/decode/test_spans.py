"""Which units are hidden, and how unsure they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.decode import spans
from magnet_jax.decode.spans import Spans


def plain_hide_spans(score_T, num_hidden, span_length):
    """The reference's search for one row, as its description tells it, step by step."""
    starts = range(len(score_T) - span_length + 1)
    spans = [np.float32(score_T[i : i + span_length].sum()) for i in starts]
    order = np.argsort(-np.asarray(spans), kind="stable")

    def hide(count):
        mask = np.zeros(len(score_T), bool)
        for start in order[:count]:
            mask[start : start + span_length] = True
        return mask

    low, high = num_hidden // span_length, num_hidden - span_length + 1
    middle = round((low + high) / 2)
    mask = hide(middle)
    while low < middle < high:
        mask = hide(middle)
        if mask.sum() > num_hidden:
            high = middle
        else:
            low = middle
        middle = round((low + high) / 2)
    return mask


@pytest.mark.parametrize(("num_frames", "span_length"), [(30, 1), (31, 3), (64, 4), (100, 5)])
def test_overlapping_spans_are_chosen_as_a_plain_search_does(num_frames, span_length):
    rng = np.random.default_rng(num_frames)
    score_BT = rng.exponential(size=(3, num_frames)).astype(np.float32)
    score_BT[1, rng.permutation(num_frames)[:20]] = spans.KEPT
    score_BT[2] = 0  # as at the first step
    hide = jax.jit(spans.hide_overlapping, static_argnums=2)
    for num_hidden in range(span_length, num_frames + 1):
        found = hide(score_BT, np.full(3, num_hidden), span_length)
        for row, score_T in zip(found, score_BT):
            expected = plain_hide_spans(score_T, num_hidden, span_length)
            np.testing.assert_array_equal(row, expected, err_msg=f"{num_hidden} hidden")


def test_the_worst_units_of_a_grid_are_hidden_by_their_frames():
    law = Spans(length=3)
    score_BU = jnp.array([[0.1, 0.9, spans.KEPT, 0.5, spans.ABSENT], [0.0, 0.0, 0.0, 0.0, 0.0]])
    hidden_BU = spans.hide(law, score_BU, jnp.array([[2], [3]]))
    expected_BU = [[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]  # the first ones where all are alike
    np.testing.assert_array_equal(hidden_BU, np.array(expected_BU, bool))
    np.testing.assert_array_equal(spans.frames(law, hidden_BU)[0], np.repeat(expected_BU[0], 3))


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_in_each_stretch_the_worst_units_are_hidden_as_if_it_were_alone(arrangement):
    """Of 31 frames in stretches of 12; none starves for another."""
    span, size = (3, 12) if arrangement == "stride1" else (1, 12)
    law = Spans(length=span, arrangement=arrangement)
    apart = Spans(length=span, arrangement=arrangement, stretch=size)
    rng = np.random.default_rng(0)
    score_BT = rng.exponential(size=(2, 31)).astype(np.float32)
    score_BT[:, :12] += 9  # all of the worst
    free_BT = rng.random((2, 31)) < 0.8
    _, free_BG, num_units = spans.start(apart, free_BT, np.ones(31, bool))
    parts = [slice(0, 12), slice(12, 24), slice(24, 31)]
    np.testing.assert_array_equal(free_BG, np.stack([free_BT[:, p].sum(-1) for p in parts], -1))
    assert num_units == 31
    hidden_BT = spans.hide(apart, score_BT, jnp.array([[4, 6, 3], [9, 3, 4]]))
    for part, count_B in zip(parts, ([4, 9], [6, 3], [3, 4])):
        own_BT = np.pad(score_BT[:, part], ((0, 0), (0, 12 - score_BT[:, part].shape[1])),
                        constant_values=spans.ABSENT)  # fmt: skip
        alone_BT = spans.hide(law, own_BT, jnp.array(count_B)[:, None])
        np.testing.assert_array_equal(hidden_BT[:, part], alone_BT[:, : score_BT[:, part].shape[1]])


def test_a_unit_is_free_if_one_of_its_frames_is():
    free_BT = np.zeros((1, 12), bool)
    free_BT[0, [2, 3, 10]] = True
    score_BU, free_B, _ = spans.start(Spans(length=3), free_BT, np.arange(12) < 9)
    np.testing.assert_array_equal(score_BU, np.array([[0, 0, spans.KEPT, spans.ABSENT]], "f4"))
    assert free_B == 2  # the fourth has a free frame that does not exist
    score_BT, free_B, num_units = spans.start(
        Spans(length=3, arrangement="stride1"), free_BT, np.arange(12) < 11
    )
    assert free_B == 3 and (score_BT[0, [2, 3, 10]] == 0).all() and score_BT[0, 11] < spans.KEPT


def test_a_unit_is_as_unsure_as_its_surest_token_or_as_all_of_them():
    prob_BT = np.array([[0.5, 0.9, 0.1, 1.0, 1.0, 0.25]], np.float32)
    by_surest = spans.measure(Spans(length=3), prob_BT)
    np.testing.assert_allclose(by_surest, [[0.1, 0.0]], atol=1e-6)
    by_all = spans.measure(Spans(length=3, score="prod"), prob_BT)
    np.testing.assert_allclose(by_all, [[-np.log(0.045), -np.log(0.25)]], rtol=1e-6)
    alone = spans.measure(Spans(length=3, arrangement="stride1"), prob_BT)
    np.testing.assert_allclose(alone, -np.log(prob_BT), rtol=1e-6, atol=1e-6)


def test_orders_of_units():
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2))
    halton_1U = spans.priority("halton", keys_B, 0, 8)
    np.testing.assert_array_equal(halton_1U.argsort(-1), [[0, 4, 2, 6, 1, 5, 3, 7]])
    for count in (1, 2, 5, 33, 167):  # the even ones first, and of these every second one, too
        kept_U = np.asarray(spans.priority("halton", keys_B, 3, count)[0].argsort())
        np.testing.assert_array_equal(np.sort(kept_U), np.arange(count))
        for step in (2, 4, 8, 64):
            every = np.arange(0, count, step)
            np.testing.assert_array_equal(np.sort(kept_U[: len(every)]), every)
    random = functools.partial(spans.priority, "random", keys_B)
    one_BU = np.asarray(random(0, 50))
    assert ((one_BU >= 0) & (one_BU < 1)).all() and (one_BU[0] != one_BU[1]).all()
    np.testing.assert_array_equal(one_BU, random(0, 50))
    assert (one_BU != random(1, 50)).all()
