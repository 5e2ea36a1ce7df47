"""Distances and agreements on cases whose answers are known."""

import numpy as np
import pytest
import scipy.linalg

from magnet_jax.evaluation import metrics, probe
from magnet_jax.evaluation.metrics import Gaussian


def rows(count, width=6, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    return scale * random.normal(size=(count, width)) @ random.normal(size=(width, width))


def test_the_frechet_distance_is_scipys_formula():
    a, b = metrics.gaussian(rows(50)), metrics.gaussian(rows(60, seed=1) + 1)
    root_EE = scipy.linalg.sqrtm(a.covariance_EE @ b.covariance_EE)
    expected = np.sum((a.mean_E - b.mean_E) ** 2)
    expected += np.trace(a.covariance_EE + b.covariance_EE - 2 * root_EE.real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_one_dimension():
    # (difference of the means)^2 + (difference of the deviations)^2
    a, b = Gaussian(np.zeros(1), np.eye(1)), Gaussian(np.full(1, 2.0), 9 * np.eye(1))
    assert metrics.frechet_distance(a, b) == pytest.approx(4 + 4)


@pytest.mark.parametrize("count", [4, 50])  # fewer rows than dimensions, and more
def test_the_frechet_distance_is_symmetric_and_of_identical_sets_zero(count):
    a, b = metrics.gaussian(rows(count)), metrics.gaussian(rows(count, seed=1))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    forth, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert forth == pytest.approx(back, rel=1e-9) and forth > 0.1


def test_a_covariance_needs_two_rows():
    with pytest.raises(ValueError, match="two"):
        metrics.gaussian(np.zeros((1, 3)))


def test_intervals_of_fad_hold_the_value_and_narrow_with_more_clips():
    reference = metrics.gaussian(rows(2000, seed=9))

    def measure(count):
        clips = np.split(rows(5 * count, seed=9) + 0.5, count)
        return metrics.fad(clips, reference, resamples=50, seed=0)

    few, many = measure(10), measure(200)
    for score in (few, many):
        assert score.low < score.value < score.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert measure(10) == few  # the same seed
    alone = metrics.fad([rows(20)], reference, resamples=0, seed=0)
    assert alone.low is None and alone.high is None


def test_intervals_of_means_are_as_wide_as_they_should_be():
    values_N = np.random.default_rng(0).normal(3, 2, 400)
    score = metrics.mean(values_N, resamples=1000, seed=0)
    assert score.value == values_N.mean()
    expected = 1.96 * values_N.std() / 20
    assert score.high - score.value == pytest.approx(expected, rel=0.15)
    assert score.value - score.low == pytest.approx(expected, rel=0.15)


def test_label_divergence():
    p_L, q_L = np.array([0.5, 0.5, 0]), np.array([0.25, 0.75, 0])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert metrics.label_divergence(p_L, q_L) == pytest.approx(expected, abs=1e-5)
    assert metrics.label_divergence(q_L, p_L) != pytest.approx(expected, abs=1e-3)
    assert metrics.label_divergence(p_L, p_L) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(metrics.label_divergence(np.array([0, 1]), np.array([1, 0])))


def test_label_distributions_are_averages_of_softmaxes():
    logits_PL = np.log([[0.2, 0.8], [0.6, 0.4]]) + [[1000], [0]]
    np.testing.assert_allclose(metrics.label_distribution(logits_PL), [0.4, 0.6])


def test_cosine():
    a_E = np.array([3.0, 4.0])
    assert metrics.cosine(a_E, 2 * a_E) == pytest.approx(1)
    assert metrics.cosine(a_E, -a_E) == pytest.approx(-1)
    assert metrics.cosine(a_E, np.array([-4.0, 3.0])) == pytest.approx(0)
    assert metrics.cosine(a_E, np.zeros(2)) == 0


def test_tag_auc_is_one_half_by_chance_whatever_the_tags_prior():
    named_NL = np.arange(40)[:, None] % 2 == np.array([[0, 1, 0]])
    prior_L = np.array([[0.9, 0.1, 0.0]])
    auc = [
        metrics.tag_auc(values_NL, named_NL, resamples=20, seed=0)
        for values_NL in (
            prior_L + 0.1 * named_NL,
            prior_L - 0.1 * named_NL,
            np.repeat(prior_L, 40, axis=0),
        )
    ]
    assert [score.value for score in auc] == [1, 0, 0.5]
    random_NL = prior_L + np.random.default_rng(0).normal(size=(40, 3))
    chance = metrics.tag_auc(random_NL, named_NL, resamples=50, seed=0)
    assert chance.low < 0.5 < chance.high
    # Tags that all captions name, or none, say nothing.
    assert np.isnan(metrics.tag_auc(random_NL, named_NL | True, resamples=0, seed=0).value)


def test_tag_hits():
    probabilities_L, named_L = np.array([0.1, 0.9, 0.5, 0.2]), np.array([True, True, False, False])
    found = [metrics.tag_hits(probabilities_L, named_L, among) for among in (1, 2, 4)]
    assert found == [0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Slow piano, and drums.", {"slow", "piano", "drums"}),
        ("A string ensemble with one drum", {"strings", "drums"}),
        ("a female voice", {"female", "female voice", "voice"}),
        ("no vocals, a harpsichord", {"no vocals", "no vocal", "harpsichord"}),
        ("A Bach chorale played on church organ", set()),
        ("Fasting in classes", set()),
    ],
)
def test_tags_that_a_caption_names(caption, expected):
    tags = (
        "slow", "piano", "drums", "strings", "female", "voice", "vocals", "fast", "harpsichord",
        "choral", "class", "female voice", "no vocals", "no vocal",
    )  # fmt: skip
    named_L = metrics.named_tags(caption, tags)
    found = {tag for tag, named in zip(tags, named_L) if named}
    assert found == expected


def test_a_probe_finds_its_labels_and_is_at_chance_without_any():
    random = np.random.default_rng(0)
    labels = {f"{i}": ("piano", "grand piano", "flute", "harp")[i % 4] for i in range(80)}
    centres = dict(zip(sorted(set(labels.values())), 3 * random.normal(size=(4, 50))))

    def draw(told):
        return {
            clip: random.normal(size=(5, 50)) + told * centres[label]
            for clip, label in labels.items()
        }

    for told, least, most in ((1, 0.95, 1), (0, 0, 0.5)):
        fitted = probe.fit(draw(told), labels)
        heard = {clip: probe.hear(fitted, rows_PE) for clip, rows_PE in draw(told).items()}
        right = np.mean([heard[clip] == label for clip, label in labels.items()])
        assert least <= right <= most
    assert probe.named_label(fitted.labels, "A waltz on a grand piano") == "grand piano"
    assert probe.named_label(fitted.labels, "two flutes") == "flute"
    assert probe.named_label(fitted.labels, "a guitar") is None
    with pytest.raises(ValueError, match="too few for a probe"):
        probe.fit({"0": np.zeros((3, 2))}, labels)


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("A waltz on a Synthesizer", "synth"),
        ("two synthesisers", "synth"),
        ("synths and a synthesizer", "Synthesizer"),
        ("a piano, slow", "Piano"),
        ("a double bass", "double-bass"),
        ("double-bass alone", "double bass"),
        ("an electric guitar", "electric_guitar"),
        ("acoustic guitar", None),
        ("a synthetic flute", None),
        ("nothing", None),
    ],
)
def test_labels_are_named_however_they_are_spelled(caption, label):
    labels = {label or "synth", "tuba", "bass_guitar", "-"}
    assert probe.named_label(sorted(labels), caption) == label


def test_a_probe_takes_fewer_rows_than_dimensions():
    clips = {"a": np.eye(50)[:3], "b": -np.eye(50)[:3]}
    fitted = probe.fit(clips, {"a": "left", "b": "right"})
    assert [probe.hear(fitted, clips[name]) for name in "ab"] == ["left", "right"]
