"""Mixes of two tracks: their levels, their captions, and which tracks they are made of."""

import dataclasses
import itertools
import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from sounds import RATE, put, tone
from tokenizing import read_audio

from magnet_jax.data import records
from magnet_jax.errors import UserError
from tokenization import mixing
from tokenization.intake import decoder as decoding
from tokenization.intake import mix as mixer
from tokenization.intake.audio import Intake, RejectedError
from tokenization.job import run
from tokenization.maker import cut
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.source.settings import Source
from tokenization.units import split_of

MONO = Intake(sample_rate=RATE, channels=1)


pytestmark = pytest.mark.usefixtures("inline_decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve sounds of different length and level, of which 4, 8, 9 and 10 fall to validation."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for i in range(12):
        wav = rng.normal(0, 0.002 * 1.5**i, round(RATE * (1 + i / 10))) * (1 + np.sin(i + 1) / 2)
        put(folder / f"{i}.wav", wav.clip(-1, 1), caption=f"Sound {i}.")
    return folder


def read_out(out, split="train"):
    found = [records.decode_example(example) for example in records.open_split(out, split)]
    return [r for r in found if "mixed" in r["info"]], [
        r for r in found if "mixed" not in r["info"]
    ]


class Made(NamedTuple):
    wav_CN: np.ndarray
    begin: int
    end: int


def made_of(track, intake=MONO):
    """A mixed track as a decoder makes it, and between which samples both parts sound."""
    with decoding.Decoder(60) as decoder:
        wav_CN, facts = read_audio(track, intake, decoder)
    return Made(wav_CN, *(round(seconds * RATE) for seconds in facts.both))


def parts_of(track):
    with decoding.Decoder(60) as decoder:
        return [read_audio(part, MONO, decoder)[0][0] for part in track.place.parts]


def fitted(mixed, wavs):
    """The gains that both parts have in a mix, and what is left that is neither."""
    short, long = sorted((0, 1), key=lambda i: len(wavs[i]))
    placed = [wavs[0], wavs[1]]
    placed[short] = np.zeros_like(wavs[long])
    placed[short][mixed.begin : mixed.end] = wavs[short]
    basis = np.stack(placed, axis=1).astype(np.float64)
    gains, *_ = np.linalg.lstsq(basis, mixed.wav_CN[0], rcond=None)
    return gains, np.abs(mixed.wav_CN[0] - basis @ gains).max()


def test_a_mix_is_both_tracks_at_the_drawn_levels(folder):
    tracks = scan(Source(audio=folder)).tracks
    level = {}
    for track in mixing.draw(tracks, ratio=1, seed=5, snr=(-5, 5)):
        wavs, mixed, mix = parts_of(track), made_of(track), track.place
        gains, left = fitted(mixed, wavs)
        assert left < 1e-5 and min(gains) > 0
        levels = [20 * np.log10(g * wav.std()) for g, wav in zip(gains, wavs)]
        assert levels[0] - levels[1] == pytest.approx(mix.snr, abs=0.01)
        assert np.abs(mixed.wav_CN).max() < 0.9901
        assert mixed.wav_CN.shape == (1, max(map(len, wavs)))
        assert mixed.end - mixed.begin == min(map(len, wavs))
        level[track.track_id] = max(levels) - mix.level
    assert max(map(abs, level.values())) < 0.01  # nothing was near full scale


def test_peaks_turn_the_whole_mix_down(tmp_path):
    for i, at in enumerate((1000, 9000)):
        wav = tone(1.2, frequency=300 + i) * 0.01
        wav[at] = 0.9  # at the drawn level far beyond full scale
        put(tmp_path / f"{i}.wav", wav, subtype="FLOAT")
    (track,) = mixing.draw(scan(Source(audio=tmp_path)).tracks, ratio=0.5, seed=1, snr=(3, 3))
    track = dataclasses.replace(track, place=dataclasses.replace(track.place, level=-15.0))
    wavs, mixed = parts_of(track), made_of(track)
    gains, left = fitted(mixed, wavs)
    assert np.abs(mixed.wav_CN).max() == pytest.approx(mixer.PEAK, abs=1e-4) and left < 1e-5
    snr = 20 * np.log10(gains[0] * wavs[0].std() / (gains[1] * wavs[1].std()))
    assert snr == pytest.approx(3, abs=0.01)


def test_what_is_drawn(folder):
    tracks = scan(Source(audio=folder)).tracks
    mixes = mixing.draw(tracks, ratio=20, seed=3, snr=(-5, 5))
    assert len(mixes) == 240 and mixes == mixing.draw(tracks, ratio=20, seed=3, snr=(-5, 5))
    assert mixes != mixing.draw(tracks, ratio=20, seed=4, snr=(-5, 5))
    pairs = {mix.place.names for mix in mixes}
    assert all(a != b for a, b in pairs) and len(pairs) > 90  # of 132
    assert len({mix.track_id for mix in mixes}) == 240
    for name, low, high in (("snr", -5, 5), ("shift", 0, 1), ("level", -35, -15)):
        values = [getattr(mix.place, name) for mix in mixes]
        assert low <= min(values) and max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < (high - low) / 10
    assert mixing.draw(tracks, ratio=0, seed=3, snr=(-5, 5)) == []
    with pytest.raises(UserError, match="there is one track to train on"):
        mixing.draw(tracks[:1], ratio=1, seed=3, snr=(-5, 5))


def test_captions_are_those_of_both(folder):
    a, b = scan(Source(audio=folder)).tracks[:2]

    def made(first, second):
        track = mixing.mixed(0, first, second, snr=2.0, shift=0.5, level=-20.0)
        track = mixing.with_offset(track, 0.25)
        return track.caption, json.loads(track.info)

    about = {"tracks": [a.track_id, b.track_id], "snr": 2.0, "offset": 0.25}
    assert made(a, b) == (f"{a.caption} {b.caption}", {"mixed": about})
    alike = dataclasses.replace(b, captions=a.captions)
    assert made(a, alike) == (a.caption, {"mixed": about})
    several = dataclasses.replace(a, captions=("A dog.", "A bark."), fields='{"bpm": 3}')
    other = dataclasses.replace(b, captions=("Rain.", "It rains."))
    caption, info = made(several, other)
    assert caption == "A dog. Rain."
    assert info["captions"] == ["A dog. It rains.", "A bark. Rain.", "A bark. It rains."]
    assert "bpm" not in info  # of one of two sounds


def test_some_record_of_every_mix_holds_both(folder):
    for long, short, most in itertools.product((1, 7, 20, 33), (1, 3, 7, 15), (3, 7, 10)):
        for begin in range(long - short + 1):
            both = (begin / 50, (begin + short) / 50)
            pieces = [(first / 50, end / 50) for first, end in cut(long, most)]
            assert any(mixing.is_heard(both, piece) for piece in pieces)
    assert not mixing.is_heard((0.0, 2.0), (1.2, 4.0))
    assert mixing.is_heard((0.0, 2.0), (0.9, 4.0))


def test_the_job_adds_mixes_to_the_training_split(folder, tmp_path, one_codec):
    job = Job(
        audio=folder, out=tmp_path / "out", mix_ratio=0.5, mix_seed=8, mix_snr=(0.0, 3.0),
        validation_percent=30, max_record_seconds=1.25, window_seconds=1, tracks_per_shard=4,
    )  # fmt: skip
    plain = dataclasses.replace(job, out=tmp_path / "plain", mix_ratio=0.0)
    run(plain)
    # (what folders from before there were mixes and stereo do not have)
    noted = json.loads((plain.out / "job.json").read_text())
    assert not [name for name in noted if "mix" in name or "stereo" in name or "inter" in name]
    summary = run(job)
    mixed, others = read_out(job.out)
    assert read_out(job.out, "validation")[0] == []
    assert [r["track_id"] for r in others] == [r["track_id"] for r in read_out(plain.out)[1]]
    for one, same in zip(others, read_out(plain.out)[1], strict=True):
        np.testing.assert_array_equal(one["codes_KT"], same["codes_KT"])
    held_out = {r["track_id"] for r in read_out(job.out, "validation")[1]}
    tracks = [t for t in scan(Source(audio=folder)).tracks if split_of(t.track_id, 30) == "train"]
    assert held_out and not held_out & {t.track_id for t in tracks}
    mixes = mixing.draw(tracks, ratio=0.5, seed=8, snr=(0, 3))
    assert f"; {len(mixes)} mixes, " in summary and len(mixes) == round(0.5 * len(tracks))
    assert (job.out / "mix_rejects.jsonl").read_text() == ""
    assert not (plain.out / "mix_rejects.jsonl").exists()
    assert records.read_totals(job.out).about["mixes"] == len(mixes)
    of = {track.track_id: track for track in tracks}
    for number, mix in enumerate(mixes):
        made, mixed_of = made_of(mix), json.loads(mix.fields)["mixed"]
        a, b = (of[name] for name in mixed_of["tracks"])
        seconds = made.wav_CN.shape[1] / RATE
        both = made.begin / RATE, made.end / RATE
        pieces = [(i / 50, min(j / 50, seconds)) for i, j in cut(-int(-50 * seconds // 1), 62)]
        kept = [piece for piece in pieces if mixing.is_heard(both, piece)]
        found = [record for record in mixed if record["track_id"] == mix.track_id]
        assert [r["start"] for r in found] == [pytest.approx(start) for start, _ in kept]
        for record in found:
            about = mixed_of | {"offset": round(both[0], 3), "snr": round(mix.place.snr, 3)}
            assert record["caption"] == f"{a.caption} {b.caption}"
            assert record["info"] == {"mixed": about}
        if number % 2:
            continue  # encoding takes long
        filled_CN = np.pad(made.wav_CN, ((0, 0), (0, -made.wav_CN.shape[1] % one_codec.hop)))
        whole_KT = one_codec.encode(filled_CN[None])[0]
        for record in found:
            first = round(record["start"] * 50)
            part_KT = whole_KT[:, first : first + record["codes_KT"].shape[1]]
            assert (record["codes_KT"] != part_KT).mean() < 0.01
    for change in ({"mix_seed": 9}, {"mix_snr": (0.0, 4.0)}, {"mix_ratio": 0.0}):
        with pytest.raises(UserError, match="begun with other settings: --mix-"):
            run(dataclasses.replace(job, **change))
    assert run(job) == summary


def test_a_reject_of_a_part_rejects_the_mix_and_counts_as_one_file(
    folder, tmp_path, monkeypatch, stub
):
    monkeypatch.setattr(mixer, "MOST_SECONDS", 1.75)
    (tmp_path / "audio").mkdir()
    for i in (0, 1, 2, 9):
        for suffix in (".wav", ".json"):
            shutil.copy(folder / f"{i}{suffix}", tmp_path / "audio")
    put(tmp_path / "audio" / "short.wav", tone(0.3))
    job = Job(
        audio=tmp_path / "audio", out=tmp_path / "out", mix_ratio=2, validation_percent=0,
        max_reject_ratio=0.2,
    )  # fmt: skip
    summary = run(job)
    assert "1 of 5 files rejected (1 too short" in summary
    assert len((job.out / "rejects.jsonl").read_text().splitlines()) == 1
    rejects = [json.loads(x) for x in (job.out / "mix_rejects.jsonl").read_text().splitlines()]
    mixes = mixing.draw(scan(job).tracks, ratio=2, seed=0, snr=(-5, 5))
    unfit = [m for m in mixes if set(m.place.names) & {"short.wav", "9.wav"}]
    assert sorted(r["path"] for r in rejects) == sorted(m.path for m in unfit)
    assert {r["reason"] for r in rejects} == {"too short", "too long"}
    assert all(r["detail"].startswith(("short.wav: ", "9.wav: ")) for r in rejects)
    mixed, others = read_out(job.out)
    assert 0 < len(mixed) == len(mixes) - len(unfit) and len(others) == 4


def test_a_track_too_long_for_the_job_is_in_no_mix(folder):
    (mix,) = mixing.draw(scan(Source(audio=folder)).tracks[:2], ratio=0.5, seed=0, snr=(0, 0))
    intake = dataclasses.replace(MONO, max_track_seconds=1.05)  # of 1.0 and 1.1 s
    with pytest.raises(RejectedError, match="too long"):
        made_of(mix, intake)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mix_ratio": -0.1}, "--mix-ratio must"),
        ({"mix_seed": -1}, "--mix-seed must"),
        ({"mix_snr": (5.0, -5.0)}, "--mix-snr 5 -5: give the lower first"),
        ({"mix_snr": (float("nan"), 5.0)}, "--mix-snr must"),
    ],
)
def test_bad_settings_of_mixes_give_one_line(folder, tmp_path, change, match):
    job = Job(audio=folder, out=tmp_path / "out", mix_ratio=1.0)
    with pytest.raises(UserError, match=match):
        run(dataclasses.replace(job, **change))


def test_the_command_line_takes_negative_levels(tmp_path):
    from magnet_jax import cli

    words = ["--audio", "a", "--out", "b", "--mix-ratio", "1", "--mix-snr", "-5", "2.5"]
    assert cli.parse(Job, words, prog="job").mix_snr == (-5.0, 2.5)
