"""Edited files, read as whole numbers: equal but for what is said to have changed; no seams."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import soundfile
import soxr

from magnet_jax.codec import decoding, encodec
from magnet_jax.config import ASSETS
from magnet_jax.edit import paste, regions, splice
from magnet_jax.io import audio, exact

SECONDS, FADE = 4, 0.03
# beginning, end, somewhere, two that are 3 frames apart, one of one frame, and all of it
REGIONS = {
    "begin": [(0.0, 0.8)],
    "end": [(3.2, None)],
    "two": [(1.2, 1.7), (1.76, 2.3)],
    "short": [(2.0, 2.02)],
    "odd": [(0.533, 1.207), (2.5, 3.0)],
    "all": [(0.0, 4.0)],
}


class Clip(NamedTuple):
    wav_N: np.ndarray
    codes_KT: np.ndarray
    decoded_CN: np.ndarray


@pytest.fixture(scope="module")
def decoder():
    return encodec.load_decoder(str(ASSETS / "demo" / "codec"))


@pytest.fixture(scope="module")
def clips(decoder):
    """Real music, its tokens, and what they sound like."""
    codec, found = encodec.load_codec(str(ASSETS / "demo" / "codec")), []
    for path in sorted((ASSETS / "clips").glob("*.flac"))[:8]:
        wav_N, rate = soundfile.read(path, dtype="float32", frames=SECONDS * 32_000)
        wav_N = soxr.resample(wav_N, rate, decoder.spec.sample_rate)
        codes_KT = codec.encode(wav_N[None, None])[0].astype(np.int32)
        decoded_CN = decoding.decode_audio(decoder, codes_KT[None])[0]
        found.append(Clip(wav_N, codes_KT, decoded_CN))
    return found


def frames(decoder, asked, edge, least=1):
    return [
        regions.frames_of(
            region,
            seconds=SECONDS,
            frame_rate=decoder.spec.frame_rate,
            num_frames=round(SECONDS * decoder.spec.frame_rate),
            edge=edge,
            reach=splice.reach_of(decoder.config),
            least=least,
        )
        for region in regions.joined(asked, SECONDS)
    ]


def pieces_of(decoder, clip, other, parts):
    """The clip with another clip's tokens in some frames."""
    edited_KT = clip.codes_KT.copy()
    for start, end in parts:
        edited_KT[:, start:end] = other.codes_KT[:, start:end]
    return splice.spliced(decoder, clip.codes_KT, edited_KT, parts)


def raw(path):
    with soundfile.SoundFile(path) as file:
        dtype = {"FLOAT": "float32", "DOUBLE": "float64"}.get(file.subtype, "int32")
        return file.read(dtype=dtype, always_2d=True)


def assert_exact(path, edited, changed, asked, rate, before, after):
    """Equal outside `changed`, other in the regions, and `changed` no larger than it may be."""
    old_NC, new_NC = raw(path), raw(edited)
    assert old_NC.shape == new_NC.shape and old_NC.dtype == new_NC.dtype
    differ_N, is_changed_N, may_N = (old_NC != new_NC).any(1), *np.zeros((2, len(old_NC)), bool)
    for first, end in changed:
        is_changed_N[first:end] = True
    for first, end in asked:
        end = SECONDS if end is None else end
        may_N[max(0, round((first - before) * rate)) : round((end + after) * rate)] = True
    assert not differ_N[~is_changed_N].any()
    assert not (is_changed_N & ~may_N).any()
    assert changed == sorted(changed)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(changed))
    assert differ_N[is_changed_N].mean() > 0.5  # (music has rests, and 8 bits few numbers)
    return is_changed_N


def jumps(before, after, changed):
    """Of each border, how sharp the bend nearby is, beside the sharpest in a thousand before."""
    bends_NC, own_NC = (np.abs(np.diff(s.as_float(), 2, axis=0)) for s in (after, before))
    near, usual = round(0.01 * before.sample_rate), np.quantile(own_NC, 0.999)
    places = [n for part in changed for n in part if 0 < n < len(bends_NC)]
    return [bends_NC[max(0, n - near) : n + near].max() / usual for n in places]


def clicks(before, after, changed):
    """Of each border, how far the sound there is from what goes before, beside 0.1 s around."""
    rate, wav_N = before.sample_rate, after.as_float()[:, 0]
    found = []
    for place in (n for part in changed for n in part if 0 < n < len(wav_N)):
        first = max(0, place - rate // 10)
        x, at, near = wav_N[first : place + rate // 10], place - first, rate // 500
        lags = np.array([x[: len(x) - k] @ x[k:] for k in range(25)])
        weights = scipy.linalg.solve_toeplitz(
            lags[:-1] + np.r_[1e-5 * lags[0] + 1e-9, [0] * 23], lags[1:]
        )
        error_N = np.abs(scipy.signal.lfilter(np.r_[1, -weights], [1.0], x))
        usual = np.r_[error_N[25 : at - near], error_N[at + near + 25 :]]
        found.append(error_N[max(25, at - near) : at + near].max() / np.quantile(usual, 0.999))
    return found


# --- clips that were made here --------------------------------------------------------------------


def made_of(clip, subtype="PCM_16"):
    """The file, in memory, of what the tokens sound like."""
    return exact.Source("a.wav", exact.as_written(clip.decoded_CN.T, subtype), 16_000, subtype)


@pytest.mark.parametrize("edge", ["outside", "inside"])
@pytest.mark.parametrize("kind", REGIONS)
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_a_clip_made_here(tmp_path, decoder, clips, subtype, kind, edge):
    if edge == "inside" and kind in ("short", "two"):
        return  # (too short: see below)
    path, rate, asked = tmp_path / "a.wav", decoder.spec.sample_rate, REGIONS[kind]
    audio.write(path, clips[0].decoded_CN, rate, format="WAV", subtype=subtype)
    source = exact.read(path)
    parts = frames(decoder, asked, edge)
    pieces = pieces_of(decoder, clips[0], clips[1], parts)
    samples_NC, changed = paste.own(source, clips[0].decoded_CN, pieces)
    exact.write(tmp_path / "b.wav", source, samples_NC)
    around = (0, 0) if edge == "inside" else (5 / 50 + 0.02, 7 / 50 + 0.02)
    assert_exact(path, tmp_path / "b.wav", changed, asked, rate, *around)


def test_what_stays_is_what_the_tokens_are_written_as(decoder, clips):
    """A clip's samples are those that a second decoding and writing give, to the last bit."""
    for subtype in ("PCM_16", "PCM_24", "FLOAT"):
        wav_CN, source = clips[2].decoded_CN, made_of(clips[2], subtype)
        assert paste.gain_of(source, wav_CN) == 1
        np.testing.assert_array_equal(
            paste.rendered(wav_CN, np.float32(1), source), source.samples_NC
        )


@pytest.mark.parametrize("lufs", [-30, -14, -8])
def test_a_clip_of_another_loudness(tmp_path, decoder, clips, lufs):
    """As `launch.sample` writes it: multiplied, and its peaks bent."""
    rate = decoder.spec.sample_rate
    wav_CN, _ = audio.normalize_loudness(clips[0].decoded_CN, rate, lufs)
    audio.write_wav(tmp_path / "a.wav", wav_CN, rate)
    source = exact.read(tmp_path / "a.wav")
    gain = paste.gain_of(source, clips[0].decoded_CN)
    again_NC = paste.rendered(clips[0].decoded_CN, gain, source)
    error_NC = np.abs(again_NC.astype(np.int64) - source.samples_NC)
    assert error_NC.max() <= 2**16 and (error_NC > 0).mean() < 0.01  # (a step here and there)
    pieces = pieces_of(decoder, clips[0], clips[1], [(60, 90)])
    samples_NC, changed = paste.own(source, clips[0].decoded_CN, pieces)
    assert max(jumps(source, source._replace(samples_NC=samples_NC), changed)) <= 1.5


@pytest.mark.parametrize("guard", [0, splice.GUARD])
def test_where_the_original_goes_on_there_is_no_bend(decoder, clips, guard):
    """None sharper than both clips have there themselves, unlike where one is cut to the other."""
    hop, around = decoder.config.hop, splice.reach_of(decoder.config).after
    at = (100 + guard) * hop
    near = slice(at - around * hop, at + around * hop)

    def bend(wav_CN):
        return np.abs(np.diff(wav_CN[0, near], 2)).max()

    found, cut = [], []
    for clip, other in itertools.pairwise(clips):
        edited_KT = clip.codes_KT.copy()
        edited_KT[:, 50:100] = other.codes_KT[:, 50:100]
        pieces = splice.spliced(decoder, clip.codes_KT, edited_KT, [(50, 100)], guard)
        whole_CN = decoding.decode_audio(decoder, edited_KT[None])[0]
        usual = max(bend(clip.decoded_CN), bend(whole_CN))
        found.append(bend(splice.put(clip.decoded_CN, pieces)) / usual)
        cut.append(bend(np.c_[whole_CN[:, :at], clip.decoded_CN[:, at:]]) / usual)
    assert max(found) <= 1.05
    assert guard or max(cut) > 1.5


def test_a_clip_that_is_not_the_tokens_sound_is_refused(clips):
    source = made_of(clips[1])
    for wav_CN in (
        clips[0].decoded_CN,
        clips[1].decoded_CN[:, :-1],
        np.tile(clips[1].decoded_CN, (2, 1)),
    ):
        with pytest.raises(ValueError, match="not the sound of the tokens"):
            paste.gain_of(source, wav_CN)


def test_stereo_of_two_sides(tmp_path, clips):
    decoder = encodec.load_decoder(str(ASSETS / "demo" / "codec"), 8, interleaved=True)
    rows = [np.stack([clips[i].codes_KT, clips[i + 1].codes_KT]) for i in (0, 2)]
    original_KT, other_KT = (encodec.join_sides(row, 2)[0] for row in rows)
    decoded_CN = decoding.decode_audio(decoder, original_KT[None])[0]
    audio.write_wav(tmp_path / "a.wav", decoded_CN, 16_000)
    clip = Clip(None, original_KT, decoded_CN)
    pieces = pieces_of(decoder, clip, Clip(None, other_KT, None), [(50, 80)])
    source = exact.read(tmp_path / "a.wav")
    samples_NC, changed = paste.own(source, decoded_CN, pieces)
    exact.write(tmp_path / "b.wav", source, samples_NC)
    assert_exact(tmp_path / "a.wav", tmp_path / "b.wav", changed, [(1.0, 1.6)], 16_000, 0.1, 0.14)
    assert max(jumps(source, source._replace(samples_NC=samples_NC), changed)) <= 1.5


# --- uploads --------------------------------------------------------------------------------------


def upload(path, clip, rate=16_000, channels=1, subtype="PCM_16"):
    """The music at another rate; its sides differ."""
    wav_N = soxr.resample(clip.wav_N, 16_000, rate)[: SECONDS * rate]
    side_N = 0.2 * np.roll(wav_N, 37)
    wav_NC = np.stack([wav_N + side_N, wav_N - side_N][:channels], axis=1)
    soundfile.write(path, wav_NC.clip(-1, 1), rate, subtype)
    return exact.read(path)


@pytest.mark.parametrize("edge", ["outside", "inside"])
@pytest.mark.parametrize(
    ("subtype", "rate", "channels", "kind"),
    [
        ("PCM_16", 16_000, 1, "begin"),
        ("PCM_16", 44_100, 2, "two"),
        ("PCM_16", 8_000, 1, "odd"),
        ("PCM_U8", 22_050, 1, "odd"),
        ("PCM_24", 48_000, 2, "end"),
        ("PCM_32", 96_000, 1, "odd"),
        ("FLOAT", 48_000, 2, "short"),
        ("DOUBLE", 11_025, 1, "end"),
        ("PCM_24", 32_001, 2, "odd"),
        ("PCM_16", 44_100, 2, "all"),
    ],
)
def test_an_upload(tmp_path, decoder, clips, subtype, rate, channels, kind, edge):
    if edge == "inside" and kind in ("short", "two"):
        return
    source = upload(tmp_path / "a.wav", clips[0], rate, channels, subtype)
    asked = REGIONS[kind]
    pieces = pieces_of(decoder, clips[0], clips[1], frames(decoder, asked, edge))
    samples_NC, changed = paste.pasted(
        source, clips[0].decoded_CN, pieces, asked, codec_rate=16_000, edge=edge, fade=FADE
    )
    exact.write(tmp_path / "b.wav", source, samples_NC)
    around = FADE + 1 / rate if edge == "outside" else 0
    is_changed_N = assert_exact(
        tmp_path / "a.wav", tmp_path / "b.wav", changed, asked, rate, around, around
    )
    for first, end in asked:
        assert is_changed_N[round(first * rate) : end and round(end * rate)].all()
    assert max(jumps(source, source._replace(samples_NC=samples_NC), changed), default=0) <= 3


def test_any_upload_is_exact():
    """Silence, a few samples, fades longer than the clip, any rates and channels."""
    rng = np.random.default_rng(0)
    rates = (8_000, 16_000, 22_050, 32_001, 96_000)
    for _ in range(200):
        rate, channels, sides = int(rng.choice(rates)), *rng.integers(1, 3, 2)
        count, subtype = int(rng.choice([50, 3000, 9000])), str(rng.choice([*exact.BITS, "FLOAT"]))
        wav_NC = rng.normal(size=(count, channels)) * rng.choice([0, 1e-4, 0.1, 0.9])
        source = exact.Source("a.wav", exact.as_written(wav_NC.clip(-1, 1), subtype), rate, subtype)
        frames = -(-count * 50 // rate)
        decoded_CN = rng.normal(size=(sides, frames * 320)) * rng.choice([0, 0.1])
        start = int(rng.integers(frames))
        end = int(rng.integers(start + 1, frames + 1))
        first, last = max(0, start - 5) * 320, min(frames, end + 7) * 320
        piece = splice.Piece(first, rng.normal(size=(sides, last - first)) / 10)
        edge, side = str(rng.choice(["outside", "inside"])), str(rng.choice(["fade", "keep"]))
        samples_NC, changed = paste.pasted(
            source, decoded_CN, [piece], [(start / 50, end / 50)], codec_rate=16_000,
            edge=edge, side=side, fade=float(rng.choice([0, 0.03, 0.5])),
        )  # fmt: skip
        same_N = np.ones(count, bool)
        for part in changed:
            same_N[slice(*part)] = False
        np.testing.assert_array_equal(samples_NC[same_N], source.samples_NC[same_N])
        assert samples_NC.dtype == source.samples_NC.dtype and np.isfinite(samples_NC).all()


def test_the_edit_is_heard_within_and_where_it_belongs(decoder, clips):
    """At another rate too, the region is the edited decoding, to a sample."""
    source = upload_of(clips[0], 48_000)
    pieces = pieces_of(decoder, clips[0], clips[1], [(100, 150)])
    samples_NC, _ = paste.pasted(
        source, clips[0].decoded_CN, pieces, [(2.0, 3.0)], codec_rate=16_000
    )
    expected_N = soxr.resample(splice.put(clips[0].decoded_CN, pieces)[0], 16_000, 48_000)
    inside = slice(2 * 48_000, 3 * 48_000)
    x, y = samples_NC[inside, 0].astype(np.float64), expected_N[inside].astype(np.float64)
    match = [x[50 : len(x) - 50] @ y[50 + n : len(y) - 50 + n] for n in range(-50, 51)]
    assert np.argmax(match) == 50
    assert x @ y / np.sqrt((x @ x) * (y @ y)) > 0.999


def upload_of(clip, rate, channels=1, subtype="FLOAT"):
    wav_N = soxr.resample(clip.wav_N, 16_000, rate)[: SECONDS * rate]
    return exact.Source("a.wav", np.stack([wav_N] * channels, 1).astype(np.float32), rate, subtype)


@pytest.mark.parametrize("edge", ["outside", "inside"])
def test_no_seams(decoder, clips, edge):
    """Clips made here stay below 1.5, uploads below 3; hard cuts do not."""
    own, uploaded, cut, turned = [], [], [], []
    for clip, other in itertools.pairwise(clips):
        region = (1.5, 2.5)
        pieces = pieces_of(decoder, clip, other, frames(decoder, [region], edge))
        made = made_of(clip)
        edited = paste.own(made, clip.decoded_CN, pieces)
        own.append((made, edited.samples_NC, edited.changed))
        source = upload_of(clip, 16_000)
        edited = paste.pasted(
            source, clip.decoded_CN, pieces, [region], codec_rate=16_000, edge=edge
        )
        uploaded.append((source, edited.samples_NC, edited.changed))
        hard_NC, new_NC = source.samples_NC.copy(), splice.put(clip.decoded_CN, pieces).T
        hard_NC[24_000:40_000] = new_NC[24_000:40_000]
        cut.append((source, hard_NC, [(24_000, 40_000)]))
        # Where both differ most, the edit upside down.
        first = 24_000 + int(np.abs(source.samples_NC + new_NC)[24_000:40_000].argmax())
        hard_NC = np.r_[source.samples_NC[:first], -new_NC[first:]]
        turned.append((source, hard_NC, [(first, first)]))

    def measured(measure, edits):
        return [m for old, new, at in edits for m in measure(old, old._replace(samples_NC=new), at)]

    assert max(measured(jumps, own)) <= 1.5 and max(measured(jumps, uploaded)) <= 3
    assert max(measured(jumps, turned)) > 3 and np.median(measured(jumps, turned)) > 1.5
    assert max(measured(clicks, own)) <= 1.5 and max(measured(clicks, uploaded)) <= 1.5
    assert max(measured(clicks, cut)) > 1.5 and np.median(measured(clicks, turned)) > 3


@pytest.mark.parametrize("side", ["fade", "keep"])
def test_the_sides_of_a_stereo_upload(tmp_path, decoder, clips, side):
    source = upload(tmp_path / "a.wav", clips[0], 32_000, 2)
    pieces = pieces_of(decoder, clips[0], clips[1], [(50, 100)])
    samples_NC, _ = paste.pasted(
        source, clips[0].decoded_CN, pieces, [(1.0, 2.0)], codec_rate=16_000, side=side
    )
    inside = slice(32_000, 64_000)
    old_N, new_N = (
        np.diff(x[inside].astype(np.int64), axis=1) for x in (source.samples_NC, samples_NC)
    )
    expected_N = old_N if side == "keep" else np.zeros_like(old_N)
    assert np.abs(new_N - expected_N).max() <= 2**16
    assert np.abs(old_N).max() > 2**24


def test_the_level_beside_an_edit_is_kept_within_limits(decoder, clips):
    source = upload_of(clips[0], 16_000)
    for decibels, expected in ((-1, 1), (6, -1.5)):
        factor = 10 ** (decibels / 20)
        quiet = Clip(None, clips[0].codes_KT, clips[0].decoded_CN * np.float32(factor))
        pieces = pieces_of(decoder, clips[0], clips[1], [(50, 100)])
        pieces = [splice.Piece(p.first_sample, p.wav_CN * np.float32(factor)) for p in pieces]
        plain, changed = (
            paste.pasted(source, clip, parts, [(1.0, 2.0)], codec_rate=16_000)
            for clip, parts in (
                (clips[0].decoded_CN, pieces_of(decoder, clips[0], clips[1], [(50, 100)])),
                (quiet.decoded_CN, pieces),
            )
        )
        levels = [np.sqrt(np.square(p.samples_NC[16_000:32_000]).mean()) for p in (plain, changed)]
        found = 20 * np.log10(levels[1] / levels[0]) - decibels
        assert -3.01 <= found <= 3.01 and np.sign(found) == np.sign(expected)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_a_cross_fade_keeps_the_level(correlation):
    rng, length = np.random.default_rng(0), 200_000
    x_N = rng.normal(size=length)
    y_N = correlation * x_N + np.sqrt(1 - correlation**2) * rng.normal(size=length)
    place = paste._Place(0, length, length // 2, length // 2)
    old_N1, new_N1 = paste._weights(x_N[:, None], y_N[:, None], place)
    mixed_N = old_N1[:, 0] * x_N + new_N1[:, 0] * y_N
    levels = np.square(mixed_N).reshape(20, -1).mean(1)
    np.testing.assert_allclose(levels, 1, atol=0.06)
    assert (
        old_N1[0] > 0.99 and new_N1[0] < 0.01 and old_N1[-1] > 0.99 and old_N1[length // 2] < 0.01
    )


@pytest.mark.parametrize(("milliseconds", "found"), [(0, 0), (1, 1), (-2, -2), (3, 0)])
def test_an_edit_that_lags_is_shifted_by_no_more_than_two_milliseconds(milliseconds, found):
    rng, rate = np.random.default_rng(0), 16_000
    spare = 2 * round(paste.MOST_SHIFT * rate)
    edit_NC = rng.normal(size=(4000, 1))
    delay = milliseconds * rate // 1000
    wav_NC = np.roll(edit_NC, -delay, axis=0)[spare + 500 : spare + 2000]
    assert paste._shift(wav_NC, edit_NC, slice(500, 2000), spare) == found * rate // 1000


# --- longer clips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["outside", "inside"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("way", ["after", "before"])
def test_an_upload_is_drawn_out(decoder, clips, way, rate, edge):
    source, more = upload_of(clips[0], rate, 2), 50
    new_KT = clips[1].codes_KT[:, :more]
    parts = [clips[0].codes_KT, new_KT]
    longer_KT = np.concatenate(parts if way == "after" else parts[::-1], axis=1)
    count = clips[0].codes_KT.shape[1]
    part = (count, count + more) if way == "after" else (0, more)
    region = (part[0] / 50, part[1] / 50)
    before = 0 if way == "after" else rate
    pieces = splice.spliced(decoder, clips[0].codes_KT, longer_KT, [part])
    edited = paste.pasted(
        source, clips[0].decoded_CN, pieces, [region], codec_rate=16_000, edge=edge,
        before=before, total=len(source.samples_NC) + rate,
    )  # fmt: skip
    fade = round(FADE * rate) if edge == "outside" else 0
    kept = slice(
        before + fade * (way == "before"), len(source.samples_NC) + before - fade * (way == "after")
    )
    own = slice(kept.start - before, kept.stop - before)
    np.testing.assert_array_equal(edited.samples_NC[kept], source.samples_NC[own])
    [(first, end)] = edited.changed
    assert (first, end) in ((kept.stop, len(edited.samples_NC)), (0, kept.start))
    new_NC = edited.samples_NC[first:end]
    assert np.square(new_NC).mean() > 1e-5
    assert max(jumps(source, source._replace(samples_NC=edited.samples_NC), edited.changed)) <= 3


def test_a_clip_made_here_is_drawn_out(decoder, clips):
    """Behind its old end it is what all the tokens sound like."""
    longer_KT = np.concatenate([clips[0].codes_KT, clips[1].codes_KT[:, :50]], axis=1)
    longer_CN = decoding.decode_audio(decoder, longer_KT[None])[0]
    source = made_of(clips[0])
    pieces = splice.spliced(decoder, clips[0].codes_KT, longer_KT, [(200, 250)])
    samples_NC, changed = paste.own(source, clips[0].decoded_CN, pieces, total=250 * 320)
    assert changed == [(195 * 320, 250 * 320)]
    np.testing.assert_array_equal(samples_NC[: 195 * 320], source.samples_NC[: 195 * 320])
    expected_NC = exact.as_written(longer_CN.T, "PCM_16").astype(np.int64)
    assert np.abs(samples_NC - expected_NC).max() <= 2**16


def test_a_sound_goes_on_as_it_was():
    time = np.arange(3000) / 16_000
    wav_NC = np.stack([np.sin(2 * np.pi * 440 * time), 0.2 * np.cos(2 * np.pi * 1234 * time)], 1)
    found_NC = paste._predicted(wav_NC[:2500], 300)
    np.testing.assert_allclose(found_NC, wav_NC[2500:2800], atol=0.12)
