"""Clips seen beside the real ones of their names."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.evaluate.clips import Row
from magnet_jax.edit.picture import draw_spectrogram
from magnet_jax.evaluation import scores
from magnet_jax.evaluation.scores import Listening
from magnet_jax.io.files import replacing_file

COUNT = 3
_RATE = 16_000


def draw(path: Path, row: Row, reference: Mapping[str, Path], listening: Listening) -> None:
    """Draws spectrograms of the first clips, and of the real clip that each pairs with beside it.

    Args:
      path: PNG, PDF or SVG by its name.
      row: clips, their captions and real clips.
      reference: the real clips.
      listening: how every clip is heard.
    """
    from matplotlib.figure import Figure  # takes a second, and needs no display

    names = list(row.files)[:COUNT]
    figure = Figure(figsize=(14, 3 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, sharex="row", sharey=True, squeeze=False)
    for name, (left, right) in zip(names, axes):
        made_N = scores.read_mono(row.files[name], _RATE, listening)
        draw_spectrogram(left, made_N, _RATE)
        _name(left, row.captions.get(name, name))
        if name in row.pairs:
            real_N = scores.read_mono(reference[row.pairs[name]], _RATE, listening)
            draw_spectrogram(right, real_N, _RATE)
            _name(right, f"real: {row.pairs[name]}")
        else:
            right.set_axis_off()
        left.set(xlim=(0, len(made_N) / _RATE), ylim=(0, _RATE / 4))
    for axis in axes[-1]:
        axis.set(xlabel="seconds")
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=80, format=path.suffix[1:].lower())


def _name(axis: Any, text: str) -> None:
    axis.set_title(textwrap.shorten(text, 70, placeholder=" ..."), parse_math=False)
