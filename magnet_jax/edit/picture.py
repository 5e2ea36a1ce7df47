"""A picture of an edit: before, after, what changed, and how sure the model is of each token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from magnet_jax.io.files import PICTURES, check_new_file, replacing_file

_WINDOW = 0.032  # seconds of a spectrum


def draw(
    path: Path,
    before_CN: np.ndarray,
    after_CN: np.ndarray,
    sample_rate: int,
    changed: Sequence[tuple[int, int]],
    confidence_KT: np.ndarray | None = None,
    frame_rate: float | None = None,
) -> None:
    """Draws spectrograms and waveforms of a clip before and after, what changed hatched.

    Args:
      path: PNG, PDF or SVG by its name.
      before_CN: float audio; its channels are averaged.
      after_CN: likewise, perhaps longer.
      sample_rate: of both.
      changed: samples [first, end) that changed.
      confidence_KT: log-probability of each token in nats, to be drawn below.
      frame_rate: token frames per second, which confidence needs.

    Raises:
      UserError: another kind of file, or one that cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second, and needs no display

    check_new_file("--picture", path, PICTURES)
    rows = [("before", before_CN), ("after", after_CN)]
    heights = [2, 1, 2, 1] + [1] * (confidence_KT is not None)
    figure = Figure(figsize=(12, 1.6 * sum(heights) ** 0.9), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    seconds = max(wav_CN.shape[1] for _, wav_CN in rows) / sample_rate
    for (name, wav_CN), sound, wave in zip(rows, axes[0::2], axes[1::2]):
        draw_spectrogram(sound, wav_CN.mean(0), sample_rate)
        sound.set(title=name)
        _draw_wave(wave, wav_CN.mean(0), sample_rate)
        for first, end in changed:
            for axis in (sound, wave):
                axis.axvspan(
                    first / sample_rate, end / sample_rate,
                    fill=False, hatch="//", ec="red", lw=1, alpha=0.6,
                )  # fmt: skip
    if confidence_KT is not None:
        count = confidence_KT.shape[1] / frame_rate
        image = axes[-1].imshow(
            confidence_KT, aspect="auto", cmap="viridis", interpolation="nearest",
            extent=(0, count, len(confidence_KT) + 0.5, 0.5),
        )  # fmt: skip
        axes[-1].set(ylabel="codebook", yticks=range(1, len(confidence_KT) + 1))
        figure.colorbar(image, ax=axes[-1], label="nats")
    axes[-1].set(xlabel="seconds", xlim=(0, seconds))
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix[1:].lower())


def draw_spectrogram(axis, wav_N: np.ndarray, sample_rate: int) -> None:
    """A clip's spectrogram, in colours that mean the same of any clip."""
    size = 2 ** max(4, round(np.log2(_WINDOW * sample_rate)))
    wav_N = np.pad(wav_N, (0, max(0, size - len(wav_N))))
    axis.specgram(
        wav_N + 1e-7, NFFT=size, Fs=sample_rate, noverlap=size * 3 // 4, vmin=-140, vmax=-30
    )
    axis.set(ylabel="Hz")


def _draw_wave(axis, wav_N: np.ndarray, sample_rate: int) -> None:
    """The lowest and highest of every few samples, which is as much as a picture shows."""
    width = max(1, len(wav_N) // 2000)
    parts_PW = wav_N[: len(wav_N) // width * width].reshape(-1, width)
    time = np.arange(len(parts_PW)) * width / sample_rate
    axis.fill_between(time, parts_PW.min(1), parts_PW.max(1), lw=0.5)
    axis.set(ylim=(-1, 1))
