"""Fréchet audio distance, label divergence, caption scores, and how sure they are.

Plain NumPy on what embedders give, whatever the embedder. P rows of embeddings or labels, N clips,
E the embedding's width, L labels.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """A measured value and the middle 95 % of what other draws of as many clips would give."""

    value: float
    low: float | None
    high: float | None
    """None without draws."""


class Gaussian(NamedTuple):
    """Mean [E] and covariance [E, E] of a set of embeddings."""

    mean_E: np.ndarray
    covariance_EE: np.ndarray


def gaussian(embeddings_PE: np.ndarray) -> Gaussian:
    """In float64, with P - 1 in the denominator; `ValueError` for fewer than two rows."""
    if len(embeddings_PE) < 2:
        raise ValueError(f"a covariance needs two embeddings at least, not {len(embeddings_PE)}")
    rows_PE = np.asarray(embeddings_PE, np.float64)
    return Gaussian(rows_PE.mean(0), np.atleast_2d(np.cov(rows_PE, rowvar=False)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), as in Kilgour et al. 2018.

    The trace of that root is the sum of the singular values of C_a^(1/2) C_b^(1/2): real and
    symmetric in a and b, also where a set has fewer rows than dimensions.
    """
    product_EE = _root(a.covariance_EE) @ _root(b.covariance_EE)
    return _distance(a, b, np.linalg.svd(product_EE, compute_uv=False).sum())


def _distance(a: Gaussian, b: Gaussian, trace_of_root: float) -> float:
    difference_E = a.mean_E - b.mean_E
    traces = np.trace(a.covariance_EE) + np.trace(b.covariance_EE)
    return float(difference_E @ difference_E + traces - 2 * trace_of_root)


def _root(covariance_EE: np.ndarray) -> np.ndarray:
    values_E, vectors_EE = np.linalg.eigh(covariance_EE)
    return (vectors_EE * np.sqrt(values_E.clip(0))[None]) @ vectors_EE.T


def fad(clips: Sequence[np.ndarray], reference: Gaussian, *, resamples: int, seed: int) -> Score:
    """Fréchet distance of a set of clips, each [P, E], to a reference.

    The interval is the spread over sets of clips drawn with replacement, moved onto the measured
    value: a draw repeats clips, which by itself raises the distance. The reference stays as it is.
    """
    value = frechet_distance(gaussian(np.concatenate(clips)), reference)
    root_EE = _root(reference.covariance_EE)

    def measure(drawn_N: np.ndarray) -> float:
        drawn = gaussian(np.concatenate([clips[i] for i in drawn_N]))
        # The same trace, less exact where eigenvalues are next to zero, in a third of the time.
        products_E = np.linalg.eigvalsh(root_EE @ drawn.covariance_EE @ root_EE)
        return _distance(drawn, reference, np.sqrt(products_E.clip(0)).sum())

    return moved(value, measure, len(clips), resamples=resamples, seed=seed)


def moved(
    value: float,
    measure: Callable[[np.ndarray], float],
    count: int,
    *,
    resamples: int,
    seed: int,
) -> Score:
    """A distance with the spread over sets of clips drawn with replacement, moved onto it.

    `measure` gives the distance of the clips with these numbers, of `count`.
    """
    draws = _draws(measure, count, resamples, seed)
    return _interval(value, (draws + value - draws.mean()).clip(0) if len(draws) else draws)


def label_divergence(reference_L: np.ndarray, generated_L: np.ndarray) -> float:
    """KL(reference || generated) in nats of two distributions over labels.

    The direction, and 1e-6 added to the second, are AudioCraft's.
    """
    reference_L, generated_L = (np.asarray(p, np.float64) for p in (reference_L, generated_L))
    log_ratio_L = np.log(np.where(reference_L > 0, reference_L, 1)) - np.log(generated_L + 1e-6)
    return float((reference_L * log_ratio_L).sum())


def label_distribution(logits_PL: np.ndarray) -> np.ndarray:
    """[L], of sum 1: the softmax of each row, averaged; so AudioCraft reads PaSST's labels."""
    logits_PL = np.asarray(logits_PL, np.float64)
    exponentials_PL = np.exp(logits_PL - logits_PL.max(-1, keepdims=True))
    return (exponentials_PL / exponentials_PL.sum(-1, keepdims=True)).mean(0)


def cosine(a_E: np.ndarray, b_E: np.ndarray) -> float:
    """The cosine between two embeddings: a clip's CLAP score, where one is its caption's."""
    return float(a_E @ b_E / max(np.linalg.norm(a_E) * np.linalg.norm(b_E), 1e-12))


def mean(values_N: Sequence[float], *, resamples: int, seed: int) -> Score:
    """Of one value a clip."""
    values_N = np.asarray(values_N, np.float64)
    draws = _draws(lambda drawn_N: values_N[drawn_N].mean(), len(values_N), resamples, seed)
    return _interval(float(values_N.mean()), draws)


def tag_auc(
    probabilities_NL: np.ndarray, named_NL: np.ndarray, *, resamples: int, seed: int
) -> Score:
    """How often a clip whose caption names a tag has more of it than one whose caption does not.

    Averaged over the tags that some captions name and others do not. 0.5 is chance, whatever the
    tags: the probabilities of one tag, or whatever grows with them, are compared with each other
    alone. `named_NL` (bool) are the tags that each caption names.
    """

    def measure(drawn_N: np.ndarray) -> float:
        return _mean_auc(probabilities_NL[drawn_N], named_NL[drawn_N])

    draws = _draws(measure, len(named_NL), resamples, seed)
    return _interval(measure(np.arange(len(named_NL))), draws)


def tag_hits(probabilities_L: np.ndarray, named_L: np.ndarray, among: int) -> float:
    """The share of the tags that a caption names that are `among` the clip's most probable ones.

    A caption must name one at least.
    """
    top_K = np.argsort(-probabilities_L, kind="stable")[:among]
    return float(named_L[top_K].sum() / named_L.sum())


def named_tags(caption: str, tags: Sequence[str]) -> np.ndarray:
    """Which tags [L] (bool) a caption names: as whole words, in the singular or plural.

    Case, hyphens and underscores make no difference. 'no vocals' names the tag 'no vocals' and not
    'vocals'.
    """
    words = _words(caption)

    def is_named(tag: str) -> bool:
        wanted = _words(tag)
        return bool(wanted) and any(
            words[i : i + len(wanted)] == wanted and words[max(i - 1, 0) : i] != ["no"]
            for i in range(len(words))
        )

    return np.array([is_named(tag) for tag in tags])


def _words(text: str) -> list[str]:
    return [_singular(word) for word in re.findall(r"[^\W_]+", text.casefold())]


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _mean_auc(values_NL: np.ndarray, named_NL: np.ndarray) -> float:
    areas = []
    for values_N, named_N in zip(values_NL.T, named_NL.T):
        if named_N.any() and not named_N.all():
            pairs = values_N[named_N][:, None] - values_N[~named_N][None]
            areas.append(((pairs > 0) + (pairs == 0) / 2).mean())
    return float(np.mean(areas)) if areas else float("nan")


def _draws(
    measure: Callable[[np.ndarray], float], count: int, resamples: int, seed: int
) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.array([measure(random.integers(0, count, count)) for _ in range(resamples)])


def _interval(value: float, draws: np.ndarray) -> Score:
    if not np.isfinite(draws).any():  # none were asked for, or none could be measured
        return Score(value, None, None)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Score(value, float(low), float(high))
