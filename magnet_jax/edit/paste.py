"""Puts what was decoded of edited tokens into a sound file's own samples.

Of a clip that was made here the tokens are known, and its samples are what they sound like: pieces
of `splice.spliced` fit to the sample. The samples of an upload are the truth, and the codec's copy
of them is not: there the edit is levelled, and faded in and out.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg
import scipy.signal
import soxr

from magnet_jax.edit.regions import Edge
from magnet_jax.edit.splice import Piece, put
from magnet_jax.io.audio import KNEE, soft_limit
from magnet_jax.io.exact import Source, as_written

Side = Literal["fade", "keep"]

FADE = 0.03  # seconds
MOST_GAIN = 10 ** (1.5 / 20)
MOST_SHIFT = 0.002  # seconds
_BESIDE = 0.1  # seconds on either side of what changes by which the edit is levelled
_MARGIN = 0.064  # seconds on either side of what is resampled
_UNLIKE = 0.01  # of a clip's level, how far it may be from what its tokens sound like


class Pasted(NamedTuple):
    """A sound file's samples with an edit in them."""

    samples_NC: np.ndarray  # of the source's dtype
    changed: list[tuple[int, int]]  # samples [first, end), sorted; all others are the source's


# --- clips that were made here --------------------------------------------------------------------


def own(
    source: Source,
    decoded_CN: np.ndarray,
    pieces: Sequence[Piece],
    *,
    before: int = 0,
    total: int | None = None,
) -> Pasted:
    """Pastes pieces over a clip that is the sound of known tokens.

    Args:
      source: the clip, at the codec's rate.
      decoded_CN: what its tokens sound like.
      pieces: of `splice.spliced`.
      before: how many samples of a clip that is drawn out come before the source's first.
      total: how many samples it has then; None is as many as before.

    Raises:
      ValueError: the clip is not the sound of these tokens at any level.
    """
    gain = gain_of(source, decoded_CN)
    samples_NC = _drawn_out(source, before, total)
    changed = []
    for first, wav_CN in pieces:
        new_NC = rendered(wav_CN[:, : max(0, len(samples_NC) - first)], gain, source)
        samples_NC[first : first + len(new_NC)] = new_NC
        changed.append((first, first + len(new_NC)))
    return Pasted(samples_NC, [part for part in changed if part[0] < part[1]])


def rendered(wav_CN: np.ndarray, gain: np.float32, source: Source) -> np.ndarray:
    """Decoded audio as samples [N, C] of a clip whose level was changed by `normalize_loudness`."""
    return as_written((wav_CN if gain == 1 else soft_limit(wav_CN * gain)).T, source.subtype)


def gain_of(source: Source, decoded_CN: np.ndarray) -> np.float32:
    """By how much a clip was made louder than what its tokens sound like.

    Raises `ValueError` where it is not their sound at any level.
    """
    samples_NC = source.as_float()
    count, channels = samples_NC.shape
    message = f"{source.path}: is not the sound of the tokens that are kept of it"
    if len(decoded_CN) != channels or decoded_CN.shape[1] < count:
        raise ValueError(message)
    decoded_CN = decoded_CN[:, :count]
    is_plain_NC = np.abs(samples_NC) < KNEE  # beyond it, peaks are bent
    plain, found = decoded_CN.T[is_plain_NC].astype(np.float64), samples_NC[is_plain_NC]
    # libsndfile drops lower bits, so that a sample is half a step too low.
    gain = np.float32(plain @ (found + source.step / 2) / max(plain @ plain, 1e-20))
    if abs(gain - 1) < 1e-3 and _is_like(source, rendered(decoded_CN, np.float32(1), source)):
        return np.float32(1)
    if not _is_like(source, rendered(decoded_CN, gain, source)):
        raise ValueError(message)
    return gain


def _is_like(source: Source, samples_NC: np.ndarray) -> bool:
    found_NC = source.as_float()
    error_NC = found_NC - source._replace(samples_NC=samples_NC).as_float()
    return _rms(error_NC) <= _UNLIKE * _rms(found_NC) + source.step


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean())) if x.size else 0.0


def _drawn_out(source: Source, before: int, total: int | None) -> np.ndarray:
    """A copy of the samples, with zeros around them."""
    count, channels = source.samples_NC.shape
    total = count if total is None else total
    if before < 0 or before + count > total:
        raise ValueError(f"{before} samples before {count} do not fit into {total}")
    samples_NC = np.zeros((total, channels), source.samples_NC.dtype)
    samples_NC[before : before + count] = source.samples_NC
    return samples_NC


# --- uploads --------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where an edit is heard, in samples of the file."""

    first: int
    end: int
    fade_in: int
    fade_out: int


def pasted(
    source: Source,
    decoded_CN: np.ndarray,
    pieces: Sequence[Piece],
    regions: Sequence[tuple[float, float | None]],
    *,
    codec_rate: int,
    edge: Edge = "outside",
    fade: float = FADE,
    side: Side = "fade",
    before: int = 0,
    total: int | None = None,
) -> Pasted:
    """Pastes an edit over the samples of a file that no tokens made.

    The edit is resampled to the file's rate, brought to the level that the file has beside it, by
    at most 1.5 dB, and cross-faded. Where its tokens did not change, the file stays as it is. Mono
    audio replaces the mean of the file's channels.

    Args:
      source: the file.
      decoded_CN: what its tokens sound like, at the codec's rate.
      pieces: of `splice.spliced`.
      regions: seconds [first, end) of the file that is to be, which are regenerated; None is its
        end.
      codec_rate: samples per second of the codec's audio.
      edge: 'outside' has the cross-fades outside the regions, 'inside' within them.
      fade: seconds of a cross-fade.
      side: what becomes of the differences between channels where the edit is mono: 'fade' takes
        them away within the regions, 'keep' leaves them.
      before, total: as in `own`.

    Raises:
      ValueError: the codec's channels do not fit the file's.
    """
    samples_NC = _drawn_out(source, before, total)
    count, channels = samples_NC.shape
    if channels != len(decoded_CN) and 1 not in (channels, len(decoded_CN)):
        raise ValueError(f"audio of {len(decoded_CN)} channels does not fit a file of {channels}")
    rates = _Rates(source.sample_rate, codec_rate)
    lead = round(before * codec_rate / rates.file)
    ends = [piece.first_sample + piece.wav_CN.shape[1] for piece in pieces]
    length = max(lead + decoded_CN.shape[1], *ends, 0)
    edited_CN = np.zeros((len(decoded_CN), length), np.float32)
    edited_CN[:, lead : lead + decoded_CN.shape[1]] = decoded_CN
    edited_CN = put(edited_CN, pieces)
    old = slice(before, before + len(source.samples_NC))
    wav_NC = _continued(source, old, count, round(fade * rates.file))
    changed = []
    for place in _places(regions, rates.file, count, edge, fade):
        heard = [
            (math.floor(piece.first_sample * rates.ratio), math.ceil(end * rates.ratio))
            for piece, end in zip(pieces, ends)
        ]
        heard = [part for part in heard if part[0] < place.end and place.first < part[1]]
        if not heard:
            continue
        first, end = min(place.first, heard[0][0]), max(place.end, heard[-1][1])
        beside = round(_BESIDE * rates.file)
        around = (
            slice(max(old.start, first - beside), max(old.start, first)),
            slice(min(old.stop, end), min(old.stop, end + beside)),
        )
        new_NC = _mixed(wav_NC, edited_CN, place, around, rates, side)
        samples_NC[place.first : place.end] = as_written(new_NC, source.subtype, nearest=True)
        changed.append((place.first, place.end))
    return Pasted(samples_NC, changed)


class _Rates(NamedTuple):
    """Samples per second."""

    file: int
    codec: int

    @property
    def ratio(self) -> float:
        return self.file / self.codec


def _places(
    regions: Sequence[tuple[float, float | None]], rate: int, count: int, edge: Edge, fade: float
) -> list[_Place]:
    """Where regions are heard; those whose cross-fades would meet are one. No fades at the ends."""
    places: list[_Place] = []
    whole = count / rate
    for region in sorted((first, whole if end is None else end) for first, end in regions):
        first, end = (min(max(round(seconds * rate), 0), count) for seconds in region)
        length = round(fade * rate)
        if edge == "outside":
            fade_in, fade_out = min(length, first), min(length, count - end)
            first, end = first - fade_in, end + fade_out
        else:
            length = min(length, (end - first) // 2)
            fade_in, fade_out = length * (first > 0), length * (end < count)
        if places and first < places[-1].end:
            last = places.pop()
            first, fade_in = last.first, last.fade_in
            end, fade_out = max((end, fade_out), (last.end, last.fade_out))
        if first < end:
            places.append(_Place(first, end, fade_in, fade_out))
    return places


def _continued(source: Source, old: slice, count: int, fade: int) -> np.ndarray:
    """The source's samples as floats, drawn out by a linear prediction to be faded out."""
    wav_NC = np.zeros((count, source.samples_NC.shape[1]))
    wav_NC[old] = source.as_float()
    after, before = min(fade, count - old.stop), min(fade, old.start)
    wav_NC[old.stop : old.stop + after] = _predicted(wav_NC[old], after)
    wav_NC[old.start - before : old.start] = _predicted(wav_NC[old][::-1], before)[::-1]
    return wav_NC


def _predicted(wav_NC: np.ndarray, count: int) -> np.ndarray:
    """How a sound goes on, by the linear prediction of its last samples."""
    recent_NC = wav_NC[-4096:]
    order = min(64, len(recent_NC) // 4)
    if not count or not order:
        return np.zeros((count, wav_NC.shape[1]))
    columns = []
    for x in recent_NC.T:
        correlation = np.array([x[: len(x) - k] @ x[k:] for k in range(order + 1)])
        correlation[0] = correlation[0] * (1 + 1e-6) + 1e-12
        weights = scipy.linalg.solve_toeplitz(correlation[:-1], correlation[1:])
        state = scipy.signal.lfiltic([1.0], np.r_[1.0, -weights], x[::-1][:order])
        columns.append(
            scipy.signal.lfilter([1.0], np.r_[1.0, -weights], np.zeros(count), zi=state)[0]
        )
    return np.stack(columns, axis=1)


def _mixed(
    wav_NC: np.ndarray,
    edited_CN: np.ndarray,
    place: _Place,
    around: tuple[slice, slice],
    rates: _Rates,
    side: Side,
) -> np.ndarray:
    """What is heard at a place: the edit, at its ends cross-faded with the file.

    Args:
      wav_NC: the file.
      edited_CN: the edit, at the codec's rate.
      place: in samples of the file.
      around: samples before and after, where the edit's tokens are those of the file.
      rates: of both.
      side: see `pasted`.
    """
    begin, end = min(around[0].start, place.first), max(around[1].stop, place.end)
    spare = 2 * math.ceil(MOST_SHIFT * rates.file)
    edit_NC = _resampled(edited_CN, begin - spare, end + spare, rates)
    channels = wav_NC.shape[1]
    if edit_NC.shape[1] != channels:
        edit_NC = edit_NC.mean(1, keepdims=True)
    middle_NC = wav_NC if edit_NC.shape[1] == channels else wav_NC.mean(1, keepdims=True)
    beside = [slice(part.start - begin, part.stop - begin) for part in around]
    shift = max(
        (_shift(middle_NC[begin:end][part], edit_NC, part, spare) for part in beside), key=abs
    )
    edit_NC = edit_NC[spare + shift : len(edit_NC) - spare + shift]
    levels = [_level(middle_NC[begin:end][part], edit_NC[part]) for part in beside]
    known = [level for level in levels if level is not None] or [1.0]
    here = slice(place.first, place.end)
    edit_NC = edit_NC[place.first - begin : place.end - begin]
    edit_NC = edit_NC * np.geomspace(known[0], known[-1], len(edit_NC))[:, None]
    old_N1, new_N1 = _weights(middle_NC[here], edit_NC, place)
    mixed_NC = old_N1 * middle_NC[here] + new_N1 * edit_NC
    side_NC = wav_NC[here] - middle_NC[here]
    return mixed_NC + (old_N1 * side_NC if side == "fade" else side_NC)


def _resampled(edited_CN: np.ndarray, first: int, end: int, rates: _Rates) -> np.ndarray:
    """Samples [first, end) of the file's, of audio at the codec's rate; zeros beyond it."""
    # Both rates have a sample at the same time once in so many of the codec's.
    unit = rates.codec // math.gcd(rates.file, rates.codec)
    from_ = max(0, math.floor((first / rates.file - _MARGIN) * rates.codec / unit)) * unit
    until = max(from_, math.ceil((end / rates.file + _MARGIN) * rates.codec))
    wav_NC = edited_CN[:, from_:until].T
    if rates.file != rates.codec:
        wav_NC = soxr.resample(wav_NC, rates.codec, rates.file, quality="VHQ")
    begin = from_ * rates.file // rates.codec
    found_NC = np.zeros((end - first, wav_NC.shape[1]))
    part_NC = wav_NC[max(0, first - begin) : max(0, end - begin)]
    at = max(0, begin - first)
    found_NC[at : at + len(part_NC)] = part_NC
    return found_NC


def _shift(wav_NC: np.ndarray, edit_NC: np.ndarray, part: slice, spare: int) -> int:
    """By how many samples the edit lags behind the file there; 0 if not clearly, or by too many."""
    heard_NC = edit_NC[part.start : part.stop + 2 * spare]
    if len(wav_NC) < 2 * spare:
        return 0
    match = sum(np.correlate(y, x, "valid") for y, x in zip(heard_NC.T, wav_NC.T))
    power = np.cumsum(np.r_[0.0, np.square(heard_NC).sum(1)])
    power = (power[len(wav_NC) :] - power[: -len(wav_NC)]) * np.square(wav_NC).sum()
    match = match / np.sqrt(power + 1e-20)
    best = int(match.argmax())
    is_clear = match[best] > match[spare] + 0.05 and abs(best - spare) <= spare // 2
    return best - spare if is_clear else 0


def _level(wav_NC: np.ndarray, edit_NC: np.ndarray) -> float | None:
    """By how much the edit is too quiet there; None where one of both is silent."""
    there, here = _rms(wav_NC), _rms(edit_NC)
    if min(there, here) < 1e-5:
        return None
    return min(max(there / here, 1 / MOST_GAIN), MOST_GAIN)


def _weights(
    old_NC: np.ndarray, new_NC: np.ndarray, place: _Place
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, 1] of the file and of the edit; the level stays while one fades to the other.

    w and v are such that w^2 + v^2 + 2 c w v = 1, c being the correlation of both there.
    """
    old_N, new_N = np.zeros(len(new_NC)), np.ones(len(new_NC))
    ends = ((slice(0, place.fade_in), 1), (slice(len(new_NC) - place.fade_out, len(new_NC)), -1))
    for part, way in ends:
        length = part.stop - part.start
        if not length:
            continue
        x, y = old_NC[part].ravel(), new_NC[part].ravel()
        correlation = np.clip(x @ y / math.sqrt((x @ x) * (y @ y) + 1e-20), 0, 1)
        time = np.arange(1, length + 1) / (length + 1)
        angle = np.pi / 2 * time**2 * (3 - 2 * time)
        norm = np.sqrt(1 + 2 * correlation * np.cos(angle) * np.sin(angle))
        old_N[part], new_N[part] = (np.cos(angle) / norm)[::way], (np.sin(angle) / norm)[::way]
    return old_N[:, None], new_N[:, None]
