"""A small classifier on an embedder's rows: is the instrument that a caption names the one heard?

A linear discriminant for each label, with one covariance for all, fitted to real clips whose label
is known: for what a tagger has no tag for.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from magnet_jax.evaluation import metrics

_ALSO_CALLED = {"synthesizer": "synth", "synthesiser": "synth"}  # in captions, and as a label
_SHRINKAGE = 0.1  # of the covariance towards a sphere: there may be fewer rows than dimensions


class Probe(NamedTuple):
    """C labels, each with a direction in the space of the embeddings (E)."""

    labels: tuple[str, ...]
    weights_EC: np.ndarray
    biases_C: np.ndarray


def fit(clips: Mapping[str, np.ndarray], labels: Mapping[str, str]) -> Probe:
    """A probe fitted to embeddings [P, E] and labels by clips' ids; labels are equally likely.

    Raises `ValueError` for fewer than two labels, or no more rows than labels.
    """
    names = tuple(sorted({labels[clip] for clip in clips}))
    rows = {
        name: np.concatenate([clips[clip] for clip in clips if labels[clip] == name])
        for name in names
    }
    count = sum(map(len, rows.values()))
    if len(names) < 2 or count <= len(names):
        raise ValueError(f"{count} rows of {len(names)} labels are too few for a probe")
    means_CE = np.stack([rows[name].mean(0, dtype=np.float64) for name in names])
    within_PE = np.concatenate([rows[name] - mean_E for name, mean_E in zip(names, means_CE)])
    covariance_EE = within_PE.T @ within_PE / (count - len(names))
    width = len(covariance_EE)
    sphere_EE = np.eye(width) * np.trace(covariance_EE) / width
    covariance_EE = (1 - _SHRINKAGE) * covariance_EE + _SHRINKAGE * sphere_EE
    weights_EC = np.linalg.solve(covariance_EE, means_CE.T)
    return Probe(names, weights_EC, -0.5 * np.einsum("CE,EC->C", means_CE, weights_EC))


def hear(probe: Probe, embeddings_PE: np.ndarray) -> str:
    """The likeliest label of a clip, by all its rows."""
    return probe.labels[int((embeddings_PE @ probe.weights_EC + probe.biases_C).mean(0).argmax())]


def named_label(labels: Sequence[str], caption: str) -> str | None:
    """The label that a caption names, the longest of several; None without any."""
    named_C = metrics.named_tags(_usual(caption), [_usual(label) for label in labels])
    named = [label for label, is_named in zip(labels, named_C) if is_named]
    return max(named, key=len, default=None)


def _usual(text: str) -> str:
    for word, label in _ALSO_CALLED.items():
        text = re.sub(rf"(?<![^\W_]){word}(?=s?(?![^\W_]))", label, text, flags=re.IGNORECASE)
    return text
