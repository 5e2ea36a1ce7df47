"""Masking rates, span counts and span masks by property (the numbers: test_golden.py)."""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.train import masking


def test_expected_rate_is_equation_8():
    rates = masking.expected_rate(60, 3)
    for count in range(61):
        assert rates[count] == pytest.approx(1 - comb(57, count) / comb(60, count), abs=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.35, 0.7, 0.95])
def test_mean_masking_rate_is_the_wanted_one(rate):
    rows, num_frames, span = 2000, 150, 3
    uniform_BT = jax.random.uniform(jax.random.key(0), (rows, num_frames))
    mask_BT = masking.span_mask(uniform_BT, jnp.full(rows, rate), span)
    # The count is a whole number, and the cut at the end hides l(l-1)/2 places a little less.
    count = masking.span_counts(num_frames, span)[round(100 * rate)]
    expected = masking.expected_rate(num_frames, span)
    assert expected[count - 1] < rate <= expected[count]
    assert float(mask_BT.mean()) == pytest.approx(expected[count], abs=5e-3)


def test_masks_are_spans_and_never_empty():
    uniform_BT = jax.random.uniform(jax.random.key(1), (64, 90))
    mask_BT = np.asarray(masking.span_mask(uniform_BT, jnp.zeros(64), 5))
    for row in mask_BT:
        (places,) = np.nonzero(row)
        assert 1 <= len(places) <= 5
        assert (np.diff(places) == 1).all()


def test_masking_rate_is_a_quarter_cosine():
    fractions = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(
        masking.masking_rate(fractions), np.cos(np.pi / 2 * np.linspace(0, 1, 5)), atol=1e-6
    )


def reference_counts(num_frames, span):
    """How many starts reach 0, 1, ... 100 per cent, said as the reference says it."""
    means, kept = [0.0], (num_frames - span) / num_frames
    for starts in range(1, num_frames):
        means.append(1 - kept)
        kept *= (num_frames - span - starts) / (num_frames - starts)
    return [int(np.searchsorted(means, percent / 100)) for percent in range(101)]


@pytest.mark.parametrize("span", [2, 3, 4, 5, 10])
def test_span_counts_are_the_references_at_any_length(span):
    for num_frames in (*range(span + 1, 40), 150, 499, 500, 750, 1500):
        np.testing.assert_array_equal(
            masking.span_counts(num_frames, span), reference_counts(num_frames, span)
        )


@pytest.mark.parametrize("span", [1, 3, 5])
def test_what_follows_a_prompt_is_masked_as_a_clip_of_its_length_is(span):
    """One law for MAGNeT and for hybrids: the masks of clips that begin at frame 0 and later."""
    num_frames, first = 60, 23
    rates_B = jnp.linspace(0, 1, 301)
    whole_BT = jax.random.uniform(jax.random.key(3), (301, num_frames))
    shorter_BT = masking.span_mask(whole_BT[:, first:], rates_B, span)
    mask_BT = masking.span_mask(whole_BT, rates_B, span, jnp.full(301, first))
    assert not mask_BT[:, :first].any()
    np.testing.assert_array_equal(mask_BT[:, first:], shorter_BT)


def test_a_span_longer_than_the_sequence_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        masking.span_counts(4, 5)
