"""How long a loop is: bars at a tempo, to the sample."""

from fractions import Fraction
from typing import NamedTuple

from magnet_jax.errors import UserError

BARS = (8, 4, 2, 1)  # of which the most that the model hears at once are taken by default


class Bars(NamedTuple):
    """The length of a loop.

    It need not be one of bars: then there is neither a tempo nor a number of them.
    """

    seconds: Fraction
    bpm: float | None = None  # quarters a minute
    bars: int | None = None
    beats_per_bar: int = 4

    @property
    def beats(self) -> int | None:
        return self.bars and self.bars * self.beats_per_bar

    def samples(self, sample_rate: int) -> int:
        return round(self.seconds * sample_rate)

    def frames(self, frame_rate: float) -> int:
        return round(self.seconds * _exact(frame_rate))

    def starts(self, sample_rate: int) -> list[int]:
        """The sample with which each bar begins."""
        if self.bars is None:
            return [0]
        return [round(self.seconds * sample_rate * bar / self.bars) for bar in range(self.bars)]

    @property
    def words(self) -> str:
        """For people."""
        if self.bars is None:
            return f"{float(self.seconds):g} s"
        plural = "s" * (self.bars > 1)
        return f"{self.bars} bar{plural} of {self.beats_per_bar}/4 at {self.bpm:g} bpm"


def _exact(number: float) -> Fraction:
    """What a number says that people wrote: 0.6 is three fifths."""
    return Fraction(str(number))


def of(
    bpm: float | None,
    bars: int | None,
    seconds: float | None,
    *,
    beats_per_bar: int = 4,
    most: float,
) -> Bars:
    """The length that is asked for.

    Args:
      bpm: quarters a minute.
      bars: how many; None is as many of 8, 4, 2 or 1 as fit.
      seconds: in place of both; None of all three is `most`.
      beats_per_bar: quarters a bar.
      most: seconds that a model hears at once.

    Raises:
      UserError: what does not go together, or is longer than that.
    """
    if bpm is None:
        if bars is not None:
            raise UserError("bars have a length at a tempo alone: give bpm as well")
        length = Bars(_exact(most if seconds is None else seconds))
    else:
        if seconds is not None:
            raise UserError("give bpm and bars, or seconds, and not both")
        bar = 60 * beats_per_bar / _exact(bpm)
        if bars is None:
            bars = next((count for count in BARS if count * bar <= _exact(most)), 1)
        length = Bars(bars * bar, bpm, bars, beats_per_bar)
    if length.seconds > _exact(most):
        long = f", {float(length.seconds):.4g} s," if length.bars else ""
        less = "bars, or a faster tempo" if length.bars else "seconds"
        raise UserError(
            f"a loop of {length.words}{long} is longer than the {most:g} s that the model hears at "
            f"once: ask for fewer {less}"
        )
    return length
