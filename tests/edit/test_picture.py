"""The picture of an edit shows what changed, in every kind of file."""

import matplotlib.image
import numpy as np
import pytest

from magnet_jax.edit import picture
from magnet_jax.errors import UserError

RATE = 16_000


def noise(seconds, channels=1):
    return np.random.default_rng(0).normal(size=(channels, int(seconds * RATE))).astype("f4") / 8


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"edit.{suffix}"
    after_CN = np.concatenate([noise(1, 2), noise(0.5, 2)], axis=1)
    confidence_KT = np.log(np.random.default_rng(0).uniform(0.01, 1, (4, 75)))
    changed = [(4000, 6000), (RATE, len(after_CN[0]))]
    picture.draw(path, noise(1, 2), after_CN, RATE, changed, confidence_KT, 50.0)
    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(begin) and list(tmp_path.iterdir()) == [path]


def test_what_changed_is_hatched_in_red(tmp_path):
    def red(changed):
        picture.draw(tmp_path / "a.png", noise(1), noise(1), RATE, changed)
        image = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
        return (image[..., 0] > image[..., 1:].max(-1) + 0.4).any(0)

    left = red([(1000, 4000)])
    assert left.any() and not left[len(left) // 2 :].any()
    assert red([(12_000, 16_000)])[len(left) // 2 :].any() and not red([]).any()


def test_clips_of_a_few_samples_and_other_names(tmp_path):
    picture.draw(tmp_path / "a.png", np.zeros((1, 9)), np.zeros((1, 9)), RATE, [(2, 3)])
    with pytest.raises(UserError, match="must end in .png or .pdf or .svg"):
        picture.draw(tmp_path / "a.jpg", noise(1), noise(1), RATE, [])
